"""The explorers in a real browser: what is on the screen is what numpy computes from the model's output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_screen import KINDS, ExplorerScreen, inner_cell, read_canvas, screen_in
from jupyter_lab import notebook_of
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import Browser, Page, expect

from m2f_lab import recipes
from m2f_lab.explore import QueryExplorer
from m2f_lab.explore.parts.assets import source_files
from m2f_lab.model import build_model

SETUP = """\
import ipywidgets
import numpy as np
import torch

from m2f_lab import recipes
from m2f_lab.explore import QueryExplorer
from m2f_lab.model import build_model

def picture():
    y, x = np.mgrid[:90, :150]
    return np.stack([x, 2 * y, 255 - x], axis=-1).astype(np.uint8)

torch.manual_seed(0)
model = build_model(recipes.debug_tiny(num_classes=5).model)
explorer = QueryExplorer(model, picture(), width=480)
heard = ipywidgets.Label().add_class("t-heard")
def hear(change):
    heard.value = f"layer {explorer.layer}, query {explorer.query}, head {explorer.head}"
for control in (explorer.layer_slider, explorer.query_slider, explorer.head_menu):
    control.observe(hear, "value")
hear(None)
explorer"""
LAST = 3  # the last prediction of debug_tiny


def make_twin() -> QueryExplorer:
    """The same explorer as the notebook's, in this process: what the browser should show is computed from it."""
    y, x = np.mgrid[:90, :150]
    image = np.stack([x, 2 * y, 255 - x], axis=-1).astype(np.uint8)
    torch.manual_seed(0)
    return QueryExplorer(build_model(recipes.debug_tiny(num_classes=5).model), image, width=480)


# -------------------------------------------------------------------------------------------------------- in JupyterLab


@pytest.fixture(scope="module")
def notebook(open_notebook: OpenNotebook) -> NotebookPage:
    return open_notebook("explorer.ipynb", notebook=notebook_of(SETUP, "heard"))


@pytest.fixture(scope="module")
def screen(notebook: NotebookPage) -> ExplorerScreen:
    return screen_in(notebook, make_twin())


@pytest.fixture(autouse=True)
def _from_the_start(request: pytest.FixtureRequest) -> None:
    """Every test of the notebook starts at the last layer and the surest query."""
    if "screen" in request.fixturenames:
        notebook = request.getfixturevalue("notebook")
        request.getfixturevalue("screen")
        notebook.press(".m2f-layer-slider", "End")
        notebook.press(".m2f-query-slider", "Home")
        notebook.page.locator(".m2f-head-menu select").select_option("mean of 4 heads")


def test_the_first_picture(screen: ExplorerScreen) -> None:
    image = screen.images["mask"]
    assert image.shape == (288, 480, 3)
    expected = np.asarray([[9, 2 * 9, 255 - 9], [141, 2 * 81, 255 - 141]])
    assert np.abs(image[[31, 260], [31, 451]].astype(int) - expected).max() <= 3
    screen.expect_drawn(LAST, 0)


