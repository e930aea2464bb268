"""People, bicycles and scooters, as paper cut-outs: u to the right, v up, turned by the yaw of their prop."""

from __future__ import annotations

import itertools

from m2f_lab.scenes.props import Prop, Stage
from m2f_lab.scenes.stage import Color, Point2, shade

PERSON, RIDER, MOTORCYCLE, BICYCLE = 24, 25, 32, 33
DYNAMIC = 5  # Cityscapes' void class for moving things of no other class

SKINS = ((255, 219, 186), (241, 194, 150), (204, 146, 104), (150, 98, 66), (102, 66, 46))
HAIRS = ((52, 38, 34), (98, 62, 40), (166, 110, 58), (226, 186, 104), (150, 150, 154), (146, 58, 36))
CLOTHES = (
    (214, 70, 70), (240, 150, 60), (246, 206, 90), (86, 156, 110), (64, 120, 180), (120, 96, 168), (226, 120, 150),
    (236, 232, 222), (62, 66, 82), (58, 128, 136),
)  # fmt: skip
TROUSERS = ((52, 62, 92), (78, 72, 70), (120, 104, 86), (44, 46, 54), (92, 112, 136), (148, 128, 104))


TYRE = (40, 40, 46)


def person(stage: Stage, x: float, z: float) -> None:
    """A person who walks or stands, sometimes with a bag, a balloon or a dog."""
    rng, child = stage.rng, stage.rng.random() < 0.16
    height, side = rng.uniform(1.05, 1.3) if child else rng.uniform(1.55, 1.9), rng.choice((-1, 1))
    if not child and rng.random() < 0.12:
        _dog(Prop(stage, DYNAMIC, x, z), side)
    prop = Prop(stage, PERSON, x, z, thing=True, scale=height / 1.7)
    _figure(prop, side)
    if child and rng.random() < 0.6:
        _balloon(prop.as_class(DYNAMIC), side * 0.3)


def _figure(prop: Prop, side: int) -> None:
    """A walking figure 1.7 units tall, facing left (-1) or right (1)."""
    rng = prop.rng
    skin, hair, top, legs = rng.choice(SKINS), rng.choice(HAIRS), rng.choice(CLOTHES), rng.choice(TROUSERS)
    style = rng.choice(("trousers", "trousers", "skirt", "coat"))
    stride, away = rng.uniform(0.05, 0.24) * side, rng.random() < 0.45
    for foot, color in ((-stride, shade(legs, 0.86)), (stride, legs)):
        prop.stick((foot * 0.25, 0.86, 0), (foot, 0.09, 0), 0.15, skin if style == "skirt" else color)
        prop.ball((foot + 0.04 * side, 0.05, 0), (0.1, 0.055), shade(legs, 0.55))
    prop.stick((-side * 0.17, 1.34, 0), (-side * 0.3, 0.9, 0), 0.1, shade(top, 0.82))
    if rng.random() < 0.3 and not away:
        _tapered(prop, -side * 0.33, (0.5, 0.82), (0.14, 0.11), rng.choice(CLOTHES))  # a bag
    prop.card(((-0.16, 0.8), (0.16, 0.8), (0.22, 1.3), (0.14, 1.42), (-0.14, 1.42), (-0.22, 1.3)), top)
    if style == "skirt":
        _tapered(prop, 0, (0.55, 0.95), (0.3, 0.16), rng.choice(CLOTHES))
    elif style == "coat":
        _tapered(prop, 0, (0.5, 0.95), (0.24, 0.16), top)
    if away and rng.random() < 0.5:
        _tapered(prop, 0, (0.92, 1.38), (0.17, 0.15), rng.choice(CLOTHES))  # a rucksack
    prop.stick((side * 0.19, 1.34, 0), (side * 0.3, 0.92, 0), 0.1, shade(top, 0.92))
    prop.ball((side * 0.31, 0.88, 0), 0.055, skin)
    _head(prop, (0, 1.56), skin, hair, away)


def _tapered(prop: Prop, u: float, v: tuple[float, float], half: tuple[float, float], color: Color) -> None:
    """A card from a low to a high edge, each with its half width."""
    (low, high), (a, b) = v, half
    prop.card(((u - a, low), (u + a, low), (u + b, high), (u - b, high)), color)


def _head(prop: Prop, center: tuple[float, float], skin: Color, hair: Color, away: bool) -> None:
    (u, v), rng = center, prop.rng
    if rng.random() < 0.4:  # long hair
        prop.ball((u, v - 0.05, 0), (0.15, 0.2), hair)
    prop.stick((u, v - 0.16, 0), (u, v - 0.08, 0), 0.08, shade(skin, 0.9))
    prop.ball((u, v + 0.03, 0), 0.135, hair)
    if not away:
        prop.ball((u, v - 0.015, 0), (0.108, 0.118), skin)
    if rng.random() < 0.22:
        hat = rng.choice(CLOTHES)
        prop.ball((u, v + 0.1, 0), (0.125, 0.085), hat)
        prop.ball((u, v + 0.06, 0), (0.17, 0.03), shade(hat, 0.85))


def _balloon(prop: Prop, hand: float) -> None:
    color = prop.rng.choice(CLOTHES[:7])
    prop.stick((hand, 0.95, 0), (hand + 0.1, 1.75, 0), 0.015, (120, 120, 120))
    prop.ball((hand + 0.1, 1.95, 0), (0.24, 0.29), color)
    prop.ball((hand + 0.04, 2.04, 0), (0.06, 0.08), shade(color, 1.5))


