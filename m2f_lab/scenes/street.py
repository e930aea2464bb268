"""A street seen from a car: the places of things, and the order of painting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random

import numpy as np

from m2f_lab.scenes import houses, people, scenery, traffic
from m2f_lab.scenes.backdrop import (
    ROAD,
    SIDEWALK,
    SKY,
    TERRAIN,
    TIMES,
    Ground,
    choose_time,
    paint_horizon,
    paint_sky,
)
from m2f_lab.scenes.props import Prop, Stage, far_to_near
from m2f_lab.scenes.stage import Camera, Paper, Point2, shade

EGO_VEHICLE = 1

TEXTURE = {  # class id → fine and coarse grain in grey values
    ROAD: (4.0, 2.0), SIDEWALK: (2.5, 2.0), TERRAIN: (7.0, 5.0), scenery.VEGETATION: (7.0, 5.0),
    houses.BUILDING: (2.0, 2.0), scenery.WALL: (4.0, 4.0), SKY: (0.8, 0.0),
}  # fmt: skip


def draw(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a street: picture uint8 [H, W, 3], Cityscapes' labelIds uint8 [H, W], instance ids int32 [H, W]."""
    rng = Random(f"street {seed}")
    paper, time, half_road = Paper(size), choose_time(rng), rng.uniform(3.4, 5.6)
    camera = Camera(
        (paper.height, paper.width),
        focal=rng.uniform(0.95, 1.25),
        center=(rng.uniform(0.42, 0.58), rng.uniform(0.40, 0.50)),
        eye=(rng.uniform(0.25, 0.5) * half_road, rng.uniform(1.5, 2.4), 0.0),
        yaw=rng.uniform(-0.1, 0.1),
        curve=rng.choice((0.0, 0.0, rng.uniform(-0.002, 0.002))),
    )
    _Street(Stage(paper, camera, TIMES[time][2], rng), half_road).paint(time)
    return paper.finish(TEXTURE, rng.getrandbits(32))


