"""Things along a street: trees, hedges, walls, fences, lamps, traffic lights, signs and benches."""

from __future__ import annotations

import math

from m2f_lab.scenes.props import Prop, Stage
from m2f_lab.scenes.stage import Color, mix, shade

WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION = 12, 13, 17, 19, 20, 21
STATIC = 4  # Cityscapes' void class for bins, benches and the like

LEAVES = {
    "spring": ((126, 174, 84), (98, 156, 82), (150, 186, 92), (108, 164, 98)),
    "summer": ((74, 132, 66), (58, 116, 62), (92, 146, 72), (84, 128, 58)),
    "autumn": ((196, 130, 50), (206, 98, 48), (170, 142, 58), (120, 136, 60)),
}
GRASS = {"spring": (146, 180, 96), "summer": (132, 166, 84), "autumn": (172, 160, 92)}


def along_street(stage: Stage, class_id: int, side: int, x: float, z0: float, z1: float, thing=False) -> Prop:
    """A prop that faces the street: u runs along the street, w away from it; the origin is one end."""
    return Prop(stage, class_id, side * x, z0 if side < 0 else z1, yaw=side * math.pi / 2, thing=thing)


def tree(stage: Stage, x: float, z: float, leaves: tuple[Color, ...], height: float, kind: str | None = None) -> None:
    """A tree: round, tall or a conifer; light from one side."""
    rng = stage.rng
    prop = Prop(stage, VEGETATION, x, z)
    color = rng.choice(leaves)
    kind = kind or rng.choice(("round", "round", "round", "tall", "conifer"))
    bark = rng.choice(((104, 80, 62), (92, 72, 60), (126, 104, 84)))
    prop.stick((0, 0, 0), (0, height * 0.5, 0), height * 0.055, bark)
    sun = math.copysign(1, stage.light.direction[0])
    if kind == "conifer":
        green = mix(color, (52, 96, 76), 0.7)
        for i in range(4):
            low, wide = height * (0.16 + 0.2 * i), height * (0.25 - 0.05 * i)
            tip = low + height * 0.32
            prop.card(((-wide, low), (wide, low), (0, tip)), shade(green, 0.92 + 0.06 * i))
            prop.card(((sun * wide * 0.2, low), (sun * wide, low), (0, tip)), shade(green, 1.08 + 0.05 * i))
        return
    if kind == "tall":
        center, spread = height * 0.58, (height * 0.15, height * 0.42)
    else:
        prop.stick((0, height * 0.35, 0), (height * 0.13, height * 0.6, 0), height * 0.03, bark)
        center, spread = height * 0.68, (height * 0.27, height * 0.25)
    blobs = [(0.0, 0.0, 1.0)]
    blobs += [
        (math.cos(a) * rng.uniform(0.45, 0.7), math.sin(a) * rng.uniform(0.45, 0.7), rng.uniform(0.45, 0.62))
        for a in (2 * math.pi * (i + rng.random()) / 7 for i in range(7))
    ]
    distant = prop.pixels * height < 50
    for tone, shift, size in ((0.8, 0.0, 1.0), (1.0, 0.1, 0.86), (1.14, 0.26, 0.5)):
        for u, v, r in blobs[:: 3 if distant else 1]:
            dx, dy = shift * sun * spread[0], shift * 0.9 * spread[1]
            radii = spread[0] * r * size, spread[1] * r * size
            prop.ball((u * spread[0] + dx, center + v * spread[1] + dy, 0), radii, shade(color, tone))
    for _ in range(9 if prop.pixels > 14 else 0):
        a, r = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 0.85)
        spot = rng.uniform(0.05, 0.1)
        at = math.cos(a) * r * spread[0], center + math.sin(a) * r * spread[1], 0
        prop.ball(at, (spot * spread[0] * 1.6, spot * spread[1]), shade(color, 1.28 if at[0] * sun > 0 else 0.72))


def hedge(stage: Stage, side: int, x: float, z0: float, z1: float, color: Color) -> None:
    """A clipped hedge along the street."""
    height = stage.rng.uniform(1.0, 1.7)
    prop = along_street(stage, VEGETATION, side, x, z0, z1)
    prop.depth = max(1.0, (z0 + z1) / 2)
    faces = prop.box((0, z1 - z0), (0, height), (0, 0.9), color, top=shade(color, 1.15))
    if "front" in faces:
        for _ in range(round(4 * (z1 - z0)) if z0 < 40 else 0):
            u, v = stage.rng.uniform(0.3, z1 - z0 - 0.3), stage.rng.uniform(0.1, 0.85) * height
            prop.ball((u, v, 0), (0.2, 0.14), shade(color, stage.rng.choice((0.86, 1.12))))


