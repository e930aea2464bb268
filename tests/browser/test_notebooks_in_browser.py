"""Two notebooks as a reader has them: everything is drawn and trained in the browser, then the tools are used.

What should be on the screen is computed here, from the weights and scenes that the notebook has left on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from explorer_screen import EXPLORER, ExplorerScreen, inner_cell, read_canvas, screen_in
from notebook_page import TIMEOUT, NotebookPage, OpenNotebook
from PIL import Image
from playwright.sync_api import expect
from tool_screen import ToolScreen

from m2f_lab.data import Sample, open_dataset
from m2f_lab.explore import CounterfactualExplorer, Mute, PixelExplorer, QueryExplorer
from m2f_lab.model import Mask2Former
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


def model_of(case: Case, lab: Lab) -> Mask2Former:
    run = Run(lab.notebooks / case.run)
    assert run.finished
    return run.model().to("cuda" if torch.cuda.is_available() else "cpu")


def scene_of(case: Case, lab: Lab) -> Sample:
    return open_dataset("cityscapes", lab.notebooks / case.scenes, "val")[case.index]


def twin_of(case: Case, lab: Lab) -> QueryExplorer:
    return QueryExplorer(model_of(case, lab), scene_of(case, lab).image)


def place_of(twin: QueryExplorer, query: int) -> int:
    return int(np.flatnonzero(twin.order == query)[0])


def expect_scene(screen: ExplorerScreen) -> None:
    """Below the masks is the validation scene: how browsers enlarge images is not exact, scenes differ by far more."""
    for kind, shown in screen.images.items():
        size = (shown.shape[1], shown.shape[0])
        scene = np.asarray(Image.fromarray(screen.twin.image).resize(size, Image.Resampling.BILINEAR))
        assert np.abs(shown.astype(int) - scene).mean() < 4, kind


def change_layer_and_query(case: Case, notebook: NotebookPage, screen: ExplorerScreen) -> None:
    menu = screen.box.locator(".m2f-query-menu select option:checked")
    notebook.press(f"{EXPLORER} .m2f-layer-slider", "End")
    notebook.press(f"{EXPLORER} .m2f-query-slider", "Home")
    screen.expect_drawn(case.last, 0)
    before = read_canvas(screen.canvas("mask"))
    middle = case.last // 2
    notebook.drag_slider(f"{EXPLORER} .m2f-layer-slider", middle / case.last)
    expect(screen.box.locator(".m2f-layer-slider .widget-readout")).to_have_text(str(middle))
    screen.expect_drawn(middle, 0)
    assert (read_canvas(screen.canvas("mask")) != before).any()
    notebook.press(f"{EXPLORER} .m2f-query-slider", "ArrowRight", times=2)
    screen.expect_drawn(middle, 2)
    expect(menu).to_contain_text(f"query {screen.twin.order[2]} · ")
    screen.box.locator(".m2f-head-menu select").select_option("head 2")
    screen.expect_drawn(middle, 2, channel=2)


def click_winners(case: Case, notebook: NotebookPage, screen: ExplorerScreen) -> None:
    """In the last layer, click where the two queries that win most pixels have won."""
    screen.box.locator(".m2f-head-menu select").select_option(index=0)
    notebook.drag_slider(f"{EXPLORER} .m2f-layer-slider", 1.0)
    winners = screen.twin.trace.winners
    won = np.bincount(winners.ravel())
    for query in np.argsort(-won)[:2].tolist():
        screen.click("mask", *inner_cell(winners == query))
        screen.expect_drawn(case.last, place_of(screen.twin, query))
        expect(screen.box.locator(".m2f-maskview > .m2f-caption").first).to_contain_text(f"Query {query}, ")


def press_keys(case: Case, notebook: NotebookPage, screen: ExplorerScreen) -> None:
    """On the large picture, which was clicked last."""
    place = int(screen.canvas("mask").get_attribute("data-drawn").split(",")[1])
    away = -1 if place else 1
    notebook.page.keyboard.press("ArrowLeft" if place else "ArrowRight")
    screen.expect_drawn(case.last, place + away)
    notebook.page.keyboard.press("ArrowDown")
    notebook.page.keyboard.press("1")
    screen.expect_drawn(case.last - 1, place + away, channel=1)
    notebook.page.keyboard.press("0")


def ask_pixels(notebook: NotebookPage, ledger: PixelExplorer) -> None:
    """The table of a clicked pixel is the account that is computed here, and so is that of the next one."""
    screen = ToolScreen(notebook.page, ".m2f-pixel-ledger", ledger)
    for x, y in ((40, 40), (200, 100)):
        screen.click_pixel("map", x, y)
        account = ledger.choose(x, y)
        expect(screen.view("score").locator(".m2f-place-note .m2f-caption")).to_contain_text(f"Pixel ({x}, {y})")
        expected = [list(row) for row in ledger.views["score"].notes[0][0]["table"]["rows"]]
        assert screen.note("score")[1:] == expected
        assert float(expected[-1][2]) == pytest.approx(account.scores.max(), abs=0.0001)


def mute_a_query(notebook: NotebookPage, what_if: CounterfactualExplorer) -> None:
    """Take all edits back, mute the query that wins the road, and look at the result."""
    screen = ToolScreen(notebook.page, ".m2f-counterfactuals", what_if)
    screen.box.locator(".m2f-reset").click()
    expect(screen.box.locator(".m2f-reset")).to_be_disabled()
    screen.remember_images(notebook, "m2f-opacity-slider", 70)
    before = screen.expect_picture("result", what_if.change.before)
    query = what_if.winner(128, 110)
    screen.box.locator(".m2f-query-menu select").select_option(index=int(np.flatnonzero(what_if.order == query)[0]))
    notebook.drag_slider(".m2f-counterfactuals .m2f-layer-slider", 0.0)
    screen.box.locator(".m2f-mute").click()
    expect(screen.box.locator(".m2f-edits")).to_contain_text(f"query {query}: muted from layer 1 on")
    what_if.apply(Mute(query))
    assert what_if.change.num_changed > 100
    after = screen.expect_picture("result", what_if.change.after)
    assert (after != before).any()
    expect(screen.caption("difference")).to_contain_text(f"{what_if.change.num_changed} of ")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:2])
def test_a_notebook_trains_and_its_explorer_shows_the_model(case: Case, lab: Lab, open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(case.name, run=False)
    notebook.run_all(timeout=3 * TIMEOUT)  # a minute of training on two cores, and there are slower ones
    screen = screen_in(notebook, twin_of(case, lab))
    expect_scene(screen)
    change_layer_and_query(case, notebook, screen)
    click_winners(case, notebook, screen)
    press_keys(case, notebook, screen)
    if case.name.startswith("07"):
        model, scene = model_of(case, lab), scene_of(case, lab)
        ask_pixels(notebook, PixelExplorer(model, scene.image))
        mute_a_query(notebook, CounterfactualExplorer(model, scene.image, truth=scene.label_map))
