"""History of a run: rows of `metrics.jsonl`, thinned out so that drawing them stays quick.

Terms of the loss are what the criterion calls them; "2.mask" is the term "mask" of prediction 2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from m2f_lab.training.run import parse_row

_FIGURES = ("iteration", "loss", "learning_rate", "images_per_second", "seconds", "memory_gib")


class History:
    """Rows of a run of any length: once there are too many, neighbours are averaged.

    Attributes:
        steps: rows of kind "step", oldest first, fewer than `limit`; their means where steps were averaged.
        evaluations: all rows of kind "evaluation".
        last_step: the newest row of kind "step" as it came, whether or not it is in `steps` yet; None before any.
    """

    def __init__(self, rows: Iterable[dict] = (), *, limit: int = 1000) -> None:
        self.limit = limit
        self.steps: list[dict] = []
        self.evaluations: list[dict] = []
        self.last_step: dict | None = None
        self._steps_per_row = 1
        self._waiting: list[dict] = []
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """Take in a row of kind "step" or "evaluation"."""
        if row["kind"] == "evaluation":
            self.evaluations.append(row)
            return
        self.last_step = row
        self._waiting.append(curve_values(row))
        if len(self._waiting) == self._steps_per_row:
            self.steps.append(_mean_row(self._waiting))
            self._waiting = []
        if len(self.steps) == self.limit:
            self.steps = [_mean_row(self.steps[i : i + 2]) for i in range(0, self.limit, 2)]
            self._steps_per_row *= 2


def curve_values(row: dict) -> dict[str, float]:
    """Values of a row of kind "step" that curves show: its figures, and every term of every prediction."""
    return {name: value for name, value in row.items() if name in _FIGURES or name.partition(".")[0].isdigit()}


def _mean_row(rows: list[dict]) -> dict:
    """Averages over the rows that have a value, but the last iteration, time and peak memory."""
    values = {name: [row[name] for row in rows if name in row] for name in dict.fromkeys(chain(*rows))}
    mean = {name: math.fsum(found) / len(found) for name, found in values.items()}
    return mean | {name: rows[-1][name] for name in ("iteration", "seconds", "memory_gib") if name in rows[-1]}


class RowFile:
    """A `metrics.jsonl` that may still be written: every call of `new_rows` gives the rows since the last one.

    Attributes:
        starts: number of times that reading began at the top; more than one where the file was replaced, as by a run
            that continues from a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.starts = path, 0
        self._read, self._file, self._lines = 0, None, 0

    def new_rows(self) -> list[dict]:
        """The rows since the last call; a line without its end is left until it has one.

        Raises:
            ValueError: a complete line is not JSON.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as stream:
            state = os.fstat(stream.fileno())
            if self._file != state.st_ino or state.st_size < self._read:
                self._file, self._read, self._lines = state.st_ino, 0, 0
                self.starts += 1
            stream.seek(self._read)
            complete = stream.read().rpartition(b"\n")[0]
        lines = complete.split(b"\n") if complete else []
        rows = [parse_row(line, self._lines + number, self.path) for number, line in enumerate(lines, start=1)]
        self._read += len(complete) + bool(complete)
        self._lines += len(lines)
        return rows


def time_left(rows: list[dict], max_iterations: int) -> float | None:
    """Seconds until the end at the pace of the last rows; None where there is none yet."""
    recent = rows[-50:]
    if len(recent) < 2:
        return None
    steps = recent[-1]["iteration"] - recent[0]["iteration"]
    seconds = recent[-1]["seconds"] - recent[0]["seconds"]
    return (max_iterations - recent[-1]["iteration"]) * seconds / steps if steps > 0 else None


def format_duration(seconds: float) -> str:
    """7384 → "2 h 03 min"; 95 → "1 min 35 s"; 8 → "8 s" """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
