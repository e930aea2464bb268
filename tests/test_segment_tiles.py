"""Instances and panoptic segments of a large image from its tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f_lab import predict
from m2f_lab.data import Classes
from m2f_lab.inference.instance_tiles import tiled_instances
from m2f_lab.inference.panoptic_tiles import tiled_panoptic
from m2f_lab.structures import MaskLogits, Output, Prediction, Segment


class ShadeReader:
    """Query k finds what has the shade 40 (k + 1), and is the surer the brighter it is; all is of class 0."""

    def __init__(self, num_queries: int = 6) -> None:
        self.num_queries, self.sizes = num_queries, []

    def __call__(self, images: torch.Tensor) -> Output:
        height, width = images.shape[2:]
        self.sizes.append((height, width))
        padded = F.pad(images.float(), (0, -width % 32, 0, -height % 32))
        shades = 40.0 * torch.arange(1, self.num_queries + 1)[:, None, None]
        masks = 15 - (F.avg_pool2d(padded[:, :1], 4) - shades).abs()
        sure = torch.arange(1.0, self.num_queries + 1)
        logits = torch.stack([sure, torch.zeros_like(sure)], dim=1)[None]
        identity = torch.eye(self.num_queries)[None]
        return Output([logits], [MaskLogits(identity, masks)], (height, width), tuple(padded.shape[2:]))


def picture(size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """Six squares of 8 pixels and different shades, on multiples of 4. uint8 [H, W, 3]"""
    image = np.zeros((*size, 3), np.uint8)
    for number, (top, left) in enumerate([(4, 4), (4, 44), (28, 28), (48, 8), (28, 60), (52, 68)]):
        image[top : top + 8, left : left + 8] = 40 * (number + 1)
    return image


def found(prediction: Prediction) -> dict[tuple, float]:
    """Pixels of each instance that has some → its score."""
    return {
        tuple(np.flatnonzero(mask)): segment.score
        for mask, segment in zip(prediction.masks, prediction.segments, strict=True)
        if mask.any()
    }


def test_one_tile_equals_the_whole_image():
    whole = predict(ShadeReader(), picture(), "instance")
    tiled = predict(ShadeReader(), picture(), "instance", tile=96)
    assert whole.segments == tiled.segments
    np.testing.assert_array_equal(whole.masks, tiled.masks)


@pytest.mark.parametrize(("overlap", "width"), [(0.25, 80), (0.5, 96)], ids=["a quarter", "a half"])
def test_tiles_find_the_instances_of_the_whole_image_once(overlap, width):
    """Tiles begin at multiples of 4 pixels here, as the squares do."""
    model, image = ShadeReader(), picture((64, width))
    tiled = predict(model, image, "instance", tile=(32, 32), tile_overlap=overlap)
    whole = predict(ShadeReader(), image, "instance")
    assert len(model.sizes) > 6
    assert set(model.sizes) == {(32, 32)}
    assert found(tiled).keys() == found(whole).keys()
    assert len(found(whole)) == 6
    for pixels, score in found(tiled).items():
        assert score == pytest.approx(found(whole)[pixels], abs=1e-4)
    scores = [segment.score for segment in tiled.segments]
    assert scores == sorted(scores, reverse=True)
    assert [segment.id for segment in tiled.segments] == list(range(1, len(scores) + 1))


def test_tiles_are_cut_in_pixels_of_the_resized_image():
    model = ShadeReader()
    result = predict(model, picture(), "instance", shortest_edge=128, tile=64)
    assert set(model.sizes) == {(64, 64)}
    assert result.masks.shape[1:] == (64, 96)
    squares = [picture()[..., 0] == 40 * (number + 1) for number in range(6)]
    for square in squares:  # borders of squares are blurred by the resize, and differ between tile and image
        best = max((square & mask).sum() / (square | mask).sum() for mask in result.masks)
        assert best > 0.3


def test_the_best_of_all_tiles_are_kept():
    result = predict(ShadeReader(), picture(), "instance", tile=32, tile_overlap=0.5, top_k=3)
    assert [segment.query for segment in result.segments] == [5, 4, 3], "the surest queries"


def answer(masks: list[np.ndarray], scores: list[float], labels: list[int]) -> Prediction:
    segments = [
        Segment(i + 1, label, True, score, i, int(mask.sum()))
        for i, (mask, score, label) in enumerate(zip(masks, scores, labels, strict=True))
    ]
    return Prediction("instance", masks=np.array(masks), segments=tuple(segments))


@pytest.mark.parametrize(("labels", "count"), [((0, 0), 1), ((0, 1), 2)], ids=["one class", "two classes"])
def test_an_instance_that_two_tiles_claim_is_kept_once_by_its_score(labels, count):
    """Two tiles of 16 columns, 4 of them shared; each places the centre of the instance on its own side."""
    image = np.zeros((16, 28, 3), np.uint8)
    image[:, 0] = 1  # shows which tile it is

    def of_tile(part: np.ndarray) -> Prediction:
        mask = np.zeros((16, 16), bool)
        if part[0, 0, 0]:
            mask[4:8, 11:16] = True  # columns 11…15: the middle is 13.5, left of the border at 14
            return answer([mask], [0.5], [labels[0]])
        mask[4:8, 0:6] = True  # columns 12…17: right of it
        return answer([mask], [0.75], [labels[1]])

    result = tiled_instances(of_tile, image, (16, 16), 0.25, top_k=10)
    assert len(result.segments) == count
    assert result.segments[0].score == 0.75
    assert np.flatnonzero(result.masks[0].any(0)).tolist() == [12, 13, 14, 15, 16, 17]


def test_twins_of_one_tile_are_both_kept():
    """Whole images keep them as well: the published inference knows no suppression."""
    image = np.zeros((16, 28, 3), np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    image[:, 0] = 1

    def of_tile(part: np.ndarray) -> Prediction:
        return answer([mask, mask], [0.5, 0.25], [0, 0]) if part[0, 0, 0] else answer([mask & False], [0.9], [0])

    assert [s.score for s in tiled_instances(of_tile, image, (16, 16), 0.25, top_k=10).segments] == [0.5, 0.25]


def test_nothing_found_in_any_tile():
    nothing = Prediction("instance", masks=np.zeros((0, 16, 16), bool))
    result = tiled_instances(lambda part: nothing, np.zeros((16, 28, 3), np.uint8), (16, 16), 0.25, top_k=10)
    assert result.masks.shape == (0, 16, 28)


# Panoptic

ALL_THINGS = Classes(("square",), ((200, 0, 0),), things=frozenset({0}))
ALL_STUFF = Classes(("squares",), ((200, 0, 0),))


def panoptic(image: np.ndarray, classes: Classes = ALL_THINGS, **options) -> Prediction:
    return predict(ShadeReader(), image, "panoptic", classes=classes, object_mask_threshold=0.5, **options)


def areas_of(prediction: Prediction) -> dict[tuple, Segment]:
    """Pixels of each segment → the segment."""
    return {tuple(np.flatnonzero(prediction.segments_map == s.id)): s for s in prediction.segments}


def test_one_tile_equals_the_whole_image_in_panoptic_form():
    whole, tiled = panoptic(picture()), panoptic(picture(), tile=96)
    assert whole.segments == tiled.segments
    assert len(whole.segments) == 6
    np.testing.assert_array_equal(whole.segments_map, tiled.segments_map)


@pytest.mark.parametrize("classes", [ALL_THINGS, ALL_STUFF], ids=["things", "stuff"])
@pytest.mark.parametrize(("overlap", "width"), [(0.25, 80), (0.5, 96)], ids=["a quarter", "a half"])
def test_tiles_give_the_panoptic_segments_of_the_whole_image(overlap, width, classes):
    image = picture((64, width))
    tiled, whole = panoptic(image, classes, tile=32, tile_overlap=overlap), panoptic(image, classes)
    assert tiled.segments_map.dtype == np.int32
    got, expected = areas_of(tiled), areas_of(whole)
    assert got.keys() == expected.keys()
    assert len(got) == (6 if classes is ALL_THINGS else 1)
    for pixels, segment in got.items():
        assert segment.area == len(pixels)
        assert segment.is_thing == (classes is ALL_THINGS)
        assert segment.label == 0
        assert segment.score == pytest.approx(expected[pixels].score if segment.is_thing else segment.score, abs=1e-4)


def test_a_thing_across_many_tiles_is_one_segment():
    """Twelve times as long as an overlap: no tile sees both ends."""
    image = np.zeros((64, 160, 3), np.uint8)
    image[20:36, 8:152] = 40
    image[48:56, 60:68] = 80
    tiled, whole = panoptic(image, tile=(32, 48)), panoptic(image)
    assert areas_of(tiled).keys() == areas_of(whole).keys()
    assert len(tiled.segments) == 2


def map_of(columns: slice, label: int, score: float, is_thing: bool = True, width: int = 16) -> Prediction:
    """One segment in four rows of a tile of 16 rows."""
    segments_map = np.zeros((16, width), np.int32)
    segments_map[4:8, columns] = 1
    segment = Segment(1, label, is_thing, score, 0, int(segments_map.sum()))
    return Prediction("panoptic", segments_map=segments_map, segments=(segment,))


def two_tiles(left: Prediction, right: Prediction, overlap_threshold: float = 0.8) -> Prediction:
    """Columns 0…15 and 12…27, with cores that meet at 14."""
    image = np.zeros((16, 28, 3), np.uint8)
    image[:, 0] = 1  # shows which tile it is
    return tiled_panoptic(lambda part: left if part[0, 0, 0] else right, image, (16, 16), 0.25, overlap_threshold)


def columns_of(prediction: Prediction, number: int) -> list[int]:
    return np.flatnonzero((prediction.segments_map == number).any(0)).tolist()


def test_things_join_if_they_agree_where_tiles_overlap():
    same = two_tiles(map_of(slice(6, 16), 3, 0.9), map_of(slice(0, 8), 3, 0.95))
    assert [(s.label, s.score, s.area) for s in same.segments] == [(3, 0.95, 56)]
    assert columns_of(same, 1) == list(range(6, 20))
    others = two_tiles(map_of(slice(6, 16), 3, 0.9), map_of(slice(0, 8), 5, 0.95), overlap_threshold=0.5)
    assert [s.label for s in others.segments] == [5, 3], "the surest first"
    assert columns_of(others, 1) == list(range(12, 20)), "and it wins what both claim"
    assert columns_of(others, 2) == list(range(6, 12))
    strict = two_tiles(map_of(slice(6, 16), 3, 0.9), map_of(slice(0, 8), 5, 0.95))
    assert [s.label for s in strict.segments] == [5], "the other keeps 6 of 10 columns"


@pytest.mark.parametrize(("columns", "is_kept"), [(slice(2, 6), True), (slice(0, 3), False)], ids=["in", "out"])
def test_what_no_other_tile_confirms_counts_in_the_core_of_its_tile(columns, is_kept):
    nothing = Prediction("panoptic", segments_map=np.zeros((16, 16), np.int32))
    assert bool(two_tiles(nothing, map_of(columns, 0, 0.9)).segments) is is_kept


def test_stuff_is_read_in_the_core_of_each_tile():
    result = two_tiles(map_of(slice(0, 16), 1, 0.9, is_thing=False), map_of(slice(0, 16), 2, 0.95, is_thing=False))
    assert [(s.label, s.area) for s in result.segments] == [(1, 56), (2, 56)]
    assert columns_of(result, 1) == list(range(14))
    hidden = two_tiles(map_of(slice(0, 16), 1, 0.9), map_of(slice(0, 16), 2, 0.95, is_thing=False))
    assert [(s.label, s.area) for s in hidden.segments] == [(1, 64), (2, 48)], "a thing lies in front of stuff"


def test_no_segment_in_any_tile():
    nothing = Prediction("panoptic", segments_map=np.zeros((16, 16), np.int32))
    result = two_tiles(nothing, nothing)
    assert result.segments == ()
    assert result.segments_map.shape == (16, 28)
    assert not result.segments_map.any()
