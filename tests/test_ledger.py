"""The pixel ledger: its rows are the summands of the score on the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_output import toy_output

from m2f_lab.explore.ledger import ledger_at
from m2f_lab.inference import postprocess


@pytest.mark.parametrize("size", [None, (64, 96), (50, 131), (17, 20)], ids=str)
def test_rows_add_up_to_the_score_on_the_map(size: tuple[int, int] | None) -> None:
    output = toy_output(image_size=(61, 75), num_queries=9, num_classes=6)
    prediction = postprocess.semantic(output, size=size, return_scores=True)
    height, width = prediction.label_map.shape
    corners_and_more = [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1), (width // 2, height // 3)]
    for x, y in corners_and_more:
        ledger = ledger_at(output, x, y, size=size)
        assert ledger.shares.shape == (9, 6)
        np.testing.assert_allclose(ledger.shares.sum(axis=0), prediction.scores[:, y, x], atol=1e-6, rtol=0)
        assert ledger.label == prediction.label_map[y, x]


def test_a_share_is_class_probability_times_mask_probability() -> None:
    """By hand, at a pixel of a resized mask: the logits of the four cells around it are mixed before the sigmoid."""
    output = toy_output(image_size=(32, 32), num_queries=2, num_classes=3)
    logits = output.masks[-1].dense()[0]  # (2, 8, 8), four pixels a cell
    x, y = 13, 6  # centres at (13.5, 6.5) / 4 - 0.5 = 2.875 and 1.125 cells
    mixed = 0.125 * (0.875 * logits[:, 1, 2] + 0.125 * logits[:, 2, 2]) + 0.875 * (
        0.875 * logits[:, 1, 3] + 0.125 * logits[:, 2, 3]
    )
    expected = output.class_logits[-1][0].softmax(-1)[:, :3] * mixed.sigmoid()[:, None]
    np.testing.assert_allclose(ledger_at(output, x, y).shares, expected.numpy(), atol=1e-6)


def test_the_largest_shares_come_first() -> None:
    ledger = ledger_at(toy_output(num_queries=7), 3, 4)
    for label in (None, 0, 3):
        column = ledger.shares[:, ledger.label if label is None else label]
        assert column[ledger.largest(7, label)].tolist() == sorted(column.tolist(), reverse=True)
    assert len(ledger.largest(3)) == 3


def test_each_image_of_a_batch_has_its_own() -> None:
    output = toy_output(batch=2)
    scores = postprocess.semantic(output, index=1, return_scores=True).scores
    np.testing.assert_allclose(ledger_at(output, 5, 6, index=1).scores, scores[:, 6, 5], atol=1e-6)


@pytest.mark.parametrize(("x", "y"), [(-1, 0), (96, 0), (0, 64)])
def test_a_pixel_outside_is_named(x: int, y: int) -> None:
    with pytest.raises(ValueError, match=rf"Pixel \({x}, {y}\) is outside the image of 96 × 64 pixels"):
        ledger_at(toy_output(), x, y)


def test_no_gradient_is_recorded() -> None:
    output = toy_output()
    output.class_logits[-1].requires_grad_()
    ledger = ledger_at(output, 1, 1)
    assert ledger.shares.dtype == np.float64
    assert torch.is_grad_enabled()
