"""The tools in a real browser: what they show after a click, a key or a slider is what numpy computes."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from explorer_screen import inner_cell
from jupyter_lab import notebook_of
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import expect
from tool_screen import ToolScreen, wrong_dots
from tools_notebook import CELLS, SETUP, made_here

from m2f_lab.explore.matching.trace import MatchingTrace, trace_matching
from m2f_lab.explore.parts.drawing import label_table, to_uint8
from m2f_lab.explore.pixels.ledger import ledger_at
from m2f_lab.explore.sampling.trace import STRIDES
from m2f_lab.inference import postprocess
from m2f_lab.loss import Criterion
from m2f_lab.structures import Output, Target

TOOLS = ("pixel-ledger", "query-explorer", "matching-inspector", "sampling-viewer", "biography-gallery")


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """The same models and tools as the notebook's, in this process."""
    return made_here(*TOOLS)


@pytest.fixture(scope="module")
def notebook(open_notebook: OpenNotebook) -> NotebookPage:
    return open_notebook("tools.ipynb", notebook=notebook_of(SETUP, *(CELLS[name] for name in TOOLS)))


def screen_of(name: str, notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    return ToolScreen(notebook.page, f".m2f-{name}", here[name])


def names_of(here: dict[str, Any]) -> tuple[str, ...]:
    return here["model"].classes.names


def output_of(here: dict[str, Any], **options) -> Output:
    tensor = torch.from_numpy(here["image"]).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return here["model"](tensor, **options)


# -------------------------------------------------------------------------------------------------------- PixelLedger


@pytest.fixture(scope="module")
def ledger(notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    screen = screen_of("pixel-ledger", notebook, here)
    screen.remember_images(notebook, "m2f-opacity-slider", 70)
    return screen


def expect_account(screen: ToolScreen, here: dict[str, Any], x: int, y: int) -> None:
    """The table below the score is the account of this pixel, within the pixel of a click."""
    caption = screen.view("score").locator(".m2f-place-note .m2f-caption")
    expect(caption).to_contain_text(f"Pixel ({x}, {y}): ")
    account = ledger_at(output_of(here), x, y)
    expect(caption).to_contain_text(names_of(here)[account.label])
    (_, _, *names), *rows, last = screen.note("score")
    classes = [names_of(here).index(name) for name in names]
    assert classes[0] == account.label == account.scores.argmax()
    assert last == ["sum: the score on the map", "", *(f"{account.scores[k]:.4f}" for k in classes)]
    listed = [int(row[0].split()[1]) for row in rows if row[0].startswith("query ")]
    assert len(listed) >= 2
    for query, (_, mask, *shares) in zip(listed, rows, strict=False):
        assert mask == f"{account.mask_probabilities[query]:.3f}"
        assert shares == [f"{account.shares[query, k]:.4f}" for k in classes]
    others = np.setdiff1d(np.arange(len(account.shares)), listed)
    assert len(rows) - len(listed) == (len(others) > 0)
    if len(others):
        sums = account.shares[others].sum(axis=0)
        assert rows[-1] == [f"{len(others)} others together", "", *(f"{sums[k]:.4f}" for k in classes)]


def test_the_ledger_shows_maps(ledger: ToolScreen) -> None:
    views = ledger.twin.views
    ledger.expect_picture("map", ledger.twin.label_map, label_table(ledger.twin.classes))
    views["score"].index = int(np.bincount(ledger.twin.label_map.ravel()).argmax())
    ledger.expect_picture("score")


def test_a_click_opens_the_account_of_a_pixel(ledger: ToolScreen, here: dict[str, Any]) -> None:
    scores = postprocess.semantic(output_of(here), return_scores=True).scores
    first, second, third = (divmod(int(scores[k].argmax()), 150)[::-1] for k in (0, 2, 3))
    for view, (x, y) in (("map", first), ("map", second), ("score", third)):
        ledger.click_pixel(view, x, y)
        expect_account(ledger, here, x, y)
        pin = ledger.view("map").locator(".m2f-pin").bounding_box()  # whichever picture was clicked
        box = ledger.canvas("map").bounding_box()
        assert (pin["x"] + pin["width"] / 2 - box["x"]) / box["width"] == pytest.approx((x + 0.5) / 150, abs=0.005)
        assert (pin["y"] + pin["height"] / 2 - box["y"]) / box["height"] == pytest.approx((y + 0.5) / 90, abs=0.005)
        ledger.twin.views["score"].index = ledger_at(output_of(here), x, y).label
        ledger.expect_picture("score")
    ledger.keep("pixel-ledger")


def test_the_class_menu_changes_the_heat(ledger: ToolScreen) -> None:
    pictures = []
    for label in (1, 3):
        ledger.box.locator(".m2f-class-menu select").select_option(index=label)
        ledger.twin.views["score"].index = label
        pictures.append(ledger.expect_picture("score"))
        expect(ledger.caption("score")).to_have_text(ledger.twin.classes.names[label])
    assert (pictures[0] != pictures[1]).any(axis=-1).mean() > 0.1


# ------------------------------------------------------------------------------------------------ the grid of queries


@pytest.fixture(scope="module")
def explorer(notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    screen = screen_of("query-explorer", notebook, here)
    screen.remember_images(notebook, "m2f-opacity-slider", 70)
    return screen


def expect_query(screen: ToolScreen, place: int) -> None:
    """Slider, menu, caption and the large picture show this query, named by its place in the order of scores."""
    query = screen.twin.order[place]
    expect(screen.grid).to_have_attribute("data-drawn", re.compile(rf"^3,{place},"))
    expect(screen.caption("mask")).to_contain_text(f"Query {query}, ")
    expect(screen.box.locator(".m2f-query-menu select option:checked")).to_contain_text(f"query {query} · ")
    expect(screen.box.locator(".m2f-query-slider .noUi-handle")).to_have_attribute("aria-valuenow", f"{place}.0")
    screen.twin.views["mask"].stack, screen.twin.views["mask"].index = 3, place
    screen.expect_picture("mask")


def test_a_thumbnail_opens_its_query(explorer: ToolScreen) -> None:
    for place in (7, 2):
        explorer.click_thumbnail(place)
        expect_query(explorer, place)
    explorer.keep("query-explorer")


def test_thumbnails_are_sorted(explorer: ToolScreen) -> None:
    trace, order = explorer.twin.trace, explorer.twin.order
    area = (trace.masks[-1] > 0.5).mean(axis=(1, 2))
    likeliest = trace.class_probabilities[-1].argmax(axis=1)
    explorer.sort("area")
    explorer.click_thumbnail(0)
    largest = int(area[order].argmax())
    expect_query(explorer, largest)
    explorer.grid.press("ArrowRight")  # to the next as they are sorted
    expect_query(explorer, int(np.argsort(-area[order], kind="stable")[1]))
    explorer.sort("class")
    explorer.click_thumbnail(0)
    expect_query(explorer, int(likeliest[order].argmin()))
    explorer.sort("score")
    explorer.click_thumbnail(0)
    expect_query(explorer, 0)


def test_the_threshold_cuts_masks(explorer: ToolScreen, notebook: NotebookPage) -> None:
    soft = explorer.expect_picture("mask")
    notebook.press(".m2f-query-explorer .m2f-threshold-slider", "ArrowRight", times=8)
    expect(explorer.box.locator(".m2f-threshold-slider .widget-readout")).to_have_text("40%")
    explorer.twin.views["mask"].threshold = 0.4
    cut = explorer.expect_picture("mask")
    assert (cut != soft).any()
    notebook.press(".m2f-query-explorer .m2f-threshold-slider", "Home")
    explorer.twin.views["mask"].threshold = 0
    assert np.array_equal(explorer.expect_picture("mask"), soft)


# --------------------------------------------------------------------------------------------------- MatchingInspector


@pytest.fixture(scope="module")
def inspector(notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    screen = screen_of("matching-inspector", notebook, here)
    screen.remember_images(notebook, "m2f-opacity-slider", 100)
    screen.images["matrix"] = screen.twin.cells.canvas()  # it is shown pixel by pixel, and cells hide it
    return screen


@pytest.fixture(scope="module")
def matched(here: dict[str, Any]) -> MatchingTrace:
    """What the matcher does with the last model, from the library alone."""
    target = Target.from_label_map(torch.from_numpy(here["truth"].astype(np.int64)))
    return trace_matching(output_of(here), target, Criterion(5).matcher)


def expect_match(screen: ToolScreen, matched: MatchingTrace, prediction: int, segment: int, cost: str = "sum") -> None:
    """Words, terms and pictures are of the query that the matcher gave to this segment."""
    query = matched.chosen[prediction, segment]
    name = f"{segment} {screen.twin.names[segment].split()[1]}"
    when = f"layer {prediction}: " if prediction else ": "
    expect(screen.caption("choice")).to_contain_text(f"{when}segment {name} got query {query}.")
    terms = [f"{matched.terms[term][prediction, query, segment]:.3f}" for term in matched.terms]
    assert [str(query), *terms, f"{matched.cost[prediction, query, segment]:.3f}", "choice"] in screen.table("choice")
    marked = screen.view("choice").locator("> .m2f-table .m2f-marked td").first
    expect(marked).to_have_text(str(query))
    channel = ("sum", *matched.terms).index(cost)
    for view in screen.twin.views.values():
        view.stack, view.index, view.channel = prediction, segment, channel if view.num_channels > 1 else 0
    for view in screen.twin.views:
        screen.expect_picture(view)


def test_a_cell_of_the_matrix_lays_its_query_over_its_segment(inspector: ToolScreen, matched: MatchingTrace) -> None:
    last = matched.num_predictions - 1
    expect_match(inspector, matched, last, 0)
    for segment, query in ((2, int(matched.chosen[last, 0])), (1, 9)):
        inspector.click("matrix", *inspector.twin.cells.center(segment, query))
        inspector.twin.query = query  # the kernel's part: the second picture is of this query
        expect_match(inspector, matched, last, segment)
        selects = inspector.box.locator(".m2f-segment-menu select, .m2f-other-query-menu select")
        expect(selects.locator("option:checked")).to_have_text(
            [f"segment {inspector.twin.names[segment]}", f"query {query}"]
        )
        cost = matched.cost[last, query, segment]
        expect(inspector.caption("rival")).to_contain_text(f"Query {query} would cost {cost:.3f} here.")
    inspector.keep("matching-inspector")


def test_predictions_are_matched_one_by_one(
    inspector: ToolScreen, matched: MatchingTrace, notebook: NotebookPage
) -> None:
    assert len(set(matched.chosen[:, 1].tolist())) > 1
    notebook.press(".m2f-matching-inspector .m2f-prediction-slider", "Home")
    expect_match(inspector, matched, 0, 1)
    inspector.canvas("choice").focus()
    for prediction in range(1, matched.num_predictions):
        notebook.page.keyboard.press("ArrowUp")
        expect_match(inspector, matched, prediction, 1)
    notebook.page.keyboard.press("ArrowLeft")
    expect_match(inspector, matched, matched.num_predictions - 1, 0)
    inspector.box.locator(".m2f-term-menu select").select_option("dice")
    expect_match(inspector, matched, matched.num_predictions - 1, 0, cost="dice")


# ------------------------------------------------------------------------------------------------------ SamplingViewer


@pytest.fixture(scope="module")
def sampling(notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    return screen_of("sampling-viewer", notebook, here)


def expect_dots(
    screen: ToolScreen, pixel: tuple[int, int], layer: int, heads: range = range(4), stride: int = STRIDES[-1]
) -> None:
    """In all pictures are the dots of this place."""
    x, y = pixel
    for name, trace in screen.twin.traces.items():
        sampled, deadline = trace.at(((x + 0.5) / 150, (y + 0.5) / 90), stride), time.monotonic() + 10
        while wrong := wrong_dots(screen.dots(name), sampled, layer, list(heads)):
            assert time.monotonic() < deadline, f"{name}: {wrong}"
            screen.page.wait_for_timeout(30)


def test_a_click_shows_what_the_position_reads(sampling: ToolScreen) -> None:
    expect_dots(sampling, (75, 45), layer=1)
    for name, pixel in (("before", (40, 24)), ("after", (116, 60))):
        sampling.click_pixel(name, *pixel)
        expect_dots(sampling, pixel, layer=1)
        note = sampling.view(name).locator(".m2f-place-note .m2f-caption")
        row, column = pixel[1] // 8, pixel[0] // 8
        expect(note).to_contain_text(f"row {row}, column {column} of stride 8 reads ")
    sampling.keep("sampling-viewer")


def test_layers_heads_and_levels_of_sampling_points(sampling: ToolScreen, notebook: NotebookPage) -> None:
    sampling.click_pixel("before", 60, 36)
    sampling.canvas("before").focus()
    notebook.page.keyboard.press("2")
    expect_dots(sampling, (60, 36), layer=1, heads=range(1, 2))
    expect(sampling.box.locator(".m2f-head-menu select option:checked")).to_have_text("head 2")
    notebook.page.keyboard.press("ArrowDown")
    expect_dots(sampling, (60, 36), layer=0, heads=range(1, 2))
    notebook.page.keyboard.press("0")
    expect_dots(sampling, (60, 36), layer=0)
    notebook.press(".m2f-sampling-viewer .m2f-layer-slider", "End")
    expect_dots(sampling, (60, 36), layer=1)
    sampling.box.locator(".m2f-level-menu select").select_option("stride 32: coarse")
    expect_dots(sampling, (60, 36), layer=1, stride=32)


# ---------------------------------------------------------------------------------------------------- BiographyGallery


@pytest.fixture(scope="module")
def gallery(notebook: NotebookPage, here: dict[str, Any]) -> ToolScreen:
    screen = screen_of("biography-gallery", notebook, here)
    screen.remember_images(notebook, "m2f-opacity-slider", 75)
    return screen


def expect_biography(screen: ToolScreen, query: int) -> None:
    expect(screen.grid).to_have_attribute("data-drawn", re.compile(rf"^0,{query},"))
    expect(screen.caption("heat")).to_contain_text(f"Query {query} wins ")
    screen.twin.views["heat"].index = query
    screen.expect_picture("heat", to_uint8(screen.twin.biographies.heat[query], relative=True)[0])


def test_the_gallery_is_sorted_and_opens_queries(gallery: ToolScreen) -> None:
    biographies = gallery.twin.biographies
    by_wins, by_size = np.argsort(-biographies.wins, kind="stable"), np.argsort(-biographies.mean_size, kind="stable")
    gallery.sort("size")
    gallery.click_thumbnail(0)
    expect_biography(gallery, int(by_size[0]))
    gallery.sort("number")
    gallery.click_thumbnail(7)
    expect_biography(gallery, 7)
    gallery.grid.press("ArrowLeft")
    expect_biography(gallery, 6)
    gallery.sort("wins")
    gallery.click_thumbnail(1)
    expect_biography(gallery, int(by_wins[1]))
    gallery.keep("biography-gallery")


def test_a_click_on_the_heat_chooses_who_claims_the_place(gallery: ToolScreen) -> None:
    claims = gallery.twin.biographies.heat.argmax(axis=0)
    for query in np.argsort(-np.bincount(claims.ravel()))[:2].tolist():
        row, column = inner_cell(claims == query)
        gallery.click("heat", (column + 0.5) / claims.shape[1], (row + 0.5) / claims.shape[0])
        expect_biography(gallery, query)
