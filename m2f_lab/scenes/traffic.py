"""Vehicles. Their origin is the middle of their underside; at yaw 0 they drive away and show their tail ("front")."""

from __future__ import annotations

import math

from m2f_lab.scenes.props import Facet, Prop, Stage
from m2f_lab.scenes.stage import Color, mix, shade

CAR, TRUCK, BUS, TRAM = 26, 27, 28, 31

PAINTS = (
    (206, 62, 52), (238, 150, 48), (245, 201, 72), (72, 148, 96), (52, 116, 176), (110, 178, 206), (240, 240, 236),
    (72, 78, 92), (156, 164, 172), (140, 70, 110), (224, 128, 120), (44, 62, 98),
)  # fmt: skip
GLASS = (70, 92, 112)
TYRE, HUB = (38, 38, 44), (178, 182, 188)
TAIL_LIGHT, HEAD_LIGHT = (226, 52, 44), (255, 246, 208)


def car(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A hatchback, saloon or small van."""
    prop, rng = Prop(stage, CAR, x, z, yaw=yaw, thing=True), stage.rng
    paint = rng.choice(PAINTS)
    kind = rng.choice(("hatchback", "saloon", "van"))
    length, width = {"hatchback": 3.7, "saloon": 4.5, "van": 4.5}[kind], 1.8
    waist, roof = (0.95, 1.95) if kind == "van" else (0.82, 1.46)
    tail, nose, half = -length / 2, length / 2, width / 2
    _undercarriage(prop, half, (tail + 0.75, nose - 0.8), 0.33)
    body = prop.box((-half, half), (0.27, waist), (tail, nose), paint, lean=(0.03, 0.06, 0.12))
    _wheels(prop, body, half, (tail + 0.75, nose - 0.8), 0.34)
    boot = {"hatchback": 0.10, "saloon": 0.75, "van": 0.06}[kind]
    bonnet = 0.95 if kind == "van" else 1.15
    lean = (0.14, 0.22, 0.5) if kind == "van" else (0.16, 0.42, 0.6)
    size = (-half + 0.07, half - 0.07), (waist, roof), (tail + boot, nose - bonnet)
    cabin = prop.box(*size, shade(paint, 0.94), lean, shade(paint, 1.12))
    glass = _glass(stage)
    for name, facet in cabin.items():
        if name in ("front", "back"):
            facet.part(0.09, 0.12, 0.91, 0.88, glass)
            facet.polygon(((0.2, 0.12), (0.42, 0.12), (0.62, 0.88), (0.4, 0.88)), shade(glass, 1.16))
        elif name in ("left", "right"):
            for a, b in ((0.1, 0.48), (0.53, 0.9)):
                facet.part(a, 0.12, b, 0.86, glass)
    for name, facet in body.items():
        if name in ("left", "right"):
            facet.part(0, 0, 1, 0.2, shade(paint, 0.78))
            facet.part(0.47, 0.2, 0.485, 0.95, shade(paint, 0.8))
    _lights(prop, body, plate=True)


def _glass(stage: Stage) -> Color:
    return mix(GLASS, stage.light.haze, 0.25)


def _undercarriage(prop: Prop, half: float, axles: tuple[float, ...], radius: float) -> None:
    prop.box((-half + 0.12, half - 0.12), (0.12, 0.4), (axles[0] - 0.4, axles[-1] + 0.4), (40, 40, 46))
    for w in axles:
        for side in (-1, 1):
            u = sorted((side * half, side * (half - 0.22)))
            prop.box(tuple(u), (0, 2 * radius * 0.9), (w - radius * 0.9, w + radius * 0.9), TYRE)


def _wheels(prop: Prop, body: dict[str, Facet], half: float, axles: tuple[float, ...], radius: float) -> None:
    for side, name in ((-1, "left"), (1, "right")):
        if name in body:
            for w in axles:
                prop.wheel((side * (half + 0.01), radius, w), radius, TYRE, HUB)


def _lights(prop: Prop, body: dict[str, Facet], plate: bool = False, height: tuple[float, float] = (0.5, 0.78)) -> None:
    lit = prop.stage.light.lamps
    low, high = height
    for name, color in (("front", TAIL_LIGHT), ("back", HEAD_LIGHT)):
        if name in body:
            facet = body[name]
            facet.part(0, 0, 1, 0.22, shade((80, 84, 92), 0.8))
            if plate:
                facet.part(0.36, 0.24, 0.64, 0.42, (236, 232, 214))
                if name == "back":
                    facet.part(0.3, 0.46, 0.7, 0.66, (54, 58, 66))
            for s in (0.05, 0.77):
                facet.part(s, low, s + 0.18, high, color, glow=lit)
            if lit:
                _glare(prop, facet, (low + high) / 2, color)


def _glare(prop: Prop, facet: Facet, height: float, color: Color) -> None:
    """The light around a pair of lamps at night."""
    for s in (0.14, 0.86):
        for spot in facet.on_paper(((s, height),)):
            prop.stage.paper.glow(spot, (0.5 if color == TAIL_LIGHT else 0.8) * prop.pixels, color, 0.45)


def bus(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A city bus."""
    paint = stage.rng.choice(((214, 66, 58), (250, 186, 62), (64, 140, 120), (70, 124, 190)))
    prop = Prop(stage, BUS, x, z, yaw=yaw, thing=True)
    _long_vehicle(prop, paint, length=10.5, width=2.5, height=3.1, axles=(-3.2, 3.0))


def tram(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A tram; Cityscapes calls it a train."""
    paint = stage.rng.choice(((198, 44, 52), (46, 112, 82), (236, 196, 90), (60, 96, 150)))
    prop = Prop(stage, TRAM, x, z, yaw=yaw, thing=True)
    _long_vehicle(prop, paint, length=17, width=2.4, height=3.3, axles=(), skirt=0.12)
    for v in (-0.8, 0.8):
        prop.stick((0, 3.4, v), (0, 4.3, 0), 0.08, (60, 62, 70))
    prop.stick((-0.7, 4.3, 0), (0.7, 4.3, 0), 0.1, (60, 62, 70))


def _long_vehicle(prop: Prop, paint: Color, length, width, height, axles, skirt=0.3) -> None:
    half, end = width / 2, length / 2
    if axles:
        _undercarriage(prop, half, axles, 0.48)
    cream = (246, 240, 226)
    body = prop.box((-half, half), (skirt, height), (-end, end), cream, (0.06, 0.08, 0.08), shade(cream, 0.92))
    glass, lamps = _glass(prop.stage), prop.stage.light.lamps
    pane = (255, 222, 150) if lamps else glass
    for name, facet in body.items():
        if name in ("left", "right"):
            facet.part(0, 0, 1, 0.4, paint)
            facet.part(0, 0.9, 1, 1, paint)
            count = round(length / 1.7)
            facet.part(0.01, 0.46, 0.99, 0.84, shade(glass, 0.7))
            for i in range(count):
                a = 0.02 + 0.96 * i / count
                door = i % 3 == 1
                facet.part(a, 0.06 if door else 0.48, a + 0.86 / count, 0.82, pane, glow=lamps)
        elif name in ("front", "back"):
            facet.part(0, 0, 1, 0.4, paint)
            facet.part(0, 0.88, 1, 1, paint)
            facet.part(0.08, 0.44, 0.92, 0.82, shade(glass, 0.9))
            facet.polygon(((0.2, 0.44), (0.4, 0.44), (0.6, 0.82), (0.4, 0.82)), shade(glass, 1.1))
            facet.part(0.25, 0.89, 0.75, 0.97, (48, 44, 40))
            facet.part(0.3, 0.91, 0.7, 0.95, (255, 190, 80), glow=lamps)
    _lights(prop, body, height=(0.16, 0.28))
    _wheels(prop, body, half, axles, 0.48)


def truck(stage: Stage, x: float, z: float, yaw: float) -> None:
    """A lorry: a cab in front of a box with an emblem."""
    rng = stage.rng
    paint, load = rng.choice(PAINTS), rng.choice(((232, 228, 214), (250, 210, 120), (150, 190, 206), (214, 140, 110)))
    prop = Prop(stage, TRUCK, x, z, yaw=yaw, thing=True)
    _undercarriage(prop, 1.2, (-2.4, 2.6), 0.5)

    def cab() -> None:
        faces = prop.box((-1.15, 1.15), (0.4, 2.6), (2.0, 4.0), paint, lean=(0.06, 0, 0.25))
        for name, facet in faces.items():
            if name != "top":
                facet.part(0.12, 0.5, 0.88, 0.88, _glass(stage))
        _lights(prop, {k: v for k, v in faces.items() if k == "back"}, height=(0.14, 0.26))

    def box() -> None:
        faces = prop.box((-1.25, 1.25), (0.7, 3.4), (-4.0, 1.8), load, top=shade(load, 1.2))
        for name, facet in faces.items():
            if name in ("left", "right"):
                facet.part(0, 0.08, 1, 0.2, paint)
                facet.disc(0.5, 0.58, (0.13, 0.26), paint)
                facet.disc(0.5, 0.58, (0.08, 0.16), shade(load, 1.3))
            elif name == "front":
                facet.part(0.49, 0.04, 0.51, 0.98, shade(load, 0.75))
                facet.part(0.04, 0.06, 0.96, 0.16, paint)
                for s in (0.04, 0.82):
                    facet.part(s, 0.0, s + 0.14, 0.06, TAIL_LIGHT, glow=stage.light.lamps)
        _wheels(prop, faces, 1.2, (-2.4,), 0.5)

    toward = stage.camera.depth(prop.to_world((0, 1, 3.0))) < stage.camera.depth(prop.to_world((0, 1, -1.0)))
    for part in (box, cab) if toward else (cab, box):
        part()
    for side in (-1, 1):
        tip = prop.to_world((side * 1.2, 0.5, 2.6))
        middle = prop.to_world((0, 0.5, 2.6))
        if math.dist(tip, stage.camera.eye) < math.dist(middle, stage.camera.eye):
            prop.wheel((side * 1.21, 0.5, 2.6), 0.5, TYRE, HUB)


SIZES = {car: (1.8, 4.2, 1.4), bus: (2.5, 10.5, 3.0), truck: (2.5, 8.0, 3.0), tram: (2.4, 17.0, 3.0)}
"""Width, length and height in metres, for planning."""
