"""JupyterLab on localhost and a headless Chromium: what browser tests, benchmarks and screenshots start from."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from playwright.sync_api import Browser, sync_playwright

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


def notebook_of(*cells: str) -> NotebookNode:
    """A notebook of code cells."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel)


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


@contextmanager
def serve_lab(home: Path) -> Iterator[Lab]:
    """JupyterLab that touches neither the user's settings nor the repository; ../data and ../runs start empty.

    Args:
        home: an empty folder for all that it writes.
    """
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


@contextmanager
def start_browser() -> Iterator[Browser]:
    """A headless Chromium."""
    assert CHROMIUM is not None, MISSING
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()
