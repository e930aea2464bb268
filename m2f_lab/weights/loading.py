"""`load_weights`: from any known checkpoint into a model, strictly, with a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.data.dataset import abbreviate
from m2f_lab.networks import pixel_statistics
from m2f_lab.references import resolve_loaded
from m2f_lab.weights.eomt import EOMT, EOMT_DINOV3, EOMT_OFFICIAL
from m2f_lab.weights.huggingface import HUGGINGFACE, config_conflicts
from m2f_lab.weights.keymap import KeyMap, Translation
from m2f_lab.weights.mismatch import class_head, describe_mismatch, num_classes_of
from m2f_lab.weights.native import (
    CONFIG_FILE,
    NATIVE,
    Builder,
    build_from,
    builder_from_json,
    classes_from_json,
    config_from_json,
    is_own_config,
    unseen_conflicts,
    without_pretraining,
)
from m2f_lab.weights.official import OFFICIAL
from m2f_lab.weights.reading import Checkpoint, read_checkpoint
from m2f_lab.weights.sssegmentation import SSSEGMENTATION

FORMATS: tuple[KeyMap, ...] = (OFFICIAL, HUGGINGFACE, SSSEGMENTATION, EOMT, EOMT_DINOV3, EOMT_OFFICIAL)


class OtherClassesError(ValueError):
    """The weights predict another number of classes than the model."""


@dataclass(frozen=True)
class LoadReport:
    """Account of what `load_weights` did; `print` it.

    Attributes:
        path: where the weights come from.
        format: its name, such as "m2f_lab", "official Mask2Former" or "Hugging Face".
        inside: where in the file they were, such as `model`; empty where the file holds nothing else.
        num_tensors: loaded.
        num_values: numbers in them.
        converted: what was changed on the way → our names of the tensors.
        ignored: reason → names in the file.
        builders: the checkpoint's and the model's, where they differ: equal names may then compute something else.
        kept: reason → our names of the tensors that stay as they were in the model.
        passed_over: other entries of the file that hold weights; load_weights(…, entry=…) takes one.
    """

    path: Path
    format: str
    inside: str
    num_tensors: int
    num_values: int
    converted: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    builders: tuple[str, str] | None = None
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        inside = f", found under {self.inside}" if self.inside else ""
        lines = [f"Loaded {self.num_tensors} tensors ({self.num_values / 1e6:.2f} M values) from {self.path}"]
        lines.append(f"  format     {self.format}{inside}")
        for title, groups in (("converted", self.converted), ("ignored", self.ignored), ("kept", self.kept)):
            for reason, names in groups.items():
                lines.append(f"  {title:<10} {len(names)} × {reason}: {abbreviate(names, 2)}")
        if self.passed_over:
            names, first = ", ".join(self.passed_over), self.passed_over[0]
            lines.append(f'  not taken  {names}; load_weights(…, entry="{first}") takes it')
        if self.builders:
            lines.append("  builder    {} in the checkpoint, {} here".format(*self.builders))
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | Path,
    reset_classifier: bool = False,
    entry: str | None = None,
    keep_classes: bool = False,
) -> LoadReport:
    """Load a checkpoint of any known format into a model. On any error the model stays as it was.

    Args:
        model: built with the architecture of the checkpoint. Our own checkpoints fit any module.
        path: one of ours (a folder, or its model.safetensors), a file of the official Mask2Former (.pkl, .pth), of
            EoMT or of SSSegmentation (.pth), a folder or file of Hugging Face. Ours is recognised by its config.json,
            or by names that it shares with the model; the others by their keys. Any of them may be stored as
            safetensors, torch file or pickle of arrays. No code in it is ever run.
        reset_classifier: keep the model's own class head, the module called `class_head`, instead of the
            checkpoint's, to train on other classes.
        entry: of a file that holds several, such as "model_ema"; by default the weights themselves, or their average
            where that is alone.
        keep_classes: with reset_classifier, take the checkpoint's rows of the class head for "no object" and for
            classes of the model that the checkpoint has by name.

    Returns:
        The names that were loaded, converted, ignored and kept.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnsafeFileError: the file holds more than tensors and containers.
        ValueError: the file is damaged or of no known format, or does not fit the model; the message names the keys,
            shapes or class numbers, and the way out.
    """
    if keep_classes and not reset_classifier:
        raise ValueError("keep_classes=True keeps rows of a class head that reset_classifier=True replaces; pass both.")
    return _load(model, read_checkpoint(path, entry), reset_classifier, keep_classes)


def saved_classes(folder: str | Path) -> Classes | None:
    """Classes that `save_weights` noted in a folder; None where it is of another kind, or the model had none."""
    file = Path(folder).expanduser() / CONFIG_FILE
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return classes_from_json(content) if is_own_config(content) else None


def load_model(folder: str | Path, build: Builder | None = None) -> nn.Module:
    """Rebuild a model that `save_weights` saved: its configuration, its weights and its classes, in evaluation mode.

    Args:
        folder: a folder that `save_weights` or a run wrote.
        build: the builder; by default the one that the folder names. A module of one's own must be imported before:
            no code is imported because a file names it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder was not written by `save_weights`, or the builder is missing or another one.
    """
    checkpoint = read_checkpoint(folder)
    if not is_own_config(checkpoint.config):
        raise ValueError(
            f"{folder} has no config.json written by save_weights. Build the model with build_model(ModelConfig(…)) "
            "and load the weights with load_weights(model, path)."
        )
    config = config_from_json(checkpoint.config)
    if config is None:
        raise ValueError(
            f"{folder} holds a model that was saved without a ModelConfig. Build the model yourself and load the "
            "weights with load_weights(model, folder)."
        )
    named = builder_from_json(checkpoint.config)
    if build is None:
        build = _builder(named, folder)
    elif named is not None and named.partition(":")[2] != build.__name__:  # the module may have moved
        raise ValueError(
            f"The model in {folder} was built by {named!r}, not by {build.__name__!r}, which may compute something "
            "else with the same weights. Pass the former; or build the model yourself and use load_weights."
        )
    model = build_from(build, without_pretraining(config))
    _load(model, checkpoint, reset_classifier=False)
    return model.eval()


def _builder(reference: str | None, folder: str | Path) -> Builder:
    if reference is None:
        raise ValueError(
            f"{folder} does not name the builder of its model: pass it, load_model(folder, build=…), a function "
            "ModelConfig → module; or build the model yourself and use load_weights(model, folder)."
        )
    try:
        return resolve_loaded(reference)
    except ValueError as error:
        raise ValueError(f"The model in {folder} was built by {reference!r}. {error}") from error


_OF_BACKBONES = (
    "patch_embed.", "pos_embed", "cls_token", "conv1.", "conv_stem.", "stem", "bn1.", "bn2.", "norm", "res2.", "res3.",
    "res4.", "res5.", "layer1.", "layer2.", "layer3.", "layer4.", "layers.", "stages.", "blocks.", "conv_head.",
    "head.", "fc.", "classifier.",
)  # fmt: skip
"""First parts of key names in timm's and detectron2's backbones, classifiers included."""


def recognise(checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> KeyMap:
    """Tell the format of a checkpoint: ours by its config.json or by names shared with the model, others by their keys.

    Args:
        checkpoint: as it was read.
        own: the model's state dict.

    Raises:
        ValueError: it is of no known format.
    """
    keys = list(checkpoint.tensors)
    if format := _known(checkpoint, own):
        return format
    others = [key for key in keys if not key.removeprefix("backbone.").startswith(_OF_BACKBONES)]
    if keys and not others:
        hint = "It looks like a backbone alone: give its path as ModelConfig(backbone_weights=…) instead."
    elif len(others) < len(keys):
        hint = f"It looks like a whole model of an unknown toolbox: besides a backbone it holds {others[0]}."
    else:
        hint = f"Known are {', '.join(format.name for format in (NATIVE, *FORMATS))}."
    raise ValueError(f"{checkpoint.path} is of no known format; its first keys are {abbreviate(keys, 4)}. {hint}")


def _known(checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> KeyMap | None:
    keys = list(checkpoint.tensors)
    if is_own_config(checkpoint.config) or set(keys) == set(own):
        return NATIVE
    by_keys = next((format for format in FORMATS if format.recognises(keys)), None)
    return by_keys or (NATIVE if set(keys) & set(own) else None)


def _unwrapped(checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> Checkpoint:
    """The checkpoint without an outer prefix that hides its format: Lightning's modules call the model `model`."""
    inner = checkpoint
    while inner is not None and _known(inner, own) is None:
        inner = inner.without_prefix()
    return checkpoint if inner is None else inner


