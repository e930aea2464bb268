"""The benchmarks of the whole model run in miniature, both sides and all precisions."""

import importlib
import json

import pytest

from benchmarks import peers, report


@pytest.mark.parametrize("name", ["inference", "training_step"])
def test_benchmark_in_miniature(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "measure_alone", in_turn(peers.measure_alone))
    importlib.import_module(f"benchmarks.{name}").main(["--small"])
    (table,) = json.loads((tmp_path / f"{name}.json").read_text())
    rows = {next(iter(row.values())): row for row in table["rows"]}
    assert list(rows)[:4] == ["cpu, float32", "cpu, bfloat16", "cuda, float32", "cuda, bfloat16"]
    assert [title.rstrip("0123456789.%") for title in list(rows)[4:]] == (
        ["the same class in "] if name == "inference" else []
    )
    measured = rows["cpu, float32"]
    assert float(measured["ratio"]) == pytest.approx(float(measured["peer s"]) / float(measured["ours s"]), rel=0.5)
    assert 100 < float(measured["ours MiB"]) < 4000
    if table["gpu"] == "none":
        assert rows["cuda, float32"]["ours s"] == "not measured"
    assert "floor" in capsys.readouterr().out


def in_turn(measure):
    """Measure float32 only; in bfloat16 the peer may be unable to, which must not spoil the table."""

    def instead(module, side, folder, precision, device, small):
        if precision == "bfloat16" and side == peers.THEIRS:
            return {"failed": "RuntimeError: no such kernel"}
        return measure(module, side, folder, precision, device, small)

    return instead
