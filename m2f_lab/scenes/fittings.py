"""Things that hang on a wall or from the ceiling, plants, and things that lie on the floor."""

from __future__ import annotations

import math

from m2f_lab.scenes.furniture import BOOK, COVERS, FABRICS, WOODS, books
from m2f_lab.scenes.props import Prop, Stage
from m2f_lab.scenes.stage import Color, mix, shade

WINDOW, DOOR, PLANT, CURTAIN, PAINTING, MIRROR, LAMP, BOX, FLOWER = 9, 15, 18, 19, 23, 28, 37, 42, 67
OTHER, SHELF, CHANDELIER, BASKET, BALL, POT = 0, 25, 86, 113, 120, 126
ANIMAL, VASE, RADIATOR, CLOCK = 127, 136, 147, 149

GREENS = ((82, 138, 84), (62, 118, 82), (112, 156, 92), (92, 146, 112))
WARM = (255, 224, 158)
SILL = 0.85  # metres above the floor


def window(
    stage: Stage, x: float, z: float, yaw: float, size: tuple[float, float], view: tuple[Color, Color, Color]
) -> None:
    """A window with the sky, hills and a tree behind it.

    Args:
        size: width and height in metres
        view: the colours of the upper sky, the lower sky and the land
    """
    rng, (width, height) = stage.rng, size
    prop = Prop(stage, WINDOW, x, z, y=SILL, yaw=yaw, thing=True)
    half, frame = width / 2, rng.choice(((248, 246, 240), (236, 228, 214), (150, 104, 74)))
    outer = prop.face(((-half, 0, -0.02), (half, 0, -0.02), (half, height, -0.02), (-half, height, -0.02)), frame)
    if outer is None:
        return
    upper, lower, land = view
    cloud = mix(upper, (255, 255, 255), 0.7 if sum(upper) > 250 else 0.12)
    for i in range(6):
        outer.part(0.05, 0.06 + 0.88 * i / 6, 0.95, 0.06 + 0.88 * (i + 1) / 6, mix(lower, upper, i / 5), glow=True)
    for _ in range(2):
        s, t = rng.uniform(0.2, 0.7), rng.uniform(0.6, 0.85)
        for k in (0, 0.07, 0.14):
            outer.disc(s + k, t, (0.07, 0.04), cloud, glow=True)
    hill = [(0.05, 0.06), (0.95, 0.06)]
    phase = rng.uniform(0, 6)
    hill += [(0.95 - 0.09 * i, 0.3 + 0.06 * math.sin(phase + 0.7 * i)) for i in range(11)]
    outer.polygon(hill, land, glow=True)
    if rng.random() < 0.6:
        s = rng.uniform(0.2, 0.8)
        outer.part(s - 0.012, 0.06, s + 0.012, 0.4, shade(land, 0.5), glow=True)
        outer.disc(s, 0.45, (0.11, 0.13 * width / height), shade(land, 0.75), glow=True)
    bars = 3 if width > 1.5 else 2
    for i in range(1, bars):
        outer.part(i / bars - 0.016, 0.05, i / bars + 0.016, 0.95, frame)
    outer.part(0.05, 0.64, 0.95, 0.67, frame)
    prop.box((-half - 0.06, half + 0.06), (-0.06, 0), (-0.14, 0), shade(frame, 0.96), top=shade(frame, 1.2))


def curtains(stage: Stage, x: float, z: float, yaw: float, width: float, color: Color) -> None:
    """Two curtains with folds beside a window of some width."""
    for side in (-1, 1):
        prop = Prop(stage, CURTAIN, x, z, yaw=yaw, thing=True)
        inner, outer = side * (width / 2 - 0.12), side * (width / 2 + 0.34)
        folds = 7
        for i in range(folds):
            a, b = (inner + (outer - inner) * k / folds for k in (i, i + 1))
            a, b = min(a, b), max(a, b)
            tone = shade(color, (0.86, 1.0, 1.1)[i % 3])
            prop.card(((a, 0.03), (b, 0.03), (b, 2.36), (a, 2.36)), tone, w=-0.1)
    end = width / 2 + 0.45
    prop.stick((-end, 2.38, -0.1), (end, 2.38, -0.1), 0.045, (92, 76, 66))


