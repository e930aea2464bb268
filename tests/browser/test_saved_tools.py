"""Tools saved as pages, opened from disk by a browser without a network: they scrub, hover and answer clicks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explorer_screen import read_canvas
from playwright.sync_api import Browser, Page, expect
from tool_screen import ToolScreen, wrong_dots
from tools_notebook import CELLS, made_here

from m2f_lab.explore import Mute
from m2f_lab.explore.pixels.ledger import ledger_at

TOOLS = tuple(name for name in CELLS if name != "query-explorer")  # test_explorers.py has that one


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return made_here(*TOOLS)


OpenSaved = Callable[..., ToolScreen]


@pytest.fixture
def saved(here: dict[str, Any], browser: Browser, tmp_path: Path) -> Iterator[OpenSaved]:
    """Save a tool, and open its page. Once the test is over, the page must not have failed or asked for anything."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, offline=True)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))

    def open_(name: str, names: list[str] | None = None) -> ToolScreen:
        here[name].save_html(tmp_path / "tool.html")
        page.goto((tmp_path / "tool.html").as_uri())
        return ToolScreen(page, "#m2f-views", here[name], names)

    yield open_
    assert errors == []
    assert requests, "nothing was opened"
    assert [url for url in requests if not url.startswith(("file:", "blob:"))] == []
    context.close()


def move_range(page: Page, trait: str, value: float) -> None:
    page.locator(f"input[data-trait={trait}]").fill(str(value))


def choose(page: Page, trait: str, index: int) -> None:
    page.locator(f"select[data-trait={trait}]").select_option(index=index)


def hide_masks(screen: ToolScreen, percent: float) -> None:
    """Read the pictures while their masks are hidden."""
    move_range(screen.page, "opacity", 0)
    screen.page.wait_for_timeout(50)
    screen.images = {name: read_canvas(screen.canvas(name)) for name in screen.names}
    move_range(screen.page, "opacity", percent)


def test_a_saved_ledger(saved: OpenSaved, here: dict[str, Any]) -> None:
    screen = saved("pixel-ledger")
    hide_masks(screen, 0.7)
    for label in (2, 4):
        choose(screen.page, "index", label)
        screen.twin.views["score"].index = label
        screen.expect_picture("score")
        expect(screen.caption("score")).to_have_text(screen.twin.classes.names[label])
    assert re.fullmatch(r"x \d+, y \d+ · score \d\.\d\d", screen.hover("score", 0.3, 0.3))
    assert re.search(r"· (road|house|sky|tree|car)$", screen.hover("map", 0.3, 0.3))
    model, names = here["model"], screen.twin.classes.names
    with torch.inference_mode():
        output = model(torch.from_numpy(here["image"]).permute(2, 0, 1)[None])
    for view, (row, column) in (("map", (12, 5)), ("score", (3, 17))):  # of the page's 20 × 20 places
        screen.click(view, (column + 0.5) / 20, (row + 0.5) / 20)
        account = ledger_at(output, int((column + 0.5) * 150 / 20), int((row + 0.5) * 90 / 20))
        note = screen.view("score").locator(".m2f-place-note .m2f-caption")
        expect(note).to_have_text(f"Pixel ({account.x}, {account.y}): {names[account.label]}")
        (_, _, *classes), *_, total = screen.note("score")
        assert total[2:] == [f"{account.scores[names.index(name)]:.4f}" for name in classes]


def test_a_saved_counterfactual(saved: OpenSaved, here: dict[str, Any]) -> None:
    tool = here["counterfactuals"]
    tool.apply(Mute(int(tool.order[0]), 1))
    screen = saved("counterfactuals", ["result"])  # one picture, of everything
    pictures = []
    for state in range(3):
        choose(screen.page, "index", state)
        expect(screen.canvas("result")).to_have_attribute("data-drawn", f"0,{state},0")
        pictures.append(read_canvas(screen.canvas("result")))
    assert all((a != b).any(axis=-1).mean() > 0.01 for a, b in zip(pictures, [*pictures[1:], pictures[0]], strict=True))
    expect(screen.caption("result")).to_contain_text(f"{tool.change.num_changed} of 13500 pixels changed")
    x, y = np.argwhere(tool.change.changed)[50][::-1].tolist()
    old, new = (tool.replay.classes.names[labels[y, x]] for labels in (tool.change.before, tool.change.after))
    assert screen.hover("result", (x + 0.5) / 150, (y + 0.5) / 90) == f"x {x}, y {y} · {old} → {new}"
    screen.canvas("result").focus()
    screen.page.keyboard.press("ArrowLeft")
    expect(screen.canvas("result")).to_have_attribute("data-drawn", "0,1,0")
    assert np.array_equal(read_canvas(screen.canvas("result")), pictures[1])


