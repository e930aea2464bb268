"""The browser tests see what they claim to see: a healthy notebook passes, and each planted fault is found."""

from __future__ import annotations

import sys

import notebook_page
import pytest
from jupyter_lab import notebook_of
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import expect

SETUP = """\
import io, sys
import ipywidgets as widgets
from IPython.display import Javascript, display
from PIL import Image

def png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32), (red, 0, 100)).save(buffer, "png")
    return buffer.getvalue()

slider = widgets.IntSlider(0, 0, 200, description="red").add_class("t-red")
picture = widgets.Image(value=png(0), width=128, height=64).add_class("t-picture")
button = widgets.Button(description="fail").add_class("t-fail")
slider.observe(lambda change: setattr(picture, "value", png(change["new"])), "value")
button.on_click(lambda _: 1 / 0)
print("kernel", sys.prefix)
widgets.VBox([slider, picture, button])"""


@pytest.fixture
def healthy(open_notebook: OpenNotebook) -> NotebookPage:
    return open_notebook("healthy.ipynb", notebook=notebook_of(SETUP))


def test_the_kernel_is_this_python(healthy: NotebookPage) -> None:
    assert f"kernel {sys.prefix}\n" in healthy.text_output()


def test_a_dragged_slider_changes_the_picture(healthy: NotebookPage) -> None:
    assert healthy.pixel("img.t-picture", 100, 50) == (0, 0, 100)
    healthy.drag_slider(".t-red", 1.0)
    expect(healthy.page.locator(".t-red .widget-readout")).to_have_text("200")
    healthy.wait_for_pixel("img.t-picture", 100, 50, (200, 0, 100), tolerance=0)


def test_arrow_keys_move_the_slider(healthy: NotebookPage) -> None:
    healthy.drag_slider(".t-red", 0.0)
    healthy.press(".t-red", "ArrowRight", times=3)
    expect(healthy.page.locator(".t-red .widget-readout")).to_have_text("3")


def test_lab_shows_no_prompts(healthy: NotebookPage) -> None:
    expect(healthy.page.locator(".jp-toast-message, .jp-Dialog")).to_have_count(0)


def test_a_picture_that_stays_or_is_wrong_is_found(healthy: NotebookPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_page, "PIXEL_TIMEOUT", 0.3)
    old = healthy.pixel("img.t-picture", 10, 10)
    with pytest.raises(AssertionError, match="never changed"):
        healthy.wait_for_pixel_change("img.t-picture", 10, 10, old)
    with pytest.raises(AssertionError, match="never became"):
        healthy.wait_for_pixel("img.t-picture", 10, 10, (0, 255, 0))


def test_an_exception_in_a_callback_is_found(healthy: NotebookPage) -> None:
    healthy.locate(".t-fail").click()
    healthy.page.wait_for_function("() => window.m2fKernelErrors.length > 0")
    assert healthy.take_errors() == ["callback: ZeroDivisionError: division by zero"]


def test_an_error_in_the_page_is_found(open_notebook: OpenNotebook) -> None:
    throwing = notebook_of(SETUP, "Javascript(\"setTimeout(() => { throw new Error('planted') })\")")
    page = open_notebook("throwing.ipynb", notebook=throwing)
    page.page.wait_for_timeout(200)
    assert page.take_errors() == ["page: planted"]


def test_a_cell_that_raises_is_found(open_notebook: OpenNotebook) -> None:
    page = open_notebook("raising.ipynb", notebook=notebook_of("1 + 1", "[][0]", "2"), run=False)
    with pytest.raises(AssertionError, match=r"IndexError: list index out of range.*not run: 2"):
        page.run_all()
    assert page.take_errors() == ["callback: IndexError: list index out of range"]
