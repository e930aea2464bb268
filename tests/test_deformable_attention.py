"""Deformable sampling against a loop over every point, and its gradients."""

import math

import pytest
import torch

from m2f_lab.model.deformable_attention import DeformableAttention
from m2f_lab.ops.deformable_bags import sample_by_bags
from m2f_lab.ops.deformable_sampling import SamplingPlan, deformable_sampling, sample_by_grid

SIZES = [(2, 3), (4, 5), (3, 3)]


def naive_sampling(values, level_sizes, locations, weights):
    """Equation 3 of the Deformable DETR paper, one sampling point at a time."""
    batch, _, heads, dim = values.shape
    total = torch.zeros(batch, locations.shape[1], heads, dim, dtype=values.dtype)
    starts = [sum(h * w for h, w in level_sizes[:i]) for i in range(len(level_sizes))]
    for b, q, head, level, p in torch.cartesian_prod(*(torch.arange(n) for n in locations.shape[:5])).tolist():
        height, width = level_sizes[level]
        x, y = locations[b, q, head, level, p].tolist()
        column, row = x * width - 0.5, y * height - 0.5
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(row - i)) * (1 - abs(column - j)) * weights[b, q, head, level, p]
                    total[b, q, head] += share * values[b, starts[level] + i * width + j, head]
    return total


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, sum(h * w for h, w in SIZES), 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 4, 2, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, 4, 2, 3, 2, generator=generator, dtype=torch.float64)
    return values, locations, weights


def test_sampling_against_a_loop(inputs):
    values, locations, weights = inputs
    expected = naive_sampling(values, SIZES, locations, weights)
    torch.testing.assert_close(sample_by_bags(values, SIZES, locations, weights), expected)
    torch.testing.assert_close(sample_by_grid(values, SIZES, locations, weights), expected)
    centres, scores = torch.rand(locations.shape[1], 2, dtype=torch.float64), torch.randn_like(weights)
    offsets = (locations - centres[:, None, None, None]) * torch.tensor([(w, h) for h, w in SIZES])[:, None]
    weights = scores.flatten(3).softmax(dim=3).view(weights.shape)
    expected = naive_sampling(values, SIZES, locations, weights)
    points = SamplingPlan(SIZES, centres, offsets, scores)
    torch.testing.assert_close(points.locations, locations)
    torch.testing.assert_close(points.weights, weights)
    torch.testing.assert_close(deformable_sampling(values, points), expected)


def test_gradients(inputs):
    values, locations, scores = (x[:1].detach() for x in inputs)
    offsets = 3 * locations
    centres = torch.rand(locations.shape[1], 2, dtype=torch.float64)

    def sample(values, offsets, scores):
        return deformable_sampling(values, SamplingPlan(SIZES, centres, offsets, scores))

    assert torch.autograd.gradcheck(sample, [x.detach().requires_grad_() for x in (values, offsets, scores)])


def test_offsets_are_pixels_of_the_level_they_point_into():
    """The trap: dividing by (H, W) instead of (W, H), or by the query's level instead of the sampled one."""
    attention = DeformableAttention(dim=32, num_heads=4, num_levels=3, num_points=2)
    features, positions = torch.randn(2, 1, sum(h * w for h, w in SIZES), 32)
    centre = torch.full((features.shape[1], 2), 0.5)
    _, points = attention(features, positions[0], centre, SIZES)
    locations, weights = points.locations, points.weights
    for level, (height, width) in enumerate(SIZES):
        offset = (locations[0, 0, 0, level, 1] - 0.5) * torch.tensor([width, height])
        torch.testing.assert_close(offset, torch.tensor([2.0, 0.0]))  # head 0 looks right; point 1 two pixels far
        offset = (locations[0, 0, 1, level, 0] - 0.5) * torch.tensor([width, height])
        torch.testing.assert_close(offset, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)  # head 1 looks down
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


def test_locations_and_weights_explain_the_output():
    torch.manual_seed(1)
    attention = DeformableAttention(dim=32, num_heads=4, num_levels=3, num_points=2).double()
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    features, positions = torch.randn(2, 1, sum(h * w for h, w in SIZES), 32, dtype=torch.float64)
    centres = torch.rand(features.shape[1], 2, dtype=torch.float64)
    output, points = attention(features, positions[0], centres, SIZES)
    locations, weights = points.locations, points.weights
    torch.testing.assert_close(weights.sum(dim=(3, 4)), torch.ones_like(weights[..., 0, 0]))
    expected = attention.attention_weights(features + positions).unflatten(2, (4, -1)).softmax(dim=3)
    torch.testing.assert_close(weights.flatten(3), expected)
    pixels = torch.tensor([(w, h) for h, w in SIZES], dtype=torch.float64)[:, None]
    offsets = (locations - centres[:, None, None, None]) * pixels
    torch.testing.assert_close(offsets.flatten(2), attention.sampling_offsets(features + positions))
    values = attention.value_projection(features).unflatten(2, (4, 8))
    expected = naive_sampling(values, SIZES, locations, weights)
    torch.testing.assert_close(output, attention.output_projection(expected.flatten(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offsets_and_scores_are_not_rounded_under_autocast(dtype):
    """bfloat16 holds an offset of 10 pixels within 1/32 only."""
    torch.manual_seed(2)
    attention = DeformableAttention(dim=32, num_heads=4, num_levels=3, num_points=2)
    torch.nn.init.normal_(attention.sampling_offsets.weight)
    torch.nn.init.normal_(attention.attention_weights.weight)
    features, positions = torch.randn(2, 1, sum(h * w for h, w in SIZES), 32)
    centres = torch.rand(features.shape[1], 2)
    _, expected = attention(features, positions[0], centres, SIZES)
    assert expected.offsets.abs().max() > 10
    with torch.autocast("cpu", dtype=dtype):
        attended, points = attention(features, positions[0], centres, SIZES)
    assert attended.dtype == dtype
    torch.testing.assert_close(points.offsets, expected.offsets, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(points.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_locations_on_a_device_need_no_list_from_the_host():
    """Plain sampling on a device: sizes are filled in there, as the host would wait for a copy."""
    points = SamplingPlan(SIZES, *(torch.zeros(shape, device="meta") for shape in ((4, 2), (1, 4, 2, 3, 2, 2))), None)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(result.device.type)
            return result

    with Watch():
        assert points.locations.shape == (1, 4, 2, 3, 2, 2)
    assert set(made) == {"meta"}
