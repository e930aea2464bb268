"""Losses at shared points: the written-out gradient against autograd, and the parts they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f_lab.loss import pairs as pairs_module
from m2f_lab.loss.criterion import dice_loss, mask_loss
from m2f_lab.loss.pairs import SharedPoints, pair_losses
from m2f_lab.loss.points import PointReader, UncertainShare, kth_nearest_to_zero, shared_points
from m2f_lab.structures import sample_points

C, SIZE = 3, (6, 9)

# --- reading at shared points -----------------------------------------------------------------------------------------


@pytest.fixture
def points() -> Tensor:
    """Random ones, and all on and around the rim. [P, 2]"""
    rim = torch.tensor([-0.2, 0.0, 1e-3, 0.05, 0.5, 1.0, 1.1], dtype=torch.float64)
    return torch.cat([torch.rand(50, 2, dtype=torch.float64), torch.cartesian_prod(rim, rim)])


def test_points_are_read_and_spread_as_grid_sample_and_its_gradient(points):
    maps = torch.randn(4, *SIZE, dtype=torch.float64, requires_grad=True)
    expected = sample_points(maps[None], points[None])[0].T  # (P, N)
    reader = PointReader.at(points, SIZE)
    torch.testing.assert_close(reader.read(maps.detach().flatten(1).T.contiguous()), expected.detach())
    values = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, maps, values)
    torch.testing.assert_close(reader.spread(values), gradient.flatten(1).T)


def test_pixels_without_points_get_nothing():
    reader = PointReader.at(torch.tensor([[0.5, 0.5]]), (5, 5))  # the centre of the pixel in the middle
    assert reader.spread(torch.ones(1, 2)).nonzero().tolist() == [[12, 0], [12, 1]]


# --- choosing ---------------------------------------------------------------------------------------------------------


def assert_kth_nearest_to_zero(table: Tensor, k: int) -> None:
    kth, smaller, equal = kth_nearest_to_zero(table, k)
    assert all(values.is_contiguous() for values in (kth, smaller, equal)), "comparing would take ten times as long"
    expected = table.abs().sort(dim=0).values[k - 1]
    assert torch.equal(kth, expected)
    assert smaller.tolist() == (table.abs() < expected).sum(0).tolist()
    assert equal.tolist() == (table.abs() == expected).sum(0).tolist()


@pytest.mark.parametrize("count", [1, 33, 5000])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_the_kth_is_that_of_sorted_columns(count, share):
    k = max(1, int(share * count))
    assert_kth_nearest_to_zero(torch.randn(count, 4), k)
    assert_kth_nearest_to_zero(torch.randint(-9, 9, (count, 4)).float(), k)
    assert_kth_nearest_to_zero(torch.randn(count, 1).expand(count, 3) * torch.tensor([0, 1, 1e30]), k)
    assert_kth_nearest_to_zero(torch.randn(4, count, dtype=torch.float64).T, k)
    half_infinite = torch.randn(count, 2)
    half_infinite[::2] = torch.inf
    assert_kth_nearest_to_zero(half_infinite, k)


@pytest.mark.parametrize("misleading", [0, 9])
def test_a_sample_that_misleads_is_noticed(misleading):
    table = torch.rand(3200, 2) + 1
    table[::32] = misleading
    assert_kth_nearest_to_zero(table, 1600)


def test_only_what_lies_around_the_kth_is_sorted(monkeypatch):
    partition, sorted_at_once = np.partition, []
    monkeypatch.setattr(np, "partition", lambda x, *rest: sorted_at_once.append(x.shape[-1]) or partition(x, *rest))
    for k in (2000, 5000, 19_000):
        assert_kth_nearest_to_zero(torch.randn(20_000, 30), k)
    assert max(sorted_at_once) < 20_000 / 10


def test_the_weights_take_the_least_certain_points():
    logits = torch.randn(400, 5)
    weights = UncertainShare.of(logits, 100).weights(logits)
    assert weights.unique().tolist() == [0, 1]
    assert weights.sum(0).tolist() == [100] * 5
    for column in range(5):
        expected = logits[:, column].abs().topk(100, largest=False).indices.sort().values
        assert torch.equal(weights[:, column].nonzero().flatten(), expected)


def test_points_that_are_equally_certain_share_what_is_left():
    logits = torch.tensor([[0.1, -2.0, 2.0, 2.0, -0.3, 5.0], [1.0] * 6]).T
    weights = UncertainShare.of(logits, 3).weights(logits)
    torch.testing.assert_close(weights[:, 0], torch.tensor([1, 1 / 3, 1 / 3, 1 / 3, 1, 0]))
    torch.testing.assert_close(weights[:, 1], torch.full((6,), 0.5))


def test_candidates_come_first_and_are_left_out_where_nobody_wants_them():
    like = torch.zeros(1, dtype=torch.float64)
    points, num_candidates, num_uncertain = shared_points(40, 3.0, 0.75, like)
    assert (points.shape, points.dtype, num_candidates, num_uncertain) == ((130, 2), torch.float64, 120, 30)
    points, num_candidates, num_uncertain = shared_points(40, 3.0, 0.0, like)
    assert (len(points), num_candidates, num_uncertain) == (40, 0, 0)


# --- the losses -------------------------------------------------------------------------------------------------------


def problem(num_segments: tuple[int, ...] = (3, 0, 2), share: float = 0.75) -> tuple:
    """Arguments of `pair_losses`: images with two pairs per segment."""
    counts = [2 * number for number in num_segments]
    features = torch.randn(len(counts), C, *SIZE, dtype=torch.float64, requires_grad=True)
    embeddings = torch.randn(sum(counts), C, dtype=torch.float64, requires_grad=True)
    segments = torch.cat([torch.cat([torch.randperm(n), torch.randperm(n)]) for n in num_segments])
    shared = []
    for number in num_segments:
        points, *numbers = shared_points(20, 3.0, share, like=features)
        truth = torch.rand(number, len(points), dtype=torch.float64)
        shared.append(SharedPoints(PointReader.at(points, SIZE), truth.clone, *numbers))
    return features, embeddings, segments, counts, shared


def by_autograd(features, embeddings, segments, counts, shared) -> tuple[Tensor, Tensor]:
    """Pair by pair, with indices instead of weights."""
    results = []
    for image, (own, numbers) in enumerate(zip(embeddings.split(counts), segments.split(counts), strict=True)):
        points = shared[image]
        for embedding, number in zip(own, numbers, strict=True):
            pixels = (embedding @ features[image].flatten(1))[:, None]
            logits = (pixels[points.reader.pixels.long(), 0] * points.reader.weights).sum(1)
            candidates = logits[: points.num_candidates].abs()
            chosen = torch.cat(
                [
                    candidates.topk(points.num_uncertain, largest=False).indices,
                    torch.arange(points.num_candidates, len(logits)),
                ]
            )
            x, t = logits[chosen][None], points.read_truth()[number, chosen][None]
            results.append(torch.cat([mask_loss(x, t), dice_loss(x, t)]))
    return tuple(torch.stack(results).unbind(1))


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("at_once", [10_000, 7], ids=["all at once", "seven points at a time"])
def test_losses_and_gradients_are_those_of_autograd(monkeypatch, share, at_once):
    monkeypatch.setattr(pairs_module, "rows_at_once", lambda *_: at_once)
    arguments = problem(share=share)
    for ours, theirs in zip(pair_losses(*arguments), by_autograd(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs)
    weights = torch.randn(2, 10, dtype=torch.float64)  # of every pair and term its own
    gradients = [
        torch.autograd.grad((torch.stack(losses(*arguments)) * weights).sum(), arguments[:2])
        for losses in (pair_losses, by_autograd)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck():
    features, embeddings, *rest = problem((2, 1))
    assert torch.autograd.gradcheck(lambda f, e: pair_losses(f, e, *rest), (features, embeddings), eps=1e-7)


def test_one_term_alone_can_be_differentiated():
    arguments = problem()
    for term in (0, 1):
        ours = torch.autograd.grad(pair_losses(*arguments)[term].sum(), arguments[1])[0]
        torch.testing.assert_close(ours, torch.autograd.grad(by_autograd(*arguments)[term].sum(), arguments[1])[0])


def test_huge_logits_have_a_loss_and_a_gradient():
    features, embeddings, *rest = problem()
    losses = pair_losses(
        features.float() * 1e3, embeddings.float() * 10, *[*rest[:2], [in_float32(p) for p in rest[2]]]
    )
    expected = by_autograd(features * 1e3, embeddings * 10, *rest)
    torch.testing.assert_close(losses[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1].double(), expected[1], rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(losses).sum(), (features, embeddings)))


def in_float32(points: SharedPoints) -> SharedPoints:
    reader = PointReader(points.reader.pixels, points.reader.weights.float(), points.reader.num_pixels)
    return SharedPoints(reader, points.read_truth().float().clone, points.num_candidates, points.num_uncertain)


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_to_compare(threads):
    """An image without segments; PyTorch goes other ways with several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        features, embeddings, *rest = problem((0, 0))
        mask, dice = pair_losses(features, embeddings, *rest)
        assert mask.shape == dice.shape == (0,)
        (mask.sum() + dice.sum()).backward()
        assert not features.grad.any()
    finally:
        torch.set_num_threads(before)


def test_nothing_as_large_as_the_masks_waits_for_the_backward():
    arguments = problem()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        pair_losses(*arguments)
    assert max(kept) == arguments[0].numel()  # the features, which are there anyway
    assert sum(kept) == arguments[0].numel() + arguments[1].numel() + arguments[2].numel() + 4 * len(arguments[2])


def test_the_gradient_stays_in_float32_under_autocast():
    features, embeddings, segments, counts, shared = problem()
    arguments = (features.detach().float(), embeddings.detach().float().requires_grad_(), segments, counts)
    arguments = (*arguments, [in_float32(points) for points in shared])
    (expected,) = torch.autograd.grad(sum(pair_losses(*arguments)).sum(), arguments[1])
    loss = sum(pair_losses(*arguments)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(loss, arguments[1])
    assert torch.equal(gradient, expected)
