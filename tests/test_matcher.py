"""Matching: against the official cost matrices, official formulas on dense masks, and all assignments tried out."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab import ops
from m2f_lab.loss import Matcher, NonFiniteError
from m2f_lab.structures import MaskLogits, Output, Target, sample_points

GOLDEN = Path(__file__).parent / "golden"
SIZE, PADDED = (29, 45), (32, 64)  # of the images
K, L, Q, C = 6, 3, 9, 5


def random_output(batch: int = 3, dtype: torch.dtype = torch.float32) -> Output:
    features = torch.randn(batch, C, PADDED[0] // 4, PADDED[1] // 4, dtype=dtype)
    return Output(
        class_logits=[torch.randn(batch, Q, K + 1, dtype=dtype) for _ in range(L)],
        masks=[MaskLogits(torch.randn(batch, Q, C, dtype=dtype), features) for _ in range(L)],
        image_size=SIZE,
        padded_size=PADDED,
    )


def random_target(num_segments: int) -> Target:
    numbers = torch.randint(0, num_segments, (4, 5)) if num_segments else torch.full((4, 5), 255)
    numbers[0, :2] = 255
    id_map = numbers.repeat_interleave(7, 0)[: SIZE[0]].repeat_interleave(9, 1).to(torch.uint8)
    return Target.from_id_map(id_map, torch.randint(0, K, (num_segments,)))


@pytest.fixture
def output() -> Output:
    return random_output()


@pytest.fixture
def targets() -> list[Target]:
    return [random_target(4), random_target(0), random_target(2)]


def official_costs(class_logits: Tensor, mask_logits: Tensor, target: Target, points: Tensor) -> dict[str, Tensor]:
    """One image, one prediction, as the authors write it. [Q, K+1], [Q, H, W], points [P, 2] → {term: [Q, T]}"""
    truth = F.pad(target.dense().float(), (0, PADDED[1] - target.size[1], 0, PADDED[0] - target.size[0]))
    truth = sample_points(truth[None], points[None])[0]  # (T, P)
    logits = sample_points(mask_logits[None], points[None])[0]  # (Q, P)
    positive = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    negative = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    probability = logits.sigmoid()
    dice = 1 - (2 * probability @ truth.T + 1) / (probability.sum(-1)[:, None] + truth.sum(-1)[None] + 1)
    return {
        "class": -2 * class_logits.softmax(-1)[:, target.labels],
        "mask": 5 * (positive @ truth.T + negative @ (1 - truth).T) / logits.shape[1],
        "dice": 5 * dice,
    }


plain_and_fast = pytest.mark.parametrize("switch", [nullcontext, ops.plain], ids=["fast", "plain"])


# --- the official matcher ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "official_swin.safetensors")


def golden_output(golden: dict[str, Tensor], prediction: int) -> Output:
    """One prediction. Dense masks are factored masks whose features are the masks."""
    dense = golden[f"decoder.{prediction}.mask_logits"]  # (B, Q, H, W)
    identity = torch.eye(dense.shape[1]).expand(len(dense), -1, -1)
    return Output([golden[f"decoder.{prediction}.class_logits"]], [MaskLogits(identity, dense)], (64, 80), (64, 96))


def golden_targets(golden: dict[str, Tensor]) -> list[Target]:
    return [Target(golden[f"target.{image}.classes"], masks=golden[f"target.{image}.masks"]) for image in range(2)]


@pytest.mark.parametrize("prediction", range(5))
@plain_and_fast
def test_costs_and_assignments_equal_the_official_ones(golden, prediction, switch):
    config = json.loads((GOLDEN / "official_swin.json").read_text())["config"]
    matcher = Matcher(config["num_points"], config["class_weight"], config["mask_weight"], config["dice_weight"])
    arguments = (
        golden_output(golden, prediction),
        golden_targets(golden),
        torch.stack([golden[f"match.{prediction}.{image}.points"] for image in range(2)]),
    )
    with switch():
        costs = matcher.costs(*arguments)
        matching = matcher(*arguments)
    for image in range(2):
        expected = golden[f"match.{prediction}.{image}.cost"]
        torch.testing.assert_close(sum(costs[image].values())[0], expected, rtol=1e-4, atol=1e-5)
        query, segment = matching.of(0, image)
        assert query.tolist() == golden[f"match.{prediction}.{image}.query"].tolist()
        assert segment.tolist() == golden[f"match.{prediction}.{image}.target"].tolist()


@pytest.mark.parametrize("at_once", [10_000, 7], ids=["all at once", "seven points at a time"])
@plain_and_fast
def test_all_predictions_cost_what_they_cost_one_by_one(monkeypatch, output, targets, at_once, switch):
    monkeypatch.setattr("m2f_lab.ops.at_once.POINTS_ON_CPU", at_once)
    points = torch.rand(3, 100, 2)
    with switch():
        costs = Matcher().costs(output, targets, points)
    for image, prediction in itertools.product(range(3), range(L)):
        dense = output.masks[prediction].dense()[image]
        expected = official_costs(output.class_logits[prediction][image], dense, targets[image], points[image])
        for term in ("class", "mask", "dice"):
            torch.testing.assert_close(costs[image][term][prediction], expected[term], rtol=1e-5, atol=1e-5)


def test_huge_logits_cost_what_they_cost_the_authors(output, targets):
    loud = replace(output, masks=[MaskLogits(1e4 * masks.embeddings, masks.features) for masks in output.masks])
    points = torch.rand(3, 100, 2)
    cost = Matcher().costs(loud, targets, points)[0]
    expected = official_costs(loud.class_logits[2][0], loud.masks[2].dense()[0], targets[0], points[0])
    torch.testing.assert_close(cost["mask"][2], expected["mask"], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(cost["dice"][2], expected["dice"], rtol=1e-4, atol=1e-4)


def test_weights_weigh_their_own_term(output, targets):
    points = torch.rand(3, 50, 2)
    plain = Matcher(class_weight=1, mask_weight=1, dice_weight=1).costs(output, targets, points)
    weighted = Matcher(class_weight=3, mask_weight=5, dice_weight=7).costs(output, targets, points)
    for image in range(3):
        for term, weight in (("class", 3), ("mask", 5), ("dice", 7)):
            torch.testing.assert_close(weighted[image][term], weight * plain[image][term])


# --- the assignment ---------------------------------------------------------------------------------------------------


def test_no_other_assignment_is_cheaper(output, targets):
    points = torch.rand(3, 60, 2)
    costs = Matcher().costs(output, targets, points)
    matching = Matcher()(output, targets, points)
    for image, prediction in itertools.product((0, 2), range(L)):
        cost = sum(costs[image].values())[prediction]  # (Q, T)
        segments = range(cost.shape[1])
        cheapest = min(
            sum(cost[query, segment].item() for query, segment in zip(queries, segments, strict=True))
            for queries in itertools.permutations(range(Q), cost.shape[1])
        )
        query, segment = matching.of(prediction, image)
        assert cost[query, segment].sum().item() == pytest.approx(cheapest, rel=1e-6)


def test_pairs_are_ordered_and_every_segment_has_one_query(output, targets):
    matching = Matcher(num_points=50)(output, targets)
    rows = list(zip(*(getattr(matching, name).tolist() for name in ("image", "prediction", "query")), strict=True))
    assert rows == sorted(set(rows))
    assert len(rows) == L * (4 + 0 + 2)
    for prediction in range(L):
        assert sorted(matching.of(prediction, 0)[1].tolist()) == [0, 1, 2, 3]
        assert matching.of(prediction, 1)[0].tolist() == []
        assert sorted(matching.of(prediction, 2)[1].tolist()) == [0, 1]


def test_more_segments_than_queries(output):
    numbers = torch.arange(15, dtype=torch.uint8).repeat_interleave(3).expand(*SIZE)
    crowded = Target.from_id_map(numbers, torch.randint(0, K, (15,)))
    matching = Matcher(num_points=50)(random_output(1), [crowded])
    for prediction in range(L):
        query, segment = matching.of(prediction)
        assert query.tolist() == list(range(Q))
        assert len(set(segment.tolist())) == Q


def test_no_segments_at_all(output):
    matching = Matcher(num_points=50)(output, [random_target(0)] * 3)
    assert len(matching.image) == 0


def test_perfect_masks_find_their_segments():
    target = random_target(4)
    masks = F.pad(target.dense().float(), (0, PADDED[1] - SIZE[1], 0, PADDED[0] - SIZE[0])) * 20 - 10
    order = torch.tensor([7, 2, 5, 0])
    embeddings = torch.zeros(1, Q, 4)
    embeddings[0, order] = torch.eye(4)
    output = Output([torch.zeros(1, Q, K + 1)], [MaskLogits(embeddings, masks[None])], SIZE, PADDED)
    query, segment = Matcher(num_points=2000)(output, [target]).of(0)
    assert dict(zip(segment.tolist(), query.tolist(), strict=True)) == dict(enumerate(order.tolist()))


def test_the_seed_decides_the_points(output, targets):
    def cost(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return Matcher(num_points=50).costs(output, targets)[0]["mask"]

    assert torch.equal(cost(1), cost(1))
    assert not torch.equal(cost(1), cost(2))


# --- precision --------------------------------------------------------------------------------------------------------


def test_costs_are_float32_under_autocast(output, targets):
    points = torch.rand(3, 100, 2)
    expected = Matcher().costs(output, targets, points)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = Matcher().costs(output, targets, points)
        matching = Matcher()(output, targets, points)
    for image in range(3):
        for term in ("class", "mask", "dice"):
            assert torch.equal(under_autocast[image][term], expected[image][term])
    assert torch.equal(matching.query, Matcher()(output, targets, points).query)


def in_dtype(output: Output, dtype: torch.dtype) -> Output:
    features = output.masks[0].features.to(dtype)
    return replace(
        output,
        class_logits=[logits.to(dtype) for logits in output.class_logits],
        masks=[MaskLogits(masks.embeddings.to(dtype), features) for masks in output.masks],
    )


def test_half_precision_outputs_are_compared_in_float32(output, targets):
    points = torch.rand(3, 100, 2)
    half = in_dtype(output, torch.bfloat16)
    costs = Matcher().costs(half, targets, points)
    expected = Matcher().costs(in_dtype(half, torch.float32), targets, points)
    for image in range(3):
        for term in ("class", "mask", "dice"):
            assert costs[image][term].dtype == torch.float32
            assert torch.equal(costs[image][term], expected[image][term])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_class_logit_that_is_not_finite_is_named(output, targets, value):
    output.class_logits[1][2, 4, 3] = value
    with pytest.raises(NonFiniteError, match=r"image 2, prediction 1: class\)") as caught:
        Matcher(num_points=50)(output, targets)
    assert caught.value.culprits == [(2, 1, "class")]


def test_a_class_logit_is_watched_where_there_is_nothing_to_match(output, targets):
    output.class_logits[0][1, 0, 0] = float("nan")  # image 1 has no segments, but its queries learn "no object"
    with pytest.raises(NonFiniteError) as caught:
        Matcher(num_points=50)(output, targets)
    assert caught.value.culprits == [(1, 0, "class")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_embedding_that_is_not_finite_is_named(output, targets, value):
    output.masks[2].embeddings[0, 5, 1] = value
    with pytest.raises(NonFiniteError, match="image 0, prediction 2: mask; image 0, prediction 2: dice") as caught:
        Matcher(num_points=50)(output, targets)
    assert caught.value.culprits == [(0, 2, "mask"), (0, 2, "dice")]


def test_one_pixel_that_no_point_touches_is_found(output, targets):
    output.masks[0].features[2, 0, -1, -1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"and \d+ more|image 2") as caught:
        Matcher()(output, targets, torch.full((3, 8, 2), 0.1))
    assert caught.value.culprits == [(2, prediction, term) for prediction in range(L) for term in ("mask", "dice")]


def test_the_error_says_how_to_go_on(output, targets):
    output.class_logits[0][0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"learning rate.*bfloat16.*weights"):
        Matcher(num_points=50)(output, targets)


@pytest.mark.parametrize("label", [K, 255, -1])
def test_an_unknown_class_is_named(output, targets, label):
    targets[2] = replace(targets[2], labels=torch.tensor([1, label]))
    with pytest.raises(ValueError, match=rf"target of image 2 has labels \[{label}\].*classes 0…{K - 1}"):
        Matcher(num_points=50)(output, targets)


def test_targets_must_fit_the_output(output, targets):
    with pytest.raises(ValueError, match="3 images, but there are 2 targets"):
        Matcher(num_points=50)(output, targets[:2])
    targets[1] = Target.from_id_map(torch.zeros(32, 65, dtype=torch.uint8), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"target of image 1 is \(32, 65\), larger than the padded image \(32, 64\)"):
        Matcher(num_points=50)(output, targets)


@plain_and_fast
def test_predictions_may_have_features_of_their_own(output, targets, switch):
    points = torch.rand(3, 100, 2)
    expected = Matcher().costs(output, targets, points)
    for prediction in (0, 2):
        masks = output.masks[prediction]
        output.masks[prediction] = MaskLogits(masks.embeddings, masks.features.clone())
    with switch():
        costs = Matcher().costs(output, targets, points)
    for image in range(3):
        for term in ("class", "mask", "dice"):
            torch.testing.assert_close(costs[image][term], expected[image][term])
    output.masks[0].features[1] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        Matcher(num_points=50)(output, targets)
    assert caught.value.culprits == [(1, 0, "mask"), (1, 0, "dice")]


# --- speed ------------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Watches for operations that would make the host wait for a GPU."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.waits:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_computing_costs_never_waits_for_the_device(output, targets):
    with HostReads() as reads:
        Matcher(num_points=50).costs(output, targets)
        output.finite()
    assert reads.seen == []
    with HostReads() as reads:
        bool(targets[0].labels.amax() > 3)
    assert reads.seen == ["_local_scalar_dense"]
