"""Text beside a picture: a line, a warning, bars, a table; tables also stand alone, in a notebook or a terminal."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

_NUMBER = re.compile(r"[(+−-]?\d|–$|∞$|$")  # how the cells of a column of numbers begin


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text under a header; `print` shows lines, a notebook an HTML table.

    Attributes:
        header: (text, tooltip) of each column.
        rows: one text per column each.
        marked: numbers of the rows that are set apart.
        bold: (row, column) of the cells that stand out.
    """

    header: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()
    bold: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"The table has {len(self.header)} columns, but this row has {len(row)}: {row}.")

    def as_json(self) -> dict:
        """The table as a picture's caption sends it to the browser."""
        return {"header": self.header, "rows": self.rows, "marked": self.marked}

    def _repr_html_(self) -> str:
        titles = (f' title="{html.escape(tooltip)}"' if tooltip else "" for _, tooltip in self.header)
        head = "".join(
            f"<th{title}>{html.escape(name)}</th>" for title, (name, _) in zip(titles, self.header, strict=True)
        )
        lines = ""
        for number, row in enumerate(self.rows):
            cells = (html.escape(cell) for cell in row)
            cells = (f"<b>{cell}</b>" if (number, i) in self.bold else cell for i, cell in enumerate(cells))
            lines += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        return f'<table class="m2f-table"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'

    def __repr__(self) -> str:
        """Columns as wide as their longest cell; numbers end below each other."""
        columns = []
        for (name, _), *cells in zip(self.header, *self.rows, strict=True):
            width = max(map(len, (name, *cells)))
            right = all(_NUMBER.match(cell) for cell in cells)
            columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in (name, *cells)])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


@dataclass(frozen=True)
class Caption:
    """Text below one mask.

    Attributes:
        text: one line.
        warning: set apart, for what a reader should not overlook.
        bars: (label, value in 0…1, CSS colour) each.
        table: below the bars.
    """

    text: str = ""
    warning: str = ""
    bars: tuple[tuple[str, float, str], ...] = ()
    table: Table | None = None

    def as_json(self) -> dict:
        """All fields that are not empty."""
        return {
            name: value.as_json() if isinstance(value, Table) else value for name, value in vars(self).items() if value
        }
