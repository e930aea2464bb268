"""Attention and position embeddings against torch's own modules and the published formula."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.model.layers import (
    Attention,
    Convolution3x3,
    Linear,
    in_strips,
    linear,
    recomputed,
    sine_positions,
    softmax_of_few,
    speed_up_linears,
)
from m2f_lab.model.pixel_decoder import EncoderLayer, PixelDecoder
from m2f_lab.products import HAS_ONEDNN
from m2f_lab.recipes import ModelConfig


@pytest.fixture
def pair():
    """Our attention and torch's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = Attention(16, 4).double(), nn.MultiheadAttention(16, 4, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torch(pair, masked):
    ours, theirs = pair
    query, key, value = (torch.randn(2, n, 16, dtype=torch.float64) for n in (5, 7, 7))
    blocked = None
    if masked:
        blocked = torch.rand(2, 5, 7) < 0.5
        blocked[..., 0] = False
    output, weights = ours(query, key, value, blocked, return_weights=True)
    copied = None if blocked is None else blocked.repeat_interleave(4, dim=0)
    expected, expected_weights = theirs(query, key, value, attn_mask=copied, average_attn_weights=False)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.double(), expected_weights, atol=1e-6, rtol=1e-6)
    if masked:
        assert (weights.masked_select(blocked.unsqueeze(1).expand_as(weights)) == 0).all()


def test_weights_are_not_built_unless_asked_for(pair):
    query = torch.randn(1, 3, 16, dtype=torch.float64)
    output, weights = pair[0](query, query, query)
    assert weights is None
    torch.testing.assert_close(output, pair[0](query, query, query, return_weights=True)[0])


def test_sine_positions_by_the_formula():
    height, width, dim = 3, 5, 16
    embeddings = sine_positions((height, width), dim, torch.device("cpu")).view(height, width, dim)
    y, x = 2, 1
    for half, coordinate, length in ((0, y, height), (dim // 2, x, width)):
        angle = (coordinate + 1) / (length + 1e-6) * 2 * math.pi
        for i in range(dim // 4):
            frequency = 10000 ** (2 * i / (dim // 2))
            assert embeddings[y, x, half + 2 * i].item() == pytest.approx(math.sin(angle / frequency), abs=1e-5)
            assert embeddings[y, x, half + 2 * i + 1].item() == pytest.approx(math.cos(angle / frequency), abs=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 4, 6), (0, 6)])
def test_linear_equals_torch(shape, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(7, 6, requires_grad=True)
    parameters = [x, weight, *([torch.randn(7, requires_grad=True)] if bias else [])]
    outputs = [f(*parameters, *([] if bias else [None])) for f in (linear, nn.functional.linear)]
    torch.testing.assert_close(*outputs)
    gradient = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(output, parameters, gradient) for output in outputs))


def test_linear_computes_no_gradient_that_is_not_asked_for():
    weight = torch.randn(7, 6)
    x = torch.randn(3, 6, requires_grad=True)
    linear(x, weight, None).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 6))
    assert not linear(x.detach(), weight, None).requires_grad


def test_linear_of_other_types_and_under_autocast():
    x, weight = torch.randn(3, 6), torch.randn(7, 6)
    assert linear(x.double(), weight.double(), None).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16


def test_any_linear_of_a_model_is_sped_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 2)))
    x, names = torch.randn(3, 4), list(model.state_dict())
    expected = model(x)
    speed_up_linears(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected)


class Calls(TorchDispatchMode):
    """Counts the calls of some of PyTorch's operators."""

    def __init__(self, *operators):
        super().__init__()
        self.operators, self.count = operators, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in self.operators
        return function(*args, **(kwargs or {}))


def products() -> Calls:
    """The matrix products of linear maps."""
    ours = [torch.ops.mkldnn._linear_pointwise] if HAS_ONEDNN else []
    return Calls(torch.ops.aten.mm, torch.ops.aten.addmm, *ours)


