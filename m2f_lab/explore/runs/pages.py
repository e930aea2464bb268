"""Pages that stand alone with figures as vectors and tables; for what needs no scrubbing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2f_lab.explore.parts.page import write_page
from m2f_lab.explore.parts.table import html_table

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2rem auto; max-width: 80rem;
       padding: 0 1rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1.5rem 0; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d8dee4; text-align: left; }
tr > :first-child { font-weight: 600; }
"""


def save_static_page(
    path: str | Path, title: str, figures: Sequence[Figure], tables: Sequence[Sequence[Sequence[str]]] = ()
) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        path: of the file.
        title: its heading.
        figures: drawn as vectors, one below the other.
        tables: below them; the first row of each is its header.
    """
    parts = []
    for figure in figures:
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        parts.append(drawn.getvalue()[drawn.getvalue().index("<svg") :])  # without the XML head
    parts += [html_table(table) for table in tables]
    write_page(path, title, "\n".join(parts), CSS)
