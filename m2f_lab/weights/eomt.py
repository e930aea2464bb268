"""The names of EoMT's tensors in Hugging Face's files, which differ between DINOv2 and DINOv3, and in the authors'."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from m2f_lab.weights.keymap import KeyMap, Reordering, Rule, rules


def _network(*table: tuple, reordering: Reordering | None = None) -> tuple[Rule, ...]:
    return rules(table, ours="backbone.network.", reordering=reordering)


_QKV = tuple(f"layers.{{i}}.attention.{name}_proj." for name in "qkv")
_SHARED = (
    *_network(
        ("cls_token", "embeddings.cls_token"),
        ("reg_token", "embeddings.register_tokens"),
        ("norm.*", "layernorm.*"),
        ("blocks.{i}.norm1.*", "layers.{i}.norm1.*"),
        ("blocks.{i}.norm2.*", "layers.{i}.norm2.*"),
        ("blocks.{i}.attn.qkv.weight", tuple(name + "weight" for name in _QKV)),
    ),
    *rules(
        (
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
    ),
)
_BATCH_OF_ONE = Reordering("position embedding as a batch of one", lambda x: x.unsqueeze(0), lambda x: x.squeeze(0))
_DINOV2 = (
    *_SHARED,
    *_network(("pos_embed", "embeddings.position_embeddings.weight"), reordering=_BATCH_OF_ONE),
    *_network(
        ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
        ("blocks.{i}.attn.qkv.bias", tuple(name + "bias" for name in _QKV)),
        ("blocks.{i}.attn.proj.*", "layers.{i}.attention.out_proj.*"),
        ("blocks.{i}.ls1.gamma", "layers.{i}.layer_scale1.lambda1"),
        ("blocks.{i}.ls2.gamma", "layers.{i}.layer_scale2.lambda1"),
    ),
)
_PERCEPTRON = _network(
    ("blocks.{i}.mlp.fc1.*", "layers.{i}.mlp.fc1.*"), ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.fc2.*")
)
_SWIGLU = _network(  # of the giant ViT, where timm joins both
    ("blocks.{i}.mlp.fc1.*", ("layers.{i}.mlp.gate_proj.*", "layers.{i}.mlp.up_proj.*")),
    ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.down_proj.*"),
)
_OLDER_SWIGLU = _network(  # of published files: as timm has it
    ("blocks.{i}.mlp.fc1.*", "layers.{i}.mlp.weights_in.*"), ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.weights_out.*")
)
_NOT_IN_MODEL = {"criterion.empty_weight": "class weights of the loss, no part of the model"}

EOMT = KeyMap(
    name="Hugging Face EoMT",
    signature="embeddings.position_embeddings.",
    rules=(*_DINOV2, *_PERCEPTRON, *_SWIGLU, *_OLDER_SWIGLU),
    ignored=_NOT_IN_MODEL,
)
EOMT_DINOV3 = KeyMap(
    name="Hugging Face EoMT with DINOv3",
    signature="upscale_block.",  # DINOv2's have such keys, too: this map comes after theirs
    rules=(
        *_SHARED,
        *_network(
            ("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
            ("blocks.{i}.attn.q_bias", "layers.{i}.attention.q_proj.bias"),
            ("blocks.{i}.attn.v_bias", "layers.{i}.attention.v_proj.bias"),
            ("blocks.{i}.attn.proj.*", "layers.{i}.attention.o_proj.*"),
            ("blocks.{i}.gamma_1", "layers.{i}.layer_scale1.lambda1"),
            ("blocks.{i}.gamma_2", "layers.{i}.layer_scale2.lambda1"),
            ("blocks.{i}.mlp.fc1.*", "layers.{i}.mlp.up_proj.*"),
            ("blocks.{i}.mlp.fc2.*", "layers.{i}.mlp.down_proj.*"),
        ),
    ),
    ignored=_NOT_IN_MODEL,
)
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
        **_NOT_IN_MODEL,
        "network.encoder.pixel_mean": "mean colour, which follows from the ViT's name",
        "network.encoder.pixel_std": "standard deviation of colours, which follows from the ViT's name",
    },
)


def eomt_to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of an EoMT to what Hugging Face's files hold.

    Args:
        state: `model.state_dict()`.

    Raises:
        ValueError: the ViT is neither a DINOv2 nor a DINOv3.
    """
    if "backbone.network.pos_embed" not in state:
        return EOMT_DINOV3.to_theirs(state)
    first, second = (state[f"backbone.network.blocks.0.mlp.{name}.weight"] for name in ("fc1", "fc2"))
    perceptron = _SWIGLU if first.shape[0] == 2 * second.shape[1] else _PERCEPTRON
    return KeyMap(EOMT.name, EOMT.signature, (*_DINOV2, *perceptron)).to_theirs(state)
