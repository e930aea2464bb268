"""The names of the authors' implementation (github.com/facebookresearch/Mask2Former, on detectron2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m2f_lab.weights.keymap import KeyMap, rules

SWIN = (
    ("network.patch_embed.*", "patch_embed.*"),
    ("network.layers.{i}.blocks.{j}.*", "layers.{i}.blocks.{j}.*"),
    # timm merges patches at the start of a stage, the original at the end of the one before.
    ("network.layers.{i+1}.downsample.*", "layers.{i}.downsample.*"),
    ("norms.{i}.*", "norm{i}.*"),
)

RESNET = (
    ("network.conv1.weight", "stem.conv1.weight"),
    ("network.bn1.*", "stem.conv1.norm.*"),
    ("network.layer{i}.{j}.conv{k}.weight", "res{i+1}.{j}.conv{k}.weight"),
    ("network.layer{i}.{j}.bn{k}.*", "res{i+1}.{j}.conv{k}.norm.*"),
    ("network.layer{i}.{j}.downsample.0.weight", "res{i+1}.{j}.shortcut.weight"),
    ("network.layer{i}.{j}.downsample.1.*", "res{i+1}.{j}.shortcut.norm.*"),
)

DEFORMABLE_ENCODER = (
    ("input_projections.{i}.{j}.*", "input_proj.{i}.{j}.*"),
    ("level_embedding", "transformer.level_embed"),
    ("layers.{i}.attention.sampling_offsets.*", "transformer.encoder.layers.{i}.self_attn.sampling_offsets.*"),
    ("layers.{i}.attention.attention_weights.*", "transformer.encoder.layers.{i}.self_attn.attention_weights.*"),
    ("layers.{i}.attention.value_projection.*", "transformer.encoder.layers.{i}.self_attn.value_proj.*"),
    ("layers.{i}.attention.output_projection.*", "transformer.encoder.layers.{i}.self_attn.output_proj.*"),
    ("layers.{i}.attention_norm.*", "transformer.encoder.layers.{i}.norm1.*"),
    ("layers.{i}.feedforward.0.*", "transformer.encoder.layers.{i}.linear1.*"),
    ("layers.{i}.feedforward.2.*", "transformer.encoder.layers.{i}.linear2.*"),
    ("layers.{i}.feedforward_norm.*", "transformer.encoder.layers.{i}.norm2.*"),
    ("mask_projection.*", "mask_features.*"),
)

FEATURE_PYRAMID = (
    ("lateral.0.weight", "adapter_1.weight"),
    ("lateral.1.*", "adapter_1.norm.*"),
    ("output.0.weight", "layer_1.weight"),
    ("output.1.*", "layer_1.norm.*"),
)

TRANSFORMER_DECODER = (
    ("query_features", "query_feat.weight"),
    ("query_positions", "query_embed.weight"),
    ("level_embedding", "level_embed.weight"),
    ("layers.{i}.cross_attention.*", "transformer_cross_attention_layers.{i}.multihead_attn.*"),
    ("layers.{i}.cross_attention_norm.*", "transformer_cross_attention_layers.{i}.norm.*"),
    ("layers.{i}.self_attention.*", "transformer_self_attention_layers.{i}.self_attn.*"),
    ("layers.{i}.self_attention_norm.*", "transformer_self_attention_layers.{i}.norm.*"),
    ("layers.{i}.feedforward.0.*", "transformer_ffn_layers.{i}.linear1.*"),
    ("layers.{i}.feedforward.2.*", "transformer_ffn_layers.{i}.linear2.*"),
    ("layers.{i}.feedforward_norm.*", "transformer_ffn_layers.{i}.norm.*"),
    ("decoder_norm.*", "decoder_norm.*"),
    ("class_head.*", "class_embed.*"),
    ("mask_head.0.*", "mask_embed.layers.0.*"),
    ("mask_head.2.*", "mask_embed.layers.1.*"),
    ("mask_head.4.*", "mask_embed.layers.2.*"),
)

IGNORED = {
    "criterion.empty_weight": "class weights of the loss, no part of the model",
    "*.relative_position_index": "a constant that follows from the window size",
}

OFFICIAL = KeyMap(
    name="official Mask2Former",
    signature="sem_seg_head.predictor.",
    rules=(
        *rules(SWIN, ours="backbone.", theirs="backbone."),
        *rules(RESNET, ours="backbone.", theirs="backbone."),
        *rules(DEFORMABLE_ENCODER, ours="pixel_decoder.", theirs="sem_seg_head.pixel_decoder."),
        *rules(FEATURE_PYRAMID, ours="pixel_decoder.", theirs="sem_seg_head.pixel_decoder."),
        *rules(TRANSFORMER_DECODER, ours="transformer_decoder.", theirs="sem_seg_head.predictor."),
    ),
    ignored=IGNORED | {
        "pixel_mean": "the mean colour, checked against the model's",
        "pixel_std": "the spread of colours, checked against the model's",
    },
    older_names=(
        (r"\.static_query\.", ".query_feat."),  # the published model zoo
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
    ),
)  # fmt: skip


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one of our state dicts to what the authors' implementation loads.

    Args:
        state: `model.state_dict()`.

    Raises:
        ValueError: the backbone is neither a Swin nor a ResNet.
    """
    return OFFICIAL.to_theirs(state)
