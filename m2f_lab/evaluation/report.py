"""An evaluation on disk: evaluation.json, and report.html, which opens without a server or a network.

K classes, H/W height/width.
"""

from __future__ import annotations

import base64
import heapq
import html
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f_lab.data import Dataset, Sample, overlay
from m2f_lab.evaluation import page
from m2f_lab.evaluation.breakdown import Breakdown
from m2f_lab.evaluation.instance import InstanceEvaluator
from m2f_lab.evaluation.measures import Measure
from m2f_lab.evaluation.panoptic import PanopticEvaluator
from m2f_lab.evaluation.semantic import SemanticEvaluator
from m2f_lab.inference.files import label_map_of
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Prediction

WORST, WIDTH = 12, 320
"""Images that the report shows, and the width of its pictures in pixels."""

PAIRS_OF_IMAGE = 3
"""Confused pairs that evaluation.json has of each image."""


class Report:
    """Collects a line for each image, and the worst of them with pictures.

    Attributes:
        images: of each image its number, name and figure, None where it has nothing to measure; the figures of its
            "classes", its "boundary_error" (see `Breakdown`), and its most "confused" pairs
    """

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.images: list[dict] = []
        self.breakdown = Breakdown(len(dataset.classes))
        self._worst: list[tuple[float, int, str, bytes]] = []  # a heap whose first is the best of the worst

    def add(self, number: int, sample: Sample, predictions: Sequence[Prediction], alone: Measure) -> None:
        """Add an image, with what was counted of it alone."""
        metric, figures = self.recipe.metric, alone.result()
        figure, leading = figures[metric], page.LEADING.get(metric, metric)
        self.images.append(
            {
                "number": number,
                "name": sample.name,
                metric: figure,
                "boundary_error": self.breakdown.update(predictions[0], sample),
                "classes": {row["name"]: row[leading] for row in figures["classes"] if row[leading] is not None},
                "confused": [] if alone.matrix is None else self._confused(alone.matrix, PAIRS_OF_IMAGE),
            }
        )
        if figure is None or (len(self._worst) == WORST and -figure <= self._worst[0][0]):
            return
        entry = (-figure, -number, sample.name, _picture(sample, predictions[0], self.dataset.classes))
        keep = heapq.heappush if len(self._worst) < WORST else heapq.heappushpop
        keep(self._worst, entry)

    def state(self) -> dict:
        """All lines and pictures so far, as a file can hold them."""
        worst = [
            (figure, number, name, torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))
            for figure, number, name, jpeg in self._worst
        ]
        return {"images": self.images, "worst": worst} | {
            name: torch.from_numpy(getattr(self.breakdown, name)) for name in ("distances", "regions")
        }

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.images = state["images"]
        self._worst = [(*row, jpeg.numpy().tobytes()) for *row, jpeg in state["worst"]]
        self.breakdown.distances, self.breakdown.regions = (state[name].numpy() for name in ("distances", "regions"))

    def write(self, out: str | Path, figures: dict, measure: Measure) -> None:
        """Write both files.

        Args:
            out: the folder.
            figures: of the whole evaluation.
            measure: what counted it.
        """
        out = Path(out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        content = {"recipe": self.recipe.name, "task": self.recipe.task, "data": str(self.dataset)}
        content |= {"metric": self.recipe.metric} | figures
        content["by_distance"] = self.breakdown.by_distance()
        parts = [self._overview(figures), page.classes_by_figure(figures["classes"], self.recipe.metric)]
        if measure.matrix is not None:
            content["confused"] = self._confused(measure.matrix, page.PAIRS)
            parts.append(page.confusions(content["confused"]))
        for evaluator in measure.evaluators:
            found = _DETAILS[type(evaluator)](evaluator)
            content |= found
            parts += [_SECTIONS[name](values) for name, values in found.items()]
        if self.recipe.task == "semantic":
            content["by_size"] = self.breakdown.by_size()
            parts.append(page.sizes("Regions", _REGIONS, content["by_size"]))
        parts += [page.distances(content["by_distance"]), self._pictures()]
        parts.append(page.images(self.images, self.recipe.metric))
        (out / "evaluation.json").write_text(json.dumps(content | {"images": self.images}, indent=1))
        (out / "report.html").write_text(page.page(f"{self.recipe.name} on {self.dataset}", parts), encoding="utf-8")

    def _overview(self, figures: dict) -> str:
        published = self.recipe.published
        rows = [
            (name, page.percent(value), page.percent(published.get(name, published.get(f"{name}_pan"))))
            for name, value in figures.items()
            if name not in ("num_images", "classes")
        ]
        count = figures["num_images"]
        return f"<p>{count} images.</p>" + page.table(("figure", "%", "published"), rows)

    def _confused(self, matrix: Tensor, most: int) -> list[dict]:
        """Pairs of classes that most pixels are mistaken between, and which share of the true class that is."""
        names, matrix = self.dataset.classes.names, np.asarray(matrix)
        true, said = np.nonzero(matrix)
        wrong = np.where(true == said, 0, matrix[true, said])
        rows = []
        for place in np.argsort(-wrong, kind="stable")[:most].tolist():
            if pixels := int(wrong[place]):
                share = 100 * pixels / int(matrix[true[place]].sum())
                rows.append(
                    {"is": names[true[place]], "was called": names[said[place]], "pixels": pixels, "share": share}
                )
        return rows

    def _pictures(self) -> str:
        shown = []
        for figure, number, name, jpeg in sorted(self._worst, reverse=True):
            picture = base64.b64encode(jpeg).decode()
            shown.append(
                f"<figure><figcaption>{html.escape(name)}: {self.recipe.metric} {-figure:.1f} %. Look inside: "
                f"<code>QueryExplorer(model, dataset[{-number}].image)</code></figcaption>"
                f'<img alt="image, truth and prediction of {html.escape(name)}" '
                f'src="data:image/jpeg;base64,{picture}"></figure>'
            )
        root = getattr(self.dataset, "root", None)
        opens = (
            f"dataset = open_dataset({self.recipe.data.dataset!r}, {str(root)!r}, {self.dataset.split!r}, "
            f"task={self.recipe.task!r})"
            if root is not None
            else "dataset = …, as it was evaluated"
        )
        return (
            f"<h2>The worst images</h2><p>Image, truth and prediction. <code>{html.escape(opens)}</code></p>"
            + "\n".join(shown)
        )


def worst_images(
    evaluation: str | Path,
    *,
    of_class: str | None = None,
    pair: tuple[str, str] | None = None,
    near_outlines: bool = False,
    most: int = 12,
) -> list[int]:
    """Numbers of the worst images of an evaluation, the worst first: `dataset[number]` has the image.

    Args:
        evaluation: the folder that `evaluate` wrote, or its evaluation.json
        of_class: by the figure of this class
        pair: by the pixels of the first class that were called the second
        near_outlines: by the error near true outlines
        most: so many of them; those without the figure asked for are left out

    Raises:
        ValueError: more than one order is asked for, or a class or a pair occurs in no image.
    """
    path = Path(evaluation).expanduser()
    content = json.loads((path / "evaluation.json" if path.is_dir() else path).read_text())
    if (of_class is not None) + (pair is not None) + near_outlines > 1:
        raise ValueError("Ask for one order: of_class, pair or near_outlines.")
    rows = content["images"]
    if of_class is not None:
        order = {row["number"]: row["classes"].get(of_class) for row in rows}
    elif pair is not None:
        pixels = ({(c["is"], c["was called"]): -c["pixels"] for c in row["confused"]} for row in rows)
        order = {row["number"]: found.get(tuple(pair)) for row, found in zip(rows, pixels, strict=True)}
    elif near_outlines:
        order = {row["number"]: None if row["boundary_error"] is None else -row["boundary_error"] for row in rows}
    else:
        order = {row["number"]: row[content["metric"]] for row in rows}
    known = [number for number, value in order.items() if value is not None]
    if not known and (of_class or pair):
        raise ValueError(
            f"No image has a figure for {of_class or ' called '.join(pair)}. The classes are "
            f"{', '.join(row['name'] for row in content['classes'])}; of each image its {PAIRS_OF_IMAGE} most confused "
            "pairs are known."
        )
    return sorted(known, key=lambda number: (order[number], number))[:most]


def _pixels(evaluator: SemanticEvaluator) -> dict:
    matrix = np.asarray(evaluator.matrix)
    return {"pixels": _shares(evaluator.class_names, matrix.diagonal(), matrix.sum(0), matrix.sum(1))}


def _segments(evaluator: PanopticEvaluator) -> dict:
    found, invented, missed, _ = np.asarray(evaluator.counts).T
    return {
        "segments": _shares(evaluator.class_names, found, found + invented, found + missed),
        "segments_by_size": evaluator.by_size(),
    }


def _instances(evaluator: InstanceEvaluator) -> dict:
    figures, letters = evaluator.result(), {"small": "s", "medium": "m", "large": "l"}
    rows = [
        {"size": size} | {name: figures[name + letter] for name in ("AP", "AR")} for size, letter in letters.items()
    ]
    return {"curves": evaluator.curves(), "instances_by_size": rows}


def _shares(names: Sequence[str], right: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> list[dict]:
    """Precision and recall of each class in percent, None where there is nothing that could be right. [K] each"""
    rows = zip(names, right.tolist(), predicted.tolist(), true.tolist(), strict=True)
    return [
        {"name": name, "precision": 100 * n / said if said else None, "recall": 100 * n / of if of else None}
        for name, n, said, of in rows
    ]


_REGIONS = (
    "A region is what joins pixels of one class. Recall: the share of the pixels of true regions that were called by "
    "their class; precision: the share of the pixels of predicted regions that are right."
)
_DETAILS = {SemanticEvaluator: _pixels, PanopticEvaluator: _segments, InstanceEvaluator: _instances}
_SECTIONS = {
    "pixels": partial(page.precision_and_recall, "pixels"),
    "segments": partial(page.precision_and_recall, "segments"),
    "segments_by_size": partial(page.sizes, "Segments", "All classes together."),
    "curves": page.curves,
    "instances_by_size": partial(page.sizes, "Instances", "As COCO counts them."),
}


def _picture(sample: Sample, prediction: Prediction, classes) -> bytes:
    """Image, truth and prediction beside each other. JPEG"""
    truth = sample.label_map if sample.label_map is not None else sample.segments.label_map(classes.ignore)
    parts = [
        sample.image,
        *(
            overlay(sample.image, labels, classes)
            for labels in (truth, label_map_of(prediction, ignore=classes.ignore))
        ),
    ]
    height, width = sample.image.shape[:2]
    scale = min(1.0, WIDTH / width)
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    row = np.concatenate([np.asarray(Image.fromarray(part).resize(size)) for part in parts], axis=1)
    file = io.BytesIO()
    Image.fromarray(row).save(file, "JPEG", quality=80)
    return file.getvalue()
