"""Ledger of a pixel's score: every query's share of it, class by class.

Q queries, K classes, H/W height/width.

The semantic score of class k at a pixel is a sum over queries, p(class k | query) · p(pixel | query) (Mask2Former
follows MaskFormer, Cheng et al. 2021, section 3.4). A ledger lists the summands.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

from m2f_lab.inference.postprocess import mask_rows
from m2f_lab.inference.rows import Rows
from m2f_lab.structures import Output


@dataclass(frozen=True)
class Ledger:
    """One pixel's account.

    Attributes:
        x, y: the pixel.
        class_probabilities: of the last prediction, without "no object". float64 [Q, K]
        mask_probabilities: that the pixel belongs to the query's mask. float64 [Q]
    """

    x: int
    y: int
    class_probabilities: np.ndarray
    mask_probabilities: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Share of each query in the score of each class. [Q, K]"""
        return self.class_probabilities * self.mask_probabilities[:, None]

    @property
    def scores(self) -> np.ndarray:
        """The pixel's score for each class, as on the semantic map; they need not sum to one. [K]"""
        return self.shares.sum(axis=0)

    @property
    def label(self) -> int:
        """The class with the highest score: the one on the map."""
        return int(self.scores.argmax())

    def largest(self, count: int, label: int | None = None) -> np.ndarray:
        """The queries that give most to a class, by default to the winning one. [count]"""
        shares = self.shares[:, self.label if label is None else label]
        return np.argsort(-shares, kind="stable")[:count]


def mask_probability_rows(output: Output, index: int = 0, size: tuple[int, int] | None = None) -> Rows:
    """Mask probabilities of the last prediction at the size of the result, computed row by row. [Q, H, W]

    Resizing is linear, so resizing class scores, as `postprocess.semantic` does, is resizing these.

    Args:
        output: what the model returned.
        index: which image of the batch.
        size: height and width of the result; by default that of the image the model saw.
    """
    return mask_rows(output, index).map(torch.sigmoid).resized(output.image_size if size is None else size)


@torch.no_grad()
def ledger_at(
    output: Output, x: int, y: int, *, index: int = 0, size: tuple[int, int] | None = None, masks: Rows | None = None
) -> Ledger:
    """Open the account of a pixel.

    Args:
        output: what the model returned; only its last prediction is used.
        x, y: column and row, counted from the top left corner.
        index: which image of the batch.
        size: height and width of the result; by default that of the image the model saw.
        masks: of `mask_probability_rows` with the same arguments, where they were computed already.

    Raises:
        TypeError: x or y is no whole number.
        ValueError: the pixel is outside the image.
    """
    if not (isinstance(x, Integral) and isinstance(y, Integral)):
        raise TypeError(f"A pixel is a column and a row, both whole numbers, got ({x}, {y}).")
    masks = mask_probability_rows(output, index, size) if masks is None else masks
    height, width = masks.size
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"Pixel ({x}, {y}) is outside the image of {width} × {height} pixels; (0, 0) is its top left.")
    return Ledger(
        x=x,
        y=y,
        class_probabilities=output.class_logits[-1][index].double().softmax(-1)[:, :-1].cpu().numpy(),
        mask_probabilities=masks.read(y, y + 1)[:, 0, x].double().cpu().numpy(),
    )
