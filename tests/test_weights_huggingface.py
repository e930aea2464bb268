"""Parity with Hugging Face's Mask2Former on random weights, and its files in all their shapes."""

import json

import pytest
import torch

import m2f_lab.ops._torchvision  # noqa: F401  isort: skip  (before transformers, which imports torchvision)
from safetensors.torch import load_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig
from transformers.utils import logging

from m2f_lab.model import ModelConfig, build_model
from m2f_lab.weights import load_weights, to_huggingface

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL_DECODERS = dict(
    hidden_dim=64, feature_size=64, mask_feature_size=64, encoder_layers=2, encoder_feedforward_dim=64,
    decoder_layers=4, dim_feedforward=96, num_queries=20,
)  # fmt: skip
OUR_SMALL_DECODERS = dict(
    hidden_dim=64, mask_dim=64, num_encoder_layers=2, encoder_feedforward_dim=64, num_decoder_layers=3,
    decoder_feedforward_dim=96, num_queries=20,
)  # fmt: skip


def build_theirs(backbone, num_labels, **options):
    """A model in which every number is random: fresh ones have zero biases, which would hide mistakes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=num_labels, **options)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("relative_position_bias_table"):
                tensor.normal_(std=0.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.02)
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs, size, batch_size=1):
    """Class and mask logits of all predictions, relative to the largest, in float64."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    ours, theirs = ours.double().eval(), theirs.double()
    output = ours(images)
    reference = theirs(pixel_values=ours.preprocess(images), output_auxiliary_logits=True)
    last = {
        "class_queries_logits": reference.class_queries_logits,
        "masks_queries_logits": reference.masks_queries_logits,
    }
    predictions = [*reference.auxiliary_logits, last]
    assert len(predictions) == output.num_predictions == ours.config.num_decoder_layers + 1
    for i, prediction in enumerate(predictions):
        for found, expected in (
            (output.class_logits[i], prediction["class_queries_logits"]),
            (output.masks[i].dense(), prediction["masks_queries_logits"]),
        ):
            assert found.shape == expected.shape
            difference = ((found - expected).abs().max() / expected.abs().max()).item()
            assert difference < 1e-4, f"prediction {i}: relative difference {difference:.1e}"
    masks = last["masks_queries_logits"]
    assert 0.05 < (masks > 0).double().mean() < 0.95  # masked attention has something to block


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("swin_tiny_patch4_window7_224", SwinConfig(out_features=STAGES)),
        ("resnet50", ResNetConfig(out_features=STAGES)),
    ],
    ids=["swin_tiny", "resnet50"],
)
def test_full_size_models_agree(name, backbone, tmp_path):
    """At 64 × 96 and 90 × 130 pixels levels are no whole number of windows, and the latter is padded to 96 × 160."""
    theirs = build_theirs(backbone, num_labels=150)
    theirs.save_pretrained(tmp_path)
    ours = build_model(ModelConfig(num_classes=150, backbone=name, drop_path_rate=0.0))
    report = load_weights(ours, tmp_path)
    assert report.format == "Hugging Face"
    assert report.num_tensors == len(ours.state_dict())
    assert_same_logits(ours, theirs, (64, 96), batch_size=2)
    assert_same_logits(ours, theirs, (90, 130))


@pytest.fixture(scope="module")
def small():
    backbone = SwinConfig(out_features=STAGES, embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=4)
    return build_theirs(backbone, num_labels=5, **SMALL_DECODERS)


def build_small():
    options = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=4)
    return build_model(ModelConfig(num_classes=5, backbone_options=options, **OUR_SMALL_DECODERS))


@pytest.mark.parametrize("kind", ["one file", "shards", "pytorch_model.bin", "modules' names"])
def test_files_in_all_their_shapes(small, tmp_path, kind):
    small.float().save_pretrained(tmp_path, max_shard_size="500KB" if kind == "shards" else "5GB")
    weights = tmp_path / "model.safetensors"
    assert weights.is_file() == (kind != "shards")
    if kind == "pytorch_model.bin":
        torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    elif kind == "modules' names":
        torch.save(small.state_dict(), tmp_path / "pytorch_model.bin")
    if kind in ("pytorch_model.bin", "modules' names"):
        weights.unlink()
    ours = build_small()
    report = load_weights(ours, tmp_path)
    assert "query, key and value joined" in str(report)
    ignored = {name for names in report.ignored.values() for name in names}
    assert "criterion.empty_weight" in ignored
    assert all("layernorm" in name for name in ignored - {"criterion.empty_weight"})
    assert_same_logits(ours, small, (70, 100))


def test_their_model_loads_what_we_export(small, tmp_path):
    small.float().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = build_small()
    load_weights(ours, tmp_path)
    exported = to_huggingface(ours.state_dict())
    missing = set(saved) - set(exported)
    assert {name.removeprefix("model.pixel_level_module.encoder.") for name in missing} == {
        "criterion.empty_weight", "swin.layernorm.weight", "swin.layernorm.bias",
    }  # fmt: skip
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[name]), name


def test_their_configuration_is_compared(small, tmp_path):
    """`config.json` as their library writes it passes; one with other heads does not."""
    small.float().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_attention_heads"] == 8
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match=r"num_attention_heads = 4 \(the model has 8\)"):
        load_weights(build_small(), tmp_path)
