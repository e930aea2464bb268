"""LiveMonitor: curves that move while a model trains, in a notebook; lines of text anywhere else."""

from __future__ import annotations

import io
import math
import sys
import time
from typing import TYPE_CHECKING

from m2f_lab.training import Run
from m2f_lab.training.run import METRIC

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure

TERMS = ("class", "mask", "dice")
KEPT = ("iteration", "loss", *TERMS, "learning_rate", "images_per_second", "seconds")


def fold_terms(row: dict) -> dict[str, float]:
    """What curves show of a row: each term as the mean over all predictions, instead of one by one.

    Args:
        row: as callbacks get it, with "0.class", "0.mask", "0.dice", "1.class" and so on.
    """
    folded = {name: row[name] for name in KEPT if name in row}
    for term in TERMS:
        values = [value for name, value in row.items() if name.endswith(f".{term}")]
        if values:
            folded[term] = math.fsum(values) / len(values)
    return folded


class History:
    """Folded rows of a run that may be long: once there are too many, neighbours are averaged.

    Attributes:
        steps: oldest first, fewer than `limit`.
        evaluations: all of them.
    """

    def __init__(self, limit: int = 2000) -> None:
        self.limit = limit
        self.steps: list[dict] = []
        self.evaluations: list[dict] = []
        self._steps_per_row = 1
        self._waiting: list[dict] = []

    def add(self, row: dict) -> None:
        """Take in a row of kind "step" or "evaluation"."""
        if row["kind"] == "evaluation":
            self.evaluations.append(row)
            return
        self._waiting.append(fold_terms(row))
        if len(self._waiting) == self._steps_per_row:
            self.steps.append(_mean_row(self._waiting))
            self._waiting = []
        if len(self.steps) == self.limit:
            self.steps = [_mean_row(self.steps[i : i + 2]) for i in range(0, self.limit, 2)]
            self._steps_per_row *= 2


def _mean_row(rows: list[dict]) -> dict:
    """Averages, but the place in the run of the last one."""
    mean = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[-1]}
    return mean | {name: rows[-1][name] for name in ("iteration", "seconds") if name in rows[-1]}


def time_left(rows: list[dict], max_iterations: int) -> float | None:
    """Seconds until the end at the pace of the last rows; None where there is none yet."""
    recent = rows[-50:]
    if len(recent) < 2:
        return None
    steps = recent[-1]["iteration"] - recent[0]["iteration"]
    seconds = recent[-1]["seconds"] - recent[0]["seconds"]
    return (max_iterations - recent[-1]["iteration"]) * seconds / steps if steps > 0 else None


def say_duration(seconds: float) -> str:
    """7384 → "2 h 03 min"; 95 → "1 min 35 s"; 8 → "8 s" """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class LiveMonitor:
    """A callback of `train` that shows how it goes.

        train(recipe, data_root, out, callbacks=[LiveMonitor()])

    In a notebook it draws curves of the losses, the learning rate and the mIoU into the cell, and leaves the last
    picture there. Elsewhere it prints a line now and then. It may run in a thread.
    """

    def __init__(self, interval: float = 0.5, line_interval: float = 10.0) -> None:
        """Args:
        interval: least seconds between two pictures; more where drawing would take over a tenth of the time.
        line_interval: least seconds between two printed lines, outside a notebook.
        """
        if interval < 0.5:
            raise ValueError(
                f"LiveMonitor draws at most twice a second: interval must be at least 0.5, got {interval}."
            )
        self.interval, self.line_interval = interval, line_interval
        self._name = ""

    def on_start(self, run: Run) -> None:
        self._name, self._max_iterations = run.recipe.name, run.recipe.optimization.max_iterations
        self.history = History()
        for row in run.metrics:  # of the sessions before this one
            self.history.add(row)
        self._row: dict | None = None
        self._handle = None
        if in_notebook():
            from IPython.display import display

            self._handle = display(self, display_id=True)
        self._next = _now() + (self.interval if self._handle else 0)

    def on_step(self, row: dict) -> None:
        self._row = row
        self.history.add(row)
        if _now() >= self._next:
            self._show()

    def on_evaluation(self, row: dict) -> None:
        self.history.add(row)
        self._show()

    def on_end(self, run: Run) -> None:
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
        """One line: step, loss, mIoU, speed, time left."""
        if self._row is None:
            return f"{self._name}: waiting for the first step"
        row, last = self._row, self.history.evaluations[-1:]
        left = time_left(self.history.steps, self._max_iterations)
        parts = [f"{self._name}: step {row['iteration']} of {self._max_iterations}", f"loss {row['loss']:.2f}"]
        parts += [f"{METRIC} {evaluation[METRIC]:.1f} %" for evaluation in last if evaluation[METRIC] is not None]
        parts.append(f"{row['images_per_second']:.1f} images/s")
        if row["iteration"] < self._max_iterations and left is not None:
            parts.append(f"{say_duration(left)} left")
        return " · ".join(parts)

    def figure(self) -> Figure:
        """The curves as they are now."""
        from m2f_lab.explore import plots  # not needed in a terminal

        return plots.learning_curves(self.history.steps, self.history.evaluations, title=self.status())

    def __repr__(self) -> str:
        return f"LiveMonitor({self._name})"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=96)
        return {"text/plain": repr(self), "image/png": file.getvalue()}


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this; IPython is not imported to find out."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


_now = time.monotonic
