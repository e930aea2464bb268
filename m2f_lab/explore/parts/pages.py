"""Saved pages: one HTML file with linked views, figures and tables that needs neither a network nor a kernel."""

from __future__ import annotations

import base64
import gzip
import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import comm

from m2f_lab.explore.parts.assets import module, script_json, style
from m2f_lab.explore.parts.controls import Control
from m2f_lab.explore.parts.table import Table

LINKED = ("stack", "index", "channel", "opacity")

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{css}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

VIEWS = """<div id="m2f-controls"></div>
<div id="m2f-views"></div>
<script id="m2f-page" type="application/json">{state}</script>
<script type="module">{script}</script>"""


class View(Protocol):
    """A widget that a page can show: its module's `render` needs no kernel, and `page_state` names its values."""

    _esm: object
    _css: object

    def page_state(self) -> dict[str, object]: ...


class Figure(Protocol):
    """A figure that can be drawn as vectors, as those of matplotlib."""

    def savefig(self, file: io.StringIO, *, format: str) -> None: ...


@contextmanager
def off_page() -> Iterator[None]:
    """Keep widgets that are made inside the block from the front end: they are for a file only."""
    kept, comm.create_comm = comm.create_comm, comm.DummyComm
    try:
        yield
    finally:
        comm.create_comm = kept


def save_page(
    path: str | Path,
    columns: Sequence[View | Sequence[View]] = (),
    *,
    controls: Sequence[Control] = (),
    linked: Sequence[str] = LINKED,
    figures: Sequence[Figure] = (),
    tables: Sequence[Table] = (),
    title: str = "masks",
    note: str = "",
) -> None:
    """Write one HTML file: a title, a note, views that are linked to each other, figures, tables.

    Args:
        path: the file to write.
        columns: views from left to right; the views of a list stand one below the other.
        controls: sliders and menus above the views.
        linked: traits that all views share.
        figures: drawn as vectors, one below the other.
        tables: below the figures.
        title: of the page.
        note: one line below the title.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into; create it first.")
    columns = [list(column) if isinstance(column, (list, tuple)) else [column] for column in columns]
    parts = [f'<p class="m2f-note">{html.escape(note)}</p>'] if note else []
    if columns:
        parts.append(VIEWS.format(state=script_json(_page_state(columns, controls, linked)), script=module("page")))
    parts += [*map(_as_svg, figures), *(table._repr_html_() for table in tables)]
    css = style("mask_view") + style("page")
    path.write_text(PAGE.format(title=html.escape(title), body="\n".join(parts), css=css), encoding="utf-8")


def _page_state(columns: list[list[View]], controls: Sequence[Control], linked: Sequence[str]) -> dict:
    """State of a page as browser/page.js reads it. Equal buffers and modules are written once."""
    buffers: dict[bytes, int] = {}
    modules: dict[str, int] = {}

    def view_state(view: View) -> dict:
        values = view.page_state()
        packed = {name: value for name, value in values.items() if isinstance(value, bytes)}
        return {
            "traits": {name: value for name, value in values.items() if name not in packed},
            "packed": {name: buffers.setdefault(value, len(buffers)) for name, value in packed.items()},
            "module": modules.setdefault(str(view._esm), len(modules)),
        }

    return {
        "columns": [[view_state(view) for view in column] for column in columns],
        "buffers": [base64.b64encode(gzip.compress(data, 6)).decode() for data in buffers],
        "controls": [asdict(control) for control in controls],
        "linked": list(linked),
        "modules": list(modules),
    }


def _as_svg(figure: Figure) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]  # without the XML head
