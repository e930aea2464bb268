"""What all tools share: pictures and controls on one page, a static figure, and an end that gives the memory back."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import ipywidgets

if TYPE_CHECKING:
    from m2f_lab.explore.mask_view import MaskView

Trait = tuple[ipywidgets.Widget, str]
"""A widget and the name of one of its values."""


class Explorer(ipywidgets.VBox):
    """The base of every tool: a widget in a notebook, and its `figure()` anywhere else.

    Attributes:
        views: the pictures, by name.
    """

    # A tool that is refused its arguments is closed, too.
    views: Mapping[str, MaskView] = MappingProxyType({})
    _links: tuple[ipywidgets.Widget, ...] = ()

    def __init__(
        self,
        rows: Sequence[ipywidgets.Widget],
        views: dict[str, MaskView],
        *,
        name: str,
        summary: str,
        links: Sequence[tuple[Trait, Trait]] = (),
    ) -> None:
        """Args:
        rows: from top to bottom.
        views: all pictures among them.
        name: the tool's CSS class is m2f-<name>.
        summary: the tool in one line; it is its `repr`.
        links: values that the browser keeps equal. The kernel only hears of it: were it to answer, it would fight the
            mouse.
        """
        self.views = views
        self._summary = summary
        self._links = tuple(ipywidgets.jslink(source, target) for source, target in links)
        super().__init__(list(rows))
        self.add_class("m2f-explorer").add_class(f"m2f-{name}")

    def close(self) -> None:
        """Take the tool off the page and give its memory back."""
        for widget in [*self._links, *self.views.values(), *_descendants(self)]:
            widget.close()
        self.children = ()
        self._links, self.views = (), {}
        super().close()

    def __repr__(self) -> str:
        return self._summary

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and its static figure for wherever widgets do not run."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=64)
        return super()._repr_mimebundle_(**kwargs) | {"image/png": file.getvalue()}


def slider(name: str, label: str, value: int, last: int, tooltip: str, **traits) -> ipywidgets.IntSlider:
    """A slider from 0 to `last` with the CSS class m2f-<name>."""
    made = ipywidgets.IntSlider(value, 0, last, description=label, tooltip=tooltip, **traits)
    return made.add_class(f"m2f-{name}")


def share_slider(name: str, label: str, value: float, tooltip: str) -> ipywidgets.FloatSlider:
    """A slider from 0 to 100 % with the CSS class m2f-<name>."""
    made = ipywidgets.FloatSlider(
        value, min=0, max=1, step=0.05, description=label, readout_format=".0%", tooltip=tooltip
    )
    return made.add_class(f"m2f-{name}")


def menu(name: str, label: str, options: Sequence, tooltip: str, **traits) -> ipywidgets.Dropdown:
    """A menu with the CSS class m2f-<name>. `options` are texts or (text, value)."""
    made = ipywidgets.Dropdown(options=options, description=label, tooltip=tooltip, **traits)
    return made.add_class(f"m2f-{name}")


def button(name: str, label: str, tooltip: str, **traits) -> ipywidgets.Button:
    """A button with the CSS class m2f-<name>."""
    return ipywidgets.Button(description=label, tooltip=tooltip, **traits).add_class(f"m2f-{name}")


def controls(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    """A row of controls; it wraps where the page is narrow."""
    return ipywidgets.HBox(widgets).add_class("m2f-controls")


def pictures(*columns: ipywidgets.Widget | Sequence[ipywidgets.Widget]) -> ipywidgets.HBox:
    """Pictures side by side; those of a list stand one below the other."""
    boxes = [
        ipywidgets.VBox(column).add_class("m2f-side") if isinstance(column, (list, tuple)) else column
        for column in columns
    ]
    return ipywidgets.HBox(boxes).add_class("m2f-views")


def check_range(name: str, value: int, count: int) -> None:
    """Raises:
    ValueError: the value is not one of 0…count - 1.
    """
    if not 0 <= value < count:
        raise ValueError(f"There is no {name} {value}; they are numbered 0…{count - 1}.")


def _descendants(box: ipywidgets.Box) -> list[ipywidgets.Widget]:
    found = []
    for child in box.children:
        found += [child, *(_descendants(child) if isinstance(child, ipywidgets.Box) else [])]
    return found
