"""The names of EoMT's tensors in Hugging Face's files (`EomtForUniversalSegmentation`) and in the authors' own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m2f_lab.weights.keymap import KeyMap, Reordering, rules

_NO_BATCH = Reordering(
    "position embedding with a batch dimension", lambda tensor: tensor.unsqueeze(0), lambda tensor: tensor.squeeze(0)
)
_POSITIONS = rules(
    (("pos_embed", "position_embeddings.weight"),),
    ours="backbone.network.",
    theirs="embeddings.",
    reordering=_NO_BATCH,
)
_NETWORK = (
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("norm.*", "layernorm.*"),
    ("blocks.{i}.norm1.*", "layers.{i}.norm1.*"),
    ("blocks.{i}.norm2.*", "layers.{i}.norm2.*"),
    ("blocks.{i}.ls1.gamma", "layers.{i}.layer_scale1.lambda1"),
    ("blocks.{i}.ls2.gamma", "layers.{i}.layer_scale2.lambda1"),
    (
        "blocks.{i}.attn.qkv.*",
        tuple(f"layers.{{i}}.attention.{name}_proj.*" for name in "qkv"),
    ),
    ("blocks.{i}.attn.proj.*", "layers.{i}.attention.out_proj.*"),
)
_PERCEPTRON = (("blocks.{i}.mlp.fc1.*", "layers.{i}.mlp.fc1.*"), ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.fc2.*"))
_SWIGLU = (  # of the giant ViT: gate and value in one product
    ("blocks.{i}.mlp.fc1.*", ("layers.{i}.mlp.gate_proj.*", "layers.{i}.mlp.up_proj.*")),
    ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.down_proj.*"),
)
_HEADS = (
    ("query_features", "query.weight"),
    ("mask_probabilities", "attn_mask_probs"),
    ("class_head.*", "class_predictor.*"),
    ("mask_head.0.*", "mask_head.fc1.*"),
    ("mask_head.2.*", "mask_head.fc2.*"),
    ("mask_head.4.*", "mask_head.fc3.*"),
    ("upscale.{i}.0.*", "upscale_block.block.{i}.conv1.*"),
    ("upscale.{i}.2.*", "upscale_block.block.{i}.conv2.*"),
    ("upscale.{i}.3.*", "upscale_block.block.{i}.layernorm2d.*"),
)


def _huggingface(*perceptrons: tuple) -> KeyMap:
    return KeyMap(
        name="Hugging Face EoMT",
        signature="upscale_block.",
        rules=(
            *_POSITIONS,
            *(rule for table in (_NETWORK, *perceptrons) for rule in rules(table, ours="backbone.network.")),
            *rules(_HEADS),
        ),
        ignored={"criterion.empty_weight": "class weights of the loss, no part of the model"},
    )


EOMT = _huggingface(_PERCEPTRON, _SWIGLU)

EOMT_OFFICIAL = KeyMap(
    name="official EoMT",
    signature="network.upscale.",
    rules=rules(
        (
            ("backbone.network.*", "encoder.backbone.*"),
            ("query_features", "q.weight"),
            ("mask_probabilities", "attn_mask_probs"),
            ("class_head.*", "class_head.*"),
            ("mask_head.*", "mask_head.*"),
            ("upscale.{i}.0.*", "upscale.{i}.conv1.*"),
            ("upscale.{i}.2.*", "upscale.{i}.conv2.*"),
            ("upscale.{i}.3.*", "upscale.{i}.norm.*"),
        ),
        theirs="network.",
    ),
    ignored={
        "criterion.empty_weight": "class weights of the loss, no part of the model",
        "network.encoder.pixel_mean": "normalisation of colours, which the ViT's name decides here",
        "network.encoder.pixel_std": "normalisation of colours, which the ViT's name decides here",
    },
)


def eomt_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of one of our EoMTs to what the files of Hugging Face's hold.

    Raises:
        ValueError: the ViT has tensors for which it has no names, such as a position embedding of the cls token.
    """
    first, second = (state[f"backbone.network.blocks.0.mlp.{name}.weight"] for name in ("fc1", "fc2"))
    has_gate = first.shape[0] == 2 * second.shape[1]
    return _huggingface(_SWIGLU if has_gate else _PERCEPTRON).to_theirs(state)
