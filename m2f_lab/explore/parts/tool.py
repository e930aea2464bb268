"""Bases of all tools: pictures and controls on one page, a figure, a saved page, and an end that frees memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import ipywidgets
import numpy as np

from m2f_lab.data import Classes
from m2f_lab.explore.parts.controls import Control, Moves, Trait
from m2f_lab.explore.parts.links import Links
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.pages import off_page, save_page
from m2f_lab.explore.parts.reading import AnyImage, Model, constant_model
from m2f_lab.inference.images import as_rgb
from m2f_lab.structures import Output

Columns = Sequence[MaskView | Sequence[MaskView]]
"""Pictures of a saved page from left to right; a list of pictures stands one below the other."""


class Tool(ipywidgets.VBox):
    """Base of every tool: a widget in a notebook, and its `figure()` anywhere else.

    Attributes:
        views: the pictures, by name.
    """

    TITLE, NOTE = "", ""  # of a saved page
    LINKED: tuple[str, ...] = ()  # traits that pictures of a saved page share, besides those of its controls
    HELD: tuple[str, ...] = ()  # attributes that hold much memory; None once closed

    # Defaults for close() when __init__ raised.
    views: Mapping[str, MaskView] = MappingProxyType({})
    _links: tuple[Links, ...] = ()
    _moves: Sequence[Moves] = ()

    def __init__(
        self,
        rows: Sequence[ipywidgets.Widget],
        views: dict[str, MaskView],
        *,
        name: str,
        summary: str,
        moves: Sequence[Moves] = (),
        links: Sequence[tuple[Trait, Trait]] = (),
    ) -> None:
        """Put the tool together.

        Args:
            rows: from top to bottom.
            views: all pictures among them.
            name: the tool's CSS class is m2f-<name>.
            summary: the tool in one line; it is its `repr`.
            moves: controls and what they move in the pictures, here and on a saved page.
            links: other values that the browser keeps equal; see `Links`.
        """
        self.views = views
        self._summary, self._moves = summary, moves
        pairs = [*(pair for move in moves for pair in move.pairs(views)), *links]
        self._links = (Links(pairs),) if pairs else ()
        super().__init__(list(rows))
        self.add_class("m2f-explorer").add_class(f"m2f-{name}")
        trim_heap()  # of the memory that the model's forward pass took

    def update(self) -> None:
        """Bring pictures and menus in the kernel up to what the browser shows; only a browser links them."""
        for links in self._links:
            links.update()

    def save_html(self, path: str | Path, title: str | None = None) -> None:
        """Write one self-contained page that works without a network or a kernel.

        Args:
            path: the file to write.
            title: of the page.
        """
        self.update()
        controls = self._page_controls()
        linked = tuple(dict.fromkeys([*(control.trait for control in controls), *self.LINKED]))
        with off_page():
            columns = self._page_columns()
        try:
            save_page(
                path, columns, controls=controls, linked=linked, title=title or self.TITLE, note=self._page_note()
            )
        finally:
            for column in columns:
                for view in column if isinstance(column, Sequence) else [column]:
                    if view not in self.views.values():
                        view.close()

    def _page_controls(self) -> list[Control]:
        return [move.on_page() for move in self._moves if move.page]

    def _page_columns(self) -> Columns:
        """Pictures of a saved page. Those that are made for it, which no browser is told of, are closed afterwards."""
        return list(self.views.values())

    def _page_note(self) -> str:
        """One line below the title."""
        return self.NOTE

    def close(self) -> None:
        """Take the tool off the page and give its memory back."""
        for name in self.HELD:
            setattr(self, name, None)
        if self.comm is None:  # closed already, or never shown
            return
        *others, _ = [part for widget in (*self._links, *self.views.values(), self) for part in _parts(widget)]
        for widget in others:
            widget.close()
        self.children = ()
        self._links, self.views, self._moves = (), {}, ()
        super().close()
        gc.collect()  # callbacks hold cycles
        trim_heap()

    def __repr__(self) -> str:
        return self._summary

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, and its static figure for wherever widgets do not run."""
        figure = self.figure()
        figure.set_dpi(64)
        return super()._repr_mimebundle_(**kwargs) | {"image/png": figure._repr_png_()}