def convolutions() -> Calls:
    return Calls(torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


def test_a_product_at_the_end_is_not_recomputed():
    torch.manual_seed(0)
    parameters = x, weight, bias = [torch.randn(s, requires_grad=True) for s in ((5, 6), (7, 6), (7,))]
    expected = torch.autograd.grad(linear(x.tanh(), weight, bias).square().sum(), parameters)
    loss = recomputed(lambda x: linear(x.tanh(), weight, bias), x).square().sum()
    with products() as calls:
        found = torch.autograd.grad(loss, parameters)
    assert calls.count == 2  # the gradients of x and of the weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(7, 6), (1, 2)])
def test_our_convolution_is_conv2d(size, memory_format):
    torch.manual_seed(0)
    convolution = Convolution3x3(3, 4).double()
    assert list(convolution.state_dict()) == ["weight"]
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(2, 4, size[1], size[0], dtype=torch.float64).transpose(2, 3)
    ours, theirs = convolution(x), nn.functional.conv2d(x, convolution.weight, padding=1)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(y, (x, convolution.weight), upstream) for y in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert "ConvolutionBackward0" not in nodes_behind(ours)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_our_convolution_computes_no_gradient_that_nobody_wants(wanted):
    convolution = Convolution3x3(3, 4)
    x = torch.randn(1, 3, 5, 5, requires_grad=wanted[0])
    convolution.weight.requires_grad_(wanted[1])
    with products() as nine, convolutions() as calls:
        convolution(x).sum().backward()
    assert (x.grad is not None, convolution.weight.grad is not None) == wanted
    assert (nine.count, calls.count) == ((0, 2) if wanted[0] else (9, 1))


def test_a_convolution_at_the_end_is_not_recomputed():
    convolution, x = Convolution3x3(3, 4), torch.randn(1, 3, 5, 5, requires_grad=True)
    leaves = x, convolution.weight
    expected = torch.autograd.grad(convolution(x.tanh()).sum(), leaves)
    total = recomputed(lambda x: convolution(x.tanh()), x).sum()
    with convolutions() as calls:
        found = torch.autograd.grad(total, leaves)
    assert calls.count == 1  # the gradient of x
    torch.testing.assert_close(found, expected)


def kept_by(function):
    """All that autograd keeps, once for each piece of memory."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return result, list(kept.values())


DECODER = ModelConfig(num_classes=3, hidden_dim=64, mask_dim=64, encoder_feedforward_dim=112, num_encoder_layers=1)


def test_strips_give_the_same_numbers(monkeypatch):
    monkeypatch.setattr("m2f_lab.model.layers.STRIP", 100)
    x, weight, sizes = torch.randn(37, 5, requires_grad=True), torch.randn(5, 5, requires_grad=True), []

    def function(rows):
        sizes.append(len(rows))
        return (rows @ weight).tanh()

    strips, whole = in_strips(function, x, width=20), (x @ weight).tanh()
    assert sum(sizes) == 37
    assert max(sizes) * 20 <= 100
    torch.testing.assert_close(strips, whole)
    names = nodes_behind(strips)
    assert names.count("SplitBackward0") == 1
    assert "SliceBackward0" not in names, "each would make a gradient for all rows"
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (strips, whole)]
    torch.testing.assert_close(*gradients)


def nodes_behind(tensor) -> list[str]:
    """The names of all operations in the graph of a tensor's gradient."""
    nodes, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in nodes]


def test_softmax_of_few_is_softmax():
    torch.manual_seed(0)
    scores = 3 * torch.randn(2, 7, 3, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softmax_of_few(scores), scores.softmax(dim=-1))
    assert torch.autograd.gradcheck(softmax_of_few, scores[:, :2, :1, :5])
    far_apart = torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -2e4]])
    torch.testing.assert_close(softmax_of_few(far_apart), torch.tensor([[0.5, 0, 0.5], [0.5, 0.5, 0]]))
    infinite = torch.tensor([[-torch.inf, 0, 0], [-torch.inf] * 3, [torch.nan, 0, 0]])
    torch.testing.assert_close(softmax_of_few(infinite), infinite.softmax(-1), equal_nan=True)
    assert softmax_of_few(torch.randn(0, 12)).shape == (0, 12)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.randn(2, 12, dtype=torch.bfloat16, requires_grad=True)
        weights = softmax_of_few(half)
        assert weights.dtype == torch.float32
        assert torch.autograd.grad(weights[:, 0].sum(), half)[0].dtype == torch.bfloat16
        assert softmax_of_few(half.double()).dtype == torch.float64


def test_an_encoder_layer_keeps_no_hidden_features():
    torch.manual_seed(0)
    layer, features = EncoderLayer(DECODER), torch.randn(1, 21, 64, requires_grad=True)
    (output, *_), kept = kept_by(
        lambda: layer(features, torch.randn(21, 64), torch.rand(21, 2), [(1, 1), (2, 2), (4, 4)])
    )
    assert not [t.shape for t in kept if t.shape[-1] == 112 and t.shape[0] != 64]
    output.sum().backward()
    assert all(p.grad is not None for p in layer.feedforward.parameters())


def test_the_pixel_decoder_keeps_two_maps_at_stride_4():
    """What enters the two norms, and not what enters the convolutions behind them."""
    torch.manual_seed(0)
    decoder = PixelDecoder([8, 8, 8, 8], DECODER)
    pyramid = [torch.randn(1, 8, 32 // s, 32 // s, requires_grad=True) for s in (1, 2, 4, 8)]
    (features, _), kept = kept_by(lambda: decoder(pyramid))
    assert len([t for t in kept if t.shape == (1, 64, 32, 32)]) == 2
    features.sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())
