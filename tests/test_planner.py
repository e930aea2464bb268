from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from m2f_lab import recipes
from m2f_lab.training import Plan, plan
from m2f_lab.training.planning import planner
from m2f_lab.training.planning.planner import Probe, probed, took_in_a_process
from tests.toy_training import toy_recipe

CPU = torch.device("cpu")


def planned(available: float, batch_size: int = 16, in_two_parts: Probe | None = None) -> Plan:
    """One GiB and 0.1 s, and half a GiB and 0.2 s for every image."""
    recipe = toy_recipe(batch_size=batch_size)
    probes = (Probe(1, 1.5, 0.3, None), Probe(2, 2.0, 0.5, 0.3), Probe(4, 3.0, 0.9, 0.5))
    return Plan(recipe, "a machine", available, probes, in_two_parts)


def test_memory_and_time_lie_on_a_line() -> None:
    found = planned(100)
    assert found.memory(16) == pytest.approx(9.0)
    assert found.seconds(16) == pytest.approx(3.3)
    assert (found.accumulation_steps, found.peak_gib, found.step_seconds) == (1, pytest.approx(9), pytest.approx(3.3))


def test_the_line_of_memory_goes_through_the_two_largest_probes() -> None:
    found = Plan(toy_recipe(), "", 10, (Probe(1, 1.0, 9.0, None), Probe(2, 2.0, 1.0, 0.8), Probe(4, 5.0, 0.5, 0.6)))
    assert found.memory(5) == pytest.approx(6.5)
    assert found.seconds(5) == pytest.approx(0.5)  # more images never take less


def test_the_line_of_time_goes_through_steps_that_took_turns() -> None:
    """The machine became slower between the probes, which says nothing about what an image costs."""
    found = Plan(toy_recipe(), "", 10, (Probe(2, 2.0, 0.5, 0.3), Probe(5, 3.5, 2.2, 1.0)))  # 5 images, and 2
    assert found.seconds(8) == pytest.approx(3.4)
    assert found.seconds(8, parts=2) == pytest.approx(6.8)


def test_a_single_probe_is_divided_among_its_images() -> None:
    found = Plan(toy_recipe(), "", 10, (Probe(1, 1.5, 0.3, None),))
    assert (found.memory(2), found.seconds(2)) == (3.0, 0.6)


@pytest.mark.parametrize(
    ("available", "largest", "parts"),
    [
        (10.0, 16, 1),  # nine tenths are 9 GiB: 1 + 16 / 2
        (9.9, 15, 2),  # 8.91; 15 does not divide 16, 8 does
        (5.6, 8, 2),  # 5.04
        (5.5, 7, 4),  # 4.95
        (1.7, 1, 16),  # 1.53
    ],
)
def test_the_batch_is_kept_in_the_fewest_equal_parts(available: float, largest: int, parts: int) -> None:
    found = planned(available)
    assert (found.largest_batch, found.accumulation_steps, found.images_at_once) == (largest, parts, 16 // parts)
    assert found.applied().optimization.accumulation_steps == parts
    assert found.applied().optimization.batch_size == 16


def test_parts_share_an_update_and_lie_beside_the_gradients() -> None:
    """Two images one after the other: 0.25 GiB of gradients more than one, and 0.05 s less than twice one in turn."""
    two = Probe(1, 1.75, 0.75, 0.4)
    found = planned(6.0, in_two_parts=two)
    assert found.accumulation_steps == 2
    assert found.peak_gib == pytest.approx(5.25)
    assert found.step_seconds == pytest.approx(2 * 1.7 - 0.05)
    assert planned(5.6, in_two_parts=two).accumulation_steps == 4  # 5.04 has room for 5, not for 5.25


def test_plan_as_text() -> None:
    text = str(planned(6.0))
    assert "toy on a machine, 6.0 GiB" in text
    assert "batch of 16 in 2 parts of 8: accumulation_steps = 2" in text
    assert "5.00 GiB at the peak; 8 images would fit at once" in text
    assert "3.40 s a step" in text


@pytest.mark.parametrize(
    ("batch_size", "available", "expected"),
    [
        (16, 100.0, [1, 2, 4, 8, 16]),
        (6, 100.0, [1, 2, 4, 6]),
        (1, 100.0, [1]),
        (16, 4.5, [1, 2]),  # 4 images would need up to twice the 2.4 GiB of 2
        (16, 1.0, [1]),
    ],
)
def test_probes_double_while_they_are_sure_to_fit(batch_size: int, available: float, expected: list[int]) -> None:
    probes = probed(batch_size, available, lambda images: Probe(images, 0.4 + images, 0.1, None))
    assert [probe.images for probe in probes] == expected


def test_probes_stop_when_memory_runs_out() -> None:
    assert probed(16, 100.0, lambda images: None) == ()
    assert len(probed(16, 100.0, lambda images: Probe(images, 1.0, 1.0, None) if images < 4 else None)) == 2


def test_four_images_are_probed_even_if_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_PATIENCE", 0.0)
    probes = probed(16, 100.0, lambda images: Probe(images, 1.0, 100.0, None))
    assert [probe.images for probe in probes] == [1, 2, 4]


def test_plan_predicts_the_memory_of_a_larger_batch() -> None:
    """Memory within 15 % of what a larger batch takes: the planner saw at most two images at once."""
    recipe = recipes.debug_tiny().vary(data=dict(crop_size=(128, 128)), optimization=dict(batch_size=2))
    found = plan(recipe, "cpu")
    took = took_in_a_process(recipe.vary(optimization=dict(batch_size=8)), CPU)
    assert [probe.images for probe in found.probes] == [1, 2]
    assert found.memory(8) == pytest.approx(took["gib"], rel=0.15)
    assert found.memory(8) - found.memory(2) == pytest.approx(took["gib"] - found.probes[1].gib, rel=0.5)
    assert took["seconds"] > 0


def test_recipe_that_does_not_fit_raises_with_advice() -> None:
    with pytest.raises(MemoryError, match=r"toy does not fit into 0.10 GiB .*one image needs 0\.\d+ GiB.*crop_size"):
        plan(toy_recipe(), "cpu", available=0.1)


@pytest.mark.parametrize(("status", "said"), [(-9, ""), (1, "torch.OutOfMemoryError: CUDA out of memory.")])
def test_probe_out_of_memory_raises_memory_error(monkeypatch: pytest.MonkeyPatch, status: int, said: str) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, stdout="", stderr=said)
    )
    with pytest.raises(MemoryError, match="a step on one image ran out of memory"):
        plan(toy_recipe(), "cpu")


def test_failed_probe_shows_its_error() -> None:
    recipe = toy_recipe(backbone="no_such_backbone")
    with pytest.raises(RuntimeError, match=r"(?s)Training steps of toy failed.*no_such_backbone"):
        plan(recipe, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_free_memory_is_a_number_of_gib() -> None:
    assert 0.1 < planner.free_memory(CPU) < 10_000
