"""The benchmarks of the whole model run in miniature, both sides and all precisions."""

import functools
import importlib
import json
from contextlib import nullcontext

import pytest
import torch

from benchmarks import ablation, compiled, peers, report
from m2f_lab import ops
from m2f_lab.ops import memory
from m2f_lab.ops.deformable_bags import BagSampling


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inference", "training_step"])
def test_benchmark_in_miniature(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "measure_in_turn", without_bfloat16(peers.measure_in_turn))
    importlib.import_module(f"benchmarks.{name}").main(["--small"])
    (table,) = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {next(iter(row.values())): row for row in table["rows"]}
    assert list(rows)[:4] == ["cpu, float32", "cpu, bfloat16", "cuda, float32", "cuda, bfloat16"]
    assert [title.rstrip("0123456789.%") for title in list(rows)[4:]] == (
        ["the same class in "] if name == "inference" else []
    )
    measured = rows["cpu, float32"]
    assert float(measured["ratio"]) > 0
    assert 100 < float(measured["ours MiB"]) < 4000
    if table["gpu"] == "none":
        assert rows["cuda, float32"]["ours s"] == "not measured"
    assert "floor" in capsys.readouterr().out


def without_bfloat16(measure):
    """In bfloat16 the peer may be unable to run, which must not spoil the table."""

    def instead(module, folder, precision, device, small):
        ours, theirs = measure(module, folder, precision, device, small)
        return ours, {"failed": "RuntimeError: no such kernel"} if precision == "bfloat16" else theirs

    return instead


def test_the_ratio_is_the_median_over_rounds():
    """The machine was half as fast in the second round, for both."""
    ours, theirs = {"times": [1.0, 2.0, 1.0], "peak": 10, "floor": 0.5}, {"times": [3.0, 6.0, 4.0], "peak": 20}
    assert peers.compared(ours, theirs) == ("1.00", "4.00", "3.00", "0.50", "50%", "10", "20")


@pytest.mark.parametrize(
    ("device", "precision", "small", "expected"),
    [
        ("cpu", "float32", False, None),
        ("cpu", "bfloat16", False, "no bfloat16"),
        ("cpu", "bfloat16", True, None),
        ("cuda", "bfloat16", True, "not measured"),
    ],
)
def test_what_cannot_be_measured_is_left_empty(monkeypatch, device, precision, small, expected):
    monkeypatch.setattr(peers, "computes_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.obstacle_to_measuring(device, precision, small) == expected


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path):
    """Nobody waits for its turn for ever: here no model is in the folder."""
    for side in peers.measure_in_turn("benchmarks.inference", tmp_path, "float32", "cpu", small=True):
        assert str(tmp_path) in side["failed"]
    with pytest.raises(RuntimeError, match=tmp_path.name):
        peers.compared({"failed": f"OSError: {tmp_path}"}, {"failed": ""})


def test_ablation_switches_one_operation_at_a_time(tmp_path, monkeypatch):
    """One row for each operation, and the same loss in all; each function below is called in all rows but its own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "REPEATS", 1)
    monkeypatch.setattr(peers, "turn", nullcontext)
    called = {"checkpointed": [0], "deformable_sampling": [0]}  # with everything, then by row

    def measure(name, what, folder, small):
        if what not in wholes_measured:
            wholes_measured[what] = ablation.measure(ablation.WHOLE, what, folder, small)
        for calls in called.values():
            calls.append(0)
        return wholes_measured[what], ablation.measure(name, what, folder, small)

    def counted(name, function):
        def counting(*arguments, **options):
            called[name][-1] += 1
            return function(*arguments, **options)

        return counting

    wholes_measured = {}
    monkeypatch.setattr(ablation, "measure_beside", measure)
    monkeypatch.setattr(memory, "checkpoint", counted("checkpointed", memory.checkpoint))
    monkeypatch.setattr(BagSampling, "apply", counted("deformable_sampling", BagSampling.apply))
    ablation.main(["--small"])
    (table,) = json.loads((tmp_path / "ablation.json").read_text())
    rows = [(row["of"], row["without"]) for row in table["rows"]]
    expected = [(ablation.STEP, name) for name in ablation.WITHOUT]
    assert rows == expected + [(ablation.LOSS, name) for name in ablation.OF_THE_LOSS]
    assert set(ops.OPERATIONS) < set(ablation.WITHOUT)
    for what in (ablation.STEP, ablation.LOSS):
        own = [row for row in table["rows"] if row["of"] == what]
        losses = [float(row[column]) for row in own for column in ("loss", "loss with it")]
        assert max(losses) - min(losses) <= 0.011
    for name, calls in called.items():
        of_steps = dict(zip([ablation.WHOLE, *ablation.WITHOUT], calls, strict=False))
        assert {row for row, count in of_steps.items() if count == 0} == {name, ablation.ALL_PLAIN}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # TorchDynamo calls what PyTorch warns of
def test_a_compiled_model_gives_the_same(tmp_path, monkeypatch):
    """The benchmark compares outputs before it times them; here TorchDynamo traces, and PyTorch runs what it found."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "REPEATS", 1)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled.main(["--small", "--only", "forward"])
    torch.compiler.reset()
    (table,) = json.loads((tmp_path / "compiled.json").read_text())
    rows = {row.pop("torch.compile"): row for row in table["rows"]}
    assert list(rows) == [f"{place}, forward" for place in compiled.PLACES]
    assert float(rows["cpu, float32, forward"]["compiled s"]) > 0
    if table["gpu"] == "none":
        assert set(rows["cuda, bfloat16, forward"].values()) == {"not measured"}
