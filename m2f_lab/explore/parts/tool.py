"""What all tools share: pictures and controls on one page, a static figure, and an end that gives the memory back."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING

import ipywidgets

from m2f_lab.explore.parts.links import Links, Trait

if TYPE_CHECKING:
    from torch import Tensor

    from m2f_lab.explore.parts.mask_view import MaskView
    from m2f_lab.structures import Output


class Explorer(ipywidgets.VBox):
    """The base of every tool: a widget in a notebook, and its `figure()` anywhere else.

    Attributes:
        views: the pictures, by name.
    """

    # A tool that is refused its arguments is closed, too.
    views: Mapping[str, MaskView] = MappingProxyType({})
    _links: tuple[Links, ...] = ()

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
        links: values that the browser keeps equal; see `Links`.
        """
        self.views = views
        self._summary = summary
        self._links = (Links(links),) if links else ()
        super().__init__(list(rows))
        self.add_class("m2f-explorer").add_class(f"m2f-{name}")
        trim_heap()  # of what the model needed on its way

    def update(self) -> None:
        """Bring pictures and menus in the kernel up to what the browser shows; only a browser links them."""
        for links in self._links:
            links.update()

    def close(self) -> None:
        """Take the tool off the page and give its memory back; tools drop their own arrays first."""
        if self.comm is None:  # closed already, or never shown
            return
        for widget in [*self._links, *self.views.values(), *_descendants(self)]:
            _close(widget)
        self.children = ()
        self._links, self.views = (), {}
        parts = _parts(self)
        super().close()
        for part in parts:
            part.close()
        gc.collect()  # callbacks go round in circles
        trim_heap()

    def __repr__(self) -> str:
        return self._summary

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and its static figure for wherever widgets do not run."""
        figure = self.figure()
        figure.set_dpi(64)
        return super()._repr_mimebundle_(**kwargs) | {"image/png": figure._repr_png_()}


class LayerChoice:
    """What tools have in common whose `layer_slider` goes through all predictions."""

    layer_slider: ipywidgets.IntSlider

    @property
    def layer(self) -> int:
        """The prediction that is shown: 0 is the learned queries', n that after n layers."""
        return self.layer_slider.value

    @layer.setter
    def layer(self, layer: int) -> None:
        check_range("layer", layer, self.layer_slider.max + 1)
        self.layer_slider.value = layer


class HeadChoice:
    """What tools with a `head_menu` have in common: its first entry is all heads together."""

    head_menu: ipywidgets.Dropdown

    @property
    def head(self) -> int | None:
        """The attention head that is shown, from 0; None for all of them together."""
        return self.head_menu.index - 1 if self.head_menu.index else None

    @head.setter
    def head(self, head: int | None) -> None:
        check_range("head", 0 if head is None else head, len(self.head_menu.options) - 1)
        self.head_menu.index = 0 if head is None else head + 1


def recalled(output: Output) -> Callable[..., Output]:
    """A model that has seen one image, and repeats what it said of it.

    Raises, when it is called:
        ValueError: the image is of another size.
    """

    def repeat(images: Tensor, **options) -> Output:
        given, seen = (f"{width} × {height}" for height, width in (images.shape[2:], output.image_size))
        if given != seen:
            raise ValueError(
                f"The output was made of an image of {seen} pixels, not of {given}. Pass the one that it was made of, "
                "and shortest_edge and longest_edge where that was resized for the model."
            )
        return output

    return repeat


def trim_heap() -> None:
    """Hand freed memory back to the system.

    glibc keeps what was freed in pieces for later: after a model saw a large image, hundreds of megabytes.
    """
    with suppress(OSError, AttributeError):  # other systems hand it back by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)


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


def check_range(name: str, value: int, count: int, first: int = 0) -> None:
    """Raises:
    ValueError: the value is not one of `count` numbers from `first` on.
    """
    if not first <= value < first + count:
        raise ValueError(f"There is no {name} {value}; they are numbered {first}…{first + count - 1}.")


def head_menu(num_heads: int, together: str, tooltip: str) -> ipywidgets.Dropdown:
    """A menu of attention heads, by their channels; `together` is what channel 0 shows."""
    return menu("head-menu", "attention", head_options(num_heads, together), tooltip)


def head_options(num_heads: int, together: str) -> list[tuple[str, int]]:
    """(text, channel) each; heads count from 1, as the digits of the keyboard do."""
    return [(together, 0), *((f"head {head}", head) for head in range(1, num_heads + 1))]


def layer_slider(label: str, num_layers: int, tooltip: str) -> ipywidgets.SelectionSlider:
    """A slider from layer 1 to the last, which it starts at; its `index` counts from 0, as pictures do."""
    made = ipywidgets.SelectionSlider(
        options=[str(layer) for layer in range(1, num_layers + 1)], index=num_layers - 1, description=label,
        tooltip=tooltip, style={"description_width": "initial"},
    )  # fmt: skip
    return made.add_class("m2f-layer-slider")


def _descendants(box: ipywidgets.Box) -> list[ipywidgets.Widget]:
    found = []
    for child in box.children:
        found += [child, *(_descendants(child) if isinstance(child, ipywidgets.Box) else [])]
    return found


def _close(widget: ipywidgets.Widget) -> None:
    """Close a widget and what it is made of, which it leaves open."""
    for part in _parts(widget):
        part.close()
    widget.close()


def _parts(widget: ipywidgets.Widget) -> list[ipywidgets.Widget]:
    found = [getattr(widget, name, None) for name in ("layout", "style")]
    return [part for part in found if isinstance(part, ipywidgets.Widget)]
