"""`load_weights`: from any known checkpoint into a model, strictly, with a report of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from m2f_lab.model import Mask2Former, build_model
from m2f_lab.weights.huggingface import HUGGINGFACE, config_conflicts
from m2f_lab.weights.keymap import KeyMap, Translation, shorten
from m2f_lab.weights.mismatch import describe_mismatch, num_classes_of
from m2f_lab.weights.native import (
    NATIVE,
    classes_from_json,
    config_from_json,
    is_own_config,
    unseen_conflicts,
    without_pretraining,
)
from m2f_lab.weights.official import OFFICIAL
from m2f_lab.weights.reading import Checkpoint, read_checkpoint
from m2f_lab.weights.sssegmentation import SSSEGMENTATION

FORMATS: tuple[KeyMap, ...] = (NATIVE, OFFICIAL, HUGGINGFACE, SSSEGMENTATION)
CLASS_HEAD = ("transformer_decoder.class_head.weight", "transformer_decoder.class_head.bias")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; `print` it.

    Attributes:
        path: where the weights come from.
        format: "m2f_lab", "official Mask2Former", "Hugging Face" or "SSSegmentation".
        inside: where in the file they were, such as `model`; empty where the file holds nothing else.
        num_tensors: loaded.
        num_values: numbers in them.
        converted: what was changed on the way → our names of the tensors.
        ignored: reason → names in the file.
        kept: reason → our names of the tensors that stay as they were in the model.
    """

    path: Path
    format: str
    inside: str
    num_tensors: int
    num_values: int
    converted: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = f", found under {self.inside}" if self.inside else ""
        lines = [f"Loaded {self.num_tensors} tensors ({self.num_values / 1e6:.2f} M values) from {self.path}"]
        lines.append(f"  format     {self.format}{inside}")
        for title, groups in (("converted", self.converted), ("ignored", self.ignored), ("kept", self.kept)):
            for reason, names in groups.items():
                lines.append(f"  {title:<10} {len(names)} × {reason}: {shorten(names, limit=2)}")
        return "\n".join(lines)


def load_weights(model: Mask2Former, path: str | Path, reset_classifier: bool = False) -> LoadReport:
    """Load a checkpoint of any known format into a model. On any error the model stays as it was.

    Args:
        model: built with the architecture of the checkpoint.
        path: one of ours (a folder, or its model.safetensors), a file of the official Mask2Former (.pkl, .pth) or of
            SSSegmentation (.pth), a folder or file of Hugging Face. What it is, its keys tell, not its name; any of
            them may be stored as safetensors, torch file or pickle of arrays. No code in it is ever run.
        reset_classifier: keep the model's own class head instead of the checkpoint's, to train on other classes.

    Returns:
        What was loaded, converted, ignored and kept.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UnsafeFileError: the file holds more than tensors and containers.
        ValueError: the file is damaged or of no known format, or does not fit the model; the message names the keys,
            shapes or class numbers, and the way out.
    """
    return _load(model, read_checkpoint(path), reset_classifier)


def load_model(folder: str | Path) -> Mask2Former:
    """Rebuild a model that `save_weights` saved: its configuration, its weights and its classes, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder was not written by `save_weights`.
    """
    checkpoint = read_checkpoint(folder)
    if not is_own_config(checkpoint.config):
        raise ValueError(
            f"{folder} has no config.json written by save_weights. Build the model with build_model(ModelConfig(…)) "
            "and load the weights with load_weights(model, path)."
        )
    model = build_model(without_pretraining(config_from_json(checkpoint.config)))
    _load(model, checkpoint, reset_classifier=False)
    return model.eval()


def recognise(keys: list[str], path: Path) -> KeyMap:
    """The format that names tensors like this.

    Raises:
        ValueError: none does.
    """
    for format in FORMATS:
        if format.recognises(keys):
            return format
    pyramid = ("patch_embed.", "layer1.", "stages.", "layers.0.", "res2.", "stem.")
    if any(key.removeprefix("backbone.").startswith(pyramid) for key in keys):
        hint = "It looks like a backbone alone: give its path as ModelConfig(backbone_weights=…) instead."
    else:
        hint = f"Known are {', '.join(format.name for format in FORMATS)}."
    raise ValueError(f"{path} is of no known format; its first keys are {shorten(keys, limit=4)}. {hint}")


