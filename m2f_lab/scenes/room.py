"""A furnished room seen from one of its ends: the places of things, and the order of painting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import numpy as np

from m2f_lab.scenes import ensembles, fittings, furniture
from m2f_lab.scenes.props import Prop, Stage, far_to_near
from m2f_lab.scenes.shell import CEILING, FLOOR, RUG, TIMES, WALL, View, paint_rug, paint_shell
from m2f_lab.scenes.stage import Camera, Color, Paper, Point2

TEXTURE = {  # class id → fine and coarse grain in grey values
    WALL: (1.2, 0.8), FLOOR: (2.5, 2.0), CEILING: (0.8, 0.4), RUG: (6.0, 2.0), fittings.PLANT: (5.0, 3.0),
    furniture.SOFA: (4.0, 2.5), furniture.ARMCHAIR: (4.0, 2.5), furniture.BED: (4.0, 2.5), fittings.CURTAIN: (4.0, 2.5),
}  # fmt: skip
LOW, HIGH, FULL = ("low",), ("high",), ("low", "high")  # the parts of a wall that something takes


def draw(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a room: picture uint8 [H, W, 3], ADE20K ids uint8 [H, W] (0 is "other"), instance ids int32 [H, W]."""
    rng, paper = Random(f"room {seed}"), Paper(size)
    _, view, sun, light = rng.choices(TIMES, [frequency for frequency, *_ in TIMES])[0]
    depth, eye = rng.uniform(4.0, 5.2), rng.uniform(-1.1, 1.1)
    camera = Camera(
        (paper.height, paper.width),
        focal=rng.uniform(0.86, 1.04),
        center=(0.5, rng.uniform(0.31, 0.40)),
        eye=(eye, rng.uniform(1.45, 1.75), 0.0),
        yaw=math.atan2(rng.uniform(-0.7, 0.7) - eye, depth - 1.2),  # towards the middle of the room
    )
    room = _Room(Stage(paper, camera, light, rng), rng.uniform(4.2, 5.6), depth, rng.uniform(2.5, 2.9))
    room.paint(view, sun)
    return paper.finish(TEXTURE, rng.getrandbits(32))


@dataclass
class _Wall:
    """A wall and its occupied stretches. Positions are metres from the left end, or from the far one of a side wall."""

    name: str
    length: float
    taken: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"low": [], "high": []})

    def find(self, rng: Random, width: float, layers: tuple[str, ...], begin: float, end: float) -> float | None:
        """Take a free stretch of `width` between two positions; return its middle, or None if there is none."""
        begin, end = begin + width / 2, min(end, self.length) - width / 2
        tries = (rng.uniform(begin, end) for _ in range(12 if begin < end else 0))
        return next((at for at in tries if self.take(at, width, layers)), None)

    def take(self, at: float, width: float, layers: tuple[str, ...]) -> bool:
        left, right = at - width / 2 - 0.04, at + width / 2 + 0.04
        if any(left < b and a < right for layer in layers for a, b in self.taken[layer]):
            return False
        for layer in layers:
            self.taken[layer].append((left, right))
        return True


Place = tuple[_Wall, float]


