"""Differences between a checkpoint and a model, and the configuration that would fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from m2f_lab.data.dataset import abbreviate
from m2f_lab.weights.keymap import Translation

# ModelConfig field → a tensor and a dimension whose size is its value.
_SIZES = {
    "hidden_dim": ("transformer_decoder.query_features", 1),
    "mask_dim": ("transformer_decoder.mask_head.4.weight", 0),
    "num_queries": ("transformer_decoder.query_features", 0),
    "encoder_feedforward_dim": ("pixel_decoder.layers.0.feedforward.0.weight", 0),
    "decoder_feedforward_dim": ("transformer_decoder.layers.0.feedforward.0.weight", 0),
}
# ModelConfig field → the prefix of a list of layers whose length is its value.
_LENGTHS = {"num_encoder_layers": "pixel_decoder.layers.", "num_decoder_layers": "transformer_decoder.layers."}


def class_head(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of the class head, the module called `class_head`; empty where there is none."""
    return [name for name in state if name.split(".")[-2:-1] == ["class_head"]]


def num_classes_of(state: Mapping[str, Tensor]) -> int | None:
    """K, without "no object", of a state dict under our names; None where it has no class head."""
    weight = next((state[name] for name in class_head(state) if name.endswith(".weight")), None)
    return None if weight is None else weight.shape[0] - 1


def visible_config(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Read fields of ModelConfig off a state dict under our names; empty for models of another kind."""
    config = {name: state[key].shape[axis] for name, (key, axis) in _SIZES.items() if key in state}
    for name, prefix in _LENGTHS.items():
        numbers = {match[1] for key in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
        if numbers:
            config[name] = len(numbers)
    return config


def describe_mismatch(own: Mapping[str, Tensor], translation: Translation, kept: Iterable[str]) -> str:
    """Describe what keeps a checkpoint from loading, line by line; empty if nothing does.

    Args:
        own: the model's state dict.
        translation: the checkpoint's, under our names.
        kept: tensors of the model that need not be in the checkpoint.
    """
    found = translation.tensors
    incomplete = {name: f"{name} (the file lacks {', '.join(lacks)})" for name, lacks in translation.incomplete.items()}
    missing = [incomplete.get(name, name) for name in own if name not in found and name not in set(kept)]
    surplus = [key for name in found if name not in own for key in translation.origins[name]] + translation.unknown
    reshaped = [
        f"{name} is {list(own[name].shape)} in the model and {list(tensor.shape)} in the file "
        f"({', '.join(translation.origins[name])})"
        for name, tensor in found.items()
        if name in own and tensor.shape != own[name].shape
    ]
    lines = [
        f"  {len(names)} {title}: {abbreviate(names, 6)}"
        for title, names in (
            ("tensors of the model are missing in the file", missing),
            ("keys of the file have no place in the model", surplus),
            ("tensors have another shape", reshaped),
        )
        if names
    ]
    return "\n".join([*lines, "  " + _way_out(own, found)]) if lines else ""


def describe_backbone(state: Mapping[str, Tensor]) -> str:
    """Describe the backbone in a state dict under our names, as far as names and shapes tell: Swins and ResNets."""
    depths = _depths(state, r"backbone\.network\.layers\.(\d+)\.blocks\.(\d+)\.")
    if depths:
        table = "backbone.network.layers.{}.blocks.0.attn.relative_position_bias_table"
        tables = [state[table.format(i)].shape for i in depths if table.format(i) in state]
        heads = tuple(shape[1] for shape in tables)
        window = (math.isqrt(tables[0][0]) + 1) // 2 if tables else "unknown size"
        dim = state["backbone.norms.0.weight"].shape[0] if "backbone.norms.0.weight" in state else "unknown"
        return (
            f"a Swin with embed_dim={dim}, depths={tuple(depths.values())}, num_heads={heads} and windows of {window}"
        )
    depths = _depths(state, r"backbone\.network\.layer(\d+)\.(\d+)\.")
    if depths:
        kind = "bottleneck" if "backbone.network.layer1.0.conv3.weight" in state else "basic"
        return f"a ResNet with {', '.join(map(str, depths.values()))} {kind} blocks"
    return "a network of another family"


def _depths(state: Mapping[str, Tensor], pattern: str) -> dict[str, int]:
    """Number of blocks per stage, from names with a stage and a block number."""
    blocks = sorted({match.groups() for key in state if (match := re.match(pattern, key))})
    return {stage: sum(s == stage for s, _ in blocks) for stage, _ in blocks}


def _way_out(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    ours, theirs = visible_config(own), visible_config(found)
    if not ours or not theirs:
        return "Is the file complete, and saved from a model that was built like this one?"
    changes = [f"{name}={value} (now {ours[name]})" for name, value in theirs.items() if value != ours.get(name, value)]
    advice = []
    if changes:
        advice.append(f"Build the model with ModelConfig({', '.join(changes)}).")
    if describe_backbone(own) != describe_backbone(found):
        advice.append(
            f"The file's backbone is {describe_backbone(found)}, the model's is {describe_backbone(own)}: choose the "
            "file's with ModelConfig(backbone=…, backbone_options=…)."
        )
    return " ".join(advice) or "Is the file complete, and a Mask2Former?"