def test_a_saved_matching(saved: OpenSaved) -> None:
    screen = saved("matching-inspector")
    trace, names = screen.twin.trace, screen.twin.names
    for prediction, segment, term in ((0, 2, 0), (2, 1, 3)):
        move_range(screen.page, "stack", prediction)
        choose(screen.page, "index", segment)
        choose(screen.page, "channel", term)
        expect(screen.canvas("matrix")).to_have_attribute("data-drawn", f"{prediction},{segment},{term}")
        expect(screen.canvas("choice")).to_have_attribute("data-drawn", f"{prediction},{segment},0")
        query = trace.chosen[prediction, segment]
        expect(screen.caption("choice")).to_contain_text(f"segment {names[segment]} got query {query}.")
    u, v = screen.twin.cells.center(0, 5)
    found = float(re.search(r"([\d.]+) above", screen.hover("matrix", u, v))[1])
    dice = trace.terms["dice"][2, :, 0]
    step = float(np.ptp(trace.terms["dice"][2], axis=0).max()) / 253  # costs are shown as one of so many steps
    assert found == pytest.approx(float(dice[5] - dice.min()), abs=step + 0.005)
    screen.click("matrix", u, v)
    expect(screen.caption("choice")).to_contain_text(f"segment {names[0]} got query {trace.chosen[2, 0]}.")
    expect(screen.page.locator("select[data-trait=index]")).to_have_value("0")


def test_a_saved_sampling(saved: OpenSaved) -> None:
    screen = saved("sampling-viewer")
    move_range(screen.page, "stack", 0)
    choose(screen.page, "channel", 3)
    screen.click("after", 4.5 / 12, 6.5 / 9)  # a cell of the page's grid of places
    for name, trace in screen.twin.traces.items():
        expect(screen.canvas(name)).to_have_attribute("data-drawn", "0,0,3")
        assert wrong_dots(screen.dots(name), trace.at((4.5 / 12, 6.5 / 9), 8), 0, [2]) == ""
        expect(screen.view(name).locator(".m2f-place-note .m2f-caption")).to_contain_text("of stride 8 reads ")
    plain = read_canvas(screen.canvas("before"))
    move_range(screen.page, "opacity", 0.8)
    expect(screen.page.locator("input[data-trait=opacity] + output")).to_have_text("80 %")
    assert (read_canvas(screen.canvas("before")) != plain).any(axis=-1).mean() > 0.5
    reach = screen.twin.traces["before"].distance_maps(1)[2, 5, 9] / np.hypot(90, 150)
    tip = screen.hover("before", 9.5 / 20 * 160 / 150, 5.5 / 12 * 96 / 90)
    found = float(re.search(r"reads ([\d.]+) % of the diagonal away", tip)[1]) / 100
    assert found == pytest.approx(float(reach), rel=0.03)


def test_a_saved_gallery(saved: OpenSaved) -> None:
    screen = saved("biography-gallery")
    biographies = screen.twin.biographies
    hide_masks(screen, 0.75)
    screen.sort("size")
    screen.click_thumbnail(0)
    largest = int(np.argsort(-biographies.mean_size, kind="stable")[0])
    for query in (largest, biographies.heat[:, 8, 8].argmax()):
        expect(screen.caption("heat")).to_contain_text(f"Query {query} wins ")
        expect(screen.grid).to_have_attribute("data-drawn", f"0,{query},size")
        screen.twin.views["heat"].index = int(query)
        screen.expect_picture("heat")
        rows, columns = biographies.heat.shape[1:]
        screen.click("heat", 8.5 / columns, 8.5 / rows)  # chooses who claims that place
    assert re.fullmatch(r"x \d+, y \d+ · claimed to [\d.]+ %", screen.hover("heat", 0.4, 0.4))
