"""Instances of a large image from its tiles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f_lab import predict
from m2f_lab.inference.instance_tiles import tiled_instances
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
