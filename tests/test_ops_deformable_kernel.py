"""The Triton kernels against `grid_sample` in float64: in Triton's interpreter on the CPU, and on CUDA."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f_lab.ops.deformable_sampling import deformable_sampling, sample_by_grid

TESTS = Path(__file__).parent
LEVELS = [(2, 3), (4, 5), (3, 3)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='needs Triton: pip install "m2f_lab[triton]" (Linux)'
)


def case(level_sizes=LEVELS, batch=2, queries=21, heads=2, dim=4, points=2, dtype=torch.float32, spread=0.2):
    """Inputs and a gradient of the output; locations reach out of the image by `spread` on every side."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, queries, heads, len(level_sizes), points)
    values = torch.randn(batch, sum(h * w for h, w in level_sizes), heads, dim, generator=generator)
    locations = torch.rand(*shape, 2, generator=generator) * (1 + 2 * spread) - spread
    weights = torch.rand(shape, generator=generator)
    output_grad = torch.randn(batch, queries, heads, dim, generator=generator)
    return level_sizes, values.to(dtype), locations, weights, output_grad.to(dtype)


def far_away():
    inputs = case(queries=7)
    for i, where in enumerate((1e4, -1e9, 1e30, float("inf"), float("-inf"), float("nan"))):
        inputs[2][:, i, 0, 1, 0, i % 2] = where
    return inputs


def strided():
    sizes, values, locations, weights, output_grad = case(heads=3)
    return sizes, values.mT.contiguous().mT, locations.mT.contiguous().mT, weights.mT.contiguous().mT, output_grad


CASES = {
    "float32": case(),
    "bfloat16": case(dtype=torch.bfloat16),
    "float16": case(dtype=torch.float16),
    "one level": case([(4, 3)], queries=16, points=1),
    "odd sizes": case([(1, 9), (7, 1), (1, 1)], queries=17, heads=3, dim=5),
    "mostly outside": case(spread=2.0),
    "far away": far_away(),
    "strided": strided(),
    "no images": case(batch=0),
    "no positions": case(queries=0),
}


def reference(level_sizes, values, locations, weights, output_grad):
    """In float64; a location that sees nothing, far away or not a number, counts as outside."""
    locations = locations.double().where(locations.abs() < 100, torch.full((), 9.0, dtype=torch.float64))
    inputs = [x.detach().double().requires_grad_() for x in (values, locations, weights)]
    output = sample_by_grid(inputs[0], level_sizes, *inputs[1:])
    return [output.detach(), *torch.autograd.grad(output, inputs, output_grad.double())]


def assert_agree(results, inputs):
    for ours, expected, like in zip(results, reference(*inputs), (inputs[1], *inputs[1:4]), strict=True):
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
@pytest.mark.parametrize("name", CASES)
def test_kernel_in_the_interpreter(interpreted, name):
    assert_agree(interpreted[name], CASES[name])


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_cuda(name):
    level_sizes, *tensors = CASES[name]
    values, locations, weights, output_grad = (x.cuda() for x in tensors)
    inputs = [x.requires_grad_() for x in (values, locations, weights)]
    output = deformable_sampling(values, level_sizes, locations, weights)
    assert_agree([output, *torch.autograd.grad(output, inputs, output_grad)], CASES[name])


def test_package_imports_without_triton():
    program = "import sys; sys.modules['triton'] = None; import m2f_lab.ops, m2f_lab.model, m2f_lab.training"
    subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, check=True)
