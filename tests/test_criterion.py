"""The training loss: against the official numbers, and against the authors' formulas on dense masks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, distributed

from m2f_lab import ops, recipes
from m2f_lab.loss import Criterion, Divisors, Matcher, Matching, NonFiniteError, build_criterion, sees_output, terms
from m2f_lab.loss.criterion import average_num_masks
from m2f_lab.structures import MaskLogits, Output, Target, sample_points

GOLDEN = Path(__file__).parent / "golden"
SIZE, PADDED = (29, 45), (32, 64)  # of the images
K, L, Q, C = 6, 3, 9, 5
TERMS = ("class", "mask", "dice")


def random_output(batch: int = 3, dtype: torch.dtype = torch.float32) -> Output:
    """An output whose logits and factors are leaves that want gradients."""
    features = torch.randn(batch, C, PADDED[0] // 4, PADDED[1] // 4, dtype=dtype, requires_grad=True)
    return Output(
        class_logits=[torch.randn(batch, Q, K + 1, dtype=dtype, requires_grad=True) for _ in range(L)],
        masks=[MaskLogits(torch.randn(batch, Q, C, dtype=dtype, requires_grad=True), features) for _ in range(L)],
        image_size=SIZE,
        padded_size=PADDED,
    )


def leaves(output: Output) -> list[Tensor]:
    return [*output.class_logits, *(masks.embeddings for masks in output.masks), output.masks[0].features]


def random_target(num_segments: int, size: tuple[int, int] = SIZE) -> Target:
    numbers = torch.randint(0, num_segments, (4, 5)) if num_segments else torch.full((4, 5), 255)
    numbers[0, :2] = 255
    id_map = numbers.repeat_interleave(7, 0)[: size[0]].repeat_interleave(9, 1)[:, : size[1]].to(torch.uint8)
    return Target.from_id_map(id_map, torch.randint(0, K, (num_segments,)))


@pytest.fixture
def output() -> Output:
    return random_output()


@pytest.fixture
def targets() -> list[Target]:
    return [random_target(4), random_target(0), random_target(2, (20, 40))]


@pytest.fixture
def criterion() -> Criterion:
    return Criterion(K, num_points=40)


def official_losses(
    output: Output,
    targets: list[Target],
    matching: Matching,
    points: Tensor,
    no_object_weight: float = 0.1,
    class_weights: tuple[float, ...] | None = None,
) -> dict[str, Tensor]:
    """Prediction by prediction, all masks multiplied out and padded, as the authors write it."""
    num_masks = max(1, sum(target.num_segments for target in targets))
    losses = {}
    for prediction in range(output.num_predictions):
        here = matching.prediction == prediction
        image, query, segment = matching.image[here], matching.query[here], matching.segment[here]

        classes = torch.full((len(targets), output.masks[0].num_queries), output.num_classes)
        for b, q, t in zip(image, query, segment, strict=True):
            classes[b, q] = targets[b].labels[t]
        logits = output.class_logits[prediction]
        weight = torch.ones(output.num_classes + 1, dtype=logits.dtype)
        weight[-1] = no_object_weight
        if class_weights is not None:
            weight[:-1] = torch.tensor(class_weights)
        losses[f"{prediction}.class"] = F.cross_entropy(logits.transpose(1, 2), classes, weight)

        masks = output.masks[prediction].dense()[image, query]  # (N, H, W)
        truth = torch.zeros(len(image), *PADDED, dtype=masks.dtype)
        for row, (b, t) in enumerate(zip(image, segment, strict=True)):
            height, width = targets[b].size
            truth[row, :height, :width] = targets[b].dense()[t]
        point_logits = sample_points(masks[:, None], points[here])[:, 0]
        point_truth = sample_points(truth[:, None], points[here])[:, 0]
        cross_entropy = F.binary_cross_entropy_with_logits(point_logits, point_truth, reduction="none")
        losses[f"{prediction}.mask"] = cross_entropy.mean(1).sum() / num_masks
        probability = point_logits.sigmoid()
        dice = 1 - (2 * (probability * point_truth).sum(-1) + 1) / (probability.sum(-1) + point_truth.sum(-1) + 1)
        losses[f"{prediction}.dice"] = dice.sum() / num_masks
    losses["total"] = sum(
        weight * losses[f"{prediction}.{term}"]
        for prediction in range(output.num_predictions)
        for term, weight in zip(TERMS, (2, 5, 5), strict=True)
    )
    return losses


def same_mask(logits: Tensor, truth: Tensor) -> Tensor:
    """The library's mask term under another identity: the criterion must not take the fused operation for it."""
    return terms.mask(logits, truth)


