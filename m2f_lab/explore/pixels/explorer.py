"""PixelExplorer: click a pixel and read where its score comes from, query by query.

Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from m2f_lab import explore
from m2f_lab.data.colors import in_bytes
from m2f_lab.explore.parts import controls as ui
from m2f_lab.explore.parts.drawing import label_table
from m2f_lab.explore.parts.labels import Labels, class_labels, known_classes
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.reading import Model, check_numbers, nearest_cells
from m2f_lab.explore.parts.table import Caption, Table
from m2f_lab.explore.parts.tool import ImageTool
from m2f_lab.explore.pixels.ledger import Ledger, ledger_at, mask_probability_rows
from m2f_lab.inference.postprocess import semantic_rows
from m2f_lab.inference.predict import look
from m2f_lab.inference.rows import Rows

COLUMNS = 4  # a table shows this many classes, those with the highest scores
ROWS = 8  # queries in a figure, and in the tables of a saved page
VISIBLE = 0.00005  # smaller shares would be printed as zero
MAX_CELLS = 128  # maps of scores have at most this many cells along each edge
PAGE_PLACES = 20  # a saved page knows the ledgers on a grid of at most this many places along each edge

HELP = {
    "map": "The class with the highest score at every pixel. Click a pixel to see which query gave how much to it.",
    "score": "The score of one class: the sum over all queries of p(class | query) · p(pixel | query). It may exceed "
    "1, and the scores of all classes need not add up to 1.",
    "class": "The class whose score is shown as heat.",
    "query": "The number of the query. The queries that give most to the winning class come first.",
    "mask": "p(pixel | query): how probable it is that the pixel belongs to the query's mask.",
}


class PixelExplorer(ImageTool):
    """Click a pixel: a table lists what every query gives to its score, class by class.

        PixelExplorer(model, "street.png")

    After a click, left and right arrows change the class whose score is shown.

    Attributes:
        label_map: the class of every pixel. uint16 [H, W]
        ledger: of the pixel that was clicked last; None before that.
    """

    TITLE = "Where a pixel's score comes from"
    LINKED = ("clicked",)
    HELD = ("_output", "_masks", "ledger")

    ledger: Ledger | None = None

    def _read(self, models: dict[str, Model], edges: dict[str, int | None]) -> None:
        (model,) = models.values()
        size = self.image.shape[0], self.image.shape[1]
        self._output = look(model, self.image, **edges)
        check_numbers(self._output)
        self._masks = mask_probability_rows(self._output, size=size)
        self.classes = known_classes(self.classes, self._output.num_classes)
        self.labels = class_labels(self.classes, len(self.classes))
        self.label_map, self._scores = read_maps(semantic_rows(self._output).resized(size))

    def _build(self) -> None:
        names, (shown, legend) = self.classes.names, in_bytes(self.label_map, self.classes)
        common = {"width": self.width, "pinned": True, "group": f"pixels-{id(self)}"}
        views = {
            "map": MaskView(
                self.image, shown[None], colors=label_table(legend), names=legend.names, num_masks=len(names),
                title="The class of every pixel", help=HELP["map"], **common,
            ),
            "score": MaskView(
                self.image, self._scores, colors="heat", relative=True, smooth=False, title="The score of one class",
                help=HELP["score"], readout="score {value}", unit="score", captions=[[Caption(n) for n in names]],
                **common,
            ),
        }  # fmt: skip
        self._scores = None  # the picture holds them
        present = np.bincount(self.label_map.ravel(), minlength=len(names))
        options = [(name, k) for k, name in enumerate(names)]
        self.class_menu = ui.menu("class-menu", "class", options, HELP["class"], value=int(present.argmax()))
        self.opacity_slider = ui.opacity_slider(0.7)
        self._assemble(
            [ui.controls(self.class_menu, self.opacity_slider), ui.pictures(*views.values())],
            views,
            name="pixel-ledger",
            counts=f"{self._output.masks[-1].num_queries} queries",
            moves=[ui.Moves("index", self.class_menu), ui.Moves("opacity", self.opacity_slider)],
            links=[((views["map"], "clicked"), (views["score"], "clicked"))],
        )
        for view in views.values():
            view.on_click(self.choose)

    def _ledger_at(self, x: int, y: int) -> Ledger:
        return ledger_at(self._output, x, y, masks=self._masks)

    def choose(self, x: int, y: int) -> Ledger:
        """Open the account of a pixel, as a click does.

        Raises:
            TypeError: x or y is no whole number.
            ValueError: the pixel is outside the image.
        """
        if self.ledger is not None and (self.ledger.x, self.ledger.y) == (x, y):
            return self.ledger  # both pictures tell of the same click
        with torch.inference_mode():
            self.ledger = self._ledger_at(x, y)
        self.class_menu.value = self.ledger.label
        self.views["score"].set_notes([[note_of(self.ledger, self.labels)]])
        for view in self.views.values():
            view.clicked = [x, y]
        return self.ledger

    def figure(self, x: int | None = None, y: int | None = None) -> explore.plots.Figure:
        """A static figure: the map, and bars of what the queries give to the pixel's classes.

        Args:
            x, y: the pixel; by default the one that was clicked last, or the middle of the image.
        """
        if x is None or y is None:
            height, width = self.label_map.shape
            x, y = (self.ledger.x, self.ledger.y) if self.ledger else (width // 2, height // 2)
        shares = self._ledger_at(x, y).shares
        return explore.plots.pixel_ledger(self.image, self.label_map, self.classes, shares, (x, y), count=ROWS)

    @property
    def _page_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the pixels whose ledgers a saved page knows."""
        return tuple(nearest_cells(min(PAGE_PLACES, edge), edge) for edge in self.label_map.shape)

    def _page_note(self) -> str:
        rows, columns = map(len, self._page_places)
        return f"Click a picture. This page knows the ledgers of {rows} × {columns} pixels; the nearest answers."

    def save_html(self, path: str | Path, title: str | None = None) -> None:
        """Write one self-contained page, as `Tool.save_html` does; the second picture tells the ledgers of the page."""
        rows, columns = self._page_places
        notes = [[note_of(self._ledger_at(x, y), self.labels, ROWS)] for y in rows.tolist() for x in columns.tolist()]
        view = self.views["score"]
        kept, clicked = view.notes, view.clicked
        view.set_notes(notes, places=(len(rows), len(columns)))
        try:
            super().save_html(path, title)
        finally:
            with view.hold_sync():
                view.places, view.notes, view.clicked = [1, 1], kept, clicked


@torch.no_grad()
def read_maps(scores: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Go through all class scores once and keep as much of them as a screen shows.

    Args:
        scores: [K, H, W]

    Returns:
        The class of every pixel, uint16 [H, W]; and the scores of a pixel in the middle of each cell of a grid,
        float32 [K, h, w].
    """
    height, width = scores.size
    rows, columns = (nearest_cells(min(edge, MAX_CELLS), edge) for edge in scores.size)
    labels, kept = np.empty((height, width), np.uint16), []
    for where, strip in scores.strips():
        labels[where] = strip.max(0).indices.cpu().numpy()
        here = rows[(rows >= where.start) & (rows < where.stop)] - where.start
        kept.append(strip[:, here.tolist()][:, :, columns.tolist()].cpu().numpy())
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
