"""Reading bags of rows on the CPU against `grid_sample`: values, all three gradients, and what lies outside."""

import itertools
import logging
import sys

import pytest
import torch

from m2f_lab import ops
from m2f_lab.ops.deformable_bags import Canvas, sample_by_bags
from m2f_lab.ops.deformable_sampling import (
    SamplingPlan,
    announce,
    deformable_sampling,
    sample_by_grid,
    why_no_kernel,
)

deformable_sampling_module = sys.modules["m2f_lab.ops.deformable_sampling"]  # the package has a function of that name

DOUBLE = torch.float64


def random_inputs(level_sizes, batch=2, queries=5, heads=2, dim=3, points=2, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, queries, heads, len(level_sizes), points)
    values = torch.randn(batch, sum(h * w for h, w in level_sizes), heads, dim, generator=generator, dtype=DOUBLE)
    locations = torch.rand(*shape, 2, generator=generator, dtype=DOUBLE) * 1.4 - 0.2  # some of them outside
    weights = torch.rand(shape, generator=generator, dtype=DOUBLE)
    return tuple(x.to(dtype).requires_grad_() for x in (values, locations, weights))


def output_and_gradients(sample, level_sizes, inputs):
    values, locations, weights = inputs
    output = sample(values, level_sizes, locations, weights)
    sensitivity = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return [output, *torch.autograd.grad((output * sensitivity).sum(), inputs)]