class ImageTool(Tool):
    """Base of tools that show what a model makes of one image, or several models side by side.

    A tool defines `_read(models, edges)`, which runs the models on the image resized to `edges` and keeps their
    numbers, and `_build()`, which makes controls and pictures and ends with `_assemble`.

    Attributes:
        image: uint8 [H, W, 3]
        classes: names and colours as they were given, or the model's own; may be None before `_read` knows better.
        width: of the large pictures, in CSS pixels.
    """

    WIDTH = 460
    SEVERAL = False  # takes models by name

    def __init__(
        self,
        model: Model | Mapping[str, Model],
        image: AnyImage,
        *,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int | None = None,
    ) -> None:
        """Run the model on the image and show what it did.

        Args:
            model: a Mask2Former, or any function of images [1, 3, H, W] that returns an `Output`; for
                SamplingExplorer and MatchingExplorer also several by name, the earliest first.
            image: a path, a PIL image or RGB uint8 [H, W, 3].
            classes: names and colours; by default the model's own.
            shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
            longest_edge: but to no more than this, in pixels.
            width: of the large pictures, in CSS pixels.

        Raises:
            ValueError: there is no model, or the model's numbers cannot be shown.
        """
        models = dict(model) if isinstance(model, Mapping) else {"": model}
        if not models:
            raise ValueError(f"{type(self).__name__} needs a model, or several by name; there is none.")
        if len(models) > 1 and not self.SEVERAL:
            raise ValueError(f"{type(self).__name__} shows one model, got {len(models)}; open one tool for each.")
        self.image = as_rgb(image)
        self.width = self.WIDTH if width is None else width
        self.classes = getattr(next(iter(models.values())), "classes", None) if classes is None else classes
        self._names = " | ".join(filter(None, models)) or "1 model"
        self._read(models, {"shortest_edge": shortest_edge, "longest_edge": longest_edge})
        self._build()

    @classmethod
    def from_output(cls, output: Output | Mapping[str, Output], image: np.ndarray, *args, **options):
        """Open the tool on an output that was made of this image earlier.

        Args:
            output: for QueryExplorer made with `keep_attention=True`; for MatchingExplorer also several by name.
            image: that the output was made of.
            args, options: of the tool.

        Raises:
            ValueError: the output was made of an image of another size.
        """
        outputs = dict(output) if isinstance(output, Mapping) else {"": output}
        return cls({name: constant_model(made) for name, made in outputs.items()}, image, *args, **options)

    def _check_alike(self, what: str, *numbers: str) -> None:
        """Raises:
        ValueError: the traces of several models differ in some of these numbers.
        """
        found = {
            name: " and ".join(str(getattr(trace, number)) for number in numbers) for name, trace in self.traces.items()
        }
        if len(set(found.values())) > 1:
            differ = ", ".join(f"{name}: {counts}" for name, counts in found.items())
            raise ValueError(f"The models differ in their numbers of {what} ({differ}).")

    def _assemble(
        self, rows: Sequence[ipywidgets.Widget], views: dict[str, MaskView], *, counts: str, **options
    ) -> None:
        """Put the tool together; `counts` and the size of the image are its `repr`, options are those of Tool."""
        size = f"{self.image.shape[1]} × {self.image.shape[0]} pixels"
        super().__init__(rows, views, summary=f"{type(self).__name__}({counts}, {size})", **options)


def trim_heap() -> None:
    """Hand freed memory back to the system.

    glibc keeps what was freed in pieces for later: after a model saw a large image, hundreds of megabytes.
    """
    with suppress(OSError, AttributeError):  # other systems hand it back by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _parts(widget: ipywidgets.Widget) -> Iterator[ipywidgets.Widget]:
    """All widgets inside a widget, their layouts and styles, which closing them would leave open, and itself."""
    for child in getattr(widget, "children", ()):
        yield from _parts(child)
    for part in (getattr(widget, name, None) for name in ("layout", "style")):
        if isinstance(part, ipywidgets.Widget):
            yield part
    yield widget
