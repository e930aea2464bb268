"""Which parameters decay and how fast they learn, the schedule in numbers, and the clipped step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from m2f_lab import recipes
from m2f_lab.model import build_model
from m2f_lab.recipes import ModelConfig, OptimizationConfig
from m2f_lab.training.optimizer import (
    build_optimizer,
    clip_gradient,
    learning_rate_factor,
    named_groups,
    set_learning_rate,
    update_weights,
)


def tiny_swin() -> nn.Module:
    torch.manual_seed(0)
    options = dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), window_size=7)
    return build_model(
        ModelConfig(
            num_classes=3, backbone_options=options, hidden_dim=32, mask_dim=32, num_queries=5, num_heads=4,
            num_encoder_layers=1, encoder_feedforward_dim=32, num_decoder_layers=2, decoder_feedforward_dim=32,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    return tiny_swin()


@pytest.fixture(scope="module")
def groups(swin) -> dict[str, set[str]]:
    return {group: set(names) for group, names in named_groups(swin).items()}


class TestGroups:
    def test_every_parameter_is_in_exactly_one(self, swin, groups):
        listed = [name for names in groups.values() for name in names]
        assert sorted(listed) == sorted(name for name, _ in swin.named_parameters())

    def test_the_backbone_and_nothing_else_learns_slowly(self, groups):
        for group, names in groups.items():
            assert all(name.startswith("backbone.") == group.startswith("backbone") for name in names)

    def test_norms_embeddings_and_position_biases_do_not_decay(self, groups):
        assert {
            "transformer_decoder.query_features",
            "transformer_decoder.query_positions",
            "transformer_decoder.level_embedding",
            "transformer_decoder.decoder_norm.weight",
            "transformer_decoder.layers.0.cross_attention_norm.bias",
            "pixel_decoder.level_embedding",
            "pixel_decoder.input_projections.0.1.weight",  # group normalisation
            "pixel_decoder.lateral.1.bias",
            "pixel_decoder.layers.0.attention_norm.weight",
        } <= groups["decoders, not decayed"]
        assert {
            "backbone.network.layers.0.blocks.0.attn.relative_position_bias_table",
            "backbone.network.layers.0.blocks.0.norm1.weight",
            "backbone.network.layers.1.downsample.norm.bias",
            "backbone.network.patch_embed.norm.weight",
            "backbone.norms.3.weight",
        } <= groups["backbone, not decayed"]

    def test_weights_and_biases_decay(self, groups):
        assert {
            "transformer_decoder.class_head.weight",
            "transformer_decoder.class_head.bias",  # as in the published code
            "transformer_decoder.layers.1.self_attention.in_proj_weight",
            "transformer_decoder.layers.1.self_attention.in_proj_bias",
            "transformer_decoder.mask_head.0.weight",
            "pixel_decoder.layers.0.attention.sampling_offsets.bias",
            "pixel_decoder.input_projections.0.0.weight",
            "pixel_decoder.mask_projection.weight",
        } <= groups["decoders"]
        assert {
            "backbone.network.patch_embed.proj.weight",  # the patch embedding is a convolution
            "backbone.network.layers.0.blocks.0.attn.qkv.bias",
            "backbone.network.layers.3.blocks.0.mlp.fc1.weight",
        } <= groups["backbone"]

    def test_the_undecayed_are_no_more_than_that(self, groups):
        """Counted by hand from the architecture, so that a rule that catches too much is noticed."""
        in_pixel_decoder = 1 + 2 * (3 + 2) + 2 * 2  # level embedding; 3 projections, lateral, output; 1 layer × 2 norms
        in_transformer_decoder = 3 + 2 + 2 * 2 * 3  # 3 embeddings; final norm; 2 layers × 3 norms
        assert len(groups["decoders, not decayed"]) == in_pixel_decoder + in_transformer_decoder
        in_backbone = (
            2 + 4 * (1 + 4) + 3 * 2 + 4 * 2
        )  # patch norm; 4 blocks × (bias table, 2 norms); 3 mergings; 4 levels
        assert len(groups["backbone, not decayed"]) == in_backbone

    def test_norms_of_every_kind(self):
        """Batch norms of a ResNet and timm's own norm classes, which share no base class."""
        for backbone in ("resnet18d", "test_convnext", "test_efficientnet"):
            config = ModelConfig(num_classes=2, backbone=backbone, drop_path_rate=0.0)
            model = build_model(config)
            decayed = {name for group, names in named_groups(model).items() if "not" not in group for name in names}
            norms = [n for n, m in model.backbone.named_modules() if "Norm" in type(m).__name__ and m._parameters]
            assert len(norms) > 4
            for norm in norms:
                assert not {f"backbone.{norm}.weight", f"backbone.{norm}.bias"} & decayed

    def test_embedding_modules_do_not_decay_and_shared_and_frozen_parameters_are_listed_once_and_never(self):
        model = nn.Module()
        model.backbone = nn.Linear(2, 2)
        model.backbone.bias.requires_grad_(False)
        model.table = nn.Embedding(3, 2)
        model.head = nn.Linear(2, 2)
        model.same_head = model.head
        assert named_groups(model) == {
            "backbone": ["backbone.weight"],
            "backbone, not decayed": [],
            "decoders": ["head.weight", "head.bias"],
            "decoders, not decayed": ["table.weight"],
        }


