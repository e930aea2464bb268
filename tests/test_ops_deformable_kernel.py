"""The Triton kernels against `grid_sample` in float64: in Triton's interpreter on the CPU, and on CUDA."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f_lab import ops
from m2f_lab.ops.deformable_sampling import SamplingPlan, deformable_sampling

TESTS = Path(__file__).parent
LEVELS = [(2, 3), (4, 5), (3, 3)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='needs Triton: pip install "m2f_lab[triton]" (Linux)'
)


def case(level_sizes=LEVELS, batch=2, queries=21, heads=2, dim=4, points=2, dtype=torch.float32, far=0.2, maps=None):
    """Inputs and a gradient of the output; locations reach out of the image by `far` on every side.

    Offsets and scores are of the type `maps`, by default float32.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, queries, heads, len(level_sizes), points)
    values = torch.randn(batch, sum(h * w for h, w in level_sizes), heads, dim, generator=generator)
    centres = torch.rand(queries, 2, generator=generator)
    pixels = torch.tensor([(w, h) for h, w in level_sizes], dtype=torch.float32)[:, None]
    locations = torch.rand(*shape, 2, generator=generator) * (1 + 2 * far) - far
    offsets = (locations - centres[:, None, None, None]) * pixels
    scores = 2 * torch.randn(shape, generator=generator)
    output_grad = torch.randn(batch, queries, heads, dim, generator=generator)
    maps = maps or torch.float32
    return level_sizes, values.to(dtype), centres, offsets.to(maps), scores.to(maps), output_grad.to(dtype)


def far_away():
    inputs = case(queries=7)
    for i, where in enumerate((1e4, -1e9, 1e30, float("inf"), float("-inf"), float("nan"))):
        inputs[3][:, i, 0, 1, 0, i % 2] = where
    return inputs


def strided():
    sizes, values, centres, *maps, output_grad = case(heads=3)
    return sizes, values.mT.contiguous().mT, centres, *(x.mT.contiguous().mT for x in maps), output_grad


def on_edges():
    """Points a quarter of a pixel apart, from beyond one side to beyond the other; sums of quarters are exact."""
    sizes, values, centres, offsets, scores, output_grad = case([(4, 8), (2, 1)], queries=64, points=4)
    generator = torch.Generator().manual_seed(1)
    quarters = torch.randint(-8, 44, offsets.shape, generator=generator) / 4
    return sizes, values, torch.zeros_like(centres), quarters, scores, output_grad


CASES = {
    "float32": case(),
    "bfloat16": case(dtype=torch.bfloat16),
    "float16": case(dtype=torch.float16),
    "bfloat16 throughout": case(dtype=torch.bfloat16, maps=torch.bfloat16),
    "as in the model": case(queries=17, heads=8, dim=32, points=4, dtype=torch.bfloat16),
    "wide heads": case(queries=3, heads=3, dim=64),
    "heads of 24": case(queries=5, dim=24, dtype=torch.bfloat16),
    "heads of 8": case(queries=9, dim=8, points=8),
    "one level": case([(4, 3)], queries=16, points=1),
    "four levels": case([(4, 3), (3, 2), (1, 4), (2, 2)], queries=6, dim=16, points=3),
    "odd sizes": case([(1, 9), (7, 1), (1, 1)], queries=17, heads=3, dim=5),
    "on edges": on_edges(),
    "mostly outside": case(far=2.0),
    "far away": far_away(),
    "strided": strided(),
    "no images": case(batch=0),
    "no positions": case(queries=0),
}


def reference(level_sizes, values, centres, offsets, scores, output_grad):
    """In float64; a point that sees nothing, far away or not a number, counts as outside."""
    offsets = offsets.double().where(offsets.abs() < 1000, torch.full((), 99.0, dtype=torch.float64))
    inputs = [x.detach().double().requires_grad_() for x in (values, offsets, scores)]
    points = SamplingPlan(level_sizes, centres.double(), *inputs[1:])
    with ops.plain("deformable_sampling"):
        output = deformable_sampling(inputs[0], points)
    return [output.detach(), *torch.autograd.grad(output, inputs, output_grad.double())]


def assert_agree(results, inputs):
    for ours, expected, like in zip(results, reference(*inputs), (inputs[1], inputs[1], *inputs[3:5]), strict=True):
        assert ours.dtype == like.dtype
        # Sums are rounded once, to the type of the result; 64 terms of float32 come before.
        tolerance = max(torch.finfo(ours.dtype).eps, 64 * torch.finfo(torch.float32).eps)
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, list[torch.Tensor]]:
    folder = tmp_path_factory.mktemp("interpreter")
    torch.save(CASES, folder / "cases.pt")
    subprocess.run(
        [sys.executable, TESTS / "deformable_in_interpreter.py", folder / "cases.pt", folder / "results.pt"],
        env=os.environ | {"PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(folder / "cache")},
        check=True,
    )
    return torch.load(folder / "results.pt")


@needs_triton
@pytest.mark.parametrize("vectors", [True, False], ids=["adds vectors", "adds numbers"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_in_the_interpreter(interpreted, name, vectors):
    assert_agree(interpreted[name, vectors], CASES[name])


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("vectors", [True, False], ids=["adds vectors", "adds numbers"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_cuda(name, vectors, monkeypatch):
    from m2f_lab.ops import deformable_kernel

    monkeypatch.setattr(deformable_kernel, "adds_vectors", lambda device: vectors)
    results = outputs_and_gradients_on_cuda(*CASES[name])
    assert_agree(results, CASES[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "on edges", "mostly outside"])
def test_deterministic_algorithms_on_cuda(name):
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (outputs_and_gradients_on_cuda(*CASES[name]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    assert_agree(once, CASES[name])


def outputs_and_gradients_on_cuda(level_sizes, *tensors):
    values, centres, offsets, scores, output_grad = (x.detach().cuda() for x in tensors)
    inputs = [x.requires_grad_() for x in (values, offsets, scores)]
    output = deformable_sampling(values, SamplingPlan(level_sizes, centres, offsets, scores))
    return [output.detach(), *torch.autograd.grad(output, inputs, output_grad)]


def test_package_imports_without_triton():
    program = "import sys; sys.modules['triton'] = None; import m2f_lab.ops, m2f_lab.model, m2f_lab.training"
    subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, check=True)
