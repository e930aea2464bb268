"""BiographyExplorer: heat maps of every query of a model over the mean image of a data set."""

from __future__ import annotations

import numpy as np

from m2f_lab import explore
from m2f_lab.explore.biographies.data import DUPLICATE, Biographies
from m2f_lab.explore.biographies.words import main_class_names, query_notes, usual_sizes
from m2f_lab.explore.parts.controls import Moves, check_range, controls, opacity_slider, pictures
from m2f_lab.explore.parts.labels import class_labels, percent
from m2f_lab.explore.parts.mask_grid import MaskGrid
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.table import Caption
from m2f_lab.explore.parts.tool import Tool
from m2f_lab.inference.images import resize_image

HEIGHT = 360  # of the mean image, in pixels; its width follows from the usual shape of the images

HELP = {
    "gallery": "One picture per query, over the mean of all images: bright where the query usually claims pixels; each "
    "is stretched to its own brightest place. Click one to see it large. Wins: the share of all pixels for whose class "
    "a query contributes most. Dead: it wins no pixel of any image. Duplicates: pairs of queries of the same class and "
    "nearly the same mask.",
    "heat": "How much the query claims each place of an image: the probability that it stands for any class at all, "
    "times its mask probability, averaged over all images. Click a place to choose the query that claims it most.",
    "opacity": "How strongly the heat maps cover the mean image.",
}
ONLY = {"dead": "only dead", "duplicates": "only duplicates"}  # labels of orders that leave queries out


class BiographyExplorer(Tool):
    """Explore the queries of a model over a whole data set.

        BiographyExplorer(biographies_of(run, data_root))

    Click a query, or go through them with the left and right arrows in the order they are sorted.

    Attributes:
        biographies: the numbers that are shown; None once closed.
        views: "gallery", all queries; "heat", the chosen one.
    """

    TITLE = "Query biographies"
    LINKED = ("index",)
    HELD = ("biographies",)

    def __init__(self, biographies: Biographies, *, threshold: float = DUPLICATE, width: int = 380) -> None:
        """Show the queries of one model.

        Args:
            biographies: of the model.
            threshold: overlap from which two queries count as duplicates.
            width: of the large picture, in CSS pixels; the gallery is half as wide again.
        """
        self.biographies, self.threshold = biographies, threshold
        views = self._make_views(width)
        gallery, heat = views.values()
        self.opacity_slider = opacity_slider(gallery.opacity, HELP["opacity"])
        super().__init__(
            [controls(self.opacity_slider), pictures(gallery, heat)],
            views,
            name="biography-gallery",
            summary=repr(biographies).replace("Biographies", type(self).__name__),
            moves=[Moves("opacity", self.opacity_slider)],
            links=[((gallery, "index"), (heat, "index"))],
        )

    def _make_views(self, width: int) -> dict[str, MaskView]:
        biographies = self.biographies
        orders = {ONLY.get(name, name): order for name, order in biographies.orders(self.threshold).items() if order}
        first = next(iter(orders.values()))[0]
        common = {"colors": "heat", "relative": True, "index": first, "opacity": 0.75}
        labels = [f"{query} {words}" for query, words in enumerate(self._in_short())]
        return {
            "gallery": MaskGrid(
                self.image, biographies.heat, labels=[labels], orders=orders, thumbnail=104, width=width * 3 // 2,
                title=f"{biographies.num_queries} queries", help=HELP["gallery"], **common,
            ),
            "heat": MaskView(
                self.image, biographies.heat, captions=[biography_captions(biographies, self.threshold)],
                pick=biographies.heat.argmax(axis=0), readout="claimed to {percent}", width=width,
                unit="claimed by the query, mean of all images", title="Where it works", help=HELP["heat"], **common,
            ),
        }  # fmt: skip

    def _in_short(self) -> list[str]:
        """The main class of each query and how much it wins. Q"""
        names = zip(main_class_names(self.biographies), self.biographies.wins, strict=True)
        return [f"{name} {percent(wins)}" if wins else "dead" for name, wins in names]

    @property
    def image(self) -> np.ndarray:
        """The mean image in the usual shape of the data set's images. uint8 [H, W, 3]"""
        return resize_image(self.biographies.mean_image, (HEIGHT, max(1, round(HEIGHT * self.biographies.aspect))))

    @property
    def query(self) -> int:
        """The number of the query that is shown."""
        return self.views["gallery"].index

    @query.setter
    def query(self, query: int) -> None:
        check_range("query", query, self.biographies.num_queries)
        for view in self.views.values():
            view.index = query

    @property
    def sort(self) -> str:
        """Order of the gallery: "wins", "class", "size", "number", "only dead", "only duplicates"."""
        return self.views["gallery"].sort

    @sort.setter
    def sort(self, sort: str) -> None:
        self.views["gallery"].sort = sort

    def figure(self, limit: int | None = 12, columns: int = 6) -> explore.plots.Figure:
        """A static figure of the first queries as the gallery is sorted.

        Args:
            limit: so many of them; None for all.
            columns: pictures per row.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, or None for all queries, got {limit}.")
        words, heat = self._in_short(), self.biographies.heat
        panels = {f"query {query}\n{words[query]}": heat[query] for query in self.views["gallery"].order[:limit]}
        return explore.plots.heat_over_image(self.image, panels, columns=min(columns, len(panels)), width=1.6)

    def _page_note(self) -> str:
        images = self.biographies.num_images
        return f"Each query over {images} images. Click one, then use the left and right arrows."


def biography_captions(biographies: Biographies, threshold: float = DUPLICATE, num_classes: int = 5) -> list[Caption]:
    """Captions that tell where each query wins, with the classes of the pixels it wins as bars. Q"""
    labels = class_labels(biographies.classes, biographies.num_classes)
    notes, sizes = query_notes(biographies, threshold), usual_sizes(biographies)
    captions = []
    for query, won in enumerate(biographies.won_pixels):
        shares = won / max(won.sum(), 1e-9)
        active = biographies.active_images[query]
        most = np.argsort(-shares, kind="stable")[:num_classes]
        captions.append(
            Caption(
                text=f"Query {query} wins {percent(biographies.wins[query])} of all pixels, in "
                f"{biographies.won_images[query]} of {biographies.num_images} images. "
                + (f"Active in {active}, size {sizes[query]}." if active else "Never active."),
                warning=notes[query].capitalize(),
                bars=tuple((labels[k][0], round(float(shares[k]), 4), labels[k][1]) for k in most if shares[k] > 0),
            )
        )
    return captions
