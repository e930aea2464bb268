"""QueryExplorer: predictions, hidden cells and attention of every query, layer by layer.

One forward pass, then everything is in the browser: no control waits for the kernel.
"""

from __future__ import annotations

import ipywidgets

from m2f_lab import explore
from m2f_lab.explore.parts import controls as ui
from m2f_lab.explore.parts.labels import class_labels, percent, query_options
from m2f_lab.explore.parts.reading import Model, attention_option, nearest, rank_queries, top_classes
from m2f_lab.explore.parts.tool import Columns, ImageTool
from m2f_lab.explore.queries.trace import QueryTrace, trace_queries
from m2f_lab.explore.queries.views import make_views
from m2f_lab.inference.predict import look

HELP = {
    "layer": "Decoder layers refine the queries one after the other. 0: the learned queries, before any layer. "
    "n: after n layers.",
    "query": "Each query proposes one mask and one class. Sorted by how sure the last prediction is of the class.",
    "threshold": "At 0 the picture shows probabilities; above, all pixels of at least this probability, alike. "
    "The model itself cuts masks at 50 %.",
}


class QueryExplorer(ImageTool):
    """Explore the queries of one image.

        QueryExplorer(model, "street.png")

    Choose a layer and a query; click the picture to choose the query that won a pixel, or a thumbnail. After a click,
    left and right arrows change the query, up and down the layer, digits the attention head. Models without decoder
    states or attention weights are explored as far as they tell.

    Attributes:
        trace: everything that is shown, as arrays; None once closed.
        order: query numbers as they are sorted, the surest first. [Q]
        views: the pictures: "mask", "before", "blocked", "attention", and all queries as thumbnails, "grid".
    """

    WIDTH = 560
    TITLE = "Queries, layer by layer"
    NOTE = (
        "Click the picture to choose the query that won a pixel. Then left and right arrows change the query, up and "
        "down the layer, and digits the attention head."
    )

    HELD = ("trace",)

    query = ui.Chosen("query_slider", "The number of the query that is shown.", order="order")
    layer = ui.Chosen("layer_slider", "The prediction that is shown: 0 is the learned queries', n that after layer n.")
    head = ui.Chosen("head_menu", "The attention head that is shown, from 1; None for their mean.", first=1, none=True)

    def _read(self, models: dict[str, Model], edges: dict[str, int | None]) -> None:
        (model,) = models.values()
        self.trace: QueryTrace | None = trace_queries(look(model, self.image, **edges, **attention_option(model)))
        self.labels = class_labels(self.classes, self.trace.num_classes)
        self.order = rank_queries(self.trace.class_probabilities[-1])

    def _build(self) -> None:
        trace, last = self.trace, self.trace.num_predictions - 1
        views = make_views(self.image, trace, self.order, self.labels, self.width)
        self.layer_slider = ui.slider("layer-slider", "layer", last, last, HELP["layer"])
        self.play = ipywidgets.Play(
            value=last, min=0, max=last, interval=800, show_repeat=False, tooltip="Run through all layers"
        ).add_class("m2f-play")
        options = query_options(trace.class_probabilities[-1], self.order, self.labels)
        self.query_slider = ui.Stepper("query", options, HELP["query"])
        self.head_menu = ui.head_menu(trace.num_heads, f"mean of {trace.num_heads} heads")
        self.opacity_slider = ui.opacity_slider(0.7)
        self.threshold_slider = ui.share_slider("threshold-slider", "cut at", 0.0, HELP["threshold"])
        large = [name for name in views if name != "grid"]  # thumbnails are too small for heads and opacity
        heads = [self.head_menu] if trace.attention else []
        self._assemble(
            [
                ui.controls(self.layer_slider, self.play, self.query_slider),
                ui.controls(self.opacity_slider, self.threshold_slider, *heads),
                *(ipywidgets.HTML(f"<i>{sentence}</i>") for sentence in trace.missing),
                ui.pictures(views["mask"], [views[name] for name in large[1:]]),
                views["grid"],
            ],
            views,
            name="query-explorer",
            counts=f"{trace.num_queries} queries, {trace.num_predictions} predictions",
            moves=[
                ui.Moves("stack", self.layer_slider),
                ui.Moves("index", self.query_slider),
                *(ui.Moves("channel", menu, large) for menu in heads),
                ui.Moves("opacity", self.opacity_slider, large),
                ui.Moves("threshold", self.threshold_slider, ("mask", "grid"), page=False),
            ],
            links=[((self.layer_slider, "value"), (self.play, "value"))],
        )

    def figure(
        self, layer: int | None = None, query: int | None = None, head: int | None = None
    ) -> explore.plots.Figure:
        """A static figure: the mask before a layer, the cells it hid, where it looked, the mask after it.

        Args:
            layer: from 1; by default the one that is shown now. Before any layer (0) there is only a mask.
            query: by default the one that is shown now.
            head: from 1; by default the one that is shown now.
        """
        layer = QueryExplorer.layer.checked(self, layer)
        query = QueryExplorer.query.checked(self, query)
        head = QueryExplorer.head.checked(self, head)
        trace, size = self.trace, self.image.shape[:2]
        label, probability = top_classes(trace.class_probabilities[layer, query], 1)[0]
        title = f"Query {query}, layer {layer}: {self.labels[label][0]} {percent(probability)}"
        if layer == 0 or not trace.attention:
            return explore.plots.masks(self.image, trace.masks[layer, query][None], [title], width=4.0)
        weights = trace.attention[layer - 1][query]
        return explore.plots.attention(
            self.image,
            trace.masks[layer - 1, query],
            nearest(trace.blocked[layer - 1][query], size, trace.coverage),
            nearest(weights.mean(axis=0) if head is None else weights[head - 1], size, trace.coverage),
            trace.masks[layer, query],
            title=f"{title} (the fallback opened every cell)" if trace.opened[layer - 1, query] else title,
        )

    def _page_columns(self) -> Columns:
        mask, *small, grid = self.views.values()
        return [mask, small, grid]
