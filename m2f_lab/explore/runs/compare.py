"""Comparison of runs: curves laid over each other, the fields in which their recipes differ, and their results."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from m2f_lab import explore
from m2f_lab.explore.parts.pages import save_page
from m2f_lab.explore.parts.table import Table
from m2f_lab.explore.runs.history import History, format_duration
from m2f_lab.recipes import Recipe
from m2f_lab.training import Run

_WORDS = {"name", "notes", "published"}  # of a recipe; they change nothing


def compare(runs: Sequence[Run | str | Path] | Mapping[str, Run | str | Path]) -> Comparison:
    """Lay runs over each other.

        compare(["runs/small", "runs/large"])
        compare({"without jitter": run, "with": other})

    Args:
        runs: runs or their folders; a mapping gives them names, else they are called after their folders.

    Raises:
        ValueError: there is nothing to compare, or a run has no rows yet.
        FileNotFoundError: a folder holds no run.
    """
    if isinstance(runs, (Run, str, Path)):
        raise ValueError(f"compare takes several runs, in a list or a mapping: compare([{str(runs)!r}, ...]).")
    named = dict(runs) if isinstance(runs, Mapping) else dict(zip(_names(runs), runs, strict=True))
    if not named:
        raise ValueError("compare needs at least one run; pass runs or their folders.")
    return Comparison({name: run if isinstance(run, Run) else Run(run) for name, run in named.items()})


class Comparison:
    """Runs beside each other: curves over iterations and over time, and a table.

    Attributes:
        runs: name → run.
        histories: name → its rows as they were when they were compared.
        differences: field → name → its value, for the fields of the recipes that differ.
    """

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self.runs = dict(runs)
        recipes = {name: flat_recipe(run.recipe) for name, run in runs.items()}
        self.differences = differing_fields(recipes)
        self.histories = {name: _read(name, run) for name, run in runs.items()}

    @property
    def table(self) -> Table:
        """One row per run: its progress, its best and last mIoU, and the fields that differ."""
        name = " or ".join(sorted({run.recipe.metric for run in self.runs.values()}))
        header = ("run", "iterations", "time", f"best {name}", "at", f"last {name}", *self.differences)
        return Table(tuple((name, "") for name in header), tuple(map(self._row, self.runs)))

    def _row(self, name: str) -> tuple[str, ...]:
        history, metric = self.histories[name], self.runs[name].recipe.metric
        measured = [row for row in history.evaluations if row[metric] is not None]
        best = max(measured, key=lambda row: row[metric], default=None)
        return (
            name,
            str(history.last_step["iteration"]),
            format_duration(history.last_step["seconds"]),
            f"{best[metric]:.1f} %" if best else "–",
            str(best["iteration"]) if best else "–",
            f"{measured[-1][metric]:.1f} %" if measured else "–",
            *(str(values[name]) for values in self.differences.values()),
        )

    def figure(self) -> explore.plots.Figure:
        """Loss, terms, mIoU and learning rate, over iterations and over time."""
        rows = {name: (h.steps, with_seconds(h.evaluations, h.steps)) for name, h in self.histories.items()}
        return explore.plots.compared_runs(rows)

    def save_html(self, path: str | Path) -> None:
        """Write one self-contained page with the curves as vectors and the table."""
        save_page(path, figures=[self.figure()], tables=[self.table], title=f"{len(self.runs)} runs")

    def __str__(self) -> str:
        return repr(self.table)

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.runs)})"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        png = self.figure()._repr_png_()
        picture = f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="curves of the runs">'
        return {"text/plain": str(self), "text/html": picture + self.table._repr_html_(), "image/png": png}


def flat_recipe(recipe: Recipe) -> dict[str, object]:
    """Every field that changes training, by its full name, such as "optimization.learning_rate"."""
    flat = {}
    for part, value in asdict(recipe).items():
        flat |= {f"{part}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {part: value}
    return {field: value for field, value in flat.items() if field not in _WORDS}


def differing_fields(recipes: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """The fields in which recipes differ: field → name of the recipe → value."""
    fields = next(iter(recipes.values()))
    columns = {field: {name: recipe[field] for name, recipe in recipes.items()} for field in fields}
    return {field: values for field, values in columns.items() if len(set(map(repr, values.values()))) > 1}


def with_seconds(evaluations: Sequence[dict], steps: Sequence[dict]) -> list[dict]:
    """Evaluations with their time, which is interpolated between the steps around them."""
    iterations, seconds = [row["iteration"] for row in steps], [row["seconds"] for row in steps]
    return [row | {"seconds": float(np.interp(row["iteration"], iterations, seconds))} for row in evaluations]


def _read(name: str, run: Run) -> History:
    history = History(run.metrics)
    if not history.steps:
        raise ValueError(
            f"The run {name!r} has no rows yet: {run.path / 'metrics.jsonl'} is empty or absent. It gets one every "
            f"{run.recipe.optimization.log_every} iterations; compare it once it has one, or leave it out."
        )
    return history


def _names(runs: Sequence[Run | str | Path]) -> list[str]:
    """The last part of each folder, or as many as tell them apart."""
    paths = [(run if isinstance(run, Run) else Run(run)).path.absolute() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError("A run is there twice; give each once, or a mapping with names of their own.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
