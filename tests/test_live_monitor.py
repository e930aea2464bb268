"""LiveMonitor: the numbers it shows, how often it shows them, and that training goes on below it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m2f_lab.explore import LiveMonitor, live_monitor
from m2f_lab.explore.live_monitor import History, fold_terms, in_notebook, say_duration, time_left
from m2f_lab.training import train
from tests.toy_training import toy_recipe, write_toy_data


def step_row(iteration: int, loss: float = 8.0) -> dict:
    terms = {f"{layer}.{term}": loss / 10 + layer for layer in range(2) for term in ("class", "mask", "dice")}
    return {
        "kind": "step", "iteration": iteration, "loss": loss, **terms, "learning_rate": 1e-3, "gradient_norm": None,
        "images_per_second": 12.5, "seconds": 0.5 * iteration, "memory_gib": 1.0,
    }  # fmt: skip


def evaluation_row(iteration: int, miou: float | None) -> dict:
    return {"kind": "evaluation", "iteration": iteration, "mIoU": miou}


def fake_run(rows: tuple[dict, ...] = (), max_iterations: int = 400) -> SimpleNamespace:
    optimization = SimpleNamespace(max_iterations=max_iterations)
    return SimpleNamespace(recipe=SimpleNamespace(name="toy", optimization=optimization), metrics=list(rows))


class FakeNotebook:
    """Time that a test moves, and the cell that receives pictures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, drawing: float = 0.02) -> None:
        self.now, self.drawing, self.shown = 0.0, drawing, []
        monkeypatch.setattr(live_monitor, "_now", lambda: self.now)
        monkeypatch.setattr(live_monitor, "in_notebook", lambda: True)
        monkeypatch.setattr("IPython.display.display", self.display)

    def display(self, shown: LiveMonitor, display_id: bool) -> FakeNotebook:
        assert display_id
        self.update(shown)
        return self

    def update(self, shown: LiveMonitor) -> None:
        self.now += self.drawing
        self.shown.append(shown.status())


# ------------------------------------------------------------------------------------------ the numbers


def test_terms_are_averaged_over_predictions() -> None:
    folded = fold_terms(step_row(3, loss=10.0))
    assert folded["class"] == folded["mask"] == folded["dice"] == 1.5
    assert folded["loss"] == 10.0
    assert "0.class" not in folded
    assert "gradient_norm" not in folded  # it may be None, and no curve shows it


def test_long_runs_are_averaged_not_cut() -> None:
    history = History(limit=8)
    for iteration in range(1, 33):
        history.add(step_row(iteration, loss=float(iteration)))
    assert len(history.steps) < 8
    assert [row["iteration"] for row in history.steps] == [8, 16, 24, 32]
    assert [row["loss"] for row in history.steps] == [4.5, 12.5, 20.5, 28.5]


def test_time_left_is_at_the_pace_of_the_last_rows() -> None:
    rows = [{"iteration": i, "seconds": float(10 * i)} for i in range(1, 60)]
    rows += [{"iteration": 59 + i, "seconds": 590 + 2.0 * i} for i in range(1, 60)]
    assert time_left(rows, max_iterations=218) == pytest.approx(200)
    assert time_left(rows[:1], 100) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (59.6, "1 min 00 s"), (95, "1 min 35 s"), (7384, "2 h 03 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert say_duration(seconds) == text


# ------------------------------------------------------------------------------------------ in a terminal


def test_a_terminal_gets_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(live_monitor, "_now", lambda: clock[0])
    monitor = LiveMonitor(line_interval=10)
    monitor.on_start(fake_run())
    for iteration in range(1, 101):
        clock[0] = iteration / 4
        monitor.on_step(step_row(iteration))
    monitor.on_evaluation(evaluation_row(100, 43.21))
    monitor.on_end(fake_run())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "toy: step 1 of 400 · loss 8.00 · 12.5 images/s",
        "toy: step 41 of 400 · loss 8.00 · 12.5 images/s · 3 min 00 s left",
        "toy: step 81 of 400 · loss 8.00 · 12.5 images/s · 2 min 40 s left",
        "toy: step 100 of 400 · loss 8.00 · mIoU 43.2 % · 12.5 images/s · 2 min 30 s left",
        "toy: step 100 of 400 · loss 8.00 · mIoU 43.2 % · 12.5 images/s · 2 min 30 s left",
    ]