def door(stage: Stage, x: float, z: float, yaw: float) -> None:
    prop, rng = Prop(stage, DOOR, x, z, yaw=yaw, thing=True), stage.rng
    wood = rng.choice((*WOODS, (120, 150, 150), (170, 90, 76)))
    frame = prop.face(((-0.5, 0, -0.01), (0.5, 0, -0.01), (0.5, 2.12, -0.01), (-0.5, 2.12, -0.01)), shade(wood, 1.3))
    if frame is None:
        return
    frame.part(0.08, 0, 0.92, 0.96, wood)
    for low, high in ((0.08, 0.42), (0.5, 0.9)):
        for a, b in ((0.16, 0.46), (0.54, 0.84)):
            frame.part(a, low, b, high, shade(wood, 0.82))
            frame.part(a + 0.02, low + 0.01, b - 0.02, high - 0.015, shade(wood, 0.94))
    frame.disc(0.85, 0.46, (0.035, 0.017), (226, 196, 120))


def painting(stage: Stage, x: float, z: float, yaw: float, y: float, size: tuple[float, float]) -> None:
    """A framed picture: a landscape, a still life of circles, stripes, or a boat."""
    rng, (width, height) = stage.rng, size
    prop = Prop(stage, PAINTING, x, z, y=y, yaw=yaw, thing=True)
    half = width / 2
    frame = rng.choice(((60, 52, 50), (222, 186, 110), (244, 240, 232), (150, 98, 66)))
    face = prop.face(((-half, 0, -0.03), (half, 0, -0.03), (half, height, -0.03), (-half, height, -0.03)), frame)
    if face is None:
        return
    face.part(0.06, 0.06, 0.94, 0.94, (246, 242, 230))
    left, low, right, high = 0.14, 0.14, 0.86, 0.86
    kind = rng.choice(("landscape", "circles", "stripes", "boat"))
    a, b, c = rng.sample(COVERS, 3)
    face.part(left, low, right, high, shade(a, 1.5))
    if kind == "landscape":
        face.disc(rng.uniform(0.35, 0.7), 0.66, (0.1, 0.1 * width / height), c)
        face.polygon(((left, low), (right, low), (right, 0.45), (0.65, 0.58), (0.4, 0.4), (left, 0.5)), shade(b, 0.95))
        face.polygon(((left, low), (right, low), (right, 0.3), (0.5, 0.36), (left, 0.26)), shade(b, 0.7))
    elif kind == "circles":
        for color, r in ((b, 0.2), (c, 0.15), (a, 0.09)):
            face.disc(rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64), (r, r * width / height), color)
    elif kind == "stripes":
        for i, color in enumerate((b, c, a, b)):
            s = left + 0.02 + 0.175 * i
            face.part(s, low, s + 0.1, rng.uniform(0.4, high), color)
    else:
        face.part(left, low, right, 0.38, shade(b, 0.9))
        face.polygon(((0.3, 0.34), (0.36, 0.26), (0.62, 0.26), (0.7, 0.34)), (120, 70, 50))
        face.polygon(((0.5, 0.36), (0.68, 0.36), (0.5, 0.74)), (250, 248, 240))
        face.polygon(((0.34, 0.36), (0.48, 0.36), (0.48, 0.66)), c)


def mirror(stage: Stage, x: float, z: float, yaw: float, y: float) -> None:
    prop = Prop(stage, MIRROR, x, z, y=y, yaw=yaw, thing=True)
    frame = stage.rng.choice(((222, 186, 110), (250, 248, 244), (120, 80, 60)))
    for rx, ry, color in ((0.36, 0.5, frame), (0.31, 0.45, (196, 214, 222))):
        turn = [2 * math.pi * i / 24 for i in range(24)]
        face = prop.face([(rx * math.cos(a), 0.5 + ry * math.sin(a), -0.03) for a in turn], color)
    if face:
        for shift in (-0.12, 0.05):
            shine = ((shift - 0.1, 0.25), (shift - 0.02, 0.25), (shift + 0.14, 0.75), (shift + 0.06, 0.75))
            prop.card(shine, (226, 238, 242), w=-0.035)


