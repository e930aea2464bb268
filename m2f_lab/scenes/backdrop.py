"""Background of a street: the sky, the horizon, and the ground with its markings."""

from __future__ import annotations

import itertools
import math
from random import Random

from m2f_lab.scenes import houses, scenery
from m2f_lab.scenes.props import Prop, Stage
from m2f_lab.scenes.stage import Color, Light, mix, shade

ROAD, SIDEWALK, TERRAIN, SKY = 7, 8, 22, 23

Sky = tuple[Color, Color, Color]  # from the top to the horizon

TIMES: dict[str, tuple[float, Sky, Light]] = {  # how frequent it is, its sky, its light
    "day": (3.0, ((72, 142, 214), (150, 200, 236), (222, 238, 244)), Light(haze=(214, 230, 240))),
    "summer": (
        2.0,
        ((56, 120, 206), (124, 184, 236), (236, 240, 226)),
        Light(ambient=(1.04, 1.02, 0.96), haze=(226, 234, 232), direction=(0.6, 0.9, -0.3), shadow=0.46),
    ),
    "golden": (
        2.0,
        ((96, 138, 186), (240, 194, 140), (255, 222, 164)),
        Light(ambient=(1.06, 0.95, 0.82), haze=(250, 212, 164), direction=(-0.9, 0.45, 0.1), shadow=0.5),
    ),
    "dawn": (
        1.2,
        ((128, 140, 196), (236, 176, 176), (255, 216, 190)),
        Light((1.0, 0.92, 0.94), (244, 206, 200), haze_distance=95, direction=(0.9, 0.4, 0.2), shadow=0.38),
    ),
    "overcast": (
        1.6,
        ((158, 170, 182), (188, 198, 206), (214, 218, 220)),
        Light((0.92, 0.94, 0.97), (206, 212, 216), haze_distance=85, direction=(0.1, 1, 0), shadow=0.24),
    ),
    "dusk": (
        1.0,
        ((58, 56, 112), (168, 94, 136), (250, 168, 124)),
        Light((0.74, 0.66, 0.78), (212, 148, 144), direction=(0.9, 0.4, 0.3), shadow=0.3, lamps=True),
    ),
    "night": (
        0.8,
        ((18, 26, 60), (34, 48, 92), (74, 84, 128)),
        Light((0.46, 0.50, 0.72), (70, 80, 122), direction=(0.3, 1, 0.2), shadow=0.3, lamps=True),
    ),
}


def choose_time(rng: Random) -> str:
    return rng.choices(list(TIMES), [frequency for frequency, _, _ in TIMES.values()])[0]


def paint_sky(stage: Stage, time: str) -> None:
    """A gradient, stars, the sun or the moon, and clouds."""
    rng, paper, colors = stage.rng, stage.paper, TIMES[time][1]
    width, horizon = paper.width, stage.camera.cy
    share = horizon / paper.height
    sky = paper.new_object(SKY)
    paper.backdrop(sky, [(0, colors[0]), (share * 0.6, colors[1]), (share, colors[2]), (1, colors[2])])
    if time == "night":
        for _ in range(60):
            r = rng.choice((0.6, 1.0)) * paper.height / 512
            paper.ellipse(sky, (rng.random() * width, rng.random() * horizon * 0.8), (r, r), (214, 220, 240))
    if time != "overcast":
        low = time in ("golden", "dawn", "dusk")
        spot = rng.uniform(0.12, 0.88) * width, horizon * (rng.uniform(0.6, 0.85) if low else rng.uniform(0.12, 0.4))
        r = paper.height * rng.uniform(0.022, 0.034)
        color = (244, 240, 220) if time == "night" else mix((255, 248, 214), colors[2], 0.15)
        paper.glow(spot, r * 9, mix(color, colors[2], 0.3), 0.75)
        paper.ellipse(sky, spot, (r, r), _bytes(color))
    bright = shade(mix(colors[1], colors[2], 0.6), 1.0 if time == "night" else 1.5)
    for _ in range(rng.randint(2, 5) + 4 * (time == "overcast")):
        at = rng.uniform(0, width), rng.uniform(0.06, 0.62) * horizon
        _cloud(stage, sky, at, rng.uniform(0.05, 0.12) * paper.height, bright)


def _cloud(stage: Stage, sky: int, at: tuple[float, float], size: float, color: Color) -> None:
    rng = stage.rng
    puffs = [(rng.uniform(-1.6, 1.6), rng.uniform(-0.35, 0.1), rng.uniform(0.35, 0.7)) for _ in range(7)]
    for tone, dy, scale in ((mix(color, stage.light.haze, 0.45), 0.12, 1.0), (color, -0.05, 0.9)):
        for x, y, r in puffs:
            center = at[0] + x * size, at[1] + (y + dy) * size * 0.7
            stage.paper.ellipse(sky, center, (r * size * 1.25 * scale, r * size * 0.55 * scale), _bytes(tone))


def _bytes(color: Color) -> tuple[int, int, int]:
    return round(color[0]), round(color[1]), round(color[2])


