"""Query biographies in words: a table with a row per query, and the name of each query.

Q queries.
"""

from __future__ import annotations

import numpy as np

from m2f_lab.explore.biographies.data import DUPLICATE, Biographies
from m2f_lab.explore.parts.labels import class_labels, percent
from m2f_lab.explore.parts.table import Table

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


def biography_table(
    biographies: Biographies, sort: str = "wins", limit: int | None = None, threshold: float = DUPLICATE
) -> Table:
    """Describe every query in one row; a notebook shows a table, `print` writes lines.

    Args:
        biographies: of one model.
        sort: one of the names of `Biographies.orders`.
        limit: keep only the first rows.
        threshold: overlap from which two queries count as duplicates.

    Raises:
        ValueError: the order does not exist.
    """
    orders = biographies.orders(threshold)
    if sort not in orders:
        raise ValueError(f"sort must be one of {', '.join(orders)}, got {sort!r}.")
    names, notes = main_class_names(biographies), query_notes(biographies, threshold)
    won, wins, sizes = biographies.won_pixels, biographies.wins, usual_sizes(biographies)
    rows = (
        (
            str(query),
            f"({names[query]})" if biographies.dead[query] and names[query] else names[query] or "–",
            "–" if biographies.dead[query] else percent(won[query].max() / won[query].sum()),
            percent(wins[query]),
            str(biographies.won_images[query]),
            str(biographies.active_images[query]),
            sizes[query],
            notes[query],
        )
        for query in orders[sort][:limit]
    )
    return Table(HEADER, tuple(rows))


def main_class_names(biographies: Biographies) -> list[str]:
    """The name of each query's main class; empty where it has none. Q"""
    labels = class_labels(biographies.classes, biographies.num_classes)
    return [labels[label][0] if label >= 0 else "" for label in biographies.main_class]


def query_notes(biographies: Biographies, threshold: float = DUPLICATE) -> list[str]:
    """Note on each query that is dead or a duplicate; empty for all others. Q"""
    partners = biographies.duplicate_of(threshold)
    notes = [["dead"] if dead else [] for dead in biographies.dead]
    for query in np.flatnonzero(partners >= 0):
        overlap = percent(biographies.overlap[query, partners[query]])
        notes[query].append(f"duplicate of {partners[query]} (overlap {overlap})")
    return [", ".join(words) for words in notes]


def usual_sizes(biographies: Biographies) -> list[str]:
    """The sizes of each query's masks. Q"""
    quantiles = (biographies.size_quantile(share) for share in (0.5, 0.1, 0.9))
    return [describe_sizes(sizes) for sizes in np.stack(list(quantiles), axis=1)]


def describe_sizes(sizes: np.ndarray) -> str:
    """The median, and the range of most: 0.05, 0.01, 0.2 → "5 % (1–20 %)"; "–" if they are not known. [3]"""
    if np.isnan(sizes).any():
        return "–"
    median, low, high = (percent(size) for size in sizes)
    return f"{median} ({low.removesuffix(' %')}–{high})"
