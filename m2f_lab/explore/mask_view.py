"""MaskView: an image and any number of masks over it, scrubbed in the browser without asking the kernel.

The image and all masks are sent once. Which mask is shown, how strongly, the pointer's readout and the arrow keys then
live in the browser (mask_view.js), a few milliseconds from key to picture. `composite` states in numpy what is drawn.

N masks, C channels (heads, for attention), H/W height/width of the image, h/w of the masks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anywidget
import numpy as np
import traitlets
from PIL import Image

from m2f_lab.inference.images import as_rgb, fitted_size, resize_image

LONGEST_EDGE = 1024
"""Images are sent at most this large, in pixels; a notebook cell is not wider."""


@dataclass(frozen=True)
class Caption:
    """What is written below one mask.

    Attributes:
        text: one line.
        warning: set apart, for what a reader should not overlook.
        bars: (label, value in 0…1, CSS colour) each.
    """

    text: str = ""
    warning: str = ""
    bars: tuple[tuple[str, float, str], ...] = ()

    def as_json(self) -> dict:
        """What is not empty."""
        return {name: value for name, value in vars(self).items() if value}


def tint(color: tuple[int, int, int]) -> np.ndarray:
    """A table of one colour whose opacity is the value. uint8 [256, 4]"""
    return np.array([(*color, value) for value in range(256)], np.uint8)


def heat() -> np.ndarray:
    """Dark violet over red to pale yellow, ever more opaque; readable without colour vision. uint8 [256, 4]"""
    anchors = np.array([(40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
                        (252, 255, 164)])  # fmt: skip
    place = np.linspace(0, len(anchors) - 1, 256)
    rgb = np.stack([np.interp(place, np.arange(len(anchors)), anchors[:, c]) for c in range(3)], axis=1)
    alpha = 255 * np.sqrt(np.linspace(0, 1, 256))  # else all but the strongest cells vanish
    return np.concatenate([rgb, alpha[:, None]], axis=1).round().astype(np.uint8)


TABLES = {"mask": tint((255, 45, 130)), "blocked": tint((74, 80, 94)), "heat": heat()}
"""Colours by purpose. Magenta is what photographs of streets and rooms have least of; grey fog dulls light and dark."""


def to_uint8(masks: np.ndarray, relative: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Quantise masks to 256 steps.

    Args:
        masks: boolean, uint8, or floats in 0…1. [..., h, w]
        relative: stretch each mask to its own maximum, for weights that are small everywhere.

    Returns:
        uint8 [..., h, w], and the value that 255 stands for, float32 [...].
    """
    if masks.dtype == np.uint8 and not relative:
        return masks, np.ones(masks.shape[:-2], np.float32)
    values = masks.astype(np.float32)
    if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"Masks must be boolean, uint8 or floats in 0…1, got {masks.dtype} {masks.shape} from {values.min():.3g} "
            f"to {values.max():.3g}; apply a sigmoid to logits first."
        )
    scales = values.max(axis=(-2, -1)) if relative else np.ones(values.shape[:-2], np.float32)
    values = values * (255 / np.where(scales > 0, scales, 1))[..., None, None]
    return np.rint(values).astype(np.uint8), scales.astype(np.float32)