def clock(stage: Stage, x: float, z: float, yaw: float, y: float) -> None:
    prop, rng = Prop(stage, CLOCK, x, z, y=y, yaw=yaw, thing=True), stage.rng
    for r, color in ((0.24, rng.choice(COVERS)), (0.19, (250, 248, 242))):
        turn = [2 * math.pi * i / 20 for i in range(20)]
        prop.face([(r * math.cos(a), r * math.sin(a), -0.04) for a in turn], color)
    for angle, length in ((rng.uniform(0, 6.28), 0.15), (rng.uniform(0, 6.28), 0.1)):
        prop.stick((0, 0, -0.05), (length * math.cos(angle), length * math.sin(angle), -0.05), 0.025, (50, 50, 56))


def shelf(stage: Stage, x: float, z: float, yaw: float, y: float, width: float) -> None:
    """A board on the wall with books and a plant on it."""
    prop, rng = Prop(stage, SHELF, x, z, y=y, yaw=yaw, thing=True), stage.rng
    wood, half = rng.choice(WOODS), width / 2
    spines = prop.plane(((-half, 0.03, -0.2), (half, 0.03, -0.2), (half, 0.36, -0.2), (-half, 0.36, -0.2)))
    books(spines, prop.as_class(BOOK, thing=True), (0.0, 0.0, rng.uniform(0.5, 0.75), 0.95), width)
    small_plant(prop.at(half - 0.15, 0.03, -0.12))
    prop.box((-half, half), (0, 0.04), (-0.25, 0), wood, top=shade(wood, 1.1))


def radiator(stage: Stage, x: float, z: float, yaw: float, width: float) -> None:
    prop = Prop(stage, RADIATOR, x, z, yaw=yaw, thing=True)
    faces = prop.box((-width / 2, width / 2), (0.14, 0.66), (-0.12, -0.02), (238, 236, 230))
    if "front" in faces:
        count = round(width / 0.09)
        for i in range(count):
            faces["front"].part((i + 0.1) / count, 0.06, (i + 0.45) / count, 0.94, (206, 204, 200))


# ---- lamps ----


def lampshade(prop: Prop, v: float, r: float, height: float, color: Color) -> None:
    lit = prop.stage.light.lamps
    tone = WARM if lit else color
    prop.card(((-r, v), (r, v), (r * 0.66, v + height), (-r * 0.66, v + height)), tone, glow=lit)
    prop.card(((-r, v), (-r * 0.3, v), (-r * 0.2, v + height), (-r * 0.66, v + height)), shade(tone, 0.93), glow=lit)
    if lit:
        prop.halo((0, v + height / 2, 0), 3.5 * r, (255, 206, 130), 0.4)


def floor_lamp(stage: Stage, x: float, z: float) -> None:
    prop = Prop(stage, LAMP, x, z, thing=True)
    prop.ball((0, 0.03, 0), (0.17, 0.04), (70, 66, 66))
    prop.stick((0, 0.03, 0), (0, 1.35, 0), 0.04, (90, 84, 80))
    lampshade(prop, 1.3, 0.27, 0.38, stage.rng.choice(FABRICS))


def table_lamp(place: Prop) -> None:
    prop = place.as_class(LAMP, thing=True)
    color = prop.rng.choice(FABRICS)
    prop.ball((0, 0.1, 0), (0.085, 0.1), color)
    prop.stick((0, 0.15, 0), (0, 0.28, 0), 0.03, (120, 110, 100))
    lampshade(prop, 0.24, 0.17, 0.22, (244, 232, 206))


def pendant(stage: Stage, x: float, z: float, ceiling: float, drop: float) -> None:
    """A lamp that hangs from the ceiling."""
    grand, lit = stage.rng.random() < 0.4, stage.light.lamps
    prop = Prop(stage, CHANDELIER if grand else LAMP, x, z, thing=True)
    v = ceiling - drop
    prop.stick((0, v + 0.2, 0), (0, ceiling, 0), 0.025, (70, 66, 66))
    if grand:
        for u in (-0.36, -0.18, 0, 0.18, 0.36):
            rise = 0.1 * abs(u)
            prop.stick((0, v + 0.05, 0), (u, v - 0.02 + rise, 0), 0.03, (196, 160, 92))
            prop.ball((u, v + 0.06 + rise, 0), (0.055, 0.08), WARM if lit else (250, 246, 232), glow=lit)
        if lit:
            prop.halo((0, v, 0), 1.3, (255, 206, 130), 0.4)
    else:
        lampshade(prop, v, 0.3, 0.24, stage.rng.choice(FABRICS))


# ---- plants and small things ----


