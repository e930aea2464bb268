"""LiveMonitor: curves that move while a model trains, in a notebook; lines of text anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from m2f_lab import explore
from m2f_lab.explore.parts.pages import save_page
from m2f_lab.explore.runs.history import History, RowFile, format_duration, time_left
from m2f_lab.explore.runs.snapshots import Snapshots, evenly_spaced
from m2f_lab.inference.images import as_rgb
from m2f_lab.training import Run
from m2f_lab.training.run import leading_figure, leading_metric

STRIP = 7
"""At most so many iterations are shown side by side in the strip of predictions."""


class LiveMonitor:
    """A callback of `train` that shows its progress.

        train(recipe, data_root, out, callbacks=[LiveMonitor(images=["street.png"])])

    In a notebook it draws curves into the cell (losses of every prediction, mIoU, learning rate, speed, memory, and
    below them what was predicted for `images` after each evaluation), and leaves the last picture there. Elsewhere it
    prints a line now and then. It may run in a thread.

    Everything it shows is beside the run on disk, so another notebook, or this one after its kernel was restarted,
    shows the same:

        LiveMonitor.watch("runs/tonight").follow()

    Attributes:
        history: the rows of the run.
        snapshots: the predictions for fixed images.
    """

    def __init__(
        self,
        images: Sequence[str | Path | Image.Image | np.ndarray] = (),
        interval: float = 0.5,
        line_interval: float = 10.0,
    ) -> None:
        """Args:
        images: predicted after every evaluation; paths, PIL images or uint8 [H, W, 3]. The model sees them at
            the size that it is evaluated at.
        interval: least seconds between two pictures; more where drawing would take over a tenth of the time.
        line_interval: least seconds between two printed lines, outside a notebook.

        Raises:
            FileNotFoundError, ValueError: an image cannot be read, or is not in a list.
        """
        if interval < 0.5:
            raise ValueError(
                f"LiveMonitor draws at most twice a second: interval must be at least 0.5, got {interval}."
            )
        self.interval, self.line_interval = interval, line_interval
        if isinstance(images, (str, Path, Image.Image)):
            raise ValueError("LiveMonitor takes several images, in a list: LiveMonitor(images=[image]).")
        self._images = [as_rgb(image) for image in images]
        self._run: Run | None = None
        self._name = "no run yet"
        self._handle = None
        self.history = History()
        self.snapshots: Snapshots | None = None

    @classmethod
    def watch(cls, run: Run | str | Path, interval: float = 0.5, line_interval: float = 10.0) -> LiveMonitor:
        """Show a run from its folder: one that is finished, or that another process trains.

        Args:
            run: a run or its folder. The first row may still be to come.
            interval, line_interval: as above.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        monitor = cls(interval=interval, line_interval=line_interval)
        monitor._open(run if isinstance(run, Run) else Run(run))
        monitor.refresh()
        return monitor

    def _open(self, run: Run) -> None:
        self._run, self._name = run, run.recipe.name
        self._max_iterations = run.recipe.optimization.max_iterations
        self._rows = RowFile(run.path / "metrics.jsonl")

    def refresh(self) -> bool:
        """Read what the files of the run hold by now; returns whether there was anything new."""
        if self._run is None:
            return False
        starts = self._rows.starts
        rows = self._rows.new_rows()
        if self._rows.starts > starts or self.snapshots is None:  # the first time, or the run goes on from a checkpoint
            self.history, self.snapshots = History(), Snapshots(self._run.path)
        for row in rows:
            self.history.add(row)
        seen = len(self.snapshots.label_maps)
        self.snapshots.load()
        return bool(rows) or len(self.snapshots.label_maps) > seen

    def follow(self, timeout: float | None = None) -> LiveMonitor:
        """Keep showing what another process writes, until the run is finished; the stop button ends it sooner.

        Args:
            timeout: give up after so many seconds without anything new; None waits on.
        """
        self._begin_display()
        last_news = _now()
        try:
            while True:
                if self.refresh():
                    last_news = _now()
                    self._show_if_due()
                if self._run is None or self._run.finished or (timeout is not None and _now() - last_news >= timeout):
                    break
                _sleep(self.interval)
        except KeyboardInterrupt:
            print("No longer following; the run goes on.")
        self.refresh()
        self._show()
        return self

    def on_start(self, run: Run) -> None:
        self._open(run)
        self.history, self.snapshots = History(run.metrics), Snapshots(run.path)  # of the sessions before this one
        self.snapshots.keep({row["iteration"] for row in self.history.evaluations})
        if self._images:
            self.snapshots.begin(self._images)
        self._begin_display()

    def on_step(self, row: dict) -> None:
        self.history.add(row)
        self._show_if_due()

    def on_evaluation(self, row: dict) -> None:
        self.history.add(row)
        if self._images:
            sizes = self._run.recipe.evaluation
            self.snapshots.add(row["iteration"], self._run.current_model, self._images, sizes)
        self._show()

    def on_end(self, run: Run) -> None:
        self._show()

    def _begin_display(self) -> None:
        self._handle = None
        if in_notebook():
            from IPython.display import display

            self._handle = display(self, display_id=True)
        self._next = _now() + (self.interval if self._handle else 0)

    def _show_if_due(self) -> None:
        if _now() >= self._next:
            self._show()

    def _show(self) -> None:
        started = _now()
        if self._handle is None:
            print(self.status(), flush=True)
            self._next = started + self.line_interval
            return
        self._handle.update(self)
        self._next = _now() + max(self.interval, 9 * (_now() - started))

    def status(self) -> str:
        """One line: step, loss, mIoU, speed, memory, time left."""
        row = self.history.last_step
        if self._run is None:
            return f"{self._name}: give this to train(…, callbacks=[…]), or open a run with LiveMonitor.watch(folder)"
        if row is None:
            return f"{self._name}: waiting for the first step"
        left = time_left(self.history.steps, self._max_iterations)
        parts = [f"{self._name}: step {row['iteration']} of {self._max_iterations}", f"loss {row['loss']:.2f}"]
        last = [row for row in self.history.evaluations[-1:] if leading_figure(row) is not None]
        parts += [f"{leading_metric(row)} {leading_figure(row):.1f} %" for row in last]
        parts += [f"{row['images_per_second']:.1f} images/s", f"{row['memory_gib']:.1f} GiB of memory"]
        if row["iteration"] < self._max_iterations and left is not None:
            parts.append(f"{format_duration(left)} left")
        return " · ".join(parts)

    def figure(self) -> explore.plots.Figure:
        """The curves and the predictions as they are now."""
        shots = self.snapshots
        if shots is None:
            return explore.plots.training_progress([], title=self.status())
        maps = {iteration: shots.label_maps[iteration] for iteration in evenly_spaced(sorted(shots.label_maps), STRIP)}
        return explore.plots.training_progress(
            self.history.steps, self.history.evaluations, self.status(), shots.images, maps, shots.classes
        )

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with the curves and the predictions as vectors."""
        save_page(path, figures=[self.figure()], title=self._name)

    def __repr__(self) -> str:
        return f"LiveMonitor({self._name})" if self._run else "LiveMonitor()"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        return {"text/plain": repr(self)} | ({"image/png": self.figure()._repr_png_()} if self._run else {})


def in_notebook() -> bool:
    """True in a Jupyter kernel; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


_now, _sleep = time.monotonic, time.sleep
