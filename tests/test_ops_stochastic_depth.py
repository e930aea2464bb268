"""Stochastic depth: dropped images skip the branch; plain and fast agree."""

import pytest
import torch

from m2f_lab.ops import add_branch, plain


def run(x, weight, rate):
    torch.manual_seed(3)
    return add_branch(x, lambda rows: torch.tanh(rows @ weight), rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1 - 1e-6])
def test_add_branch_plain_equals_fast(rate, dtype):
    x, weight = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((8, 3, 4), (4, 4)))
    fast = run(x, weight, rate)
    with plain("add_branch"):
        expected = run(x, weight, rate)
    torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(x)
    found, theirs = (
        torch.autograd.grad(y, (x, weight), upstream, allow_unused=True, materialize_grads=True)
        for y in (fast, expected)
    )
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def test_add_branch_gradcheck():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 2), (2, 2)))
    assert torch.autograd.gradcheck(lambda x, w: run(x, w, 0.5), (x, weight))


@pytest.mark.parametrize("is_plain", [False, True])
def test_add_branch_scales_kept_images(is_plain):
    torch.manual_seed(0)
    x, seen = torch.randn(64, 3, 4), []

    def branch(rows):
        seen.append(len(rows))
        return torch.tanh(rows)

    with plain(*([] if is_plain else ["checkpointed"])):
        output = add_branch(x, branch, 0.5)
    kept = (output != x).flatten(1).any(1)
    assert 16 < kept.sum() < 48
    assert seen == [64 if is_plain else int(kept.sum())]
    torch.testing.assert_close(output[kept], x[kept] + 2 * torch.tanh(x[kept]))


def test_every_parameter_of_a_dropped_branch_gets_a_gradient():
    """Distributed training waits for all of them; plain and fast must agree on zero, not on None."""
    branch = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3)
    for seed in range(20):
        torch.manual_seed(seed)
        if torch.empty(2).bernoulli_(0.1).sum() == 0:
            torch.manual_seed(seed)
            add_branch(x, branch, 0.9).sum().backward()
            assert branch.weight.grad is not None
            assert not branch.weight.grad.any()
            return
    pytest.fail("no seed drops all branches")
