"""What classes are called on the screen, and shares of a whole.

K classes.
"""

from __future__ import annotations

from m2f_lab.data import Classes
from m2f_lab.data.colors import distinct_colors

NO_OBJECT = "no object"

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
    labels = [
        (name, f"rgb({', '.join(map(str, color))})") for name, color in zip(known.names, known.colors, strict=True)
    ]
    return [*labels, (NO_OBJECT, "#9aa0a6")]


def percent(share: float) -> str:
    """0.123 → "12 %"; 0.0123 → "1.2 %"; 0.00012 → "0.01 %"; only nothing is "0 %"."""
    hundredth = 100 * share
    if hundredth == 0 or hundredth >= 9.95:
        return f"{hundredth:.0f} %"
    return f"{hundredth:.1f} %" if hundredth >= 0.095 else f"{max(hundredth, 0.01):.2f} %"
