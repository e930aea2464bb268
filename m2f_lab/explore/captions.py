"""What is written beside a picture: a line, a warning, bars, a table."""

from __future__ import annotations

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
