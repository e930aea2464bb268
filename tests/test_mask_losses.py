"""Operations of the loss: fast against plain versions, written-out gradients against autograd."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from m2f_lab import ops
from m2f_lab.loss import terms
from m2f_lab.loss.points import shared_points
from m2f_lab.ops import (
    PairGroup,
    PointSampler,
    at_chosen_points,
    mask_and_dice,
    sample_points,
    select_uncertain,
    with_pairs,
)

C, SIZE = 3, (6, 9)

# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def points() -> Tensor:
    """Random ones, and all on and around the rim. [P, 2]"""
    rim = torch.tensor([-0.2, 0.0, 1e-3, 0.05, 0.5, 1.0, 1.1], dtype=torch.float64)
    return torch.cat([torch.rand(50, 2, dtype=torch.float64), torch.cartesian_prod(rim, rim)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_points_equals_grid_sample_and_its_gradient(points, dtype):
    points = torch.stack([points, points.flip(0) ** 2])
    maps = torch.randn(2, SIZE[0] * SIZE[1], 4, dtype=dtype, requires_grad=True)
    sampler = PointSampler(points.to(dtype), SIZE)
    values = torch.randn(2, points.shape[1], 4, dtype=dtype)
    with ops.plain():
        expected = sample_points(maps, sampler)
        (expected_gradient,) = torch.autograd.grad(expected, maps, values)
    sampled = sample_points(maps, sampler)
    (gradient,) = torch.autograd.grad(sampled, maps, values)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else {}
    torch.testing.assert_close(sampled, expected, **tolerance)
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def test_sample_points_gradcheck(points):
    maps = torch.randn(1, SIZE[0] * SIZE[1], 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sample_points(x, PointSampler(points[None], SIZE)), maps)


def test_scatter_add_gives_pixels_without_points_nothing():
    sampler = PointSampler(torch.tensor([[[0.5, 0.5]]]), (5, 5))  # the centre of the pixel in the middle
    for switch in (nullcontext, ops.plain):
        with switch():
            assert sampler.scatter_add(torch.ones(1, 1, 2))[0].nonzero().tolist() == [[12, 0], [12, 1]]


# --- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 33, 5000])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_select_uncertain_equals_topk(count, share, dtype):
    k = int(share * count)
    logits = torch.randn(4, count, dtype=dtype)
    with ops.plain():
        expected = select_uncertain(logits, k)
    found = select_uncertain(logits, k)
    assert found.dtype == torch.int64
    assert torch.equal(found.sort(1).values, expected.sort(1).values)
    assert torch.equal(select_uncertain(logits.T.contiguous().T, k).sort(1).values, expected.sort(1).values)


def test_select_uncertain_takes_k_points_where_all_are_equally_certain():
    for logits in (torch.zeros(2, 50), torch.full((2, 50), torch.inf)):
        found = select_uncertain(logits, 20)
        assert [len(set(row)) for row in found.tolist()] == [20, 20]


# --- the losses -------------------------------------------------------------------------------------------------------


def problem(num_segments: tuple[int, ...] = (3, 0, 2), share: float = 0.75, num_points: int = 20) -> tuple:
    """Arguments of `mask_and_dice`: images with two pairs per segment, one at a time."""
    features = torch.randn(len(num_segments), C, *SIZE, dtype=torch.float64, requires_grad=True)
    embeddings = torch.randn(2 * sum(num_segments), C, dtype=torch.float64, requires_grad=True)
    points, *numbers = shared_points(len(num_segments), num_points, 3.0, share, like=features)
    drawn, segments = [], []
    for image, number in enumerate(num_segments):
        truth = torch.rand(1, number, points.shape[1], dtype=torch.float64)
        drawn.append(PairGroup(slice(image, image + 1), points[image : image + 1], truth, *numbers))
        segments.append(torch.cat([torch.randperm(number), torch.randperm(number)]))
    place = torch.arange(len(segments)).repeat_interleave(torch.tensor([len(each) for each in segments]))
    return features, embeddings, with_pairs(drawn, place, torch.cat(segments))


def together(groups: list[PairGroup]) -> list[PairGroup]:
    """All images in one group, padded."""
    truth = pad_sequence([group.truth[0] for group in groups], batch_first=True)
    points = torch.cat([group.points for group in groups])
    images = slice(groups[0].images.start, groups[-1].images.stop)
    drawn = replace(groups[0], images=images, points=points, truth=truth, segments=None, real=None)
    place = torch.arange(len(groups)).repeat_interleave(torch.tensor([group.num_pairs for group in groups]))
    return with_pairs([drawn], place, torch.cat([group.segments[0] for group in groups]))


def by_autograd(features: Tensor, embeddings: Tensor, groups: list[PairGroup]) -> tuple[Tensor, Tensor]:
    """The terms as they are read, with the plain operations."""
    results = []
    with ops.plain():
        for group, own in zip(groups, embeddings.split([group.num_pairs for group in groups]), strict=True):
            logits, truth = at_chosen_points(features, own, group)
            results.append(torch.stack([terms.mask(logits, truth), terms.dice(logits, truth)]))
    return tuple(torch.cat(results, dim=1))


def in_float32(groups: list[PairGroup]) -> list[PairGroup]:
    return [replace(group, points=group.points.float(), truth=group.truth.float()) for group in groups]


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "transposed"])
def test_mask_and_dice_equals_autograd_in_values_and_gradients(share, dtype, layout):
    features, embeddings, groups = problem(share=share)
    groups = in_float32(groups) if dtype == torch.float32 else groups
    features = features.detach().to(dtype)
    features = {
        "channels first": features,
        "channels last": features.contiguous(memory_format=torch.channels_last),
        "transposed": features.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout].requires_grad_()
    arguments = features, embeddings.detach().to(dtype).requires_grad_(), groups
    weights = torch.randn(2, 10, dtype=dtype)  # of every pair and term its own
    results = [losses(*arguments) for losses in (mask_and_dice, by_autograd)]
    gradients = [torch.autograd.grad((torch.stack(losses) * weights).sum(), arguments[:2]) for losses in results]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def same_losses_and_gradients(leaves: tuple[Tensor, Tensor], some: list[PairGroup], other: list[PairGroup]) -> None:
    results = [mask_and_dice(*leaves, groups) for groups in (some, other)]
    weights = torch.rand(len(leaves[1]), dtype=torch.float64)  # of every pair its own
    gradients = [torch.autograd.grad((weights * (mask + 2 * dice)).sum(), leaves) for mask, dice in results]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_groups_of_one_image_add_up():
    features, embeddings, (group,) = problem((3, 0, 0))
    halves = [replace(group, segments=part) for part in group.segments.split([2, 4], dim=1)]
    same_losses_and_gradients((features, embeddings), [group], halves)


@pytest.mark.parametrize("num_segments", [(3, 2), (1, 3, 2), (2, 2)])
def test_images_together_lose_what_they_lose_one_by_one(num_segments):
    features, embeddings, groups = problem(num_segments)
    padded = together(groups)
    assert (padded[0].real is None) == (len(set(num_segments)) == 1)
    same_losses_and_gradients((features, embeddings), groups, padded)
    torch.testing.assert_close(mask_and_dice(features, embeddings, padded), by_autograd(features, embeddings, padded))


def test_mask_and_dice_gradcheck():
    features, embeddings, groups = problem((2, 1))
    assert torch.autograd.gradcheck(lambda f, e: mask_and_dice(f, e, groups), (features, embeddings), eps=1e-7)


def test_mask_and_dice_differentiates_one_term_alone():
    arguments = problem()
    for term in (0, 1):
        ours = torch.autograd.grad(mask_and_dice(*arguments)[term].sum(), arguments[1])[0]
        torch.testing.assert_close(ours, torch.autograd.grad(by_autograd(*arguments)[term].sum(), arguments[1])[0])


def test_huge_logits_have_a_loss_and_a_gradient():
    features, embeddings, groups = problem()
    losses = mask_and_dice(features.float() * 1e3, embeddings.float() * 10, in_float32(groups))
    expected = by_autograd(features * 1e3, embeddings * 10, groups)
    torch.testing.assert_close(losses[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1].double(), expected[1], rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(losses).sum(), (features, embeddings)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [0, 2])
def test_nothing_to_compare(threads, count):
    """Images without segments, in groups or without any; PyTorch goes other ways with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        features, embeddings, _ = problem((0, 0))
        empty = torch.zeros(1, 0, dtype=torch.long)
        group = PairGroup(slice(0, 1), torch.rand(1, 20, 2), torch.zeros(1, 0, 20).double(), 15, 10, empty)
        mask, dice = mask_and_dice(features, embeddings, [group] * count)
        assert mask.shape == dice.shape == (0,)
        (mask.sum() + dice.sum()).backward()
        assert not features.grad.any()
    finally:
        torch.set_num_threads(before)


def test_candidates_do_not_wait_for_the_backward():
    features, embeddings, groups = problem(num_points=2000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mask_and_dice(features, embeddings, groups)
    of_masks = [t for t in kept if t is not features and t is not embeddings and t.numel() > features.numel()]
    assert sorted(str(t.dtype) for t in of_masks) == 2 * ["torch.float64"] + 2 * ["torch.int32"]
    assert sum(t.numel() for t in of_masks) == 2 * len(embeddings) * 2000  # of three times as many candidates


def test_the_gradient_stays_in_float32_under_autocast():
    features, embeddings, groups = problem()
    arguments = (features.detach().float(), embeddings.detach().float().requires_grad_(), in_float32(groups))
    (expected,) = torch.autograd.grad(sum(mask_and_dice(*arguments)).sum(), arguments[1])
    loss = sum(mask_and_dice(*arguments)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(loss, arguments[1])
    assert torch.equal(gradient, expected)
