"""Pictures and words of the matcher's decision: agreement of masks, the cost matrix, captions and tables.

L predictions, Q queries, T segments, h/w of a grid over the image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from m2f_lab.data import Classes
from m2f_lab.explore.matching.trace import NONE, MatchedMasks, MatchingTrace
from m2f_lab.explore.parts.drawing import heat, label_table
from m2f_lab.explore.parts.labels import percent, when
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.reading import kept_share
from m2f_lab.explore.parts.table import Caption, Table

HELP = {
    "layer": "Decoder layers refine the queries one after the other. 0: the learned queries, before any layer. n: "
    "after n layers. Each of these predictions is matched by itself.",
    "segment": "A segment of the ground truth. Matching gives each one a query, which is trained to become it.",
    "matrix": "The cost of every pair of a segment (row) and a query (column), compared with the cheapest query of "
    "the segment: the brighter, the cheaper. The matcher gives every segment a query of its own so that the costs of "
    "all pairs add up to the least (Hungarian method). Click a cell to lay that query over that segment.",
    "sum": "The cost that is minimised, or one of its terms alone.",
    "cost": "The sum of all terms, which the matcher minimises over all segments together.",
    "margin": "By how much the least total cost of all segments would rise if this segment could not have its query.",
    "runner-up": "The query that the segment would get then.",
    "choice": "The segment and the mask of the query that the matcher gave to it.",
    "rival": "The segment and the mask of another query: the runner-up, or the one whose cell was clicked.",
    "checkpoint": "The same image and the same points, matched with the weights of another moment of training.",
}
TERM_HELP = {
    "class": "Cost of the class: minus the probability that the query gives the segment's class, times its weight.",
    "mask": "Cost of the mask: binary cross-entropy of its pixels, averaged over random points, times its weight.",
    "dice": "Cost of the mask: 1 minus twice the overlap by the sum of both areas, times its weight.",
}

# Values of `MatchedMasks.agreement` and their colours (Okabe and Ito 2008).
PARTS = Classes(("both", "only the segment", "only the query"), ((0, 158, 115), (86, 180, 233), (213, 94, 0)))
CHOICE, RUNNER_UP = ("the choice", "#0072B2"), ("the runner-up", "#CC79A7")

_OUTSIDE, _CURSOR, _TOP = 254, 255, 253  # values of the matrix picture: no cell, the chosen row, the dearest cell
_LABEL, _ROW = 150, 22  # width of the names and height of a row, in pixels
_DOT = 0.02


def matrices(trace: MatchingTrace) -> tuple[str, ...]:
    """Names of the cost matrices, by channel of the picture."""
    return "sum", *trace.terms


def cost_table() -> np.ndarray:
    """Cheap is bright, dear is dark; names shine through the mark of the chosen row. uint8 [256, 4]

    Colours follow the square root, so that what is nearly the cheapest can be told apart beside what is far from it.
    """
    table = np.zeros((256, 4), np.uint8)
    steps = np.rint(255 * np.sqrt(np.arange(_TOP + 1) / _TOP)).astype(int)
    table[: _TOP + 1, :3] = heat()[255 - steps, :3]
    table[: _TOP + 1, 3] = 255
    table[_CURSOR] = (230, 159, 0, 110)
    return table


class MatrixLayout:
    """Geometry of the picture of the cost matrix: a row of query numbers, then one row per segment.

    Attributes:
        cell: width of a cell in pixels.
        margin: cells that the names of the segments take.
    """

    def __init__(self, names: list[str], num_queries: int) -> None:
        self.names, self.num_queries = names, num_queries
        self.cell = int(np.clip(840 // num_queries, 4, 40))
        self.margin = -(-_LABEL // self.cell)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cells, names and numbers included."""
        return len(self.names) + 1, self.margin + self.num_queries

    def canvas(self) -> np.ndarray:
        """Names and numbers on white. uint8 [H, W, 3]"""
        rows, columns = self.shape
        picture = Image.new("RGB", (columns * self.cell, rows * _ROW), "white")
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
        for row, name in enumerate(self.names, start=1):
            shorter = (name[:length] + "…" for length in range(len(name) - 1, -1, -1))
            fits = (text for text in (name, *shorter) if draw.textlength(text, font) <= self.margin * self.cell - 12)
            draw.text((6, row * _ROW + 3), next(fits), "#1f2328", font)
        every = next(step for step in (1, 2, 5, 10) if step * self.cell >= 24)
        for query in range(0, self.num_queries, every):
            x = (self.margin + query + 0.5) * self.cell
            draw.text((x, 4), str(query), "#57606a", font, anchor="ma")
        draw.text((6, 3), "segment \\ query", "#57606a", font)
        return np.array(picture)

    def cell_at(self, x: int, y: int) -> tuple[int | None, int | None]:
        """Segment and query at a pixel; None outside of the rows or the columns."""
        segment, query = y // _ROW - 1, x // self.cell - self.margin
        return (segment if segment >= 0 else None), (query if query >= 0 else None)

    def center(self, segment: int, query: int) -> tuple[float, float]:
        """(x, y) in 0…1 of the picture."""
        rows, columns = self.shape
        return (self.margin + query + 0.5) / columns, (segment + 1.5) / rows

    def pick(self) -> np.ndarray:
        """The segment of every cell. [rows, columns]"""
        rows, columns = self.shape
        return np.repeat(np.maximum(np.arange(rows) - 1, 0)[:, None], columns, axis=1)


