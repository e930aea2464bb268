"""JupyterLab on localhost and a real Chromium. See `open_notebook`.

    def test_slider(open_notebook):
        notebook = open_notebook("07_attention_and_queries.ipynb")    # opened and run once per test module
        notebook.drag_slider(".m2f-layer", 1.0)

A test fails if the page or a widget's callback raised meanwhile, even if every assertion held. A failed test leaves
screenshots of the open notebooks in tests/artefacts/. Where there is no Chromium the tests are skipped, and fail
in CI: a green run has seen a browser.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_lab import CHROMIUM, MISSING, Lab, serve_lab, start_browser
from nbformat import NotebookNode
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = ROOT / "tests" / "artefacts"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None and os.environ.get("CI", "").lower() not in ("1", "true"):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with serve_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with start_browser() as chromium:
        yield chromium


_open_pages: list[NotebookPage] = []


@pytest.fixture(scope="module")
def open_notebook(lab: Lab, browser: Browser) -> Iterator[OpenNotebook]:
    """Open notebooks, run all their cells, and keep them open for the tests of this module.

    The function takes a file name in notebooks/, or any name and a notebook as `notebook=`; `run=False` leaves the
    running to the test.
    """
    opened: dict[str, NotebookPage] = {}

    def open_(name: str, notebook: NotebookNode | None = None, run: bool = True) -> NotebookPage:
        if name not in opened:
            lab.add(name, notebook or nbformat.read(ROOT / "notebooks" / name, as_version=4))
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            opened[name] = NotebookPage(page, name)
            _open_pages.append(opened[name])
            opened[name].open(lab.url)
            if run:
                opened[name].run_all()
        return opened[name]

    yield open_
    for page in opened.values():
        _open_pages.remove(page)
        page.close()


@pytest.fixture(autouse=True)
def _no_uncaught_errors() -> Iterator[None]:
    yield
    errors = {page.name: found for page in _open_pages if (found := page.take_errors())}
    assert errors == {}, "uncaught errors in the page or in a widget's callback"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.failed and HERE in item.path.parents:
        for page in _open_pages:
            path = ARTEFACTS / f"{item.name}-{report.when}-{page.name.removesuffix('.ipynb')}.png"
            page.screenshot(path)
            report.sections.append(("screenshot", str(path.relative_to(ROOT))))
    return report