def _dog(prop: Prop, side: int) -> None:
    fur = prop.rng.choice(((150, 104, 62), (226, 210, 180), (60, 54, 52), (196, 140, 84)))
    u = side * 0.75
    for leg in (-0.22, -0.14, 0.14, 0.22):
        prop.stick((u + leg, 0.3, 0), (u + leg, 0.03, 0), 0.07, shade(fur, 0.85))
    prop.stick((u - 0.2, 0.38, 0), (u + 0.2, 0.38, 0), 0.22, fur)
    prop.stick((u - side * 0.28, 0.42, 0), (u - side * 0.4, 0.6, 0), 0.06, fur)
    prop.ball((u + side * 0.32, 0.52, 0), 0.12, fur)
    prop.ball((u + side * 0.43, 0.49, 0), (0.08, 0.06), shade(fur, 0.8))


def cyclist(stage: Stage, x: float, z: float, yaw: float, ridden: bool) -> None:
    """A bicycle from the side, ridden or parked."""
    bike = Prop(stage, BICYCLE, x, z, yaw=yaw, thing=True)
    color = stage.rng.choice(CLOTHES[:7])
    for u in (-0.52, 0.52):
        _disc(bike, (u, 0.36), 0.36, (44, 44, 50))
        _disc(bike, (u, 0.36), 0.285, (206, 210, 212))
        _disc(bike, (u, 0.36), 0.06, (70, 70, 76))
    frame = ((-0.52, 0.36), (-0.05, 0.34), (0.38, 0.82), (-0.2, 0.82), (-0.05, 0.34))
    for a, b in (*itertools.pairwise(frame), ((-0.52, 0.36), (-0.2, 0.82)), ((0.52, 0.36), (0.36, 0.98))):
        bike.stick((*a, 0), (*b, 0), 0.065, color)
    bike.stick((-0.32, 0.9, 0), (-0.12, 0.9, 0), 0.08, (60, 50, 46))
    bike.stick((0.36, 0.98, 0), (0.24, 1.02, 0), 0.06, (60, 60, 66))
    if ridden:
        _rider(bike.as_class(RIDER, thing=True), seat=(-0.2, 0.94), bars=(0.27, 1.02), pedal=(-0.02, 0.22))


def motorcyclist(stage: Stage, x: float, z: float, yaw: float, ridden: bool) -> None:
    """A scooter from the side, ridden or parked."""
    bike = Prop(stage, MOTORCYCLE, x, z, yaw=yaw, thing=True)
    color = stage.rng.choice(((120, 196, 186), (226, 92, 82), (244, 210, 130), (92, 120, 160), (236, 236, 230)))
    for u in (-0.55, 0.58):
        _disc(bike, (u, 0.27), 0.27, TYRE)
        _disc(bike, (u, 0.27), 0.13, (196, 200, 204))
    bike.card(((-0.95, 0.36), (-0.2, 0.28), (-0.1, 0.75), (-0.3, 0.86), (-0.85, 0.8)), color)
    bike.card(((-0.3, 0.24), (0.3, 0.24), (0.34, 0.36), (-0.3, 0.38)), shade(color, 0.8))
    bike.card(((0.26, 0.26), (0.4, 0.3), (0.62, 0.98), (0.5, 1.06)), color)
    _disc(bike, (0.58, 0.42), 0.2, shade(color, 0.9))
    bike.card(((-0.88, 0.8), (-0.1, 0.78), (-0.12, 0.9), (-0.85, 0.92)), (84, 60, 50))
    bike.stick((0.55, 1.04, 0), (0.36, 1.12, 0), 0.07, (60, 60, 66))
    bike.ball((0.66, 0.98, 0), 0.08, (255, 246, 208), glow=stage.light.lamps)
    if ridden:
        rider = bike.as_class(RIDER, thing=True)
        _rider(rider, seat=(-0.35, 0.98), bars=(0.38, 1.12), pedal=(0.05, 0.36), helmet=True)


def _disc(prop: Prop, center: tuple[float, float], radius: float, color: Color) -> None:
    prop.wheel((*center, 0), radius, color, color, across="w")


def _rider(prop: Prop, seat: Point2, bars: Point2, pedal: Point2, helmet: bool | None = None) -> None:
    """A rider on a seat who holds the bars; with a helmet, without one, or at random (None)."""
    rng = prop.rng
    skin, top, legs = rng.choice(SKINS), rng.choice(CLOTHES), rng.choice(TROUSERS)
    shoulder = (seat[0] + 0.22, seat[1] + 0.52)
    knee = ((seat[0] + pedal[0]) / 2 + 0.26, (seat[1] + pedal[1]) / 2 + 0.06)
    prop.stick((*seat, 0), (*knee, 0), 0.17, legs)
    prop.stick((*knee, 0), (*pedal, 0), 0.13, legs)
    prop.stick((*pedal, 0), (pedal[0] + 0.14, pedal[1] - 0.01, 0), 0.09, shade(legs, 0.6))
    prop.card(
        (
            (seat[0] - 0.14, seat[1] - 0.04), (seat[0] + 0.14, seat[1] - 0.02),
            (shoulder[0] + 0.12, shoulder[1] - 0.04),
            (shoulder[0] + 0.04, shoulder[1] + 0.08), (shoulder[0] - 0.13, shoulder[1] + 0.02),
        ),
        top,
    )  # fmt: skip
    prop.stick((*shoulder, 0), (*bars, 0), 0.1, shade(top, 0.85))
    prop.ball((*bars, 0), 0.055, skin)
    head = shoulder[0] + 0.1, shoulder[1] + 0.24
    _head(prop, head, skin, rng.choice(HAIRS), away=False)
    if helmet or (helmet is None and rng.random() < 0.6):
        color = rng.choice(CLOTHES)
        prop.ball((head[0] - 0.02, head[1] + 0.06, 0), (0.15, 0.11), color)
