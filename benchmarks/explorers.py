"""How long explorers take to answer, measured in JupyterLab in a real browser.

    python -m benchmarks.explorers

An image of 512 × 512 pixels, a small model of 100 queries and ten predictions. From the key, click or slider's move to
the end of drawing of every picture that changes, by the browser's own clock; what only the browser does does not wait
for a frame of the screen. Median and 90th percentile of 20. Appends the table to benchmarks/results/explorers.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))  # the tests' own way to drive JupyterLab

from jupyter_lab import notebook_of, serve_lab, start_browser  # noqa: E402
from notebook_page import NotebookPage  # noqa: E402

REPEATS = 20
SETUP = """\
import numpy as np
import torch
from m2f_lab import recipes
from m2f_lab.data.scenes import draw_street
from m2f_lab.explore import PixelLedger, QueryExplorer
from m2f_lab.model import build_model

torch.manual_seed(0)
recipe = recipes.debug_tiny().vary(model=dict(num_queries=100, num_decoder_layers=9))
model = build_model(recipe.model)
image = draw_street(0, (512, 512)).image"""

# When something happens, note the time; when a picture was drawn, note the time again.
WATCH = """() => {
    window.m2f = { begun: 0, drawn: new Map() };
    const begin = (event) => { if (event.isTrusted) { m2f.begun = event.timeStamp; m2f.drawn.clear(); } };
    for (const kind of ['keydown', 'pointerdown', 'click', 'change']) window.addEventListener(kind, begin, true);
    const seen = new MutationObserver((changes) => {
        for (const change of changes) m2f.drawn.set(change.target, performance.now());
    });
    for (const canvas of document.querySelectorAll('canvas[data-frames]')) {
        seen.observe(canvas, { attributes: true, attributeFilter: ['data-frames'] });
    }
}"""
TIMES = "[...m2f.drawn].filter(([canvas]) => canvas.matches(which)).map(([, time]) => time)"
DRAWN = f"([which, count]) => {TIMES}.length >= count"
TAKEN = f"([which]) => Math.max(...{TIMES}) - m2f.begun"
PICTURES, THUMBNAILS = ".m2f-canvas", ".m2f-grid-canvas"


class Screen:
    """One tool in a notebook, and the time it takes to react."""

    def __init__(self, page: NotebookPage) -> None:
        self.page = page.page
        self.page.wait_for_function(
            "() => document.querySelectorAll('canvas[data-frames]').length && "
            "!document.querySelector('.m2f-canvas:not([data-frames]), .m2f-grid-canvas:not([data-frames])')"
        )
        self.page.evaluate(WATCH)

    def times(self, action: Callable[[int], None], count: int, which: str = PICTURES) -> list[float]:
        """Milliseconds until so many pictures were redrawn, each time the action is done."""
        taken = []
        for i in range(REPEATS):
            self.page.wait_for_timeout(150)
            self.page.evaluate("() => m2f.drawn.clear()")
            action(i)
            self.page.wait_for_function(DRAWN, arg=[which, count])
            taken.append(self.page.evaluate(TAKEN, [which]))
        return taken

    def key(self, selector: str, *keys: str) -> Callable[[int], None]:
        def press(i: int) -> None:
            self.page.locator(selector).first.focus()
            self.page.keyboard.press(keys[i % len(keys)])

        return press

    def click(self, selector: str) -> Callable[[int], None]:
        def click(i: int) -> None:
            picture = self.page.locator(selector).first
            box = picture.bounding_box()
            x, y = (0.1 + 0.8 * ((0.37 * i) % 1)) * box["width"], (0.1 + 0.8 * ((0.61 * i) % 1)) * box["height"]
            picture.click(position={"x": x, "y": y})

        return click


def main() -> None:
    table = Table("explorers", ("interaction", "median ms", "90th percentile ms", "target ms"))

    def add(name: str, taken: list[float], target: float) -> None:
        percentile = statistics.quantiles(taken, n=10)[-1]
        table.add(name, f"{statistics.median(taken):.1f}", f"{percentile:.1f}", f"{target:.0f}")

    with tempfile.TemporaryDirectory() as home, serve_lab(Path(home)) as lab, start_browser() as browser:

        def show(name: str, *cells: str) -> NotebookPage:
            lab.add(f"{name}.ipynb", notebook_of(SETUP, *cells))
            page = NotebookPage(browser.new_page(viewport={"width": 1500, "height": 1400}), f"{name}.ipynb")
            page.open(lab.url)
            page.run_all()
            return page

        page = show("queries", "explorer = QueryExplorer(model, image)\nexplorer")
        screen, large = Screen(page), ".m2f-maskview .m2f-canvas"
        add("next query", screen.times(screen.key(large, "ArrowRight"), 3), 16)
        up_and_down = screen.key(large, "ArrowDown", "ArrowUp")
        add("next layer", screen.times(up_and_down, 3), 16)
        add("next layer: 100 thumbnails follow", screen.times(up_and_down, 1, THUMBNAILS), 100)
        add("attention head", screen.times(screen.key(large, "1", "2"), 3), 16)
        opacity = ".m2f-opacity-slider .noUi-handle"
        add("opacity", screen.times(screen.key(opacity, "ArrowLeft", "ArrowRight"), 3), 16)
        add("first display, one run", first_display(page), 2000)
        page.close()
    table.finish()


def first_display(page: NotebookPage) -> list[float]:
    """Run the explorer's cell again: from the start of the cell until every picture stands."""
    taken = []
    for _ in range(5):
        taken.append(
            page.page.evaluate("""async () => {
                const begun = performance.now();
                const panel = window.jupyterapp.shell.currentWidget;
                panel.content.activeCellIndex = 1;
                const old = new Set(document.querySelectorAll('.m2f-canvas, .m2f-grid-canvas'));
                window.jupyterapp.commands.execute('notebook:run-cell');
                for (;;) {
                    await new Promise((done) => setTimeout(done, 5));
                    const fresh = [...document.querySelectorAll('.m2f-canvas, .m2f-grid-canvas')].filter(
                        (canvas) => !old.has(canvas));
                    if (fresh.length >= 4 && fresh.every((canvas) => canvas.dataset.frames)) break;
                }
                return performance.now() - begun;
            }""")
        )
    return taken


if __name__ == "__main__":
    main()
