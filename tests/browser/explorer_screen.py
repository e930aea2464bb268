"""A QueryExplorer on a page, in JupyterLab or saved, and whether it shows what numpy computes.

screen = screen_in(notebook, twin)    # twin: the same explorer, made in the test's own process
notebook.drag_slider(".m2f-layer-slider", 1.0)
screen.expect_drawn(layer=3, place=0)
"""

from __future__ import annotations

import base64

import numpy as np
from notebook_page import NotebookPage
from playwright.sync_api import Locator, Page, expect

from m2f_lab.explore import QueryExplorer
from m2f_lab.explore.parts.drawing import composite

EXPLORER = ".m2f-query-explorer"
KINDS = ("mask", "before", "blocked", "attention")

READ_CANVAS = """(canvas) => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let text = '';
    for (let i = 0; i < data.length; i += 8192) text += String.fromCharCode(...data.subarray(i, i + 8192));
    return [canvas.width, canvas.height, btoa(text)];
}"""


def read_canvas(canvas: Locator) -> np.ndarray:
    """What is on a canvas. uint8 [H, W, 3]"""
    width, height, text = canvas.evaluate(READ_CANVAS)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)[..., :3]


class ExplorerScreen:
    """The four pictures of an explorer on a page, and the twin that knows what should be on them.

    A query is named by its place in `twin.order`, a channel is 0 for the mean of the heads, then the heads from 1.

    Attributes:
        images: the canvases without masks, at the size at which they are drawn; see `remember_images`.
    """

    def __init__(self, page: Page, twin: QueryExplorer, selector: str = EXPLORER) -> None:
        self.page, self.twin, self.box = page, twin, page.locator(selector)
        self.images: dict[str, np.ndarray] = {}
        expect(self.box.locator(".m2f-canvas[data-drawn]")).to_have_count(len(KINDS))

    def canvas(self, kind: str) -> Locator:
        return self.box.locator(".m2f-canvas").nth(KINDS.index(kind))

    def remember_images(self) -> None:
        """To be called while the opacity is zero."""
        self.images = {kind: read_canvas(self.canvas(kind)) for kind in KINDS}

    def expect_drawn(self, layer: int, place: int, channel: int = 0, opacity: float = 0.7) -> None:
        """Wait until this was drawn, then compare every pixel with what numpy computes."""
        for kind in KINDS:
            view = self.twin.views[kind]
            view.stack, view.index, view.channel = layer, place, channel
            shown = channel if kind == "attention" and layer > 0 else 0  # the others have but one
            expect(self.canvas(kind)).to_have_attribute("data-drawn", f"{layer},{place},{shown}")
            expected = composite(
                self.images[kind],
                view.mask,
                np.frombuffer(view.table, np.uint8).reshape(256, 4),
                opacity=opacity,
                contour=view.contour,
                smooth=view.smooth,
                coverage=tuple(view.coverage),
            )
            wrong = np.abs(read_canvas(self.canvas(kind)).astype(int) - expected).max(axis=-1) > 2
            assert wrong.mean() < 0.002, f"{kind}: {wrong.mean():.1%} of the pixels differ from what numpy computes"

    def click(self, kind: str, row: int, column: int) -> None:
        """Click the middle of a cell of the grid on which winners are known."""
        rows, columns = self.twin.trace.winners.shape
        box = self.canvas(kind).bounding_box()
        x, y = (column + 0.5) / columns * box["width"], (row + 0.5) / rows * box["height"]
        self.canvas(kind).click(position={"x": x, "y": y})

    def hover(self, kind: str, u: float, v: float) -> str:
        """Point at a place given in 0…1; returns what the tip says."""
        box = self.canvas(kind).bounding_box()
        self.canvas(kind).hover(position={"x": u * box["width"], "y": v * box["height"]})
        return self.box.locator(".m2f-tip:visible").inner_text()


def screen_in(notebook: NotebookPage, twin: QueryExplorer) -> ExplorerScreen:
    """The one QueryExplorer of a notebook; its images are remembered, and the opacity is as at the start."""
    screen = ExplorerScreen(notebook.page, twin)
    readout = screen.box.locator(".m2f-opacity-slider .widget-readout")
    notebook.press(f"{EXPLORER} .m2f-opacity-slider", "Home")
    expect(readout).to_have_text("0%")
    screen.remember_images()
    notebook.press(f"{EXPLORER} .m2f-opacity-slider", "ArrowRight", times=14)
    expect(readout).to_have_text("70%")
    return screen


def inner_cell(area: np.ndarray) -> tuple[int, int]:
    """A cell whose neighbours all belong to the area, too: clicks are exact to a pixel only."""
    inside = np.pad(area, 1)
    height, width = area.shape
    shifts = [(y, x) for y in range(3) for x in range(3)]
    surrounded = np.all([inside[y : y + height, x : x + width] for y, x in shifts], axis=0)
    row, column = np.argwhere(surrounded)[0]
    return int(row), int(column)