def _load(model: nn.Module, checkpoint: Checkpoint, reset_classifier: bool, keep_classes: bool = False) -> LoadReport:
    own = model.state_dict()
    checkpoint = _unwrapped(checkpoint, own)
    format = recognise(checkpoint, own)
    translation = format.to_ours(checkpoint.tensors)
    rows = _rows_by_name(model, checkpoint) if keep_classes else {}
    kept = _keep(translation, own, reset_classifier, rows)
    if not reset_classifier:
        _check_num_classes(num_classes_of(translation.tensors), num_classes_of(own), checkpoint.path)
    _check_config(model, checkpoint, format)
    _check_normalisation(model, checkpoint)
    complaint = describe_mismatch(own, translation, kept=[name for names in kept.values() for name in names])
    if complaint:
        raise ValueError(f"{checkpoint.path} ({format.name}) does not fit the model.\n{complaint}")

    converted = {"query, key and value joined": translation.joined} if translation.joined else {}
    converted |= translation.reordered
    for name, tensor in translation.tensors.items():
        if tensor.dtype != own[name].dtype:
            converted.setdefault(f"from {tensor.dtype} to {own[name].dtype}", []).append(name)
    model.load_state_dict({name: translation.tensors.get(name, tensor) for name, tensor in own.items()})
    builders = None
    if is_own_config(checkpoint.config):
        if getattr(model, "classes", None) is None and not reset_classifier:
            model.classes = classes_from_json(checkpoint.config)
        builders = builder_from_json(checkpoint.config), getattr(model, "builder", None)
    return LoadReport(
        path=checkpoint.path,
        format=format.name,
        inside=checkpoint.inside,
        num_tensors=len(translation.tensors),
        num_values=sum(tensor.numel() for tensor in translation.tensors.values()),
        converted=converted,
        ignored=translation.ignored,
        kept=kept,
        passed_over=checkpoint.passed_over,
        builders=builders if builders and None not in builders and builders[0] != builders[1] else None,
    )


