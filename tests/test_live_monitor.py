"""LiveMonitor: the numbers it shows, how often it shows them, and that training goes on below it."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from m2f_lab.data.colors import colorize
from m2f_lab.explore import LiveMonitor, plots
from m2f_lab.explore.runs import monitor as live_monitor
from m2f_lab.explore.runs.history import History, RowFile, curve_values, format_duration, time_left
from m2f_lab.explore.runs.monitor import in_notebook
from m2f_lab.explore.runs.snapshots import Snapshots, evenly_spaced
from m2f_lab.training import Run, train
from m2f_lab.training.run import append_row, keep_rows
from tests.toy_training import CLASSES, StopAt, assert_same_run, toy_recipe


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
    recipe = SimpleNamespace(name="toy", optimization=optimization)
    return SimpleNamespace(recipe=recipe, metrics=list(rows), path=Path("nowhere"))


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


def test_every_prediction_keeps_its_terms() -> None:
    kept = curve_values(step_row(3, loss=10.0))
    assert [kept["0.mask"], kept["1.mask"]] == [1.0, 2.0]
    assert (kept["loss"], kept["memory_gib"]) == (10.0, 1.0)
    assert not {"kind", "gradient_norm"} & set(kept)  # the norm may be None, and no curve shows it


def test_terms_of_any_name_are_averaged_and_drawn() -> None:
    history = History(limit=8)
    for iteration in range(1, 33):  # the last rows are of a run that continued with another criterion
        extra = {"0.boundary": 2.0, "1.boundary": float(iteration)} if iteration > 15 else {}
        history.add(step_row(iteration) | extra)
    assert [row.get("0.boundary") for row in history.steps] == [None, 2.0, 2.0, 2.0]
    assert [row.get("1.boundary") for row in history.steps] == [None, 16.0, 20.5, 28.5]
    figure = plots.training_progress(history.steps)
    (drawn,) = (ax for ax in figure.axes if ax.get_title() == "boundary term")
    assert [line.get_label() for line in drawn.lines] == ["prediction 0", "prediction 1"]
    assert drawn.lines[1].get_ydata()[1:].tolist() == [16.0, 20.5, 28.5]


def test_long_runs_are_averaged_not_cut() -> None:
    history = History(limit=8)
    for iteration in range(1, 33):
        history.add(step_row(iteration, loss=float(iteration)))
    assert len(history.steps) < 8
    assert [row["iteration"] for row in history.steps] == [8, 16, 24, 32]
    assert [row["loss"] for row in history.steps] == [4.5, 12.5, 20.5, 28.5]
    assert [row["0.mask"] for row in history.steps] == pytest.approx([0.45, 1.25, 2.05, 2.85])
    assert history.last_step == step_row(32, loss=32.0)


def test_time_left_is_at_the_pace_of_the_last_rows() -> None:
    rows = [{"iteration": i, "seconds": float(10 * i)} for i in range(1, 60)]
    rows += [{"iteration": 59 + i, "seconds": 590 + 2.0 * i} for i in range(1, 60)]
    assert time_left(rows, max_iterations=218) == pytest.approx(200)
    assert time_left(rows[:1], 100) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 s"), (59.6, "1 min 00 s"), (95, "1 min 35 s"), (7384, "2 h 03 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


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
        "toy: step 1 of 400 · loss 8.00 · 12.5 images/s · 1.0 GiB of memory",
        "toy: step 41 of 400 · loss 8.00 · 12.5 images/s · 1.0 GiB of memory · 3 min 00 s left",
        "toy: step 81 of 400 · loss 8.00 · 12.5 images/s · 1.0 GiB of memory · 2 min 40 s left",
        "toy: step 100 of 400 · loss 8.00 · mIoU 43.2 % · 12.5 images/s · 1.0 GiB of memory · 2 min 30 s left",
        "toy: step 100 of 400 · loss 8.00 · mIoU 43.2 % · 12.5 images/s · 1.0 GiB of memory · 2 min 30 s left",
    ]


def test_an_evaluation_without_a_figure_is_left_out(capsys: pytest.CaptureFixture) -> None:
    monitor = LiveMonitor()
    monitor.on_start(fake_run((step_row(4), evaluation_row(4, None))))
    monitor.on_step(step_row(5))
    assert "mIoU" not in monitor.status()


def test_without_a_run_it_says_so() -> None:
    monitor = LiveMonitor()
    assert not monitor.refresh()
    assert monitor.follow().figure().get_suptitle().startswith("no run yet: give this to train(")


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
    assert monitor._repr_mimebundle_() == {"text/plain": "LiveMonitor()"}
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


def test_every_panel_shows_its_numbers() -> None:
    monitor = LiveMonitor()
    monitor.on_start(fake_run())
    for iteration in range(1, 4):
        monitor.on_step(step_row(iteration, loss=30.0))
    monitor.on_evaluation(evaluation_row(3, 33.0))
    axes = {ax.get_title(): ax for ax in monitor.figure().axes}
    expected = {
        "loss, weighted sum": [30.0], "class term": [3.0, 4.0], "mask term": [3.0, 4.0], "dice term": [3.0, 4.0],
        "mIoU in percent": [33.0], "learning rate": [1e-3], "images per second": [12.5], "peak memory in GiB": [1.0],
    }  # fmt: skip
    assert list(axes) == list(expected)
    for title, lines in expected.items():
        assert [line.get_ydata()[-1] for line in axes[title].lines] == lines, title


def test_one_page_holds_the_curves(tmp_path: Path) -> None:
    monitor = LiveMonitor()
    monitor.on_start(fake_run((step_row(1), step_row(2))))
    monitor.save_html(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "<svg" in page
    assert "<h1>toy</h1>" in page
    assert "<?xml" not in page


# ------------------------------------------------------------------------------------------ files that are written


def test_rows_come_once_and_only_when_complete(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    reader = RowFile(file)
    assert reader.new_rows() == []
    append_row(file, step_row(1))
    append_row(file, step_row(2))
    line = '{"kind": "step", "iteration": 3}\n'
    with file.open("a") as stream:
        stream.write(line[:10])
    assert [row["iteration"] for row in reader.new_rows()] == [1, 2]
    assert reader.new_rows() == []
    with file.open("a") as stream:
        stream.write(line[10:])
    assert [row["iteration"] for row in reader.new_rows()] == [3]
    assert reader.starts == 1


def test_a_file_that_was_replaced_is_read_from_the_top(tmp_path: Path) -> None:
    """As a run that continues does: rows after its checkpoint are cut off, and soon there are more than before."""
    file = tmp_path / "metrics.jsonl"
    reader = RowFile(file)
    for iteration in (1, 2, 3):
        append_row(file, step_row(iteration))
    reader.new_rows()
    keep_rows(file, 2)
    for iteration in (3, 4, 5):
        append_row(file, step_row(iteration))
    assert [row["iteration"] for row in reader.new_rows()] == [1, 2, 3, 4, 5]
    assert reader.starts == 2


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_row(file, step_row(1))
    reader = RowFile(file)
    reader.new_rows()
    with file.open("a") as stream:
        stream.write("oops\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl is not JSON"):
        reader.new_rows()


# ------------------------------------------------------------------------------------------ in training


def noise(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def watched(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LiveMonitor, Run]:
    """A monitor and its run, with predictions for two images of different sizes."""
    monitor = LiveMonitor(images=[noise(), noise(90, 480)])
    run = train(toy_recipe(), root, tmp_path_factory.mktemp("watched") / "run", callbacks=[monitor])
    return monitor, run


def test_it_watches_a_real_run(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    notebook = FakeNotebook(monkeypatch)
    recipe = toy_recipe()
    train(recipe, root, tmp_path / "run", callbacks=[LiveMonitor()])
    last = recipe.optimization.max_iterations
    assert notebook.shown[-1].startswith(f"{recipe.name}: step {last} of {last} · loss ")
    assert "mIoU" in notebook.shown[-1]
    assert "left" not in notebook.shown[-1]
    assert not (tmp_path / "run" / "predictions").exists()


def test_predictions_are_those_of_the_model(watched: tuple[LiveMonitor, Run]) -> None:
    monitor, run = watched
    shots = monitor.snapshots
    assert list(shots.label_maps) == [3, 6]
    assert [image.shape for image in shots.images] == [(64, 96, 3), (36, 192, 3)]
    small, wide = shots.label_maps[6]
    model = run.model("last")
    sizes = {"shortest_edge": run.recipe.evaluation.shortest_edge, "longest_edge": run.recipe.evaluation.longest_edge}
    np.testing.assert_array_equal(small, model.predict(noise(), **sizes).label_map)
    assert wide.shape == (36, 192)
    large = model.predict(noise(90, 480), **sizes).label_map
    assert wide[10, 50] == large[int(10.5 * 2.5), int(50.5 * 2.5)]
    assert shots.classes.names == CLASSES
    assert run.current_model is None  # or its memory would stay as long as the run does


def test_predictions_change_nothing_in_the_run(watched: tuple[LiveMonitor, Run], whole: Run) -> None:
    assert_same_run(watched[1], whole)


def test_what_is_on_disk_shows_the_same(watched: tuple[LiveMonitor, Run]) -> None:
    monitor, run = watched
    again = LiveMonitor.watch(str(run.path))
    assert again.history.steps == monitor.history.steps
    assert again.history.evaluations == monitor.history.evaluations
    assert again.status() == monitor.status()
    assert repr(again) == "LiveMonitor(toy)"
    for iteration, maps in monitor.snapshots.label_maps.items():
        for stored, made in zip(again.snapshots.label_maps[iteration], maps, strict=True):
            np.testing.assert_array_equal(stored, made)
    assert again._repr_mimebundle_()["image/png"] == monitor._repr_mimebundle_()["image/png"]


def test_the_strip_has_a_row_per_image_and_a_column_per_evaluation(watched: tuple[LiveMonitor, Run]) -> None:
    (strip,) = (ax for ax in watched[0].figure().axes if ax.images)
    assert [text.get_text() for text in strip.texts] == ["image", "after 3", "after 6"]
    columns = [image.get_extent()[0] for image in strip.images]
    rows = [image.get_extent()[3] for image in strip.images]
    assert columns == sorted(columns)
    assert len(set(columns)) == 3
    assert len(set(rows)) == 2
    shots = watched[0].snapshots
    np.testing.assert_array_equal(strip.images[0].get_array(), noise())
    np.testing.assert_array_equal(strip.images[4].get_array(), colorize(shots.label_maps[6][0], shots.classes))


def test_the_strip_keeps_first_and_last() -> None:
    assert evenly_spaced([3, 6], 7) == [3, 6]
    assert evenly_spaced(range(1, 102), 5) == [1, 26, 51, 76, 101]


def test_a_continued_run_forgets_predictions_it_will_make_again(root: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(checkpoint_every=4)
    stop = StopAt(5, RuntimeError("power cut"))
    monitor = LiveMonitor(images=[noise()])
    with pytest.raises(RuntimeError):
        train(recipe, root, tmp_path / "run", callbacks=[monitor, stop])
    assert stop.events[-1] == ("step", 5)
    before = monitor.snapshots.label_maps[3]
    stray = tmp_path / "run" / "predictions" / "0" / "000005.png"
    Image.fromarray(before[0]).save(stray)
    monitor = LiveMonitor(images=[noise()])
    train(recipe, root, tmp_path / "run", callbacks=[monitor])
    assert not stray.exists()
    assert list(monitor.snapshots.label_maps) == [3, 6]
    np.testing.assert_array_equal(Snapshots(tmp_path / "run").label_maps[3][0], before[0])
    train(recipe, root, tmp_path / "run", callbacks=[LiveMonitor()], resume="never")
    assert Snapshots(tmp_path / "run").label_maps == {}  # they were another run's


def test_other_images_replace_the_stored_ones(watched: tuple[LiveMonitor, Run], tmp_path: Path) -> None:
    shutil.copytree(watched[1].path / "predictions", tmp_path / "predictions")
    shots = Snapshots(tmp_path)
    shots.begin([noise(90, 480)])
    assert shots.label_maps == Snapshots(tmp_path).label_maps == {}
    assert len(shots.images) == len(Snapshots(tmp_path).images) == 1


def test_an_image_that_cannot_be_read_is_missed_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"street\.png"):
        LiveMonitor(images=[tmp_path / "street.png"])
    with pytest.raises(ValueError, match="several images, in a list"):
        LiveMonitor(images="street.png")


# ------------------------------------------------------------------------------------------ after a reload


def test_a_run_of_another_process_is_followed(
    watched: tuple[LiveMonitor, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its rows arrive one by one while the monitor sleeps; in the end comes the checkpoint of a finished run."""
    notebook = FakeNotebook(monkeypatch)
    source, path = watched[1], tmp_path / "run"
    path.mkdir()
    shutil.copy(source.path / "recipe.json", path)
    rows = iter(source.metrics)

    def sleep(seconds: float) -> None:
        notebook.now += seconds
        row = next(rows, None)
        if row is None:
            shutil.copytree(source.checkpoint("last"), path / "checkpoints" / "last")
        else:
            append_row(path / "metrics.jsonl", row)

    monkeypatch.setattr(live_monitor, "_sleep", sleep)
    monitor = LiveMonitor.watch(path)
    assert monitor.status() == "toy: waiting for the first step"
    assert monitor.follow() is monitor
    assert len(notebook.shown) > 5
    assert "step 6 of 6" in notebook.shown[-1]
    assert monitor.history.steps == watched[0].history.steps