PATHS = {
    "as trained": (nullcontext, {}),
    "plain": (ops.plain, {}),
    "own term": (nullcontext, {"terms": {"mask": same_mask, "dice": terms.dice}}),
}
on_all_paths = pytest.mark.parametrize("path", PATHS)


@on_all_paths
def test_images_together_lose_what_they_lose_one_by_one(monkeypatch, output, targets, criterion, path):
    """On a GPU all images of a batch are compared at once, padded to the most segments."""
    switch, options = PATHS[path]
    results = []
    for at_once in (1, 2, 3):
        monkeypatch.setattr("m2f_lab.ops.at_once.IMAGES_ON_CPU", at_once)
        torch.manual_seed(0)
        with switch():
            losses = replace(criterion, **options)(output, targets)
            results.append((losses, torch.autograd.grad(losses["total"], leaves(output))))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


# --- the official numbers ---------------------------------------------------------------------------------------------


@on_all_paths
def test_losses_equal_the_official_ones(path):
    golden = load_file(GOLDEN / "official_swin.safetensors")
    reference = json.loads((GOLDEN / "official_swin.json").read_text())
    config = reference["config"]
    # Dense masks are factored masks whose features are the masks; those of all predictions lie side by side.
    dense = [golden[f"decoder.{prediction}.mask_logits"] for prediction in range(5)]
    features = torch.cat(dense, dim=1)  # (B, L*Q, H, W)
    unit = torch.eye(features.shape[1]).split(config["num_queries"])
    output = Output(
        [golden[f"decoder.{prediction}.class_logits"] for prediction in range(5)],
        [MaskLogits(rows.expand(2, -1, -1), features) for rows in unit],
        (64, 80),
        (64, 96),
    )
    targets = [Target(golden[f"target.{b}.classes"], masks=golden[f"target.{b}.masks"]) for b in range(2)]

    # The authors draw points for every prediction anew, so each is matched by itself and the pairs are put together.
    rows = []
    for prediction in range(5):
        single = replace(output, class_logits=[output.class_logits[prediction]], masks=[output.masks[prediction]])
        points = torch.stack([golden[f"match.{prediction}.{image}.points"] for image in range(2)])
        with PATHS[path][0]():
            found = Matcher(config["num_points"])(single, targets, points)
        rows += [
            (image, prediction, query, segment)
            for image, query, segment in zip(
                found.image.tolist(), found.query.tolist(), found.segment.tolist(), strict=True
            )
        ]
    matching = Matching(*torch.tensor(sorted(rows)).unbind(1))
    points = torch.zeros(len(rows), config["num_points"], 2)
    for prediction in range(5):
        points[matching.prediction == prediction] = golden[f"loss.{prediction}.points"]

    switch, options = PATHS[path]
    criterion = Criterion(config["num_classes"], num_points=config["num_points"], **options)
    with switch():
        losses = criterion.losses(output, targets, matching, points)
    for prediction, expected in reference["losses"].items():
        for term, name in (("class", "loss_ce"), ("mask", "loss_mask"), ("dice", "loss_dice")):
            assert losses[f"{prediction}.{term}"].item() == pytest.approx(expected[name], rel=1e-4), (prediction, term)
    assert losses["total"].item() == pytest.approx(reference["loss_weighted_total"], rel=1e-4)
    assert len(losses) == 1 + 3 * 5