class _Room:
    """Plan and painter of one room.

    Painters are functions of `furniture`, `fittings` and `ensembles`; options are their arguments after the place.

    Args:
        width, depth, height: in metres; the back wall is `depth` away from the camera
    """

    def __init__(self, stage: Stage, width: float, depth: float, height: float) -> None:
        self.stage, self.rng = stage, stage.rng
        self.width, self.depth, self.height = width, depth, height
        self.walls = {"back": _Wall("back", width), "left": _Wall("left", depth), "right": _Wall("right", depth)}
        self.seen, self.aside = ("right", "left") if stage.camera.eye[0] < 0 else ("left", "right")  # the better seen
        self.hung: list[Callable[[], object]] = []
        self.objects: list[tuple[float, Callable[[], object]]] = []  # depth, painter
        self.footprints: list[list[Point2]] = []  # outlines of shadows
        self.patches: list[list[Point2]] = []  # outlines of the sun on the floor
        self.rugs: list[tuple[float, float, float, float]] = []  # x, z, width, depth

    def paint(self, view: View, sun: Color | None) -> None:
        rng, stage = self.rng, self.stage
        paint_shell(stage, self.width, self.depth, self.height)
        self._plan_window((self.seen, self.aside), view)
        plans = {
            self._plan_bedroom: 3, self._plan_living_room: 3, self._plan_dining_room: 2, self._plan_study: 1.6,
            self._plan_kitchen: 1.4,
        }  # fmt: skip
        rng.choices(list(plans), list(plans.values()))[0]()
        if rng.random() < 0.6:
            self._plan_window(("back", self.aside), view)
        self._plan_walls()
        self._plan_floor()
        for rug in self.rugs:
            paint_rug(stage, *rug)
        if sun is not None:
            stage.paper.overlay(self.patches, sun, 0.42, softness=0.004)
        for painter in self.hung:
            painter()
        stage.paper.overlay(self.footprints, (40, 26, 30), stage.light.shadow, softness=0.014)
        far_to_near(self.objects)

    # ---- places ----

    def _on(self, wall: _Wall, at: float, off: float = 0.0) -> tuple[float, float, float]:
        """Return x, z and yaw of a position on a wall, or `off` metres in front of it."""
        if wall.name == "back":
            return -self.width / 2 + at, self.depth - off, 0.0
        side = -1 if wall.name == "left" else 1
        return side * (self.width / 2 - off), self.depth - at, side * math.pi / 2

    def _add(self, spot: tuple[float, float, float], size: tuple[float, float], at_wall: bool, painter) -> None:
        """Plan a piece of the given width and depth; x, z and yaw refer to its back edge or to its middle."""
        prop, (width, depth) = Prop(self.stage, FLOOR, spot[0], spot[1], yaw=spot[2]), size
        w = (-depth, 0.0) if at_wall else (-depth / 2, depth / 2)
        self.objects.append((self.stage.camera.depth(prop.to_world((0, 0, sum(w) / 2))), painter))
        self.footprints.append(prop.footprint((-width / 2 - 0.05, width / 2 + 0.05), (w[0] - 0.08, w[1]), 0.25))

    def _stand(self, x: float, z: float, size: tuple[float, float], painter, *options) -> None:
        """Put a piece on the floor: `painter(stage, x, z, *options)`."""
        self._add((x, z, 0.0), size, False, lambda: painter(self.stage, x, z, *options))

    def _turned(self, x: float, z: float, yaw: float, size: tuple[float, float], painter, *options) -> None:
        """Put a piece with a front on the floor: `painter(stage, x, z, yaw, *options)`."""
        self._add((x, z, yaw), size, False, lambda: painter(self.stage, x, z, yaw, *options))

    def _against(self, names, size: tuple[float, float], layers, painter, *options, at=None) -> Place | None:
        """Put a piece against the first free wall (at a position); return None if all are taken."""
        place = self._find(names, size[0], layers, at, margins=(0.5, 0.95, 4.0))  # corners hold plants and lamps
        if place:
            spot = self._on(*place)
            self._add(spot, size, True, lambda: painter(self.stage, *spot, *options))
        return place

    def _hang(self, names, width: float, layers, painter, *options, at=None) -> Place | None:
        """Hang something on the first free wall (at a position); return None if all are taken."""
        place = self._find(names, width, layers, at, margins=(0.2, 0.2, 3.8))
        if place:
            spot = self._on(*place)
            self.hung.append(lambda: painter(self.stage, *spot, *options))
        return place

    def _find(self, names, width: float, layers, at: float | None, margins: tuple[float, float, float]) -> Place | None:
        """Take a width of a wall; margins hold the back wall's corners and the begin and end of side walls."""
        for name in names:
            wall = self.walls[name]
            if at is not None:
                found = at if wall.take(at, width, layers) else None
            elif name == "back":
                found = wall.find(self.rng, width, layers, margins[0], self.width - margins[0])
            else:
                found = wall.find(self.rng, width, layers, margins[1], margins[2])
            if found is not None:
                return wall, found
        return None

    def _any_wall(self) -> list[str]:
        return self.rng.sample(list(self.walls), 3)

    # ---- plans ----

    def _plan_window(self, names: tuple[str, str], view: View) -> None:
        """Plan a window, perhaps with curtains and a radiator, and the sunlight through it."""
        rng, size = self.rng, (self.rng.uniform(1.0, 1.9), self.rng.uniform(1.1, 1.4))
        width, covered = size[0], rng.random() < 0.6
        extent, layers = (width + 1.0, FULL) if covered else (width + 0.1, HIGH)
        place = self._hang(names, extent, layers, fittings.window, size, view)
        if place is None:
            return
        wall, at = place
        spot = self._on(wall, at)
        if rng.random() < 0.4 and (covered or wall.take(at, width * 0.7, LOW)):
            self.hung.append(lambda: fittings.radiator(self.stage, *spot, width * 0.7))
        if covered:
            color = rng.choice(furniture.FABRICS)
            self.hung.append(lambda: fittings.curtains(self.stage, *spot, width, color))
        prop, slant = Prop(self.stage, FLOOR, spot[0], spot[1], yaw=spot[2]), rng.uniform(-0.5, 0.5)
        near, far = 0.95 * fittings.SILL, 0.95 * (fittings.SILL + size[1])
        for a, b in ((-width / 2 + 0.08, -0.05), (0.05, width / 2 - 0.08)):
            patch = ((a, near), (b, near), (b, far), (a, far))
            self.patches.append(self.stage.camera.project([prop.to_world((u + slant * w, 0.01, -w)) for u, w in patch]))

    def _plan_bedroom(self) -> None:
        rng, width = self.rng, self.rng.choice((1.0, 1.5, 1.8))
        for name in (rng.choice(("back", self.seen)), "back"):
            at = self.width / 2 + rng.uniform(-0.5, 0.5) if name == "back" else rng.uniform(1.7, 2.3)
            if self._against((name,), (width, 2.05), LOW, furniture.bed, width, at=at):
                break
        for beside in (at - width / 2 - 0.32, at + width / 2 + 0.32):
            if 0.3 < beside < self.walls[name].length - 0.3:
                self._against((name,), (0.5, 0.42), LOW, ensembles.night_table, at=beside)
        art = rng.uniform(0.8, 1.3), rng.uniform(0.55, 0.75)
        self._hang((name,), art[0], HIGH, fittings.painting, rng.uniform(1.35, 1.5), art, at=at)
        x, z, _ = self._on(self.walls[name], at, 1.6)
        self.rugs.append((x, z, width + 1.4, 2.0) if name == "back" else (x, z, 2.0, width + 1.4))
        others = [n for n in self._any_wall() if n != name]
        size = rng.uniform(1.2, 1.7), 0.6, rng.uniform(1.9, 2.15)
        self._against(others, size[:2], FULL, furniture.cabinet, furniture.WARDROBE, size)
        if rng.random() < 0.6:
            size = 1.0, 0.45, 0.9
            self._against(others, size[:2], LOW, ensembles.sideboard, furniture.DRAWERS, size)

    def _plan_living_room(self) -> None:
        rng, width = self.rng, self.rng.uniform(1.8, 2.4)
        at = self.width / 2 + rng.uniform(-0.4, 0.4)
        self._against(("back",), (width, 0.95), LOW, furniture.sofa, width, at=at)
        x, z, _ = self._on(self.walls["back"], at, 1.75)
        self.rugs.append((x, z, rng.uniform(2.2, 2.8), rng.uniform(1.5, 1.9)))
        size = rng.uniform(0.9, 1.2), 0.55, 0.4
        self._stand(x, z, size[:2], ensembles.laid_table, furniture.COFFEE_TABLE, size)
        for _ in range(rng.choice((1, 2))):
            self._plan_painting(("back",))
        kind, name, other = rng.choice(("television", "fireplace", "bookcase")), *rng.sample(("left", "right"), 2)
        if kind == "television":
            self._against((name,), (1.5, 0.42), FULL, ensembles.television_bench)
        elif kind == "fireplace":
            place = self._against((name,), (1.6, 0.4), LOW, ensembles.fireplace)
            if place:
                self._hang((name,), 0.8, HIGH, fittings.mirror, 1.4, at=place[1])
        else:
            self._plan_bookcase((name,))
        if rng.random() < 0.6:
            self._plan_bookcase((other,))
        if rng.random() < 0.75:
            side = rng.choice((-1, 1))
            at = x + side * rng.uniform(1.3, 1.6), z - rng.uniform(0.1, 0.4), side * rng.uniform(0.8, 1.4)
            self._turned(*at, (0.9, 0.9), furniture.sofa, 0.95)

    def _plan_dining_room(self) -> None:
        self._plan_dining_table(self.rng.uniform(-0.4, 0.4), self.depth - self.rng.uniform(1.7, 2.1))
        size = 1.4, 0.45, 0.85
        self._against(self._any_wall(), size[:2], LOW, ensembles.sideboard, furniture.CABINET, size)

    def _plan_dining_table(self, x: float, z: float) -> None:
        """Plan a table and four chairs under a lamp."""
        rng = self.rng
        size = rng.uniform(1.3, 1.8), rng.uniform(0.8, 0.95), 0.75
        color, off = rng.choice((*furniture.WOODS, *furniture.FABRICS)), size[1] / 2 + 0.2
        for u in (-size[0] / 4, size[0] / 4):
            for w, yaw in ((off, 0.0), (-off, math.pi)):
                self._turned(x + u, z + w, yaw, (0.45, 0.45), furniture.chair, furniture.CHAIR, color)
        self._stand(x, z, size[:2], ensembles.laid_table, furniture.TABLE, size)
        lamp = self.height, rng.uniform(0.8, 1.1)
        depth = self.stage.camera.depth((x, 0, z)) - 0.02
        self.objects.append((depth, lambda: fittings.pendant(self.stage, x, z, *lamp)))
        if rng.random() < 0.6:
            self.rugs.append((x, z, size[0] + 1.0, size[1] + 1.2))

    def _plan_study(self) -> None:
        rng, width = self.rng, self.rng.uniform(1.3, 1.7)
        place = self._against(("back",), (width, 0.7), LOW, ensembles.desk, width)
        if place:
            x, z, yaw = self._on(*place, 0.95)
            kind, color = rng.choice((furniture.SWIVEL_CHAIR, furniture.CHAIR)), rng.choice(furniture.FABRICS)
            self._turned(x, z, yaw + math.pi + rng.uniform(-0.5, 0.5), (0.5, 0.5), furniture.chair, kind, color)
            length = rng.uniform(0.9, 1.3)
            self._hang(("back",), length, HIGH, fittings.shelf, rng.uniform(1.5, 1.75), length, at=place[1])
        for name in (self.seen, self.aside):
            self._plan_bookcase((name,))
        self.rugs.append((rng.uniform(-0.5, 0.5), self.depth - 1.8, 2.2, 1.6))

    def _plan_kitchen(self) -> None:
        rng, width = self.rng, self.rng.uniform(2.4, min(3.4, self.width - 1.4))
        self._against(("back", self.seen), (width, 0.62), FULL, ensembles.kitchen, width)
        self._against(self._any_wall(), (0.74, 0.66), FULL, ensembles.refrigerator)
        if rng.random() < 0.7:
            self._plan_dining_table(rng.uniform(-0.6, 0.6), self.depth - rng.uniform(2.1, 2.4))
        else:
            for _ in range(3):
                x, z, color = rng.uniform(-1.2, 1.2), self.depth - rng.uniform(1.4, 2.4), rng.choice(furniture.WOODS)
                self._stand(x, z, (0.4, 0.4), furniture.stool, furniture.STOOL, color)

    def _plan_bookcase(self, names) -> None:
        size = self.rng.uniform(0.8, 1.5), 0.32, self.rng.choice((1.2, 1.55, 1.95))
        self._against(names, size[:2], FULL, furniture.bookcase, size)

    def _plan_painting(self, names) -> None:
        art = self.rng.uniform(0.6, 1.1), self.rng.uniform(0.55, 0.85)
        self._hang(names, art[0], HIGH, fittings.painting, self.rng.uniform(1.2, 1.5), art)

    def _plan_walls(self) -> None:
        """Plan a bookcase, a door, a clock and paintings, wherever there is space."""
        rng = self.rng
        if rng.random() < 0.4:
            self._plan_bookcase(self._any_wall())
        if rng.random() < 0.7:
            self._hang(self._any_wall(), 1.1, FULL, fittings.door)
        if rng.random() < 0.5:
            self._hang(self._any_wall(), 0.5, HIGH, fittings.clock, rng.uniform(1.9, 2.1))
        for _ in range(rng.choice((1, 2, 3))):
            self._plan_painting(self._any_wall())

    def _plan_floor(self) -> None:
        """Plan plants, lamps or a guitar in the corners; an ottoman, a basket or a cat in between."""
        rng, back = self.rng, self.walls["back"]
        for at in (0.36, back.length - 0.36):
            x, z, _ = self._on(back, at, 0.38)
            kind = rng.choices(("plant", "lamp", "guitar", None), (5, 3, 1, 1))[0] if back.take(at, 0.4, LOW) else None
            if kind == "plant":
                self._stand(x, z, (0.5, 0.5), fittings.plant, rng.uniform(1.0, 1.7))
            elif kind == "lamp":
                self._stand(x, z, (0.4, 0.4), fittings.floor_lamp)
            elif kind == "guitar":
                self._stand(x, z, (0.4, 0.3), fittings.guitar)
        for side in rng.choice(((-1,), (1,), (-1, 1), ())):
            x, z = side * (self.width / 2 - rng.uniform(0.7, 1.0)), self.depth - rng.uniform(1.0, 2.2)
            if rng.random() < 0.5:
                self._stand(x, z, (0.5, 0.5), furniture.stool, furniture.OTTOMAN, rng.choice(furniture.FABRICS))
            else:
                self._stand(x, z, (0.5, 0.5), fittings.clutter)
        if rng.random() < 0.3:
            self._stand(rng.uniform(-1, 1), rng.uniform(2.6, 3.2), (0.5, 0.3), fittings.sleeping_cat)
