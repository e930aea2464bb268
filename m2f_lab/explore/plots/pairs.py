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
    figure, ax = chart(7.2, 1.2 + 0.3 * len(names), title)
    for row, (first, second) in enumerate(pairs):
        ax.plot([first, second], [row, row], color="0.75", linewidth=3, zorder=1, solid_capstyle="round")
    for end, color, marker, name in zip(zip(*pairs, strict=True), (PALETTE[0], PALETTE[1]), "os", ends, strict=True):
        ax.scatter(end, range(len(names)), s=48, color=color, marker=marker, label=name, zorder=2)
    reach = limit or max(max(pair) for pair in pairs) or 1.0
    for row, (first, second) in enumerate(pairs):
        right_of = second >= first
        ax.text(
            second + (0.02 if right_of else -0.02) * reach, row, f"{second:.3g}", va="center", fontsize=SMALL,
            ha="left" if right_of else "right",
        )  # fmt: skip
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-0.08 * reach, 1.08 * reach)
    ax.set_xlabel(x)
    figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL, frameon=False)
    return figure
