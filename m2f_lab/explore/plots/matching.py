"""The figure of the matcher's decision.

L predictions, Q queries, T segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m2f_lab.explore.parts.labels import percent
from m2f_lab.explore.parts.reading import kept_share
from m2f_lab.explore.plots.theme import HEAT, PALETTE, SMALL, TITLE, NotebookFigure, dress

CHOICE, RUNNER_UP = PALETTE[5], PALETTE[4]


def matching(
    terms: Mapping[str, np.ndarray],
    chosen: np.ndarray,
    runner_up: np.ndarray,
    margin: np.ndarray,
    segments: Sequence[str],
    prediction: int,
    title: str = "",
) -> Figure:
    """Costs of queries for segments, term by term, with choice and runner-up; the margins; and the choice over layers.

    Only the queries that are somebody's choice or runner-up are shown.

    Args:
        terms: of the cost. {term: [L, Q, T]}
        chosen, runner_up: the query of each segment; -1 where there is none. [L, T]
        margin: infinite or NaN where there is none. [L, T]
        segments: names. T × str
        prediction: the one whose costs are shown.
        title: over everything.
    """
    num_predictions, num_segments = chosen.shape
    queries = np.unique(np.concatenate([chosen[prediction], runner_up[prediction]]))
    queries = queries[queries >= 0]
    widths = [max(1.6, 0.22 * len(queries))] * len(terms) + [1.6, max(2.0, 0.36 * num_predictions)]
    size = (sum(widths) + 1.6, 1.3 + 0.26 * num_segments)
    figure = NotebookFigure(figsize=size, layout="constrained", dpi=90)
    axes = figure.subplots(1, len(terms) + 2, squeeze=False, width_ratios=widths)[0]
    if title:
        figure.suptitle(title, fontsize=TITLE + 1)
    for ax, (name, costs) in zip(axes, terms.items(), strict=False):
        shown = ax.imshow(costs[prediction][queries].T, aspect="auto", cmap=f"{HEAT}_r", interpolation="nearest")
        _mark(ax, queries, chosen[prediction], "o", CHOICE, "choice")
        _mark(ax, queries, runner_up[prediction], "D", RUNNER_UP, "runner-up")
        ax.set_xticks(range(len(queries)), queries, fontsize=SMALL, rotation=90 if len(queries) > 8 else 0)
        ax.set_xlabel("query", fontsize=SMALL)
        ax.set_title(f"{name} cost", fontsize=TITLE)
        figure.colorbar(shown, ax=ax, shrink=0.8).ax.tick_params(labelsize=SMALL)
    _margins(axes[-2], margin[prediction])
    _over_layers(axes[-1], chosen, prediction)
    for i, ax in enumerate(axes):
        ax.set_yticks(range(num_segments), segments if i == 0 else [""] * num_segments, fontsize=SMALL)
        ax.set_ylim(num_segments - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _mark(ax: Axes, queries: np.ndarray, of_segments: np.ndarray, marker: str, color: str, label: str) -> None:
    """A mark in every segment's row, at its query."""
    rows = np.flatnonzero(of_segments >= 0)
    columns = np.searchsorted(queries, of_segments[rows])
    ax.scatter(columns, rows, s=34, marker=marker, facecolors=color, edgecolors="white", linewidths=1.0, label=label)


def _margins(ax: Axes, margin: np.ndarray) -> None:
    """Bars; "–" where there is no margin."""
    dress(ax)
    lengths = np.where(np.isfinite(margin), margin, 0.0)
    ax.barh(range(len(margin)), lengths, color=PALETTE[0], height=0.6)
    for row, (length, value) in enumerate(zip(lengths, margin, strict=True)):
        ax.text(length, row, f" {value:.2g}" if np.isfinite(value) else " –", va="center", fontsize=SMALL)
    ax.set_xlim(0, 1.3 * (lengths.max() or 1.0))
    ax.set_xlabel("total cost", fontsize=SMALL)
    ax.set_title("margin", fontsize=TITLE)


def _over_layers(ax: Axes, chosen: np.ndarray, prediction: int) -> None:
    """The number of each segment's query in every prediction; shaded where it is the one of the last prediction."""
    same = (chosen == chosen[-1]) & (chosen >= 0)
    ax.imshow(np.where(same, 0.25, 0.0).T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    for (layer, segment), query in np.ndenumerate(chosen):
        look = {"fontsize": SMALL, "fontweight": "bold" if layer == prediction else "normal"}
        ax.text(layer, segment, "–" if query < 0 else str(query), ha="center", va="center", **look)
    kept = ["", *("–" if np.isnan(share) else percent(share) for share in kept_share(chosen))]
    ax.set_xticks(range(len(chosen)), [f"{layer}\n{share}" for layer, share in enumerate(kept)], fontsize=SMALL)
    ax.set_xlabel("layer\n(share that kept its query)", fontsize=SMALL)
    ax.set_title("query by layer", fontsize=TITLE)
