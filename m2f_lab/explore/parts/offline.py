"""Pages that stand alone: linked MaskViews in one HTML file that scrubs and hovers without a network or a kernel."""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import anywidget
import comm

from m2f_lab.explore.parts.controls import Control
from m2f_lab.explore.parts.mask_view import BROWSER, MaskView, deflated
from m2f_lab.explore.parts.page import write_page

LINKED = ("stack", "index", "channel", "opacity")

BODY = """<p class="m2f-note">{note}</p>
<div id="m2f-controls"></div>
<div id="m2f-views"></div>
<script id="m2f-page" type="application/json">{page}</script>
<script type="module">{script}</script>"""


@contextmanager
def off_page() -> Iterator[None]:
    """Views that are made meanwhile are for a file only: no browser is told of them, nor of their end."""
    kept, comm.create_comm = comm.create_comm, comm.DummyComm
    try:
        yield
    finally:
        comm.create_comm = kept


def save_page(
    path: str | Path,
    columns: Sequence[MaskView | Sequence[MaskView]],
    *,
    controls: Sequence[Control] | None = None,
    linked: Sequence[str] = LINKED,
    title: str = "masks",
    note: str = "Click the picture, then use the arrow keys.",
) -> None:
    """Write views to one file, linked to each other.

    Args:
        path: the file to write.
        columns: views from left to right; a list of views stands one below the other.
        controls: above the views; by default a slider for whatever there is more than one of.
        linked: traits that all views share.
        title: of the page.
        note: one line below the title.
    """
    columns = [list(column) if isinstance(column, (list, tuple)) else [column] for column in columns]
    first = columns[0][0]
    packed: dict[bytes, int] = {}  # views of one explorer share the image: it is written once
    modules: dict[str, int] = {}
    state = [[_state(view, packed, modules) for view in column] for column in columns]
    page = {
        "columns": state,
        "buffers": [base64.b64encode(gzip.compress(data, 6)).decode() for data in packed],
        "controls": [asdict(control) for control in (default_controls(first) if controls is None else controls)],
        "linked": list(linked),
        "modules": list(modules),
    }
    body = BODY.format(
        note=html.escape(note),
        page=json.dumps(page, ensure_ascii=False).replace("</", "<\\/"),  # a closing tag would end the script
        script=(BROWSER / "offline.js").read_text(encoding="utf-8"),
    )
    write_page(path, title, body, first._css + (BROWSER / "offline.css").read_text(encoding="utf-8"))


def default_controls(view: MaskView) -> list[Control]:
    """Sliders for stacks, masks and channels, where there is more than one, and for the opacity."""
    counts = {
        "stack": len(view.shapes),
        "index": max(shape[0] for shape in view.shapes),
        "channel": max(shape[1] for shape in view.shapes),
    }
    names = {"stack": "stack", "index": "mask", "channel": "channel"}
    sliders = [Control(trait, names[trait], high=count - 1) for trait, count in counts.items() if count > 1]
    return [*sliders, Control("opacity", "opacity", step=0.05)]


def _state(view: MaskView, packed: dict[bytes, int], modules: dict[str, int]) -> dict:
    """What a page needs of a view: its traits, and the numbers of its buffers and of its module."""
    names = set(view.traits(sync=True)) - set(anywidget.AnyWidget.class_traits(sync=True)) - {"stroke"}
    traits = {name: getattr(view, name) for name in sorted(names) if not name.startswith("_")}
    traits["masks"] = deflated(view.masks)
    return {
        "traits": {name: value for name, value in traits.items() if not isinstance(value, bytes)}
        | {"brush": 0, "bound_keys": []},
        "packed": {
            name: packed.setdefault(value, len(packed)) for name, value in traits.items() if isinstance(value, bytes)
        },
        "module": modules.setdefault(view._esm, len(modules)),
    }
