"""TrapLab: known bugs of reimplementations, their cost, and the tests that guard against them.

Choosing a trap asks the kernel, once; flipping between right and broken happens in the browser.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import ipywidgets
import numpy as np

from m2f_lab import explore
from m2f_lab.explore.parts.controls import Control, Moves, controls, menu, opacity_slider, pictures
from m2f_lab.explore.parts.drawing import TABLES, composite, label_table, to_uint8
from m2f_lab.explore.parts.links import Links
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.table import Caption
from m2f_lab.explore.parts.tool import Columns, Tool
from m2f_lab.explore.traps import TRAPS, Bench, Trap, Trial
from m2f_lab.inference.images import resize_image

SHOWN = {"right": "#0072B2", "broken": "#D55E00", "difference": "#6e7781"}  # and the colours of their numbers
HELP = {
    "trap": "Known bugs of reimplementations of Mask2Former. Each is tried on drawn scenes when you choose it.",
    "switch": "right: what this library does. broken: the bug. difference: what the broken variant says where the two "
    "differ. Left and right arrow keys flip, too, once the picture was clicked.",
    "opacity": "How strongly labels or heat cover the image. At 0 you see the image alone.",
}
WIDTH = 560  # CSS pixels
OPACITY = 0.8  # labels can be read and the image can be seen


class TrapLab(Tool):
    """Predict what a bug costs, flip the switch, see it, read the test that guards it.

        TrapLab(Bench(model, streets, rooms))

    Attributes:
        bench: what traps are tried on; None once closed.
        traps: those in the menu, by name.
        trials: results so far, by the trap's name.
        views: the pictures of those that have one, by the trap's name.
    """

    TITLE = "Traps of Mask2Former"
    NOTE = "Predict, then flip: one menu for all pictures. The question marks say what people get wrong."
    HELD = ("bench", "trials", "_picture")

    def __init__(self, bench: Bench, traps: Sequence[Trap] = TRAPS, *, width: int = WIDTH) -> None:
        """Show a menu of traps and try the first one.

        Args:
            bench: a trained model and scenes.
            traps: entries of the menu, in this order.
            width: of the picture, in CSS pixels.

        Raises:
            ValueError: there is no trap.
        """
        if not traps:
            raise ValueError("TrapLab needs at least one trap; m2f_lab.explore.traps.TRAPS holds all of them.")
        self.bench = bench
        self.traps = {trap.name: trap for trap in traps}
        self.trials: dict[str, Trial] = {}
        self._width = width
        wide = ipywidgets.Layout(width="380px")
        self.trap_menu = menu("trap-menu", "trap", list(self.traps), HELP["trap"], layout=wide)
        self.switch = ipywidgets.ToggleButtons(options=[*SHOWN], tooltips=[HELP["switch"]] * 3).add_class("m2f-switch")
        self.opacity_slider = opacity_slider(OPACITY, HELP["opacity"])
        row = controls(self.trap_menu, self.switch, self.opacity_slider)
        self._values = [ipywidgets.HTML().add_class(f"m2f-value-{name}") for name in SHOWN]
        self._value = ipywidgets.Stack(self._values, selected_index=0)
        self._words, self._code = ipywidgets.HTML(), ipywidgets.HTML()
        self._picture = ipywidgets.Box()
        super().__init__(
            [row, self._words, self._value, pictures(self._picture), self._code],
            {},
            name="trap-lab",
            summary=f"TrapLab({len(self.traps)} traps)",
            moves=[Moves("opacity", self.opacity_slider)],
            links=[((self.switch, "index"), (self._value, "selected_index"))],
        )
        self.trap_menu.observe(self._show, "value")
        self._show()

    @property
    def trap(self) -> Trap:
        """The one that is shown."""
        return self.traps[self.trap_menu.value]

    @trap.setter
    def trap(self, name: str) -> None:
        self.trap_menu.value = self.trial(name).trap.name

    def trial(self, name: str | None = None) -> Trial:
        """Results of a trap, by default the one that is shown; it is tried at the first call.

        Raises:
            ValueError: there is no such trap.
        """
        name = self.trap_menu.value if name is None else name
        if name not in self.traps:
            raise ValueError(f"There is no trap {name!r}; there are {', '.join(self.traps)}.")
        if name not in self.trials:
            self.trials[name] = self.traps[name].try_on(self.bench)
        return self.trials[name]

    def _show(self, change: dict | None = None) -> None:
        """Bring words, numbers and picture up to the menu, and begin with what is right."""
        trial = self.trial()
        self.switch.index = 0
        self._words.value = words(trial.trap)
        for widget, text, color in zip(self._values, _texts(trial), SHOWN.values(), strict=True):
            style = f"font-size: 17px; padding: 2px 10px; border-left: 5px solid {color}"
            widget.value = f'<div style="{style}">{html.escape(text)}</div>'
        self._code.value = code(trial.trap)
        self._picture.children = [self._view(trial)] if trial.has_picture else []

    def _view(self, trial: Trial) -> MaskView:
        name = trial.trap.name
        if name not in self.views:
            view = self.views[name] = picture(trial, self._width)
            pairs = [((self.switch, "index"), (view, "index")), ((self.opacity_slider, "value"), (view, "opacity"))]
            self._links += (Links(pairs),)
        self.update()
        return self.views[name]

    def figure(self, name: str | None = None) -> explore.plots.Figure:
        """A static figure of a trap, by default the one that is shown: right, broken, and where they differ."""
        return figure(self.trial(name))

    def _page_controls(self) -> list[Control]:
        options = tuple((text, place) for place, text in enumerate(SHOWN))
        return [Control("index", "variant", HELP["switch"], options=options), *super()._page_controls()]

    def _page_columns(self) -> Columns:
        """All pictures, two columns of them; every trap is tried.

        Raises:
            ValueError: no trap has a picture.
        """
        trials = [trial for trial in map(self.trial, self.traps) if trial.has_picture]
        if not trials:
            raise ValueError(f"None of {', '.join(self.traps)} has a picture, so there is nothing to save.")
        views = [picture(trial, 380, named=True) for trial in trials]
        for view in views:
            view.index = self.switch.index
        return [views[0::2], views[1::2]] if len(views) > 1 else [views]


def picture(trial: Trial, width: int = WIDTH, named: bool = False) -> MaskView:
    """Right, broken and difference as three masks over one image.

    Args:
        trial: of a trap that has a picture.
        width: in CSS pixels.
        named: write the trap's name above and its numbers below, where nothing else says them.
    """
    found, names, colors = trial.right, (), "heat"
    if found.classes is not None:
        names, colors = found.classes.names, label_table(found.classes, opacity=1.0)
    captions = [[Caption(text) for text in _texts(trial)]]
    around = dict(title=trial.trap.name, help=trial.trap.mistake, captions=captions) if named else {}
    return MaskView(
        found.image,
        np.stack([mask.astype(np.uint8 if names else np.float32) for mask in trial.pictures.values()]),
        colors=colors,
        names=names,
        readout="{value} of the largest",
        unit="" if names else "0: as in the library",
        smooth=False,
        opacity=OPACITY,
        width=width,
        **around,
    )


def figure(trial: Trial) -> explore.plots.Figure:
    """Draw a trial for papers: pictures where there are some, else two bars."""
    titles = {name: f"{name}: {trial.text(name)}" for name in ("right", "broken")}
    found = trial.right
    if not trial.has_picture:
        values = [None if np.isnan(finding.value) else finding.value for finding in (trial.right, trial.broken)]
        return explore.plots.bars(
            list(titles.values()), values, " ".join(trial.trap.unit.format("").split()), trial.trap.name
        )
    if found.classes is None:
        large = resize_image(found.image, tuple(3 * edge for edge in found.image.shape[:2]))
        heat = {name: to_uint8(trial.pictures[name])[0] for name in titles}
        drawn = {title: composite(large, heat[name], TABLES["heat"], smooth=False) for name, title in titles.items()}
        return explore.plots.images(drawn, width=4.0)
    maps = {title: trial.pictures[name] for name, title in (titles | {"difference": "where they differ"}).items()}
    return explore.plots.segmentation(found.image, maps, found.classes, opacity=0.8, width=3.2)


def _texts(trial: Trial) -> tuple[str, str, str]:
    """One line each on right, broken and difference."""
    if trial.has_picture and trial.right.classes is not None:
        apart = f"{trial.changed:.3g} % of the pixels differ"
    elif np.isnan(trial.damage):
        apart = "a number against none"
    else:
        apart = f"{trial.right.value:.3g} → {trial.broken.value:.3g}"
    return f"right: {trial.text('right')}", f"broken: {trial.text('broken')}", f"difference: {apart}"


def words(trap: Trap) -> str:
    """The mistake and the question of a trap, as HTML."""
    return (
        f'<div style="max-width: 72ch; line-height: 1.45"><b>What people get wrong.</b> {html.escape(trap.mistake)}<br>'
        f"<b>Predict, then flip.</b> <i>{html.escape(trap.question)}</i></div>"
    )


def code(trap: Trap) -> str:
    """The code of both variants and of the test, each to be unfolded, as HTML."""
    parts = [(f"The {name} code", trap.where(name), trap.source(name)) for name in ("right", "broken")]
    parts.append(("The test that guards it", trap.guarded_by, trap.guard_source()))
    return '<div style="line-height: 1.6">' + "".join(_fold(*part) for part in parts) + "</div>"


def _fold(title: str, place: str, source: str) -> str:
    return (
        f'<details><summary style="cursor: pointer">{title}: <code>{html.escape(place)}</code></summary>'
        '<pre style="white-space: pre; overflow: auto; max-height: 420px; line-height: 1.35; margin: 2px 0 8px 14px">'
        f"{html.escape(source)}</pre></details>"
    )
