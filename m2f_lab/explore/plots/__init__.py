"""Figures from arrays: every picture of the notebooks, and the static side of every tool.

Each function takes numpy arrays and returns a `matplotlib.figure.Figure`, which a notebook shows as the last value of
a cell and `figure.savefig("name.pdf")` writes as vectors. pyplot is not used: it keeps figures alive in the kernel and
is not safe in threads. Colours come from palettes that colour-blind readers can tell apart.

Q queries, K classes, T segments, S sampling points, H/W height/width.
"""

from matplotlib.figure import Figure

from m2f_lab.explore.plots.charts import bars, confusion, curves, dumbbells, losses_per_prediction, matrices
from m2f_lab.explore.plots.matching import matching
from m2f_lab.explore.plots.pictures import (
    attention,
    comparison_rows,
    heat_over_image,
    images,
    label_change,
    masks,
    pixel_ledger,
    segmentation,
)
from m2f_lab.explore.plots.runs import compared_runs, learning_curves, training_progress
from m2f_lab.explore.plots.sampling import sampling_panels, sampling_points
from m2f_lab.explore.plots.theme import PALETTE

__all__ = [
    "PALETTE",
    "Figure",
    "attention",
    "bars",
    "compared_runs",
    "comparison_rows",
    "confusion",
    "curves",
    "dumbbells",
    "heat_over_image",
    "images",
    "label_change",
    "learning_curves",
    "losses_per_prediction",
    "masks",
    "matching",
    "matrices",
    "pixel_ledger",
    "sampling_panels",
    "sampling_points",
    "segmentation",
    "training_progress",
]
