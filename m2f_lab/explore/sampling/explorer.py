"""SamplingExplorer: sampling points of the pixel decoder's deformable attention, for any place of an image.

A click asks the kernel, which knows the points of all positions; layers and heads then change in the browser.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from m2f_lab import explore
from m2f_lab.explore.parts import controls as ui
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.reading import Model
from m2f_lab.explore.parts.tool import ImageTool
from m2f_lab.explore.sampling.trace import STRIDES, SamplingPoints, SamplingTrace, level_of, trace_sampling
from m2f_lab.explore.sampling.views import answer, reach_maps

HELP = {
    "picture": "The pixel decoder lets every position look at a few points of each of its three levels. Click a place "
    "to see the points of the position there: larger dots weigh more, their colour is the level they are read from. "
    "Below the dots lies, as heat, how far away every position reads: its reach.",
    "layer": "The pixel decoder's encoder layers, one after the other.",
    "level": "The level whose position is shown: one of stride 32 stands for 32 × 32 pixels of the image as the model "
    "sees it.",
    "reach": "How strongly to show, for every position of the level, how far away it reads.",
}


class SamplingExplorer(ImageTool):
    """Look at the sampling points of one image, of one model or of several side by side.

        SamplingExplorer(model, "street.png")
        SamplingExplorer({"before training": fresh, "after training": trained}, "street.png")

    Click a picture to choose a place. After that, up and down change the encoder layer, left and right the level that
    asks, digits the head. Models need a pixel decoder with deformable attention.

    Attributes:
        traces: the sampling points of all positions, by name of the model; None once closed.
        views: the pictures, by name of the model.
    """

    WIDTH = 470
    SEVERAL = True
    TITLE = "Where the pixel decoder reads"
    LINKED = ("clicked",)

    HELD = ("traces",)

    layer = ui.Chosen("layer_slider", "The encoder layer that is shown, from 1.", first=1)
    head = ui.Chosen("head_menu", "The attention head that is shown, from 1; None for all.", first=1, none=True)

    def _read(self, models: dict[str, Model], edges: dict[str, int | None]) -> None:
        self.traces: dict[str, SamplingTrace] = {
            name: trace_sampling(model, self.image, **edges) for name, model in models.items()
        }
        self._check_alike("encoder layers and heads", "num_layers", "num_heads")

    def _build(self) -> None:
        self._pixel = (self.image.shape[1] // 2, self.image.shape[0] // 2)
        num_layers = self._trace.num_layers
        levels = [("stride 32: coarse", 32), ("stride 16", 16), ("stride 8: fine", 8)]
        self.layer_slider = ui.layer_slider("encoder layer", num_layers, HELP["layer"])
        self.level_menu = ui.menu("level-menu", "asked by", levels, HELP["level"], value=8)
        self.head_menu = ui.head_menu(self._trace.num_heads, "all heads")
        self.reach_slider = ui.share_slider("reach-slider", "reach", 0.0, HELP["reach"])
        views = self._make_views(STRIDES)
        first, *others = views.values()
        self._assemble(
            [
                ui.controls(self.layer_slider, self.level_menu, self.head_menu, self.reach_slider),
                ui.pictures(*views.values()),
            ],
            views,
            name="sampling-viewer",
            counts=f"{self._names}, {num_layers} layer{'s' * (num_layers != 1)}",
            moves=[
                ui.Moves("stack", self.layer_slider),
                ui.Moves("index", self.level_menu, page=False),
                ui.Moves("channel", self.head_menu),
                ui.Moves("opacity", self.reach_slider),
            ],
            links=[((first, "clicked"), (other, "clicked")) for other in others],
        )
        for view in views.values():
            view.on_click(lambda *pixel: setattr(self, "pixel", pixel))
        self.level_menu.observe(lambda change: self._answer(), "value")
        self._answer()

    # ------------------------------------------------------------------------------------------------------ the state

    @property
    def _trace(self) -> SamplingTrace:
        """Any of the traces, for what they have in common."""
        return next(iter(self.traces.values()))

    @property
    def pixel(self) -> tuple[int, int]:
        """The place that is shown: (column, row) of the image."""
        return self._pixel

    @pixel.setter
    def pixel(self, pixel: tuple[int, int]) -> None:
        ui.check_range("column", pixel[0], self.image.shape[1])
        ui.check_range("row", pixel[1], self.image.shape[0])
        if tuple(pixel) != self._pixel:
            self._pixel = (int(pixel[0]), int(pixel[1]))
            self._answer()

    @property
    def stride(self) -> int:
        """The level whose position is shown: 32, 16 or 8."""
        return self.level_menu.value

    @stride.setter
    def stride(self, stride: int) -> None:
        self.level_menu.index = level_of(stride)

    def points(self, name: str | None = None) -> SamplingPoints:
        """The points that are shown: of the position at `pixel` on the level of `stride`.

        Args:
            name: of the model; by default the first.
        """
        height, width = self.image.shape[:2]
        column, row = self._pixel
        trace = self._trace if name is None else self.traces[name]
        return trace.at(((column + 0.5) / width, (row + 0.5) / height), self.stride)

    # ---------------------------------------------------------------------------------------------------- the widget

    def _make_views(self, strides: Sequence[int], **traits) -> dict[str, MaskView]:
        """Pictures without points yet; below them lies how far every position of these levels reads."""
        traits = {"opacity": 0.0, "stack": self._trace.num_layers - 1, "index": len(strides) - 1} | traits
        return {
            name: MaskView(
                self.image, (reach_maps(trace, layer, strides) for layer in range(1, trace.num_layers + 1)),
                colors="heat", relative=True, smooth=False, width=self.width, group=f"sampling-{id(self)}",
                coverage=tuple(p / i for p, i in zip(trace.padded_size[::-1], trace.image_size[::-1], strict=True)),
                clicked=list(self._pixel), title=name or self.TITLE, help=HELP["picture"],
                readout="reads {percent} of the diagonal away", unit="reach, of the diagonal",
                **traits,
            )
            for name, trace in self.traces.items()
        }  # fmt: skip

    def _answer(self) -> None:
        """Show the points of the place and the level that are chosen, in all pictures."""
        for name, view in self.views.items():
            with view.hold_sync():
                view.clicked = list(self._pixel)
                answer(view, [[self.points(name)]])

    def figure(self, layers: Sequence[int] | None = None, head: int | None = None) -> explore.plots.Figure:
        """A static figure of the place and the level that are shown: a row per model, a column per layer.

        Args:
            layers: from 1; by default the one that is shown.
            head: from 1; by default the one that is shown.
        """
        layers, head = [self.layer] if layers is None else layers, SamplingExplorer.head.checked(self, head)
        if len(layers) == 0:
            raise ValueError(f"layers is empty; name at least one of 1…{self._trace.num_layers}, or None.")
        heads = slice(None) if head is None else slice(head - 1, head)
        panels = {}
        for name in self.traces:
            sampled = self.points(name)
            for layer in layers:
                SamplingExplorer.layer.checked(self, layer)
                title = f"{name}, layer {layer}" if name else f"layer {layer}"
                panels[title if head is None else f"{title}, head {head}"] = (
                    sampled.location, sampled.points[layer - 1, heads], sampled.weights[layer - 1, heads],
                )  # fmt: skip
        # A single layer: models side by side.
        return explore.plots.sampling_panels(self.image, panels, columns=len(layers) if len(layers) > 1 else None)

    def save_html(self, path: str | Path, title: str | None = None, places: tuple[int, int] = (9, 12)) -> None:
        """Write one self-contained page that answers clicks without a network or a kernel.

        Args:
            path: the file to write.
            title: of the page.
            places: rows and columns of a grid over the image: a click shows the points of its cell's middle, for the
                level that is shown now.
        """
        self._places = places
        super().save_html(path, title)

    def _page_note(self) -> str:
        return (
            f"Click a picture: the points of the position of stride {self.stride} in the middle of that cell of a grid "
            f"of {self._places[1]} × {self._places[0]}. Then up and down change the layer, digits the head."
        )

    def _page_columns(self) -> list[MaskView]:
        shown = {"stack": self.layer - 1, "channel": self.head_menu.index, "opacity": self.reach_slider.value}
        views = self._make_views([self.stride], **shown)
        rows, columns = self._places
        places = [[((x + 0.5) / columns, (y + 0.5) / rows) for x in range(columns)] for y in range(rows)]
        for name, view in views.items():
            answer(view, [[self.traces[name].at(place, self.stride) for place in row] for row in places])
        return list(views.values())
