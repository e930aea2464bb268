"""Paper, light, camera and brushes of all drawn scenes.

World coordinates are metres: x to the right, y up from the ground, z away from the viewer. Colours are (r, g, b)
in 0…255. The picture is painted at twice its size and then halved, for smooth edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[float, float, float]
Point2 = tuple[float, float]
Point3 = tuple[float, float, float]

SUPERSAMPLING = 2
NEAR = 0.3  # metres; anything nearer to the camera is cut off
MAX_OBJECTS = 255  # objects are counted in one byte


def mix(a: Color, b: Color, share: float) -> Color:
    """Mix two colours: share 0 is `a`, 1 is `b`."""
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def shade(color: Color, factor: float) -> Color:
    """Darken by a factor below 1, lighten by one above: towards white, without clipping."""
    if factor <= 1:
        return color[0] * factor, color[1] * factor, color[2] * factor
    return mix(color, (255, 255, 255), min(factor - 1, 1))


@dataclass(frozen=True)
class Light:
    """The time of day.

    Attributes:
        ambient: factor of every colour
        haze: colour that distant things fade to
        haze_distance: distance in metres at which two thirds of a colour are haze
        direction: direction towards the light (x right, y up, z away), not necessarily of length 1
        shadow: darkness of shadows, 0…1
        lamps: True if windows and lamps are lit
    """

    ambient: Color = (1.0, 1.0, 1.0)
    haze: Color = (225, 232, 240)
    haze_distance: float = 150.0
    direction: Point3 = (-0.5, 0.8, -0.4)
    shadow: float = 0.4
    lamps: bool = False

    def tone(self, color: Color, distance: float) -> tuple[int, int, int]:
        """Colour of a thing seen from a distance in metres."""
        clear = math.exp(-distance / self.haze_distance) if distance > 0 else 1.0
        r, g, b = (  # written out: called thousands of times per scene
            color[0] * self.ambient[0] * clear + self.haze[0] * (1 - clear),
            color[1] * self.ambient[1] * clear + self.haze[1] * (1 - clear),
            color[2] * self.ambient[2] * clear + self.haze[2] * (1 - clear),
        )
        return int(min(r, 255.0)), int(min(g, 255.0)), int(min(b, 255.0))

    def on_face(self, normal: Point3) -> float:
        """Brightness of a face with this normal: 0.68 in the shade, 1.06 in full light."""
        length = math.hypot(*normal) * math.hypot(*self.direction) or 1.0
        cosine = sum(n * d for n, d in zip(normal, self.direction, strict=True)) / length
        return 0.80 + 0.26 * cosine if cosine > 0 else 0.80 + 0.12 * cosine


class Camera:
    """A pinhole camera that looks along +z, turned by `yaw`.

    Args:
        size: height and width of the paper, in its own pixels
        focal: focal length as a share of the height
        center: optical axis on the paper: x as a share of the width, y (the horizon) of the height
        eye: position in metres
        yaw: radians to the right
        curve: curvature to the right with distance, in 1/metres
    """

    def __init__(self, size, focal, center=(0.5, 0.45), eye=(0.0, 1.5, 0.0), yaw=0.0, curve=0.0) -> None:
        height, width = size
        self.size, self.scale = size, focal * height
        self.cx, self.cy = center[0] * width, center[1] * height
        self.eye, self.curve = eye, curve
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)

    def to_view(self, point: Point3) -> Point3:
        """Transform world to camera coordinates, both in metres."""
        dz = point[2] - self.eye[2]
        dx = point[0] - self.eye[0] + self.curve * dz * abs(dz)
        return self.cos * dx - self.sin * dz, point[1] - self.eye[1], self.sin * dx + self.cos * dz

    def depth(self, point: Point3) -> float:
        return self.to_view(point)[2]

    def project(self, points: Iterable[Point3]) -> list[Point2]:
        """Project a world polygon to the paper, cut off at the near plane; empty if all of it is behind."""
        return self.on_paper([self.to_view(p) for p in points])

    def on_paper(self, view: list[Point3]) -> list[Point2]:
        """Project a polygon in camera coordinates, as `project` does."""
        for p in view:
            if p[2] < NEAR:
                view = _cut_near(view)
                break
        cx, cy, scale = self.cx, self.cy, self.scale
        return [(cx + scale * x / z, cy - scale * y / z) for x, y, z in view]

    def pixels_per_metre(self, depth: float) -> float:
        return self.scale / max(depth, NEAR)


def _cut_near(points: list[Point3]) -> list[Point3]:
    """The part of a polygon in front of the camera (Sutherland and Hodgman 1974)."""
    kept = []
    for a, b in zip(points[-1:] + points[:-1], points, strict=True):
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            t = (NEAR - a[2]) / (b[2] - a[2])
            kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]), NEAR))
        if b[2] >= NEAR:
            kept.append(b)
    return kept


class Paper:
    """A picture and its map of objects.

    Every stroke goes into both. Only light may be laid over the picture alone: shadows, glows, gradients and
    texture change how a pixel looks, never what it shows.

    Args:
        size: height and width of the finished picture in pixels
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.height, self.width = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
        self.picture = Image.new("RGB", (self.width, self.height))
        self.objects = Image.new("L", (self.width, self.height))
        self._pens = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.objects)
        self._ids: list[tuple[int, int]] = []  # (class id, instance id) of each object

    def new_object(self, class_id: int, thing: bool = False) -> int:
        """Register a thing or a kind of stuff; return the number to paint it with."""
        if thing:
            entry = class_id, class_id * 1000 + sum(1 for c, i in self._ids if c == class_id and i >= 1000)
        else:
            entry = class_id, class_id
            if entry in self._ids:
                return self._ids.index(entry)
        if len(self._ids) == MAX_OBJECTS:
            raise ValueError(f"A drawn scene holds at most {MAX_OBJECTS} objects; this one has more.")
        self._ids.append(entry)
        return len(self._ids) - 1

    def shows(self, points: Sequence[Point2]) -> bool:
        """True if the bounding box of an outline is on the paper and large enough to be seen."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        if not xs:
            return False
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        seen = right > 0 and bottom > 0 and left < self.width and top < self.height
        return seen and right - left > 0.7 and bottom - top > 0.7

    def polygon(self, number: int, points: Sequence[Point2], color: tuple[int, int, int]) -> None:
        if len(points) >= 3:
            self._pens[0].polygon(points, fill=color)
            self._pens[1].polygon(points, fill=number)

    def ellipse(self, number: int, center: Point2, radii: Point2, color: tuple[int, int, int]) -> None:
        (x, y), (rx, ry) = center, radii
        box = (x - rx, y - ry, x + rx, y + ry)
        self._pens[0].ellipse(box, fill=color)
        self._pens[1].ellipse(box, fill=number)

    def line(self, number: int, points: Sequence[Point2], width: float, color: tuple[int, int, int]) -> None:
        """Paint a line at least one finished pixel wide, so that thin poles stay connected."""
        width = max(SUPERSAMPLING, round(width))
        for pen, fill in zip(self._pens, (color, number), strict=True):
            pen.line(points, fill=fill, width=width, joint="curve")

    def backdrop(self, number: int, colors: Sequence[tuple[float, Color]]) -> None:
        """Fill the whole paper with a vertical gradient through (height share, colour) stops."""
        at = np.linspace(0, 1, self.height)
        stops = [s for s, _ in colors]
        column = np.stack([np.interp(at, stops, [c[i] for _, c in colors]) for i in range(3)], 1)
        column = Image.fromarray(column.round().astype(np.uint8)[:, None])
        self.picture.paste(column.resize((self.width, self.height)))
        self.objects.paste(number, (0, 0, self.width, self.height))

    def glow(self, center: Point2, radius: float, color: Color, strength: float = 1.0) -> None:
        """Add a soft round light to the picture."""
        radius = round(radius)
        if radius >= 1:
            mask = _halo().resize((2 * radius, 2 * radius)).point(lambda v: round(v * strength))
            corner = round(center[0]) - radius, round(center[1]) - radius
            self.picture.paste(tuple(round(c) for c in color), (*corner, *(c + 2 * radius for c in corner)), mask)

    def overlay(self, outlines: Iterable[Sequence[Point2]], color: Color, strength: float, softness: float) -> None:
        """Tint the picture under some outlines, with soft edges: shadows and patches of light.

        Strokes painted later are not tinted.

        Args:
            strength: 0 leaves the picture as it is, 1 covers it
            softness: width of the edges as a share of the height
        """
        small = Image.new("L", (self.size[1], self.size[0]))
        pen = ImageDraw.Draw(small)
        for outline in outlines:
            if len(outline) >= 3:
                pen.polygon([(x / SUPERSAMPLING, y / SUPERSAMPLING) for x, y in outline], fill=255)
        box = small.getbbox()
        if box is None:
            return
        radius = softness * self.size[0]
        margin = math.ceil(3 * radius)
        box = (
            max(0, box[0] - margin), max(0, box[1] - margin),
            min(small.width, box[2] + margin), min(small.height, box[3] + margin),
        )  # fmt: skip
        mask = small.crop(box).filter(ImageFilter.GaussianBlur(radius)).point(lambda v: round(v * strength))
        area = tuple(SUPERSAMPLING * c for c in box)
        mask = mask.resize((area[2] - area[0], area[3] - area[1]), Image.Resampling.BILINEAR)
        self.picture.paste(tuple(round(c) for c in color), area, mask)

    def finish(self, texture: dict[int, tuple[float, float]], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Halve the painting and give every class its texture.

        Args:
            texture: class id → strength of the fine and of the coarse grain, in grey values
            seed: seed of the grain

        Returns:
            picture uint8 [H, W, 3], class ids uint8 [H, W], instance ids int32 [H, W]
        """
        number = majority(np.asarray(self.objects))
        classes = np.array([c for c, _ in self._ids], np.uint8)
        instances = np.array([i for _, i in self._ids], np.int32)
        strength = np.zeros((2, len(classes)), np.float32)
        for index, class_id in enumerate(classes):
            strength[:, index] = texture.get(int(class_id), (1.5, 0.0))
        fine, coarse = (_grain(self.size, step, seed) for step in (1, 9))
        grain = fine * strength[0][number] + coarse * strength[1][number]
        picture = np.asarray(self.picture.reduce(SUPERSAMPLING), np.float32) + grain[..., None]
        return picture.clip(0, 255).round().astype(np.uint8), classes[number], instances[number]


