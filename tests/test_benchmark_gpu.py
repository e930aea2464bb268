"""The benchmark for a GPU: all of it runs in miniature on a CPU, and nothing that fails is lost."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import deformable_attention, gpu, inference, peers, training_step
from benchmarks.emulated_cuda import emulated_cuda, why_not_emulated
from benchmarks.gpu_sections import COLUMNS, SECTIONS, Place

COMPILED = "compiled"  # takes a compiler, and minutes


@pytest.mark.slow
def test_all_of_it_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = [name for name in SECTIONS if name != COMPILED]
    gpu.main(["--small", "--device", "cpu", "--only", *names, "--budget", "900", "--out", str(tmp_path / "gpu.json")])
    (run,) = json.loads((tmp_path / "gpu.json").read_text())
    assert list(run["sections"]) == names
    for name, section in run["sections"].items():
        assert "failed" not in section, (name, section)
        assert section["columns"] == list(COLUMNS[name])
        assert {len(row) for row in section["rows"]} == {len(COLUMNS[name])}
    rows = {name: {row[0]: row[1:] for row in section["rows"]} for name, section in run["sections"].items()}
    assert all(float(cell) < 1e-2 for row in rows["kernel"].values() for cell in row)
    assert all(float(cell) < 1e-2 for cell in rows["autocast"]["float32"])
    assert {row[0] for row in rows["repeats"].values()} == {"yes"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for _ in range(2):
        gpu.main(["--out", str(tmp_path / "gpu.json")])
    earlier, run = json.loads((tmp_path / "gpu.json").read_text())
    assert earlier["sections"] == run["sections"]
    assert {section["rows"][0][0] for section in run["sections"].values()} == {"not measured"}
    assert capsys.readouterr().out.count(gpu.NO_GPU) == 2 * len(SECTIONS)


def test_no_time_left_is_said(tmp_path: Path) -> None:
    gpu.main(["--small", "--device", "cpu", "--only", "kernel", "--budget", "0", "--out", str(tmp_path / "gpu.json")])
    (run,) = json.loads((tmp_path / "gpu.json").read_text())
    assert run["sections"]["kernel"]["failed"] == gpu.NO_TIME


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    section = gpu.measured("kernel", Place("cpu", True, tmp_path), 0.2)
    assert section["failed"] == "took more than 0 s"
    assert section["rows"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="fails where there is no GPU")
def test_a_section_that_fails_says_why(tmp_path: Path) -> None:
    section = gpu.measured("kernel", Place("cuda", True, tmp_path), 120)
    assert "CUDA" in section["failed"]
    assert section["rows"] == []


def test_without_a_peer_the_rest_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    def no_peer(folder: Path, small: bool) -> None:
        raise ImportError("no transformers")

    monkeypatch.setattr(peers, "save_peer", no_peer)
    monkeypatch.setattr(gpu, "measured", lambda name, place, seconds: gpu.not_measured(name, "asked"))
    gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    assert "no transformers" in capsys.readouterr().out
    (run,) = json.loads((tmp_path / "gpu.json").read_text())
    assert {section["failed"] for section in run["sections"].values()} == {"asked"}


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"times": [0.4, 0.3], "peak": 7}, ("200.0", "350.0", "1.75", "100.0", "50%", "5", "7")),
        ({"failed": "no memory"}, ("200.0", "fails: no memory", "–", "100.0", "50%", "5", "–")),
    ],
)
def test_cells_beside_the_peer(tmp_path: Path, monkeypatch, theirs: dict, expected: tuple) -> None:
    ours = {"times": [0.2, 0.2], "peak": 5, "floor": 0.1}
    monkeypatch.setattr(peers, "measure_in_turn", lambda *_: (ours, theirs))
    rows = list(SECTIONS["step"][0](Place("cuda", False, tmp_path)))
    assert rows == [("bfloat16", *expected), ("float32", *expected)]


def test_rows_before_a_failure_are_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(place: Place):
        yield "first", "1"
        raise FloatingPointError("second")

    monkeypatch.setitem(SECTIONS, "tests", (fails, 1))
    with pytest.raises(FloatingPointError, match="second"):
        gpu.run_section("tests", Place("cpu", True, tmp_path))
    assert capsys.readouterr().out == gpu.ROW + '["first", "1"]\n'


def test_a_training_step_of_the_benchmark_is_the_librarys(tmp_path: Path) -> None:
    recipe = Place("cuda", False, tmp_path).recipe()
    assert recipe.data.crop_size == (peers.SIDE, peers.SIDE)
    assert (recipe.optimization.batch_size, recipe.optimization.precision) == (16, "bfloat16")
    assert recipe.model.drop_path_rate == peers.DROP_PATH


# ------------------------------------------------------------------------------------------------ on an emulated device


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A GPU whose numbers mean nothing, but on which tensors of the CPU are an error."""
    if obstacle := why_not_emulated():
        pytest.skip(obstacle)
    monkeypatch.setattr(peers, "REPEATS", 1)
    monkeypatch.setattr(peers, "turn", nullcontext)
    monkeypatch.setattr(peers, "matrix_product_rate", lambda precision, device: 1e9)
    monkeypatch.setattr(deformable_attention, "assert_equal", lambda *_: None)
    monkeypatch.setattr(deformable_attention, "copy_bandwidth", lambda device: 1e9)
    with emulated_cuda():
        yield Place("cuda", True, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["kernel", "autocast", "sampling", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ideas", "repeats"))],
)
def test_a_section_minds_devices(name: str, place: Place) -> None:
    rows = list(SECTIONS[name][0](place))
    assert rows
    assert {len(row) for row in rows} == {len(COLUMNS[name])}


@pytest.mark.parametrize("side", [peers.OURS, peers.THEIRS])
@pytest.mark.parametrize("benchmark", [inference, training_step])
def test_each_side_minds_devices(benchmark: ModuleType, side: str, place: Place) -> None:
    peers.save_peer(place.folder, small=True)
    options = Namespace(measure=side, folder=place.folder, device="cuda", precision="bfloat16", small=True)
    assert benchmark.measure(options)["floor"] > 0
