"""Points: where masks are read, against torch's grid_sample on dense masks and PointRend's recipe written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.loss.points import random_points, shared_points
from m2f_lab.structures import IGNORE, Target, sample_points, segments_at

PADDED = (20, 28)


def id_map_target(height: int = 17, width: int = 23, num_segments: int = 5) -> Target:
    numbers = torch.randint(0, num_segments + 1, (height, width), dtype=torch.uint8)
    numbers[numbers == num_segments] = IGNORE
    return Target.from_id_map(numbers, torch.arange(num_segments))


def dense_reference(target: Target, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Float masks, padded with zeros, read by grid_sample."""
    masks = target.dense().to(points.dtype)
    masks = F.pad(masks, (0, padded_size[1] - masks.shape[2], 0, padded_size[0] - masks.shape[1]))
    return sample_points(masks.unsqueeze(0), points.unsqueeze(0)).squeeze(0)


def awkward_points(dtype: torch.dtype = torch.float64) -> Tensor:
    """Random points, and all on and around the borders of the target and of the padded image. [P, 2]"""
    edges = []
    for size, padded in ((23, 28), (17, 20)):
        pixels = torch.tensor(
            [-3, -1, -0.5, 0, 0.25, 0.5, size - 0.5, size, size + 0.5, padded - 0.5, padded, padded + 9]
        )
        edges.append(pixels.double() / padded)
    return torch.cat([torch.cartesian_prod(*edges), torch.rand(200, 2, dtype=torch.float64)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [(17, 23), PADDED, (1, 1)], ids=["smaller", "padded size", "one pixel"])
def test_sample_segments_equals_grid_sample_on_padded_masks(size, dtype):
    target = id_map_target(*size)
    points = awkward_points(dtype)
    result = target.at(points, PADDED)
    assert result.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(result, dense_reference(target, points, PADDED), rtol=0, atol=tolerance)


def test_sample_segments_is_exact_where_positions_are():
    # Positions are exact where the size is a power of two; then so is the agreement.
    target, points = id_map_target(), torch.rand(1000, 2)
    assert torch.equal(target.at(points, (32, 32)), dense_reference(target, points, (32, 32)))


@pytest.mark.parametrize("num_segments", [0, 5, 255])
def test_sample_segments_reads_id_maps_and_boolean_masks_alike(num_segments):
    id_map = torch.randint(0, num_segments + 1, (17, 23))
    id_map[id_map == num_segments] = 255
    target = Target.from_id_map(id_map.to(torch.uint8), torch.arange(num_segments))
    points = awkward_points(torch.float32)
    expected = target.at(points, PADDED)
    assert torch.equal(Target(target.labels, masks=target.dense()).at(points, PADDED), expected)
    wide = Target.from_id_map(id_map, torch.arange(num_segments))
    assert torch.equal(wide.at(points, PADDED), expected)


def test_sample_segments_reads_255_segments():
    target = Target.from_id_map(torch.arange(255).view(15, 17), torch.arange(255))
    points = torch.rand(300, 2)
    torch.testing.assert_close(target.at(points, (15, 17)), dense_reference(target, points, (15, 17)))


def test_sample_segments_reads_overlapping_masks():
    target = Target(torch.arange(4), masks=torch.rand(4, 17, 23) > 0.4)
    points = torch.rand(100, 2)
    torch.testing.assert_close(target.at(points, PADDED), dense_reference(target, points, PADDED))


def test_a_sample_is_a_vote_of_four_pixels():
    # The corner between four pixels of a 2 × 2 image; one of them belongs to no segment.
    target = Target.from_id_map(torch.tensor([[0, 1], [1, 255]]), torch.tensor([7, 8]))
    assert target.at(torch.tensor([[0.5, 0.5]]), (2, 2)).tolist() == [[0.25], [0.5]]


def test_sample_segments_without_segments():
    none = torch.zeros(0, dtype=torch.long)
    for empty in (
        Target.from_id_map(torch.full((4, 4), 255), none),
        Target(none, masks=torch.zeros(0, 4, 4, dtype=torch.bool)),
    ):
        assert empty.at(torch.rand(6, 2), (4, 4)).shape == (0, 6)


def test_segments_of_several_images_are_padded_to_the_largest():
    targets = [id_map_target(17, 23, 5), id_map_target(12, 28, 2), id_map_target(20, 9, 0)]
    points = torch.rand(3, 50, 2)
    for kind in (targets, [Target(target.labels, masks=target.dense()) for target in targets]):
        shares = segments_at(kind, points, PADDED)
        assert shares.shape == (3, 5, 50)
        for image, target in enumerate(kind):
            assert torch.equal(shares[image, : target.num_segments], target.at(points[image], PADDED))
    mixed = [targets[0], Target(targets[1].labels, masks=targets[1].dense())]
    assert torch.equal(segments_at(mixed, points[:2], PADDED)[1, :2], targets[1].at(points[1], PADDED))


def test_shared_points_puts_candidates_first_and_leaves_unwanted_ones_out():
    like = torch.zeros(1, dtype=torch.float64)
    points, num_candidates, num_uncertain = shared_points(3, 40, 3.0, 0.75, like)
    assert (points.shape, points.dtype, num_candidates, num_uncertain) == ((3, 130, 2), torch.float64, 120, 30)
    points, num_candidates, num_uncertain = shared_points(3, 40, 3.0, 0.0, like)
    assert (points.shape, num_candidates, num_uncertain) == ((3, 40, 2), 0, 0)


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
        target.at(torch.rand(20, 2), (100, 120))
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
