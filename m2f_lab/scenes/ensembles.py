"""Groups of furniture: a desk and the things on it, a kitchen, a fireplace. Origins are those of `furniture`."""

from __future__ import annotations

from m2f_lab.scenes import fittings
from m2f_lab.scenes.furniture import CABINET, DESK, TABLE, WOODS, cabinet, table
from m2f_lab.scenes.props import Prop, Stage
from m2f_lab.scenes.stage import Color, shade

SINK, FIREPLACE, REFRIGERATOR, COUNTERTOP, STOVE, TELEVISION, MONITOR = 48, 50, 51, 71, 72, 90, 144
STEEL = (186, 192, 198)


def night_table(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A small table, often with a lamp."""
    prop = table(stage, x, z, yaw, TABLE, (0.46, 0.4, 0.5))
    if stage.rng.random() < 0.75:
        fittings.table_lamp(prop.at(0, 0.5, -0.2))


def sideboard(stage: Stage, x: float, z: float, yaw: float, class_id: int, size: tuple[float, float, float]) -> None:
    """A low cupboard or chest with things on top of it."""
    prop = cabinet(stage, x, z, yaw, class_id, size)
    for u in (-size[0] * 0.28, size[0] * 0.25):
        thing = stage.rng.choice((fittings.vase, fittings.table_lamp, fittings.small_plant, None))
        if thing:
            thing(prop.at(u, size[2], -size[1] / 2))


def laid_table(stage: Stage, x: float, z: float, class_id: int, size: tuple[float, float, float]) -> None:
    """A table around its middle with a vase, a plant or a cat on it."""
    prop = table(stage, x, z + size[1] / 2, 0.0, class_id, size)
    thing = stage.rng.choice((fittings.vase, fittings.small_plant, fittings.cat, None))
    if thing:
        thing(prop.at(stage.rng.uniform(-0.25, 0.25), size[2], -size[1] / 2))


def desk(stage: Stage, x: float, z: float, yaw: float, width: float) -> None:
    """A desk with a monitor, a lamp and a plant."""
    prop = table(stage, x, z, yaw, DESK, (width, 0.7, 0.75))
    monitor(prop.at(0, 0.75, -0.1))
    fittings.table_lamp(prop.at(-width * 0.36, 0.75, -0.3))
    fittings.small_plant(prop.at(width * 0.36, 0.75, -0.25))


def monitor(place: Prop) -> None:
    prop = place.as_class(MONITOR, thing=True)
    prop.box((-0.12, 0.12), (0, 0.02), (-0.36, -0.16), (196, 200, 204))
    prop.box((-0.03, 0.03), (0.02, 0.16), (-0.27, -0.24), (176, 180, 186))
    faces = prop.box((-0.32, 0.32), (0.12, 0.52), (-0.3, -0.26), (44, 46, 52))
    if "front" in faces:
        front, screen = faces["front"], prop.rng.choice(((108, 190, 214), (120, 140, 220), (240, 170, 120)))
        front.part(0.04, 0.07, 0.96, 0.95, screen, glow=True)
        hills = ((0.04, 0.07), (0.96, 0.07), (0.96, 0.3), (0.6, 0.55), (0.35, 0.3), (0.04, 0.45))
        front.polygon(hills, shade(screen, 0.75), glow=True)


def television_bench(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A television on a low cabinet."""
    bench = cabinet(stage, x, z, yaw, CABINET, (1.5, 0.42, 0.5))
    prop = bench.at(0, 0.5, 0).as_class(TELEVISION, thing=True)
    prop.box((-0.15, 0.15), (0, 0.08), (-0.3, -0.15), (50, 52, 58))
    faces = prop.box((-0.6, 0.6), (0.06, 0.76), (-0.25, -0.2), (30, 32, 38))
    if "front" in faces:
        faces["front"].part(0.03, 0.05, 0.97, 0.95, (52, 60, 74))
        faces["front"].polygon(((0.12, 0.05), (0.32, 0.05), (0.62, 0.95), (0.42, 0.95)), (78, 90, 108))


def fireplace(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A fireplace with a fire in it."""
    prop = Prop(stage, FIREPLACE, x, z, yaw=yaw, thing=True)
    stone = stage.rng.choice(((232, 226, 216), (176, 104, 84), (160, 156, 152)))
    faces = prop.box((-0.75, 0.75), (0, 1.15), (-0.35, 0), stone)
    prop.box((-0.88, 0.88), (1.15, 1.25), (-0.42, 0), shade(stone, 0.94), top=shade(stone, 1.15))
    if "front" in faces:
        front = faces["front"]
        front.part(0.22, 0.0, 0.78, 0.66, shade(stone, 0.75))
        front.part(0.26, 0.0, 0.74, 0.62, (44, 36, 36))
        red, orange, yellow = (240, 110, 40), (250, 150, 50), (255, 222, 120)
        for s, tall, color in ((0.5, 0.46, red), (0.42, 0.34, orange), (0.58, 0.32, orange), (0.5, 0.26, yellow)):
            left, right, middle = s - 0.09, s + 0.09, tall * 0.6
            flame = ((left, 0.06), (right, 0.06), (s + 0.05, middle), (s, tall), (s - 0.05, middle))
            front.polygon(flame, color, glow=True)
        front.part(0.32, 0.02, 0.68, 0.08, (96, 62, 46))
    prop.halo((0, 0.35, -0.4), 1.1, (255, 150, 70), 0.3)


def kitchen(stage: Stage, x: float, z: float, yaw: float, width: float) -> None:
    """A row of cupboards with a worktop, a stove and a sink, and cupboards above."""
    rng = stage.rng
    wood = rng.choice((*WOODS, (120, 158, 150), (92, 118, 150), (214, 120, 96)))
    prop, half, units = Prop(stage, CABINET, x, z, yaw=yaw, thing=True), width / 2, max(3, round(width / 0.6))
    stove_at, sink_at = rng.sample(range(units), 2)
    _cupboards(prop, (-half, half), (0.08, 0.86), 0.6, units, wood, handles_at=0.82)
    stove = prop.as_class(STOVE, thing=True)
    left = -half + stove_at * width / units + 0.02
    faces = stove.box((left, left + width / units - 0.04), (0.08, 0.86), (-0.61, 0), (204, 208, 212))
    if "front" in faces:
        faces["front"].part(0.12, 0.15, 0.88, 0.62, (52, 54, 60))
        for i in range(4):
            faces["front"].disc(0.2 + 0.2 * i, 0.83, (0.06, 0.045), (70, 72, 78))
    top, stone = prop.as_class(COUNTERTOP, thing=True), rng.choice(((226, 220, 210), (120, 116, 116), (206, 168, 124)))
    top.box((-half - 0.02, half + 0.02), (0.86, 0.92), (-0.64, 0), stone, top=shade(stone, 1.1))
    sink, u = prop.as_class(SINK, thing=True), -half + (sink_at + 0.5) * width / units
    basin = ((u - 0.22, 0.925, -0.5), (u + 0.22, 0.925, -0.5), (u + 0.22, 0.925, -0.14), (u - 0.22, 0.925, -0.14))
    sink.face(basin, (166, 174, 182))
    sink.stick((u, 0.92, -0.1), (u, 1.2, -0.1), 0.035, STEEL)
    sink.stick((u, 1.2, -0.1), (u, 1.16, -0.26), 0.035, STEEL)
    right = half * rng.uniform(0.1, 1.0)
    upper, count = prop.as_class(CABINET, thing=True), max(1, round((right + half) / 0.6))
    _cupboards(upper, (-half, right), (1.5, 2.15), 0.34, count, wood, handles_at=0.1)


def _cupboards(prop: Prop, u, v, depth: float, count: int, wood: Color, handles_at: float) -> None:
    faces = prop.box(u, v, (-depth, 0), wood)
    if "front" in faces:
        for i in range(count):
            faces["front"].part((i + 0.05) / count, 0.05, (i + 0.95) / count, 0.95, shade(wood, 1.12))
            faces["front"].part((i + 0.3) / count, handles_at, (i + 0.7) / count, handles_at + 0.05, shade(wood, 0.55))


def refrigerator(stage: Stage, x: float, z: float, yaw: float) -> None:
    prop = Prop(stage, REFRIGERATOR, x, z, yaw=yaw, thing=True)
    color = stage.rng.choice(((236, 238, 238), (190, 196, 202), (220, 90, 84), (150, 204, 198)))
    faces = prop.box((-0.36, 0.36), (0.04, 1.8), (-0.65, 0), color, top=shade(color, 1.1))
    if "front" in faces:
        faces["front"].part(0, 0.62, 1, 0.635, shade(color, 0.6))
        for low, high in ((0.4, 0.58), (0.67, 0.85)):
            faces["front"].part(0.08, low, 0.14, high, shade(color, 0.55))