@on_all_paths
def test_losses_and_gradients_equal_those_of_dense_masks(targets, path):
    switch, options = PATHS[path]
    output = random_output(dtype=torch.float64)
    criterion = Criterion(K, num_points=40, **options)
    matching = criterion.matcher(output, targets)
    points = torch.rand(len(matching.image), 40, 2, dtype=torch.float64)
    with switch():
        losses = criterion.losses(output, targets, matching, points)
    expected = official_losses(output, targets, matching, points)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-10, atol=1e-10, msg=name)
    for ours, theirs in zip(
        torch.autograd.grad(losses["total"], leaves(output)),
        torch.autograd.grad(expected["total"], leaves(output)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_call_matches_and_compares(output, targets, criterion):
    torch.manual_seed(5)
    losses = criterion(output, targets)
    torch.manual_seed(5)
    matching = criterion.matcher(output, targets)
    again = criterion.losses(output, targets, matching)
    assert all(torch.equal(losses[name], again[name]) for name in losses)


def published_points(criterion: Criterion, output: Output, targets: list[Target], matching: Matching) -> Tensor:
    """The candidates that the criterion draws, and of them what PointRend chooses for each pair. [M, P, 2]"""
    candidates = int(criterion.num_points * criterion.oversample_ratio)
    uncertain = int(criterion.num_points * criterion.importance_sample_ratio)
    drawn = [torch.rand(candidates + criterion.num_points - uncertain, 2) for _ in targets]
    dense = torch.stack([masks.dense() for masks in output.masks])  # (L, B, Q, H, W)
    rows = []
    for image, prediction, query in zip(matching.image, matching.prediction, matching.query, strict=True):
        points = drawn[image]
        logits = sample_points(dense[prediction, image, query][None, None], points[None, :candidates])[0, 0]
        chosen = (-logits.abs()).topk(uncertain).indices
        rows.append(torch.cat([points[chosen], points[candidates:]]))
    return torch.stack(rows)


@on_all_paths
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_masks_are_compared_where_the_matched_ones_are_undecided(output, targets, share, path):
    switch, options = PATHS[path]
    criterion = Criterion(K, num_points=40, oversample_ratio=2.5, importance_sample_ratio=share, **options)
    matching = criterion.matcher(output, targets)
    torch.manual_seed(3)
    points = published_points(criterion, output, targets, matching)
    expected = criterion.losses(output, targets, matching, points)
    torch.manual_seed(3)
    with switch():
        losses = criterion.losses(output, targets, matching)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    for ours, theirs in zip(
        torch.autograd.grad(losses["total"], leaves(output)),
        torch.autograd.grad(expected["total"], leaves(output)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_without_a_share_for_uncertain_points_all_are_uniform(output, targets):
    criterion = Criterion(K, num_points=40, importance_sample_ratio=0.0)
    matching = criterion.matcher(output, targets)
    torch.manual_seed(3)
    drawn = torch.stack([torch.rand(40, 2) for _ in targets])
    expected = criterion.losses(output, targets, matching, drawn[matching.image])
    torch.manual_seed(3)
    losses = criterion.losses(output, targets, matching)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)


def test_the_total_is_the_weighted_sum(output, targets):
    criterion = Criterion(K, num_points=40, weights={"class": 3, "dice": 7})
    losses = criterion(output, targets)
    expected = sum(
        weight * losses[f"{prediction}.{term}"]
        for prediction in range(L)
        for term, weight in zip(TERMS, (3, 5, 7), strict=True)
    )
    torch.testing.assert_close(losses["total"], expected)
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())


def test_id_maps_and_boolean_masks_give_the_same_loss(output, targets, criterion):
    torch.manual_seed(2)
    by_map = criterion(output, targets)
    torch.manual_seed(2)
    by_masks = criterion(output, [Target(target.labels, masks=target.dense()) for target in targets])
    assert all(torch.equal(by_map[name], by_masks[name]) for name in by_map)


def test_a_smaller_target_is_a_padded_one(output, targets, criterion):
    padded = [
        Target.from_id_map(
            F.pad(t.id_map, (0, PADDED[1] - t.size[1], 0, PADDED[0] - t.size[0]), value=255), t.labels
        )
        for t in targets
    ]  # fmt: skip
    torch.manual_seed(2)
    smaller = criterion(output, targets)
    torch.manual_seed(2)
    larger = criterion(output, padded)
    assert all(torch.equal(smaller[name], larger[name]) for name in smaller)


# --- the terms, one by one --------------------------------------------------------------------------------------------


def two_queries(class_logits: list[list[float]]) -> tuple[Output, list[Target], Matching]:
    """One image, K = 2; query 1 is matched with a segment of class 0, query 0 with nothing."""
    masks = MaskLogits(torch.zeros(1, 2, 1), torch.zeros(1, 1, 2, 2))
    output = Output([torch.tensor([class_logits])], [masks], (8, 8), (8, 8))
    target = Target.from_id_map(torch.zeros(8, 8, dtype=torch.uint8), torch.tensor([0]))
    return output, [target], Matching(*torch.tensor([[0], [0], [1], [0]]))


def test_no_object_is_the_last_class_and_weighs_a_tenth():
    probabilities = [[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]
    output, targets, matching = two_queries([[math.log(p) for p in row] for row in probabilities])
    loss = Criterion(2, num_points=4).losses(output, targets, matching)["0.class"].item()
    assert loss == pytest.approx(-(0.1 * math.log(0.3) + 1 * math.log(0.6)) / (0.1 + 1), rel=1e-5)
    loss = Criterion(2, num_points=4, no_object_weight=0.5).losses(output, targets, matching)["0.class"].item()
    assert loss == pytest.approx(-(0.5 * math.log(0.3) + 1 * math.log(0.6)) / (0.5 + 1), rel=1e-5)


def test_class_weights_are_those_of_cross_entropy(output, targets):
    """As torch's cross_entropy takes them, beside the weight of no object; masks do not weigh more."""
    class_weights = tuple(0.5 + k for k in range(K))
    criterion = Criterion(K, num_points=40, class_weights=class_weights)
    matching = criterion.matcher(output, targets)
    points = torch.rand(len(matching.image), 40, 2)
    losses = criterion.losses(output, targets, matching, points)
    expected = official_losses(output, targets, matching, points, class_weights=class_weights)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6, msg=name)
    unweighted = Criterion(K, num_points=40).losses(output, targets, matching, points)
    assert losses["0.class"] != unweighted["0.class"]
    assert losses["0.mask"] == unweighted["0.mask"]


def test_an_undecided_mask_costs_the_logarithm_of_two():
    output, targets, matching = two_queries([[0.0] * 3] * 2)
    losses = Criterion(2, num_points=4).losses(output, targets, matching, points=torch.full((1, 4, 2), 0.5))
    assert losses["0.mask"].item() == pytest.approx(math.log(2), rel=1e-5)
    assert losses["0.dice"].item() == pytest.approx(1 - (2 * 2 + 1) / (2 + 4 + 1), rel=1e-5)


def test_mask_and_dice_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [30.0, -30.0]])  # probabilities 1/2, 3/4; 1, 0
    truth = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(terms.mask(logits, truth), torch.tensor([(math.log(2) + math.log(4 / 3)) / 2, 0.0]))
    torch.testing.assert_close(terms.dice(logits, truth), torch.tensor([1 - (1.5 + 1) / (1.25 + 1 + 1), 0.0]))