def matrix_stacks(trace: MatchingTrace, layout: MatrixLayout) -> tuple[list[np.ndarray], np.ndarray]:
    """The costs as cells: the rise over the segment's cheapest query.

    Returns:
        L × uint8 [T, terms, rows, columns], of which mask t marks row t; and what a value of 255 stands for, float32
        [L, T, terms].
    """
    tables = np.stack([trace.cost, *trace.terms.values()], axis=1).swapaxes(2, 3)  # (L, 4, T, Q)
    above = tables - tables.min(axis=3, keepdims=True)
    span = above.max(axis=(2, 3))  # (L, 4)
    cells = np.rint(above * (_TOP / np.maximum(span, 1e-12))[:, :, None, None]).astype(np.uint8)
    num_segments = trace.num_segments
    stacks = []
    for layer in cells:
        stack = np.full((num_segments, tables.shape[1], *layout.shape), _OUTSIDE, np.uint8)
        stack[:, :, 1:, layout.margin :] = layer
        for segment in range(num_segments):
            stack[segment, :, segment + 1, : layout.margin] = _CURSOR
        stacks.append(stack)
    return stacks, np.repeat((span * (255 / _TOP))[:, None], num_segments, axis=1).astype("<f4")


def matrix_marks(trace: MatchingTrace, layout: MatrixLayout) -> np.ndarray:
    """A dot on every choice and on every runner-up. [1, 1, L, terms - 1, 2 T, 3]"""
    dots = np.zeros((trace.num_predictions, 2, trace.num_segments, 3))
    for place in np.ndindex(dots.shape[:3]):
        prediction, kind, segment = place
        query = (trace.chosen, trace.runner_up)[kind][prediction, segment]
        dots[place] = (-1, -1, 0) if query == NONE else (*layout.center(segment, query), _DOT)
    flat = dots.reshape(trace.num_predictions, -1, 3)
    return np.repeat(flat[None, None, :, None], len(trace.terms), axis=3)


def make_views(
    image: np.ndarray, trace: MatchingTrace, masks: MatchedMasks, layout: MatrixLayout, width: int
) -> dict[str, MaskView]:
    """Two pictures of a query over its segment, still empty, and the cost matrix below them.

    `stack` is the prediction, `index` the segment, and the matrix's `channel` the term, one of `matrices`.
    """
    empty = np.full((trace.num_segments, *masks.segments.shape[1:]), 255, np.uint8)
    last = trace.num_predictions - 1
    common = {"colors": label_table(PARTS), "names": PARTS.names, "width": width, "opacity": 1.0, "stack": last,
              "num_channels": len(matrices(trace)), "group": f"matching-{id(trace)}"}  # fmt: skip
    canvas = layout.canvas()
    x, y = layout.center(0, 0)
    return {
        "choice": MaskView(image, [empty] * trace.num_predictions, help=HELP["choice"], **common),
        "rival": MaskView(image, [empty] * trace.num_predictions, help=HELP["rival"], **common),
        "matrix": MaskView(
            canvas, matrix_stacks(trace, layout)[0], colors=cost_table(), smooth=False, opacity=1.0, stack=last,
            pick=layout.pick(), clicked=[int(x * canvas.shape[1]), int(y * canvas.shape[0])], width=canvas.shape[1],
            title="What each query would cost each segment", help=HELP["matrix"],
            readout="{value} above the cheapest", coordinates=False, unit="above the cheapest query of the segment",
        ),
    }  # fmt: skip


def show_matrix(view: MaskView, trace: MatchingTrace, layout: MatrixLayout) -> None:
    """Fill the picture of the cost matrix."""
    stacks, scales = matrix_stacks(trace, layout)
    with view.hold_sync():
        view.masks = b"".join(stack.tobytes() for stack in stacks)
        view.scales = scales.tobytes()
        view.set_marks(matrix_marks(trace, layout), [CHOICE, RUNNER_UP])


def show_agreement(
    view: MaskView, masks: MatchedMasks, queries: np.ndarray, captions: list[list[Caption]], title: str
) -> None:
    """Lay queries over their segments. queries: [L, T]"""
    with view.hold_sync():
        view.title = title
        view.masks = masks.agreement(queries).tobytes()
        view.set_captions(captions)


# ---------------------------------------------------------------------------------------------------------- in words


def segment_names(trace: MatchingTrace, labels: list[tuple[str, str]]) -> list[str]:
    return [f"{segment} {labels[label][0]}" for segment, label in enumerate(trace.labels.tolist())]