def test_following_ends_without_news_or_by_the_stop_button(
    watched: tuple[LiveMonitor, Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("recipe.json", "metrics.jsonl"):
        shutil.copy(watched[1].path / name, tmp_path)  # without checkpoints it is not finished
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live_monitor, "_now", lambda: clock[0])
    monkeypatch.setattr(live_monitor, "_sleep", sleep)
    LiveMonitor.watch(tmp_path).follow(timeout=3)
    assert clock[0] == 3
    monkeypatch.setattr(live_monitor, "_sleep", stop)
    LiveMonitor.watch(tmp_path).follow()
    assert "the run goes on" in capsys.readouterr().out


def test_a_run_that_goes_on_from_a_checkpoint_is_shown_anew(tmp_path: Path) -> None:
    toy_recipe().save(tmp_path / "recipe.json")
    for iteration in (1, 2, 3):
        append_row(tmp_path / "metrics.jsonl", step_row(iteration))
    monitor = LiveMonitor.watch(tmp_path)
    keep_rows(tmp_path / "metrics.jsonl", 2)
    append_row(tmp_path / "metrics.jsonl", step_row(3, loss=1.0))
    assert monitor.refresh()
    assert not monitor.refresh()
    assert [row["loss"] for row in monitor.history.steps] == [8.0, 8.0, 1.0]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run"):
        LiveMonitor.watch(tmp_path)
