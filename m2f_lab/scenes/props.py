"""Props: objects placed on the stage and built from boxes, faces, balls and sticks.

Local coordinates are metres: u to the right, v up, w away, seen from in front of the prop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from m2f_lab.scenes.stage import NEAR, Camera, Color, Light, Paper, Point2, Point3, shade


@dataclass(frozen=True)
class Stage:
    """Everything that a scene is drawn with: paper, camera, light and random numbers."""

    paper: Paper
    camera: Camera
    light: Light
    rng: Random


_TURN = [2 * math.pi * i / 18 for i in range(18)]


class _Spot(NamedTuple):
    """A point on the paper: its position there, its distance in metres, and the pixels of a local unit there."""

    x: float
    y: float
    depth: float
    scale: float


class Facet:
    """A flat face of a prop, in camera coordinates.

    Args:
        prop: the prop that the face belongs to
        corners: bottom left, bottom right, top right, top left, seen from outside. [4, 3]
        brightness: factor of the light, about 0.7…1.06
    """

    def __init__(self, prop: Prop, corners: Sequence[Point3], brightness: float) -> None:
        self.prop, self.corners, self.brightness = prop, corners, brightness

    def by(self, prop: Prop) -> Facet:
        """Return the same face for another object, such as books on a shelf."""
        return Facet(prop, self.corners, self.brightness)

    def tone(self, color: Color, glow: bool = False) -> tuple[int, int, int]:
        return self.prop._tone(color if glow else shade(color, self.brightness), self.prop.depth, glow)

    def part(self, left: float, bottom: float, right: float, top: float, color: Color, glow: bool = False) -> None:
        """Paint a part of the face, such as a window in a wall, in 0…1 of its width and height."""
        self.polygon(((left, bottom), (right, bottom), (right, top), (left, top)), color, glow)

    def polygon(self, points: Sequence[Point2], color: Color, glow: bool = False) -> None:
        """Paint a polygon on the face. Its points are in 0…1 of width and height. [n, 2]"""
        outline, paper = self.on_paper(points), self.prop.stage.paper
        if paper.shows(outline):
            paper.polygon(self.prop.number, outline, self.tone(color, glow))

    def on_paper(self, points: Sequence[Point2]) -> list[Point2]:
        """Project points on the face, in 0…1 of width and height, to the paper. [n, 2]"""
        (ax, ay, az), (bx, by, bz), (cx, cy, cz), (dx, dy, dz) = self.corners
        view = []
        for s, t in points:
            a, b, c, d = (1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t
            x, y = a * ax + b * bx + c * cx + d * dx, a * ay + b * by + c * cy + d * dy
            view.append((x, y, a * az + b * bz + c * cz + d * dz))
        return self.prop.stage.camera.on_paper(view)

    def disc(self, s: float, t: float, radius: Point2, color: Color, glow: bool = False) -> None:
        """Paint a disc on the face; the radius is a fraction of width and height."""
        self.polygon([(s + radius[0] * math.cos(a), t + radius[1] * math.sin(a)) for a in _TURN], color, glow)


class Prop:
    """Paints one object, or several that stand together (see `as_class`).

    Args:
        stage: the stage to paint on
        class_id: label of its pixels
        x, z, y: position of its origin in metres
        yaw: rotation in radians; turns its front to the left as seen from above
        thing: True if it is an instance of its own
        scale: factor of all local coordinates
    """

    def __init__(self, stage: Stage, class_id: int, x: float, z: float, y=0.0, yaw=0.0, thing=False, scale=1.0) -> None:
        self.stage, self.x, self.y, self.z, self.yaw, self.scale = stage, x, y, z, yaw, scale
        self.cos, self.sin = math.cos(yaw), math.sin(yaw)
        self.number = stage.paper.new_object(class_id, thing)
        self.depth = stage.camera.depth((x, y, z))
        self.rng = stage.rng

    def as_class(self, class_id: int, thing: bool = False) -> Prop:
        """Return a prop at the same place that paints another object."""
        return Prop(self.stage, class_id, self.x, self.z, self.y, self.yaw, thing, self.scale)

    def at(self, u: float, v: float, w: float) -> Prop:
        """Return the same object with its origin moved, in local coordinates."""
        moved = copy(self)
        moved.x, moved.y, moved.z = self.to_world((u, v, w))
        moved.depth = self.stage.camera.depth((moved.x, moved.y, moved.z))
        return moved

    @property
    def pixels(self) -> float:
        """Size of a metre on the paper, in its pixels."""
        return self.stage.camera.pixels_per_metre(self.depth)

    def to_world(self, p: Point3) -> Point3:
        u, v, w = p[0] * self.scale, p[1] * self.scale, p[2] * self.scale
        return self.x + self.cos * u + self.sin * w, self.y + v, self.z - self.sin * u + self.cos * w

    @property
    def viewer(self) -> tuple[float, float]:
        """Position of the camera in local coordinates: (u, w)."""
        dx, dz = self.stage.camera.eye[0] - self.x, self.stage.camera.eye[2] - self.z
        return self.cos * dx - self.sin * dz, self.sin * dx + self.cos * dz

    def sideways(self, parts: Sequence[tuple[float, Callable[[], object]]]) -> None:
        """Paint parts that stand side by side, (u, painter), those nearer to the viewer last."""
        u = self.viewer[0]
        far_to_near([(abs(at - u), paint) for at, paint in parts])

    # ---- faces ----

    def plane(self, corners: Sequence[Point3]) -> Facet:
        """Return a quad to paint parts on, without painting the quad. [4, 3]"""
        world = [self.to_world(c) for c in corners]
        return Facet(self, [self.stage.camera.to_view(c) for c in world], self.stage.light.on_face(_normal(world)))

    def face(self, points: Sequence[Point3], color: Color, *, glow=False, shaded=True, cull=False) -> Facet | None:
        """Paint a flat polygon.

        Args:
            points: counter-clockwise as seen from outside. [n, 3]
            glow: True if it shines by itself, neither shaded nor dimmed by the time of day
            shaded: True to make it brighter where it faces the light
            cull: True to leave it out when it faces away

        Returns:
            The face, for painting parts of a quad; None if it is invisible.
        """
        world = [self.to_world(p) for p in points]
        view = [self.stage.camera.to_view(p) for p in world]
        outline = self.stage.camera.on_paper(view)
        if not self.stage.paper.shows(outline) or (cull and _signed_area(outline) >= 0):
            return None
        facet = Facet(self, view, self.stage.light.on_face(_normal(world)) if shaded else 1.0)
        self.stage.paper.polygon(self.number, outline, facet.tone(color, glow))
        return facet

    def box(
        self, u: Point2, v: Point2, w: Point2, color: Color, lean=(0.0, 0.0, 0.0), top: Color | None = None
    ) -> dict[str, Facet]:
        """Paint a box, or a truncated pyramid.

        Args:
            u, v, w: its extent
            lean: inset of the top at both sides, at the front and at the back
            top: colour of the top, if it differs

        Returns:
            The visible faces, out of "front", "back", "left", "right", "top" and "bottom".
        """
        side, front, back = lean
        low = [(u[0], v[0], w[0]), (u[1], v[0], w[0]), (u[1], v[0], w[1]), (u[0], v[0], w[1])]
        high = [
            (u[0] + side, v[1], w[0] + front), (u[1] - side, v[1], w[0] + front),
            (u[1] - side, v[1], w[1] - back), (u[0] + side, v[1], w[1] - back),
        ]  # fmt: skip
        quads = {
            "front": (low[0], low[1], high[1], high[0]),
            "right": (low[1], low[2], high[2], high[1]),
            "back": (low[2], low[3], high[3], high[2]),
            "left": (low[3], low[0], high[0], high[3]),
            "top": tuple(high),
            "bottom": (low[3], low[2], low[1], low[0]),
        }
        painted = {
            name: self.face(quad, top if top is not None and name == "top" else color, cull=True)
            for name, quad in quads.items()
        }
        return {name: facet for name, facet in painted.items() if facet}

    # ---- round and thin things; they always face the viewer ----

    def ball(self, center: Point3, radius: float | Point2, color: Color, glow: bool = False) -> None:
        """Paint an ellipse around a point; the radius in metres, or one to the right and one up."""
        rx, ry = radius if isinstance(radius, tuple) else (radius, radius)
        spot = self._spot(center)
        if spot and -rx * spot.scale < spot.x < self.stage.paper.width + rx * spot.scale:
            radii = rx * spot.scale, ry * spot.scale
            self.stage.paper.ellipse(self.number, (spot.x, spot.y), radii, self._tone(color, spot.depth, glow))

    def _spot(self, point: Point3) -> _Spot | None:
        """Project a point to the paper; None if it is behind the viewer."""
        camera = self.stage.camera
        x, y, z = camera.to_view(self.to_world(point))
        if z < NEAR:
            return None
        scale = camera.scale / z
        return _Spot(camera.cx + scale * x, camera.cy - scale * y, z, scale * self.scale)

    def _tone(self, color: Color, depth: float, glow: bool = False) -> tuple[int, int, int]:
        return (round(color[0]), round(color[1]), round(color[2])) if glow else self.stage.light.tone(color, depth)

    def wheel(self, center: Point3, radius: float, color: Color, hub: Color, across: str = "u") -> None:
        """Paint a disc that stands upright and turns around the axis `across`, with a smaller one inside."""
        for r, c in ((radius, color), (radius * 0.55, hub)):
            turn = [(math.cos(a) * r, math.sin(a) * r) for a in _TURN]
            if across == "u":
                points = [(center[0], center[1] + b, center[2] + a) for a, b in turn]
            else:
                points = [(center[0] + a, center[1] + b, center[2]) for a, b in turn]
            self.face(points, c, shaded=False)

    def stick(self, start: Point3, end: Point3, thickness: float, color: Color) -> None:
        """Paint a round bar between two points, with round ends."""
        a, b = self._spot(start), self._spot(end)
        if a is None or b is None:
            return
        tone = self._tone(color, (a.depth + b.depth) / 2)
        width = thickness * (a.scale + b.scale) / 2
        self.stage.paper.line(self.number, [(a.x, a.y), (b.x, b.y)], width, tone)
        if width > 5:
            for spot in (a, b):
                self.stage.paper.ellipse(self.number, (spot.x, spot.y), (width / 2, width / 2), tone)

    def card(self, points: Sequence[Point2], color: Color, w: float = 0.0, glow: bool = False) -> None:
        """Paint a cut-out of paper that stands upright at `w`. [n, 2]"""
        self.face([(u, v, w) for u, v in points], color, glow=glow, shaded=False)

    def halo(self, center: Point3, radius: float, color: Color, strength: float = 1.0) -> None:
        """Lay light around a lamp over the picture."""
        spot = self._spot(center)
        if spot and spot.depth > 1:
            self.stage.paper.glow((spot.x, spot.y), radius * spot.scale, color, strength)

    def footprint(self, u: Point2, w: Point2, stretch: float = 0.0) -> list[Point2]:
        """Outline of the shadow of a box of `stretch` metres height on the ground."""
        dx, dy, dz = self.stage.light.direction
        shift = stretch / max(dy, 0.3)
        corners = [(u[0], 0, w[0]), (u[1], 0, w[0]), (u[1], 0, w[1]), (u[0], 0, w[1])]
        ground = [self.to_world(c) for c in corners]
        ground += [(x - dx * shift, y, z - dz * shift) for x, y, z in ground]
        return _hull(self.stage.camera.project([(x, y + 0.01, z) for x, y, z in _hull_ground(ground)]))


def far_to_near(parts: Sequence[tuple[float, Callable[[], object]]]) -> None:
    """Paint parts in the order of their depth, the farthest first."""
    for _, paint in sorted(parts, key=lambda part: -part[0]):
        paint()


def _signed_area(p: Sequence[Point2]) -> float:
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(p, [*p[1:], p[0]], strict=True))


def _normal(p: Sequence[Point3]) -> Point3:
    """Unit normal of a polygon that is counter-clockwise from outside, with z pointing away from the viewer."""
    a, b = ([p[i][k] - p[0][k] for k in range(3)] for i in (1, 2))
    n = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
    return -n[0], -n[1], -n[2]


def _hull_ground(points: Sequence[Point3]) -> list[Point3]:
    flat = _hull([(x, z) for x, _, z in points])
    return [(x, points[0][1], z) for x, z in flat]


def _hull(points: Sequence[Point2]) -> list[Point2]:
    """Convex hull (Andrew 1979)."""
    points = sorted(set(points))
    if len(points) < 3:
        return list(points)

    def half(sequence):
        kept: list[Point2] = []
        for p in sequence:
            while len(kept) > 1 and _turn(kept[-2], kept[-1], p) <= 0:
                kept.pop()
            kept.append(p)
        return kept[:-1]

    return half(points) + half(points[::-1])


def _turn(a: Point2, b: Point2, c: Point2) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
