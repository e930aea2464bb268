"""A tool on a page, in JupyterLab or saved, and whether it shows what numpy computes.

    screen = ToolScreen(page, ".m2f-pixel-ledger", twin)    # twin: the same tool, made in the test's own process
    twin.views["score"].index = 3                           # what should be shown
    screen.expect_picture("score")

Places are (u, v) in 0…1 of a picture. A click lands within a CSS pixel of its place.
"""

from __future__ import annotations

import base64
import time
from pathlib import Path

import numpy as np
from explorer_screen import READ_CANVAS, read_canvas
from notebook_page import NotebookPage
from playwright.sync_api import Locator, Page, expect

from m2f_lab.explore.parts.drawing import composite
from m2f_lab.explore.parts.mask_grid import MaskGrid
from m2f_lab.explore.parts.tool import Tool
from m2f_lab.explore.sampling.trace import SamplingPoints
from m2f_lab.explore.sampling.views import ASKS, LEVELS

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts" / "tools"
TIMEOUT = 10  # seconds until a picture must be there
GAP, TEXT = 6, 14  # CSS pixels between thumbnails, and of the line below one

READ_TABLE = "(table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))"


class ToolScreen:
    """The pictures of a tool on a page, and the twin whose views say what should be on them.

    Attributes:
        box: the tool.
        names: of the pictures there, thumbnails apart; by default all of the twin's.
        images: the canvases without masks, at the size at which they are drawn; see `remember_images`.
    """

    def __init__(self, page: Page, selector: str, twin: Tool, names: list[str] | None = None) -> None:
        self.page, self.selector, self.twin = page, selector, twin
        self.box = page.locator(selector)
        self.images: dict[str, np.ndarray] = {}
        grids = {name for name, view in twin.views.items() if isinstance(view, MaskGrid)}
        self.names = [name for name in twin.views if name not in grids] if names is None else names
        expect(self.box.locator(".m2f-canvas[data-drawn]")).to_have_count(len(self.names))
        expect(self.box.locator(".m2f-grid-canvas[data-drawn]")).to_have_count(len(grids))

    # ---------------------------------------------------------------------------------------------------- what is there

    def view(self, name: str) -> Locator:
        """A picture with all that is written around it."""
        return self.box.locator(".m2f-maskview").nth(self.names.index(name))

    def canvas(self, name: str) -> Locator:
        return self.view(name).locator(".m2f-canvas")

    @property
    def grid(self) -> Locator:
        return self.box.locator(".m2f-grid-canvas")

    def caption(self, name: str) -> Locator:
        return self.view(name).locator("> .m2f-caption")

    def table(self, name: str) -> list[list[str]]:
        """Below the picture, of what it shows; header first."""
        return self.view(name).locator("> .m2f-table").evaluate(READ_TABLE)

    def note(self, name: str) -> list[list[str]]:
        """Below the picture, of the place that was clicked; header first."""
        return self.view(name).locator(".m2f-place-note .m2f-table").evaluate(READ_TABLE)

    def dots(self, name: str) -> np.ndarray:
        """What is drawn over the picture. uint8 [H, W, 4]"""
        width, height, text = self.view(name).locator(".m2f-dots").evaluate(READ_CANVAS)
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)

    def drawn(self, name: str) -> str | None:
        """ "stack,index,channel" """
        return self.canvas(name).get_attribute("data-drawn")

    def keep(self, name: str) -> None:
        """A screenshot for whoever looks at the artefacts of a test run."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(1, 1)  # no tip in the picture
        size = self.page.viewport_size
        self.page.set_viewport_size({"width": size["width"], "height": 1600})  # all of it
        self.box.screenshot(path=str(ARTEFACTS / f"{name}.png"))
        self.page.set_viewport_size(size)

    # ---------------------------------------------------------------------------------------------------- what it shows

    def remember_images(self, notebook: NotebookPage, slider: str, percent: int) -> None:
        """Read the pictures while their masks are hidden.

        Args:
            notebook: the page.
            slider: CSS class of the slider for the opacity.
            percent: what it shows at the start, and again afterwards.
        """
        readout = self.box.locator(f".{slider} .widget-readout")
        notebook.press(f"{self.selector} .{slider}", "Home")
        expect(readout).to_have_text("0%")
        self.page.wait_for_timeout(50)
        self.images = {name: read_canvas(self.canvas(name)) for name in self.names}
        notebook.press(f"{self.selector} .{slider}", "ArrowRight", times=percent // 5)
        expect(readout).to_have_text(f"{percent}%")

    def expected(self, name: str, mask: np.ndarray | None = None, table: np.ndarray | None = None) -> np.ndarray:
        """What should be on a canvas: what the twin's view shows, or another mask or other colours in its place."""
        view = self.twin.views[name]
        return composite(
            self.images[name],
            view.mask if mask is None else mask,
            np.frombuffer(view.table, np.uint8).reshape(256, 4) if table is None else table,
            opacity=view.opacity,
            threshold=view.threshold,
            contour=view.contour,
            smooth=view.smooth,
            coverage=tuple(view.coverage),
        )

    def expect_picture(self, name: str, mask: np.ndarray | None = None, table: np.ndarray | None = None) -> np.ndarray:
        """Wait until a canvas shows what numpy computes. Returns what it shows.

        Raises:
            AssertionError: more than two in a thousand pixels differ after ten seconds.
        """
        expected, deadline = self.expected(name, mask, table).astype(int), time.monotonic() + TIMEOUT
        while True:
            shown = read_canvas(self.canvas(name))
            wrong = (np.abs(shown - expected).max(axis=-1) > 2).mean()
            if wrong < 0.002:
                return shown
            assert time.monotonic() < deadline, f"{name}: {wrong:.1%} of the pixels differ from what numpy computes"
            self.page.wait_for_timeout(30)

    # ---------------------------------------------------------------------------------------------- what a person does

    def position(self, name: str, u: float, v: float) -> dict[str, float]:
        """A place in CSS pixels of the canvas."""
        self.canvas(name).scroll_into_view_if_needed()
        box = self.canvas(name).bounding_box()
        return {"x": u * box["width"], "y": v * box["height"]}

    def click(self, name: str, u: float, v: float) -> None:
        self.canvas(name).click(position=self.position(name, u, v))

    def click_pixel(self, name: str, x: int, y: int) -> None:
        """Click the middle of a pixel of the image."""
        width, height = self.twin.views[name].image_size
        self.click(name, (x + 0.5) / width, (y + 0.5) / height)

    def hover(self, name: str, u: float, v: float) -> str:
        """Point at a place; returns what the tip says."""
        self.canvas(name).hover(position=self.position(name, u, v))
        return self.view(name).locator(".m2f-tip:visible").inner_text()

    def drag(self, name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the button at one place and let it go at another."""
        self.canvas(name).scroll_into_view_if_needed()
        box = self.canvas(name).bounding_box()
        ends = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in (start, end)]
        self.page.mouse.move(*ends[0])
        self.page.mouse.down()
        self.page.mouse.move(*ends[1], steps=6)
        self.page.mouse.up()

    def click_thumbnail(self, place: int) -> None:
        """Click the middle of a thumbnail, counted as they are sorted."""
        view = next(view for view in self.twin.views.values() if isinstance(view, MaskGrid))
        self.grid.scroll_into_view_if_needed()
        width = self.grid.bounding_box()["width"]
        columns = max(1, int((width + GAP) // (view.thumbnail + GAP)))
        tile = int((width + GAP) // columns) - GAP
        height = round(tile * view.image_size[1] / view.image_size[0])
        x = place % columns * (tile + GAP) + tile / 2
        y = place // columns * (height + TEXT + GAP) + height / 2
        self.grid.click(position={"x": x, "y": y})

    def sort(self, name: str) -> None:
        """Press one of the buttons above the thumbnails."""
        self.box.locator(".m2f-sort", has_text=name).click()
        expect(self.box.locator(".m2f-sort-chosen")).to_have_text(name)


def wrong_dots(shown: np.ndarray, sampled: SamplingPoints, layer: int, heads: list[int]) -> str:
    """What is wrong with the dots on a picture; nothing, where they are those of these heads.

    Args:
        shown: uint8 [H, W, 4]
    """
    size, (height, width) = np.array(shown.shape[1::-1]), shown.shape[:2]
    points = [(sampled.points[layer, h] * size, sampled.weights[layer, h], LEVELS) for h in heads]
    centres = np.concatenate([p.reshape(-1, 2) for p, *_ in points] + [sampled.location[None] * size])
    weights = np.concatenate([w.ravel() for _, w, _ in points] + [[ASKS]])
    colors = [color for _ in heads for _, color in LEVELS for _ in range(sampled.weights.shape[-1])] + ["#000000"]
    radius = 1.5 + 17 * np.sqrt(weights)
    rows, columns = np.mgrid[:height, :width] + 0.5
    away = np.hypot(columns[..., None] - centres[:, 0], rows[..., None] - centres[:, 1]) - radius  # (H, W, dots)
    nearest = away.min(axis=-1)
    if shown[nearest < -1, 3].min() < 150:
        return "a dot is missing"
    if shown[nearest > 2, 3].any():
        return "there is a dot where none should be"
    alone = (np.sort(away, axis=-1)[..., 1] > 2) & (nearest < -1.5)
    for color, seen in zip(np.array(colors)[away[alone].argmin(axis=-1)], shown[alone, :3], strict=True):
        if np.abs(seen.astype(int) - [int(color[i : i + 2], 16) for i in (1, 3, 5)]).max() > 6:
            return f"a dot is {seen} instead of {color}"
    return "" if alone.sum() > 20 else "no dot stands alone"