def _rows_by_name(model: nn.Module, checkpoint: Checkpoint) -> dict[int, int]:
    """Rows of the class head that are the same in model and checkpoint: classes of one name, and "no object" (-1)."""
    theirs = classes_from_json(checkpoint.config) if is_own_config(checkpoint.config) else None
    ours = getattr(model, "classes", None)
    if theirs is None or ours is None:
        side = "the model has no classes" if ours is None else f"{checkpoint.path} names no classes"
        raise ValueError(f"keep_classes=True matches classes by name, but {side}; set model.classes, or leave it out.")
    return {ours.names.index(name): k for k, name in enumerate(theirs.names) if name in ours.names} | {-1: -1}


def _keep(
    translation: Translation, own: Mapping[str, Tensor], reset_classifier: bool, rows: Mapping[int, int]
) -> dict[str, list[str]]:
    """List the tensors of the model that stay, by reason; those that stay by choice leave the translation.

    Args:
        rows: of the class head that are loaded all the same, ours → theirs
    """
    kept: dict[str, list[str]] = {}
    counters = [n for n in own if n.endswith(".num_batches_tracked") and n not in translation.tensors]
    if counters:  # frozen batch norms are saved without; evaluation does not use them
        kept["a counter of training steps that the checkpoint lacks"] = counters
    if reset_classifier:
        head = class_head(own)
        if not head:
            raise ValueError(
                "reset_classifier=True keeps the module called class_head, but this model has none; load with "
                "model.load_state_dict(…, strict=False) instead."
            )
        if not rows:
            kept["the model's own class head, because of reset_classifier=True"] = head
        for name in head:
            theirs = translation.tensors.pop(name, None)
            if theirs is not None and rows:
                merged = own[name].clone()
                merged[list(rows)] = theirs[list(rows.values())].to(merged)
                translation.tensors[name] = merged
                kept[f"rows of the class head, {len(rows) - 1} classes and no object, by name"] = head
            elif theirs is not None:
                reason = "its class head, because of reset_classifier=True"
                translation.ignored.setdefault(reason, []).extend(translation.origins[name])
    return kept


def _check_num_classes(theirs: int | None, ours: int | None, path: Path) -> None:
    if None not in (theirs, ours) and theirs != ours:
        raise OtherClassesError(
            f"{path} was trained on {theirs} classes, the model has {ours}. Build the model with "
            f"ModelConfig(num_classes={theirs}), or keep everything but the class head with "
            "load_weights(model, path, reset_classifier=True) and train a new one."
        )


def _check_config(model: nn.Module, checkpoint: Checkpoint, format: KeyMap) -> None:
    """Compare what shapes cannot show: eight heads of 32 channels look like four of 64."""
    config, ours = checkpoint.config, getattr(model, "config", None)
    if config is None or ours is None:
        return
    conflicts = []
    if format is HUGGINGFACE:
        conflicts = config_conflicts(config, ours.num_heads)
    elif is_own_config(config):
        conflicts = unseen_conflicts(config, ours)
    if conflicts:
        raise ValueError(
            f"{checkpoint.path} was made with {', '.join(conflicts)}. The weights would fit but compute something "
            "else: build the model with the same choices, if ModelConfig has them."
        )


def _check_normalisation(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise if the model normalises images otherwise than the weights expect: they would go wrong silently."""
    if "pixel_mean" not in dict(model.named_buffers()):  # a model of another kind
        return
    ours = [model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()]
    if "pixel_mean" in checkpoint.tensors and "pixel_std" in checkpoint.tensors:
        theirs = [checkpoint.tensors[name].flatten().tolist() for name in ("pixel_mean", "pixel_std")]
    elif checkpoint.preprocessor and {"image_mean", "image_std"} <= set(checkpoint.preprocessor):
        theirs = [[255 * value for value in checkpoint.preprocessor[name]] for name in ("image_mean", "image_std")]
    elif is_own_config(checkpoint.config) and (config := config_from_json(checkpoint.config)):
        theirs = [list(values) for values in pixel_statistics(config)]
    else:
        return
    if len(ours[0]) != len(theirs[0]) or not torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=0.5):
        mean, std = ([round(value, 3) for value in values] for values in theirs)
        raise ValueError(
            f"{checkpoint.path} expects RGB images normalised with mean {mean} and standard deviation {std}, which is "
            "not what the model does. Set model.pixel_mean and model.pixel_std to these before loading."
        )