def plant(stage: Stage, x: float, z: float, height: float) -> None:
    """A plant in a pot on the floor."""
    rng = stage.rng
    pot = Prop(stage, POT, x, z, thing=True)
    clay, r = rng.choice(((196, 116, 84), (236, 232, 224), (92, 122, 140), (226, 184, 110))), 0.17 + 0.04 * height
    leafs = Prop(stage, PLANT, x, z)
    green, kind = rng.choice(GREENS), rng.choice(("leaves", "swords", "palm"))
    base = 0.34
    if kind == "leaves":
        for i in range(15):
            a, reach = rng.uniform(0.25, 2.9), rng.uniform(0.4, 1.0)
            tip = 0.4 * height * math.cos(a) * reach, base + (height - base) * (0.25 + 0.75 * math.sin(a) * reach)
            leafs.stick((0, base, 0), (*tip, 0), 0.025, shade(green, 0.7))
            leafs.ball((*tip, 0), (0.14 * height, 0.1 * height), shade(green, 0.85 + 0.3 * i / 15))
    elif kind == "swords":
        for i in range(9):
            u = (i - 4) * 0.05
            tip, high = u * 2.6 + rng.uniform(-0.05, 0.05), base + (height - base) * rng.uniform(0.6, 1.0)
            foot = (u - 0.05, base - 0.05), (u + 0.05, base - 0.05)
            blade = (tip + 0.03, high * 0.75), (tip, high), (tip - 0.04, high * 0.7)
            leafs.card((*foot, *blade), shade(green, 0.8 + 0.06 * i))
    else:
        leafs.stick((0, base - 0.1, 0), (0, height * 0.68, 0), 0.06, (140, 108, 78))
        for i in range(11):
            a = -0.35 + (math.pi + 0.7) * i / 10
            middle = 0.28 * height * math.cos(a), height * 0.7 + 0.24 * height * math.sin(a)
            end = 0.46 * height * math.cos(a), height * 0.7 + (0.3 * math.sin(a) - 0.1) * height
            color = shade(green, 0.86 + 0.028 * i)
            leafs.stick((0, height * 0.68, 0), (*middle, 0), 0.05 * height, color)
            leafs.stick((*middle, 0), (*end, 0), 0.035 * height, color)
    pot.ball((0, 0.05, 0), (r * 0.72, 0.05), shade(clay, 0.8))
    pot.card(((-r * 0.72, 0.05), (r * 0.72, 0.05), (r, base), (-r, base)), clay)
    pot.card(((-r * 0.72, 0.05), (-r * 0.3, 0.05), (-r * 0.42, base), (-r, base)), shade(clay, 0.85))
    pot.card(((-r * 1.1, base - 0.07), (r * 1.1, base - 0.07), (r * 1.1, base), (-r * 1.1, base)), shade(clay, 1.12))


def small_plant(place: Prop) -> None:
    """A small pot plant, for a table or a shelf."""
    pot, leafs, rng = place.as_class(POT, thing=True), place.as_class(PLANT), place.rng
    green = rng.choice(GREENS)
    for i in range(7):
        a = math.pi * (i + 0.5) / 7
        leafs.ball((0.13 * math.cos(a), 0.18 + 0.1 * math.sin(a), 0), 0.066, shade(green, rng.uniform(0.8, 1.2)))
    pot.card(((-0.065, 0), (0.065, 0), (0.08, 0.15), (-0.08, 0.15)), rng.choice(FABRICS))


def vase(place: Prop) -> None:
    """A vase with flowers."""
    jar, flowers, rng = place.as_class(VASE, thing=True), place.as_class(FLOWER, thing=True), place.rng
    color, petals = rng.choice(FABRICS), rng.choice(((240, 120, 140), (250, 206, 90), (246, 244, 240), (190, 130, 210)))
    for u in (-0.12, -0.05, 0.03, 0.1, 0.0):
        top = 0.42 + 0.1 * rng.random() - abs(u)
        flowers.stick((0, 0.2, 0), (u, top, 0), 0.018, (86, 132, 82))
        flowers.ball((u, top, 0), 0.06, petals)
        flowers.ball((u, top, 0), 0.022, (250, 226, 130))
    jar.ball((0, 0.1, 0), (0.085, 0.1), color)
    jar.card(((-0.04, 0.15), (0.04, 0.15), (0.055, 0.26), (-0.055, 0.26)), color)
    jar.ball((-0.03, 0.13, 0), (0.018, 0.04), shade(color, 1.5))


