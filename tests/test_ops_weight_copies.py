"""Copies of weights, made at once: autocast's numbers, and gradients in the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from m2f_lab import ops
from m2f_lab.model.layers import Attention, Perceptron

BF16 = torch.bfloat16


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": Attention(16, 2), "norm": nn.LayerNorm(16), "perceptron": Perceptron(16, 32)})


def run(model: nn.ModuleDict, x: Tensor) -> Tensor:
    with torch.autocast("cpu", BF16):
        x = model["norm"](x + model["attention"](x, x, x)[0])
        for _ in range(2):  # a weight that is used twice adds up its gradients
            x = x + model["perceptron"](x)
    return x


def test_copies_give_the_results_and_gradients_of_autocast(model):
    x = torch.randn(3, 7, 16)
    expected = run(model, x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    with ops.weight_copies(model.parameters(), BF16):
        found = run(model, x)
    found.square().sum().backward()  # outside, as training does it
    assert torch.equal(found, expected)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, gradient), name


def test_copies_are_used_under_autocast_alone(model):
    weight = model["perceptron"][0].weight
    with ops.weight_copies(model.parameters(), BF16):
        assert ops.copy_of(weight) is weight
        with torch.autocast("cpu", BF16):
            assert ops.copy_of(weight).dtype == BF16
            assert ops.copy_of(torch.zeros(2)).dtype == torch.float32  # a weight that nobody copied
            with torch.autocast("cpu", enabled=False):
                assert ops.copy_of(weight) is weight
    with torch.autocast("cpu", BF16):
        assert ops.copy_of(weight) is weight


def test_parameters_that_need_no_gradient_get_none(model):
    model["attention"].requires_grad_(False)
    with ops.weight_copies(model.parameters(), BF16):
        run(model, torch.randn(2, 5, 16)).sum().backward()
    assert all(parameter.grad is None for parameter in model["attention"].parameters())
    assert all(parameter.grad is not None for parameter in model["perceptron"].parameters())


def test_for_products_casts_under_autocast_alone():
    x = torch.ones(2)
    assert ops.for_products(x) is x
    with torch.autocast("cpu", BF16):
        assert ops.for_products(x).dtype == BF16
