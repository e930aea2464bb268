"""Links: values of widgets that the browser keeps equal by itself.

One widget for all pairs of a tool, where `ipywidgets.jslink` takes one per pair: a page opens two dozen channels to the
kernel less, and the kernel hears of a change once.
"""

from __future__ import annotations

from collections.abc import Sequence

import anywidget
import ipywidgets
import traitlets

from m2f_lab.explore.parts.assets import module
from m2f_lab.explore.parts.controls import Trait


class Links(anywidget.AnyWidget):
    """Pairs of values that the browser keeps equal.

    The kernel hears of the first, the source, and nothing of the second, the target, until it says `update`. It never
    answers: it would fight the mouse.

    Attributes:
        pairs: (widget, name of a value, widget, name of a value); at first the second takes the value of the first.
    """

    _esm = module("links")

    pairs = traitlets.List().tag(sync=True, **ipywidgets.widget_serialization)

    def __init__(self, pairs: Sequence[tuple[Trait, Trait]]) -> None:
        """Link pairs of values.

        Raises:
            ValueError: a widget has no such value.
        """
        for widget, name in (end for pair in pairs for end in pair):
            if name not in widget.keys:
                raise ValueError(f"{type(widget).__name__} has no value {name!r} that a browser knows.")
        super().__init__(pairs=[(*source, *target) for source, target in pairs])

    def update(self) -> None:
        """Bring the targets in the kernel up to their sources."""
        for source, name, target, other in self.pairs:
            setattr(target, other, getattr(source, name))
