"""Houses along a street: storeys of windows, doors or shops, flat and pitched roofs."""

from __future__ import annotations

from m2f_lab.scenes.props import Facet, Prop, Stage
from m2f_lab.scenes.scenery import along_street
from m2f_lab.scenes.stage import Color, mix, shade

BUILDING = 11

PLASTER = (
    (236, 200, 152), (226, 164, 132), (240, 222, 188), (196, 120, 100), (214, 190, 166), (188, 202, 196),
    (232, 186, 176), (206, 172, 118), (170, 150, 140), (222, 212, 202),
)  # fmt: skip
ROOFS = ((168, 84, 66), (146, 74, 62), (104, 84, 84), (126, 98, 82), (92, 96, 108))
LIT, UNLIT = (255, 214, 132), (96, 116, 136)


def building(stage: Stage, side: int, x: float, z0: float, z1: float, storeys: int, modern: bool) -> None:
    """A house whose front is x metres beside the middle of the street, from z0 to z1."""
    rng = stage.rng
    prop = along_street(stage, BUILDING, side, x, z0, z1)
    prop.depth = max(1.0, (z0 + z1) / 2)
    plaster, length, depth = rng.choice(PLASTER), z1 - z0, rng.uniform(8, 12)
    if modern:
        plaster = mix(plaster, (196, 204, 212), 0.7)
    height = 0.8 + 3.1 * storeys
    near = "left" if side < 0 else "right"
    roof = _Roof(prop, length, depth, height) if not modern and rng.random() < 0.75 else None
    if roof:
        roof.chimney()
    faces = prop.box((0, length), (0, height), (0, depth), plaster)
    if roof:
        roof.paint(0.0 if side < 0 else length, plaster)
    elif "front" in faces:
        prop.box((-0.2, length + 0.2), (height, height + 0.5), (-0.25, depth), shade(plaster, 0.82))
    if near in faces:
        _windows(faces[near], depth, height, storeys, plaster, prop, modern=False, sparse=True)
    if "front" in faces:
        facade = faces["front"]
        _windows(facade, length, height, storeys, plaster, prop, modern)
        _ground_floor(facade, prop, length, height, plaster)


class _Roof:
    """A pitched roof whose ridge runs along the street."""

    def __init__(self, prop: Prop, length: float, depth: float, height: float) -> None:
        self.prop, self.length, self.depth, self.height = prop, length, depth, height
        self.color, self.rise = prop.rng.choice(ROOFS), prop.rng.uniform(2.2, 3.8)

    def chimney(self) -> None:
        """Paint the chimney. Call before painting the house, which hides its foot."""
        u, top = self.prop.rng.uniform(0.2, 0.7) * self.length, self.height + self.rise
        w = self.depth / 2
        self.prop.box((u, u + 0.8), (top - 1.5, top + 0.9), (w - 0.9, w - 0.2), shade(self.color, 0.85))

    def paint(self, gable_at: float, plaster: Color) -> None:
        """Paint the slope towards the street, and the gable above the wall that faces the viewer."""
        prop, length, top, ridge = self.prop, self.length, self.height + self.rise, self.depth / 2
        prop.face([(gable_at, self.height, 0.0), (gable_at, self.height, self.depth), (gable_at, top, ridge)], plaster)
        eaves = self.height - 0.15
        slope = [(-0.1, eaves, -0.35), (length + 0.1, eaves, -0.35), (length + 0.1, top, ridge), (-0.1, top, ridge)]
        roof = prop.face(slope, self.color, cull=True)
        if roof and prop.pixels * length > 60:
            for t in (0.25, 0.5, 0.75):
                roof.part(0, t, 1, t + 0.03, shade(self.color, 0.9))
            count = max(1, round(length / 4))
            for i in range(count):
                s = (i + 0.5) / count
                roof.part(s - 0.07, 0.28, s + 0.07, 0.62, shade(plaster, 1.1))
                roof.part(s - 0.045, 0.32, s + 0.045, 0.58, _pane(prop))


