"""The matcher's decision as arrays: the criterion's own pairs, and runners-up against all assignments tried out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from m2f_lab.explore.matching.trace import (
    NONE,
    checked_target,
    matched_masks,
    resize_target,
    runners_up,
    seeded_points,
    trace_matching,
)
from m2f_lab.explore.parts.reading import kept_share
from m2f_lab.loss import Criterion, NonFiniteError
from m2f_lab.structures import MaskLogits, Output, Target
from tests.toy_output import toy_output

SIZE = (60, 88)
CRITERION = Criterion(num_classes=4, num_points=200)


def toy_target(num_segments: int = 3, size: tuple[int, int] = SIZE) -> Target:
    """Vertical stripes, and ignored pixels above them."""
    columns = torch.arange(size[1]) * max(num_segments, 1) // size[1]
    id_map = columns.expand(*size).to(torch.uint8).clone()
    id_map[:4] = 255
    if not num_segments:
        id_map[:] = 255
    return Target.from_id_map(id_map, torch.arange(num_segments) % 4)


def optimum(cost: np.ndarray, allowed) -> tuple[float, list[dict[int, int]]]:
    """By trying out: the least total, and every assignment {segment: query} that reaches it."""
    num_queries, num_segments = cost.shape
    if num_segments <= num_queries:
        pairs = (dict(zip(range(num_segments), queries, strict=True))
                 for queries in itertools.permutations(range(num_queries), num_segments))  # fmt: skip
    else:
        pairs = (dict(zip(segments, range(num_queries), strict=True))
                 for segments in itertools.permutations(range(num_segments), num_queries))  # fmt: skip
    totals = [(sum(cost[q, t] for t, q in pair.items()), pair) for pair in pairs if allowed(pair)]
    if not totals:
        return np.inf, []
    least = min(total for total, _ in totals)
    return least, [pair for total, pair in totals if total < least + 1e-9]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (4, 1), (2, 2), (5, 3), (3, 5), (4, 4)])
def test_the_runner_up_is_what_trying_out_everything_finds(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    for _ in range(8):
        cost = rng.normal(size=shape)
        rows, columns = linear_sum_assignment(cost)
        chosen = np.full(shape[1], NONE)
        chosen[columns] = rows
        runner_up, margin, moved = runners_up(cost, chosen)
        best, _ = optimum(cost, lambda pair: True)
        for segment, query in enumerate(chosen):
            if query == NONE:
                assert runner_up[segment] == NONE
                assert np.isnan(margin[segment])
                continue
            denied, (*solutions,) = optimum(cost, lambda pair, t=segment, q=query: pair.get(t) != q)
            assert margin[segment] == pytest.approx(denied - best) or (np.isinf(margin[segment]) and np.isinf(denied))
            if not solutions:
                assert runner_up[segment] == NONE
                continue
            (solution,) = solutions  # random costs have no ties
            assert runner_up[segment] == solution.get(segment, NONE)
            others = [t for t in range(shape[1]) if t != segment]
            assert moved[segment] == sum(solution.get(t, NONE) != chosen[t] for t in others)


def test_equals_have_no_margin() -> None:
    runner_up, margin, _ = runners_up(np.zeros((3, 2)), np.array([0, 1]))
    assert margin.tolist() == [0, 0]
    assert runner_up[0] != 0
    assert runner_up[1] != 1


def test_taking_a_rivals_query_counts_what_the_rival_loses() -> None:
    """Segment 0 would rather take query 1, which segment 1 needs more than it does."""
    cost = np.array([[0.0, 9.0], [1.0, 0.0], [5.0, 2.0]])
    runner_up, margin, moved = runners_up(cost, np.array([0, 1]))
    assert runner_up.tolist() == [1, 2]  # 1 + 2 is less than 5 + 0
    assert margin.tolist() == [3.0, 2.0]
    assert moved.tolist() == [1, 0]


# ------------------------------------------------------------------------------------------ the criterion's own


def as_pairs(trace) -> list[list[tuple[int, int]]]:
    return [sorted((int(query), segment) for segment, query in enumerate(row) if query != NONE) for row in trace.chosen]


@pytest.mark.parametrize("num_segments", [0, 1, 3, 5, 8])
def test_the_choice_is_the_criterions(num_segments: int) -> None:
    output, target = toy_output(SIZE), toy_target(num_segments)
    points = torch.rand(1, 200, 2)
    trace = trace_matching(output, target, CRITERION.matcher, points)
    matching = CRITERION.matcher(output, [target], points)
    for prediction in range(output.num_predictions):
        pairs = zip(*(part.tolist() for part in matching.of(prediction)), strict=True)
        assert as_pairs(trace)[prediction] == sorted(pairs)
    (costs,) = CRITERION.matcher.costs(output, [target], points)
    for name, cost in costs.items():
        np.testing.assert_array_equal(trace.terms[name], cost.numpy())
    np.testing.assert_array_equal(trace.cost, sum(costs.values()).numpy())
    assert trace.chosen.shape == trace.runner_up.shape == trace.margin.shape == (5, num_segments)
    assert (trace.chosen != NONE).sum() == 5 * min(5, num_segments)


def test_total_is_the_sum_over_the_pairs() -> None:
    trace = trace_matching(toy_output(SIZE), toy_target(3), CRITERION.matcher)
    expected = sum(trace.cost[2, query, segment] for segment, query in enumerate(trace.chosen[2]))
    assert trace.total(2) == pytest.approx(expected, rel=1e-6)


def test_one_query_has_no_runner_up() -> None:
    trace = trace_matching(toy_output(SIZE, num_queries=1), toy_target(1), CRITERION.matcher)
    assert (trace.chosen == 0).all()
    assert (trace.runner_up == NONE).all()
    assert np.isinf(trace.margin).all()


def test_the_same_call_shows_the_same_and_disturbs_no_one() -> None:
    output, target = toy_output(SIZE), toy_target()
    before = torch.get_rng_state()
    first = trace_matching(output, target, CRITERION.matcher)
    torch.testing.assert_close(torch.get_rng_state(), before)
    torch.rand(7)
    np.testing.assert_array_equal(trace_matching(output, target, CRITERION.matcher).cost, first.cost)
    other = trace_matching(output, target, CRITERION.matcher, seeded_points(200, seed=1))
    assert (other.cost != first.cost).any()


def test_what_is_not_finite_is_named() -> None:
    output = toy_output(SIZE)
    output.class_logits[2][0, 1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="prediction 2: class"):
        trace_matching(output, toy_target(), CRITERION.matcher)


def test_candidates_are_the_cheapest_and_those_that_matter() -> None:
    trace = trace_matching(toy_output(SIZE, num_queries=30), toy_target(), CRITERION.matcher)
    costs = trace.cost[1, :, 2]
    found = trace.candidates(1, 2, count=4)
    assert found[:4] == np.argsort(costs)[:4].tolist()
    assert {trace.chosen[1, 2], trace.runner_up[1, 2]} <= set(found)
    assert [costs[q] for q in found] == sorted(costs[q] for q in found)
    far = replace(trace, runner_up=np.full_like(trace.runner_up, int(costs.argmax())))
    assert far.candidates(1, 2, count=4)[-1] == costs.argmax()


# ------------------------------------------------------------------------------------------ over layers, over training


def test_kept_share() -> None:
    queries = np.array([[4, 7, NONE], [4, 2, 1], [4, 2, 3], [NONE, 2, 3]])
    assert kept_share(queries).tolist() == pytest.approx([1 / 2, 2 / 3, 2 / 3])
    assert np.isnan(kept_share(np.zeros((3, 0), int))).all()
    assert kept_share(np.array([[1, 2]])).shape == (0,)
    assert np.isnan(kept_share(np.array([[NONE], [3]]))).all()


# ------------------------------------------------------------------------------------------ masks


def test_agreement_tells_apart_what_both_cover() -> None:
    masks = torch.full((1, 2, 8, 8), -10.0)
    masks[0, 1, :, :4] = 10.0  # query 1: the left half
    output = Output(
        [torch.zeros(1, 2, 3)], [MaskLogits(torch.eye(2)[None], masks)], image_size=(32, 32), padded_size=(32, 32)
    )
    id_map = torch.full((32, 32), 255, dtype=torch.uint8)
    id_map[:16] = 0  # the upper half
    found = matched_masks(output, Target.from_id_map(id_map, torch.tensor([1])))
    assert found.segments.shape == (1, 8, 8)
    (laid,) = found.agreement(np.array([[1]]))[0]
    assert laid[0, 0] == 0
    assert laid[0, 7] == 1
    assert laid[7, 0] == 2
    assert laid[7, 7] == 255
    assert np.unique(found.agreement(np.array([[NONE]]))).tolist() == [1, 255]


def test_targets_are_resized_to_the_nearest_pixel() -> None:
    target = toy_target(3)
    doubled = resize_target(target, (120, 176))
    assert torch.equal(doubled.id_map[::2, ::2], target.id_map)
    assert resize_target(target, SIZE) is target
    as_masks = Target(target.labels, masks=target.dense())
    assert torch.equal(resize_target(as_masks, (30, 44)).masks, resize_target(target, (30, 44)).dense())


def test_targets_are_label_maps_of_any_kind() -> None:
    label_map = np.zeros((4, 6), np.uint8)
    image = np.zeros((4, 6, 3), np.uint8)
    for given in (label_map, label_map.tolist(), label_map.astype(np.uint16), torch.from_numpy(label_map)):
        assert checked_target(given, image).num_segments == 1
    for wrong, words in ((label_map / 2, r"float64 \[4, 6\]"), (image, r"uint8 \[4, 6, 3\]")):
        with pytest.raises(ValueError, match="A label map is integers.*" + words):
            checked_target(wrong, image)
