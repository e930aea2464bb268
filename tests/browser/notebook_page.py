"""A notebook that is open in JupyterLab in a real browser, as a person would use it.

Pixel positions are CSS pixels from the top-left corner of an element; clicks land within a pixel of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Locator, Page

TIMEOUT = 300_000  # ms; only what hangs takes so long
PIXEL_TIMEOUT = 10  # seconds

_WIDGET = "window.jupyterapp?.shell.currentWidget"
_KERNEL_IS_IDLE = f"() => {_WIDGET}?.sessionContext?.session?.kernel?.status === 'idle'"
# Exceptions in the callbacks of widgets reach no cell; the kernel reports them on its iopub channel only.
_LISTEN = f"""() => {{
    window.m2fKernelErrors = [];
    {_WIDGET}.sessionContext.iopubMessage.connect((_, message) => {{
        if (message.header.msg_type === 'error')
            window.m2fKernelErrors.push(`${{message.content.ename}}: ${{message.content.evalue}}`);
    }});
}}"""
_START_ALL_CELLS = """() => {
    window.m2fDone = false;
    window.jupyterapp.restored
        .then(() => window.jupyterapp.commands.execute('notebook:run-all-cells'))
        .then(() => { window.m2fDone = true; });
}"""
_CELLS = f"""() => {{
    const cells = [];
    for (const cell of {_WIDGET}.content.model.cells) if (cell.type === 'code') cells.push(cell.toJSON());
    return cells;
}}"""
_PIXEL = """(element, [x, y]) => {
    const box = element.getBoundingClientRect();
    const [width, height] = [element.naturalWidth ?? element.width, element.naturalHeight ?? element.height];
    const [column, row] = [Math.floor(x * width / box.width), Math.floor(y * height / box.height)];
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 1;
    const context = canvas.getContext('2d');
    context.drawImage(element, column, row, 1, 1, 0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""

RGB = tuple[int, int, int]


class NotebookPage:
    """One notebook in one browser tab.

    Attributes:
        page: Playwright's page, for everything that is not wrapped here
        name: the notebook's file name
    """

    def __init__(self, page: Page, name: str) -> None:
        self.page, self.name = page, name
        self._page_errors: list[str] = []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self._page_errors.append(f"page: {error}"))

    def open(self, url: str) -> None:
        """Open the notebook in the JupyterLab at that address and wait for its kernel."""
        self.page.goto(f"{url}/lab/tree/{self.name}?reset")
        self.page.wait_for_function(_KERNEL_IS_IDLE, timeout=TIMEOUT)
        self.page.evaluate(_LISTEN)

    # ----------------------------------------------------------------------------------------------- the whole notebook

    def run_all(self, timeout: float = TIMEOUT) -> None:
        """Run every cell and wait until all are done.

        Raises:
            AssertionError: a cell raised, or was not run.
        """
        self.page.evaluate(_START_ALL_CELLS)
        self.page.wait_for_function("() => window.m2fDone", timeout=timeout)
        self.wait_until_idle(timeout)
        failures = []
        for cell in self.cells():
            label = "".join(cell["source"])[:60]
            if cell["execution_count"] is None and label.strip():
                failures.append(f"not run: {label}")
            failures += [f"{o['ename']}: {o['evalue']}" for o in cell["outputs"] if o["output_type"] == "error"]
        assert not failures, f"{self.name}: {failures}"

    def wait_until_idle(self, timeout: float = TIMEOUT) -> None:
        self.page.wait_for_function(_KERNEL_IS_IDLE, timeout=timeout)

    def cells(self) -> list[dict]:
        """The code cells with what they show now, as in the notebook format."""
        return self.page.evaluate(_CELLS)

    def text_output(self) -> str:
        """All that the cells have printed."""
        outputs = [output for cell in self.cells() for output in cell["outputs"] if output["output_type"] == "stream"]
        return "".join("".join(output["text"]) for output in outputs)

    def take_errors(self) -> list[str]:
        """Uncaught errors of the page and of widget callbacks since the last call. Whatever is left fails the test."""
        self.wait_until_idle(timeout=60_000)
        callbacks = self.page.evaluate("() => (window.m2fKernelErrors ?? []).splice(0)")
        errors = self._page_errors + [f"callback: {error}" for error in callbacks]
        self._page_errors = []
        return errors

    # ----------------------------------------------------------------------------------------------- what a person does

    def locate(self, selector: str) -> Locator:
        """The one visible element with this selector, scrolled into view."""
        found = self.page.locator(selector)
        found.scroll_into_view_if_needed()
        return found

    def drag_slider(self, selector: str, fraction: float) -> None:
        """Drag the handle of an ipywidgets slider with the mouse to a fraction of its length."""
        slider = self.locate(selector)
        handle, base = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
        y = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(base["x"] + base["width"] * fraction, y, steps=8)
        self.page.mouse.up()

    def press(self, selector: str, key: str, times: int = 1) -> None:
        """Focus the handle of a slider, or any other element, and press a key."""
        element = self.locate(selector)
        handle = element.locator(".noUi-handle")
        (handle if handle.count() else element).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def close(self) -> None:
        """Close the tab and end its kernel, which would hold its memory otherwise."""
        self.page.evaluate(f"() => {_WIDGET}?.sessionContext?.shutdown()")
        self.page.close()

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(path))

    # --------------------------------------------------------------------------------------------------------- pictures

    def pixel(self, selector: str, x: float, y: float) -> RGB:
        """The colour of an <img> or <canvas> there. It is read from the picture, so nothing can lie on top of it."""
        return tuple(self.page.locator(selector).evaluate(_PIXEL, [x, y]))

    def wait_for_pixel(self, selector: str, x: float, y: float, color: RGB, tolerance: int = 12) -> None:
        """Wait until a pixel shows the colour that it should, up to a tolerance in each channel.

        Raises:
            AssertionError: it does not within ten seconds.
        """
        self._wait_for_pixel(selector, x, y, lambda new: _distance(new, color) <= tolerance, f"became {color}")

    def wait_for_pixel_change(self, selector: str, x: float, y: float, old: RGB, tolerance: int = 12) -> RGB:
        """Wait until a pixel differs from `old` by more than the tolerance in a channel. Returns the new colour.

        Raises:
            AssertionError: it does not within ten seconds.
        """
        return self._wait_for_pixel(selector, x, y, lambda new: _distance(new, old) > tolerance, f"changed from {old}")

    def _wait_for_pixel(self, selector: str, x: float, y: float, wanted: Callable[[RGB], bool], what: str) -> RGB:
        deadline = time.monotonic() + PIXEL_TIMEOUT
        while not wanted(color := self.pixel(selector, x, y)):
            assert time.monotonic() < deadline, (
                f"{self.name}: pixel ({x}, {y}) of {selector} never {what}, it is {color}"
            )
            self.page.wait_for_timeout(20)
        return color


def _distance(a: RGB, b: RGB) -> int:
    return max(abs(i - j) for i, j in zip(a, b, strict=True))


OpenNotebook = Callable[..., NotebookPage]
"""The type of the fixture `open_notebook`."""
