"""Controls of tools: each is declared once, as a widget; links and the controls of a saved page follow from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ipywidgets

Trait = tuple[ipywidgets.Widget, str]
"""A widget and the name of one of its values."""


@dataclass(frozen=True)
class Control:
    """Control of a saved page: a slider from `low` to `high`, or a menu of `options`. It moves one trait of all views.

    Attributes:
        trait: of the views.
        label: before the control.
        help: its tooltip.
        options: (text, value) of the entries of a menu.
        low, high, step: of a slider.
        first: number shown for 0, where a person counts from another number.
    """

    trait: str
    label: str
    help: str = ""
    options: tuple[tuple[str, int | str], ...] | None = None
    low: float = 0
    high: float = 1
    step: float = 1
    first: int = 0


class Stepper(ipywidgets.IntSlider):
    """A slider through all places of a list, and a menu with their names that follows it.

    Attributes:
        menu: stands after the slider in a row of `controls`.
    """

    def __init__(self, name: str, options: Sequence[tuple[str, int]], tooltip: str) -> None:
        super().__init__(0, 0, len(options) - 1, description=name, tooltip=tooltip, readout=False)
        self.add_class(f"m2f-{name}-slider")
        self.menu = menu(f"{name}-menu", "", options, tooltip)


class Moves(NamedTuple):
    """A control and the trait of the pictures that it moves.

    Attributes:
        trait: of `MaskView`.
        control: a slider, menu or choice.
        views: names of the pictures that follow it; all of them by default.
        page: whether a saved page also has it.
    """

    trait: str
    control: ipywidgets.Widget
    views: Sequence[str] | None = None
    page: bool = True

    def pairs(self, views: Mapping[str, ipywidgets.Widget]) -> list[tuple[Trait, Trait]]:
        """Links from the control to its menu and to the pictures."""
        source = self.control, _place_trait(self.control)
        menus = [(source, (self.control.menu, "index"))] if isinstance(self.control, Stepper) else []
        names = views if self.views is None else self.views
        return [*menus, *((source, (views[name], self.trait)) for name in names)]

    def on_page(self) -> Control:
        """The same control on a saved page."""
        widget = self.control
        named = widget.menu if isinstance(widget, Stepper) else widget
        what = self.trait, widget.description, widget.tooltip
        if isinstance(widget, ipywidgets.SelectionSlider):
            return Control(*what, high=len(widget.options) - 1, first=int(widget.options[0]))
        if isinstance(named, ipywidgets.Dropdown):
            names = [option if isinstance(option, str) else option[0] for option in named.options]
            return Control(*what, options=tuple((name, place) for place, name in enumerate(names)))
        return Control(*what, None, widget.min, widget.max, widget.step)


class Chosen:
    """Attribute of a tool: the number that one of its controls is at, as people count.

    Args:
        control: the tool's attribute that holds the widget.
        doc: of the attribute.
        first: number of the first place.
        none: what comes before the first place, such as all heads together, which is None.
        order: the tool's attribute that holds the number of each place, where they are sorted.
    """

    def __init__(self, control: str, doc: str, *, first: int = 0, none: bool = False, order: str = "") -> None:
        self.control, self.__doc__ = control, doc
        self.first, self.none, self.order = first, none, order

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tool: ipywidgets.Widget | None, owner: type | None = None) -> int | Chosen | None:
        if tool is None:
            return self
        widget = getattr(tool, self.control)
        place = getattr(widget, _place_trait(widget)) - self.none
        if self.order:
            return int(getattr(tool, self.order)[place])
        return None if place < 0 else place + self.first

    def __set__(self, tool: ipywidgets.Widget, number: int | None) -> None:
        widget = getattr(tool, self.control)
        if number is not None or not self.none:
            self._check(tool, number)
        place = 0 if number is None else number - self.first + self.none
        if self.order:
            place = list(getattr(tool, self.order)).index(number)
        setattr(widget, _place_trait(widget), place)

    def checked(self, tool: ipywidgets.Widget, number: int | None) -> int | None:
        """A number that is asked for, or the one that the control is at where none is.

        Raises:
            ValueError: the control has no such number.
        """
        if number is None:
            return self.__get__(tool)
        self._check(tool, number)
        return number

    def _check(self, tool: ipywidgets.Widget, number: int) -> None:
        widget = getattr(tool, self.control)
        count = len(widget.options) if _place_trait(widget) == "index" else widget.max + 1
        check_range(self.name, number, count - self.none, self.first)


def _place_trait(widget: ipywidgets.Widget) -> str:
    """Name of the value that counts a control's places from 0."""
    return "index" if "index" in widget.keys else "value"


