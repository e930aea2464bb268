"""What the committed notebook files promise; without this, `pytest --nbval` would pass notebooks that say nothing.

nbval compares nothing in a cell that was committed without output, ignores pictures, and lets a cell pass that is
tagged `raises-exception` and raises nothing.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.notebook

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"
MAX_CELL_LINES = 15
MAX_OUTPUT = 300_000  # bytes of one cell's outputs
MAX_NOTEBOOK = 600_000  # bytes; GitHub still shows it


class Notebook:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = self.json["cells"]
        self.code = [cell for cell in self.cells if cell["cell_type"] == "code"]
        self.outputs = [output for cell in self.code for output in cell["outputs"]]
        self.text = "\n".join(source(cell) for cell in self.cells if cell["cell_type"] == "markdown")
        self.program = "\n".join(source(cell) for cell in self.code)

    def tree(self, cell: dict) -> ast.Module:
        return ast.parse(source(cell), filename=self.path.name)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return Notebook(request.param)


def test_notebooks_are_numbered() -> None:
    """In the order of reading. A number may be left out for a notebook to come; none is given twice."""
    assert PATHS, f"no notebooks in {FOLDER}"
    numbers = [re.match(r"(\d\d)_[a-z]", path.name) for path in PATHS]
    assert all(numbers), [path.name for path in PATHS]
    numbers = [int(number[1]) for number in numbers]
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))


def test_the_readme_lists_them_in_order() -> None:
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d\d) [^\]]+\]\(notebooks/([^)]+)\) \| [^|]+\? \|$", readme, re.M)
    assert [name for _, name in rows] == [path.name for path in PATHS]
    assert all(name.startswith(number) for number, name in rows)


# ---------------------------------------------------------------------------------------------------------------- run


def test_it_was_run_once_from_top_to_bottom(notebook: Notebook) -> None:
    """nbval passes cells that were never run."""
    run = [cell["execution_count"] for cell in notebook.code if not tags(cell) & {"nbval-skip", "skip-execution"}]
    assert run == list(range(1, len(run) + 1)), "run `make notebooks`"


def test_the_file_is_as_make_notebooks_writes_it(notebook: Notebook) -> None:
    """Kernel python3 wherever it is opened, and no state of widgets, which would be shown without their kernel."""
    assert notebook.json["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook.json["metadata"]) == {"kernelspec", "language_info"}, "run `make notebooks`"
    assert (notebook.json["nbformat"], notebook.json["nbformat_minor"]) == (4, 5)
    assert not any(WIDGET in output.get("data", {}) for output in notebook.outputs), "run `make notebooks`"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook.cells)


def test_the_outputs_are_small(notebook: Notebook) -> None:
    sizes = {source(cell)[:60]: len(json.dumps(cell["outputs"])) for cell in notebook.code}
    assert {cell: size for cell, size in sizes.items() if size > MAX_OUTPUT} == {}
    assert notebook.path.stat().st_size < MAX_NOTEBOOK


def test_errors_and_warnings_are_not_committed(notebook: Notebook) -> None:
    for cell in notebook.code:
        errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert bool(errors) == ("raises-exception" in tags(cell)), source(cell)
    assert not re.search(r"\w+Warning:", json.dumps(notebook.outputs))


# ------------------------------------------------------------------------------------------------------------ checked


def test_nbval_has_something_to_compare(notebook: Notebook) -> None:
    ignored = {"nbval-ignore-output", "nbval-skip"}
    compared = [
        output
        for cell in notebook.code
        if not tags(cell) & ignored and "NBVAL_IGNORE_OUTPUT" not in source(cell)
        for output in cell["outputs"]
        if output["output_type"] == "stream" or set(output.get("data", {})) == {"text/plain"}
    ]
    assert compared, "print a rounded summary: pictures are not compared"
    assert any(isinstance(node, ast.Assert) for cell in notebook.code for node in ast.walk(notebook.tree(cell)))


def test_nothing_hides_what_a_cell_shows(notebook: Notebook) -> None:
    """An Output widget stalls nbclient above 75 kB; interact and clear_output hide text from nbval."""
    assert not re.search(r"\bOutput\(|\binteract(ive)?\(|clear_output|%matplotlib +(widget|notebook)", notebook.program)
    assert "NBVAL_SKIP" not in notebook.program


def test_no_cell_ends_with_a_semicolon(notebook: Notebook) -> None:
    """Jupyter hides the value of such a cell, nbval shows it and then finds a difference: assign it to a name."""
    assert [source(cell) for cell in notebook.code if source(cell).rstrip().endswith(";")] == []


def test_a_widget_has_a_short_stable_name_and_a_picture(notebook: Notebook) -> None:
    """Text that names a whole widget state or an address differs from run to run."""
    for output in notebook.outputs:
        text = "".join(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r" at 0x[0-9a-f]{6,}>|^\w+\(children=\(", text), text[:200]
        assert len(text) < 5000, text[:200]
    pictures = [output for output in notebook.outputs if "image/png" in output.get("data", {})]
    assert pictures, "a reader on GitHub sees no picture"


# --------------------------------------------------------------------------------------------------------------- read


def test_it_begins_with_what_a_reader_must_know(notebook: Notebook) -> None:
    first, *others = notebook.cells
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert "?" in source(first), "the question it answers"
    assert re.search(r"\bCPU\b", source(first)), "its time on a CPU"
    assert re.search(r"\bGPU\b", source(first)), "its time on a GPU"
    assert not any(source(cell).startswith("# ") for cell in others if cell["cell_type"] == "markdown")


def test_imports_come_first_and_then_the_capitals(notebook: Notebook) -> None:
    imports, capitals, *rest = (notebook.tree(cell) for cell in notebook.code)
    assert any(isinstance(node, ast.Import | ast.ImportFrom) for node in imports.body)
    names = [node.id for node in ast.walk(capitals) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert {"SEED", "DEVICE"} <= set(names)
    assert [name for name in names if not name.isupper()] == []
    late = [
        node for tree in (capitals, *rest) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert [ast.unparse(node) for node in late] == []


def test_it_ends_with_a_summary_and_three_exercises(notebook: Notebook) -> None:
    summary = re.search(r"^## Summary\b(.*)", notebook.text, re.M | re.S)
    assert summary, "a heading '## Summary'"
    exercises = re.search(r"^## Exercises\b(.*)", summary[1], re.M | re.S)
    assert exercises, "a heading '## Exercises' after it"
    assert re.findall(r"^(\d)\. ", exercises[1], re.M) == ["1", "2", "3"]


def test_cells_are_short(notebook: Notebook) -> None:
    assert [source(cell) for cell in notebook.code if len(source(cell).splitlines()) > MAX_CELL_LINES] == []


def test_every_code_cell_is_introduced(notebook: Notebook) -> None:
    """Idea, equation, prediction, then the call: no more than three code cells without a word in between."""
    kinds = "".join("c" if cell["cell_type"] == "code" else "m" for cell in notebook.cells)
    assert "cccc" not in kinds


def test_it_uses_the_library_and_defines_nothing(notebook: Notebook) -> None:
    """But for the lesson whose subject is to write a decoder and a loss term."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node.name for cell in notebook.code for node in ast.walk(notebook.tree(cell)) if isinstance(node, defined)]
    allowed = {"WiderView", "attention_mask", "build_wider", "focal", "with_focal"}
    assert set(found) <= (allowed if notebook.path.stem == "11_change_the_model" else set())
    assert "m2f_lab" in notebook.program


def test_it_installs_and_downloads_nothing(notebook: Notebook) -> None:
    """Also no line that is not Python: `%pip`, `!wget`; `tree` would have failed on it."""
    assert not re.search(
        r"urlopen|urlretrieve|requests\.|hf_hub|from_pretrained|wget|pip install|\bhub\b", notebook.program
    )


def test_it_needs_no_file_of_another_notebook(notebook: Notebook) -> None:
    """Each runs alone: what it reads, it has drawn or trained itself, or the user's data set holds it."""
    others = [path.stem for path in PATHS if path != notebook.path]
    read = [
        node.value for cell in notebook.code for node in ast.walk(notebook.tree(cell)) if isinstance(node, ast.Constant)
    ]
    assert [text for text in read if isinstance(text, str) and any(other in text for other in others)] == []
