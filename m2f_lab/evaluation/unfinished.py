"""An evaluation that goes on after an interrupt: what was counted so far, kept beside the report.

    out/unfinished.pt       counts, and the report's lines and pictures; gone when the evaluation is done

Images are counted in order, so that the number of the report's lines says where to go on. Sums continue from the very
numbers that they had, and the figures come out as if nothing had happened. The file is only taken up by an evaluation
of the same recipe, weights, precision and device on the same images and labels; any other one starts over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from m2f_lab.data import Dataset
from m2f_lab.evaluation.report import Report
from m2f_lab.inference.predict import Model
from m2f_lab.recipes import Recipe

SECONDS = 30.0
"""Time between two times of writing the file."""


class Unfinished:
    """What evaluators and a report hold, in a file.

    Args:
        out: the report's folder
        key: says which evaluation it is, as `key_of` does
        evaluators: those of the task's measure
        report: the report
    """

    def __init__(self, out: str | Path, key: str, evaluators: Sequence, report: Report) -> None:
        self.path = Path(out).expanduser() / "unfinished.pt"
        self.key, self.evaluators, self.report = key, evaluators, report
        self._saved = time.monotonic()

    def restore(self) -> int:
        """Take up what the file holds, if there is one of the same evaluation; return how many images are done."""
        if not self.path.is_file():
            return 0
        try:
            saved = torch.load(self.path, weights_only=True)
        except Exception as error:  # PyTorch raises many kinds
            raise ValueError(f"{self.path} cannot be read. Delete it to start the evaluation over.") from error
        log = logging.getLogger("m2f_lab")
        if saved["key"] != self.key:
            log.warning("%s is of another model, recipe or data set; the evaluation starts over.", self.path)
            return 0
        for evaluator, state in zip(self.evaluators, saved["evaluators"], strict=True):
            evaluator.load_state(state)
        self.report.load_state(saved["report"])
        log.info("The evaluation goes on after %d images, which %s holds.", len(self.report.images), self.path)
        return len(self.report.images)

    def save_in_time(self) -> None:
        """Write the file if the last time is long enough ago."""
        if time.monotonic() - self._saved < SECONDS:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "key": self.key,
            "evaluators": [evaluator.state() for evaluator in self.evaluators],
            "report": self.report.state(),
        }
        new = self.path.with_suffix(".new")
        torch.save(content, new)
        os.replace(new, self.path)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Delete the file, when all is done."""
        self.path.unlink(missing_ok=True)


def key_of(model: Model, recipe: Recipe, dataset: Dataset, *options) -> str | None:
    """A text that differs between evaluations whose figures may differ; None where that cannot be said.

    Functions have no weights to compare, and data sets of your own no files. The code of a model is not looked at.
    """
    if not isinstance(model, nn.Module) or not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    precision = [(kind, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    digest.update(repr((type(model).__qualname__, recipe, str(dataset), len(dataset), precision, options)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.device.type)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for path in _files(dataset):
        known = path.stat() if path.is_file() else None  # a folder changes with what is written beside
        digest.update(repr((str(path), known and (known.st_size, known.st_mtime_ns))).encode())
    return digest.hexdigest()


def _files(dataset: Dataset) -> Iterator[Path]:
    """Images, labels and lists of a data set."""
    for field in fields(dataset):
        value = getattr(dataset, field.name)
        yield from (path for path in (value if isinstance(value, tuple) else (value,)) if isinstance(path, Path))
