"""The names of SSSegmentation (github.com/SegmentationBLWX/sssegmentation).

Its decoders are the authors', without the outer prefix; its Swin follows MMSegmentation.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m2f_lab.weights.keymap import KeyMap, Reordering, rules
from m2f_lab.weights.official import DEFORMABLE_ENCODER, IGNORED, TRANSFORMER_DECODER

SWIN = (
    ("patch_embed.proj.*", "patch_embed.projection.*"),
    ("patch_embed.norm.*", "patch_embed.norm.*"),
    ("layers.{i}.blocks.{j}.attn.*", "stages.{i}.blocks.{j}.attn.w_msa.*"),
    ("layers.{i}.blocks.{j}.norm{k}.*", "stages.{i}.blocks.{j}.norm{k}.*"),
    ("layers.{i}.blocks.{j}.mlp.fc1.*", "stages.{i}.blocks.{j}.ffn.layers.0.0.*"),
    ("layers.{i}.blocks.{j}.mlp.fc2.*", "stages.{i}.blocks.{j}.ffn.layers.1.*"),
)

# timm merges patches at the start of a stage, the others at the end of the one before.
PATCH_MERGING = (("layers.{i+1}.downsample.*", "stages.{i}.downsample.*"),)

FEATURE_PYRAMID = (
    ("lateral.{i}.*", "lateral_convs.0.{i}.*"),
    ("output.{i}.*", "output_convs.0.{i}.*"),
)


def _from_unfold(tensor: Tensor) -> Tensor:
    """(C, row, column) → (column, row, C) along the last dimension. [..., 4 C]"""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def _to_unfold(tensor: Tensor) -> Tensor:
    """(column, row, C) → (C, row, column) along the last dimension. [..., 4 C]"""
    return tensor.unflatten(-1, (2, 2, -1)).transpose(-3, -1).flatten(-3)


UNFOLD = Reordering(
    reason="patch merging: from torch's unfold order (channel, row, column) to (column, row, channel)",
    to_ours=_from_unfold,
    to_theirs=_to_unfold,
)

SSSEGMENTATION = KeyMap(
    name="SSSegmentation",
    signature="backbone_net.",
    rules=(
        *rules(SWIN, ours="backbone.network.", theirs="backbone_net."),
        *rules(PATCH_MERGING, ours="backbone.network.", theirs="backbone_net.", reordering=UNFOLD),
        *rules((("norms.{i}.*", "norm{i}.*"),), ours="backbone.", theirs="backbone_net."),
        *rules(DEFORMABLE_ENCODER, ours="pixel_decoder.", theirs="pixel_decoder."),
        *rules(FEATURE_PYRAMID, ours="pixel_decoder.", theirs="pixel_decoder."),
        *rules(TRANSFORMER_DECODER, ours="transformer_decoder.", theirs="predictor."),
    ),
    ignored=IGNORED,
)


def to_sssegmentation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one of our state dicts, with a Swin backbone, to what SSSegmentation loads.

    Args:
        state: `model.state_dict()`.

    Raises:
        ValueError: the backbone is not a Swin.
    """
    return SSSEGMENTATION.to_theirs(state)
