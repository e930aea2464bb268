"""Furniture. The origin is on the floor, at the middle of the edge that stands against the wall.

The viewer is always in front of the wall, so painting from the wall into the room is painting from far to near.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from m2f_lab.scenes.props import Facet, Prop, Stage
from m2f_lab.scenes.stage import Color, mix, shade

BED, CABINET, TABLE, CHAIR, SOFA, ARMCHAIR, DESK, WARDROBE, CUSHION, DRAWERS = 8, 11, 16, 20, 24, 31, 34, 36, 40, 45
PILLOW, BOOKCASE, COFFEE_TABLE, BOOK, SWIVEL_CHAIR, OTTOMAN, STOOL = 58, 63, 65, 68, 76, 98, 111

WOODS = ((186, 132, 88), (150, 98, 66), (214, 172, 124), (118, 80, 60), (226, 198, 160), (236, 230, 220))
FABRICS = (
    (206, 96, 84), (226, 160, 84), (104, 142, 126), (84, 118, 158), (146, 124, 164), (216, 188, 156), (120, 126, 138),
    (74, 96, 106), (222, 150, 150), (150, 160, 108),
)  # fmt: skip
COVERS = (
    (188, 54, 62), (236, 128, 96), (250, 214, 130), (72, 128, 92), (58, 84, 140), (96, 76, 120), (40, 112, 130),
    (230, 222, 206),
)  # fmt: skip


def bed(stage: Stage, x: float, z: float, yaw: float, width: float) -> None:
    rng = stage.rng
    frame = Prop(stage, BED, x, z, yaw=yaw, thing=True)
    wood, sheet, blanket = rng.choice(WOODS), (246, 242, 236), rng.choice(FABRICS)
    half = width / 2
    frame.box((-half - 0.06, half + 0.06), (0, 1.1), (-0.1, 0), wood)
    for u in (-half + 0.05, half - 0.05):
        frame.box((u - 0.05, u + 0.05), (0, 0.26), (-2.04, -1.94), wood)
    frame.box((-half, half), (0.12, 0.3), (-2.05, -0.1), wood)
    frame.box((-half, half), (0.3, 0.52), (-2.0, -0.1), sheet)
    count = 2 if width > 1.2 else 1
    step = width / count

    def pillow(u: float) -> tuple[float, Callable[[], object]]:
        prop, tint = frame.as_class(PILLOW, thing=True), mix((250, 248, 240), blanket, rng.choice((0.0, 0.15, 0.5)))
        size = (u - 0.42 * step, u + 0.42 * step), (0.52, 0.7), (-0.56, -0.14)
        return u, lambda: prop.box(*size, tint, lean=(0.05, 0.12, 0.02), top=shade(tint, 1.1))

    pillows = [pillow(-half + step * (i + 0.5)) for i in range(count)]
    frame.sideways(pillows)
    size = (-half - 0.02, half + 0.02), (0.26, 0.6), (-2.05, -0.75)
    cover = frame.box(*size, blanket, lean=(0.04, 0.05, 0.0), top=shade(blanket, 1.06))
    v, fold = 0.605, mix(sheet, blanket, 0.25)
    frame.face(((-half, v, -0.98), (half, v, -0.98), (half, v, -0.74), (-half, v, -0.74)), fold)
    if "top" in cover and rng.random() < 0.7:
        for t in (0.2, 0.45, 0.7):
            cover["top"].part(0, t - 0.04, 1, t + 0.04, mix(blanket, sheet, 0.35))


def sofa(stage: Stage, x: float, z: float, yaw: float, width: float) -> None:
    """A sofa, or an armchair if it is narrow, with cushions."""
    rng = stage.rng
    prop = Prop(stage, SOFA if width > 1.3 else ARMCHAIR, x, z, yaw=yaw, thing=True)
    color, half, arm = rng.choice(FABRICS), width / 2, 0.2
    prop.box((-half + 0.1, half - 0.1), (0, 0.16), (-0.82, -0.08), shade(color, 0.45))
    prop.box((-half, half), (0.12, 0.92), (-0.3, 0), color, lean=(0.03, 0.06, 0.0))
    seats = max(1, round((width - 2 * arm) / 0.75))

    def seat() -> None:
        prop.box((-half + arm, half - arm), (0.12, 0.34), (-0.86, -0.24), shade(color, 0.9))
        step = (width - 2 * arm) / seats
        for i in range(seats):
            u = -half + arm + i * step
            size = (u + 0.01, u + step - 0.01), (0.34, 0.48), (-0.9, -0.26)
            prop.box(*size, color, (0.02, 0.03, 0), shade(color, 1.12))
        for _ in range(rng.choice((0, 1, 2, 3)) if width > 1.3 else rng.choice((0, 1))):
            u = rng.uniform(-half + arm + 0.25, half - arm - 0.25)
            cushion(prop, u, 0.48, -0.42, rng.choice(FABRICS))

    def armrest(side: int) -> tuple[float, Callable[[], object]]:
        left, right = sorted((side * half, side * (half - arm)))
        size, lean = ((left, right), (0.08, 0.64), (-0.9, -0.05)), (0.01, 0.02, 0.0)
        return side * half, lambda: prop.box(*size, shade(color, 0.96), lean, shade(color, 1.1))

    prop.sideways([armrest(-1), (0.0, seat), armrest(1)])


def cushion(prop: Prop, u: float, v: float, w: float, color: Color) -> None:
    """A cushion that stands on one edge."""
    soft, r = prop.as_class(CUSHION, thing=True), 0.23
    tilt = prop.rng.uniform(-0.35, 0.35)
    corners = [(1, 0), (1.06, 0.5), (1, 1), (0.5, 0.96), (0, 1), (-0.06, 0.5), (0, 0), (0.5, 0.04)]
    points = []
    for a, b in corners[::-1]:
        a, b = (2 * a - 1) * r, 2 * b * r
        points.append((u + a * math.cos(tilt) - b * math.sin(tilt) * 0.5, v + b + a * math.sin(tilt), w + 0.25 * b))
    soft.face(points, color, shaded=False)
    if prop.rng.random() < 0.6:
        inner = [(u + (p[0] - u) * 0.55, v + r + (p[1] - v - r) * 0.55, p[2]) for p in points]
        soft.face(inner, shade(color, 1.25), shaded=False)


def table(stage: Stage, x: float, z: float, yaw: float, class_id: int, size: tuple[float, float, float]) -> Prop:
    """A table of the given width, depth and height. Returns its prop, to put things onto it."""
    prop, (width, depth, height) = Prop(stage, class_id, x, z, yaw=yaw, thing=True), size
    wood, half = stage.rng.choice(WOODS), width / 2
    legs = []
    for w in (-0.08, -depth + 0.08):
        legs += [(w, u) for u in (-half + 0.08, half - 0.08)]
    far_first = sorted(legs, key=lambda leg: -prop.stage.camera.depth(prop.to_world((leg[1], 0, leg[0]))))
    for w, u in far_first:
        prop.box((u - 0.04, u + 0.04), (0, height - 0.05), (w - 0.04, w + 0.04), shade(wood, 0.86))
    prop.box((-half + 0.06, half - 0.06), (height - 0.14, height - 0.05), (-depth + 0.06, -0.06), shade(wood, 0.9))
    prop.box((-half, half), (height - 0.05, height), (-depth, 0), wood, top=shade(wood, 1.12))
    return prop


def chair(stage: Stage, x: float, z: float, yaw: float, class_id: int, color: Color) -> None:
    """A chair; its origin is the middle of the seat, its back at +w."""
    prop = Prop(stage, class_id, x, z, yaw=yaw, thing=True)
    if class_id == SWIVEL_CHAIR:
        for a in range(5):
            end = 0.28 * math.cos(a * 1.257), 0.04, 0.28 * math.sin(a * 1.257)
            prop.stick((0, 0.1, 0), end, 0.06, (54, 56, 62))
        prop.stick((0, 0.1, 0), (0, 0.45, 0), 0.08, (90, 92, 98))
    else:
        for u in (-0.19, 0.19):
            for w in (0.19, -0.19):
                prop.stick((u, 0.0, w), (u * 0.92, 0.44, w * 0.92), 0.055, shade(color, 0.8))

    def seat() -> None:
        prop.box((-0.23, 0.23), (0.42, 0.5), (-0.23, 0.23), color, top=shade(color, 1.14))

    def back() -> None:
        prop.box((-0.22, 0.22), (0.5, 0.98), (0.19, 0.25), shade(color, 0.96), lean=(0.03, 0.03, -0.03))

    back_is_far = prop.viewer[1] < 0
    for part in (back, seat) if back_is_far else (seat, back):
        part()


def stool(stage: Stage, x: float, z: float, class_id: int, color: Color) -> None:
    """A round stool or an ottoman."""
    prop = Prop(stage, class_id, x, z, thing=True)
    r, height = (0.2, 0.6) if class_id == STOOL else (0.33, 0.4)
    if class_id == STOOL:
        for u in (-0.14, 0, 0.14):
            prop.stick((u * 1.3, 0, 0.1 * (u == 0)), (u * 0.6, height, 0), 0.05, shade(color, 0.7))
    else:
        prop.ball((0, 0.07, 0), (r, 0.09), shade(color, 0.72))
        prop.card(((-r, 0.07), (r, 0.07), (r, height), (-r, height)), shade(color, 0.86))
    prop.ball((0, height, 0), (r, 0.08), shade(color, 0.86))
    prop.ball((0, height + 0.03, 0), (r, 0.075), shade(color, 1.12))


def cabinet(stage: Stage, x: float, z: float, yaw: float, class_id: int, size: tuple[float, float, float]) -> Prop:
    """A cabinet, wardrobe or chest of drawers of the given width, depth and height, with doors or drawers."""
    prop, (width, depth, height) = Prop(stage, class_id, x, z, yaw=yaw, thing=True), size
    wood = stage.rng.choice(WOODS)
    faces = prop.box((-width / 2, width / 2), (0.06, height), (-depth, 0), wood, top=shade(wood, 1.12))
    if "front" in faces:
        front, knob = faces["front"], (74, 66, 62) if sum(wood) > 400 else (226, 200, 140)
        front.part(0, 0, 1, 0.05, shade(wood, 0.7))
        columns, rows = (2, max(2, round(height / 0.25))) if class_id == DRAWERS else (max(2, round(width / 0.55)), 1)
        for i in range(columns):
            for j in range(rows):
                a, b = (i + 0.06) / columns, (i + 0.94) / columns
                c, d = 0.07 + 0.9 * (j + 0.05) / rows, 0.07 + 0.9 * (j + 0.93) / rows
                front.part(a, c, b, d, shade(wood, 0.86))
                front.part(a + 0.012, c + 0.015, b - 0.012, d - 0.01, shade(wood, 1.04))
                s = (a + b) / 2 if rows > 1 else (b - 0.05 if i % 2 == 0 else a + 0.05)
                front.disc(s, (c + d) / 2, (0.035 / width, 0.035 / height), knob)
    return prop


def bookcase(stage: Stage, x: float, z: float, yaw: float, size: tuple[float, float, float]) -> None:
    prop, (width, depth, height) = Prop(stage, BOOKCASE, x, z, yaw=yaw, thing=True), size
    wood = stage.rng.choice(WOODS)
    faces = prop.box((-width / 2, width / 2), (0, height), (-depth, 0), wood, top=shade(wood, 1.1))
    if "front" in faces:
        rows = round(height / 0.38)
        for row in range(rows):
            low, high = (row + 0.1) / rows, (row + 0.94) / rows
            faces["front"].part(0.04, low, 0.96, high, shade(wood, 0.52))
            books(faces["front"], prop.as_class(BOOK, thing=True), (0.05, low, 0.95, high), width)


def books(facet: Facet, prop: Prop, area: tuple[float, float, float, float], width: float) -> None:
    """A row of books in an area (left, bottom, right, top) of a face that is `width` metres wide."""
    rng, shelf = prop.rng, facet.by(prop)
    left, low, right, high = area
    s = left
    end = right - rng.uniform(0, 0.35) * (right - left)
    while s < end:
        thick = rng.uniform(0.035, 0.07) / width
        tall = low + (high - low) * rng.uniform(0.62, 0.95)
        color = rng.choice(COVERS)
        shelf.part(s, low, min(s + thick, right), tall, color)
        shelf.part(s, low + (tall - low) * 0.7, min(s + thick, right), low + (tall - low) * 0.78, shade(color, 1.4))
        s += thick * 1.04
