"""Time that explorers take to answer, measured in JupyterLab in a real browser.

    python -m benchmarks.explorers

An image of 512 × 512 pixels, a small model of 100 queries and ten predictions. From the key, click or slider's move to
the end of drawing of every picture that changes, by the browser's own clock; what only the browser does does not wait
for a frame of the screen. Median and 90th percentile of 20. Appends the table to benchmarks/results/explorers.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))  # the tests' own way to drive JupyterLab

from jupyter_lab import notebook_of, serve_lab, start_browser  # noqa: E402
from notebook_page import NotebookPage  # noqa: E402

REPEATS, WARM_UP = 20, 10
SETUP = """\
import numpy as np
import torch
from m2f_lab import QueryExplorer, explore, recipes
from m2f_lab.scenes import draw_street
from m2f_lab.model import build_model

torch.manual_seed(0)
recipe = recipes.debug_tiny().vary(model=dict(num_queries=100, num_decoder_layers=9))
model = build_model(recipe.model)
scene = draw_street(0, (512, 512))
image = scene.image"""

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
RUN_AGAIN = """async (count) => {
    const panel = window.jupyterapp.shell.currentWidget;
    await panel.sessionContext.session.kernel.requestExecute({ code: 'explorer.close()' }).done;
    await new Promise((done) => setTimeout(done, 1000));
    const begun = performance.now();
    panel.content.activeCellIndex = 1;
    const all = () => [...document.querySelectorAll('.m2f-canvas, .m2f-grid-canvas')], old = new Set(all());
    window.jupyterapp.commands.execute('notebook:run-cell');
    for (;;) {
        await new Promise((done) => setTimeout(done, 5));
        const fresh = all().filter((canvas) => !old.has(canvas));
        if (fresh.length >= count && fresh.every((canvas) => canvas.dataset.frames)) break;
    }
    return performance.now() - begun;
}"""
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

    def times(
        self, action: Callable[[int], None], count: int = 1, which: str = PICTURES, kernel: bool = False
    ) -> list[float]:
        """Milliseconds until the last of so many pictures was redrawn, each time the action is done.

        Where the kernel answers, pictures are redrawn twice: the last drawing within two seconds counts.
        """
        taken = []
        for i in range(-WARM_UP if not kernel else 0, REPEATS):
            self.page.wait_for_timeout(150)
            self.page.evaluate("() => m2f.drawn.clear()")
            action(i)
            self.page.wait_for_function(DRAWN, arg=[which, count])
            if kernel:
                self.page.wait_for_timeout(2000)
            taken.append(self.page.evaluate(TAKEN, [which]))
        return taken[-REPEATS:]

    def key(self, selector: str, *keys: str) -> Callable[[int], None]:
        def press(i: int) -> None:
            self.page.locator(selector).first.focus()
            self.page.keyboard.press(keys[i % len(keys)])

        return press

    def click(self, selector: str = PICTURES) -> Callable[[int], None]:
        def click(i: int) -> None:
            picture = self.page.locator(selector).first
            box = picture.bounding_box()
            x, y = (0.1 + 0.8 * ((0.37 * i) % 1)) * box["width"], (0.1 + 0.8 * ((0.61 * i) % 1)) * box["height"]
            picture.click(position={"x": x, "y": y})

        return click

    def press(self, *selectors: str) -> Callable[[int], None]:
        return lambda i: self.page.locator(selectors[i % len(selectors)]).click()

    def first_display(self, count: int) -> list[float]:
        """Close the tool and run its cell again: from the start of the cell until all its pictures stand."""
        return [self.page.evaluate(RUN_AGAIN, count) for _ in range(REPEATS)]


def main() -> None:
    table = Table("explorers", ("interaction", "median ms", "90th percentile ms", "target ms"))

    def add(name: str, taken: list[float], target: float) -> None:
        percentile = statistics.quantiles(taken, n=10)[-1]
        table.add(name, f"{statistics.median(taken):.1f}", f"{percentile:.1f}", f"{target:.0f}")

    with tempfile.TemporaryDirectory() as home, serve_lab(Path(home)) as lab, start_browser() as browser:

        @contextmanager
        def show(cell: str) -> Iterator[Screen]:
            """A tool in a notebook of its own."""
            name = f"{len(table.rows)}.ipynb"
            lab.add(name, notebook_of(SETUP, cell))
            page = NotebookPage(browser.new_page(viewport={"width": 1500, "height": 1400}), name)
            page.open(lab.url)
            page.run_all()
            yield Screen(page)
            page.close()

        with show("explorer = QueryExplorer(model, image)\nexplorer") as screen:
            add("next query", screen.times(screen.key(PICTURES, "ArrowRight"), 3), 16)
            up_and_down = screen.key(PICTURES, "ArrowDown", "ArrowUp")
            add("next layer", screen.times(up_and_down, 3), 16)
            add("next layer: 100 thumbnails follow", screen.times(up_and_down, which=THUMBNAILS), 100)
            add("attention head", screen.times(screen.key(PICTURES, "1", "2"), 3), 16)
            opacity = screen.key(".m2f-opacity-slider .noUi-handle", "ArrowLeft", "ArrowRight")
            add("opacity", screen.times(opacity, 3), 16)
            add("first display of a QueryExplorer", screen.first_display(5), 2000)
        with show("explore.PixelLedger(model, image)") as screen:
            add("PixelLedger: click a pixel", screen.times(screen.click(), kernel=True), 100)
        with show("explore.SamplingViewer(model, image)") as screen:
            add("SamplingViewer: click a place", screen.times(screen.click(), kernel=True), 100)
        with show("explore.MatchingInspector(model, image, np.minimum(scene.class_ids, 18))") as screen:
            matrix = ".m2f-views ~ .m2f-maskview .m2f-canvas"
            add("MatchingInspector: click a cell", screen.times(screen.click(matrix), kernel=True), 100)
        with show("tool = explore.CounterfactualExplorer(model, image)\ntool.layer = 5\ntool") as screen:
            mute_and_undo = screen.press(".m2f-mute", ".m2f-undo")
            add("CounterfactualExplorer: mute from layer 5, undo", screen.times(mute_and_undo, kernel=True), 300)
    table.finish()


if __name__ == "__main__":
    main()
