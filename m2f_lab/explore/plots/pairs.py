"""Figures of pairs: the same thing before and after, or done right and wrong."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from m2f_lab.explore.plots.theme import PALETTE, SMALL, chart


def dumbbells(
    names: Sequence[str],
    pairs: Sequence[tuple[float, float]],
    ends: tuple[str, str],
    x: str,
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """One line per name, from its first value to its second.

    Args:
        names: drawn from top to bottom.
        pairs: two numbers each.
        ends: what the first and the second number are.
        x: label of the axis.
        title: says what to see.
        limit: right end of the axis.
    """
    figure, ax = chart(7.2, 1.0 + 0.36 * len(names), title)
    for row, (first, second) in enumerate(pairs):
        ax.plot([first, second], [row, row], color="0.75", linewidth=3, zorder=1, solid_capstyle="round")
    for end, color, marker, name in zip(zip(*pairs, strict=True), (PALETTE[0], PALETTE[1]), "os", ends, strict=True):
        ax.scatter(end, range(len(names)), s=48, color=color, marker=marker, label=name, zorder=2)
    reach = limit or max(max(pair) for pair in pairs) or 1.0
    for row, (_, second) in enumerate(pairs):
        ax.annotate(
            f"{second:.3g}", (second, row), (0, 6), textcoords="offset points", ha="center", fontsize=SMALL, zorder=3
        )
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.5, -0.7)
    ax.set_xlim(-0.02 * reach, 1.02 * reach)
    ax.set_xlabel(x)
    figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL, frameon=False)
    return figure
