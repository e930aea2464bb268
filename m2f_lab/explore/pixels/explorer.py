"""PixelLedger: click a pixel and read where its score comes from, query by query.

Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore.parts.drawing import label_table
from m2f_lab.explore.parts.labels import Labels, class_labels, known_classes
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.pages import Control, save_page
from m2f_lab.explore.parts.table import Caption, Table
from m2f_lab.explore.parts.tool import Explorer, controls, menu, pictures, recalled, share_slider
from m2f_lab.explore.pixels.ledger import Ledger, ledger_at, mask_probability_rows
from m2f_lab.explore.queries.trace import check_numbers
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.postprocess import semantic_rows
from m2f_lab.inference.predict import look
from m2f_lab.structures import Output

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure
    from m2f_lab.inference.rows import Rows

COLUMNS = 4
"""A table shows this many classes, those with the highest scores."""
ROWS = 8
"""Queries in a figure, and in the tables of a saved page."""
VISIBLE = 0.00005
"""Smaller shares would be printed as zero."""
MAX_CELLS = 128
"""Maps of scores have at most this many cells along each edge."""
PAGE_PLACES = 20
"""A saved page knows the ledgers on a grid of at most this many places along each edge."""

HELP = {
    "map": "The class with the highest score at every pixel. Click a pixel to see who gave what to its score.",
    "score": "The score of one class: the sum over all queries of p(class | query) · p(pixel | query). It may exceed "
    "1, and the scores of all classes need not add up to 1.",
    "class": "The class whose score is shown as heat.",
    "opacity": "How strongly the maps cover the image.",
    "query": "The number of the query. The queries that give most to the winning class come first.",
    "mask": "p(pixel | query): how probable it is that the pixel belongs to the query's mask.",
}


class PixelLedger(Explorer):
    """Click a pixel: a table lists what every query gives to its score, class by class.

        PixelLedger(model, "street.png")

    After a click, left and right arrows change the class whose score is shown.

    Attributes:
        label_map: the class of every pixel. uint8 [H, W]
        ledger: of the pixel that was clicked last; None before that.
    """

    def __init__(
        self,
        model: Callable[..., Output],
        image: str | Path | Image.Image | np.ndarray,
        *,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int = 460,
    ) -> None:
        """Args:
        model: a Mask2Former, or anything that is called like one.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        classes: names and colours; by default the model's own.
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        width: of each of the two pictures, in CSS pixels.
        """
        self.image = as_rgb(image)
        size = self.image.shape[0], self.image.shape[1]
        self._output: Output | None = look(model, self.image, shortest_edge, longest_edge)
        check_numbers(self._output)
        self._masks: Rows | None = mask_probability_rows(self._output, size=size)
        classes = getattr(model, "classes", None) if classes is None else classes
        self.classes = known_classes(classes, self._output.num_classes)
        self.labels = class_labels(self.classes, len(self.classes))
        self.ledger: Ledger | None = None
        self.label_map, scores = read_maps(semantic_rows(self._output).resized(size))

        views = self._make_views(scores, width)
        present = np.bincount(self.label_map.ravel(), minlength=len(scores))
        self.class_menu = menu(
            "class-menu", "class", [(name, k) for k, name in enumerate(self.classes.names)], HELP["class"],
            value=int(present.argmax()),
        )  # fmt: skip
        self.opacity_slider = share_slider("opacity-slider", "opacity", 0.7, HELP["opacity"])
        super().__init__(
            [controls(self.class_menu, self.opacity_slider), pictures(views["map"], views["score"])],
            views,
            name="pixel-ledger",
            summary=f"PixelLedger({self._output.masks[-1].num_queries} queries, {size[1]} × {size[0]} pixels)",
            links=[
                ((views["map"], "clicked"), (views["score"], "clicked")),
                *(((self.class_menu, "index"), (view, "index")) for view in views.values()),
                *(((self.opacity_slider, "value"), (view, "opacity")) for view in views.values()),
            ],
        )
        for view in views.values():
            view.observe(self._answer, "clicked")

    @classmethod
    def from_output(cls, output: Output, image: np.ndarray, **options) -> PixelLedger:
        """The ledger of an output that is there already, made of this image.

        Args:
            options: of PixelLedger.

        Raises:
            ValueError: the output was made of an image of another size.
        """
        return cls(recalled(output), image, **options)

    def _make_views(self, scores: np.ndarray, width: int) -> dict[str, MaskView]:
        names = self.classes.names
        common = {"width": width, "pinned": True, "group": f"ledger-{id(self)}"}
        return {
            "map": MaskView(
                self.image, self.label_map[None], colors=label_table(self.classes), names=names, num_masks=len(names),
                title="The class of every pixel", help=HELP["map"], **common,
            ),
            "score": MaskView(
                self.image, scores, colors="heat", relative=True, smooth=False, title="The score of one class",
                help=HELP["score"], readout="score {value}", unit="score", captions=[[Caption(n) for n in names]],
                **common,
            ),
        }  # fmt: skip

    def _answer(self, change: dict) -> None:
        if change["new"]:
            self.choose(*change["new"])

    def choose(self, x: int, y: int) -> Ledger:
        """Open the account of a pixel, as a click does.

        Raises:
            TypeError: x or y is no whole number.
            ValueError: the pixel is outside the image.
        """
        if self.ledger is not None and (self.ledger.x, self.ledger.y) == (x, y):
            return self.ledger  # both pictures tell of the same click
        with torch.inference_mode():
            self.ledger = ledger_at(self._output, x, y, masks=self._masks)
        self.class_menu.value = self.ledger.label
        self.views["score"].set_notes([[note_of(self.ledger, self.labels)]])
        for view in self.views.values():
            view.clicked = [x, y]
        return self.ledger

    def figure(self, x: int | None = None, y: int | None = None) -> Figure:
        """A static figure: the map, and bars of what the queries give to the pixel's classes.

        Args:
            x, y: the pixel; by default the one that was clicked last, or the middle of the image.
        """
        from m2f_lab.explore import plots  # a second to import, and most ledgers are never printed

        if x is None or y is None:
            height, width = self.label_map.shape
            x, y = (self.ledger.x, self.ledger.y) if self.ledger else (width // 2, height // 2)
        ledger = ledger_at(self._output, x, y, masks=self._masks)
        return plots.pixel_ledger(self.image, self.label_map, self.classes, ledger.shares, (x, y), count=ROWS)

    def save_html(self, path: str | Path, title: str = "Where a pixel's score comes from") -> None:
        """Write one self-contained page that answers clicks on a grid of places, without a network or a kernel."""
        self.update()
        height, width = self.label_map.shape
        rows, columns = min(PAGE_PLACES, height), min(PAGE_PLACES, width)
        notes = [
            [note_of(ledger_at(self._output, x, y, masks=self._masks), self.labels, ROWS)]
            for y in ((np.arange(rows) + 0.5) * height / rows).astype(int).tolist()
            for x in ((np.arange(columns) + 0.5) * width / columns).astype(int).tolist()
        ]
        view, kept, clicked = self.views["score"], self.views["score"].notes, self.views["score"].clicked
        view.set_notes(notes, places=(rows, columns))
        try:
            save_page(
                path,
                [self.views["map"], view],
                controls=[
                    Control("index", "class", HELP["class"], options=tuple(self.class_menu.options)),
                    Control("opacity", "opacity", HELP["opacity"], step=0.05),
                ],
                linked=("index", "opacity", "clicked"),
                title=title,
                note=f"Click a picture. This page knows the ledgers of {rows} × {columns} pixels; the nearest answers.",
            )
        finally:
            with view.hold_sync():
                view.places, view.notes, view.clicked = [1, 1], kept, clicked

    def close(self) -> None:
        """Take the ledger off the page and give its memory back."""
        self._output = self._masks = self.ledger = None
        super().close()


@torch.no_grad()
def read_maps(scores: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Go through all class scores once and keep what a person can see of them.

    Args:
        scores: [K, H, W]

    Returns:
        The class of every pixel, uint8 [H, W]; and the scores of a pixel in the middle of each cell of a grid,
        float32 [K, h, w].
    """
    height, width = scores.size
    rows, columns = (_cell_centres(edge) for edge in scores.size)
    labels, kept = np.empty((height, width), np.uint8), []
    for where, strip in scores.strips():
        labels[where] = strip.max(0).indices.cpu().numpy()
        here = [row - where.start for row in rows if where.start <= row < where.stop]
        kept.append(strip[:, here][:, :, columns].cpu().numpy())
    return labels, np.concatenate(kept, axis=1)


