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
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from m2f_lab.data import Dataset, Sample, overlay
from m2f_lab.inference.files import label_map_of
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Prediction

WORST, PAIRS, WIDTH = 12, 15, 320
"""Images and confused pairs that the report shows, and the width of its pictures in pixels."""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .7rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr:nth-child(even) {{ background: #f6f6f6; }}
.bar {{ background: #dde6f0; width: 16rem; }} .bar div {{ background: #3b6fb6; height: .9rem; }}
figure {{ margin: 1.2rem 0; }} figure img {{ max-width: 100%; }} code {{ background: #f2f2f2; padding: .1rem .3rem; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


class Report:
    """Collects a line for each image, and the worst of them with pictures.

    Attributes:
        images: name, number and figure of each image; None where it has nothing to measure.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset) -> None:
        self.recipe, self.dataset = recipe, dataset
        self.images: list[dict] = []
        self._worst: list[tuple[float, int, str, bytes]] = []  # a heap whose first is the best of the worst

    def add(self, number: int, sample: Sample, predictions: Sequence[Prediction], figures: dict) -> None:
        """Add an image, with the figures of it alone."""
        metric = self.recipe.metric
        figure = figures[metric]
        self.images.append({"number": number, "name": sample.name, metric: figure})
        if figure is None or (len(self._worst) == WORST and -figure <= self._worst[0][0]):
            return
        entry = (-figure, -number, sample.name, _picture(sample, predictions[0], self.dataset.classes))
        keep = heapq.heappush if len(self._worst) < WORST else heapq.heappushpop
        keep(self._worst, entry)

    def write(self, out: str | Path, figures: dict, matrix: Tensor | None) -> None:
        """Write both files.

        Args:
            out: the folder.
            figures: of the whole evaluation.
            matrix: pixels by true and predicted class, where label maps were counted. int64 [K, K]
        """
        out = Path(out).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        content = {"recipe": self.recipe.name, "task": self.recipe.task, "data": str(self.dataset)} | figures
        (out / "evaluation.json").write_text(json.dumps(content | {"images": self.images}, indent=1))
        title = f"{self.recipe.name} on {self.dataset}"
        parts = [self._overview(figures), _classes(figures["classes"], self.recipe.metric)]
        if matrix is not None:
            parts.append(_confusions(np.asarray(matrix), self.dataset.classes.names))
        page = _PAGE.format(title=html.escape(title), body="\n".join([*parts, self._pictures()]))
        (out / "report.html").write_text(page, encoding="utf-8")

    def _overview(self, figures: dict) -> str:
        published = self.recipe.published
        rows = [
            (name, _percent(value), _percent(published.get(name, published.get(f"{name}_pan"))))
            for name, value in figures.items()
            if name not in ("num_images", "classes")
        ]
        count = figures["num_images"]
        return f"<p>{count} images.</p>" + _table(("figure", "%", "published"), rows)

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


def _classes(classes: Sequence[dict], metric: str) -> str:
    """Bars of the classes, the worst first."""
    leading = {"mIoU": "IoU"}.get(metric, metric)
    columns = [name for name in classes[0] if name != "name"]
    order = sorted(classes, key=lambda row: (row[leading] is None, row[leading] or 0.0))
    rows = []
    for row in order:
        bar = f'<div class="bar"><div style="width: {row[leading] or 0.0:.1f}%"></div></div>'
        rows.append((row["name"], _Markup(bar), *(_cell(row[name]) for name in columns)))
    return f"<h2>Classes by {leading}</h2>" + _table(("class", "", *columns), rows)


def _confusions(matrix: np.ndarray, names: Sequence[str]) -> str:
    """The pairs of classes that most pixels are mistaken between, and which share of the true class that is."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    rows = []
    for place in order.tolist():
        true, said = divmod(place, len(matrix))
        if wrong[true, said]:
            share = 100 * wrong[true, said] / matrix[true].sum()
            rows.append((names[true], names[said], f"{int(wrong[true, said]):,}", f"{share:.1f} %"))
    return "<h2>Confused classes</h2>" + _table(("is", "was called", "pixels", "of the class"), rows)


class _Markup(str):
    """Text that is HTML already."""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        texts = (cell if isinstance(cell, _Markup) else html.escape(cell) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else _percent(value)


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
