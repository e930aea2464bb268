"""The criterion's benchmark in miniature: both sides agree, and the table is complete."""

from __future__ import annotations

import json

import pytest

from benchmarks import criterion, report


@pytest.mark.slow
def test_the_miniature_runs_and_fills_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    criterion.main(["--small", "--device", "cpu"])
    (entry,) = json.loads((tmp_path / "criterion.json").read_text())
    assert [row["forward and backward"] for row in entry["rows"]] == [
        "cpu: time",
        "cpu: peak memory",
        "cpu, naive with kept memory, too: time",
        "cpu, naive with kept memory, too: peak memory",
        "cpu: loss, each with its own points",
    ]
    ours, naive = (float(entry["rows"][4][side]) for side in ("ours", "naive"))
    assert abs(ours - naive) < 0.1 * naive
    assert "ratio" in capsys.readouterr().out
