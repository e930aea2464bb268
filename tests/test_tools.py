"""The scripts behind `make`: what they leave in a notebook, and what they say when something is missing."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

TOOLS = Path(__file__).resolve().parents[1] / "tools"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def run_notebooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", TOOLS / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def executed(*cells: NotebookNode) -> NotebookNode:
    return new_notebook(
        cells=list(cells), metadata={"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11.2"}}
    )


def test_normalize_drops_everything_that_differs_between_runs(run_notebooks: ModuleType) -> None:
    data = {WIDGET: {"model_id": "a1"}, "text/plain": "MaskView(queries=4)", "image/png": "aGk="}
    streams = [new_output("stream", text=text) for text in ("one\n", "two\n")]
    cell = new_code_cell("show()", outputs=[*streams, new_output("display_data", data=data)])
    cell.metadata = {"tags": ["nbval-ignore-output"], "execution": {"iopub.status.busy": "2026-01-01"}}
    notebook = executed(cell)

    run_notebooks.normalize(notebook)

    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.cells[0].metadata == {"tags": ["nbval-ignore-output"]}
    text, picture = notebook.cells[0].outputs
    assert text.text == "one\ntwo\n"
    assert set(picture.data) == {"text/plain", "image/png"}
    nbformat.validate(notebook)


def test_write_pictures_numbers_them_and_removes_old_ones(run_notebooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "09.png").write_bytes(b"from an earlier run")
    outputs = [
        new_output("display_data", data={"image/png": base64.b64encode(content).decode()}) for content in (b"a", b"b")
    ]
    notebook = executed(new_markdown_cell("# Title"), new_code_cell("show()", outputs=outputs))
    written = run_notebooks.write_pictures(notebook, tmp_path)
    assert [path.name for path in written] == ["01.png", "02.png"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"01.png": b"a", "02.png": b"b"}


def test_execute_prints_heading_or_first_line_of_each_cell(
    run_notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    path = tmp_path / "00_small.ipynb"
    cells = [new_markdown_cell("# Title"), new_code_cell("print('seen')"), new_code_cell("x = 1\nx")]
    nbformat.write(new_notebook(cells=cells), path)

    run_notebooks.execute([path])

    lines = capsys.readouterr().out.splitlines()
    assert lines[1].strip() == "seen"
    assert lines[2].endswith("s  Title")
    assert lines[3].endswith("s  x = 1")
    assert [cell.execution_count for cell in nbformat.read(path, as_version=4).cells[1:]] == [1, 2]


def test_execute_leaves_failing_notebook_as_it_was(
    run_notebooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_notebooks, "NOTEBOOKS", tmp_path)
    path = tmp_path / "00_small.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_notebooks.execute([path])
    assert path.read_bytes() == before


OLD = """#!/bin/sh
case "$2" in *platform*) echo 3.8.10 ;; *) exit 1 ;; esac
"""
WITHOUT_VENV = """#!/bin/sh
case "$2" in *ensurepip*) exit 1 ;; *platform*) echo 3.12.1 ;; esac
"""


@pytest.mark.parametrize(
    ("python", "said"),
    [
        (None, "No Python was found as '{python}'. Install Python 3.10 or newer"),
        (OLD, "'{python}' is Python 3.8.10, but m2f_lab needs 3.10 or newer"),
        (WITHOUT_VENV, "apt-get install python3-venv"),
    ],
    ids=["no Python", "old Python", "Python without venv"],
)
def test_setup_names_missing_requirement(tmp_path: Path, python: str | None, said: str) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOLS / "setup.sh", tmp_path / "tools")
    interpreter = tmp_path / "python3"
    if python is not None:
        interpreter.write_text(python)
        interpreter.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(interpreter)}
    done = subprocess.run(["sh", tmp_path / "tools/setup.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert said.format(python=interpreter) in done.stderr
    assert not (tmp_path / ".venv").exists()