def wall(stage: Stage, side: int, x: float, z0: float, z1: float) -> None:
    """A garden wall of brick or concrete."""
    rng = stage.rng
    brick = rng.random() < 0.6
    color = rng.choice(((176, 104, 84), (164, 96, 84))) if brick else rng.choice(((186, 178, 166), (170, 170, 172)))
    height = rng.uniform(1.5, 2.4)
    prop = along_street(stage, WALL, side, x, z0, z1)
    prop.depth = max(1.0, (z0 + z1) / 2)
    faces = prop.box((0, z1 - z0), (0, height), (0, 0.4), color)
    if "front" in faces:
        rows = 7 if brick else 2
        for row in range(rows if prop.stage.camera.pixels_per_metre(z0) > 10 else 0):
            faces["front"].part(0, row / rows, 1, row / rows + 0.025, shade(color, 0.82))
            count = round((z1 - z0) / (0.8 if brick else 3))
            for i in range(count):
                s = (i + (row % 2) / 2) / count
                faces["front"].part(s, row / rows, s + 0.06 / (z1 - z0), (row + 1) / rows, shade(color, 0.82))
    prop.box((-0.1, z1 - z0 + 0.1), (height, height + 0.15), (-0.1, 0.5), shade(color, 1.2))


def fence(stage: Stage, side: int, x: float, z0: float, z1: float) -> None:
    """A picket fence or a railing: so close that it hides everything behind."""
    rng = stage.rng
    color = rng.choice(((240, 236, 224), (150, 108, 76), (92, 108, 100), (196, 170, 130)))
    height = rng.uniform(1.0, 1.4)
    prop = along_street(stage, FENCE, side, x, z0, z1)
    prop.depth = max(1.0, (z0 + z1) / 2)
    length = z1 - z0
    panel = prop.face(
        ((0, 0, 0), (length, 0, 0), (length, height * 0.86, 0), (0, height * 0.86, 0)), shade(color, 0.72)
    )
    if panel:
        board = 0.32
        count = round(length / board)
        for i in range(count):
            s = i / count
            tip, right = 1.12, s + 0.7 / count
            panel.polygon(
                ((s, 0.04), (right, 0.04), (right, tip - 0.08), ((s + right) / 2, tip), (s, tip - 0.08)), color
            )
        for t in (0.25, 0.7):
            panel.part(0, t, 1, t + 0.08, shade(color, 0.86))


STEEL = (96, 102, 110)


def lamp_post(stage: Stage, x: float, z: float) -> None:
    """A street lamp that leans over the road."""
    prop = Prop(stage, POLE, x, z)
    arm = -math.copysign(1.6, x)
    prop.stick((0, 0, 0), (0, 6.2, 0), 0.17, STEEL)
    prop.stick((0, 6.2, 0), (arm, 6.7, 0), 0.12, STEEL)
    prop.stick((0, 0, 0), (0, 1.0, 0), 0.26, shade(STEEL, 0.8))
    lit = stage.light.lamps
    prop.ball((arm, 6.62, 0), (0.42, 0.16), (255, 236, 176) if lit else (220, 222, 220), glow=lit)
    if lit and prop.depth < 35:
        prop.halo((arm, 6.6, 0), 3.2, (255, 214, 140), 0.75)


def traffic_light(stage: Stage, x: float, z: float) -> None:
    """Three lamps in a dark case on a pole; one is lit."""
    pole = Prop(stage, POLE, x, z)
    pole.stick((0, 0, 0), (0, 3.0, 0), 0.16, STEEL)
    case = pole.as_class(TRAFFIC_LIGHT, thing=False)
    low, high, half = 2.35, 3.75, 0.27
    case.card(((-half, low), (half, low), (half, high), (-half, high)), (44, 46, 52))
    case.card(
        (
            (-half * 0.82, low + 0.05),
            (half * 0.82, low + 0.05),
            (half * 0.82, high - 0.05),
            (-half * 0.82, high - 0.05),
        ),
        (64, 68, 74),
    )
    lit = stage.rng.randrange(3)
    for i, color in enumerate(((70, 214, 110), (255, 196, 62), (240, 66, 54))):
        case.ball((0, low + 0.26 + 0.44 * i, 0), 0.17, color if i == lit else shade(color, 0.32), glow=i == lit)


