"""The CounterfactualExplorer in a real browser: every edit's result is what Replay computes in this process."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from jupyter_lab import notebook_of
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import expect
from tool_screen import ToolScreen
from tools_notebook import CELLS, SETUP, made_here

from m2f_lab.explore import Mute, PaintAttention, Replay
from m2f_lab.explore.parts.drawing import label_table

NAME = "counterfactuals"
HEARD = """\
hidden = counterfactuals.views["hidden"]
heard = ipywidgets.Label("brush 0").add_class("t-brush")
stroke = ipywidgets.Label().add_class("t-stroke")
hidden.observe(lambda change: setattr(heard, "value", f"brush {hidden.brush}"), "brush")
hidden.observe(lambda change: setattr(stroke, "value", json.dumps(change["new"])), "stroke")
ipywidgets.HBox([heard, stroke])"""
FOG = (74, 80, 94, 215)  # over what did not change
LAYER = 3  # of 12 × 20 cells, the finest grid


@pytest.fixture(scope="module")
def twin() -> Any:
    return made_here(NAME)[NAME]


@pytest.fixture(scope="module")
def notebook(open_notebook: OpenNotebook) -> NotebookPage:
    return open_notebook("counterfactuals.ipynb", notebook=notebook_of(SETUP, CELLS[NAME], HEARD))


@pytest.fixture(scope="module")
def screen(notebook: NotebookPage, twin: Any) -> ToolScreen:
    screen = ToolScreen(notebook.page, f".m2f-{NAME}", twin)
    screen.remember_images(notebook, "m2f-opacity-slider", 70)
    return screen


@pytest.fixture
def query(screen: ToolScreen, notebook: NotebookPage) -> int:
    """Without edits, the query that wins most pixels is chosen, and the finest layer."""
    winners = [screen.twin.winner(x, y) for y in range(2, 90, 6) for x in range(2, 150, 6)]
    query = int(np.bincount(winners).argmax())
    press(screen, "reset")
    notebook.press(f".m2f-{NAME} .m2f-layer-slider", "End")
    screen.box.locator(".m2f-query-menu select").select_option(index=place_of(screen, query))
    expect(screen.canvas("hidden")).to_have_attribute("data-drawn", f"{LAYER - 1},{place_of(screen, query)},0")
    return query


def place_of(screen: ToolScreen, query: int) -> int:
    return int(np.flatnonzero(screen.twin.order == query)[0])


def press(screen: ToolScreen, name: str) -> None:
    """A button, if it can be pressed."""
    button = screen.box.locator(f".m2f-{name}")
    if button.is_enabled():
        button.click()
        if name == "reset":
            expect(button).to_be_disabled()


def expect_result(screen: ToolScreen, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Pictures and table tell of these label maps. Returns the picture of the result."""
    classes = screen.twin.replay.classes
    colors = label_table(classes)
    result = screen.expect_picture("result", after, colors)
    moved = colors.copy()
    moved[: len(classes), 3], moved[255] = 235, FOG
    screen.expect_picture("difference", np.where(before == after, 255, after).astype(np.uint8), moved)
    changed = int((before != after).sum())
    expect(screen.caption("difference")).to_contain_text(f"{changed} of {before.size} pixels changed")
    shares = [np.bincount(labels.ravel(), minlength=len(classes)) / before.size for labels in (before, after)]
    shown = {}
    for name, *numbers in screen.table("difference")[1:]:
        found = [re.sub(r"[^\d.+−]", "", number).replace("−", "-") for number in numbers]
        shown[name] = [float(number) for number in found]
    present = [k for k in range(len(classes)) if shares[0][k] or shares[1][k]]
    assert sorted(shown) == sorted(classes.names[k] for k in present)
    for k in present:
        expected = [100 * shares[0][k], 100 * shares[1][k], 100 * (shares[1][k] - shares[0][k])]
        assert shown[classes.names[k]] == pytest.approx(expected, abs=0.0501), classes.names[k]
    return result


def labels_of(replay: Replay, *edits) -> np.ndarray:
    return replay.label_map(replay.run(edits, attention_weights=False))


def test_a_muted_query_changes_the_result_until_undone(screen: ToolScreen, notebook: NotebookPage, query: int) -> None:
    replay = screen.twin.replay
    before, muted = labels_of(replay), labels_of(replay, Mute(query, 2))
    assert (before != muted).mean() > 0.1
    first = expect_result(screen, before, before)
    undo, redo = (screen.box.locator(f".m2f-{name}") for name in ("undo", "redo"))
    notebook.press(f".m2f-{NAME} .m2f-layer-slider", "ArrowLeft")
    expect(screen.canvas("hidden")).to_have_attribute("data-drawn", re.compile("^1,"))
    screen.box.locator(".m2f-mute").click()
    second = expect_result(screen, before, muted)
    expect(screen.box.locator(".m2f-status")).to_have_text(re.compile(r"\d+ ms"))
    expect(screen.box.locator(".m2f-edits li")).to_have_text(re.compile(rf"query {query}\b.*layer 2"))
    screen.keep("counterfactuals")
    screen.box.locator(".m2f-state button", has_text="before").click()
    assert np.array_equal(screen.expect_picture("result", before, label_table(replay.classes)), first)
    screen.box.locator(".m2f-state button", has_text="now").click()
    undo.click()
    assert np.array_equal(expect_result(screen, before, before), first)
    expect(screen.box.locator(".m2f-edits li")).to_have_count(0)
    redo.click()
    assert np.array_equal(expect_result(screen, before, muted), second)
    expect(redo).to_be_disabled()


