"""Two notebooks as a reader has them: everything is drawn and trained in the browser, then the explorer is used.

What should be on the screen is computed here, from the weights and scenes that the notebook has left on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from explorer_screen import ExplorerScreen, inner_cell, read_canvas, screen_in
from notebook_page import TIMEOUT, NotebookPage, OpenNotebook
from PIL import Image
from playwright.sync_api import expect

from m2f_lab.data import open_dataset
from m2f_lab.explore import QueryExplorer
from m2f_lab.training.run import Run

if TYPE_CHECKING:
    from jupyter_lab import Lab


@dataclass(frozen=True)
class Case:
    """What a notebook trains and shows; folders as it names them, relative to its own."""

    name: str
    run: str
    scenes: str
    index: int  # of the validation scene in the explorer
    last: int  # the last layer, which the explorer shows at first


CASES = (
    Case("00_quickstart.ipynb", "../runs/00_quickstart", "../data/scenes/quickstart", index=0, last=3),
    Case("07_attention_and_queries.ipynb", "../runs/07_attention_and_queries", "../data/scenes/queries", 1, last=6),
)


def twin_of(case: Case, lab: Lab) -> QueryExplorer:
    run = Run(lab.notebooks / case.run)
    assert run.finished
    scene = open_dataset("cityscapes", lab.notebooks / case.scenes, "val")[case.index]
    return QueryExplorer(run.model().to("cuda" if torch.cuda.is_available() else "cpu"), scene.image)


def place_of(twin: QueryExplorer, query: int) -> int:
    return int(np.flatnonzero(twin.order == query)[0])


def expect_scene(screen: ExplorerScreen) -> None:
    """Below the masks is the validation scene: how browsers enlarge images is not exact, scenes differ by far more."""
    for kind, shown in screen.images.items():
        size = (shown.shape[1], shown.shape[0])
        scene = np.asarray(Image.fromarray(screen.twin.image).resize(size, Image.Resampling.BILINEAR))
        assert np.abs(shown.astype(int) - scene).mean() < 4, kind


def change_layer_and_query(case: Case, notebook: NotebookPage, screen: ExplorerScreen) -> None:
    menu = notebook.page.locator(".m2f-query-menu select option:checked")
    screen.expect_drawn(case.last, 0)
    before = read_canvas(screen.canvas("mask"))
    middle = case.last // 2
    notebook.drag_slider(".m2f-layer-slider", middle / case.last)
    expect(notebook.page.locator(".m2f-layer-slider .widget-readout")).to_have_text(str(middle))
    screen.expect_drawn(middle, 0)
    assert (read_canvas(screen.canvas("mask")) != before).any()
    notebook.press(".m2f-query-slider", "ArrowRight", times=2)
    screen.expect_drawn(middle, 2)
    expect(menu).to_contain_text(f"query {screen.twin.order[2]} · ")
    notebook.page.locator(".m2f-head-menu select").select_option("head 2")
    screen.expect_drawn(middle, 2, channel=2)


def click_winners(case: Case, notebook: NotebookPage, screen: ExplorerScreen) -> None:
    """In the last layer, click where the two queries that win most pixels have won."""
    notebook.page.locator(".m2f-head-menu select").select_option(index=0)
    notebook.drag_slider(".m2f-layer-slider", 1.0)
    winners = screen.twin.trace.winners
    won = np.bincount(winners.ravel())
    for query in np.argsort(-won)[:2].tolist():
        screen.click("mask", *inner_cell(winners == query))
        screen.expect_drawn(case.last, place_of(screen.twin, query))
        expect(notebook.page.locator(".m2f-maskview > .m2f-caption").first).to_contain_text(f"Query {query}, ")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:2])
def test_a_notebook_trains_and_its_explorer_shows_the_model(case: Case, lab: Lab, open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(case.name, run=False)
    notebook.run_all(timeout=3 * TIMEOUT)  # a minute of training on two cores, and there are slower ones
    screen = screen_in(notebook, twin_of(case, lab))
    expect_scene(screen)
    change_layer_and_query(case, notebook, screen)
    click_winners(case, notebook, screen)
