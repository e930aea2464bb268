"""QueryExplorer: what every query predicts, what it may not see and where it looks, layer by layer.

One forward pass, then everything is in the browser: no control waits for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets
import numpy as np
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore.parts.labels import class_labels, percent
from m2f_lab.explore.parts.pages import Control, save_page
from m2f_lab.explore.parts.tool import (
    Explorer,
    HeadChoice,
    LayerChoice,
    check_range,
    controls,
    head_menu,
    menu,
    pictures,
    recalled,
    share_slider,
    slider,
)
from m2f_lab.explore.queries.trace import over_image, rank_queries, top_classes, trace_queries
from m2f_lab.explore.queries.views import make_views, query_options
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import look
from m2f_lab.structures import Output

if TYPE_CHECKING:
    from m2f_lab.explore.plots import Figure
    from m2f_lab.explore.queries.trace import QueryTrace

HELP = {
    "layer": "Decoder layers refine the queries one after the other. 0: the learned queries, before any layer. "
    "n: after n layers. (The code counts from zero: layer n is decoder.layer.n-1.)",
    "query": "Each query proposes one mask and one class. Sorted by how sure the last prediction is of the class.",
    "head": "Attention heads look independently of each other. On the keyboard: digits; 0 is their mean.",
    "opacity": "How strongly masks cover the image.",
    "threshold": "At 0 the picture shows probabilities; above, all pixels of at least this probability, alike. "
    "The model itself cuts masks at 50 %.",
}


class QueryExplorer(LayerChoice, HeadChoice, Explorer):
    """Explore the queries of one image.

        QueryExplorer(model, "street.png")

    Choose a layer and a query; click the picture to choose the query that won a pixel, or a thumbnail. After a click,
    left and right arrows change the query, up and down the layer, digits the attention head.

    Attributes:
        trace: everything that is shown, as arrays; None once closed.
        order: query numbers as they are sorted, the surest first. [Q]
        views: the pictures: "mask", "before", "blocked", "attention", and all queries as thumbnails, "grid".
    """

    def __init__(
        self,
        model: Callable[..., Output],
        image: str | Path | Image.Image | np.ndarray,
        *,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int = 560,
    ) -> None:
        """Args:
        model: a Mask2Former, or anything that is called like one.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        classes: names and colours; by default the model's own.
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        width: of the large picture, in CSS pixels.
        """
        self.image = as_rgb(image)
        self.trace: QueryTrace | None = trace_queries(
            look(model, self.image, shortest_edge, longest_edge, return_intermediates=True)
        )
        classes = getattr(model, "classes", None) if classes is None else classes
        self.labels = class_labels(classes, self.trace.num_classes)
        self.order = rank_queries(self.trace.class_probabilities[-1])
        views = make_views(self.image, self.trace, self.order, self.labels, width)
        self._make_controls()
        super().__init__(
            [
                controls(self.layer_slider, self.play, self.query_slider, self.query_menu),
                controls(self.opacity_slider, self.threshold_slider, self.head_menu),
                pictures(views["mask"], [views["before"], views["blocked"], views["attention"]]),
                views["grid"],
            ],
            views,
            name="query-explorer",
            summary=f"QueryExplorer({self.trace.num_queries} queries, {self.trace.num_predictions} predictions, "
            f"{self.image.shape[1]} × {self.image.shape[0]} pixels)",
            links=self._pairs(views),
        )

    @classmethod
    def from_output(cls, output: Output, image: np.ndarray, **options) -> QueryExplorer:
        """Explore an output that is there already, made of this image with `return_intermediates=True`.

        Args:
            options: of QueryExplorer.

        Raises:
            ValueError: the output was made of an image of another size.
        """
        return cls(recalled(output), image, **options)

    def _make_controls(self) -> None:
        trace = self.trace
        last = trace.num_predictions - 1
        self.layer_slider = slider("layer-slider", "layer", last, last, HELP["layer"])
        self.play = ipywidgets.Play(
            value=last, min=0, max=last, interval=800, show_repeat=False, tooltip="Run through all layers"
        ).add_class("m2f-play")
        self.query_slider = slider("query-slider", "query", 0, trace.num_queries - 1, HELP["query"], readout=False)
        options = query_options(trace.class_probabilities[-1], self.order, self.labels)
        self.query_menu = menu("query-menu", "", options, HELP["query"])
        self.head_menu = head_menu(trace.num_heads, f"mean of {trace.num_heads} heads", HELP["head"])
        self.opacity_slider = share_slider("opacity-slider", "opacity", 0.7, HELP["opacity"])
        self.threshold_slider = share_slider("threshold-slider", "cut at", 0.0, HELP["threshold"])

    def _pairs(self, views: dict) -> list[tuple[tuple, tuple]]:
        """What the browser keeps equal."""
        return [
            ((self.layer_slider, "value"), (self.play, "value")),
            ((self.query_slider, "value"), (self.query_menu, "index")),
            *(
                ((control, value), (view, trait))
                for name, view in views.items()
                for trait, (control, value) in self._shown_in(name).items()
            ),
        ]

    def _shown_in(self, view: str) -> dict[str, tuple[ipywidgets.Widget, str]]:
        """The controls that a picture follows, by its trait. Thumbnails are too small for heads and opacity."""
        follows = {"stack": (self.layer_slider, "value"), "index": (self.query_slider, "value")}
        if view != "grid":
            follows |= {"channel": (self.head_menu, "index"), "opacity": (self.opacity_slider, "value")}
        if view in ("mask", "grid"):
            follows["threshold"] = (self.threshold_slider, "value")
        return follows

    @property
    def query(self) -> int:
        """The number of the query that is shown."""
        return int(self.order[self.query_slider.value])

    @query.setter
    def query(self, query: int) -> None:
        check_range("query", query, self.trace.num_queries)
        self.query_slider.value = int(np.flatnonzero(self.order == query)[0])

    def figure(self, layer: int | None = None, query: int | None = None, head: int | None = None) -> Figure:
        """A static figure: the mask before a layer, what the layer hid, where it looked, the mask after it.

        Args:
            layer: from 1; by default what is shown now. Before any layer (0) there is only a mask.
            query: by default what is shown now.
            head: from 0; by default what is shown now.
        """
        from m2f_lab.explore import plots  # a second to import, and most explorers are never printed

        layer, query = self.layer if layer is None else layer, self.query if query is None else query
        head = self.head if head is None else head
        trace, size = self.trace, self.image.shape[:2]
        check_range("layer", layer, trace.num_predictions)
        check_range("query", query, trace.num_queries)
        check_range("head", 0 if head is None else head, trace.num_heads)
        label, probability = top_classes(trace.class_probabilities[layer, query], 1)[0]
        title = f"Query {query}, layer {layer}: {self.labels[label][0]} {percent(probability)}"
        if layer == 0:
            return plots.masks(self.image, trace.masks[:1, query], [title], width=4.0)
        weights = trace.attention[layer - 1][query]
        return plots.attention(
            self.image,
            trace.masks[layer - 1, query],
            over_image(trace.blocked[layer - 1][query], size, trace.coverage),
            over_image(weights.mean(axis=0) if head is None else weights[head], size, trace.coverage),
            trace.masks[layer, query],
            title=f"{title} (the fallback opened every cell)" if trace.opened[layer - 1, query] else title,
        )

    def save_html(self, path: str | Path, title: str = "Queries, layer by layer") -> None:
        """Write one self-contained page that scrubs, hovers and picks without a network or a kernel."""
        last = self.trace.num_predictions - 1
        options = query_options(self.trace.class_probabilities[-1], self.order, self.labels)
        menu = tuple((text, place) for place, (text, _) in enumerate(options))
        self.update()
        save_page(
            path,
            [
                self.views["mask"],
                [self.views["before"], self.views["blocked"], self.views["attention"]],
                self.views["grid"],
            ],
            controls=[
                Control("stack", "layer", HELP["layer"], high=last),
                Control("index", "query", HELP["query"], options=menu),
                Control("channel", "attention", HELP["head"], options=tuple(self.head_menu.options)),
                Control("opacity", "opacity", HELP["opacity"], step=0.05),
            ],
            title=title,
            note="Click the picture to choose the query that won a pixel. Then left and right arrows change the query, "
            "up and down the layer, and digits the attention head.",
        )

    def close(self) -> None:
        """Take the explorer off the page and give its memory back."""
        self.trace = None
        super().close()