def note_of(ledger: Ledger, labels: Labels, count: int | None = None) -> Caption:
    """A pixel's account as a table: its strongest classes as columns, the queries as rows, and the sum.

    Args:
        ledger: the account.
        labels: names of the classes.
        count: list this many queries and add up the others; by default list all that give anything to be seen.
    """
    scores, shares = ledger.scores, ledger.shares
    columns = np.argsort(-scores, kind="stable")[:COLUMNS]
    seen = int((shares[:, columns].max(axis=1) >= VISIBLE).sum())
    largest = np.argsort(-shares[:, columns].max(axis=1), kind="stable")[: seen if count is None else count]
    listed = sorted(largest.tolist(), key=lambda query: -shares[query, ledger.label])
    others = np.setdiff1d(np.arange(len(shares)), listed)

    def numbers(values: np.ndarray) -> tuple[str, ...]:
        return tuple(f"{value:.4f}" for value in values[columns])

    rows = [(f"query {query}", f"{ledger.mask_probabilities[query]:.3f}", *numbers(shares[query])) for query in listed]
    if len(others):
        rows.append((f"{len(others)} others together", "", *numbers(shares[others].sum(axis=0))))
    rows.append(("sum: the score on the map", "", *numbers(scores)))
    header = (("", HELP["query"]), ("mask", HELP["mask"]))
    names = tuple((labels[k][0], f"p({labels[k][0]} | query) · p(pixel | query)") for k in columns)
    return Caption(
        text=f"Pixel ({ledger.x}, {ledger.y}): {labels[ledger.label][0]}",
        table=Table((*header, *names), tuple(rows), marked=(len(rows) - 1,)),
    )


def _cell_centres(edge: int) -> list[int]:
    count = min(edge, MAX_CELLS)
    return [math.floor((i + 0.5) * edge / count) for i in range(count)]
