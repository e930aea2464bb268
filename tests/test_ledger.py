"""The pixel ledger: its rows are the summands of the score on the map."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_output import toy_output

from m2f_lab.data import Classes
from m2f_lab.explore import PixelExplorer
from m2f_lab.explore.pixels.explorer import note_of, read_maps
from m2f_lab.explore.pixels.ledger import ledger_at
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


def test_a_pixel_is_in_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"both whole numbers, got \(1.5, 2\)"):
        some_ledger().choose(1.5, 2)
    assert some_ledger().choose(*np.array([1, 2])).x == 1


def test_no_gradient_is_recorded() -> None:
    output = toy_output()
    output.class_logits[-1].requires_grad_()
    ledger = ledger_at(output, 1, 1)
    assert ledger.shares.dtype == np.float64
    assert torch.is_grad_enabled()


# ----------------------------------------------------------------------------------------------------------- the widget

CLASSES = Classes(("road", "sky", "tree", "car"), ((9, 9, 9), (0, 0, 200), (0, 200, 0), (200, 0, 0)), frozenset({3}))
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def some_ledger(**options) -> PixelExplorer:
    return PixelExplorer.from_output(toy_output(num_queries=12), IMAGE, classes=CLASSES, **options)


def test_the_maps_are_those_of_the_semantic_result() -> None:
    output = toy_output()
    size = (200, 150)
    expected = postprocess.semantic(output, size=size, return_scores=True)
    labels, scores = read_maps(postprocess.semantic_rows(output, size=size))
    assert np.array_equal(labels, expected.label_map)
    assert scores.shape == (4, 128, 128)
    assert np.array_equal(scores[:, 0, 0], expected.scores[:, 0, 0])  # cells of 1.6 × 1.2 pixels
    assert np.array_equal(scores[:, 64, 127], expected.scores[:, 100, 149])


def test_a_click_on_either_picture_is_answered() -> None:
    for name in ("map", "score"):
        tool = some_ledger()
        tool.views[name].set_state({"clicked": [30, 40]})
        note = tool.views["score"].notes[0][0]
        label = tool.label_map[40, 30]
        assert note["text"] == f"Pixel (30, 40): {CLASSES.names[label]}"
        assert tool.class_menu.value == label
        assert tool.views["map"].clicked == tool.views["score"].clicked == [30, 40]
        tool.views[name].set_state({"clicked": [31, 40]})
        assert tool.ledger.x == 31


def test_the_printed_rows_add_up_to_the_printed_sum() -> None:
    ledger = ledger_at(toy_output(num_queries=30), 7, 8)
    for count in (3, None):
        table = note_of(ledger, [(name, "") for name in CLASSES.names], count).table
        numbers = np.array([row[2:] for row in table.rows], float)
        np.testing.assert_allclose(numbers[:-1].sum(axis=0), numbers[-1], atol=0.00005 * len(numbers))
        np.testing.assert_allclose(numbers[-1], sorted(ledger.scores, reverse=True), atol=0.00006)
        assert table.marked == (len(numbers) - 1,)
    short = note_of(ledger, [(name, "") for name in CLASSES.names], 3).table
    assert [row[0] for row in short.rows[-2:]] == ["27 others together", "sum: the score on the map"]


def test_a_page_knows_a_grid_of_ledgers_and_leaves_the_tool_as_it_was(tmp_path) -> None:
    tool = some_ledger()
    tool.choose(10, 11)
    before = tool.views["score"].notes
    tool.save_html(tmp_path / "ledger.html")
    page = (tmp_path / "ledger.html").read_text()
    assert page.count("sum: the score on the map") == 400
    assert "Pixel (2, 1): " in page  # the middle of the first of 20 × 20 places on 96 × 64 pixels
    assert tool.views["score"].notes == before
    assert tool.views["score"].places == [1, 1]


def test_arrows_on_both_pictures_change_the_class() -> None:
    tool = some_ledger()
    links = {pair for links in tool._links for pair in links.pairs}
    for view in tool.views.values():
        assert (tool.class_menu, "index", view, "index") in links
        view.set_state({"index": len(tool.classes) - 1})


def test_figure_name_and_end() -> None:
    tool = some_ledger()
    assert repr(tool) == "PixelExplorer(12 queries, 96 × 64 pixels)"
    assert "pixel (48, 32)" in tool.figure().axes[0].get_title()
    tool.choose(5, 6)
    assert "pixel (5, 6)" in tool.figure().axes[0].get_title()
    assert "image/png" in tool._repr_mimebundle_()
    tool.close()
    assert tool.views == {}


def test_classes_that_are_not_known_get_names_and_colours() -> None:
    tool = PixelExplorer.from_output(toy_output(), IMAGE)
    tool.choose(0, 0)
    assert "class " in tool.views["score"].notes[0][0]["text"]
    with pytest.raises(ValueError, match="predicts 6 classes, but there are 4 class names"):
        PixelExplorer.from_output(toy_output(num_classes=6), IMAGE, classes=CLASSES)


def test_outputs_of_training_and_of_nan() -> None:
    output = toy_output()
    output.class_logits[-1].requires_grad_()
    assert PixelExplorer.from_output(output, IMAGE).choose(3, 4).label in range(4)
    output.class_logits[-1].detach()[0, 2] = np.nan
    with pytest.raises(ValueError, match="class logits of prediction 4 hold NaN"):
        PixelExplorer.from_output(output, IMAGE)
