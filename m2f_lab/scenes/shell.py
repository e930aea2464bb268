"""The room itself: times of day, walls, floor, ceiling and rugs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m2f_lab.scenes.furniture import FABRICS
from m2f_lab.scenes.props import Facet, Prop, Stage
from m2f_lab.scenes.stage import Color, Light, Point2, Point3, mix, shade

WALL, FLOOR, CEILING, RUG = 1, 4, 6, 29

View = tuple[Color, Color, Color]  # from a window: the upper sky, the lower sky, the land

# how frequent it is, the view, the colour of the sun on the floor (None: no sun), the light
TIMES: tuple[tuple[float, View, Color | None, Light], ...] = (
    (
        3.0,
        ((104, 170, 226), (214, 234, 244), (128, 172, 108)),
        (255, 246, 214),
        Light(haze_distance=400, direction=(-0.4, 1.0, -0.6), shadow=0.34),
    ),
    (
        2.0,
        ((156, 190, 226), (255, 222, 190), (150, 170, 120)),
        (255, 224, 170),
        Light((1.04, 0.98, 0.9), haze_distance=400, direction=(0.6, 0.9, -0.6), shadow=0.34),
    ),
    (
        1.5,
        ((176, 188, 198), (214, 220, 222), (132, 150, 130)),
        None,
        Light((0.93, 0.95, 0.98), haze_distance=400, direction=(0, 1, -0.6), shadow=0.28),
    ),
    (
        1.5,
        ((40, 44, 92), (214, 120, 110), (50, 56, 76)),
        None,
        Light((0.92, 0.8, 0.7), (90, 60, 60), haze_distance=400, direction=(0.1, 1, -0.5), shadow=0.36, lamps=True),
    ),
)

WALLS = (
    (240, 226, 200), (206, 220, 214), (226, 206, 198), (196, 210, 224), (236, 232, 224), (214, 206, 226),
    (228, 214, 160), (176, 196, 178), (222, 180, 156), (150, 172, 184),
)  # fmt: skip
FLOORS = ((196, 150, 104), (170, 122, 84), (216, 180, 138), (146, 108, 82), (190, 172, 156))

BEHIND = -8.0  # metres; the room goes on behind the viewer


def paint_shell(stage: Stage, width: float, depth: float, height: float) -> None:
    """Paint an empty room of the given width and height whose back wall is `depth` metres away."""
    rng, half = stage.rng, width / 2
    color = rng.choice(WALLS)
    white = mix((250, 248, 244), color, 0.12)
    wall, floor, ceiling = (Prop(stage, c, 0, 2) for c in (WALL, FLOOR, CEILING))
    stage.paper.backdrop(wall.number, [(0, color), (1, color)])
    lid = ((-half, height, depth), (half, height, depth), (half, height, BEHIND), (-half, height, BEHIND))
    ceiling.face(lid, white, shaded=False)
    tone = rng.choice(FLOORS)
    ground = floor.face(
        ((-half, 0, BEHIND), (half, 0, BEHIND), (half, 0, depth), (-half, 0, depth)), tone, shaded=False
    )
    if ground:
        _cover_floor(stage, ground, tone, width, depth)
    pattern = rng.choice(("plain", "plain", "stripes", "panel"))
    back = shade(color, 0.78) if rng.random() < 0.3 else color
    for (x0, z0), (x1, z1), paint in (
        ((-half, depth), (half, depth), back),
        ((-half, BEHIND), (-half, depth), shade(color, 0.94)),
        ((half, depth), (half, BEHIND), shade(color, 0.94)),
    ):
        face = wall.face(((x0, 0, z0), (x1, 0, z1), (x1, height, z1), (x0, height, z0)), paint)
        if face:
            _cover_wall(face, pattern, paint, white, math.hypot(x1 - x0, z1 - z0), height)
    edges = [((-half, v, depth), (half, v, depth)) for v in (0, height)]
    for x in (-half, half):
        edges += [((x, 0, depth), (x, height, depth)), ((x, height, 0), (x, height, depth)), ((x, 0, 0), (x, 0, depth))]
    stage.paper.overlay([_band(stage, a, b) for a, b in edges], (60, 44, 50), 0.2, softness=0.03)


def _cover_wall(face: Facet, pattern: str, paint: Color, white: Color, length: float, height: float) -> None:
    """Wallpaper, skirting board and moulding."""
    if pattern == "stripes":
        count = round(length / 0.32)
        for i in range(count):
            face.part(i / count, 0, (i + 0.5) / count, 1, shade(paint, 1.05))
    elif pattern == "panel":
        face.part(0, 0, 1, 0.32, shade(paint, 1.35))
        face.part(0, 0.32, 1, 0.34, shade(paint, 0.85))
    face.part(0, 0, 1, 0.12 / height, white)
    face.part(0, 1 - 0.08 / height, 1, 1.004, white)


def _cover_floor(stage: Stage, ground: Facet, color: Color, width: float, depth: float) -> None:
    """Planks or tiles; without either, a carpet."""
    rng, length = stage.rng, depth - BEHIND
    kind = rng.choice(("planks", "planks", "tiles", "carpet"))
    if kind == "planks":
        count = round(width / 0.24)
        for i in range(count):
            ground.part(i / count, 0, (i + 1) / count, 1, shade(color, rng.uniform(0.93, 1.05)))
            ground.part(i / count, 0, (i + 0.07) / count, 1, shade(color, 0.82))
            t = -BEHIND / length + rng.uniform(0.05, 0.2)
            while t < 1:
                ground.part(i / count, t, (i + 1) / count, t + 0.0035, shade(color, 0.82))
                t += rng.uniform(0.1, 0.22)
    elif kind == "tiles":
        columns, rows, step = round(width / 0.5), math.ceil(depth / 0.5), 0.5 / length
        for i in range(columns):
            for j in range(i % 2, rows, 2):
                far = 1 - j * step
                ground.part(i / columns, far - step, (i + 1) / columns, far, shade(color, 1.3))


def _band(stage: Stage, a: Point3, b: Point3) -> Sequence[Point2]:
    """A narrow, darker band along an edge of the room."""
    spots = stage.camera.project((a, b))
    if len(spots) != 2:
        return ()
    (x0, y0), (x1, y1) = spots
    r = 0.02 * stage.paper.height / (math.hypot(x1 - x0, y1 - y0) or 1.0)
    dx, dy = (y0 - y1) * r, (x1 - x0) * r
    return (x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)


def paint_rug(stage: Stage, x: float, z: float, width: float, depth: float) -> None:
    """A round or rectangular rug with a border."""
    prop, color = Prop(stage, RUG, x, z), stage.rng.choice(FABRICS)
    inner = shade(color, 1.35)
    turn = [2 * math.pi * i / 28 for i in range(28)]
    corners = [(math.cos(a), math.sin(a)) for a in turn]
    if stage.rng.random() < 0.7:
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    for scale, tone in ((1.0, shade(color, 0.75)), (0.9, color), (0.72, inner), (0.66, color), (0.3, inner)):
        u, w = width / 2 * scale, depth / 2 * scale
        prop.face([(u * a, 0.01, w * b) for a, b in corners], tone, shaded=False)
