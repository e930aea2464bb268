"""MaskView: an image and any number of masks over it, scrubbed in the browser without asking the kernel.

The image and all masks are sent once. Which mask is shown, how strongly, the pointer's readout, the brush and the arrow
keys then live in the browser (browser/*.js), a few milliseconds from key to picture. `drawing.composite` does the same
in numpy.

N masks, C channels (heads, for attention), H/W height/width of the image, h/w of the masks.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import anywidget
import numpy as np
import traitlets
from PIL import Image

from m2f_lab.explore.parts.assets import deflated, module, style
from m2f_lab.explore.parts.controls import Control
from m2f_lab.explore.parts.drawing import TABLES, composite, to_png, to_uint8
from m2f_lab.explore.parts.pages import save_page
from m2f_lab.explore.parts.reading import AnyImage
from m2f_lab.explore.parts.table import Caption
from m2f_lab.inference.images import as_rgb, fitted_size, resize_image

LONGEST_EDGE = 1024  # images are sent at most this large, in pixels; a notebook cell is not wider


@lru_cache(maxsize=1)  # the views of one tool show the same image
def _base_png(pixels: bytes, size: tuple[int, int]) -> bytes:
    rgb = np.frombuffer(pixels, np.uint8).reshape(*size, 3)
    return to_png(resize_image(rgb, fitted_size(size, longest_edge=LONGEST_EDGE)))


def _as_json(captions: Sequence[Sequence[Caption]]) -> list[list[dict]]:
    return [[caption.as_json() for caption in row] for row in captions]


AS_TEXT = {"to_json": lambda value, widget: json.dumps(value), "from_json": lambda text, widget: json.loads(text)}
"""Long lists travel as text: ipywidgets would look into every one of their parts for buffers."""


class Stroke(NamedTuple):
    """One stroke of the brush.

    Attributes:
        stack, index, channel: the mask it went over.
        painted: whether cells were painted, else erased.
        cells: which, counted row by row.
    """

    stack: int
    index: int
    channel: int
    painted: bool
    cells: np.ndarray


class MaskView(anywidget.AnyWidget):
    """Show masks over an image; link `stack`, `index`, `channel`, `opacity` to other widgets with `jslink`.

    Left and right arrows change `index`, up and down `stack`, digits `channel`, once the picture was clicked; `on_keys`
    adds others.

    Attributes:
        stack: number of the stack of masks that is shown, such as a prediction.
        index: of the mask in the stack, such as a query.
        channel: of the mask, such as a head.
        opacity: of the mask, 0…1.
        threshold: above 0: cut the mask there instead of showing its values.
        contour: above 0: draw a line there.
        smooth: read masks bilinearly, else show their cells.
        brush: 1 paints and -1 erases where the pointer is pressed, 0 does neither; see `on_stroke`.
        brush_radius: in cells of the mask.
        clicked: (x, y) of the last click, in pixels of the image.
        pinned: mark the place of the last click.
        coordinates: tell at the pointer which pixel it is on; not for pictures whose pixels mean nothing.
    """

    _esm = module("mask_view")
    _css = style("mask_view")

    base = traitlets.Bytes().tag(sync=True)  # a PNG file
    image_size = traitlets.List(traitlets.Int()).tag(sync=True)  # width, height in pixels, before shrinking
    masks = traitlets.Bytes().tag(sync=True, to_json=deflated)  # uint8, one stack after the other
    shapes = traitlets.List().tag(sync=True)  # [N, C, h, w] of each stack
    scales = traitlets.Bytes().tag(sync=True)  # float32 for each mask: what 255 stands for
    table = traitlets.Bytes().tag(sync=True)  # uint8 [256, 4]
    coverage = traitlets.List(traitlets.Float()).tag(sync=True)
    captions = traitlets.List().tag(sync=True, **AS_TEXT)  # one per stack and index
    pick = traitlets.Bytes().tag(sync=True)  # uint16: the index that a click chooses
    pick_shape = traitlets.List([0, 0]).tag(sync=True)
    num_channels = traitlets.Int(1).tag(sync=True)  # how many of them the digits choose from
    num_masks = traitlets.Int(0).tag(sync=True)  # how many masks the arrows step through, where there are fewer here
    num_stacks = traitlets.Int(0).tag(sync=True)  # how many stacks
    bound_keys = traitlets.List(traitlets.Unicode()).tag(sync=True)
    pressed = traitlets.List().tag(sync=True)  # its number, and one of `bound_keys`
    group = traitlets.Unicode().tag(sync=True)  # views of a group mark the pointer's place together
    title = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode().tag(sync=True)
    readout = traitlets.Unicode().tag(sync=True)
    words = traitlets.List().tag(sync=True)
    names = traitlets.List().tag(sync=True)
    places = traitlets.List([1, 1]).tag(sync=True)  # rows and columns of the grid that notes are known on
    notes = traitlets.List().tag(sync=True, **AS_TEXT)  # one per place and stack
    marks = traitlets.Bytes().tag(sync=True)  # float32
    marks_shape = traitlets.List([1, 1, 0, 0, 0]).tag(sync=True)  # rows, columns, stacks, channels, dots
    mark_groups = traitlets.List().tag(sync=True)  # name and CSS colour
    unit = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int(560).tag(sync=True)  # CSS pixels

    stack = traitlets.Int(0).tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)
    channel = traitlets.Int(0).tag(sync=True)
    opacity = traitlets.Float(0.7, min=0, max=1).tag(sync=True)
    threshold = traitlets.Float(0.0, min=0, max=1).tag(sync=True)
    contour = traitlets.Float(0.0, min=0, max=1).tag(sync=True)
    smooth = traitlets.Bool(True).tag(sync=True)
    brush = traitlets.Int(0, min=-1, max=1).tag(sync=True)
    brush_radius = traitlets.Float(1.0, min=0).tag(sync=True)
    stroke = traitlets.List(traitlets.Int()).tag(sync=True)  # its number, stack, index, channel, value, cells
    clicked = traitlets.List(traitlets.Int()).tag(sync=True)
    pinned = traitlets.Bool(False).tag(sync=True)
    coordinates = traitlets.Bool(True).tag(sync=True)

    def __init__(
        self,
        image: AnyImage,
        masks: np.ndarray | Iterable[np.ndarray],
        *,
        colors: str | np.ndarray = "mask",
        relative: bool = False,
        captions: Sequence[Sequence[Caption]] = (),
        coverage: tuple[float, float] = (1.0, 1.0),
        pick: np.ndarray | None = None,
        readout: str = "probability {value}",
        words: tuple[str, str] | tuple[()] = (),
        names: Sequence[str] = (),
        **traits,
    ) -> None:
        """Quantise masks and lay them over an image.

        Args:
            image: a path, a PIL image or uint8 [H, W, 3].
            masks: boolean, uint8, or floats in 0…1. [N, h, w] or [N, C, h, w], or several such stacks, whose masks may
                differ in size; a generator, where they should not all be in memory.
            colors: a name from `TABLES`, or a table of colours and opacities, uint8 [256, 4].
            relative: stretch each mask to its own maximum; the readout still tells true values.
            captions: per stack, per mask; may be left out.
            coverage: how often the image fits into a mask along x and y: above 1 where masks also cover padding.
            pick: the index a click chooses, for every cell of a grid over the image. integers [h, w]
            readout: the value below the pointer; {value} and {percent} are replaced.
            words: instead: names of values below and above one half.
            names: of each value, where the masks are label maps. They are never interpolated.
            traits: title, help, unit, width, group, and the attributes above; num_stacks, num_masks, num_channels
                where keys should reach other views, linked to this one, that have more of them.
        """
        stacks = [masks] if isinstance(masks, np.ndarray) else masks
        quantised = [to_uint8(self._four_dimensions(stack), relative) for stack in stacks]
        if names:
            traits["smooth"] = False
        rgb = as_rgb(image)
        traits.setdefault("num_channels", max(values.shape[1] for values, _ in quantised))
        super().__init__(
            base=_base_png(rgb.tobytes(), rgb.shape[:2]),
            image_size=[rgb.shape[1], rgb.shape[0]],
            shapes=[list(values.shape) for values, _ in quantised],
            masks=b"".join(values.tobytes() for values, _ in quantised),
            scales=b"".join(scales.astype("<f4").tobytes() for _, scales in quantised),
            table=np.ascontiguousarray(TABLES[colors] if isinstance(colors, str) else colors, np.uint8).tobytes(),
            captions=_as_json(captions),
            coverage=list(coverage),
            pick=b"" if pick is None else pick.astype("<u2").tobytes(),
            pick_shape=[0, 0] if pick is None else list(pick.shape),
            readout=readout,
            words=list(words),
            names=list(names),
            **traits,
        )

    @staticmethod
    def _four_dimensions(stack: np.ndarray) -> np.ndarray:
        if stack.ndim not in (3, 4) or 0 in stack.shape:
            raise ValueError(
                f"MaskView takes stacks of masks [N, h, w] or [N, C, h, w] that hold something, got {stack.shape}."
            )
        return stack[:, None] if stack.ndim == 3 else stack

    @traitlets.validate("stack", "index", "channel")
    def _within_range(self, proposal: dict) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        num_masks = max([self.num_masks, *(shape[0] for shape in self.shapes)])
        num_stacks = max(self.num_stacks, len(self.shapes))
        count = {"stack": num_stacks, "index": num_masks, "channel": self.num_channels}[name]
        if not 0 <= value < max(count, 1):
            raise traitlets.TraitError(f"MaskView.{name} = {value} is outside 0…{count - 1}.")
        return value

    def set_captions(self, captions: Sequence[Sequence[Caption]]) -> None:
        """Write something else below the masks: per stack, per mask."""
        self.captions = _as_json(captions)

    def set_notes(self, notes: Sequence[Sequence[Caption]], places: tuple[int, int] = (1, 1)) -> None:
        """Write notes on the place that was clicked last.

        Args:
            notes: per place, row by row; per stack, or one for all of them.
            places: rows and columns of a grid over the image. A kernel answers each click with a grid of one place.

        Raises:
            ValueError: there is not one list of notes per place.
        """
        if notes and len(notes) != places[0] * places[1]:
            raise ValueError(
                f"A grid of {places[0]} × {places[1]} places wants as many lists of notes, got {len(notes)}."
            )
        with self.hold_sync():
            self.pinned = True
            self.places = list(places)
            self.notes = _as_json(notes)

    def set_marks(self, marks: np.ndarray, groups: Sequence[tuple[str, str]]) -> None:
        """Draw dots for the place that was clicked last.

        Args:
            marks: (x, y) in 0…1 of the image and a size in 0…1, for each cell of a grid of places over the image.
                Channel c is drawn while `channel` is c + 1, all of them while it is 0.
                [rows, columns, stacks, channels, N, 3]
            groups: name and CSS colour; the N dots are split among them evenly, in order.

        Raises:
            ValueError: the array is not of that shape, or N is no multiple of the number of groups.
        """
        if marks.ndim != 6 or marks.shape[-1] != 3 or 0 in marks.shape or marks.shape[-2] % max(len(groups), 1):
            raise ValueError(
                "Marks are [rows, columns, stacks, channels, N, 3], with N a multiple of the number of groups, got "
                f"{marks.shape} for {len(groups)} groups."
            )
        with self.hold_sync():
            self.pinned = True
            self.marks_shape = list(marks.shape[:-1])
            self.mark_groups = [list(group) for group in groups]
            self.marks = np.ascontiguousarray(marks, "<f4").tobytes()

    def on_click(self, callback: Callable[[int, int], object]) -> None:
        """Call this with the pixel of the image, (x, y), after every click."""
        self.observe(lambda change: change["new"] and callback(*change["new"]), "clicked")

    def on_stroke(self, callback: Callable[[Stroke], None]) -> None:
        """Call this after every stroke of the brush. Until `masks` is set, only the browser shows the stroke."""

        def told(change: dict) -> None:
            if change["new"]:
                _, stack, index, channel, value, *cells = change["new"]
                callback(Stroke(stack, index, channel, value > 0, np.array(cells, int)))

        self.observe(told, "stroke")

    def on_keys(self, actions: Mapping[str, Callable[[], object]]) -> None:
        """Do something when a key is pressed on the picture.

        Args:
            actions: by key, such as "m", "ctrl-z" (also with ⌘) or "shift-ctrl-z".
        """
        self.bound_keys = list(actions)
        self.observe(lambda change: actions[change["new"][1]](), "pressed")

    @property
    def mask(self) -> np.ndarray:
        """The mask shown now. uint8 [h, w]"""
        stack = min(self.stack, len(self.shapes) - 1)
        offset = sum(math.prod(shape) for shape in self.shapes[:stack])
        num_masks, num_channels, height, width = self.shapes[stack]
        position = min(self.index, num_masks - 1) * num_channels + min(self.channel, num_channels - 1)
        area = height * width
        return np.frombuffer(self.masks, np.uint8, area, offset + position * area).reshape(height, width)

    def picture(self) -> np.ndarray:
        """The picture that the browser shows now, without labels. uint8 [H, W, 3], at most `width` pixels wide"""
        base = Image.open(io.BytesIO(self.base))
        size = (self.width, round(self.width * base.height / base.width))
        return composite(
            np.asarray(base.resize(size, Image.Resampling.BICUBIC)),
            self.mask,
            np.frombuffer(self.table, np.uint8).reshape(256, 4),
            opacity=self.opacity,
            threshold=self.threshold,
            contour=self.contour,
            smooth=self.smooth,
            coverage=tuple(self.coverage),
        )

    def page_state(self) -> dict[str, object]:
        """Values of all traits that a saved page needs. There, nothing answers a brush or a key."""
        names = set(self.traits(sync=True)) - set(anywidget.AnyWidget.class_traits(sync=True)) - {"stroke"}
        state = {name: getattr(self, name) for name in sorted(names) if not name.startswith("_")}
        return state | {"masks": deflated(self.masks), "brush": 0, "bound_keys": []}

    def save_html(self, path: str | Path, title: str = "masks") -> None:
        """Write one self-contained page that scrubs, hovers and picks without a network or a kernel."""
        counts = (len(self.shapes), *(max(shape[axis] for shape in self.shapes) for axis in (0, 1)))
        names = (("stack", "stack"), ("index", "mask"), ("channel", "channel"))
        sliders = [Control(*name, high=count - 1) for name, count in zip(names, counts, strict=True) if count > 1]
        controls = [*sliders, Control("opacity", "opacity", step=0.05)]
        save_page(path, [self], controls=controls, title=title, note="Click the picture, then use the arrow keys.")

    def __repr__(self) -> str:
        masks = f"{max(shape[0] for shape in self.shapes)} masks"
        return f"MaskView({len(self.shapes)} stacks of {masks})" if len(self.shapes) > 1 else f"MaskView({masks})"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """The widget, and a picture for wherever widgets do not run."""
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"image/png": to_png(self.picture())}, metadata