def test_gradients_of_the_mask_losses():
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    truth = torch.rand(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: terms.mask(x, truth), logits)
    assert torch.autograd.gradcheck(lambda x: terms.dice(x, truth), logits)


def test_only_matched_masks_and_all_classes_are_taught(output, targets, criterion):
    matching = criterion.matcher(output, targets)
    criterion.losses(output, targets, matching)["total"].backward()
    for prediction in range(L):
        taught = output.masks[prediction].embeddings.grad.abs().sum(-1) > 0  # (B, Q)
        expected = torch.zeros_like(taught)
        for image in range(3):
            expected[image, matching.of(prediction, image)[0]] = True
        assert torch.equal(taught, expected)
        assert (output.class_logits[prediction].grad.abs().sum(-1) > 0).all()


# --- changed terms ----------------------------------------------------------------------------------------------------


def thousand(logits: Tensor, truth: Tensor) -> Tensor:
    return 1000 + 0 * logits.sum(1)


@pytest.mark.parametrize("term", ["mask", "dice"])
def test_a_replaced_function_changes_the_loss(monkeypatch, output, targets, term):
    def losses() -> dict[str, Tensor]:
        torch.manual_seed(1)
        return build_criterion(recipes.debug_tiny(num_classes=K))(output, targets)

    before = losses()
    monkeypatch.setattr(terms, term, thousand)
    after = losses()
    other = {"mask": "dice", "dice": "mask"}[term]
    for prediction in range(L):
        assert after[f"{prediction}.{term}"].item() == pytest.approx(1000)
        torch.testing.assert_close(after[f"{prediction}.{other}"], before[f"{prediction}.{other}"])
    difference = sum(5 * (1000 - before[f"{prediction}.{term}"]) for prediction in range(L))
    torch.testing.assert_close(after["total"] - before["total"], difference)