def check_range(name: str, value: int, count: int, first: int = 0) -> None:
    """Raises:
    ValueError: the value is not one of `count` numbers from `first` on.
    """
    if not first <= value < first + count:
        raise ValueError(f"There is no {name} {value}; they are numbered {first}…{first + count - 1}.")


# -------------------------------------------------------------------------------- widgets of the CSS class m2f-<name>


def slider(name: str, label: str, value: int, last: int, tooltip: str, **traits) -> ipywidgets.IntSlider:
    """A slider from 0 to `last`."""
    made = ipywidgets.IntSlider(value, 0, last, description=label, tooltip=tooltip, **traits)
    return made.add_class(f"m2f-{name}")


def share_slider(name: str, label: str, value: float, tooltip: str) -> ipywidgets.FloatSlider:
    """A slider from 0 to 100 %."""
    made = ipywidgets.FloatSlider(
        value, min=0, max=1, step=0.05, description=label, readout_format=".0%", tooltip=tooltip
    )
    return made.add_class(f"m2f-{name}")


def opacity_slider(value: float, tooltip: str = "How strongly masks cover the image.") -> ipywidgets.FloatSlider:
    """The slider that most tools have."""
    return share_slider("opacity-slider", "opacity", value, tooltip)


def layer_slider(label: str, num_layers: int, tooltip: str) -> ipywidgets.SelectionSlider:
    """A slider from layer 1 to the last, which it starts at."""
    made = ipywidgets.SelectionSlider(
        options=[str(layer) for layer in range(1, num_layers + 1)], index=num_layers - 1, description=label,
        tooltip=tooltip, style={"description_width": "initial"},
    )  # fmt: skip
    return made.add_class("m2f-layer-slider")


def menu(name: str, label: str, options: Sequence, tooltip: str, **traits) -> ipywidgets.Dropdown:
    """A menu; `options` are texts or (text, value)."""
    made = ipywidgets.Dropdown(options=options, description=label, tooltip=tooltip, **traits)
    return made.add_class(f"m2f-{name}")


def head_menu(num_heads: int, together: str) -> ipywidgets.Dropdown:
    """A menu of attention heads 1…n after all of them; digits on the keyboard are the same numbers."""
    options = [together, *(f"head {head}" for head in range(1, num_heads + 1))]
    tooltip = f"Attention heads look independently of each other. On the keyboard: digits; 0 is {together}."
    return menu("head-menu", "attention", [(text, place) for place, text in enumerate(options)], tooltip)


def choice(name: str, options: Sequence, index: int, tooltip: str) -> ipywidgets.ToggleButtons:
    """A few options side by side."""
    made = ipywidgets.ToggleButtons(
        options=options, index=index, tooltips=[tooltip] * len(options), style={"button_width": "72px"},
        layout={"width": "max-content"},
    )  # fmt: skip
    return made.add_class(f"m2f-{name}")


def button(name: str, label: str, tooltip: str, **traits) -> ipywidgets.Button:
    """A button."""
    return ipywidgets.Button(description=label, tooltip=tooltip, **traits).add_class(f"m2f-{name}")


def controls(*widgets: ipywidgets.Widget) -> ipywidgets.HBox:
    """A row of controls; it wraps where the page is narrow."""
    flat = []
    for widget in widgets:
        flat += [widget, widget.menu] if isinstance(widget, Stepper) else [widget]
    return ipywidgets.HBox(flat).add_class("m2f-controls")


def pictures(*columns: ipywidgets.Widget | Sequence[ipywidgets.Widget]) -> ipywidgets.HBox:
    """Pictures side by side; those of a list stand one below the other."""
    boxes = [
        ipywidgets.VBox(column).add_class("m2f-side") if isinstance(column, (list, tuple)) else column
        for column in columns
    ]
    return ipywidgets.HBox(boxes).add_class("m2f-views")
