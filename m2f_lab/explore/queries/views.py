"""Pictures and captions of a query trace.

L predictions 0…N, decoder layers 1…N, Q queries, K classes, h/w height/width of a grid.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from m2f_lab.explore.parts.labels import OPENED, Labels, percent, when
from m2f_lab.explore.parts.mask_grid import MaskGrid
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.reading import top_classes
from m2f_lab.explore.parts.table import Caption
from m2f_lab.explore.queries.trace import QueryTrace, pool, with_mean

THUMBNAIL_CELLS, SMALL_CELLS = 32, 48  # at most, along each edge of masks in thumbnails and in the small picture
# More attention is summed over 2 × 2 cells before it is sent, as for 1024 × 2048 pixels, 100 queries and 8 heads.
MAX_ATTENTION_BYTES = 64 * 2**20

HELP = {
    "mask": "The probability that a pixel belongs to this query; the white line is at one half. Click to choose the "
    "query that contributes most to the class predicted at that pixel in the end.",
    "before": "The mask after the layer before: what masked attention lets this layer see. Its cells are averages "
    "where the large picture has finer ones.",
    "blocked": "Masked attention: a layer lets a query see the image only inside the mask it predicted just before. "
    "What lies in grey fog was hidden from it.",
    "grid": "All queries at the chosen layer: number, likeliest class, its probability. Click one to open it.",
    "attention": "How the query distributed its attention over the image in this layer. All cells of a head add up to "
    "100 %. Stride 8: a cell stands for 8 × 8 pixels of the image as the model sees it.",
}

NOT_YET = "No layer has looked at the image yet."


def mask_captions(trace: QueryTrace, order: np.ndarray, labels: Labels) -> list[list[Caption]]:
    """Likeliest classes of a query as bars. L × Q"""

    def caption(layer: int, query: int) -> Caption:
        moment = f"{when(layer)} of {trace.num_predictions - 1}" if layer else f"{when(0)}: the learned query itself"
        likeliest = ((*labels[k], value) for k, value in top_classes(trace.class_probabilities[layer, query]))
        bars = tuple((name, round(value, 4), color) for name, color, value in likeliest)
        return Caption(f"Query {query}, {moment}", bars=bars)

    return [[caption(layer, query) for query in order.tolist()] for layer in range(trace.num_predictions)]


def before_captions(trace: QueryTrace, order: np.ndarray) -> list[list[Caption]]:
    """Number of the prediction that the mask before belongs to. L × Q"""
    later = (when(prediction).capitalize() for prediction in range(1, trace.num_predictions - 1))
    texts = [NOT_YET, "The learned query's own mask", *later]
    return [[Caption(text)] * len(order) for text in texts[: trace.num_predictions]]


def layer_captions(trace: QueryTrace, order: np.ndarray) -> tuple[list[list[Caption]], list[list[Caption]]]:
    """Cells that a layer hid, with a warning where the fallback opened its row; the grid that it saw. L × Q each"""
    hidden, grids = ([[Caption(NOT_YET)] * len(order)] for _ in range(2))
    layers = zip(trace.blocked, trace.opened[:, order], trace.strides, strict=True)
    for layer, (blocked, opened, stride) in enumerate(layers, start=1):
        height, width = blocked.shape[1:]
        counts = blocked[order].sum(axis=(1, 2))
        texts = (f"Layer {layer}: {count} of {height * width} cells hidden" for count in counts)
        hidden.append([Caption(text, OPENED if fell else "") for text, fell in zip(texts, opened, strict=True)])
        grids.append([Caption(f"Layer {layer}: {height} × {width} cells, stride {stride}")] * len(order))
    return hidden, grids


def grid_labels(trace: QueryTrace, order: np.ndarray, labels: Labels) -> list[list[str]]:
    """Number, likeliest class and its probability of every query. L × Q"""
    return [
        [
            f"{query} {labels[label][0]} {percent(probability)}"
            for query in order.tolist()
            for label, probability in top_classes(probabilities[query], 1)
        ]
        for probabilities in trace.class_probabilities
    ]


def grid_orders(trace: QueryTrace, order: np.ndarray) -> dict[str, list[int]]:
    """Places in the given order, sorted by the last prediction's score, class or area. Q each"""
    probabilities, masks = trace.class_probabilities[-1, order], trace.masks[-1, order]
    sorted_by = {
        "score": np.arange(len(order)),
        "class": probabilities.argmax(axis=1),  # "no object" comes last
        "area": -(masks > 0.5).mean(axis=(1, 2)),
    }
    return {name: np.argsort(key, kind="stable").tolist() for name, key in sorted_by.items()}