def test_terms_get_the_logits_and_truth_of_the_chosen_points(output, targets):
    seen = []

    def watching(logits: Tensor, truth: Tensor) -> Tensor:
        seen.append((logits.detach(), truth))
        return logits.mean(1)

    criterion = Criterion(K, terms={"own": watching}, weights={"own": 2.0}, num_points=40)
    assert criterion.term_names == ("class", "own")
    losses = criterion(output, targets)
    assert list(losses)[1:] == [f"{prediction}.{term}" for term in ("class", "own") for prediction in range(L)]
    assert [logits.shape for logits, _ in seen] == [(4 * L, 40), (2 * L, 40)]  # image by image
    assert all(truth.shape == logits.shape and 0 <= truth.min() <= truth.max() <= 1 for logits, truth in seen)
    own = sum(losses[f"{prediction}.own"] for prediction in range(L))
    torch.testing.assert_close(own, sum(logits.mean(1).sum() for logits, _ in seen) / 6)


def test_a_term_that_sees_the_output_is_divided_by_the_number_of_segments(output, targets, criterion):
    @sees_output
    def area(output: Output, targets: list[Target], matching: Matching) -> Tensor:
        assert len(matching.image) == 6 * L
        return torch.stack([masks.dense().sigmoid().mean() for masks in output.masks])

    extended = replace(criterion, terms={**criterion.terms, "area": area}, weights={"area": 3.0})
    torch.manual_seed(1)
    expected = criterion(output, targets)
    torch.manual_seed(1)
    losses = extended(output, targets)
    assert all(torch.equal(losses[name], value) for name, value in expected.items() if name != "total")
    areas = [output.masks[prediction].dense().sigmoid().mean() / 6 for prediction in range(L)]
    for prediction, value in enumerate(areas):
        torch.testing.assert_close(losses[f"{prediction}.area"], value)
    torch.testing.assert_close(losses["total"], expected["total"] + 3 * sum(areas))
    alone = Criterion(K, terms={"area": area}, weights={"area": 3.0}, num_points=40)(output, targets)
    torch.testing.assert_close(alone["1.area"], areas[1])


def test_a_changed_class_term_is_weighted_alike(output, targets, criterion):
    focal = replace(criterion, class_term=lambda logits, classes: terms.cross_entropy(logits, classes) ** 2)
    matching = criterion.matcher(output, targets)
    losses = focal.losses(output, targets, matching)
    classes = torch.full((3, Q), K)
    query, segment = matching.of(1, 0)
    classes[0, query] = targets[0].labels[segment]
    query, segment = matching.of(1, 2)
    classes[2, query] = targets[2].labels[segment]
    each = F.cross_entropy(output.class_logits[1].flatten(0, 1), classes.flatten(), reduction="none") ** 2
    weight = torch.where(classes.flatten() == K, 0.1, 1.0)
    torch.testing.assert_close(losses["1.class"], (each * weight).sum() / weight.sum())


def test_divisors_replace_those_of_the_images(output, targets, criterion):
    torch.manual_seed(1)
    own = criterion(output, targets)
    torch.manual_seed(1)
    given = criterion(output, targets, Divisors(queries=2 * (6 + 0.1 * (3 * Q - 6)), segments=18))
    for prediction in range(L):
        torch.testing.assert_close(given[f"{prediction}.class"], own[f"{prediction}.class"] / 2)
        for term in ("mask", "dice"):
            torch.testing.assert_close(given[f"{prediction}.{term}"], own[f"{prediction}.{term}"] / 3)


