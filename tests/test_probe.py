"""What the planner measures with: steps as `train` would take them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from m2f_lab.training.planning import probe
from m2f_lab.training.step import TrainStep
from tests.toy_training import toy_recipe

CPU = torch.device("cpu")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Iteration and images of the steps that are taken. An image takes a second, the first ones a minute."""
    taken, now = [], [0.0]

    def step(self: TrainStep, batch, iteration: int) -> None:
        assert len(batch.names) == self.recipe.optimization.batch_size
        now[0] += len(batch.names) * (60.0 if iteration <= probe.WARM_UP else 1.0)
        taken.append((iteration, len(batch.names)))

    monkeypatch.setattr(TrainStep, "step", step)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    return taken


def test_probe_leaves_out_warm_up_steps(steps: list[tuple[int, int]]) -> None:
    took = probe.measure(toy_recipe(max_iterations=1000, batch_size=1), CPU)
    assert (took["seconds"], took["half_seconds"]) == (1.0, None)
    assert len(steps) == probe.WARM_UP + 1 + probe.ENOUGH_SECONDS


def test_probe_compares_sizes_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two of three turns one second; the medians 5 and 3 of all steps are from different turns."""
    seconds = iter([*[9.0] * (probe.WARM_UP + 2), 4.0, 3.0, 5.0, 1.0, 9.0, 8.0])
    monkeypatch.setattr(probe, "timed_step", lambda learner, batch, iteration: next(seconds))
    took = probe.measure(toy_recipe(max_iterations=1000, batch_size=2), CPU)
    assert (took["seconds"], took["half_seconds"]) == (5.0, 4.0)


def test_half_the_batch_takes_turns(steps: list[tuple[int, int]]) -> None:
    took = probe.measure(toy_recipe(max_iterations=1000, batch_size=3), CPU)
    assert (took["seconds"], took["half_seconds"]) == (3.0, 1.0)
    turns = range(probe.WARM_UP, probe.WARM_UP + 1 + probe.FEWEST_TURNS)
    assert steps == [(i, 3) for i in range(probe.WARM_UP)] + [(i, n) for i in turns for n in (3, 1)]


@pytest.mark.parametrize(
    ("images", "parts", "expected"), [(4, 1, (2, 1)), (5, 1, (2, 1)), (2, 2, (1, 1)), (8, 2, (4, 1)), (6, 3, (2, 1))]
)
def test_half_a_batch_has_parts_no_larger(images: int, parts: int, expected: tuple[int, int]) -> None:
    config = probe.half(toy_recipe(batch_size=images, accumulation_steps=parts)).optimization
    assert (config.batch_size, config.accumulation_steps) == expected


def test_half_of_one_image_is_none() -> None:
    assert probe.half(toy_recipe(batch_size=1)) is None


def test_probe_reads_the_peak_before_smaller_steps(
    steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "peak_memory", lambda device: len(steps))
    assert probe.measure(toy_recipe(), CPU)["gib"] == probe.WARM_UP


def test_probe_steps_have_different_seeds(steps: list[tuple[int, int]]) -> None:
    """Under one seed, stochastic depth would drop the same branches every time, and a step be always long or short."""
    probe.measure(toy_recipe(max_iterations=1000, batch_size=1), CPU)
    assert [iteration for iteration, _ in steps] == list(range(len(steps)))


def test_probe_steps_stay_within_the_schedule(steps: list[tuple[int, int]]) -> None:
    probe.measure(toy_recipe(max_iterations=4), CPU)
    assert {iteration for iteration, _ in steps} == {0, 1, 2, 3}


def test_probe_keeps_freed_memory_as_training_does(
    steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    @contextmanager
    def keep_freed_memory(device: torch.device) -> Iterator[None]:
        seen.append((device, len(steps)))
        yield
        seen.append((device, len(steps)))

    monkeypatch.setattr(probe, "keep_freed_memory", keep_freed_memory)
    probe.measure(toy_recipe(), CPU)
    assert len(steps) > 0
    assert seen == [(CPU, 0), (CPU, len(steps))]


@pytest.mark.parametrize("twice", [False, True])
def test_probe_checkpoints_the_backbone_if_the_recipe_does(twice: bool) -> None:
    learner = probe.learner_for(toy_recipe(checkpoint_backbone=twice), CPU)
    found = {m.grad_checkpointing for m in learner.model.modules() if hasattr(m, "grad_checkpointing")}
    assert found == {twice}


def test_peak_memory_is_that_of_the_own_process() -> None:
    """Linux counts what the process that started it held at its own peak, a notebook with data for example."""
    held = torch.ones(3 * 2**28)  # 3 GiB
    command = "import torch; from m2f_lab.training.loop import peak_memory; print(peak_memory(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert 0.05 < float(run.stdout) < held.nbytes / 2**30 / 2