def margin_in_words(trace: MatchingTrace, prediction: int, segment: int) -> str:
    """The query that would get a segment in place of its own, and the rise of the total cost."""
    query, rival = (int(queries[prediction, segment]) for queries in (trace.chosen, trace.runner_up))
    margin, moved = trace.margin[prediction, segment], int(trace.moved[prediction, segment])
    if query == NONE:
        return f"No query is left for it: there are {trace.num_segments} segments and {trace.num_queries} queries."
    if np.isinf(margin):
        return f"Query {query} is the only query; no other could get it."
    others = "" if moved == 0 else f", and {moved} other segment{'s' * (moved > 1)} would change queries"
    if rival == NONE:
        return f"Without query {query} it would get none{others}; the total cost would rise by {margin:.3f}."
    return f"Without query {query}, query {rival} would get it{others}; the total cost would rise by {margin:.3f}."


def _numbers(trace: MatchingTrace, prediction: int, query: int, segment: int) -> tuple[str, ...]:
    terms = [*trace.terms.values(), trace.cost]
    return tuple(f"{costs[prediction, query, segment]:.3f}" for costs in terms)


def choice_captions(trace: MatchingTrace, names: list[str]) -> list[list[Caption]]:
    """The query that got a segment, and the cheapest candidates with their terms. L × T"""
    terms = ((term, TERM_HELP.get(term, f"Cost “{term}” of the matcher, times its weight.")) for term in trace.terms)
    header = (("query", ""), *terms, ("cost", HELP["cost"]), ("", ""))

    def caption(prediction: int, segment: int) -> Caption:
        query, rival = (queries[prediction, segment] for queries in (trace.chosen, trace.runner_up))
        order = trace.candidates(prediction, segment)
        words = {query: "choice", rival: "runner-up"}
        rows = tuple((f"{q}", *_numbers(trace, prediction, q, segment), words.get(q, "")) for q in order)
        got = f"query {query}" if query != NONE else "no query"
        return Caption(
            text=f"{when(prediction).capitalize()}: segment {names[segment]} got {got}.",
            table=Table(header, rows, tuple(i for i, q in enumerate(order) if q == query)),
        )

    return [[caption(p, segment) for segment in range(trace.num_segments)] for p in range(trace.num_predictions)]


def rival_captions(trace: MatchingTrace, other: int | None) -> list[list[Caption]]:
    """The margin of a segment, and its queries by prediction; `other` is laid over it, or the runner-up. L × T"""
    header = (
        ("layer", HELP["layer"]), ("query", HELP["choice"]), ("cost", HELP["cost"]),
        ("runner-up", HELP["runner-up"]), ("margin", HELP["margin"]),
    )  # fmt: skip

    def rows(segment: int) -> tuple[tuple[str, ...], ...]:
        predictions, chosen = np.arange(trace.num_predictions), trace.chosen[:, segment]
        costs = np.where(chosen == NONE, np.nan, trace.cost[predictions, chosen, segment])
        rivals, margins = trace.runner_up[:, segment], trace.margin[:, segment]
        formats = (str, format_query, format_number, format_query, format_number)
        rows = zip(predictions, chosen, costs, rivals, margins, strict=True)
        return tuple(tuple(f(value) for f, value in zip(formats, row, strict=True)) for row in rows)

    histories = [rows(segment) for segment in range(trace.num_segments)]

    def caption(prediction: int, segment: int) -> Caption:
        text = margin_in_words(trace, prediction, segment)
        if other is not None:
            *_, cost = _numbers(trace, prediction, other, segment)
            text = f"Query {other} would cost {cost} here. {text}"
        return Caption(text=text, table=Table(header, histories[segment], (prediction,)))

    return [[caption(p, segment) for segment in range(trace.num_segments)] for p in range(trace.num_predictions)]


def format_query(query: int) -> str:
    return "–" if query == NONE else str(query)


def format_number(number: float) -> str:
    return "–" if np.isnan(number) else "∞" if np.isinf(number) else f"{number:.3f}"


def over_training(traces: dict[str, MatchingTrace], prediction: int, names: list[str]) -> str:
    """A table: the query of each segment in one prediction, checkpoint by checkpoint; changes are bold. HTML"""
    queries = np.stack([trace.chosen[prediction] for trace in traces.values()])  # (N, T)
    kept = ["", *(percent(share) if share == share else "–" for share in kept_share(queries))]
    changed = tuple((row + 1, segment + 1) for row, segment in np.argwhere(queries[1:] != queries[:-1]).tolist())
    table = Table(
        header=tuple((name, "") for name in ("checkpoint", *names, "kept their query")),
        rows=tuple((n, *map(format_query, row), k) for n, row, k in zip(traces, queries, kept, strict=True)),
        bold=changed,
    )
    return f"<b>Query of each segment over training, {when(prediction)}</b>{table._repr_html_()}"