def majority(numbers: np.ndarray) -> np.ndarray:
    """The object that covers most of each 2 × 2 block; ties go to the upper left. [2H, 2W] → [H, W]"""
    a, b, c, d = numbers[::2, ::2], numbers[::2, 1::2], numbers[1::2, ::2], numbers[1::2, 1::2]
    a_is_alone = (a != b) & (a != c) & (a != d)
    pair = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where(a_is_alone, pair, a)


@lru_cache(1)
def _halo() -> Image.Image:
    """Disc that is bright in the middle and falls to zero at the rim."""
    axis = np.linspace(-1, 1, 128)
    distance = np.minimum(np.hypot(axis[:, None], axis), 1)
    return Image.fromarray((255 * (1 - distance) ** 2).astype(np.uint8))


def _grain(size: tuple[int, int], step: int, seed: int) -> np.ndarray:
    """Noise of unit strength with spots of `step` pixels of a picture 256 pixels high. float32 [H, W]"""
    step = max(1, round(step * size[0] / 256))
    noise = np.random.default_rng([seed, step]).standard_normal((size[0] // step + 2, size[1] // step + 2), np.float32)
    if step == 1:
        return noise[: size[0], : size[1]]
    large = Image.fromarray(noise).resize((noise.shape[1] * step, noise.shape[0] * step), Image.Resampling.BICUBIC)
    return np.asarray(large)[: size[0], : size[1]]