class _Street:
    """Plan and painter of one street."""

    def __init__(self, stage: Stage, half_road: float) -> None:
        rng = stage.rng
        self.stage, self.rng = stage, rng
        self.half_road, self.walk = half_road, rng.uniform(2.2, 3.8)  # metres
        season = rng.choices(("spring", "summer", "autumn"), (2, 3, 1.3))[0]
        self.leaves, self.grass = scenery.LEAVES[season], scenery.GRASS[season]
        begin = rng.uniform(13, 26)
        self.crossing = (begin, begin + rng.uniform(6, 9)) if rng.random() < 0.55 else None  # metres ahead
        self.tramway = half_road > 4.4 and rng.random() < 0.5
        kinds = ("town", "modern", "garden", "park")
        self.sides = {side: rng.choices(kinds, (3, 1.6, 1.6, 1.4))[0] for side in (-1, 1)}
        self.objects: list[tuple[float, Callable[[], object]]] = []  # depth, painter
        self.footprints: list[list[Point2]] = []  # outlines of shadows

    def paint(self, time: str) -> None:
        stage, light = self.stage, self.stage.light
        paint_sky(stage, time)
        paint_horizon(stage, self.leaves)
        paved = tuple(side for side, kind in self.sides.items() if kind in ("town", "modern"))
        Ground(stage, self.half_road, self.walk, self.crossing).paint(self.grass, paved, self.tramway)
        for side in (-1, 1):
            self._plan_pavement(side)
            self._plan_lane(side)
        self._plan_crossing()
        self._plan_bikes()
        stage.paper.overlay(self.footprints, (18, 20, 40), light.shadow, softness=0.005)
        for side in (-1, 1):
            self._paint_side(side)
        far_to_near(self.objects)
        if self.rng.random() < 0.6:
            self._paint_bonnet()

    # ---- planning ----

    def _add(self, x: float, z: float, size: tuple[float, float, float], painter, *options, yaw: float = 0.0) -> None:
        """Plan an object of the given width, length and height, and its shadow."""
        spot, (width, length, height) = Prop(self.stage, ROAD, x, z, yaw=yaw), size
        self.objects.append((spot.depth, lambda: painter(self.stage, x, z, *options)))
        u, w = (-width / 2, width / 2), (-length / 2, length / 2)
        self.footprints.append(spot.footprint(u, w))
        if self.stage.light.shadow > 0.28:
            self.footprints.append(spot.footprint(u, w, height))

    def _add_tree(self, x: float, z: float) -> None:
        height = self.rng.uniform(4.5, 7.5)
        self._add(x, z, (0.2, 0.2, height * 0.6), scenery.tree, self.leaves, height)
        dx, dy, dz = self.stage.light.direction
        reach, r = 0.6 * height / max(dy, 0.3), 0.26 * height
        crown = Prop(self.stage, ROAD, x - dx * reach, z - dz * reach)
        turn = (2 * math.pi * i / 18 for i in range(18))
        outline = [crown.to_world((r * math.cos(a), 0.01, r * math.sin(a))) for a in turn]
        self.footprints.append(self.stage.camera.project(outline))

    def _add_bike(self, x: float, z: float, yaw: float, ridden: bool) -> None:
        kind = people.cyclist if self.rng.random() < 0.62 else people.motorcyclist
        self._add(x, z, (1.6, 0.4, 1.2), kind, yaw, ridden, yaw=yaw)

    def _add_person(self, x: float, z: float) -> None:
        self._add(x, z, (0.5, 0.3, 1.6), people.person)

    def _add_vehicle(self, kind, x: float, z: float, yaw: float) -> None:
        self._add(x, z, traffic.SIZES[kind], kind, yaw, yaw=yaw)

    def _in_crossing(self, z: float) -> bool:
        return self.crossing is not None and self.crossing[0] - 1 < z < self.crossing[1] + 1

    def _plan_pavement(self, side: int) -> None:
        """Plan trees, lamps, signs and benches along the curb, people and parked bicycles behind them."""
        rng, curb = self.rng, self.half_road + 0.5
        trees, lamps = rng.random() < 0.6, rng.random() < 0.8
        z = rng.uniform(6, 9)
        while z < 70:
            kind = rng.random()
            if not self._in_crossing(z):
                if trees and kind < 0.5:
                    self._add_tree(side * curb, z)
                elif lamps and kind < 0.75:
                    self._add(side * curb, z, (0.3, 0.3, 6), scenery.lamp_post)
                elif kind < 0.9:
                    self._add(side * curb, z, (0.3, 0.3, 2.5), scenery.traffic_sign)
                else:
                    self._add(side * (curb + 0.4), z, (0.8, 0.6, 0.8), scenery.street_furniture)
            z += rng.uniform(4, 9)
        for _ in range(rng.choice((1, 2, 3, 4, 6))):
            x = self.half_road + rng.uniform(0.9, max(1.0, self.walk - 0.4))
            self._add_person(side * x, rng.uniform(5, 12) if rng.random() < 0.4 else rng.uniform(10, 40))
        if rng.random() < 0.35:
            self._add_bike(side * (curb + 0.3), rng.uniform(7, 20), rng.uniform(-0.3, 0.3), ridden=False)

    def _plan_lane(self, side: int) -> None:
        """Plan vehicles: on the right they drive away, on the left they approach; some are parked at the curb."""
        rng, half, yaw = self.rng, self.half_road, 0.0 if side > 0 else math.pi
        z = rng.uniform(9, 20)
        while z < 70 and rng.random() < 0.85:
            kind = rng.choices((traffic.car, traffic.bus, traffic.truck), (7, 1.4, 1.4))[0]
            x = half * 0.46 + rng.uniform(-0.3, 0.3)
            if self.tramway and rng.random() < 0.35:
                kind, x = traffic.tram, 1.5
            length = traffic.SIZES[kind][1]
            self._add_vehicle(kind, side * x, z + length / 2, yaw)
            z += length + rng.uniform(5, 22)
        if half > 4.2 and rng.random() < 0.6:
            z = rng.uniform(6, 14)
            for _ in range(rng.randint(1, 4)):
                if not self._in_crossing(z) and not self._in_crossing(z + 4):
                    self._add_vehicle(traffic.car, side * (half - 1.0), z + 2, yaw)
                z += rng.uniform(5.5, 8)

    def _plan_crossing(self) -> None:
        """Plan traffic lights, and people who cross."""
        if self.crossing is None:
            return
        rng, half, (begin, end) = self.rng, self.half_road, self.crossing
        for side in (-1, 1):
            self._add(side * (half + 0.5), begin - 1.2, (0.3, 0.3, 3), scenery.traffic_light)
        if rng.random() < 0.5:
            turn = rng.choice((1, -1)) * math.pi / 2
            self._add_vehicle(traffic.car, rng.uniform(-9, 9), (begin + end) / 2, turn)
        for _ in range(rng.randint(0, 3)):
            self._add_person(rng.uniform(-half, half), begin - rng.uniform(1, 3))

    def _plan_bikes(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 1, 1, 2))):
            x = rng.choice((-1, 1)) * self.half_road * rng.uniform(0.1, 0.85)
            self._add_bike(x, rng.uniform(6, 22), rng.choice((0, math.pi)) + rng.uniform(-0.5, 0.5), ridden=True)

    # ---- the sides ----

    def _paint_side(self, side: int) -> None:
        """Paint houses, gardens or a park along one side, from the far end to the near one."""
        rng, kind, x = self.rng, self.sides[side], self.half_road + self.walk
        cuts = [5.0]
        while cuts[-1] < 110:
            cuts.append(cuts[-1] + rng.uniform(7, 15))
        for z0, z1 in reversed(list(itertools.pairwise(cuts))):
            if self.crossing and z0 < self.crossing[1] + 1 and z1 > self.crossing[0] - 1:
                z0, z1 = (self.crossing[1] + 1, z1) if z0 > self.crossing[0] - 1 else (z0, self.crossing[0] - 1)
                if z1 - z0 < 3:
                    continue
            if kind == "park" or (kind == "garden" and rng.random() < 0.25):
                for z in sorted((rng.uniform(z0, z1) for _ in range(3)), reverse=True):
                    at = side * (x + rng.uniform(2.5, 16)), z
                    scenery.tree(self.stage, *at, self.leaves, rng.uniform(5, 9))
                self._paint_border(side, x + 0.2, z0, z1)
            elif kind == "garden":
                set_back = x + rng.uniform(4, 6)
                houses.building(self.stage, side, set_back, z0 + 1.5, z1 - 1, rng.choice((1, 2, 2)), modern=False)
                self._paint_border(side, x + 0.2, z0, z1)
            else:
                storeys = rng.randint(2, 5) if kind == "town" else rng.randint(3, 9)
                houses.building(self.stage, side, x, z0, z1, storeys, modern=kind == "modern")

    def _paint_border(self, side: int, x: float, z0: float, z1: float) -> None:
        """Paint the border between the pavement and a garden."""
        kind = self.rng.choices(("fence", "wall", "hedge", "open"), (3, 2, 2, 1.5))[0]
        if kind == "fence":
            scenery.fence(self.stage, side, x, z0, z1)
        elif kind == "wall":
            scenery.wall(self.stage, side, x, z0, z1)
        elif kind == "hedge":
            scenery.hedge(self.stage, side, x, z0, z1, self.rng.choice(self.leaves))

    def _paint_bonnet(self) -> None:
        """Paint the bonnet of the car that carries the camera; neither learned nor evaluated."""
        paper, rng = self.stage.paper, self.rng
        number = paper.new_object(EGO_VEHICLE)
        color = rng.choice(((60, 66, 80), (128, 44, 48), (196, 200, 204), (44, 70, 96)))
        x, rise = paper.width * rng.uniform(0.44, 0.56), paper.height * rng.uniform(0.06, 0.11)
        for scale, tone in ((1.0, 1.0), (0.86, 1.12), (0.6, 1.22)):
            radii = paper.width * 0.62 * scale, rise * (1 + scale)
            paper.ellipse(number, (x, paper.height + rise), radii, self.stage.light.tone(shade(color, tone), 0))