@on_all_paths
def test_predictions_may_have_features_of_their_own(targets, path):
    """The same masks, once over shared features and once over copies, one of them with more channels."""
    switch, options = PATHS[path]
    criterion = Criterion(K, num_points=40, **options)
    shared = random_output(dtype=torch.float64)
    masks = [shared.masks[0]]
    for prediction in range(1, L):
        copy = shared.masks[prediction].features.detach().clone().requires_grad_()
        masks.append(MaskLogits(shared.masks[prediction].embeddings, copy))
    wider = torch.cat([masks[2].features, torch.zeros_like(masks[2].features[:, :2])], dim=1).detach().requires_grad_()
    masks[2] = MaskLogits(F.pad(masks[2].embeddings, (0, 2)), wider)
    results = []
    for output in (shared, replace(shared, masks=masks)):
        torch.manual_seed(1)
        with switch():
            results.append(criterion(output, targets))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
    features = [masks[0].features, masks[1].features, wider]
    (expected,) = torch.autograd.grad(results[0]["total"], shared.masks[0].features)
    found = torch.autograd.grad(results[1]["total"], features)
    torch.testing.assert_close(sum(gradient[:, :C] for gradient in found), expected)


# --- fused and plain --------------------------------------------------------------------------------------------------


def losses_and_gradients(
    make: Callable[[], Criterion], output: Output, targets: list[Target], plain: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(4)
    with ops.plain() if plain else nullcontext():
        losses = make()(output, targets)
    return losses, torch.autograd.grad(losses["total"], leaves(output))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_and_plain_agree_in_values_and_gradients(targets, dtype, layout):
    output = random_output(dtype=dtype)
    features = output.masks[0].features.detach().contiguous(memory_format=layout).requires_grad_()
    output = replace(output, masks=[MaskLogits(masks.embeddings, features) for masks in output.masks])
    fused, fused_gradients = losses_and_gradients(lambda: Criterion(K, num_points=400), output, targets, plain=False)
    plain, plain_gradients = losses_and_gradients(lambda: Criterion(K, num_points=400), output, targets, plain=True)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-5, msg=name)
    for ours, theirs in zip(fused_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_the_library_s_own_terms_are_fused(monkeypatch, output, targets, criterion):
    calls = []
    fused = ops.mask_and_dice
    monkeypatch.setattr(ops, "mask_and_dice", lambda *arguments: calls.append(1) or fused(*arguments))
    own = replace(criterion, terms={"mask": same_mask, "dice": terms.dice})
    for each, expected in ((criterion, 1), (own, 1), (criterion, 2)):
        each(output, targets)
        assert len(calls) == expected
    with ops.plain():
        criterion(output, targets)
    assert len(calls) == 2


# --- nothing to learn -------------------------------------------------------------------------------------------------


@on_all_paths
def test_images_without_segments_teach_no_object(output, path):
    switch, options = PATHS[path]
    with switch():
        losses = Criterion(K, num_points=40, **options)(output, [random_target(0)] * 3)
    for prediction in range(L):
        expected = -output.class_logits[prediction].log_softmax(-1)[..., -1].mean()
        torch.testing.assert_close(losses[f"{prediction}.class"], expected)
        assert losses[f"{prediction}.mask"].item() == losses[f"{prediction}.dice"].item() == 0
    losses["total"].backward()
    for leaf in leaves(output):  # zero, but there: distributed training waits for every gradient
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
    assert all((logits.grad != 0).any() for logits in output.class_logits)


def test_the_masks_of_an_empty_image_are_left_alone(output, targets, criterion):
    criterion(output, targets)["total"].backward()
    gradient = output.masks[0].features.grad.abs().flatten(1).sum(1)
    assert (gradient > 0).tolist() == [True, False, True]


def test_num_masks_is_at_least_one():
    device = torch.device("cpu")
    assert average_num_masks([random_target(0)], device) == 1
    assert average_num_masks([random_target(0), random_target(1)], device) == 1
    assert average_num_masks([random_target(3), random_target(4)], device) == 7


@pytest.fixture
def process_group() -> Iterator[None]:
    """A real process group, of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_num_masks_in_a_process_group_of_one():
    for num_segments, expected in ((4, 4.0), (1, 1.0), (0, 1.0)):
        assert average_num_masks([random_target(num_segments)], torch.device("cpu")).item() == expected


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("here", "there", "expected"), [(3, 4, 3.5), (4, 0, 2.0), (0, 1, 1.0), (0, 0, 1.0)])
def test_num_masks_is_averaged_over_processes_and_then_clamped(monkeypatch, here, there, expected):
    # A second process costs this test ten seconds of imports; what it would send is added by hand.
    reduce = distributed.all_reduce

    def with_the_other(tensor: Tensor) -> None:
        reduce(tensor)
        tensor += there

    monkeypatch.setattr(distributed, "all_reduce", with_the_other)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    assert average_num_masks([random_target(here)], torch.device("cpu")).item() == expected


# --- determinism and precision ----------------------------------------------------------------------------------------


def test_the_seed_decides(output, targets, criterion):
    def total(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return criterion(output, targets)["total"]

    assert torch.equal(total(1), total(1))
    assert not torch.equal(total(1), total(2))


def test_losses_are_float32_under_autocast(output, targets, criterion):
    torch.manual_seed(1)
    expected = criterion(output, targets)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion(output, targets)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_half_precision_outputs_are_compared_in_float32(output, targets, criterion):
    def cast(dtype: torch.dtype, source: Output) -> Output:
        features = source.masks[0].features.to(dtype)
        return replace(
            source,
            class_logits=[logits.to(dtype) for logits in source.class_logits],
            masks=[MaskLogits(masks.embeddings.to(dtype), features) for masks in source.masks],
        )

    half = cast(torch.bfloat16, output)
    torch.manual_seed(1)
    losses = criterion(half, targets)
    torch.manual_seed(1)
    expected = criterion(cast(torch.float32, half), targets)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    losses["total"].backward()
    assert all(leaf.grad is not None for leaf in leaves(output))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "culprits"),
    [
        (lambda o: o.class_logits[1].data[0, 0].fill_(float("nan")), [(0, 1, "class")]),
        (lambda o: o.masks[2].embeddings.data[2].fill_(float("inf")), [(2, 2, "mask"), (2, 2, "dice")]),
    ],
    ids=["class", "masks"],
)
def test_a_loss_that_is_not_finite_names_image_prediction_and_term(output, targets, criterion, spoil, culprits):
    spoil(output)
    with pytest.raises(NonFiniteError, match=f"image {culprits[0][0]}, prediction {culprits[0][1]}") as caught:
        criterion(output, targets)
    assert caught.value.culprits == culprits


def test_the_number_of_classes_must_agree(output, targets):
    with pytest.raises(ValueError, match=r"6 classes .* criterion 7"):
        Criterion(7, num_points=40)(output, targets)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_classes=0),
        dict(num_points=0),
        dict(oversample_ratio=0.5),
        dict(importance_sample_ratio=1.5),
        dict(no_object_weight=0.0),
        dict(class_weights=(1.0, 2.0)),
        dict(class_weights=(1.0, -2.0, 1.0)),
        dict(class_weights=(1.0, math.nan, 1.0)),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_are_checked(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"Criterion.{name} must be .* got {re.escape(str(value))}"):
        Criterion(**{"num_classes": 3, **wrong})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(terms={"own": same_mask}), r"a term without a weight: \['own'\]"),
        (dict(weights={"own": 1.0}), r"a weight without a term: \['own'\]"),
        (dict(terms={"class": same_mask}), "see class_term"),
    ],
    ids=["no weight", "no term", "class"],
)
def test_terms_and_weights_must_belong_together(options, message):
    with pytest.raises(ValueError, match=message):
        Criterion(K, **options)


def test_build_criterion_takes_all_settings_of_the_recipe():
    recipe = recipes.ade20k_swin_tiny()
    assert build_criterion(recipe) == Criterion(150)
    changed = recipe.vary(
        loss=dict(
            num_points=10, oversample_ratio=2.0, importance_sample_ratio=0.5, class_weight=3.0, mask_weight=4.0,
            dice_weight=6.0, no_object_weight=0.2, class_weights=(2.0,) * 150,
        )
    )  # fmt: skip
    weights = {"class": 3.0, "mask": 4.0, "dice": 6.0}
    assert build_criterion(changed) == Criterion(
        150, weights=weights, no_object_weight=0.2, class_weights=(2.0,) * 150, num_points=10, oversample_ratio=2.0,
        importance_sample_ratio=0.5,
    )  # fmt: skip