def test_an_evaluation_without_a_figure_is_left_out(capsys: pytest.CaptureFixture) -> None:
    monitor = LiveMonitor()
    monitor.on_start(fake_run((step_row(4), evaluation_row(4, None))))
    monitor.on_step(step_row(5))
    assert "mIoU" not in monitor.status()


def test_this_is_no_notebook() -> None:
    assert not in_notebook()


# ------------------------------------------------------------------------------------------ in a notebook


def test_at_most_two_pictures_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = FakeNotebook(monkeypatch)
    monitor = LiveMonitor()
    monitor.on_start(fake_run())
    started = notebook.now
    for iteration in range(1, 1001):
        notebook.now += 0.01
        monitor.on_step(step_row(iteration))
    pictures = len(notebook.shown) - 1
    assert 15 <= pictures <= 2 * (notebook.now - started)


def test_slow_pictures_take_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = FakeNotebook(monkeypatch, drawing=0.5)
    monitor = LiveMonitor()
    monitor.on_start(fake_run())
    before, pictures = notebook.now, len(notebook.shown)
    for iteration in range(1, 2001):
        notebook.now += 0.02
        monitor.on_step(step_row(iteration))
    assert 0.5 * (len(notebook.shown) - pictures) <= 0.11 * (notebook.now - before)


def test_evaluations_and_the_end_are_always_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = FakeNotebook(monkeypatch)
    monitor = LiveMonitor()
    monitor.on_start(fake_run())
    monitor.on_step(step_row(1))
    monitor.on_evaluation(evaluation_row(1, 50.0))
    monitor.on_end(fake_run())
    assert len(notebook.shown) == 3
    assert "mIoU 50.0 %" in notebook.shown[-1]


def test_a_continued_run_shows_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNotebook(monkeypatch)
    monitor = LiveMonitor()
    monitor.on_start(fake_run((step_row(1), step_row(2), evaluation_row(2, 10.0))))
    monitor.on_step(step_row(3))
    assert [row["iteration"] for row in monitor.history.steps] == [1, 2, 3]
    assert [row["mIoU"] for row in monitor.history.evaluations] == [10.0]


def test_too_short_an_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 0\.5, got 0\.1"):
        LiveMonitor(interval=0.1)


def test_the_picture_shows_the_curves() -> None:
    monitor = LiveMonitor()
    monitor.on_start(fake_run())
    empty = monitor._repr_mimebundle_()
    for iteration in range(1, 30):
        monitor.on_step(step_row(iteration, loss=30.0 / iteration))
    monitor.on_evaluation(evaluation_row(29, 33.0))
    full = monitor._repr_mimebundle_()
    assert empty["text/plain"] == full["text/plain"] == "LiveMonitor(toy)"
    first, second = (np.asarray(Image.open(io.BytesIO(bundle["image/png"]))) for bundle in (empty, full))
    assert first.shape == second.shape
    assert (first != second).any()


# ------------------------------------------------------------------------------------------ in training


def test_it_watches_a_real_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notebook = FakeNotebook(monkeypatch)
    recipe = toy_recipe()
    train(recipe, write_toy_data(tmp_path / "data"), tmp_path / "run", callbacks=[LiveMonitor()])
    last = recipe.optimization.max_iterations
    assert notebook.shown[-1].startswith(f"{recipe.name}: step {last} of {last} · loss ")
    assert "mIoU" in notebook.shown[-1]
    assert "left" not in notebook.shown[-1]