def cat(place: Prop) -> None:
    """A cat, curled up asleep."""
    prop = place.as_class(ANIMAL, thing=True)
    fur = prop.rng.choice(((224, 146, 72), (78, 74, 78), (236, 228, 214), (160, 150, 144)))
    side = prop.rng.choice((-1, 1))
    prop.ball((0, 0.12, 0), (0.27, 0.13), fur)
    for stripe in (-0.1, 0.0, 0.1):
        prop.stick((stripe, 0.2, 0), (stripe * 1.2 - side * 0.02, 0.13, 0), 0.03, shade(fur, 0.8))
    u = side * 0.19
    for ear in (-0.06, 0.06):
        prop.card(((u + ear - 0.045, 0.18), (u + ear + 0.045, 0.18), (u + ear * 1.3, 0.29)), shade(fur, 0.82))
    prop.ball((u, 0.14, 0), (0.11, 0.095), shade(fur, 1.12))
    for eye in (-0.045, 0.045):
        prop.stick((u + eye - 0.016, 0.15, 0), (u + eye + 0.016, 0.15, 0), 0.014, (60, 46, 44))
    prop.ball((u, 0.12, 0), 0.015, (226, 130, 120))
    prop.stick((-side * 0.22, 0.05, 0), (side * 0.08, 0.035, 0), 0.07, shade(fur, 0.84))


def sleeping_cat(stage: Stage, x: float, z: float) -> None:
    """A cat on the floor."""
    cat(Prop(stage, OTHER, x, z))


def guitar(stage: Stage, x: float, z: float) -> None:
    """A guitar: "other", since none of ADE20K's 150 classes fits."""
    prop = Prop(stage, OTHER, x, z)
    wood = stage.rng.choice(((206, 132, 66), (176, 84, 52), (230, 186, 120)))
    prop.stick((0, 0.4, 0), (0.1, 1.02, 0), 0.06, (86, 58, 46))
    prop.ball((0.1, 1.06, 0), (0.05, 0.08), (66, 46, 40))
    prop.ball((-0.02, 0.2, 0), (0.21, 0.2), wood)
    prop.ball((0.01, 0.44, 0), (0.16, 0.15), wood)
    prop.ball((0.0, 0.34, 0), 0.065, (60, 40, 34))


def clutter(stage: Stage, x: float, z: float) -> None:
    """A basket, a ball, a box or a suitcase ("other" in ADE20K) on the floor."""
    rng = stage.rng
    kind = rng.choice((BASKET, BALL, BOX, OTHER))
    prop = Prop(stage, kind, x, z, yaw=rng.uniform(-0.6, 0.6), thing=kind != OTHER)
    if kind == BASKET:
        straw = (206, 164, 108)
        faces = prop.box((-0.24, 0.24), (0, 0.36), (-0.2, 0.2), straw, lean=(-0.05, -0.05, -0.05), top=(120, 92, 64))
        for facet in (f for n, f in faces.items() if n != "top"):
            for t in (0.2, 0.5, 0.8):
                facet.part(0, t, 1, t + 0.1, shade(straw, 0.84))
    elif kind == BALL:
        color = rng.choice(FABRICS)
        prop.ball((0, 0.17, 0), 0.17, color)
        prop.ball((-0.05, 0.22, 0), (0.09, 0.08), shade(color, 1.25))
    elif kind == BOX:
        faces = prop.box((-0.26, 0.26), (0, 0.36), (-0.2, 0.2), (196, 152, 104), top=(216, 176, 128))
        if "front" in faces:
            faces["front"].part(0.44, 0, 0.56, 1, (226, 196, 150))
    else:
        color = rng.choice(FABRICS)
        faces = prop.box((-0.32, 0.32), (0.03, 0.46), (-0.1, 0.1), color, (0.02, 0.01, 0.01), shade(color, 1.15))
        for facet in (f for n, f in faces.items() if n in ("front", "top")):
            for s in (0.16, 0.76):
                facet.part(s, 0, s + 0.08, 1, (96, 66, 48))
        prop.stick((-0.08, 0.5, 0), (0.08, 0.5, 0), 0.035, (96, 66, 48))