def _pane(prop: Prop) -> Color:
    light = prop.stage.light
    if light.lamps and prop.rng.random() < 0.55:
        return tuple(c / max(a, 0.2) for c, a in zip(LIT, light.ambient, strict=True))  # shines through the night
    return mix(UNLIT, light.haze, prop.rng.choice((0.05, 0.2, 0.35)))


def _windows(facet: Facet, width, height, storeys, plaster, prop: Prop, modern: bool, sparse: bool = False) -> None:
    """Rows of windows above the ground floor; bands of glass in modern houses."""
    rng = prop.rng
    columns = max(1, round(width / (3.6 if sparse else 2.7)))
    trim = shade(plaster, 1.35) if not modern else shade(plaster, 0.8)
    shutters = None if modern or rng.random() < 0.5 else rng.choice(((92, 128, 110), (120, 88, 76), (92, 112, 140)))
    step = 3.1 / height
    first = 0 if sparse else 1
    fine = prop.stage.camera.pixels_per_metre(max(prop.depth, 1)) > 15
    if not sparse and fine:
        facet.part(0, 1 - 0.35 / height, 1, 1, trim)
        facet.part(0, (0.8 + 3.0) / height, 1, (0.8 + 3.2) / height, shade(plaster, 0.84))
    for storey in range(first, storeys):
        low = (0.8 + 3.1 * storey + 0.75) / height
        high = low + step * 0.52
        if modern:
            facet.part(0.03, low - step * 0.06, 0.97, high + step * 0.06, shade(UNLIT, 0.8))
        for column in range(columns):
            left, right = (column + 0.27) / columns, (column + 0.73) / columns
            if modern:
                facet.part((column + 0.08) / columns, low, (column + 0.92) / columns, high, _pane(prop))
                continue
            if fine:
                if shutters:
                    gap = 0.17 / columns
                    facet.part(left - gap, low, right + gap, high, shutters)
                edge = 0.05 / columns
                facet.part(left - edge, low - step * 0.05, right + edge, high + step * 0.05, trim)
            facet.part(left, low, right, high, _pane(prop))
            if fine:
                middle = (left + right) / 2
                facet.part(middle - 0.02 / columns, low, middle + 0.02 / columns, high, trim)


def _ground_floor(facade: Facet, prop: Prop, width: float, height: float, plaster: Color) -> None:
    """Doors, or shops with awnings."""
    rng = prop.rng
    top = 3.3 / height
    facade.part(0, 0, 1, 0.5 / height, shade(plaster, 0.7))
    shops = rng.random() < 0.5
    count = max(1, round(width / (5 if shops else 4.2)))
    for i in range(count):
        left, right = (i + 0.08) / count, (i + 0.92) / count
        if shops:
            color = rng.choice(((190, 74, 66), (70, 120, 120), (214, 154, 70), (86, 96, 138), (110, 140, 90)))
            facade.part(left, 0, right, top * 0.98, shade(color, 0.75))
            facade.part(left + 0.04 / count, 0.45 / height, left + 0.54 / count, top * 0.7, _pane(prop))
            facade.part(left + 0.6 / count, 0.05 / height, right - 0.04 / count, top * 0.7, shade(UNLIT, 0.75))
            stripes = 6
            for k in range(stripes):
                a = left + (right - left) * k / stripes
                b = left + (right - left) * (k + 1) / stripes
                facade.part(a, top * 0.72, b, top * 0.98, color if k % 2 else (246, 238, 224))
        else:
            if i % 2 == 0:
                door = rng.choice(((120, 74, 56), (62, 92, 84), (84, 86, 110), (150, 66, 58)))
                facade.part(left + 0.26 / count, 0, left + 0.56 / count, top * 0.8, shade(plaster, 1.3))
                facade.part(left + 0.3 / count, 0, left + 0.52 / count, top * 0.76, door)
            else:
                facade.part(left + 0.1 / count, 1.2 / height, left + 0.72 / count, top * 0.85, shade(plaster, 1.3))
                facade.part(left + 0.14 / count, 1.3 / height, left + 0.68 / count, top * 0.82, _pane(prop))