class TestOptimizer:
    def test_published_settings(self, swin):
        optimizer = build_optimizer(swin, recipes.ade20k_swin_tiny().optimization)
        found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
        assert found == {
            "backbone": (pytest.approx(1e-5), 0.05),
            "backbone, not decayed": (pytest.approx(1e-5), 0.0),
            "decoders": (1e-4, 0.05),
            "decoders, not decayed": (1e-4, 0.0),
        }
        assert isinstance(optimizer, torch.optim.AdamW)
        assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)

    def test_decay_pulls_on_weights_only(self):
        """With zero gradients AdamW only decays: weights shrink by lr × decay, everything else stays."""
        model = tiny_swin()
        config = OptimizationConfig(max_iterations=10, learning_rate=0.1, backbone_multiplier=0.1, weight_decay=0.5)
        optimizer = build_optimizer(model, config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        groups = named_groups(model)
        for name, parameter in model.named_parameters():
            factor = 1.0
            if name in groups["backbone"]:
                factor = 1 - 0.01 * 0.5
            elif name in groups["decoders"]:
                factor = 1 - 0.1 * 0.5
            torch.testing.assert_close(parameter.detach(), before[name] * factor)


class TestSchedule:
    def test_poly(self):
        config = OptimizationConfig(max_iterations=100)
        assert learning_rate_factor(0, config) == 1.0
        assert learning_rate_factor(50, config) == pytest.approx(0.5**0.9)
        assert learning_rate_factor(99, config) == pytest.approx(0.01**0.9)
        linear = OptimizationConfig(max_iterations=100, poly_power=1.0)
        assert learning_rate_factor(25, linear) == pytest.approx(0.75)

    def test_published_schedule(self):
        """1e-4 × (1 - i / 160 000)^0.9 at some iterations, worked out with a calculator."""
        config = recipes.ade20k_swin_tiny().optimization
        rates = [config.learning_rate * learning_rate_factor(i, config) for i in (0, 80_000, 144_000, 159_999)]
        assert rates == pytest.approx([1e-4, 5.3589e-5, 1.2589e-5, 2.0717e-9], rel=1e-3)

    def test_warm_up_rises_linearly_and_then_makes_no_difference(self):
        plain = OptimizationConfig(max_iterations=100)
        warm = OptimizationConfig(max_iterations=100, warmup_iterations=4)
        ratios = [learning_rate_factor(i, warm) / learning_rate_factor(i, plain) for i in range(6)]
        assert ratios == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])

    def test_all_groups_follow(self, swin):
        config = OptimizationConfig(max_iterations=100, poly_power=1.0)
        optimizer = build_optimizer(swin, config)
        assert set_learning_rate(optimizer, 20, config) == pytest.approx(0.8e-4)
        assert set_learning_rate(optimizer, 60, config) == pytest.approx(0.4e-4)  # not 0.4 × 0.8
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["decoders"] == rates["decoders, not decayed"] == pytest.approx(0.4e-4)
        assert rates["backbone"] == rates["backbone, not decayed"] == pytest.approx(0.4e-5)


class TestClippedStep:
    def model(self) -> nn.Module:
        model = nn.Module()
        model.backbone = nn.Linear(1, 1, bias=False)
        model.head = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.backbone.weight)
        nn.init.ones_(model.head.weight)
        return model

    def step(self, model: nn.Module, gradients: tuple[float, float], clip_norm: float) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = torch.full_like(parameter, gradient)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        norm = clip_gradient(optimizer, scaler, model, clip_norm).item()
        update_weights(optimizer, scaler, norm)
        return norm

    def test_one_norm_over_the_whole_model(self):
        """(3, 4) has norm 5: clipped to 1 it is (0.6, 0.8). Clipped one by one it would be (1, 1)."""
        model = self.model()
        assert self.step(model, (3.0, 4.0), clip_norm=1.0) == pytest.approx(5.0)
        assert model.backbone.weight.item() == pytest.approx(1 - 0.6, abs=1e-5)
        assert model.head.weight.item() == pytest.approx(1 - 0.8, abs=1e-5)

    def test_small_gradients_stay(self):
        model = self.model()
        assert self.step(model, (0.03, 0.04), clip_norm=1.0) == pytest.approx(0.05)
        assert model.head.weight.item() == pytest.approx(0.96)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_changes_no_weight(self, bad):
        model = self.model()
        with pytest.raises(FloatingPointError, match="norm of the gradient is"):
            self.step(model, (1.0, bad), clip_norm=1.0)
        assert model.backbone.weight.item() == model.head.weight.item() == 1.0

    def test_float16_overflow_skips_the_step_and_lowers_the_scale(self):
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for weight, expected in ((math.inf, math.inf), (3.0, 5.0)):
            optimizer.zero_grad()
            loss = weight * model.backbone.weight.sum() + 4 * model.head.weight.sum()
            scaler.scale(loss).backward()
            norm = clip_gradient(optimizer, scaler, model, clip_norm=1.0).item()
            assert norm == pytest.approx(expected)  # without the scale
            update_weights(optimizer, scaler, norm)
            if weight == math.inf:
                assert model.backbone.weight.item() == model.head.weight.item() == 1.0
        assert model.head.weight.item() == pytest.approx(1 - 0.8, abs=1e-5)
        assert scaler.get_scale() == 4.0
