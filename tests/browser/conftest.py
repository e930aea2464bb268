"""JupyterLab on localhost and a real Chromium. See `open_notebook`.

    def test_slider(open_notebook):
        notebook = open_notebook("07_attention_and_queries.ipynb")    # opened and run once per test module
        notebook.drag_slider(".m2f-layer", 1.0)

A test fails if the page or a widget's callback raised meanwhile, even if every assertion held. A failed test leaves
screenshots of the open notebooks in tests/artefacts/. Where there is no Chromium the tests are skipped, and fail
in CI: a green run has seen a browser.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebook_page import NotebookPage, OpenNotebook
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
ARTEFACTS = ROOT / "tests" / "artefacts"
HERE = Path(__file__).parent

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
MISSING = "No Chromium was found. Install it (apt-get install chromium) or set CHROMIUM to its path."
FLAGS = (
    "--no-sandbox",  # a sandbox needs rights that containers do not give
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
LAB_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is in the page
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None and os.environ.get("CI", "").lower() not in ("1", "true"):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address and the folder in which its kernels work."""

    url: str
    notebooks: Path

    def add(self, name: str, notebook: NotebookNode) -> None:
        """Put in a copy without outputs, so that stale ones cannot pass for fresh ones."""
        notebook = nbformat.from_dict(notebook)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, self.notebooks / name)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab that touches neither the user's settings nor the repository; ../data and ../runs start empty."""
    home = tmp_path_factory.mktemp("lab")
    notebooks = home / "root" / "notebooks"
    notebooks.mkdir(parents=True)
    (home / "app").mkdir()
    (home / "app" / "overrides.json").write_text(json.dumps(LAB_SETTINGS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    private = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    inherited = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("JUPYTER_")}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={notebooks}"]
    command += ["--IdentityProvider.token=", "--expose-app-in-browser", "--LabApp.extension_manager=readonly"]
    command += [f"--LabApp.{folder}_dir={home / name}" for folder, name in
                (("app_settings", "app"), ("user_settings", "settings"), ("workspaces", "workspaces"))]  # fmt: skip
    log = home / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env=inherited | private | {"JUPYTER_NO_CONFIG": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_server(url, server, log)
        yield Lab(url, notebooks)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_server(url: str, server: subprocess.Popen, log: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/api/status", timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()}"
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not answer within {timeout} s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None, MISSING
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


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