def test_the_layer_slider(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    before = screen.canvas("mask").screenshot()
    notebook.drag_slider(".m2f-layer-slider", 0.34)
    expect(notebook.page.locator(".m2f-layer-slider .widget-readout")).to_have_text("1")
    screen.expect_drawn(1, 0)
    assert screen.canvas("mask").screenshot() != before  # what a person sees, not only what the canvas holds
    expect(notebook.page.locator(".m2f-maskview > .m2f-caption").first).to_contain_text("after layer 1 of 3")
    notebook.drag_slider(".m2f-layer-slider", 0)
    screen.expect_drawn(0, 0)
    expect(notebook.page.locator(".m2f-maskview > .m2f-caption").nth(1)).to_have_text(
        "No layer has looked at the image yet."
    )


def test_the_query_slider_and_the_menu_move_together(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    menu = notebook.page.locator(".m2f-query-menu select")
    notebook.press(".m2f-query-slider", "ArrowRight", times=7)
    screen.expect_drawn(LAST, 7)
    expect(menu.locator("option:checked")).to_contain_text(f"query {screen.twin.order[7]} · ")
    menu.select_option(index=3)
    screen.expect_drawn(LAST, 3)
    expect(notebook.page.locator(".t-heard")).to_have_text(f"layer 3, query {screen.twin.order[3]}, head None")


def test_the_opacity_slider(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    notebook.press(".m2f-opacity-slider", "ArrowRight", times=6)
    expect(notebook.page.locator(".m2f-opacity-slider .widget-readout")).to_have_text("100%")
    screen.expect_drawn(LAST, 0, opacity=1.0)
    notebook.press(".m2f-opacity-slider", "ArrowLeft", times=6)
    screen.expect_drawn(LAST, 0)


def test_the_attention_heads(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    notebook.page.locator(".m2f-head-menu select").select_option("head 3")
    screen.expect_drawn(LAST, 0, channel=3)


def test_the_keyboard(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    screen.canvas("mask").focus()
    for key, expected in (
        ("ArrowRight", (LAST, 1, 0)), ("ArrowDown", (LAST - 1, 1, 0)), ("2", (LAST - 1, 1, 2)),
        ("End", (LAST - 1, 23, 2)), ("ArrowRight", (LAST - 1, 23, 2)), ("ArrowLeft", (LAST - 1, 22, 2)),
        ("ArrowUp", (LAST, 22, 2)), ("ArrowUp", (LAST, 22, 2)), ("Home", (LAST, 0, 2)),
        ("0", (LAST, 0, 0)), ("9", (LAST, 0, 0)),
    ):  # fmt: skip
        notebook.page.keyboard.press(key)
        screen.expect_drawn(*expected)
    screen.canvas("attention").focus()
    notebook.page.keyboard.press("ArrowDown")
    notebook.page.keyboard.press("4")
    screen.expect_drawn(LAST - 1, 0, channel=4)
    expect(notebook.page.locator(".t-heard")).to_have_text(f"layer 2, query {screen.twin.order[0]}, head 4")
    for key in ("m", "x"):  # JupyterLab's command mode would make the cell Markdown, and cut it
        notebook.page.keyboard.press(key)
    notebook.page.wait_for_timeout(100)
    assert len(notebook.cells()) == 2


def test_a_click_chooses_the_winning_query(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    winners, order = screen.twin.trace.winners, screen.twin.order
    queries = np.unique(winners)[:3].tolist()
    assert len(queries) == 3
    for query, kind in zip(cycle(queries), KINDS, strict=False):
        row, column = inner_cell(winners == query)
        screen.click(kind, row, column)
        screen.expect_drawn(LAST, int(np.flatnonzero(order == query)[0]))
        expect(notebook.page.locator(".m2f-maskview > .m2f-caption").first).to_contain_text(f"Query {query}, ")
        expect(notebook.page.locator(".t-heard")).to_contain_text(f"query {query},")


def test_the_pointer_reads_values_and_is_marked_in_all_views(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    trace, query = screen.twin.trace, screen.twin.order[0]
    rows, columns = trace.masks.shape[2:]
    text = screen.hover("mask", 0.3, 0.6)
    x, y, value = re.fullmatch(r"x (\d+), y (\d+) · probability ([\d.]+)", text).groups()
    assert abs(int(x) - 45) <= 1
    assert abs(int(y) - 54) <= 1
    cells = trace.masks[
        LAST, query, int(0.6 * rows) - 1 : int(0.6 * rows) + 2, int(0.3 * columns) - 1 : int(0.3 * columns) + 2
    ]
    assert np.abs(cells - float(value)).min() < 0.006
    crosses = notebook.page.locator(".m2f-cross:visible")
    expect(crosses).to_have_count(3)
    for cross, kind in zip(crosses.all(), ("before", "blocked", "attention"), strict=True):
        box, stage = cross.bounding_box(), screen.canvas(kind).bounding_box()
        assert (box["x"] + box["width"] / 2 - stage["x"]) / stage["width"] == pytest.approx(0.3, abs=0.02)
        assert (box["y"] + box["height"] / 2 - stage["y"]) / stage["height"] == pytest.approx(0.6, abs=0.02)
    hidden = trace.blocked[LAST - 1][query]
    text = screen.hover("blocked", 0.5 / hidden.shape[1], 0.5 / hidden.shape[0])
    assert text.endswith("hidden" if hidden[0, 0] else "visible")
    mean = trace.attention[LAST - 1][query].mean(axis=0)
    text = screen.hover("attention", 0.5 / hidden.shape[1], 0.5 / hidden.shape[0])
    shown = float(re.search(r"· ([\d.]+) % of the attention", text)[1]) / 100
    assert shown == pytest.approx(float(mean[0, 0]), abs=0.0006)
    notebook.page.mouse.move(2, 2)
    expect(notebook.page.locator(".m2f-tip:visible, .m2f-cross:visible")).to_have_count(0)


def test_the_words_below_follow(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    notebook.press(".m2f-query-slider", "ArrowRight", times=2)
    screen.expect_drawn(LAST, 2)
    caption = screen.twin.views["mask"].captions[LAST][2]
    first = notebook.page.locator(".m2f-maskview").first
    expect(first.locator(".m2f-bar-label")).to_have_text([label for label, _, _ in caption["bars"]])
    label, value, _ = caption["bars"][0]
    bar, track = (
        first.locator(".m2f-bar-fill").first.bounding_box(),
        first.locator(".m2f-bar-track").first.bounding_box(),
    )
    assert bar["width"] / track["width"] == pytest.approx(value, abs=0.01), label


def test_play_runs_through_the_layers(screen: ExplorerScreen, notebook: NotebookPage) -> None:
    notebook.press(".m2f-layer-slider", "Home")
    notebook.page.locator(".m2f-play button").first.click()
    screen.expect_drawn(LAST, 0)
    expect(notebook.page.locator(".m2f-layer-slider .widget-readout")).to_have_text(str(LAST))


MONITORED = """\
import threading, time
from pathlib import Path
from types import SimpleNamespace
from m2f_lab.explore import LiveMonitor

def train():
    optimization = SimpleNamespace(max_iterations=150)
    recipe = SimpleNamespace(name="toy", optimization=optimization)
    monitor = LiveMonitor()
    monitor.on_start(SimpleNamespace(recipe=recipe, metrics=[], path=Path("nowhere")))
    for i in range(1, 151):
        row = {"kind": "step", "iteration": i, "loss": 30 / i, "learning_rate": 1e-3, "seconds": i * 0.02}
        monitor.on_step(row | {"images_per_second": 10.0, "memory_gib": 1.0})
        time.sleep(0.02)
    monitor.on_evaluation({"kind": "evaluation", "iteration": 150, "mIoU": 50.0})
    monitor.on_end(None)

started = time.monotonic()
thread = threading.Thread(target=train)
thread.start()
thread.join()
print("seconds", time.monotonic() - started)"""
COUNT_UPDATES = """() => {
    window.m2fUpdates = 0;
    window.jupyterapp.shell.currentWidget.sessionContext.iopubMessage.connect((_, message) => {
        if (message.header.msg_type === 'update_display_data') window.m2fUpdates++;
    });
}"""


def test_the_live_monitor_redraws_one_picture(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook("live.ipynb", notebook=notebook_of(MONITORED), run=False)
    notebook.page.evaluate(COUNT_UPDATES)
    notebook.run_all()
    seconds = float(notebook.text_output().split()[1])
    updates = notebook.page.evaluate("() => window.m2fUpdates")
    assert 3 <= updates <= 2 * seconds + 2  # the evaluation and the end are shown at once
    picture = notebook.page.locator(".jp-OutputArea img")
    expect(picture).to_have_count(1)
    assert picture.evaluate("(image) => image.naturalWidth") > 600
    shown = [
        output for cell in notebook.cells() for output in cell["outputs"] if output["output_type"] == "display_data"
    ]
    assert [output["data"]["text/plain"] for output in shown] == ["LiveMonitor(toy)"]


# ------------------------------------------------------------------------------------------------ without a kernel


@pytest.fixture
def offline_page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    """A saved explorer, opened from disk by a browser without a network, on a screen of twice the density."""
    twin = make_twin()
    twin.layer, twin.query = 2, int(twin.order[1])
    twin.save_html(tmp_path / "explorer.html")
    context = browser.new_context(viewport={"width": 1100, "height": 800}, device_scale_factor=2, offline=True)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "explorer.html").as_uri())
    yield page
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "blob:"))] == []
    context.close()


def move_range(page: Page, trait: str, value: float) -> None:
    page.locator(f"input[data-trait={trait}]").fill(str(value))


def test_a_saved_explorer_scrubs_hovers_and_picks(offline_page: Page) -> None:
    screen = ExplorerScreen(offline_page, make_twin(), "body")
    move_range(offline_page, "opacity", 0)
    screen.page.wait_for_timeout(200)
    screen.remember_images()
    assert screen.images["mask"].shape == (576, 960, 3)
    for view in screen.twin.views.values():
        view.contour = 0  # its line is two pixels wide here
    move_range(offline_page, "opacity", 0.7)
    offline_page.wait_for_timeout(200)
    for kind in ("blocked", "attention"):
        assert (read_canvas(screen.canvas(kind)) != screen.images[kind]).any()
    move_range(offline_page, "stack", 3)
    offline_page.locator("select[data-trait=index]").select_option(index=5)
    offline_page.locator("select[data-trait=channel]").select_option("head 1")
    for kind in KINDS:
        expect(screen.canvas(kind)).to_have_attribute("data-drawn", "3,5,1" if kind == "attention" else "3,5,0")
    screen.click("blocked", 10, 30)
    place = int(np.flatnonzero(screen.twin.order == screen.twin.trace.winners[10, 30])[0])
    expect(screen.canvas("mask")).to_have_attribute("data-drawn", f"3,{place},0")
    offline_page.keyboard.press("ArrowDown")
    expect(screen.canvas("mask")).to_have_attribute("data-drawn", f"2,{place},0")
    expect(offline_page.locator("select[data-trait=index]")).to_have_value(str(place))
    assert re.fullmatch(r"x \d+, y \d+ · probability [\d.]+", screen.hover("mask", 0.4, 0.4))


def test_a_saved_explorer_opens_where_it_was(offline_page: Page) -> None:
    screen = ExplorerScreen(offline_page, make_twin(), "body")
    expect(screen.canvas("mask")).to_have_attribute("data-drawn", "2,1,0")
    expect(offline_page.locator("input[data-trait=stack]")).to_have_value("2")


COUNT_LISTENERS = """async ([module, state]) => {
    const { default: widget } = await import(URL.createObjectURL(new Blob([module], { type: 'text/javascript' })));
    const table = new DataView(new ArrayBuffer(1024));
    const picture = document.createElement('canvas');
    picture.width = 4; picture.height = 2;
    const blob = await new Promise((resolve) => picture.toBlob(resolve));
    const base = new DataView(await blob.arrayBuffer());
    Object.assign(state, { base, table, masks: table, scales: table, pick: table });
    const listeners = new Map();
    const model = {
        get: (name) => state[name], set: (name, value) => { state[name] = value; }, save_changes() {},
        on: (name, f) => listeners.set(f, (listeners.get(f) ?? new Set()).add(name)),
        off: (name, f) => listeners.get(f)?.delete(name),
    };
    const count = () => [...listeners.values()].reduce((sum, names) => sum + names.size, 0);
    const el = document.createElement('div');
    document.body.append(el);
    const clean = widget.render({ model, el });
    const during = count();
    await new Promise((resolve) => setTimeout(resolve, 100));
    const cross = el.querySelector('.m2f-cross');
    const detail = { group: 'g', u: 0.5, v: 0.5 };
    const point = () => window.dispatchEvent(new CustomEvent('m2f-pointer', { detail }));
    point();
    const marked = !cross.hidden;
    cross.hidden = true;
    clean();
    point();
    el.querySelector('canvas').click();
    const drawn = el.querySelector('canvas').dataset.drawn;
    return { during, after: count(), drawn, marked, markedAfter: !cross.hidden, clicked: state.clicked };
}"""


def test_a_closed_view_listens_to_nothing(browser: Browser) -> None:
    view = make_twin().views["mask"]
    read = set(re.findall(r'(?:model\.get\(|listOf\(model, )"(\w+)"', "".join(source_files("mask_view.js").values())))
    state = {name: getattr(view, name) for name in read - {"base", "table", "masks", "scales", "pick"}} | {
        "group": "g", "shapes": [[1, 1, 2, 2]], "pick_shape": [0, 0], "image_size": [4, 2], "clicked": [], "stack": 0
    }  # fmt: skip
    page = browser.new_page()
    found = page.evaluate(COUNT_LISTENERS, [view._esm, state])
    page.close()
    assert found["during"] > 15
    assert found == {
        "during": found["during"], "after": 0, "drawn": "0,0,0", "marked": True, "markedAfter": False, "clicked": []
    }  # fmt: skip
