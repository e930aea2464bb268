"""Stochastic depth: dropped images skip the branch on a CPU, sizes are static elsewhere; all versions agree."""

import pytest
import torch

from m2f_lab.ops import add_branch, plain, stochastic_depth
from m2f_lab.ops.stochastic_depth import AddScaled, draw_scale, per_image


def add_to_all(x, branch, scale, drop_rate):
    """The version for GPUs, which differs from the others in nothing but how it adds."""
    return AddScaled.apply(x, branch(x), per_image(scale, x))


@pytest.fixture(params=["kept", "all"])
def fast(request, monkeypatch):
    """`add_branch` as on a CPU, and as on a GPU."""
    if request.param == "all":
        monkeypatch.setattr(stochastic_depth, "add_to_kept", add_to_all)
    return request.param


def run(x, weight, rate):
    torch.manual_seed(3)
    return add_branch(x, lambda rows: torch.tanh(rows @ weight), rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1 - 1e-6])
def test_add_branch_plain_equals_fast(fast, rate, dtype):
    x, weight = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((8, 3, 4), (4, 4)))
    found = run(x, weight, rate)
    with plain("add_branch"):
        expected = run(x, weight, rate)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(x)
    gradients, theirs = (torch.autograd.grad(y, (x, weight), upstream) for y in (found, expected))
    torch.testing.assert_close(gradients, theirs, rtol=1e-5, atol=1e-5)


def test_add_branch_gradcheck(fast):
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


def test_every_parameter_of_a_dropped_branch_gets_a_gradient(fast):
    """Distributed training waits for all of them; plain and fast must agree on zero, not on None."""
    branch = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3)
    for seed in range(20):
        torch.manual_seed(seed)
        if draw_scale(2, 0.9, x.device).any():
            continue
        torch.manual_seed(seed)
        add_branch(x, branch, 0.9).sum().backward()
        assert branch.weight.grad is not None
        assert not branch.weight.grad.any()
        return
    pytest.fail("no seed drops all branches")


def test_a_draw_is_that_of_a_bernoulli_variable():
    """The one that timm draws, and earlier versions of this function: runs repeat."""
    torch.manual_seed(5)
    scale = draw_scale(50, 0.3, torch.device("cpu"))
    torch.manual_seed(5)
    torch.testing.assert_close(scale, torch.empty(50).bernoulli_(0.7) / 0.7)
    assert 0 < (scale == 0).sum() < 50


@pytest.mark.parametrize(("own", "branchs"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16",) * 2])
def test_types_are_those_of_a_sum_whatever_is_added(own, branchs):
    """Under autocast a branch returns bfloat16; the scale is not rounded to it."""
    x = torch.randn(4, 5, dtype=getattr(torch, own), requires_grad=True)
    y = torch.randn(4, 5, dtype=getattr(torch, branchs), requires_grad=True)
    scale = torch.tensor([0, 1 / 0.7, 0, 1 / 0.7])[:, None]
    result = AddScaled.apply(x, y, scale)
    assert result.dtype == (x + y).dtype
    exact = (x.double() + scale * y.double()).to(result.dtype)
    torch.testing.assert_close(result, exact)
    upstream = torch.randn(4, 5).to(result.dtype)
    gradients = torch.autograd.grad(result, (x, y), upstream)
    assert [g.dtype for g in gradients] == [x.dtype, y.dtype]
    torch.testing.assert_close(gradients[1], (upstream.double() * scale).to(y.dtype))


def test_sizes_do_not_depend_on_the_draw_off_the_cpu():
    """A tensor without data cannot say which images are kept; neither can a GPU's without stopping the host."""
    x = torch.randn(4, 5, device="meta", requires_grad=True)
    weight = torch.randn(5, 5, device="meta", requires_grad=True)
    result = add_branch(x, lambda rows: rows @ weight, 0.5)
    assert torch.autograd.grad(result.sum(), weight)[0].shape == weight.shape


def test_compiles_into_one_graph_that_repeats_the_draw():
    compiled = torch.compile(lambda x: add_branch(x, torch.tanh, 0.4), backend="aot_eager", fullgraph=True)
    x, outputs = torch.randn(8, 3, 4), []
    for function in (compiled, lambda x: add_branch(x, torch.tanh, 0.4)):
        torch.manual_seed(3)
        outputs.append(function(x))
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0], x)