def assert_equal_to_grid_sample(level_sizes, inputs):
    expected = output_and_gradients(sample_by_grid, level_sizes, inputs)
    for ours, theirs in zip(output_and_gradients(sample_by_bags, level_sizes, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "level_sizes",
    [[(2, 3), (4, 5), (3, 3)], [(7, 4)], [(1, 1), (1, 1)], [(1, 9), (8, 1)], [(4, 2), (3, 7), (5, 5), (1, 2)]],
    ids=str,
)
def test_bags_equal_grid_sample(level_sizes):
    assert_equal_to_grid_sample(level_sizes, random_inputs(level_sizes))


@pytest.mark.parametrize("level_sizes", [[(3, 4)], [(2, 5), (4, 3)], [(4, 3), (2, 5)]], ids=str)
def test_bags_equal_grid_sample_around_the_edge(level_sizes):
    """Every half pixel from well outside to well outside: where corners of a point leave the image one by one."""
    values, _, _ = random_inputs(level_sizes, batch=1, heads=2, dim=2)
    locations = []
    for height, width in level_sizes:
        steps = itertools.product(torch.arange(-1.5, width + 1.75, 0.25), torch.arange(-1.5, height + 1.75, 0.25))
        locations.append(torch.stack([torch.stack([x / width, y / height]) for x, y in steps])[:300])
    count = min(map(len, locations))
    locations = torch.stack([x[:count] for x in locations], dim=1)[None, :, None, :, None]  # (1, Q, 1, L, 1, 2)
    locations = locations.expand(-1, -1, 2, -1, -1, -1).to(DOUBLE).requires_grad_()
    weights = torch.rand(locations.shape[:-1], dtype=DOUBLE, requires_grad=True)
    assert_equal_to_grid_sample(level_sizes, (values, locations, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deformable_sampling_plain_equals_fast(dtype):
    """Values and all gradients through the switch; plain is grid_sample on ordinary autograd."""
    level_sizes = [(5, 6), (9, 7)]
    values, offsets, scores = random_inputs(level_sizes, dim=8, points=4, dtype=dtype)
    centres = torch.rand(offsets.shape[1], 2, generator=torch.Generator().manual_seed(2), dtype=dtype)

    def sample(values, level_sizes, offsets, scores):
        return deformable_sampling(values, SamplingPlan(level_sizes, centres, 5 * offsets - 3, scores))

    inputs = values, offsets, scores
    fast = output_and_gradients(sample, level_sizes, inputs)
    with ops.plain("deformable_sampling"):
        plain = output_and_gradients(sample, level_sizes, inputs)
        assert "BagSampling" not in sample(values, level_sizes, offsets, scores).grad_fn.name()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max()))


def test_bags_gradcheck():
    level_sizes = [(2, 3), (3, 2)]
    inputs = random_inputs(level_sizes, batch=2, queries=2)
    assert torch.autograd.gradcheck(lambda v, o, w: sample_by_bags(v, level_sizes, o, w), inputs)


@pytest.mark.parametrize("far", [1e3, 1e9, 1e30, float("inf"), -1e9, float("-inf")])
def test_bags_read_zero_far_away(far):
    level_sizes = [(2, 3), (4, 5)]
    values, locations, weights = random_inputs(level_sizes, dtype=torch.float32)
    near = locations.detach()
    with torch.no_grad():
        locations[:, 2, 1, 0] = far
        without = weights.clone()
        without[:, 2, 1, 0] = 0
    output, value_grad, location_grad, weight_grad = output_and_gradients(
        sample_by_bags, level_sizes, (values, locations, weights)
    )
    torch.testing.assert_close(output, sample_by_grid(values, level_sizes, near.nan_to_num(0, 9, -9), without))
    assert not location_grad[:, 2, 1, 0].any()
    assert not weight_grad[:, 2, 1, 0].any()
    assert value_grad.isfinite().all()


def test_bags_with_a_nan_location_spoil_one_sum_only():
    level_sizes = [(2, 3), (4, 5)]
    inputs = random_inputs(level_sizes, dtype=torch.float32)
    clean = sample_by_bags(inputs[0], level_sizes, inputs[1], inputs[2]).detach()
    with torch.no_grad():
        inputs[1][0, 3, 1, 1, 0] = float("nan")
    output, *_ = output_and_gradients(sample_by_bags, level_sizes, inputs)
    assert output[0, 3, 1].isnan().all()
    clean[0, 3, 1] = output.detach()[0, 3, 1]
    torch.testing.assert_close(output.detach(), clean, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_bags_of_empty_inputs(batch, queries):
    level_sizes = [(2, 3), (4, 5)]
    inputs = random_inputs(level_sizes, batch=batch, queries=queries)
    output, value_grad, *_ = output_and_gradients(sample_by_bags, level_sizes, inputs)
    assert output.shape == (batch, queries, 2, 3)
    assert not value_grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bags_sum_half_precision_in_float32(dtype):
    level_sizes = [(5, 6), (9, 7)]
    values, locations, weights = (x.detach().to(dtype) for x in random_inputs(level_sizes, dim=8, points=4))
    exact = output_and_gradients(
        sample_by_grid, level_sizes, [x.double().requires_grad_() for x in (values, locations, weights)]
    )
    ours = output_and_gradients(sample_by_bags, level_sizes, [x.requires_grad_() for x in (values, locations, weights)])
    for tensor, reference in zip(ours, exact, strict=True):
        assert tensor.dtype == dtype
        # Nothing but the result is rounded (and, for gradients, the output gradient).
        torch.testing.assert_close(tensor.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=0.02)


def test_bags_under_autocast_and_strided():
    level_sizes = [(3, 4), (5, 2)]
    values, locations, weights = (x.detach().float() for x in random_inputs(level_sizes, heads=3))
    expected = sample_by_grid(values, level_sizes, locations, weights)
    strided = values.transpose(1, 3).contiguous().transpose(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sample_by_bags(strided, level_sizes, locations, weights), expected)


def test_canvas_levels_do_not_touch():
    """Also across the ends of rows, where one row's border on the right is the next one's on the left."""
    canvas = Canvas([(2, 3), (1, 1), (3, 2)], 2, 1, torch.float32, torch.device("cpu"))
    table = canvas.paint(torch.ones(13, 2, 1))
    assert table.sum() == 26
    assert not table.view(2, -1, canvas.pitch)[:, [0, 3, 5, 9, 10]].any()
    assert not table.view(2, -1, canvas.pitch)[:, :, 0].any()


def test_bags_keep_inputs_only_for_backward():
    inputs = random_inputs([(2, 3), (4, 5)])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        sample_by_bags(inputs[0], [(2, 3), (4, 5)], inputs[1], inputs[2])
    assert set(kept) == {x.data_ptr() for x in inputs}


def some_points(level_sizes, device="cpu"):
    values, locations, scores = (x.detach().to(device) for x in random_inputs(level_sizes))
    return values, SamplingPlan(level_sizes, torch.zeros(5, 2, device=device), locations, scores)


def test_log_names_the_path_once(caplog):
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="m2f_lab"):
        for _ in range(3):
            deformable_sampling(*some_points([(2, 3)]))
        assert [r.getMessage() for r in caplog.records] == [
            "Deformable attention reads bags of rows on the device 'cpu'."
        ]
        for _ in range(2):
            assert deformable_sampling(*some_points([(2, 3)], "meta")).shape == (2, 5, 2, 3)
    assert [r.levelname for r in caplog.records] == ["INFO", "WARNING"]
    assert "grid_sample: there is none for the device 'meta'" in caplog.records[1].getMessage()


@pytest.mark.parametrize(("device", "exact", "expected"), [("cuda", True, "bags"), ("cuda", False, "kernel")])
def test_deterministic_algorithms_need_a_fixed_order(monkeypatch, device, exact, expected):
    """The kernel adds atomically. Which path is taken is asked of a tensor that says it is on CUDA."""
    from types import SimpleNamespace

    for path in ("bags", "grid"):
        monkeypatch.setattr(deformable_sampling_module, f"sample_by_{path}", lambda *_, taken=path: taken)
    kernel = SimpleNamespace(sample_by_kernel=lambda *_: "kernel")
    monkeypatch.setitem(sys.modules, "m2f_lab.ops.deformable_kernel", kernel)
    monkeypatch.setattr(deformable_sampling_module, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: exact)
    _, points = some_points([(2, 3)])
    values = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    assert deformable_sampling(values, points) == expected


def test_why_no_kernel(monkeypatch):
    assert "float64" in why_no_kernel("cuda", torch.float64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in why_no_kernel("cuda", torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert why_no_kernel("cuda", torch.bfloat16) is None


def test_benchmark_in_miniature(monkeypatch, tmp_path):
    from benchmarks import deformable_attention as benchmark
    from benchmarks import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "LEVEL_SIZES", [(2, 3), (4, 5)])
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device: 1e9)
    benchmark.main()
    text = (tmp_path / "deformable_attention.json").read_text()
    assert text.count("share of floor") == 7
    assert ("not measured" in text) == (not torch.cuda.is_available())
