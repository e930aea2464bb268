"""Names of classes and queries on the screen, and shares of a whole.

Q queries, K classes.
"""

from __future__ import annotations

import numpy as np

from m2f_lab.data import Classes
from m2f_lab.data.colors import distinct_colors

NO_OBJECT = "no object"
OPENED = "Its mask was empty, so nothing was left to see: the fallback opened every cell."

Labels = list[tuple[str, str]]
"""Name and CSS colour of each class; "no object" last. K + 1"""


def known_classes(classes: Classes | None, num_classes: int) -> Classes:
    """Names and colours of the classes, made up where they are not known.

    Raises:
        ValueError: there are names, but of another number of classes.
    """
    if classes is None:
        names = tuple(f"class {k}" for k in range(num_classes))
        return Classes(names, distinct_colors(num_classes), frozenset())
    if len(classes) != num_classes:
        raise ValueError(
            f"The model predicts {num_classes} classes, but there are {len(classes)} class names; pass the classes it "
            "was trained with."
        )
    return classes


def class_labels(classes: Classes | None, num_classes: int) -> Labels:
    """Names and CSS colours of `known_classes`, and of "no object"."""
    known = known_classes(classes, num_classes)
    labels = [(name, f"rgb{tuple(map(int, color))}") for name, color in zip(known.names, known.colors, strict=True)]
    return [*labels, (NO_OBJECT, "#9aa0a6")]


def percent(share: float) -> str:
    """0.123 → "12 %"; 0.0123 → "1.2 %"; 0.00012 → "0.01 %"; only nothing is "0 %"."""
    hundredth = 100 * share
    if hundredth == 0 or hundredth >= 9.95:
        return f"{hundredth:.0f} %"
    return f"{hundredth:.1f} %" if hundredth >= 0.095 else f"{max(hundredth, 0.01):.2f} %"


def when(prediction: int) -> str:
    """The moment of a prediction, in words."""
    return f"after layer {prediction}" if prediction else "before the first layer"


def query_options(probabilities: np.ndarray, order: np.ndarray, labels: Labels) -> list[tuple[str, int]]:
    """Menu entries (text, query number) in the given order. [Q, K+1], [Q], (K + 1) labels"""
    entries = []
    for query in order.tolist():
        best = int(probabilities[query, :-1].argmax())
        unlikely = probabilities[query, -1] > probabilities[query, best]
        text = f"query {query} · {labels[best][0]} {percent(probabilities[query, best])}"
        entries.append((text + " (no object)" if unlikely else text, query))
    return entries
