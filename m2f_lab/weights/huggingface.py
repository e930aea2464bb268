"""The names of Hugging Face's `Mask2FormerForUniversalSegmentation`, as its files hold them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m2f_lab.weights.keymap import KeyMap, rules

SWIN = (
    ("network.patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("network.patch_embed.norm.*", "embeddings.norm.*"),
    (
        "network.layers.{i}.blocks.{j}.attn.qkv.*",
        (
            "encoder.layers.{i}.blocks.{j}.attention.self.query.*",
            "encoder.layers.{i}.blocks.{j}.attention.self.key.*",
            "encoder.layers.{i}.blocks.{j}.attention.self.value.*",
        ),
    ),
    (
        "network.layers.{i}.blocks.{j}.attn.relative_position_bias_table",
        "encoder.layers.{i}.blocks.{j}.attention.self.relative_position_bias_table",
    ),
    ("network.layers.{i}.blocks.{j}.attn.proj.*", "encoder.layers.{i}.blocks.{j}.attention.output.dense.*"),
    ("network.layers.{i}.blocks.{j}.norm1.*", "encoder.layers.{i}.blocks.{j}.layernorm_before.*"),
    ("network.layers.{i}.blocks.{j}.norm2.*", "encoder.layers.{i}.blocks.{j}.layernorm_after.*"),
    ("network.layers.{i}.blocks.{j}.mlp.fc1.*", "encoder.layers.{i}.blocks.{j}.intermediate.dense.*"),
    ("network.layers.{i}.blocks.{j}.mlp.fc2.*", "encoder.layers.{i}.blocks.{j}.output.dense.*"),
    # timm merges patches at the start of a stage, the others at the end of the one before.
    ("network.layers.{i+1}.downsample.*", "encoder.layers.{i}.downsample.*"),
    ("norms.{i}.*", "hidden_states_norms.stage{i+1}.*"),
)

RESNET = (
    ("network.conv1.*", "embedder.embedder.convolution.*"),
    ("network.bn1.*", "embedder.embedder.normalization.*"),
    ("network.layer{i}.{j}.conv{k}.*", "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.convolution.*"),
    ("network.layer{i}.{j}.bn{k}.*", "encoder.stages.{i-1}.layers.{j}.layer.{k-1}.normalization.*"),
    ("network.layer{i}.{j}.downsample.0.*", "encoder.stages.{i-1}.layers.{j}.shortcut.convolution.*"),
    ("network.layer{i}.{j}.downsample.1.*", "encoder.stages.{i-1}.layers.{j}.shortcut.normalization.*"),
)

PIXEL_DECODER = (
    ("input_projections.{i}.{j}.*", "input_projections.{i}.{j}.*"),
    ("level_embedding", "level_embed"),
    ("layers.{i}.attention.sampling_offsets.*", "encoder.layers.{i}.self_attn.sampling_offsets.*"),
    ("layers.{i}.attention.attention_weights.*", "encoder.layers.{i}.self_attn.attention_weights.*"),
    ("layers.{i}.attention.value_projection.*", "encoder.layers.{i}.self_attn.value_proj.*"),
    ("layers.{i}.attention.output_projection.*", "encoder.layers.{i}.self_attn.output_proj.*"),
    ("layers.{i}.attention_norm.*", "encoder.layers.{i}.self_attn_layer_norm.*"),
    ("layers.{i}.feedforward.0.*", "encoder.layers.{i}.fc1.*"),
    ("layers.{i}.feedforward.2.*", "encoder.layers.{i}.fc2.*"),
    ("layers.{i}.feedforward_norm.*", "encoder.layers.{i}.final_layer_norm.*"),
    ("lateral.{i}.*", "adapter_1.{i}.*"),
    ("output.{i}.*", "layer_1.{i}.*"),
    ("mask_projection.*", "mask_projection.*"),
)

TRANSFORMER_DECODER = (
    ("query_features", "queries_features.weight"),
    ("query_positions", "queries_embedder.weight"),
    ("level_embedding", "level_embed.weight"),
    ("layers.{i}.cross_attention.*", "decoder.layers.{i}.cross_attn.*"),
    ("layers.{i}.cross_attention_norm.*", "decoder.layers.{i}.cross_attn_layer_norm.*"),
    (
        "layers.{i}.self_attention.in_proj_*",
        (
            "decoder.layers.{i}.self_attn.q_proj.*",
            "decoder.layers.{i}.self_attn.k_proj.*",
            "decoder.layers.{i}.self_attn.v_proj.*",
        ),
    ),
    ("layers.{i}.self_attention.out_proj.*", "decoder.layers.{i}.self_attn.out_proj.*"),
    ("layers.{i}.self_attention_norm.*", "decoder.layers.{i}.self_attn_layer_norm.*"),
    ("layers.{i}.feedforward.0.*", "decoder.layers.{i}.fc1.*"),
    ("layers.{i}.feedforward.2.*", "decoder.layers.{i}.fc2.*"),
    ("layers.{i}.feedforward_norm.*", "decoder.layers.{i}.final_layer_norm.*"),
    ("decoder_norm.*", "decoder.layernorm.*"),
    ("mask_head.0.*", "decoder.mask_predictor.mask_embedder.0.0.*"),
    ("mask_head.2.*", "decoder.mask_predictor.mask_embedder.1.0.*"),
    ("mask_head.4.*", "decoder.mask_predictor.mask_embedder.2.0.*"),
)

_BACKBONE = "model.pixel_level_module.encoder."

HUGGINGFACE = KeyMap(
    name="Hugging Face",
    signature="model.transformer_module.",
    rules=(
        *rules(SWIN, ours="backbone.", theirs=_BACKBONE),
        *rules(RESNET, ours="backbone.", theirs=_BACKBONE),
        *rules(PIXEL_DECODER, ours="pixel_decoder.", theirs="model.pixel_level_module.decoder."),
        *rules(TRANSFORMER_DECODER, ours="transformer_decoder.", theirs="model.transformer_module."),
        *rules((("class_head.*", "class_predictor.*"),), ours="transformer_decoder."),
    ),
    ignored={
        "criterion.empty_weight": "class weights of the loss, no part of the model",
        "*.relative_position_index": "a constant that follows from the window size",
        _BACKBONE + "layernorm.weight": "the last norm of a Swin classifier, which Mask2Former replaces",
        _BACKBONE + "layernorm.bias": "the last norm of a Swin classifier, which Mask2Former replaces",
    },
    # Since release 5 the modules are named differently from the files; `state_dict()` has the modules' names.
    older_names=(
        (r"\.encoder\.swin\.", ".encoder."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.relative_position_bias\.", ".attention.self."),
        (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
        (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
    ),
)

# Options of their configuration that our model does not have.
_FIXED_CHOICES = {"pre_norm": False, "activation_function": "relu"}
_FIXED_BACKBONE_CHOICES = {
    "swin": {"hidden_act": "gelu", "use_absolute_embeddings": False},
    "resnet": {"hidden_act": "relu", "downsample_in_bottleneck": False},
}


def config_conflicts(config: Mapping, num_heads: int) -> list[str]:
    """List the options of a Hugging Face `config.json` that shapes do not show and the model does otherwise.

    Args:
        config: the file's content.
        num_heads: of the model's decoders.
    """
    backbone = config.get("backbone_config") or {}
    wanted = [("", config, {"num_attention_heads": num_heads, **_FIXED_CHOICES})]
    wanted.append(("backbone_config.", backbone, _FIXED_BACKBONE_CHOICES.get(backbone.get("model_type"), {})))
    return [
        f"{prefix}{name} = {given[name]!r} (the model has {value!r})"
        for prefix, given, values in wanted
        for name, value in values.items()
        if name in given and given[name] != value
    ]


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one of our state dicts to what the files of Hugging Face's Mask2Former hold.

    Args:
        state: `model.state_dict()`.

    Raises:
        ValueError: the backbone is neither a Swin nor a ResNet.
    """
    return HUGGINGFACE.to_theirs(state)
