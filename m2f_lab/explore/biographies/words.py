"""What query biographies say in words: a table with a row per query, and what each of them is called.

Q queries.
"""

from __future__ import annotations

import numpy as np

from m2f_lab.explore.biographies.data import DUPLICATE, Biographies
from m2f_lab.explore.parts.labels import class_labels, percent
from m2f_lab.explore.parts.table import html_table, text_table

HEADER = (
    ("query", "Its number."),
    ("main class", "The class of most pixels it wins; in brackets: it wins none, but this is its likeliest class."),
    ("of its wins", "How much of what it wins is of that class."),
    ("wins", "The share of all pixels for whose class it contributes most."),
    ("wins in", "In how many images it wins a pixel."),
    ("active in", "In how many images it prefers a class to “no object” and its mask is above one half somewhere."),
    ("size", "The share of an image that its mask covers, where it is active: the median, and 10 % to 90 % of them."),
    ("note", "Dead: it wins no pixel of any image. Duplicate: the same class and nearly the same mask as another."),
)


class BiographyTable:
    """Rows of text, which a notebook shows as a table and `print` as lines.

    Attributes:
        queries: the query of each row. N
        header: the names of the columns.
        rows: one text per column each. N
    """

    def __init__(
        self, biographies: Biographies, sort: str = "wins", limit: int | None = None, threshold: float = DUPLICATE
    ) -> None:
        orders = biographies.orders(threshold)
        if sort not in orders:
            raise ValueError(f"sort must be one of {', '.join(orders)}, got {sort!r}.")
        self.queries = orders[sort][:limit]
        self.header = tuple(name for name, _ in HEADER)
        names, notes = main_class_names(biographies), query_notes(biographies, threshold)
        won, wins = biographies.won_pixels, biographies.wins
        sizes = np.stack([biographies.size_quantile(share) for share in (0.5, 0.1, 0.9)])
        self.rows = [
            (
                str(query),
                f"({names[query]})" if biographies.dead[query] and names[query] else names[query] or "–",
                "–" if biographies.dead[query] else percent(won[query].max() / won[query].sum()),
                percent(wins[query]),
                str(biographies.won_images[query]),
                str(biographies.active_images[query]),
                describe_sizes(sizes[:, query]),
                notes[query],
            )
            for query in self.queries
        ]

    def __repr__(self) -> str:
        numbers = {column for column in range(len(self.header)) if self.header[column] not in ("main class", "note")}
        return text_table([self.header, *self.rows], right=numbers)

    def _repr_html_(self) -> str:
        return html_table([self.header, *self.rows], tooltips=[help for _, help in HEADER])


def main_class_names(biographies: Biographies) -> list[str]:
    """The name of each query's main class; empty where it has none. Q"""
    labels = class_labels(biographies.classes, biographies.num_classes)
    return [labels[label][0] if label >= 0 else "" for label in biographies.main_class]


def query_notes(biographies: Biographies, threshold: float = DUPLICATE) -> list[str]:
    """What is unusual about each query; empty where nothing is. Q"""
    partners = biographies.duplicate_of(threshold)
    notes = []
    for query, (dead, partner) in enumerate(zip(biographies.dead, partners.tolist(), strict=True)):
        overlap = percent(biographies.overlap[query, partner])
        words = ["dead"] if dead else []
        words += [f"duplicate of {partner} (overlap {overlap})"] if partner >= 0 else []
        notes.append(", ".join(words))
    return notes


def describe_sizes(sizes: np.ndarray) -> str:
    """The median, and the range of most: 0.05, 0.01, 0.2 → "5 % (1–20 %)"; "–" if they are not known. [3]"""
    if np.isnan(sizes).any():
        return "–"
    median, low, high = (percent(size) for size in sizes)
    return f"{median} ({low.removesuffix(' %')}–{high})"
