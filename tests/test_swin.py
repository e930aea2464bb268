"""Swin's blocks: numbers and gradients of the published code, less work where stochastic depth drops an image."""

import copy
import pickle

import pytest
import torch
from torch import nn

from m2f_lab.model import swin
from m2f_lab.model.backbone import Backbone
from m2f_lab.recipes import ModelConfig
from tests.test_backbone import SMALL_SWIN, window_attention_as_published
from tests.test_layers import nodes_behind


def small_backbone(**changes):
    torch.manual_seed(0)
    backbone = Backbone(ModelConfig(num_classes=3, **SMALL_SWIN | changes))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.mark.parametrize("block", [0, 1], ids=["straight", "shifted"])
@pytest.mark.parametrize("size", [(14, 14), (16, 24), (5, 9)])
def test_gradients_are_those_of_the_published_code(size, block):
    """Of the input and of every parameter; padding has a gradient, too: its keys are biases."""
    ours = small_backbone().double().network.layers[1].blocks[block]
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, *size, ours.dim, dtype=torch.float64)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = ours._attend(found), window_attention_as_published(theirs, theirs.norm1(expected))
    torch.testing.assert_close(*outputs)
    gradient = torch.randn_like(x)
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(found.grad, expected.grad)
    for (name, a), b in zip(ours.attn.named_parameters(), theirs.attn.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_to_attend_agree(masked):
    """With a gradient of the bias, and fused, without one."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 3, 49, 8)
    bias = torch.randn(3, 49, 49, requires_grad=True)
    mask = torch.where(torch.rand(4, 1, 49, 49) < 0.3, -100.0, 0.0) if masked else None
    slow = swin.attend_within(query, key, value, bias, mask)
    assert "CopySlices" not in nodes_behind(slow), "the gradient of the scores would be copied"
    assert slow.requires_grad
    torch.testing.assert_close(slow, swin.attend_within(query, key, value, bias.detach(), mask))


def test_windows_first_cut_for_inference_serve_training():
    backbone = small_backbone()
    x = torch.randn(1, 3, 64, 96)
    swin.cut_windows.cache_clear()
    with torch.inference_mode():
        expected = backbone.eval()(x)[-1].clone()
    output = backbone.train()(x)[-1]
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    again = pickle.loads(pickle.dumps(backbone))
    assert list(again.state_dict()) == list(backbone.state_dict())
    torch.testing.assert_close(copy.deepcopy(again).eval()(x)[-1], expected)


def test_a_dropped_image_is_not_computed_and_a_kept_one_scaled():
    torch.manual_seed(0)
    path, x, seen = swin.SwinTransformerBlock(8, (7, 7), drop_path=0.5).drop_path1.train(), torch.randn(64, 3, 4), []

    def branch(kept):
        seen.append(len(kept))
        return torch.tanh(kept)

    output = swin.add_branch(x, branch, path)
    kept = (output != x).flatten(1).any(1)
    assert seen == [int(kept.sum())]
    assert 16 < seen[0] < 48
    torch.testing.assert_close(output[kept], x[kept] + 2 * torch.tanh(x[kept]))
    torch.testing.assert_close(swin.add_branch(x, branch, path.eval()), x + torch.tanh(x))
    assert seen[1] == 64


def test_stochastic_depth_draws_what_timm_draws():
    """The same images, and so the same features and gradients."""
    ours = small_backbone(drop_path_rate=0.6).train()
    theirs = copy.deepcopy(ours)
    for block in theirs.modules():
        if isinstance(block, swin.PaddedFirst):
            block.forward = lambda x, block=block: timms_forward(block, x)
    x = torch.randn(6, 3, 64, 64)
    for backbone in (ours, theirs):
        torch.manual_seed(1)
        sum((level * level).mean() for level in backbone(x)).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def timms_forward(block, x):
    x = x + block.drop_path1(block._attend(x))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


@pytest.mark.parametrize(("few_channels", "times"), [(0, 1), (128, 0)])
def test_hidden_features_are_kept_once_at_most(monkeypatch, few_channels, times):
    """Never beside the result of GELU; and where there are few channels, not at all."""
    monkeypatch.setattr(swin, "FEW_CHANNELS", few_channels)
    block = small_backbone().network.layers[0].blocks[0]
    x = torch.randn(1, 14, 14, block.dim)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x.requires_grad_())
    wide = [t for t in kept.values() if t.numel() == x.numel() * 4 and t.shape[-1] == 4 * block.dim]
    assert len(wide) == times
    output.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_blocks_computed_twice_have_the_same_gradients_and_keep_less():
    """Stochastic depth drops the same images both times."""
    backbones = [small_backbone(drop_path_rate=0.5).train() for _ in range(2)]
    backbones[1].recompute()
    kept = []
    for backbone in backbones:
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = sum((level * level).mean() for level in backbone(torch.ones(4, 3, 64, 64)))
        kept.append(sum(tensor.numel() for tensor in sizes.values()))
        loss.backward()
    assert kept[1] < 0.7 * kept[0]
    for a, b in zip(*(backbone.parameters() for backbone in backbones), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_backbone_that_cannot_be_computed_twice_is_refused():
    backbone = small_backbone()
    backbone.network = nn.Identity()
    with pytest.raises(ValueError, match="checkpoint_backbone"):
        backbone.recompute()