def choose_brush(screen: ToolScreen, name: str, brush: int) -> None:
    screen.box.locator(".m2f-brush button", has_text=name).click()
    expect(screen.page.locator(".t-brush")).to_have_text(f"brush {brush}")


def expect_stroke(screen: ToolScreen, place: int, value: int, cells: set[tuple[int, int]]) -> None:
    """The kernel was told exactly of these cells."""
    expected = [LAYER - 1, place, 0, value, *sorted(row * 20 + column for row, column in cells)]
    heard: list[int] = []
    for _ in range(100):
        _, *heard = json.loads(screen.page.locator(".t-stroke").inner_text() or "[0]")
        heard[4:] = sorted(heard[4:])
        if heard == expected:
            return
        screen.page.wait_for_timeout(30)
    raise AssertionError(f"The kernel heard of {heard} instead of {expected}.")


def cell(screen: ToolScreen, row: int, column: int) -> tuple[float, float]:
    """The middle of a cell on the picture, 0…1. The 12 × 20 cells cover the padding, too."""
    across, down = screen.twin.replay.coverage
    return (column + 0.5) / 20 * across, (row + 0.5) / 12 * down


def hidden_picture(screen: ToolScreen, place: int, blocked: np.ndarray) -> np.ndarray:
    view = screen.twin.views["hidden"]
    view.stack, view.index = LAYER - 1, place
    return screen.expect_picture("hidden", blocked.astype(np.uint8) * 255)


def test_strokes_of_the_brush_hide_and_show_cells(screen: ToolScreen, notebook: NotebookPage, query: int) -> None:
    replay, place = screen.twin.replay, place_of(screen, query)
    before, blocked = labels_of(replay), replay.hidden(LAYER, query)
    assert replay.grid(LAYER) == (12, 20)
    first = hidden_picture(screen, place, blocked)

    notebook.press(f".m2f-{NAME} .m2f-radius-slider", "Home")  # half a cell: what the pointer is on, nothing else
    choose_brush(screen, "hide", 1)
    screen.drag("hidden", cell(screen, 5, 3), cell(screen, 5, 14))
    expect_stroke(screen, place, 255, {(5, column) for column in range(3, 15)})
    painted = blocked.copy()
    painted[5, 3:15] = True
    hidden_picture(screen, place, painted)
    expect_result(screen, before, labels_of(replay, PaintAttention(LAYER, query, painted)))
    expect(screen.caption("hidden")).to_contain_text(f"{painted.sum()} of 240 cells hidden")

    notebook.press(f".m2f-{NAME} .m2f-radius-slider", "ArrowRight", times=4)
    expect(screen.box.locator(".m2f-radius-slider .widget-readout")).to_have_text("2.5")
    choose_brush(screen, "show", -1)
    screen.click("hidden", *cell(screen, 6, 9))
    disc = {(6 + r, 9 + c) for r in range(-2, 3) for c in range(-2, 3) if r * r + c * c <= 2.5**2}
    assert len(disc) == 21
    expect_stroke(screen, place, 0, disc)
    painted[tuple(zip(*disc, strict=True))] = False
    hidden_picture(screen, place, painted)
    after = labels_of(replay, PaintAttention(LAYER, query, painted))
    assert (after != before).any()
    expect_result(screen, before, after)
    screen.keep("counterfactuals-painted")

    choose_brush(screen, "choose", 0)
    press(screen, "reset")
    assert np.array_equal(hidden_picture(screen, place, blocked), first)
    expect_result(screen, before, before)


def test_a_click_on_the_result_chooses_the_query_that_won(screen: ToolScreen, query: int) -> None:
    menu = screen.box.locator(".m2f-query-menu select option:checked")
    places = {screen.twin.winner(x, y): (x, y) for y in range(3, 90, 5) for x in range(3, 150, 5)}
    near = {
        found: (x, y)
        for found, (x, y) in places.items()
        if all(screen.twin.winner(x + i, y + j) == found for i in (-1, 1) for j in (-1, 1)) and found != query
    }
    assert near
    for found, (x, y) in list(near.items())[:2]:
        screen.click_pixel("result", x, y)
        expect(menu).to_contain_text(f"query {found} · ")


def test_keys_mute_undo_and_redo(screen: ToolScreen, notebook: NotebookPage, query: int) -> None:
    edits = screen.box.locator(".m2f-edits")
    muted = f"query {query}: muted from layer {LAYER} on"
    screen.canvas("difference").focus()
    for key, text in (
        ("m", muted), ("u", "Nothing is changed"), ("y", muted), ("Control+z", "Nothing is changed"),
        ("Control+Shift+Z", muted), ("Meta+z", "Nothing is changed"),
    ):  # fmt: skip
        notebook.page.keyboard.press(key)
        expect(edits).to_contain_text(text)
    notebook.page.keyboard.press("ArrowDown")
    expect(screen.box.locator(".m2f-layer-slider .widget-readout")).to_have_text(str(LAYER - 1))
