"""Figures hold what they were given: pictures, titles, legends, bars and lines; and none of them needs pyplot."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from m2f_lab.data import Classes, colorize, overlay
from m2f_lab.data.colors import difference, perceived
from m2f_lab.explore import plots
from m2f_lab.explore.parts.labels import percent

CLASSES = Classes(
    names=("road", "sky", "car", "tree"),
    colors=((128, 64, 128), (70, 130, 180), (0, 0, 142), (107, 142, 35)),
    things=frozenset({2}),
)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (24, 40, 3), dtype=np.uint8)
TRUTH = RNG.choice(np.array([0, 2, 255], np.uint8), (24, 40))
PREDICTION = RNG.choice(np.array([0, 1], np.uint8), (24, 40))
MASKS = RNG.random((3, 6, 10))


def shown(ax) -> list[np.ndarray]:
    """The arrays of all pictures in an axes, the lowest first."""
    return [np.asarray(image.get_array()) for image in ax.images]


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def legend(figure: Figure) -> dict[str, tuple]:
    (only,) = figure.legends
    faces = [handle.get_facecolor()[:3] for handle in only.legend_handles]
    return dict(zip((text.get_text() for text in only.get_texts()), faces, strict=True))


def covers(image, picture: np.ndarray) -> bool:
    """Whether a map lies exactly over a picture, edge on edge."""
    left, right, bottom, top = image.get_extent()
    return (left, right, bottom, top) == (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)


def test_pictures_stand_side_by_side_as_they_are() -> None:
    figure = plots.images({"picture": IMAGE, "map": MASKS[0]})
    assert titles(figure) == ["picture", "map"]
    np.testing.assert_array_equal(shown(figure.axes[0])[0], IMAGE)
    np.testing.assert_array_equal(shown(figure.axes[1])[0], MASKS[0])
    rows = plots.images({str(i): IMAGE for i in range(5)}, columns=2)
    assert len(rows.axes) == 6
    assert len([ax for ax in rows.axes if ax.images]) == 5
    assert not any(ax.axison for ax in rows.axes)
    assert rows.axes[4].get_subplotspec().rowspan.start == 2


def test_segmentation_lies_over_the_image_and_names_what_occurs() -> None:
    figure = plots.segmentation(IMAGE, {"truth": TRUTH, "prediction": PREDICTION}, CLASSES, opacity=0.4)
    assert titles(figure) == ["image", "truth", "prediction"]
    np.testing.assert_array_equal(shown(figure.axes[0])[0], IMAGE)
    expected = overlay(IMAGE, TRUTH, CLASSES, 0.4)
    expected[TRUTH == 255] = 0
    np.testing.assert_array_equal(shown(figure.axes[1])[0], expected)
    np.testing.assert_array_equal(shown(figure.axes[2])[0], overlay(IMAGE, PREDICTION, CLASSES, 0.4))
    entries = legend(figure)
    assert list(entries) == ["road", "sky", "car"]  # no tree, nothing for 255
    np.testing.assert_allclose(entries["sky"], np.array(CLASSES.colors[1]) / 255)


def test_an_image_without_labels_has_an_empty_legend() -> None:
    assert legend(plots.segmentation(IMAGE, {"truth": np.full((24, 40), 255, np.uint8)}, CLASSES)) == {}


def test_rows_compare_image_truth_and_prediction() -> None:
    tall = IMAGE[:, :12], TRUTH[:, :12], PREDICTION[:, :12]
    figure = plots.comparison_rows([(IMAGE, TRUTH, PREDICTION), tall], CLASSES, width=2.0)
    assert titles(figure) == ["image", "truth", "prediction"]  # over the first row only
    assert len(figure.axes) == 6
    for i, (image, truth, prediction) in enumerate([(IMAGE, TRUTH, PREDICTION), tall]):
        pictures = [shown(ax)[0] for ax in figure.axes[3 * i : 3 * i + 3]]
        np.testing.assert_array_equal(pictures[0], image)
        np.testing.assert_array_equal(pictures[1], colorize(truth, CLASSES))
        np.testing.assert_array_equal(pictures[2], colorize(prediction, CLASSES))
    assert list(legend(figure)) == ["road", "sky", "car"]
    figure.draw_without_rendering()
    wide, narrow = (figure.axes[i].get_window_extent() for i in (0, 3))
    assert narrow.height / wide.height == pytest.approx(40 / 12, rel=0.1)  # a row is as high as its image
    assert narrow.width == pytest.approx(wide.width, rel=0.1)


def test_masks_leave_their_area_bright() -> None:
    figure = plots.masks(IMAGE, MASKS, ["one", "two", "three"], columns=2)
    assert titles(figure) == ["one", "two", "three"]
    for ax, mask in zip(figure.axes, MASKS, strict=False):
        picture, veil = shown(ax)
        np.testing.assert_array_equal(picture, IMAGE)
        assert covers(ax.images[1], IMAGE)
        np.testing.assert_array_equal(veil[..., :3], 0)
        np.testing.assert_allclose(veil[..., 3], 0.85 * (1 - mask), rtol=1e-6)


def test_masks_want_a_caption_each() -> None:
    with pytest.raises(ValueError):
        plots.masks(IMAGE, MASKS, ["one", "two"])


def test_attention_shows_mask_allowed_cells_weights_and_new_mask() -> None:
    blocked = MASKS[0] > 0.5
    figure = plots.attention(IMAGE, MASKS[0], blocked, MASKS[1], MASKS[2], "query 3, layer 1")
    assert figure.get_suptitle() == "query 3, layer 1"
    assert titles(figure) == ["mask before the layer", "allowed cells", "attention weights", "mask after the layer"]
    layers = [shown(ax)[1] for ax in figure.axes]
    np.testing.assert_allclose(layers[0][..., 3], 0.85 * (1 - MASKS[0]), rtol=1e-6)
    np.testing.assert_allclose(layers[1][..., 3], np.where(blocked, 0.85, 0), rtol=1e-6)  # dark where it may not look
    np.testing.assert_allclose(layers[2], MASKS[1] / MASKS[1].max())
    np.testing.assert_allclose(layers[3][..., 3], 0.85 * (1 - MASKS[2]), rtol=1e-6)
    assert all(covers(ax.images[1], IMAGE) for ax in figure.axes)
    assert figure.axes[1].images[1].get_interpolation() == "nearest"  # cells have edges


def test_heat_is_scaled_map_by_map() -> None:
    figure = plots.heat_over_image(IMAGE, {"a": MASKS[0], "b": 1000 * MASKS[0], "nothing": np.zeros((3, 5))})
    assert titles(figure) == ["a", "b", "nothing"]
    a, b, nothing = (shown(ax)[1] for ax in figure.axes)
    assert a.max() == 1
    np.testing.assert_allclose(a, b)
    assert not nothing.any()
    assert figure.axes[0].images[1].get_clim() == (0, 1)


def test_sampling_points_are_pixels_with_areas_by_weight() -> None:
    points, weights = RNG.random((2, 3, 4, 2)), RNG.random((2, 3, 4))
    weights /= weights.sum((1, 2), keepdims=True)
    (ax,) = plots.sampling_points(IMAGE, np.array([0.25, 0.5]), points, weights, "where").axes
    assert ax.get_title() == "where"
    assert len(ax.collections) == 3
    for level, dots in enumerate(ax.collections):
        np.testing.assert_allclose(dots.get_offsets(), points[:, level].reshape(-1, 2) * (40, 24))
        np.testing.assert_allclose(dots.get_sizes(), 10 + 1500 * weights[:, level].reshape(-1))
    shares = weights.sum((0, 2)) / 2
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [f"stride {s}: {percent(share)}" for s, share in zip((32, 16, 8), shares, strict=True)]
    (cross,) = ax.lines
    assert cross.get_xydata().tolist() == [[10.0, 12.0]]


def test_curves_are_labelled_lines() -> None:
    (ax,) = plots.curves({"a": ([0, 1, 2], [3, 2, 1]), "b": ([0, 2], [1, 1])}, "iteration", "loss", "falling").axes
    assert [line.get_label() for line in ax.lines] == ["a", "b"]
    assert ax.lines[0].get_xydata().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("iteration", "loss", "falling")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    (alone,) = plots.curves({"only": ([0, 1], [1, 2])}, "x", "y").axes
    assert alone.get_legend() is None


def test_learning_curves_read_rows_of_metrics() -> None:
    steps = [
        {"iteration": i, "loss": 9.0 - i, "class": 1.0, "mask": 0.5, "dice": 0.7, "learning_rate": 1e-4}
        for i in range(4)
    ]
    figure = plots.learning_curves(steps, [{"iteration": 2, "mIoU": 40.0}, {"iteration": 3, "mIoU": 55.0}], "my run")
    loss, terms, quality, rate = figure.axes
    assert figure.get_suptitle() == "my run"
    assert loss.lines[0].get_xydata().tolist() == [[0, 9], [1, 8], [2, 7], [3, 6]]
    assert [line.get_label() for line in terms.lines] == ["class", "mask", "dice"]
    assert quality.lines[0].get_xydata().tolist() == [[2, 40], [3, 55]]
    assert quality.get_ylim() == (0, 100)
    assert set(rate.lines[0].get_ydata()) == {1e-4}


def test_learning_curves_of_a_run_that_has_just_begun() -> None:
    for steps in ([], [{"iteration": 0, "loss": 1.0}]):
        figure = plots.learning_curves(steps)
        assert len(figure.axes) == 4
        figure.draw_without_rendering()


def test_learning_curves_average_the_terms_of_all_predictions() -> None:
    row = {"iteration": 5, "loss": 1.0, "0.class": 1.0, "1.class": 3.0, "0.mask": 0.5, "1.mask": 0.5, "0.dice": 4.0}
    terms = plots.learning_curves([row]).axes[1]
    assert [line.get_ydata().tolist() for line in terms.lines] == [[2.0], [0.5], [4.0]]


def test_learning_curves_draw_a_term_of_any_name() -> None:
    rows = [
        {"iteration": 1, "loss": 1.0, "0.class": 1.0},
        {"iteration": 2, "loss": 1.0, "0.class": 1.0, "0.boundary": 3.0},
    ]
    terms = plots.learning_curves(rows).axes[1]
    assert [line.get_label() for line in terms.lines] == ["class", "boundary"]
    assert np.isnan(terms.lines[1].get_ydata()[0])
    assert terms.lines[1].get_ydata()[1] == 3.0


def test_losses_of_any_name_stand_side_by_side_without_overlap() -> None:
    terms = ("class", "mask", "dice", "boundary")
    losses = {f"{i}.{term}": 1.0 for i in range(2) for term in terms} | {"1.denoising": 5.0, "total": 9.0}
    (ax,) = plots.losses_per_prediction(losses).axes
    assert [container.get_label() for container in ax.containers] == [*terms, "denoising"]
    bars = sorted((bar.get_x(), bar.get_width()) for container in ax.containers for bar in container)
    assert len(bars) == 9
    assert all(left + width <= right for (left, width), (right, _) in pairwise(bars))


def test_losses_stand_by_prediction_and_term() -> None:
    losses = {f"{i}.{term}": 10.0 * i + k for i in range(3) for k, term in enumerate(("class", "mask", "dice"))}
    figure = plots.losses_per_prediction(losses | {"total": 1e6}, "at the start")
    (ax,) = figure.axes
    assert ax.get_title() == "at the start"
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[0, 10, 20], [1, 11, 21], [2, 12, 22]]
    assert [container.get_label() for container in ax.containers] == ["class", "mask", "dice"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["class", "mask", "dice"]
    centers = [bar.get_x() + bar.get_width() / 2 for bar in ax.containers[1]]
    assert centers == pytest.approx([0, 1, 2])


def test_bars_read_from_top_to_bottom_with_their_numbers() -> None:
    (ax,) = plots.bars(["road", "sky", "car"], [97.25, None, 4.0], "IoU in percent", "classes", limit=100).axes
    assert [bar.get_width() for bar in ax.patches] == [97.25, 0, 4.0]
    assert [text.get_text() for text in ax.texts] == ["97.2", "–", "4"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["road", "sky", "car"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.get_xlim() == (0, 100)
    (free,) = plots.bars(["a", "b"], [0.5, 0.2], "probability").axes
    assert free.get_xlim()[1] > 0.5  # room for the number
    assert len(plots.bars([], [], "x").axes) == 1


def test_matrices_mark_their_pairs() -> None:
    tables = {"class": RNG.random((4, 2)), "mask": RNG.random((4, 2))}
    figure = plots.matrices(tables, "query", ["road", "car"], marked=([1, 3], [0, 1]))
    axes = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in axes] == ["class", "mask"]
    for ax, table in zip(axes, tables.values(), strict=True):
        np.testing.assert_array_equal(shown(ax)[0], table)
        assert ax.collections[0].get_offsets().tolist() == [[0, 1], [1, 3]]  # x is the column
        assert [label.get_text() for label in ax.get_xticklabels()] == ["road", "car"]
    assert axes[0].get_ylabel() == "query"


def test_confusion_gives_shares_of_the_true_class() -> None:
    counts = np.array([[6, 0, 2, 0], [0, 0, 0, 0], [1, 0, 3, 0], [0, 0, 4, 0]])
    figure = plots.confusion(counts, CLASSES.names, "who is who")
    ax = figure.axes[0]
    np.testing.assert_allclose(shown(ax)[0], [[0.75, 0.25, 0], [0.25, 0.75, 0], [0, 1, 0]])  # sky occurs nowhere
    assert [label.get_text() for label in ax.get_yticklabels()] == ["road", "car", "tree"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["road", "car", "tree"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("predicted", "true", "who is who")
    assert ax.images[0].get_clim() == (0, 1)


FIGURES = {
    "images": lambda: plots.images({"a": IMAGE}),
    "segmentation": lambda: plots.segmentation(IMAGE, {"truth": TRUTH}, CLASSES),
    "comparison_rows": lambda: plots.comparison_rows([(IMAGE, TRUTH, PREDICTION)], CLASSES),
    "masks": lambda: plots.masks(IMAGE, MASKS, "abc"),
    "attention": lambda: plots.attention(IMAGE, MASKS[0], MASKS[0] > 0.5, MASKS[1], MASKS[2], "t"),
    "heat_over_image": lambda: plots.heat_over_image(IMAGE, {"a": MASKS[0]}),
    "sampling_points": lambda: plots.sampling_points(
        IMAGE, np.array([0.5, 0.5]), RNG.random((2, 3, 4, 2)), RNG.random((2, 3, 4))
    ),
    "sampling_panels": lambda: plots.sampling_panels(
        IMAGE, {name: (np.array([0.5, 0.5]), RNG.random((2, 3, 4, 2)), RNG.random((2, 3, 4))) for name in "ab"}
    ),
    "curves": lambda: plots.curves({"a": ([0, 1], [0, 1])}, "x", "y"),
    "learning_curves": lambda: plots.learning_curves([{"iteration": 0, "loss": 1.0}], [{"iteration": 0, "mIoU": 1.0}]),
    "losses_per_prediction": lambda: plots.losses_per_prediction({"0.class": 1.0, "0.mask": 1.0, "0.dice": 1.0}),
    "matching": lambda: plots.matching(
        {"class": RNG.random((2, 5, 2))}, np.array([[1, 2]] * 2), np.array([[3, -1]] * 2), np.ones((2, 2)), "ab", 1
    ),
    "training_progress": lambda: plots.training_progress(
        [{"iteration": 1, "loss": 1.0, "0.class": 1.0}], (), "t", [IMAGE], {1: [PREDICTION]}, CLASSES
    ),
    "compared_runs": lambda: plots.compared_runs({"a": ([{"iteration": 1, "loss": 1.0, "seconds": 1.0}], [])}),
    "bars": lambda: plots.bars(["a"], [1.0], "x"),
    "label_change": lambda: plots.label_change(IMAGE, PREDICTION, 2 - PREDICTION, CLASSES, "t"),
    "pixel_ledger": lambda: plots.pixel_ledger(IMAGE, PREDICTION, CLASSES, RNG.random((9, 4)), (5, 6)),
    "dumbbells": lambda: plots.dumbbells(["a"], [(1.0, 0.5)], ("before", "after"), "x"),
    "matrices": lambda: plots.matrices({"a": MASKS[0]}, "q", list("abcdefghij")),
    "confusion": lambda: plots.confusion(np.eye(4), CLASSES.names),
}


def test_every_figure_is_tested_for_what_holds_for_all() -> None:
    assert sorted(FIGURES) == sorted(name for name in plots.__all__ if inspect.isfunction(getattr(plots, name)))


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_shows_it_and_a_paper_can_print_it(name) -> None:
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        wide, high = figure.get_size_inches() * figure.dpi
        assert picture.size == pytest.approx((wide, high), abs=1)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 4  # something is drawn
    vectors = io.BytesIO()
    figure.savefig(vectors, format="svg")
    assert b"<svg" in vectors.getvalue()
    sizes = [t.get_fontsize() for ax in figure.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
    assert min(sizes) >= 8


def test_pyplot_is_never_needed() -> None:
    """It keeps every figure alive in the kernel, and is not safe in the threads that training runs in."""
    program = (
        "import sys; sys.modules['matplotlib.pyplot'] = None\n"
        "import numpy as np\n"
        "from m2f_lab.explore import plots\n"
        "figure = plots.images({'a': np.zeros((4, 4, 3), np.uint8)})\n"
        "print(len(figure._repr_png_()))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert int(done.stdout or 0) > 100, done.stderr


def test_colours_of_lines_are_told_apart_by_everyone() -> None:
    """Also under protanopia and deuteranopia; a just noticeable difference is about 0.02 in Oklab."""
    seen = perceived(np.array([to_rgb(color) for color in plots.PALETTE]) * 255)
    for i in range(len(plots.PALETTE)):
        for j in range(i):
            assert difference(seen[:, i : i + 1], seen[:, j : j + 1])[0] > 0.07, (plots.PALETTE[i], plots.PALETTE[j])
