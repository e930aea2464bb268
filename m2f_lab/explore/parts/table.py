"""What is written beside a picture: a line, a warning, bars, a table."""

from __future__ import annotations

import html
from collections.abc import Container, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of text under a header.

    Attributes:
        header: (text, tooltip) of each column.
        rows: one text per column each.
        marked: numbers of the rows that are set apart.
    """

    header: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    marked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"The table has {len(self.header)} columns, but this row has {len(row)}: {row}.")


@dataclass(frozen=True)
class Caption:
    """What is written below one mask.

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
        """What is not empty."""
        return {name: vars(value) if name == "table" else value for name, value in vars(self).items() if value}


def html_table(
    rows: Sequence[Sequence[str]], tooltips: Sequence[str] = (), bold: Container[tuple[int, int]] = ()
) -> str:
    """HTML.

    Args:
        rows: text; the first row is the header.
        tooltips: of the header's cells.
        bold: (row, column) of the cells that stand out; row 0 is the first below the header.
    """
    header, *body = rows
    titles = [f' title="{html.escape(text)}"' for text in tooltips] or [""] * len(header)
    head = "".join(f"<th{title}>{html.escape(cell)}</th>" for title, cell in zip(titles, header, strict=True))

    def cells(number: int, row: Sequence[str]) -> str:
        escaped = (html.escape(cell) for cell in row)
        return "".join(f"<td>{f'<b>{c}</b>' if (number, i) in bold else c}</td>" for i, c in enumerate(escaped))

    lines = "".join(f"<tr>{cells(number, row)}</tr>" for number, row in enumerate(body))
    return f'<table class="m2f-table"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>'


def text_table(rows: Sequence[Sequence[str]], right: Container[int] = ()) -> str:
    """Lines, whose columns are as wide as their longest cell.

    Args:
        rows: text; the first row is the header.
        right: the columns that end below each other, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