def traffic_sign(stage: Stage, x: float, z: float) -> None:
    """A sign on a pole, as in the Vienna convention."""
    rng = stage.rng
    pole = Prop(stage, POLE, x, z)
    pole.stick((0, 0, 0), (0, 2.9, 0), 0.12, STEEL)
    sign, red, white, blue = pole.as_class(TRAFFIC_SIGN), (206, 48, 44), (246, 246, 242), (44, 96, 176)
    kind, v = rng.choice(("speed", "yield", "stop", "ahead", "parking", "priority", "way")), 2.75
    r = 0.45
    if kind == "speed":
        sign.ball((0, v, 0), r, red)
        sign.ball((0, v, 0), r * 0.72, white)
        for u in (-0.1, 0.11):
            sign.ball((u, v, 0), (0.09, 0.15), (40, 40, 44))
            sign.ball((u, v, 0), (0.04, 0.09), white)
    elif kind == "ahead":
        sign.ball((0, v, 0), r, blue)
        sign.card(((-0.07, v - 0.28), (0.07, v - 0.28), (0.07, v + 0.05), (-0.07, v + 0.05)), white)
        sign.card(((-0.22, v + 0.02), (0.22, v + 0.02), (0, v + 0.3)), white)
    elif kind == "yield":
        for k, color in ((1.15, red), (0.68, white)):
            sign.card([(u * k, v + 0.08 + w * k) for u, w in ((-r, 0.3), (0, -0.5), (r, 0.3))], color)
    elif kind == "stop":
        for k, color in ((1.1, white), (0.98, red)):
            turn = [math.pi / 8 + i * math.pi / 4 for i in range(8)]
            sign.card([(r * k * math.cos(a), v + r * k * math.sin(a)) for a in turn], color)
        sign.card(((-0.3, v - 0.08), (0.3, v - 0.08), (0.3, v + 0.08), (-0.3, v + 0.08)), white)
    elif kind == "priority":
        for k, color in ((1.1, white), (0.85, (250, 200, 60))):
            sign.card([(u * r * k, v + w * r * k) for u, w in ((-1, 0), (0, -1), (1, 0), (0, 1))], color)
    else:
        wide = 0.42 if kind == "parking" else 0.9
        sign.card(((-wide, v - 0.4), (wide, v - 0.4), (wide, v + 0.4), (-wide, v + 0.4)), white)
        inner = [(-wide + 0.05, v - 0.35), (wide - 0.05, v - 0.35), (wide - 0.05, v + 0.35), (-wide + 0.05, v + 0.35)]
        sign.card(inner, blue if kind == "parking" else (250, 208, 74))
        ink = white if kind == "parking" else (46, 46, 50)
        if kind == "parking":
            sign.card(((-0.14, v - 0.24), (-0.05, v - 0.24), (-0.05, v + 0.24), (-0.14, v + 0.24)), ink)
            sign.ball((0.02, v + 0.1, 0), (0.14, 0.14), ink)
        else:
            for w in (-0.14, 0.1):
                sign.card(((-0.6, v + w), (0.5, v + w), (0.5, v + w + 0.1), (-0.6, v + w + 0.1)), ink)


def street_furniture(stage: Stage, x: float, z: float) -> None:
    """A bin, a bench, a pillar box or a planter."""
    prop, rng = Prop(stage, STATIC, x, z), stage.rng
    kind = rng.choice(("bin", "bench", "box", "planter"))
    if kind == "bin":
        color = rng.choice(((70, 110, 90), (90, 94, 104), (214, 120, 56)))
        prop.box((-0.3, 0.3), (0, 0.95), (-0.3, 0.3), color, lean=(-0.04, -0.04, -0.04))
        prop.box((-0.36, 0.36), (0.95, 1.05), (-0.36, 0.36), shade(color, 0.7))
    elif kind == "bench":
        wood = (166, 118, 78)
        for u in (-0.7, 0.7):
            prop.box((u - 0.05, u + 0.05), (0, 0.45), (-0.2, 0.25), (70, 74, 80))
        prop.box((-0.9, 0.9), (0.42, 0.5), (-0.25, 0.3), wood, top=shade(wood, 1.15))
        prop.box((-0.9, 0.9), (0.55, 0.95), (0.25, 0.32), wood)
    elif kind == "box":
        prop.box((-0.28, 0.28), (0.1, 1.4), (-0.25, 0.25), (226, 176, 52), top=(240, 200, 92))
        prop.card(((-0.18, 1.05), (0.18, 1.05), (0.18, 1.13), (-0.18, 1.13)), (70, 60, 40), w=-0.26)
    else:
        prop.box((-0.6, 0.6), (0, 0.5), (-0.4, 0.4), (176, 116, 88), lean=(-0.06, -0.06, -0.06))
        green = prop.as_class(VEGETATION)
        for u in (-0.45, -0.15, 0.15, 0.45):
            green.ball((u, 0.68, 0), 0.28, shade((96, 146, 78), rng.uniform(0.9, 1.15)))
        for _ in range(7):
            green.ball(
                (rng.uniform(-0.6, 0.6), rng.uniform(0.6, 0.95), 0), 0.07, rng.choice(((240, 120, 130), (250, 210, 90)))
            )
