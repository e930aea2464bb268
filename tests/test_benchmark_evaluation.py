"""The benchmark of the evaluators in miniature: all streams, and maps that are worth measuring."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import evaluation, report


def test_the_miniature_runs_and_fills_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(evaluation, "UPDATES", 5)
    evaluation.main(["--small"])
    (table,) = json.loads((tmp_path / "evaluation.json").read_text())
    rows = {row.pop("one image of 64 × 64"): row for row in table["rows"]}
    tasks = ("semantic", "panoptic", "instance")
    assert list(rows) == [f"{device}, {task}" for device in ("cpu", "cuda") for task in tasks]
    for task in evaluation.STREAMS:
        row = rows[f"cpu, {task}"]
        share = float(row["stream ms"]) / float(row["inference ms"])
        assert float(row["share"].rstrip("%")) / 100 == pytest.approx(share, rel=0.02, abs=1e-4)
        if table["gpu"] == "none":
            assert set(rows[f"cuda, {task}"].values()) == {"not measured"}
    assert "share" in capsys.readouterr().out


def test_the_drawn_prediction_resembles_the_truth():
    predicted, truth = evaluation.drawn_maps(20, 64)
    assert len(np.unique(predicted)) == 20
    assert (truth == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert 0.6 < (predicted == truth)[truth > 0].mean() < 0.95