def paint_horizon(stage: Stage, leaves: tuple[Color, ...]) -> None:
    """Hills, a skyline or woods where the street ends."""
    rng = stage.rng
    if rng.random() < 0.6:
        hills, phase = Prop(stage, scenery.VEGETATION, 0, 260), rng.uniform(0, 6)
        ridge = [
            (u, 9 + 7 * math.sin(u / 70 + phase) + 4 * math.sin(u / 27 + 2 * phase)) for u in range(600, -601, -12)
        ]
        hills.card([(-600, -20), (600, -20), *ridge], mix(leaves[0], (92, 128, 120), 0.5))
    if rng.random() < 0.55:
        for _ in range(26):
            tower = Prop(stage, houses.BUILDING, rng.uniform(-220, 220), rng.uniform(150, 240))
            wide, high = rng.uniform(4, 10), rng.uniform(10, 34)
            tower.box((-wide, wide), (0, high), (0, 10), rng.choice(houses.PLASTER))
    else:
        for x in range(-260, 261, 9):
            at = x + rng.uniform(-4, 4), rng.uniform(120, 150)
            scenery.tree(stage, *at, leaves, rng.uniform(8, 15), "round")


class Ground:
    """Grass, pavements, the road and its markings.

    Args:
        half_road: from the middle of the road to the curb, in metres
        walk: width of the pavements
        crossing: where a side street begins and ends, in metres from the viewer, or None
    """

    def __init__(self, stage: Stage, half_road: float, walk: float, crossing: tuple[float, float] | None) -> None:
        self.stage, self.rng = stage, stage.rng
        self.half_road, self.walk, self.crossing = half_road, walk, crossing
        asphalt = self.rng.choice(((104, 106, 112), (94, 96, 106), (116, 114, 114)))
        self.asphalt = shade(asphalt, self.rng.uniform(0.92, 1.08))
        self.paving = self.rng.choice(((196, 184, 170), (186, 182, 178), (204, 190, 166), (190, 172, 164)))

    def paint(self, grass: Color, paved_sides: tuple[int, ...], tramway: bool) -> None:
        """Paint everything; sides -1 (left) and 1 (right) may be paved up to the houses."""
        terrain, walk, road = (Prop(self.stage, c, 0, 0) for c in (TERRAIN, SIDEWALK, ROAD))
        self._strip(terrain, (-500, 500), grass)
        for side in (-1, 1):
            self._pavement(walk, side, side in paved_sides)
        self._strip(road, (-self.half_road, self.half_road), self.asphalt)
        if self.crossing:
            self._strip(road, (-200, 200), self.asphalt, self.crossing)
        self._markings(road, tramway)

    def _strip(self, prop: Prop, x: tuple[float, float], color: Color, z: tuple[float, float] = (0.5, 300.0)) -> None:
        """A strip along the street, hazier with distance."""
        left, right = sorted(x)
        steps = math.ceil(3 * math.log(z[1] / z[0]))
        stops = [z[0] * (z[1] / z[0]) ** (i / steps) for i in range(steps + 1)]
        for near, far in itertools.pairwise(stops):
            prop.depth = (near + far) / 2
            prop.face(((left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)), color, shaded=False)

    def _pavement(self, walk: Prop, side: int, up_to_houses: bool) -> None:
        curb, outer = side * self.half_road, side * (self.half_road + self.walk)
        self._strip(walk, (curb, outer), self.paving)
        if up_to_houses:
            self._strip(walk, (outer, outer + side * 30), shade(self.paving, 0.95))
        for i in range(18):
            self._strip(walk, (curb, outer), shade(self.paving, 0.9), (2 + 1.6 * i, 2.08 + 1.6 * i))
        self._strip(walk, (curb, curb + side * 0.28), shade(self.paving, 1.2))

    def _markings(self, road: Prop, tramway: bool) -> None:
        rng, half, white = self.rng, self.half_road, mix((240, 240, 234), self.asphalt, 0.12)
        begin = self.crossing[0] if self.crossing else 120.0
        if tramway:
            for x in (-2.2, -0.8, 0.8, 2.2):
                self._strip(road, (x - 0.06, x + 0.06), shade(self.asphalt, 0.6), (1, 120))
        z = rng.uniform(1, 4)
        while z < 100:
            if not self.crossing or z + 4 < begin or z > self.crossing[1] + 1:
                self._strip(road, (-0.08, 0.08), white, (z, z + 3))
            z += 6
        for side in (-1, 1):
            edge = side * (half - (2.0 if half > 4.4 else 0.25))
            self._strip(road, (edge - 0.06, edge + 0.06), white, (1, begin - 1))
        if self.crossing:
            for i in range(int(2 * half - 1)):
                x = -half + 0.4 + i
                self._strip(road, (x, x + 0.5), white, (begin - 3, begin - 0.4))
            self._strip(road, (0.1, half - 0.2), white, (begin - 4.2, begin - 3.8))
        for _ in range(2):  # patches in the asphalt
            x, z = rng.uniform(-half, half - 1.5), rng.uniform(4, 30)
            self._strip(road, (x, x + 1.4), shade(self.asphalt, rng.uniform(0.88, 0.96)), (z, z + rng.uniform(1, 4)))
