"""Our own format: a folder with `model.safetensors` and `config.json`. Nothing in it can run code."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

from safetensors.torch import save_file

from m2f_lab.data import Classes
from m2f_lab.model import Mask2Former, ModelConfig
from m2f_lab.weights.keymap import KeyMap, Rule

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FORMAT = "m2f_lab"

NATIVE = KeyMap(name="m2f_lab", signature="transformer_decoder.query_features", rules=(Rule("*", "*"),))


def save_weights(model: Mask2Former, folder: str | Path) -> Path:
    """Save a model so that `load_model(folder)` rebuilds it: its weights, its configuration and its classes.

    Both files are written in full beside their destination before they take its place: whoever reads the folder,
    even after a crash, finds the old files or the new ones, never half a file.

    Returns:
        The folder.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {
        "format": _FORMAT,
        "model": asdict(model.config),
        "classes": None if model.classes is None else _classes_to_json(model.classes),
    }
    partial = {name: folder / f".{name}.partial-{os.getpid()}" for name in (WEIGHTS_FILE, CONFIG_FILE)}
    try:
        save_file(tensors, partial[WEIGHTS_FILE], metadata={"format": "pt"})
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


def config_from_json(content: dict) -> ModelConfig:
    """The configuration that `save_weights` wrote.

    Raises:
        ValueError: it has fields that this version does not know.
    """
    values = content["model"]
    unknown = set(values) - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"ModelConfig has no field {sorted(unknown)}; was this folder written by another version?")
    return ModelConfig(**values)


def classes_from_json(content: dict) -> Classes | None:
    values = content.get("classes")
    if values is None:
        return None
    return Classes(
        names=tuple(values["names"]),
        colors=tuple(tuple(color) for color in values["colors"]),
        things=frozenset(values["things"]),
    )


def unseen_conflicts(content: dict, config: ModelConfig) -> list[str]:
    """Choices that shapes do not show and that differ between a saved configuration and a model's."""
    saved = config_from_json(content)
    return [
        f"{name} = {getattr(saved, name)} (the model has {getattr(config, name)})"
        for name in ("num_heads", "num_sampling_points")
        if getattr(saved, name) != getattr(config, name)
    ]


def without_pretraining(config: ModelConfig) -> ModelConfig:
    """The same architecture; nothing is downloaded when it is built, because all weights come from the checkpoint."""
    return replace(config, backbone_weights=None)


def _classes_to_json(classes: Classes) -> dict:
    return {
        "names": list(classes.names),
        "colors": [list(map(int, color)) for color in classes.colors],
        "things": sorted(classes.things),
    }


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
