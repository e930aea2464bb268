"""Points: where masks are read, against torch's grid_sample on dense masks and PointRend's recipe written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.loss.points import random_points, sample_all_segments, sample_segments, top_to_bottom
from m2f_lab.structures import IGNORE, Target, sample_points

PADDED = (20, 28)


def id_map_target(height: int = 17, width: int = 23, num_segments: int = 5) -> Target:
    numbers = torch.randint(0, num_segments + 1, (height, width), dtype=torch.uint8)
    numbers[numbers == num_segments] = IGNORE
    return Target.from_id_map(numbers, torch.arange(num_segments))


def dense_reference(target: Target, segments: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Float masks, padded with zeros, read by grid_sample."""
    masks = target.dense()[segments].to(points.dtype)
    masks = F.pad(masks, (0, padded_size[1] - masks.shape[2], 0, padded_size[0] - masks.shape[1]))
    return sample_points(masks.unsqueeze(1), points.expand(len(segments), -1, -1)).squeeze(1)


def awkward_points(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random points, and all on and around the borders of the target and of the padded image. [count, P, 2]"""
    edges = []
    for size, padded in ((23, 28), (17, 20)):
        pixels = torch.tensor(
            [-3, -1, -0.5, 0, 0.25, 0.5, size - 0.5, size, size + 0.5, padded - 0.5, padded, padded + 9]
        )
        edges.append(pixels.double() / padded)
    grid = torch.cartesian_prod(*edges)
    return torch.cat([grid.expand(count, -1, -1), torch.rand(count, 200, 2, dtype=torch.float64)], dim=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [(17, 23), PADDED, (1, 1)], ids=["smaller", "padded size", "one pixel"])
def test_segments_are_read_as_grid_sample_reads_padded_masks(size, dtype):
    target = id_map_target(*size)
    segments = torch.tensor([3, 0, 0, 4, 2, 1])
    points = awkward_points(len(segments), dtype)
    result = sample_segments(target, segments, points, PADDED)
    assert result.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(result, dense_reference(target, segments, points, PADDED), rtol=0, atol=tolerance)


def test_random_points_are_read_to_the_last_bit():
    # Positions are exact where the size is a power of two; then so is the agreement.
    target, segments, points = id_map_target(), torch.arange(5), torch.rand(5, 1000, 2)
    assert torch.equal(
        sample_segments(target, segments, points, (32, 32)), dense_reference(target, segments, points, (32, 32))
    )


def test_id_map_and_boolean_masks_are_read_alike():
    target = id_map_target()
    as_masks = Target(target.labels, masks=target.dense())
    segments = torch.tensor([1, 4, 2, 2])
    points = awkward_points(4, torch.float32)
    assert torch.equal(
        sample_segments(target, segments, points, PADDED), sample_segments(as_masks, segments, points, PADDED)
    )


def test_wide_integers_and_255_segments_are_read():
    numbers = torch.arange(255).view(15, 17)
    segments = torch.arange(255)
    points = torch.rand(1, 300, 2)
    narrow = sample_segments(Target.from_id_map(numbers.to(torch.uint8), segments), segments, points, (15, 17))
    wide = sample_segments(Target.from_id_map(numbers, segments), segments, points, (15, 17))
    assert torch.equal(narrow, wide)
    torch.testing.assert_close(
        narrow, dense_reference(Target.from_id_map(numbers, segments), segments, points, (15, 17))
    )


def test_overlapping_masks_are_read_each_by_itself():
    masks = torch.rand(4, 17, 23) > 0.4
    target = Target(torch.arange(4), masks=masks)
    segments = torch.tensor([0, 1, 2, 3])
    points = torch.rand(4, 100, 2)
    torch.testing.assert_close(
        sample_segments(target, segments, points, PADDED), dense_reference(target, segments, points, PADDED)
    )


def test_shared_points_are_the_same_points_for_every_segment():
    target, segments, points = id_map_target(), torch.arange(5), torch.rand(1, 50, 2)
    shared = sample_segments(target, segments, points, PADDED)
    assert torch.equal(shared, sample_segments(target, segments, points.expand(5, -1, -1), PADDED))
    assert torch.equal(shared, sample_segments(Target(target.labels, masks=target.dense()), segments, points, PADDED))


@pytest.mark.parametrize("num_segments", [0, 5, 255])
def test_all_segments_are_read_as_each_by_itself(num_segments):
    id_map = torch.randint(0, num_segments + 1, (17, 23))
    id_map[id_map == num_segments] = 255
    target = Target.from_id_map(id_map.to(torch.uint8), torch.arange(num_segments))
    points = awkward_points(1, torch.float32)
    expected = sample_segments(target, torch.arange(num_segments), points, PADDED)
    assert torch.equal(sample_all_segments(target, points[0], PADDED), expected)
    as_masks = Target(target.labels, masks=target.dense())
    assert torch.equal(sample_all_segments(as_masks, points[0], PADDED), expected)


def test_points_from_top_to_bottom_are_the_same_points():
    points = torch.rand(1000, 2)
    ordered = top_to_bottom(points)
    assert sorted(ordered.tolist()) == sorted(points.tolist())
    assert (ordered[1:, 1] - ordered[:-1, 1]).min() > -1 / 256


def test_a_vote_of_four_pixels():
    # The corner between four pixels of a 2 × 2 image; one of them belongs to nobody.
    target = Target.from_id_map(torch.tensor([[0, 1], [1, 255]]), torch.tensor([7, 8]))
    values = sample_segments(target, torch.tensor([0, 1]), torch.tensor([[[0.5, 0.5]]]), (2, 2))
    assert values.tolist() == [[0.25], [0.5]]


def test_no_segments_no_values():
    empty = Target.from_id_map(torch.full((4, 4), 255), torch.zeros(0, dtype=torch.long))
    none = torch.zeros(0, dtype=torch.long)
    assert sample_segments(empty, none, torch.rand(1, 6, 2), (4, 4)).shape == (0, 6)
    assert sample_segments(empty, none, torch.rand(0, 6, 2), (4, 4)).shape == (0, 6)
    empty = Target(none, masks=torch.zeros(0, 4, 4, dtype=torch.bool))
    assert sample_segments(empty, none, torch.rand(1, 6, 2), (4, 4)).shape == (0, 6)


class LargestTensor(TorchDispatchMode):
    """Watches the number of elements of everything that is computed."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_an_id_map_never_becomes_masks():
    target = id_map_target(100, 120, num_segments=50)
    with LargestTensor() as watch:
        sample_segments(target, torch.arange(50), torch.rand(50, 20, 2), (100, 120))
    assert watch.elements <= 103 * 123  # the map with its border; as masks it would be 50 times as much
    with LargestTensor() as watch:
        target.dense()
    assert watch.elements == 50 * 100 * 120


def test_random_points_follow_the_seed_and_the_reference_tensor():
    like = torch.zeros(1, dtype=torch.float64)
    torch.manual_seed(3)
    first = random_points(4, 1000, like)
    torch.manual_seed(3)
    assert torch.equal(first, random_points(4, 1000, like))
    assert first.shape == (4, 1000, 2)
    assert first.dtype == torch.float64
    assert 0 <= first.min() < 0.01 < 0.99 < first.max() < 1
