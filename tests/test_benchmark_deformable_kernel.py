"""The kernels of deformable attention, compiled ahead of time for GPUs that need not be there."""

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='needs Triton: pip install "m2f_lab[triton]" (Linux)'
)

LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   FADD R2, R2, R3 ;
.L_x_2:
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   BRA `(.L_x_3);
        /*0060*/                   NOP;
"""

# Instructions per row at most: 0.7 of what the kernels took that read locations and weights and gave a lane four
# channels, 364 forward and 887 or 696 backward, before and after atomics of vectors.
AT_MOST = {False: {80: 254, 90: 254}, True: {80: 620, 90: 487}}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_lean(backward: bool, capability: int, dtype: torch.dtype, **options) -> None:
    from benchmarks.deformable_kernel import cost

    found = cost(backward, capability, dtype, **options)
    assert found.spilled == 0
    assert found.instructions <= AT_MOST[backward][80 if capability < 90 else 90]
    assert not {"BAR", "STL", "LDL"} & {name.split(".")[0] for name in found.operations}


def test_instructions_count_as_often_as_they_run():
    from benchmarks.deformable_kernel import executed_instructions

    executed, operations = executed_instructions(LOOP, loops=3)
    assert executed == 1 + 3 * 3 + 1
    assert operations["BRA"] == 3


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernel_compiles_and_is_lean(backward, capability):
    assert_lean(backward, capability, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernel_compiles_and_is_lean_everywhere(backward, capability):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert_lean(backward, capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_configuration_spills(backward, capability):
    from benchmarks.deformable_kernel import cost
    from m2f_lab.ops.deformable_kernel import sum_points, sum_points_backward

    for config in range(len((sum_points_backward if backward else sum_points).configs)):
        for dtype in (torch.bfloat16, torch.float32):
            assert cost(backward, capability, dtype, config=config).spilled == 0


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "changes",
    [dict(dim=d) for d in (8, 12, 16, 24, 40, 48, 64)]
    + [dict(levels=n, points=p) for n, p in ((1, 4), (4, 4), (3, 8), (3, 1), (3, 2))]
    + [dict(heads=4, dim=16)],
    ids=str,
)
def test_other_models_do_not_spill(backward, changes):
    from benchmarks.deformable_kernel import Shape, cost

    assert cost(backward, 80, torch.bfloat16, Shape(**changes)).spilled == 0


@pytest.mark.slow
def test_kernel_compiles_for_maps_in_bfloat16():
    from benchmarks.deformable_kernel import cost

    assert cost(False, 80, torch.bfloat16, maps="*bf16").spilled == 0
    assert cost(True, 80, torch.bfloat16, maps="*bf16").spilled == 0


@pytest.mark.parametrize(("capability", "instruction", "per_lane"), [(80, "RED.E.ADD.F32", 16), (90, "F32x4", 8)])
def test_atomics_are_whole_sectors_or_vectors(capability, instruction, per_lane):
    """Per point a lane adds 4 corners of 4 channels each by itself, or of 8 channels in vectors of four."""
    from benchmarks.deformable_kernel import PUBLISHED, cost

    operations = cost(True, capability, torch.bfloat16).operations
    assert sum(n for name, n in operations.items() if instruction in name) == per_lane * PUBLISHED.points
    assert sum(n for name, n in operations.items() if name.startswith(("RED", "ATOM"))) == per_lane * PUBLISHED.points


def test_benchmark_in_miniature(monkeypatch, tmp_path):
    from benchmarks import deformable_kernel as benchmark
    from benchmarks import report

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    benchmark.main(["--small"])
    assert (tmp_path / "deformable_kernel.json").read_text().count('"instructions per row"') == 4