def composite(
    base: np.ndarray,
    mask: np.ndarray,
    table: np.ndarray,
    *,
    opacity: float = 1.0,
    threshold: float = 0.0,
    contour: float = 0.0,
    smooth: bool = True,
    coverage: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Draw one mask over an image, as the browser does.

    Args:
        base: the image at the size it is drawn. uint8 [H, W, 3]
        mask: uint8 [h, w]
        table: colour and opacity of each value. uint8 [256, 4]
        opacity: of the whole mask, 0…1; at 0 there is no contour either.
        threshold: show every pixel of at least this share of 255 alike, and no other; 0 shows all values.
        contour: draw a white line at this share of 255; 0 draws none.
        smooth: read the mask bilinearly, else show its cells.
        coverage: how often the image fits into the mask along x and y: above 1 where the mask covers padding, too.

    Returns:
        uint8 [H, W, 3]
    """
    height, width = base.shape[:2]
    rows = _sampling_table(height, mask.shape[0], coverage[1], smooth)
    columns = _sampling_table(width, mask.shape[1], coverage[0], smooth)
    values = _interpolate(_interpolate(mask.astype(np.float32), *rows).T, *columns).T  # (H, W)
    entry = np.floor(values + 0.5).astype(int)
    if threshold > 0:
        entry = np.where(entry >= 255 * threshold, 255, 0)
    alpha = table[entry, 3:] / 255 * opacity
    mixed = base + (table[entry, :3] - base.astype(np.float32)) * alpha
    if contour > 0 and opacity > 0:
        inside = np.pad(values >= 255 * contour, 1, mode="edge")
        surrounded = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        mixed[inside[1:-1, 1:-1] & ~surrounded] = 255
    return np.rint(mixed).astype(np.uint8)


def _sampling_table(num_pixels: int, num_cells: int, coverage: float, smooth: bool) -> tuple[np.ndarray, ...]:
    """For every pixel along one axis: its two neighbouring cells and the weight of the second."""
    position = (np.arange(num_pixels) + 0.5) / num_pixels / coverage * num_cells
    if not smooth:
        first = np.minimum(position.astype(int), num_cells - 1)
        return first, first, np.zeros(num_pixels, np.float32)
    position = np.clip(position - 0.5, 0, num_cells - 1)
    first = position.astype(int)
    return first, np.minimum(first + 1, num_cells - 1), (position - first).astype(np.float32)


def _interpolate(maps: np.ndarray, first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return maps[first] + (maps[second] - maps[first]) * weight[:, None]


def to_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] → the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", compress_level=4)
    return file.getvalue()


class MaskView(anywidget.AnyWidget):
    """Show masks over an image; link `stack`, `index`, `channel`, `opacity` to other widgets with `jslink`.

    Left and right arrows change `index`, up and down `stack`, digits `channel`, once the picture was clicked.

    Attributes:
        stack: which stack of masks (say, which prediction) is shown.
        index: which mask of the stack (say, which query).
        channel: which channel of the mask (say, which head).
        opacity: of the mask, 0…1.
        threshold: above 0: cut the mask there instead of showing its values.
        contour: above 0: draw a line there.
        smooth: read masks bilinearly, else show their cells.
        clicked: (x, y) of the last click, in pixels of the image.
    """

    _esm = (Path(__file__).parent / "mask_view.js").read_text(encoding="utf-8")
    _css = (Path(__file__).parent / "mask_view.css").read_text(encoding="utf-8")

    base = traitlets.Bytes().tag(sync=True)  # a PNG file
    image_size = traitlets.List(traitlets.Int()).tag(sync=True)  # width, height in pixels, before shrinking
    masks = traitlets.Bytes().tag(sync=True)  # uint8, one stack after the other
    shapes = traitlets.List().tag(sync=True)  # [N, C, h, w] of each stack
    scales = traitlets.Bytes().tag(sync=True)  # float32 for each mask: what 255 stands for
    table = traitlets.Bytes().tag(sync=True)  # uint8 [256, 4]
    coverage = traitlets.List(traitlets.Float()).tag(sync=True)
    captions = traitlets.List().tag(sync=True)  # one per stack and index
    pick = traitlets.Bytes().tag(sync=True)  # uint16: the index that a click chooses
    pick_shape = traitlets.List([0, 0]).tag(sync=True)
    num_channels = traitlets.Int(1).tag(sync=True)  # how many of them the digits choose from
    group = traitlets.Unicode().tag(sync=True)  # views of a group mark the pointer's place together
    title = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode().tag(sync=True)
    readout = traitlets.Unicode().tag(sync=True)
    words = traitlets.List().tag(sync=True)
    unit = traitlets.Unicode().tag(sync=True)
    width = traitlets.Int(560).tag(sync=True)  # CSS pixels

    stack = traitlets.Int(0).tag(sync=True)
    index = traitlets.Int(0).tag(sync=True)
    channel = traitlets.Int(0).tag(sync=True)
    opacity = traitlets.Float(0.7, min=0, max=1).tag(sync=True)
    threshold = traitlets.Float(0.0, min=0, max=1).tag(sync=True)
    contour = traitlets.Float(0.0, min=0, max=1).tag(sync=True)
    smooth = traitlets.Bool(True).tag(sync=True)
    clicked = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(
        self,
        image: str | Path | Image.Image | np.ndarray,
        masks: np.ndarray | Iterable[np.ndarray],
        *,
        colors: str | np.ndarray = "mask",
        relative: bool = False,
        captions: Sequence[Sequence[Caption]] = (),
        coverage: tuple[float, float] = (1.0, 1.0),
        pick: np.ndarray | None = None,
        readout: str = "probability {value}",
        words: tuple[str, str] | tuple[()] = (),
        **traits,
    ) -> None:
        """Args:
        image: a path, a PIL image or uint8 [H, W, 3].
        masks: boolean, uint8, or floats in 0…1. [N, h, w] or [N, C, h, w], or several such stacks, whose masks may
            differ in size; a generator, where they should not all be in memory.
        colors: a name from `TABLES`, or a table of colours and opacities, uint8 [256, 4].
        relative: stretch each mask to its own maximum; the readout still tells true values.
        captions: per stack, per mask; may be left out.
        coverage: how often the image fits into a mask along x and y: above 1 where masks cover padding, too.
        pick: the index a click chooses, for every cell of a grid over the image. integers [h, w]
        readout: the value below the pointer; {value} and {percent} are replaced.
        words: instead: what to call values below and above one half.
        traits: title, help, unit, width, group, num_channels (where digits should reach views that have more
            channels), and the attributes above.
        """
        stacks = [masks] if isinstance(masks, np.ndarray) else masks
        quantised = [to_uint8(self._four_dimensions(stack), relative) for stack in stacks]
        rgb = as_rgb(image)
        traits.setdefault("num_channels", max(values.shape[1] for values, _ in quantised))
        super().__init__(
            base=to_png(resize_image(rgb, fitted_size(rgb.shape[:2], longest_edge=LONGEST_EDGE))),
            image_size=[rgb.shape[1], rgb.shape[0]],
            shapes=[list(values.shape) for values, _ in quantised],
            masks=b"".join(values.tobytes() for values, _ in quantised),
            scales=b"".join(scales.astype("<f4").tobytes() for _, scales in quantised),
            table=np.ascontiguousarray(TABLES[colors] if isinstance(colors, str) else colors, np.uint8).tobytes(),
            captions=[[caption.as_json() for caption in row] for row in captions],
            coverage=list(coverage),
            pick=b"" if pick is None else pick.astype("<u2").tobytes(),
            pick_shape=[0, 0] if pick is None else list(pick.shape),
            readout=readout,
            words=list(words),
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
        num_masks = max((shape[0] for shape in self.shapes), default=1)
        count = {"stack": len(self.shapes), "index": num_masks, "channel": self.num_channels}[name]
        if not 0 <= value < max(count, 1):
            raise traitlets.TraitError(f"MaskView.{name} = {value} is outside 0…{count - 1}.")
        return value

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
        """What the browser shows now, without labels. uint8 [H, W, 3], at most `width` pixels wide"""
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

    def save_html(self, path: str | Path, title: str = "masks") -> None:
        """Write one self-contained page that scrubs, hovers and picks without a network or a kernel."""
        from m2f_lab.explore.offline import save_page

        save_page(path, [self], title=title)

    def __repr__(self) -> str:
        masks = f"{max(shape[0] for shape in self.shapes)} masks"
        return f"MaskView({len(self.shapes)} stacks of {masks})" if len(self.shapes) > 1 else f"MaskView({masks})"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """The widget, and a picture for wherever widgets do not run."""
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return data | {"image/png": to_png(self.picture())}, metadata
