"""Drawing of masks over an image: quantised to 256 steps, coloured by a table, mixed into the pixels.

`composite` states in numpy what browser/drawing.js does; tests compare the two.

H/W height/width of the image, h/w of the mask.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from m2f_lab.data import Classes


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


def label_table(classes: Classes, opacity: float = 0.75) -> np.ndarray:
    """The colours of classes, for label maps: class k is entry k, all others are transparent. uint8 [256, 4]"""
    table = np.zeros((256, 4), np.uint8)
    table[: len(classes), :3] = classes.colors
    table[: len(classes), 3] = round(255 * opacity)
    return table


def to_uint8(masks: np.ndarray, relative: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Quantise masks to 256 steps.

    Args:
        masks: boolean, uint8, or floats in 0…1. [..., h, w]
        relative: stretch each mask to its own maximum, for weights that are small everywhere, or may exceed 1.

    Returns:
        uint8 [..., h, w], and the value that 255 stands for, float32 [...].
    """
    if masks.dtype == np.uint8 and not relative:
        return masks, np.ones(masks.shape[:-2], np.float32)
    values = masks.astype(np.float32)
    if values.size and not (np.isfinite(values).all() and values.min() >= 0 and (relative or values.max() <= 1)):
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
        coverage: how often the image fits into the mask along x and y: above 1 where the mask also covers padding.

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
