"""What the planner measures with: steps as `train` would take them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from m2f_lab.training import probe
from m2f_lab.training.step import Learner
from tests.toy_training import toy_recipe

CPU = torch.device("cpu")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iterations of the steps that are taken. By our clock the first two take a minute, each other one a second."""
    taken, now = [], [0.0]

    def step(self: Learner, batch, iteration: int) -> None:
        now[0] += 60.0 if len(taken) < 2 else 1.0
        taken.append(iteration)

    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    return taken


def test_warming_up_does_not_count(steps: list[int]) -> None:
    assert probe.measure(toy_recipe(max_iterations=1000), CPU)["seconds"] == 1.0
    assert len(steps) == probe.WARM_UP + probe.ENOUGH_SECONDS


def test_steps_have_seeds_of_their_own(steps: list[int]) -> None:
    """Under one seed, stochastic depth would drop the same branches every time, and a step be always long or short."""
    probe.measure(toy_recipe(max_iterations=1000), CPU)
    assert steps == list(range(len(steps)))


def test_no_step_lies_beyond_the_end_of_the_schedule(steps: list[int]) -> None:
    probe.measure(toy_recipe(max_iterations=4), CPU)
    assert set(steps) == {0, 1, 2, 3}


def test_all_steps_keep_memory_as_in_training(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @contextmanager
    def kept_memory(device: torch.device) -> Iterator[None]:
        seen.append((device, len(steps)))
        yield
        seen.append((device, len(steps)))

    monkeypatch.setattr(probe, "kept_memory", kept_memory)
    probe.measure(toy_recipe(), CPU)
    assert len(steps) > 0
    assert seen == [(CPU, 0), (CPU, len(steps))]


@pytest.mark.parametrize("twice", [False, True])
def test_the_backbone_is_computed_twice_where_the_recipe_says_so(twice: bool) -> None:
    learner = probe.learner_for(toy_recipe(checkpoint_backbone=twice), CPU)
    found = {m.grad_checkpointing for m in learner.model.modules() if hasattr(m, "grad_checkpointing")}
    assert found == {twice}


def test_the_peak_is_that_of_the_probe_itself() -> None:
    """Linux counts what the process that started it held at its own peak, a notebook with data for example."""
    held = torch.ones(3 * 2**28)  # 3 GiB
    command = "import torch; from m2f_lab.training.loop import peak_memory; print(peak_memory(torch.device('cpu')))"
    run = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert 0.05 < float(run.stdout) < held.nbytes / 2**30 / 2
