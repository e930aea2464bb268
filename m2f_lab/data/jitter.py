"""SSD's colour jitter, as the official Mask2Former trains with it.

H/W height/width. Images are uint8 [3, H, W], red, green, blue.

Brightness, contrast, saturation and hue are each changed with probability one half; contrast comes before or after
saturation and hue, by another throw of the coin.

The official code goes through OpenCV's 8-bit HSV, with hue in steps of two degrees. Here saturation and hue are changed
without going to HSV and back, and each is rounded once, which differs from it by that rounding alone.

Source: SSD (Liu et al. 2016), section 2.2, data augmentation; detectron2's ColorAugSSDTransform.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_ROWS = 128  # at a time, so that all that is computed on the way stays in the processor's cache


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
        for top in range(0, image.shape[1], _ROWS):
            strip = image[:, top : top + _ROWS]
            if self.brightness != 0:
                add_brightness(strip, self.brightness)
            if self.contrast != 1 and self.contrast_first:
                scale_contrast(strip, self.contrast)
            if self.saturation != 1:
                scale_saturation(strip, self.saturation)
            if self.hue != 0:
                turn_hue(strip, self.hue)
            if self.contrast != 1 and not self.contrast_first:
                scale_contrast(strip, self.contrast)


def add_brightness(image: np.ndarray, levels: float) -> None:
    """Add -255…255 to every value, cut off fractions and what is beyond 0…255, in place. uint8 [3, H, W]"""
    shift = math.floor(levels)
    lowest, highest = max(0, -shift), min(255, 255 - shift)  # what stays within 0…255
    np.copyto(image, lowest, where=image < lowest)
    np.copyto(image, highest, where=image > highest)
    image += np.uint8(shift % 256)  # bytes count modulo 256


def scale_contrast(image: np.ndarray, factor: float) -> None:
    """Multiply every value, cut off fractions and what is beyond 255, in place. uint8 [3, H, W]"""
    values = np.multiply(image, factor, dtype=np.float32)
    np.copyto(values, 255, where=values > 255)
    image[:] = values


def scale_saturation(image: np.ndarray, factor: float) -> None:
    """Multiply the HSV saturation, at most to 1, in place. uint8 [3, H, W]

    Saturation is chroma over value, so with the value kept, every channel's distance to it scales with the chroma.
    """
    value, lowest = image.max(0), image.min(0)
    distances = value - image
    scale = np.float32(factor)
    if factor > 1:  # full saturation is chroma = value
        chroma = value - lowest
        np.copyto(chroma, 1, where=chroma == 0)  # grey has no distances to scale
        full = np.divide(value, chroma, dtype=np.float32)
        scale = np.minimum(full, scale)
    image[:] = np.rint(value - distances * scale)


def turn_hue(image: np.ndarray, degrees: float) -> None:
    """Turn the HSV hue in place; value and saturation stay. uint8 [3, H, W]

    With the hue counted in sixths of a turn (red 0, green 2, blue 4), each channel is a trapezoid over it: full within
    one sixth of its own hue, none beyond two, hence lowest + chroma * clip(2 - distance, 0, 1). Here hue and distance
    are kept multiplied by the chroma. So nothing is divided, and all is whole numbers but the turn, rounded once.
    """
    thirds = round(degrees / 120)  # a third of a turn is a change of places
    red, green, blue = planes = np.roll(image, thirds, axis=0).astype(np.int16)
    value, lowest = planes.max(0), planes.min(0)
    chroma = value - lowest
    hue = red - green + 4 * chroma  # times the chroma; -1…5
    np.copyto(hue, blue - red + 2 * chroma, where=value == green)
    np.copyto(hue, green - blue, where=value == red)
    hue += np.rint(chroma * np.float32(degrees / 60 - 2 * thirds)).astype(np.int16)  # -1…1
    for plane, own in zip(image, (0, 2, 4), strict=True):
        # The distance d on a circle of six is 3 - ||hue - own| - 3|, as |hue - own| is at most 6; this is 3 - d.
        near = abs(abs(hue - own * chroma) - 3 * chroma)
        plane[:] = np.minimum(np.maximum(lowest + near - chroma, lowest), value)
