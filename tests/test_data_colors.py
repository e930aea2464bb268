from __future__ import annotations

import numpy as np
import pytest

from m2f_lab.data import Classes, colorize, distinct_colors, overlay
from m2f_lab.data.colors import difference, perceived

CLASSES = Classes(("a", "b"), ((255, 0, 0), (0, 100, 200)), frozenset({1}))


def test_colorize_paints_classes_and_leaves_ignored_pixels_black() -> None:
    painted = colorize(np.array([[0, 1, 255]], np.uint8), CLASSES)
    assert painted.tolist() == [[[255, 0, 0], [0, 100, 200], [0, 0, 0]]]
    assert painted.dtype == np.uint8


def test_overlay_mixes_and_leaves_ignored_pixels_alone() -> None:
    image = np.full((1, 3, 3), 100, np.uint8)
    label_map = np.array([[0, 1, 255]], np.uint8)
    mixed = overlay(image, label_map, CLASSES, opacity=0.25)
    assert mixed.tolist() == [[[139, 75, 75], [75, 100, 125], [100, 100, 100]]]
    assert np.array_equal(overlay(image, label_map, CLASSES, opacity=0), image)
    assert np.array_equal(overlay(image, label_map, CLASSES, opacity=1)[:, :2], colorize(label_map, CLASSES)[:, :2])


def test_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2\], but there are only 2 classes"):
        colorize(np.array([[2]], np.uint8), CLASSES)
    with pytest.raises(ValueError, match=r"\(2, 1\) cannot lie over an image \(1, 1, 3\)"):
        overlay(np.zeros((1, 1, 3), np.uint8), np.zeros((2, 1), np.uint8), CLASSES)


def test_made_up_colors_are_stable_and_grow() -> None:
    assert distinct_colors(3) == ((230, 159, 0), (86, 180, 233), (0, 158, 115))
    assert distinct_colors(40)[:11] == distinct_colors(11)
    assert len(set(distinct_colors(254))) == 254


def test_made_up_colors_differ_for_color_blind_eyes_too() -> None:
    """Distances in Oklab, where 0.02 is just noticeable. Matplotlib's first ten colours hold a pair that people
    without one kind of cone cannot tell apart."""

    def closest(colors: tuple) -> float:
        seen = perceived(np.array(colors))
        return min(difference(seen[:, i : i + 1], seen[:, i + 1 :]).min() for i in range(len(colors) - 1))

    tab10 = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
             (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207))  # fmt: skip
    assert closest(tab10) < 0.02
    assert closest(distinct_colors(11)) > 0.07
    assert closest(distinct_colors(50)) > 0.03
    assert closest(distinct_colors(150)) > 0.015


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a", "b"), ((0, 0, 0),), frozenset()), "2 class names but 1 colours"),
        ((("a",), ((0, 0, 0),), frozenset({1})), r"Classes \[1\] are called things"),
        (((), (), frozenset()), "1 to 65535 classes, got 0"),
    ],
)
def test_classes_are_checked(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classes(*arguments)
