"""Our own format: a folder with `model.safetensors` and `config.json`. Nothing in it can run code.

`config.json` is what the folder is recognised by. It names the builder, "package.module:function", so that a changed
model reopens; reading it never imports code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.networks import settled
from m2f_lab.recipes import WITH_CHECKPOINT, ModelConfig, Recipe
from m2f_lab.references import reference_to
from m2f_lab.weights.keymap import KeyMap, Rule

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT, _VERSION = "m2f_lab", 2  # version 1 named neither version nor builder: there was one

NATIVE = KeyMap(name="m2f_lab", signature="", rules=(Rule("*", "*"),))

Builder = Callable[[ModelConfig], nn.Module]
"""Builds a model whose forward(images) returns an Output, with random or pretrained weights as the config says."""


def build_from(build: Builder, config: ModelConfig, classes: Classes | None = None) -> nn.Module:
    """Build a model and note on it what `save_weights` saves: `config`, `builder` (its name) and `classes`.

    Raises:
        ValueError: the builder returned no module, or cannot be found again by name.
    """
    builder = reference_to(build)
    model = build(config)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{builder} returned a {type(model).__name__}; a builder returns a torch.nn.Module.")
    model.config, model.builder, model.classes = config, builder, classes
    return model


def save_weights(model: nn.Module, folder: str | Path) -> Path:
    """Save a model so that `load_model(folder)` rebuilds it: weights, configuration, builder and classes.

    Both files are written in full beside their destination before they take its place: a reader of the folder finds
    the old files or the new ones, even after a crash, never half a file.

    Args:
        model: any module. What `train` and `load_model` note on it is saved with the weights: `config`, `builder` and
            `classes`. A model without a builder or a config is loaded by `load_weights` instead of `load_model`.

    Returns:
        The folder.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    config, classes = getattr(model, "config", None), getattr(model, "classes", None)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "builder": getattr(model, "builder", None),
        "model": None if config is None else asdict(_as_it_is(model, config)),
        "classes": None if classes is None else classes.to_json(),
    }
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(_tensors(model), partial[WEIGHTS_FILE], metadata={"format": "pt"})
        partial[CONFIG_FILE].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in partial.values():
            _flush_to_disk(path)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder


def is_own_config(config: dict | None) -> bool:
    return config is not None and config.get("format") == _FORMAT


def builder_from_json(content: dict) -> str | None:
    """Name of the builder; None where the model was saved without."""
    return content.get("builder") if "version" in content else Recipe.builder


def config_from_json(content: dict) -> ModelConfig | None:
    """Configuration that `save_weights` wrote; None where the model had none.

    Raises:
        ValueError: it has fields that this version does not know.
    """
    values = content["model"]
    if values is None:
        return None
    values = ModelConfig.completed(values)
    unknown = set(values) - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"ModelConfig has no field {sorted(unknown)}; was this folder written by another version?")
    return ModelConfig(**values)


def classes_from_json(content: dict) -> Classes | None:
    values = content.get("classes")
    return None if values is None else Classes.from_json(values)


def unseen_conflicts(content: dict, config: ModelConfig) -> list[str]:
    """List choices that shapes do not show and that differ between a saved configuration and a model's."""
    saved = config_from_json(content)
    return [
        f"{name} = {getattr(saved, name)} (the model has {getattr(config, name)})"
        for name in ("num_heads", "num_sampling_points")
        if saved is not None and getattr(saved, name) != getattr(config, name)
    ]


def without_pretraining(config: ModelConfig) -> ModelConfig:
    """The same architecture; nothing is downloaded when it is built, because all weights come from the checkpoint."""
    return replace(config, backbone_weights=WITH_CHECKPOINT if config.backbone_weights else None)


def _as_it_is(model: nn.Module, config: ModelConfig) -> ModelConfig:
    """The configuration with the pixel statistics of the model's buffers, which may have been set by hand."""
    buffers = dict(model.named_buffers())
    if not {"pixel_mean", "pixel_std"} <= buffers.keys():
        return config
    config = settled(config)
    for name in ("pixel_mean", "pixel_std"):
        values = buffers[name].flatten().cpu()
        if not torch.equal(values, torch.tensor(getattr(config, name)).to(values)):
            config = replace(config, **{name: tuple(values.tolist())})
    return config


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, and no two names for one memory (tied weights)."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.detach().cpu().contiguous()
        memory = tensors[name].untyped_storage().data_ptr()
        if memory in seen:
            tensors[name] = tensors[name].clone()
        seen.add(memory)
    return tensors


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
