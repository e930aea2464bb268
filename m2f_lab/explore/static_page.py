"""Pages that stand alone with figures as vectors and tables; for what needs no scrubbing."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 2rem auto; max-width: 80rem;
       padding: 0 1rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin: 1.5rem 0; }}
th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #d8dee4; text-align: left; }}
tr > :first-child {{ font-weight: 600; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header."""
    header, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    )
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in body)}</table>"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal: columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
    page = PAGE.format(title=html.escape(title), body="\n".join(parts))
    Path(path).expanduser().write_text(page, encoding="utf-8")
