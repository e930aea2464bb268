"""The benchmark of training examples in miniature: both sides make the same, and the table is complete."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import data, report


def test_the_miniature_runs_and_fills_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        data.main(["--images", "2", "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)
    (table,) = json.loads((tmp_path / "data.json").read_text())
    name, *_ = table["rows"][0]
    assert "2 images of ade20k" in name
    rows = {row[name]: row for row in table["rows"]}
    assert list(rows)[-3:] == ["the whole example", "images per second", "MiB from a worker per image"]
    whole = rows["the whole example"]
    ratio = float(whole["published"]) / float(whole["ours"])
    assert float(whole["times faster"]) == pytest.approx(ratio, rel=0.01)
    assert float(rows["MiB from a worker per image"]["times faster"]) > 2
    assert "times faster" in capsys.readouterr().out
