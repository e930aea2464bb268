"""Checkpointing: the same numbers, less kept, and no product computed twice at the end."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.ops import Linear, checkpointed, is_plain, plain
from m2f_lab.ops.linear_map import HAS_ONEDNN


class Calls(TorchDispatchMode):
    """Counts the calls of some of PyTorch's operators."""

    def __init__(self, *operators):
        super().__init__()
        self.operators, self.count = operators, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in self.operators
        return function(*args, **(kwargs or {}))


def perceptron(x, weight, bias):
    return F.linear(x.tanh().exp(), weight, bias)


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((5, 6), (7, 6), (7,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpointed_equals_plain(dtype):
    x = parameters(dtype)
    fast = checkpointed(perceptron, *x)
    with plain("checkpointed"):
        expected = checkpointed(perceptron, *x)
    torch.testing.assert_close(fast, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(y.square().sum(), x) for y in (fast, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_checkpointed_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: checkpointed(perceptron, *x), parameters(torch.float64))


def test_checkpointed_keeps_inputs_only():
    x, kept = parameters(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        checkpointed(perceptron, *x)
        assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in x}
        with plain():
            checkpointed(perceptron, *x)
    assert len({t.data_ptr() for t in kept} - {t.data_ptr() for t in x}) == 2  # tanh and exp


def test_checkpointed_runs_no_product_at_the_end_twice():
    x = parameters()
    loss = checkpointed(perceptron, *x).square().sum()
    with Calls(torch.ops.aten.mm, torch.ops.aten.addmm) as calls:
        loss.backward()
    assert calls.count == 2  # the gradients of the input and of the weight


@pytest.mark.parametrize("is_linear_plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpointed_then_linear_equals_plain_and_runs_no_product_twice(dtype, is_linear_plain):
    torch.manual_seed(0)
    last, x = Linear(6, 7).to(dtype), torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    leaves = x, last.weight, last.bias
    expected = last(x.tanh().exp())
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    with plain(*(["linear"] if is_linear_plain else ["add_branch"])):
        found = checkpointed(lambda x: x.tanh().exp(), x, then=last)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours = [torch.ops.mkldnn._linear_pointwise] if HAS_ONEDNN else []
    with Calls(torch.ops.aten.mm, torch.ops.aten.addmm, *ours) as calls:
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), leaves), gradients)
    assert calls.count == 2  # the gradients of the input and of the weight


def test_checkpointed_twice_inside_one_another():
    """As with a whole backbone that is computed twice: what its blocks hand on is needed then."""
    torch.manual_seed(0)
    first, last, x = Linear(6, 6), Linear(6, 7), torch.randn(5, 6, requires_grad=True)
    leaves = x, *first.parameters(), *last.parameters()

    def both(x):
        return checkpointed(torch.tanh, checkpointed(torch.exp, x, then=first), then=last).sin()

    with plain():
        expected = torch.autograd.grad(both(x).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(both(x).sum(), leaves), expected)
    torch.testing.assert_close(torch.autograd.grad(checkpointed(both, x).sum(), leaves), expected)


def test_checkpointed_runs_no_convolution_at_the_end_twice():
    x, weight = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    loss = checkpointed(lambda x: F.conv2d(x.tanh(), weight), x).sum()
    with Calls(torch.ops.aten.convolution) as calls:
        loss.backward()
    assert calls.count == 0


def test_checkpointed_is_a_call_without_gradients():
    x, calls = torch.randn(3), []
    with torch.no_grad():
        torch.testing.assert_close(checkpointed(lambda x: calls.append(1) or 2 * x, x), 2 * x)
    assert calls == [1]


def test_checkpointed_recomputes_under_the_switch_of_its_call():
    """Backward often runs after `plain()` has ended."""
    seen = []

    def function(x):
        seen.append(is_plain("deformable_sampling"))
        return x.exp() * 2

    x = torch.randn(3, requires_grad=True)
    with plain("deformable_sampling"):
        y = checkpointed(function, x)
    y.sum().backward()
    assert seen == [True, True]


def test_nothing_is_computed_twice_on_a_gpu():
    runs = []

    def function(x):
        runs.append(x.device.type)
        return x.exp()

    checkpointed(function, torch.ones(3, device="meta", requires_grad=True)).sum().backward()
    assert runs == ["meta"]
    checkpointed(function, torch.ones(3, requires_grad=True)).sum().backward()
    assert runs == ["meta", "cpu", "cpu"]