def _load(model: Mask2Former, checkpoint: Checkpoint, reset_classifier: bool) -> LoadReport:
    format = recognise(list(checkpoint.tensors), checkpoint.path)
    own = model.state_dict()
    translation = format.to_ours(checkpoint.tensors)
    kept = _keep(translation, own, reset_classifier)
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
    if is_own_config(checkpoint.config) and model.classes is None and not reset_classifier:
        model.classes = classes_from_json(checkpoint.config)
    return LoadReport(
        path=checkpoint.path,
        format=format.name,
        inside=checkpoint.inside,
        num_tensors=len(translation.tensors),
        num_values=sum(tensor.numel() for tensor in translation.tensors.values()),
        converted=converted,
        ignored=translation.ignored,
        kept=kept,
    )


def _keep(translation: Translation, own: Mapping[str, Tensor], reset_classifier: bool) -> dict[str, list[str]]:
    """Which tensors of the model stay, and why; those that stay by choice leave the translation."""
    kept: dict[str, list[str]] = {}
    counters = [n for n in own if n.endswith(".num_batches_tracked") and n not in translation.tensors]
    if counters:  # frozen batch norms are saved without; evaluation does not use them
        kept["a counter of training steps that the checkpoint lacks"] = counters
    if reset_classifier:
        kept["the model's own class head, because of reset_classifier=True"] = list(CLASS_HEAD)
        for name in CLASS_HEAD:
            if translation.tensors.pop(name, None) is not None:
                reason = "its class head, because of reset_classifier=True"
                translation.ignored.setdefault(reason, []).extend(translation.origins[name])
    return kept


def _check_num_classes(theirs: int | None, ours: int, path: Path) -> None:
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{path} was trained on {theirs} classes, the model has {ours}. Build the model with "
            f"ModelConfig(num_classes={theirs}), or keep everything but the class head with "
            "load_weights(model, path, reset_classifier=True) and train that anew."
        )


def _check_config(model: Mask2Former, checkpoint: Checkpoint, format: KeyMap) -> None:
    """Compare what shapes cannot show: eight heads of 32 channels look like four of 64."""
    config = checkpoint.config
    if config is None:
        return
    conflicts = []
    if format is HUGGINGFACE:
        conflicts = config_conflicts(config, model.config.num_heads)
    elif is_own_config(config):
        conflicts = unseen_conflicts(config, model.config)
    if conflicts:
        raise ValueError(
            f"{checkpoint.path} was made with {', '.join(conflicts)}. The weights would fit but compute something "
            "else: build the model with the same choices, if ModelConfig has them."
        )


def _check_normalisation(model: Mask2Former, checkpoint: Checkpoint) -> None:
    """The model normalises images itself; weights that are used to other colours would go wrong silently."""
    ours = [model.pixel_mean.flatten().tolist(), model.pixel_std.flatten().tolist()]
    if "pixel_mean" in checkpoint.tensors and "pixel_std" in checkpoint.tensors:
        theirs = [checkpoint.tensors[name].flatten().tolist() for name in ("pixel_mean", "pixel_std")]
    elif checkpoint.preprocessor and {"image_mean", "image_std"} <= set(checkpoint.preprocessor):
        theirs = [[255 * value for value in checkpoint.preprocessor[name]] for name in ("image_mean", "image_std")]
    else:
        return
    if not torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=0.5):
        mean, std = ([round(value, 3) for value in values] for values in theirs)
        raise ValueError(
            f"{checkpoint.path} expects RGB images normalised with mean {mean} and standard deviation {std}, which is "
            "not what the model does. Set model.pixel_mean and model.pixel_std to these before loading."
        )
