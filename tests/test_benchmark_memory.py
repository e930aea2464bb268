"""The planner's benchmark on a machine that is exactly as the planner thinks, but for slow minutes."""

from __future__ import annotations

import json
from itertools import count

import pytest

from benchmarks import memory, report
from benchmarks.memory import Setting
from m2f_lab.training.planning import planner
from m2f_lab.training.planning.probe import half
from tests.toy_training import toy_recipe


@pytest.fixture
def slow_in(monkeypatch, tmp_path):
    """Let the processes of these numbers take twice as long as usual."""
    slow: set[int] = set()
    numbers = count()

    def took(recipe, device):
        times = 2 if next(numbers) in slow else 1

        def seconds(recipe):
            parts, images = recipe.optimization.accumulation_steps, recipe.optimization.batch_size
            return times * (0.05 + parts * 0.1 + 0.2 * images)

        parts, smaller = recipe.optimization.accumulation_steps, half(recipe)
        return {
            "gib": 0.5 + 0.25 * (recipe.optimization.batch_size // parts) + 0.125 * (parts > 1),
            "seconds": seconds(recipe),
            "half_seconds": seconds(smaller) if smaller else None,
        }

    monkeypatch.setattr(planner, "took_in_a_process", took)
    monkeypatch.setattr(memory, "took_in_a_process", took)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(memory.SETTINGS, "toy", Setting(toy_recipe(), 2, ((8, 1), (8, 2))))
    return slow


def rows(tmp_path, rounds: int) -> list[dict[str, str]]:
    memory.main(["toy", "--device", "cpu", "--rounds", str(rounds)])
    (table,) = json.loads((tmp_path / "memory.json").read_text())
    return table["rows"]


def test_estimates_are_set_beside_measurements(slow_in, tmp_path):
    whole, parts = rows(tmp_path, rounds=1)
    assert (whole["batch, in parts"], parts["batch, in parts"]) == ("toy, 8 in 1", "toy, 8 in 2")
    assert (whole["GiB planned"], whole["GiB measured"]) == ("2.50", "2.50")
    assert (parts["GiB planned"], parts["GiB measured"]) == ("1.62", "1.62")
    assert (whole["s planned"], whole["s measured"]) == ("1.75", "1.75")
    assert (parts["s planned"], parts["s measured"]) == ("1.85", "1.85")


def test_the_fastest_round_counts_for_each(slow_in, tmp_path):
    """A round is a plan's two probes, two images in two parts, and the two batches: processes 0…4, then 5…9."""
    slow_in |= {1, 4, 5, 8}
    whole, parts = rows(tmp_path, rounds=2)
    assert whole["ratio of s"] == parts["ratio of s"] == "1.00"
    assert whole["in single rounds"] != "1.00 1.00"
