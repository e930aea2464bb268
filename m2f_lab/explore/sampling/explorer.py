"""SamplingViewer: where the pixel decoder's deformable attention reads, for any place of an image.

A click asks the kernel, which knows the points of all positions; layers and heads then change in the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.pages import Control, off_page, save_page
from m2f_lab.explore.parts.tool import (
    Explorer,
    HeadChoice,
    check_range,
    controls,
    head_menu,
    layer_slider,
    menu,
    pictures,
    recalled,
    share_slider,
)
from m2f_lab.explore.sampling.trace import STRIDES, SamplingPoints, SamplingTrace, trace_sampling
from m2f_lab.explore.sampling.views import answer_everywhere, answer_place, reach_maps
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import look
from m2f_lab.structures import Output

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure

HELP = {
    "picture": "The pixel decoder lets every position look at a few points of each of its three levels. Click a place "
    "to see the points of the position there: larger dots weigh more, their colour is the level they are read from. "
    "Below the dots lies, as heat, how far away every position reads: its reach.",
    "layer": "The pixel decoder's encoder layers, one after the other. (The code counts from zero: layer n is "
    "pixel_decoder.layer.n-1.)",
    "level": "Which of the three levels' positions is shown: one of stride 32 stands for 32 × 32 pixels of the image "
    "as the model sees it.",
    "head": "Attention heads look independently of each other. On the keyboard: digits; 0 is all of them.",
    "reach": "How strongly to show, for every position of the level, how far away it reads.",
}


class SamplingViewer(HeadChoice, Explorer):
    """Look at the sampling points of one image, of one model or of several side by side.

        SamplingViewer(model, "street.png")
        SamplingViewer({"before training": fresh, "after training": trained}, "street.png")

    Click a picture to choose a place. After that, up and down change the encoder layer, left and right the level that
    asks, digits the head.

    Attributes:
        traces: the sampling points of all positions, by name of the model; empty once closed.
        image: uint8 [H, W, 3]
        views: the pictures, by name of the model.
    """

    def __init__(
        self,
        model: Callable[..., Output] | Mapping[str, Callable[..., Output]],
        image: str | Path | Image.Image | np.ndarray,
        *,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int = 470,
    ) -> None:
        """Args:
        model: a Mask2Former, or anything that is called like one; or several by name.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        width: of each picture, in CSS pixels.

        Raises:
            ValueError: there is no model, or they differ in their encoder layers or heads.
        """
        models = dict(model) if isinstance(model, Mapping) else {"": model}
        if not models:
            raise ValueError("SamplingViewer needs a model, or several by name; there is none.")
        self.image = as_rgb(image)
        self.width = width
        self.traces = {
            name: trace_sampling(look(each, self.image, shortest_edge, longest_edge, return_intermediates=True))
            for name, each in models.items()
        }
        shapes = {name: (trace.num_layers, trace.num_heads) for name, trace in self.traces.items()}
        if len(set(shapes.values())) > 1:
            differ = ", ".join(f"{name}: {layers} and {heads}" for name, (layers, heads) in shapes.items())
            raise ValueError(f"The models differ in their numbers of encoder layers and heads ({differ}).")
        self._pixel = (self.image.shape[1] // 2, self.image.shape[0] // 2)
        views = self._make_views()
        self._make_controls()
        first, *others = views.values()
        layers = f"{self._trace.num_layers} layer" + "s" * (self._trace.num_layers != 1)
        super().__init__(
            [
                controls(self.layer_slider, self.level_menu, self.head_menu, self.reach_slider),
                pictures(*views.values()),
            ],
            views,
            name="sampling-viewer",
            summary=f"SamplingViewer({' | '.join(filter(None, models)) or '1 model'}, {layers}, "
            f"{self.image.shape[1]} × {self.image.shape[0]} pixels)",
            links=[
                *((pair, (view, trait)) for pair, trait in self._pairs() for view in views.values()),
                *(((first, "clicked"), (other, "clicked")) for other in others),
            ],
        )
        for view in views.values():
            view.observe(self._on_click, "clicked")
        self.level_menu.observe(lambda change: self._answer(), "value")
        self._answer()

    @classmethod
    def from_output(cls, output: Output | Mapping[str, Output], image: np.ndarray, **options) -> SamplingViewer:
        """Look at outputs that are there already, made of this image with `return_intermediates=True`.

        Args:
            output: one, or several by name.
            options: of SamplingViewer.

        Raises:
            ValueError: an output was made of an image of another size.
        """
        outputs = output if isinstance(output, Mapping) else {"": output}
        return cls({name: recalled(made) for name, made in outputs.items()}, image, **options)

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
        height, width = self.image.shape[:2]
        check_range("column", pixel[0], width)
        check_range("row", pixel[1], height)
        if tuple(pixel) != self._pixel:
            self._pixel = (int(pixel[0]), int(pixel[1]))
            self._answer()

    @property
    def layer(self) -> int:
        """The encoder layer that is shown, from 1."""
        return self.layer_slider.index + 1

    @layer.setter
    def layer(self, layer: int) -> None:
        check_range("layer", layer, self._trace.num_layers, first=1)
        self.layer_slider.index = layer - 1

    @property
    def stride(self) -> int:
        """The level whose position is shown: 32, 16 or 8."""
        return self.level_menu.value

    @stride.setter
    def stride(self, stride: int) -> None:
        if stride not in STRIDES:
            raise ValueError(f"stride must be one of {', '.join(map(str, STRIDES))}, got {stride}.")
        self.level_menu.value = stride

    def points(self, name: str | None = None) -> SamplingPoints:
        """What is shown: the points of the position at `pixel` on the level of `stride`.

        Args:
            name: of the model; by default the first.
        """
        height, width = self.image.shape[:2]
        column, row = self._pixel
        trace = self._trace if name is None else self.traces[name]
        return trace.at(((column + 0.5) / width, (row + 0.5) / height), self.stride)

    # ---------------------------------------------------------------------------------------------------- the widget

    def _make_controls(self) -> None:
        num_layers, num_heads = self._trace.num_layers, self._trace.num_heads
        levels = [("stride 32: coarse", 32), ("stride 16", 16), ("stride 8: fine", 8)]
        self.layer_slider = layer_slider("encoder layer", num_layers, HELP["layer"])
        self.level_menu = menu("level-menu", "asked by", levels, HELP["level"], value=8)
        self.head_menu = head_menu(num_heads, "all heads", HELP["head"])
        self.reach_slider = share_slider("reach-slider", "reach", 0.0, HELP["reach"])

    def _pairs(self) -> list[tuple[tuple, str]]:
        """Controls, and the value of a picture that each of them moves."""
        return [
            ((self.layer_slider, "index"), "stack"),
            ((self.level_menu, "index"), "index"),
            ((self.head_menu, "index"), "channel"),
            ((self.reach_slider, "value"), "opacity"),
        ]

    def _make_views(self, strides: Sequence[int] = STRIDES) -> dict[str, MaskView]:
        """Pictures without points yet; below them lies how far every position of these levels reads."""
        return {
            name: MaskView(
                self.image, (reach_maps(trace, layer, strides) for layer in range(trace.num_layers)), colors="heat",
                relative=True, smooth=False, width=self.width, group=f"sampling-{id(self)}", opacity=0.0,
                coverage=tuple(p / i for p, i in zip(trace.padded_size[::-1], trace.image_size[::-1], strict=True)),
                clicked=list(self._pixel), title=name or "Where the pixel decoder reads", help=HELP["picture"],
                readout="reads {percent} of the diagonal away", unit="reach, of the diagonal",
                stack=trace.num_layers - 1, index=len(strides) - 1,
            )
            for name, trace in self.traces.items()
        }  # fmt: skip

    def _on_click(self, change: dict) -> None:
        if change["new"]:
            self.pixel = change["new"]

    def _answer(self) -> None:
        """Show the points of the place and the level that are chosen, in all pictures."""
        for name, view in self.views.items():
            with view.hold_sync():
                view.clicked = list(self._pixel)
                answer_place(view, self.points(name))

    def figure(self, layers: Sequence[int] | None = None, head: int | None = None) -> Figure:
        """A static figure of the place and the level that are shown: a row per model, a column per layer.

        Args:
            layers: from 1; by default the one that is shown.
            head: from 0; by default what is shown.
        """
        from m2f_lab.explore import plots  # a second to import, and most viewers are never printed

        layers, head = [self.layer] if layers is None else layers, self.head if head is None else head
        if len(layers) == 0:
            raise ValueError(f"layers is empty; name at least one of 1…{self._trace.num_layers}, or None.")
        heads = slice(None) if head is None else slice(head, head + 1)
        check_range("head", head or 0, self._trace.num_heads)
        panels = {}
        for name in self.traces:
            sampled = self.points(name)
            for layer in layers:
                check_range("layer", layer, self._trace.num_layers, first=1)
                title = f"{name}, layer {layer}" if name else f"layer {layer}"
                panels[title if head is None else f"{title}, head {head + 1}"] = (
                    sampled.location, sampled.points[layer - 1, heads], sampled.weights[layer - 1, heads],
                )  # fmt: skip
        # A single layer: models side by side.
        return plots.sampling_panels(self.image, panels, columns=len(layers) if len(layers) > 1 else None)

    def save_html(
        self, path: str | Path, title: str = "Where the pixel decoder reads", places: tuple[int, int] = (9, 12)
    ) -> None:
        """Write one self-contained page that answers clicks without a network or a kernel.

        Args:
            path: the file to write.
            title: of the page.
            places: rows and columns of a grid over the image: a click shows the points of its cell's middle, for the
                level that is shown now.
        """
        with off_page():
            views = self._make_views([self.stride])
        try:
            for name, view in views.items():
                answer_everywhere(view, self.traces[name], self.stride, places)
                view.stack, view.channel, view.opacity = self.layer - 1, self.head_menu.index, self.reach_slider.value
            save_page(
                path,
                list(views.values()),
                controls=[
                    Control("stack", "encoder layer", HELP["layer"], high=self._trace.num_layers - 1, first=1),
                    Control("channel", "attention", HELP["head"], options=tuple(self.head_menu.options)),
                    Control("opacity", "reach", HELP["reach"], step=0.05),
                ],
                linked=("stack", "channel", "opacity", "clicked"),
                title=title,
                note=f"Click a picture: the points of the position of stride {self.stride} in the middle of that cell "
                f"of a grid of {places[1]} × {places[0]}. Then up and down change the layer, digits the head.",
            )
        finally:
            for view in views.values():
                view.close()

    def close(self) -> None:
        """Take the viewer off the page and give its memory back."""
        self.traces = {}
        super().close()
