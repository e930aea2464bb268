"""Two images of made-up predictions that can be counted by hand, and their biographies."""

from __future__ import annotations

import numpy as np
import torch

from m2f_lab.data import Classes
from m2f_lab.explore import Biographies, BiographyCollector
from m2f_lab.structures import MaskLogits, Output

CLASSES = Classes(("road", "sky", "car"), ((128, 64, 128), (70, 130, 180), (0, 0, 142)), frozenset({2}))
NONE = 3  # "no object"


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def cells(rows: slice, columns: slice, width: int = 8) -> np.ndarray:
    """A mask of 8 rows of cells."""
    mask = np.zeros((8, width), bool)
    mask[rows, columns] = True
    return mask


def some_output(*queries: tuple[tuple[int, int], np.ndarray]) -> Output:
    """Each query: its likeliest class and its second; its mask, a cell for 4 × 4 pixels."""
    logits = torch.zeros(1, len(queries), 4)
    for number, ((first, second), _) in enumerate(queries):
        logits[0, number, first] = 12 - number  # earlier queries are surer of their class
        logits[0, number, second] = 2
    masks = torch.from_numpy(np.stack([mask for _, mask in queries])[None] * 40.0 - 20.0).float()
    size = (4 * masks.shape[2], 4 * masks.shape[3])
    return Output([logits], [MaskLogits(torch.eye(len(queries))[None], masks)], size, size)


ALL, LEFT, RIGHT, TOP, BOTTOM = slice(None), slice(0, 4), slice(4, 8), slice(0, 4), slice(4, 8)
FIRST = some_output(
    ((0, 1), cells(ALL, LEFT)),  # wins 32 cells of road
    ((0, 1), cells(ALL, slice(0, 3))),  # less sure, and three quarters of the same: wins nothing
    ((1, 0), cells(TOP, RIGHT)),  # wins 16 cells of sky
    ((NONE, 2), cells(BOTTOM, RIGHT)),  # no object, but nobody else is there: wins 16 cells of car
    ((NONE, 2), cells(slice(0), ALL)),  # nowhere
)
SECOND = some_output(  # twice as wide
    ((0, 1), cells(ALL, slice(0, 8), 16)),  # wins 64 cells of road
    ((0, 1), cells(ALL, slice(0, 8), 16)),  # the same, less sure
    ((2, 0), cells(ALL, slice(8, 16), 16)),  # wins 64 cells of car
    ((2, 0), cells(ALL, slice(12, 16), 16)),  # half of that, less sure
    ((NONE, 2), cells(ALL, ALL, 16)),
)


def by_hand() -> Biographies:
    collector = BiographyCollector()
    collector.add(FIRST, grey(32, 32, 100))
    collector.add(SECOND, grey(32, 64, 200))
    return collector.result(CLASSES)
