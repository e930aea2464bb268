"""Linear maps: plain and fast agree; other types, autocast and a PyTorch without oneDNN take the plain one."""

import pytest
import torch
from torch import nn

from m2f_lab.ops import Linear, linear, plain, replace_linears
from m2f_lab.ops.linear_map import HAS_ONEDNN

MODULE = "m2f_lab.ops.linear_map"


@pytest.mark.parametrize("has_onednn", [HAS_ONEDNN, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 4, 6), (0, 6)])
def test_linear_plain_equals_fast(monkeypatch, shape, bias, dtype, has_onednn):
    monkeypatch.setattr(f"{MODULE}.HAS_ONEDNN", has_onednn)
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, (7, 6), *([(7,)] if bias else []))]
    fast = linear(*inputs)
    with plain("linear"):
        expected = linear(*inputs)
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(fast)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in (fast, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch has no oneDNN")
def test_linear_takes_onednn_unless_plain():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(7, 6)
    assert "OneDnnLinear" in linear(x, weight).grad_fn.next_functions[0][0].name()
    with plain():
        assert "Mm" in linear(x, weight).grad_fn.name()


def test_linear_computes_no_gradient_without_need():
    weight = torch.randn(7, 6)
    x = torch.randn(3, 6, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 6))
    assert not linear(x.detach(), weight).requires_grad


def test_linear_of_strided_rows():
    x, weight = torch.randn(6, 3).t(), torch.randn(6, 7).t()
    torch.testing.assert_close(linear(x, weight), x @ weight.t())


def test_linear_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 6), torch.randn(7, 6)).dtype == torch.bfloat16


def test_replace_linears_keeps_parameters_and_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 2, bias=False)))
    x, parameters = torch.randn(3, 4), dict(model.named_parameters())
    expected = model(x)
    replace_linears(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [Linear, Linear]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert len(parameters) == 3
    torch.testing.assert_close(model(x), expected)
