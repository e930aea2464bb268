"""A run on disk: its recipe, its metrics and its weights.

recipe.json          the recipe, complete
metrics.jsonl        one JSON object per line: rows of kind "step" and of kind "evaluation"
checkpoints/last/    weights and optimiser, to continue from; in average/, the weights' average if there is one
checkpoints/best/    the weights of the best evaluation: the average, if there is one
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from m2f_lab.networks import settled
from m2f_lab.recipes import Recipe
from m2f_lab.training.checkpoint import recover_folder
from m2f_lab.weights import Builder, load_model

# Fields that may change when a run continues: none of them reaches the weights.
_FREE = {
    "name", "notes", "published", "data.num_workers",
    "evaluation.multi_scale_edges", "evaluation.multi_scale_longest_edge",
    "optimization.evaluate_every", "optimization.checkpoint_every", "optimization.log_every",
}  # fmt: skip


class Run:
    """A training run, finished or not. `Run(folder)` opens one from disk.

    Everything is read from the files when it is asked for, so a run can be watched from another process.

    Attributes:
        path: the run's folder.
        current_model: the model as it is now, for callbacks, while `train` trains it in this process; else None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.current_model: nn.Module | None = None

    def __repr__(self) -> str:
        return f"Run({self.recipe.name}, {self.iteration} of {self.recipe.optimization.max_iterations} iterations)"

    @property
    def recipe(self) -> Recipe:
        file = self.path / "recipe.json"
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} is not a run: there is no {file}. A run's folder is train's `out`.")
        return Recipe.load(file)

    @property
    def metrics(self) -> list[dict]:
        """All rows of `metrics.jsonl`, oldest first; `row["kind"]` is "step" or "evaluation"."""
        return read_rows(self.path / "metrics.jsonl")

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.metrics if row["kind"] == "step"]

    @property
    def evaluations(self) -> list[dict]:
        return [row for row in self.metrics if row["kind"] == "evaluation"]

    @property
    def last(self) -> dict | None:
        """The newest evaluation, for example `run.last["mIoU"]` in percent; None before the first."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def best(self) -> dict | None:
        """The evaluation with the highest leading figure, whose weights are kept; None before one was measured."""
        measured = [row for row in self.evaluations if leading_figure(row) is not None]
        return max(measured, key=leading_figure, default=None)  # the first of several

    @property
    def iteration(self) -> int:
        """Steps that the last checkpoint holds."""
        file = self.checkpoint("last") / "training.json"
        return json.loads(file.read_text())["progress"]["iteration"] if file.is_file() else 0

    @property
    def finished(self) -> bool:
        return self.iteration == self.recipe.optimization.max_iterations

    def checkpoint(self, which: str) -> Path:
        """The folder of the "best" or "last" weights; `load_weights` reads it."""
        return self.path / "checkpoints" / which

    def model(self, which: str = "best", build: Builder | None = None) -> nn.Module:
        """Load the trained model, in evaluation mode on the CPU.

        Args:
            which: "best" or "last". "best" is "last" before the first evaluation. Both are the average of the weights
                where `optimization.ema_decay` asks for one; checkpoint("last") holds the weights themselves, too.
            build: the builder that the run was trained with; needed where its module is not imported yet.

        Raises:
            FileNotFoundError: the run has no checkpoint yet.
            ValueError: the builder is missing.
        """
        return load_model(self.weights(which), build)

    def weights(self, which: str) -> Path:
        """The folder of the weights that `model` loads.

        Raises:
            FileNotFoundError: the run has no checkpoint yet.
        """
        if which not in ("best", "last"):
            raise ValueError(f'which must be "best" or "last", got {which!r}.')
        folder = next((f for f in (self.checkpoint(which), self.checkpoint("last")) if f.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{self.path} has no checkpoint yet; train(...) writes the first one.")
        average = folder / "average"
        return average if average.is_dir() else folder


def leading_metric(row: dict) -> str:
    """Name of the figure that an evaluation is led by: "PQ", "AP" or "mIoU", the first that it has."""
    return next((name for name in ("PQ", "AP") if name in row), "mIoU")


def leading_figure(row: dict) -> float | None:
    """The figure itself, in percent; None where there was nothing to measure."""
    return row[leading_metric(row)]


def read_rows(file: Path) -> list[dict]:
    """Read the rows of a `metrics.jsonl`; a last line that is still being written is left out.

    Raises:
        ValueError: a complete line is not JSON.
    """
    if not file.is_file():
        return []
    complete = file.read_bytes().rpartition(b"\n")[0]
    lines = complete.split(b"\n") if complete else []
    return [parse_row(line, number, file) for number, line in enumerate(lines, start=1)]


def parse_row(line: bytes, number: int, file: Path) -> dict:
    """Parse one row of a `metrics.jsonl`; `number` is its line's, from 1.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"Line {number} of {file} is not JSON ({error}); take the line away, or restore the file."
        ) from error


def append_row(file: Path, row: dict) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def keep_rows(file: Path, num_rows: int) -> None:
    """Cut `metrics.jsonl` to its first rows: those after the checkpoint will be written again."""
    rows = read_rows(file)[:num_rows]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, file)


def open_run(path: Path, recipe: Recipe, resume: str) -> None:
    """Prepare a folder for training.

    Args:
        path: the run's folder; it may be absent.
        recipe: to be trained.
        resume: "auto" continues from a checkpoint if there is one, "must" insists on one, "never" deletes the run that
            is there and starts over.

    Raises:
        ValueError: the folder holds a run of another recipe; the message names the fields.
        FileNotFoundError: "must", but there is no checkpoint.
    """
    if resume not in ("auto", "must", "never"):
        raise ValueError(f'resume must be "auto", "must" or "never", got {resume!r}.')
    if resume == "never":
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        (path / "metrics.jsonl").unlink(missing_ok=True)
    checkpoints = {which: recover_folder(path / "checkpoints" / which) for which in ("last", "best")}
    if resume == "must" and not checkpoints["last"]:
        raise FileNotFoundError(
            f"{path / 'checkpoints' / 'last'} does not exist: there is nothing to continue. "
            'resume="auto" starts from the beginning then.'
        )
    if any(checkpoints.values()):
        _check_same_recipe(path, recipe)
    path.mkdir(parents=True, exist_ok=True)
    recipe.save(path / "recipe.tmp")
    os.replace(path / "recipe.tmp", path / "recipe.json")


def _check_same_recipe(path: Path, recipe: Recipe) -> None:
    # Fields that are newer than the file have their defaults on both sides.
    both = (replace(each, model=settled(each.model)) for each in (Recipe.load(path / "recipe.json"), recipe))
    there, here = (_flat(json.loads(json.dumps(asdict(each)))) for each in both)
    fields = [f for f in sorted(there.keys() | here.keys()) if there.get(f) != here.get(f) and f not in _FREE]
    if fields:
        lines = "\n".join(f"  {field}: {there.get(field)} there, {here.get(field)} here" for field in fields)
        raise ValueError(
            f"{path} holds a run of another recipe. These fields differ:\n{lines}\nChoose another folder, set the "
            'fields back, or start over with resume="never", which deletes the run that is there.'
        )


def _flat(values: dict, prefix: str = "") -> dict:
    """{"data": {"flip": True}} → {"data.flip": True}"""
    flat = {}
    for key, value in values.items():
        name = prefix + key
        is_part = isinstance(value, dict) and value and name not in _FREE
        flat |= _flat(value, f"{name}.") if is_part else {name: value}
    return flat
