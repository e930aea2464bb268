"""Run notebooks without a browser.

    python tools/run_notebooks.py execute [notebook …]    in place, for committing; all of notebooks/ by default
    python tools/run_notebooks.py quickstart              notebook 00 into runs/quickstart/: a page and its pictures

Both print one line per cell with its time, and the text that a long cell prints while it runs.
"""

from __future__ import annotations

import argparse
import base64
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
QUICKSTART = ROOT / "runs" / "quickstart"
WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 600  # seconds; far above what any cell may take, so that a hanging one ends


class ProgressClient(NotebookClient):
    """Notebook client that prints its progress.

    nbclient has hooks for the begin and the end of a cell; the text in between arrives in `process_message`.
    """

    def __init__(self, notebook: NotebookNode, title: str) -> None:
        super().__init__(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": str(NOTEBOOKS)}},
            store_widget_state=False,
            record_timing=False,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else every kernel warns of unencrypted localhost
            on_cell_execute=self._begin,
            on_cell_executed=self._end,
        )
        self._labels = dict(_label_cells(notebook))
        self._title = title
        self._done: threading.Event | None = None

    def run(self) -> float:
        """Execute all cells. Returns seconds."""
        begun = time.perf_counter()
        print(f"{self._title}: {len(self._labels)} cells", flush=True)
        try:
            self.execute()
        finally:
            self._stop_clock()
        return time.perf_counter() - begun

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream" and cell_index in self._labels:
            self._clear_line()
            for line in msg["content"]["text"].replace("\r", "\n").splitlines():
                if line.strip():
                    print(f"             {line}", flush=True)
        return super().process_message(msg, cell, cell_index)

    def _begin(self, cell, cell_index: int) -> None:
        if cell_index in self._labels:
            self._begun = time.perf_counter()
            self._done = threading.Event()
            threading.Thread(target=self._clock, args=(cell_index, self._done), daemon=True).start()

    def _end(self, cell, cell_index: int, execute_reply) -> None:
        if cell_index in self._labels:
            self._stop_clock()
            print(self._line(cell_index), flush=True)

    def _clock(self, cell_index: int, done: threading.Event) -> None:
        """Shows a running time; on a terminal every second, in a log every half minute."""
        terminal = sys.stdout.isatty()
        while not done.wait(1 if terminal else 30):
            print(self._line(cell_index), end="\r" if terminal else " …\n", flush=True)

    def _stop_clock(self) -> None:
        if self._done is not None:
            self._done.set()
        self._clear_line()

    def _clear_line(self) -> None:
        if sys.stdout.isatty():
            print("\x1b[2K\r", end="")

    def _line(self, cell_index: int) -> str:
        number = list(self._labels).index(cell_index) + 1
        seconds = time.perf_counter() - self._begun
        return f"  [{number:2}/{len(self._labels)}] {seconds:5.1f} s  {self._labels[cell_index]}"


def _label_cells(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    """For every code cell: its index and the heading above it, or else its first line."""
    heading = ""
    for index, cell in enumerate(notebook.cells):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type == "markdown":
            heading = next((line.lstrip("# ") for line in lines if line.startswith("#")), heading)
        elif cell.cell_type == "code" and lines:
            yield index, (heading or lines[0])[:80]
            heading = ""


def execute(paths: list[Path]) -> None:
    """Run notebooks and write them back, with as little in them as a reader needs and no more."""
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        seconds = ProgressClient(notebook, path.name).run()
        normalize(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB\n", flush=True)


def normalize(notebook: NotebookNode) -> None:
    """Remove what differs between machines and runs, so that a diff shows what changed.

    References to widgets go as well: without a kernel they show an error in place of the picture or text beside them.
    """
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: cell.metadata[key] for key in ("tags",) if cell.metadata.get(key)})
        if cell.cell_type == "code":
            cell.outputs = _merge_streams(cell.outputs)
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)


def _merge_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Text that arrived in several pieces becomes one piece, whatever the timing was."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == "stream" == merged[-1].output_type and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def quickstart(out: Path = QUICKSTART) -> None:
    """Run notebook 00, write its page and its pictures, and say where they are."""
    source = next(NOTEBOOKS.glob("00_*.ipynb"), None)
    if source is None:
        raise FileNotFoundError(f"There is no notebook 00 in {NOTEBOOKS}; was the whole repository cloned?")
    notebook = nbformat.read(source, as_version=4)
    seconds = ProgressClient(notebook, source.name).run()
    normalize(notebook)
    pictures = write_pictures(notebook, out / "pictures")
    nbformat.write(notebook, out / source.name)
    page = out / "index.html"
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], encoding="utf-8")
    print(f"\nDone in {seconds:.0f} s.")
    print(f"  the page       {page.relative_to(ROOT)}")
    print(f"  the pictures   {out.relative_to(ROOT)}/pictures ({len(pictures)} files)")
    print("  to go on       make lab        (opens JupyterLab on notebooks/)")


def write_pictures(notebook: NotebookNode, folder: Path) -> list[Path]:
    """Save every PNG that the cells showed, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    written = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                path = folder / f"{len(written) + 1:02}.png"
                path.write_bytes(base64.b64decode(output.data["image/png"]))
                written.append(path)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    executing = commands.add_parser("execute", help="run notebooks in place")
    executing.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    commands.add_parser("quickstart", help="run notebook 00 and write a page")
    arguments = parser.parse_args()
    try:
        if arguments.command == "execute":
            execute(arguments.notebooks or sorted(NOTEBOOKS.glob("*.ipynb")))
        else:
            quickstart()
    except CellExecutionError as error:
        print(f"\nA cell failed; nothing was written.\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
