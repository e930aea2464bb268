"""SSD's colour jitter, as the official Mask2Former trains with it.

H/W height/width. Images are uint8 [3, H, W], red, green, blue.

Brightness, contrast, saturation and hue are each changed with probability one half; contrast comes before or after
saturation and hue, by another throw of the coin.

The official code goes through OpenCV's 8-bit HSV, with hue in steps of two degrees. Here saturation and hue are
computed in floating point and rounded once, which differs from it by that rounding alone.

Source: SSD (Liu et al. 2016), section 2.2, data augmentation; detectron2's ColorAugSSDTransform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROWS = 64  # at a time, so that the planes in floating point stay in the processor's cache


@dataclass(frozen=True)
class ColorJitter:
    """One throw of the dice.

    Attributes:
        brightness: added to every value, in grey levels
        contrast: factor on every value
        contrast_first: whether contrast comes before saturation and hue
        saturation: factor on the HSV saturation
        hue: turn of the HSV hue, in degrees
    """

    brightness: float = 0.0
    contrast: float = 1.0
    contrast_first: bool = True
    saturation: float = 1.0
    hue: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> ColorJitter:
        """Draw the published strengths: brightness ±32, contrast and saturation 0.5…1.5, hue ±18 steps of 2°."""
        apply = rng.random(5) < 0.5
        return cls(
            brightness=rng.uniform(-32, 32) * apply[0],
            contrast=rng.uniform(0.5, 1.5) if apply[1] else 1.0,
            contrast_first=bool(apply[2]),
            saturation=rng.uniform(0.5, 1.5) if apply[3] else 1.0,
            hue=2.0 * rng.integers(-18, 19) * apply[4],
        )

    def apply(self, image: np.ndarray) -> None:
        """Change the image in place. uint8 [3, H, W]"""
        levels = np.arange(256, dtype=np.float32)
        before = _to_uint8(levels + np.float32(self.brightness))
        contrast = _to_uint8(levels * np.float32(self.contrast))
        after = contrast
        if self.contrast_first:
            before, after = contrast[before], levels.astype(np.uint8)
        _look_up(image, before)
        if self.saturation != 1 or self.hue != 0:
            for top in range(0, image.shape[1], _ROWS):
                strip = image[:, top : top + _ROWS]
                planes = strip.astype(np.float32)
                if self.saturation != 1:
                    scale_saturation(planes, self.saturation)
                if self.hue != 0:
                    turn_hue(planes, self.hue)
                strip[:] = np.rint(planes, out=planes)
        _look_up(image, after)


def scale_saturation(planes: np.ndarray, factor: float) -> None:
    """Multiply the HSV saturation, at most to 1, in place. float32 [3, H, W]

    Saturation is chroma over value, so with the value kept, every channel's distance to it scales with the chroma.
    """
    value = planes.max(0)
    chroma = value - planes.min(0)
    # Grey has neither chroma nor distances to scale; full saturation is chroma = value.
    scale = np.minimum(np.float32(factor), value / np.maximum(chroma, 1e-6))
    planes -= value
    planes *= scale
    planes += value


def turn_hue(planes: np.ndarray, degrees: float) -> None:
    """Turn the HSV hue in place; value and saturation stay. float32 [3, H, W]"""
    red, green, blue = planes
    value, lowest = planes.max(0), planes.min(0)
    chroma = value - lowest
    scale = 1 / np.maximum(chroma, 1e-6)
    # Hue in sixths of a turn, -1…5: red 0, green 2, blue 4.
    hue = np.where(
        value == red,
        (green - blue) * scale,
        np.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue += np.float32((degrees / 60 - 1) % 6 + 1)  # the turn as 1…7, so that the sum is 0…12
    np.subtract(hue, 6, out=hue, where=hue >= 6)
    # Each channel is a trapezoid over the hue: full within one sixth of its own, none beyond two.
    for plane, share in zip(planes, (abs(hue - 3) - 1, 2 - abs(hue - 2), 2 - abs(hue - 4)), strict=True):
        np.maximum(share, 0, out=share)
        np.minimum(share, 1, out=share)
        share *= chroma
        np.add(share, lowest, out=plane)


def _to_uint8(levels: np.ndarray) -> np.ndarray:
    """Clip and cut off, as the official code does."""
    return np.clip(levels, 0, 255).astype(np.uint8)


def _look_up(image: np.ndarray, table: np.ndarray) -> None:
    if not np.array_equal(table, np.arange(256)):
        image[:] = table.take(image)
