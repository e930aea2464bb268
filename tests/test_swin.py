"""Swin's blocks: numbers and gradients of the published code, and less memory."""

import copy
import pickle

import pytest
import torch
from torch import nn

from m2f_lab.model import swin
from m2f_lab.model.backbone import Backbone
from m2f_lab.ops import windows
from m2f_lab.recipes import ModelConfig
from tests.test_backbone import SMALL_SWIN, window_attention_as_published


def small_backbone(**changes):
    torch.manual_seed(0)
    backbone = Backbone(ModelConfig(num_classes=3, **SMALL_SWIN | changes))
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


@pytest.mark.parametrize("block", [0, 1], ids=["straight", "shifted"])
@pytest.mark.parametrize("size", [(14, 14), (16, 24), (5, 9)])
def test_swin_gradients_equal_the_published_code(size, block):
    """Of the input and of every parameter; padding has a gradient, too: its keys are biases."""
    ours = small_backbone().double().network.layers[1].blocks[block]
    theirs = copy.deepcopy(ours)
    x = torch.randn(2, *size, 24, dtype=torch.float64)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = ours.attend(found), window_attention_as_published(theirs, theirs.norm1(expected))
    torch.testing.assert_close(*outputs)
    gradient = torch.randn_like(x)
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(found.grad, expected.grad)
    for (name, a), b in zip(ours.attn.named_parameters(), theirs.attn.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [(2, 3), (3, 2), (4, 6)])
def test_windows_are_rectangles_and_merge_back(window):
    maps = torch.arange(2 * 12 * 12 * 5).view(2, 12, 12, 5)
    windows = swin.cut_windows(maps, window)
    per_row = 12 // window[1]
    for w in (0, per_row - 1, per_row, windows.shape[1] - 1):
        top, left = w // per_row * window[0], w % per_row * window[1]
        expected = maps[:, top : top + window[0], left : left + window[1]].flatten(1, 2)
        assert torch.equal(windows[:, w], expected)
    assert torch.equal(swin.merge_windows(windows, window, (12, 12)), maps)


def test_shift_mask_parts_what_only_the_shift_brought_together():
    """Two tokens of a window see each other if the roll moved neither or both of them across the border."""
    window, shift, size = (3, 4), (1, 2), (9, 8)
    place = torch.stack(torch.meshgrid(torch.arange(9), torch.arange(8), indexing="ij"), dim=2)[None]
    before = swin.cut_windows(place.roll((-shift[0], -shift[1]), (1, 2)), window)[0]  # (W, N, 2)
    distance = (before[:, :, None] - before[:, None]).abs().amax((1, 2))  # per window
    mask = swin.shift_mask(size, window, shift, torch.device("cpu"))[:, 0]
    for w in range(len(mask)):
        near = ((before[w, :, None] - before[w, None]).abs() < torch.tensor(window)).all(-1)
        assert torch.equal(mask[w] == 0, near)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    assert (distance >= torch.tensor(window)).any()


def test_shift_masks_first_made_for_inference_serve_training():
    backbone = small_backbone()
    x = torch.randn(1, 3, 64, 96)
    swin.shift_mask.forget()
    with torch.inference_mode():
        expected = backbone.eval()(x)[-1].clone()
    output = backbone.train()(x)[-1]
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    again = pickle.loads(pickle.dumps(backbone))
    assert list(again.state_dict()) == list(backbone.state_dict())
    torch.testing.assert_close(copy.deepcopy(again).eval()(x)[-1], expected)


def test_stochastic_depth_draws_what_timm_draws():
    """The same images, and so the same features and gradients."""
    ours = small_backbone(drop_path_rate=0.6).train()
    theirs = copy.deepcopy(ours)
    for block in theirs.modules():
        if isinstance(block, swin.SwinBlock):
            block.forward = lambda x, block=block: timms_forward(block, x)
    x = torch.randn(6, 3, 64, 64)
    for backbone in (ours, theirs):
        torch.manual_seed(1)
        sum((level * level).mean() for level in backbone(x)).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def timms_forward(block, x):
    x = x + block.drop_path1(block.attend(x))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def test_swin_block_keeps_no_hidden_features_and_no_attention_weights():
    block = small_backbone().network.layers[0].blocks[0]
    x, kept = torch.randn(1, 14, 14, 12), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x.requires_grad_())
    assert kept
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    kept = [t for t in kept.values() if t.data_ptr() not in parameters]
    assert not [t.shape for t in kept if t.shape[-1] == 4 * 12 or (t.shape[-2:] == (49, 49) and t.ndim > 3)]
    output.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_recompute_keeps_less_and_the_same_gradients():
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


def test_recompute_refuses_backbones_that_cannot():
    backbone = small_backbone()
    backbone.network = nn.Identity()
    with pytest.raises(ValueError, match="checkpoint_backbone"):
        backbone.recompute()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fused_window_attention_equals_the_equation(shifted, dtype):
    """What runs on a GPU, in values and gradients."""
    torch.manual_seed(0)
    tokens = [torch.randn(2, 6, 3, 4, 5, dtype=dtype, requires_grad=True) for _ in range(3)]  # (B, W, heads, N, D)
    bias = torch.randn(*([6] if shifted else []), 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 6, 3, 4, 5, dtype=dtype)
    results = []
    for attend in (windows.by_equation, windows.by_fused_attention):
        attended = attend(*tokens, bias, 0.0)
        results.append((attended, *torch.autograd.grad((attended * weights).sum(), [*tokens, bias])))
    tolerance = {} if dtype == torch.float64 else dict(rtol=0.05, atol=0.05)
    torch.testing.assert_close(*results, **tolerance)