def pooled(masks: np.ndarray, cells: int) -> np.ndarray:
    """Masks with at most so many cells along each edge, averaged. [Q, h, w] → [Q, h', w']"""
    size = tuple(min(edge, cells) for edge in masks.shape[1:])
    return F.adaptive_avg_pool2d(torch.from_numpy(masks), size).clamp(0, 1).numpy()


def attention_pooling(trace: QueryTrace, max_bytes: int = MAX_ATTENTION_BYTES) -> list[int]:
    """Factor by which each layer's attention is pooled so that all of it stays below a number of bytes. N"""
    factors = [1] * len(trace.attention)
    sizes = [weights.size // weights.shape[1] * (weights.shape[1] + 1) for weights in trace.attention]
    while sum(sizes) > max_bytes:
        largest = int(np.argmax(sizes))
        if any(edge % (2 * factors[largest]) for edge in trace.attention[largest].shape[2:]):
            break
        factors[largest] *= 2
        sizes[largest] //= 4
    return factors


def _attention_stacks(trace: QueryTrace, order: np.ndarray) -> Iterator[np.ndarray]:
    """One layer at a time: all of them in floating point would take hundreds of megabytes. [Q, 1 + heads, h, w] each"""
    yield np.zeros((len(order), 1, 1, 1), np.uint8)
    for weights, factor in zip(trace.attention, attention_pooling(trace), strict=True):
        # A sum of shares that all but makes a whole may be rounded to a little more than that.
        yield np.minimum(pool(with_mean(weights[order]), factor), 1)


def make_views(
    image: np.ndarray, trace: QueryTrace, order: np.ndarray, labels: Labels, width: int
) -> dict[str, MaskView]:
    """The large view of the masks, small ones of the mask before, the blocked area and the attention, and all queries.

    `stack` is the prediction, `index` the place in `order`, `channel` the head; 0 is the mean of the heads. Pictures of
    what the trace lacks are left out.
    """
    place = np.argsort(order)  # of each query in the order
    nothing = np.zeros((len(order), 1, 1), bool)
    smaller = [pooled(masks[order], SMALL_CELLS) for masks in trace.masks]
    common = {
        "num_channels": trace.num_heads + 1, "group": f"queries-{id(trace)}", "pick": place[trace.winners],
        "contour": 0.5,
    }  # fmt: skip
    small = common | {"width": (width - 18) // 2}
    hidden, grids = layer_captions(trace, order)
    views = {
        "mask": MaskView(
            image, list(trace.masks[:, order]), captions=mask_captions(trace, order, labels), width=width,
            title="What it predicts", help=HELP["mask"], unit="probability of belonging to the query", **common,
        ),
        "before": MaskView(
            image, [nothing, *smaller[:-1]], captions=before_captions(trace, order), title="What it predicted before",
            help=HELP["before"], unit="probability", **small,
        ),
    }  # fmt: skip
    if trace.blocked:
        views["blocked"] = MaskView(
            image, [nothing, *(blocked[order] for blocked in trace.blocked)], colors="blocked", smooth=False,
            captions=hidden, coverage=trace.coverage, words=("visible", "hidden"),
            title="What it may not see", help=HELP["blocked"], **small,
        )  # fmt: skip
    if trace.attention:
        views["attention"] = MaskView(
            image, _attention_stacks(trace, order), colors="heat", relative=True, smooth=False,
            captions=grids, coverage=trace.coverage, readout="{percent} of the attention",
            unit="of the attention, per cell", title="Where it looks", help=HELP["attention"],
            **small | {"contour": 0.0},
        )  # fmt: skip
    views["grid"] = MaskGrid(
        image, [pooled(masks, THUMBNAIL_CELLS) for masks in smaller], labels=grid_labels(trace, order, labels),
        orders=grid_orders(trace, order), width=2 * width, title="All queries", help=HELP["grid"],
    )  # fmt: skip
    return views
