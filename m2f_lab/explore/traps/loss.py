"""Traps in matching and in the losses: what they are divided by, what weighs how much, and in which precision.

B images, L predictions, Q queries, K classes, T segments, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m2f_lab.data.loading import Batch
from m2f_lab.explore.traps.trap import Bench, Finding, Trap
from m2f_lab.loss import Criterion
from m2f_lab.loss.criterion import Divisors, average_num_masks
from m2f_lab.loss.matcher import mask_costs
from m2f_lab.structures import IGNORE, MaskLogits, Output, Target, sample_points
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.step import whole_batch_divisors


def _cpu_output(bench: Bench) -> Output:
    """Output of the model for the first street, as leaves of a graph of their own."""
    output = bench.output(0)
    features = output.masks[-1].features.cpu().clone()
    return replace(
        output,
        class_logits=[logits.cpu().clone().requires_grad_() for logits in output.class_logits],
        masks=[MaskLogits(masks.embeddings.cpu().clone(), features) for masks in output.masks],
    )


def _target(bench: Bench) -> Target:
    return Target.from_label_map(bench.samples[0].label_map)


def criterion_of(bench: Bench) -> Criterion:
    """The library's, with its default weights, at few points."""
    return Criterion(len(bench.streets.classes), num_points=256)


# --- what losses are divided by ---------------------------------------------------------------------------------------


def loss_without_segments(bench: Bench, num_masks: Callable) -> Finding:
    """The total loss of an image in which there is nothing to learn but "no object"."""
    output, criterion = _cpu_output(bench), criterion_of(bench)
    nothing = Target.from_label_map(torch.full(bench.samples[0].label_map.shape, IGNORE))
    queries = criterion.no_object_weight * output.masks[-1].num_queries
    divisors = Divisors(queries, num_masks([nothing], torch.device("cpu")))
    return Finding(float(criterion(output, [nothing], divisors)["total"].detach()))


def not_clamped(targets: Sequence[Target], device: torch.device) -> Tensor | int:
    """Without segments, zero is divided by zero."""
    return sum(target.num_segments for target in targets)


class Processes(DistributedContext):
    """Pretended processes: each has the same images as this one."""

    def sum(self, values: Tensor) -> Tensor:
        return self.size * values


def weight_of_mask_losses(bench: Bench, divisors: Callable[..., Divisors]) -> Finding:
    """Weight of the mask losses of one process among eight, relative to one process alone."""
    output, targets, criterion = _cpu_output(bench), [_target(bench)], criterion_of(bench)
    matching = criterion.matcher(output, targets)
    points = torch.rand(len(matching.query), criterion.num_points, 2)
    batch = Batch(bench.images(0), targets, [""])
    worlds = (Processes(0, size, torch.device("cpu")) for size in (1, 8))
    given = (divisors(batch, output, criterion, world) for world in worlds)
    alone, among = (criterion.losses(output, targets, matching, points, each)["0.mask"] for each in given)
    return Finding(float((among / alone).detach()))


def averaged_twice(batch: Batch, output: Output, criterion: Criterion, world: DistributedContext) -> Divisors:
    """Divided by the number of processes here, though it is an average already."""
    average = whole_batch_divisors(batch, output, criterion, world)
    return average._replace(segments=average.segments / world.size)


# --- what weighs how much ---------------------------------------------------------------------------------------------


def weighing_one(bench: Bench) -> Criterion:
    """Leaves all weights of the cross-entropy at 1."""
    return replace(criterion_of(bench), no_object_weight=1.0)


def share_of_no_object(bench: Bench, make: Callable[[Bench], Criterion]) -> Finding:
    """Share of the class loss's gradient that comes from queries without a segment, in percent, at the beginning."""
    output = _cpu_output(bench)
    fresh = [torch.zeros_like(logits).requires_grad_() for logits in output.class_logits]  # knows no class yet
    criterion = make(bench)
    criterion(replace(output, class_logits=fresh), [_target(bench)])["0.class"].backward()
    gradient = fresh[0].grad[0]  # (Q, K+1)
    strength, unmatched = gradient.abs().sum(dim=1), gradient[:, -1] < 0  # (Q), (Q)
    return Finding(100 * float(strength[unmatched].sum() / strength.sum()))


# --- precision --------------------------------------------------------------------------------------------------------


def costs_without_numbers(bench: Bench, costs: Callable) -> Finding:
    """Share of the costs of matching that are infinite or NaN, in percent, at the paper's number of points."""
    masks, size = _cpu_output(bench).masks, bench.output(0).padded_size
    points = torch.rand(1, Criterion(1).num_points, 2)
    truth = _target(bench).at(points[0], size)  # (T, P)
    embeddings = torch.cat([of_prediction.embeddings[0] for of_prediction in masks])  # (L*Q, C)
    terms = costs(embeddings, sample_points(masks[-1].features, points)[0].T, truth)
    return Finding(100 * float((~sum(terms).isfinite()).float().mean()))


def in_half_precision(embeddings: Tensor, features: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """As autocast to float16 leaves it: sums over 12 544 points pass 65 504, the largest number there is."""
    return mask_costs(embeddings.half(), features.half(), truth.half())


LOSS = (
    Trap(
        name="num_masks not clamped",
        mistake="Mask losses are divided by the number of segments. A crop may hold none; then it is 0 / 0.",
        question="What is the loss of one image without a segment, and of the batch it is in?",
        unit="loss {}", right=average_num_masks, broken=not_clamped, measure=loss_without_segments,
        guarded_by="tests/test_criterion.py::test_num_masks_is_at_least_one",
    ),
    Trap(
        name="num_masks averaged twice",
        mistake="The number of segments is averaged over processes so that the loss does not depend on how many there "
        "are. Averaged twice, it does.",
        question="A run moves from one GPU to eight. What happens to its mask losses?",
        unit="mask losses weigh {} ×", right=whole_batch_divisors, broken=averaged_twice, measure=weight_of_mask_losses,
        guarded_by="tests/test_training_step.py::TestParts::test_divisors_by_hand",
    ),
    Trap(
        name="no-object weighs 1",
        mistake="Most queries have no segment. In the cross-entropy “no object” weighs 0.1, or the few others are not "
        "heard.",
        question="Which share of what the class head learns at first is “say no object”?",
        unit="{} % of the gradient says “no object”", right=criterion_of, broken=weighing_one,
        measure=share_of_no_object,
        guarded_by="tests/test_criterion.py::test_no_object_is_the_last_class_and_weighs_a_tenth",
    ),
    Trap(
        name="costs in float16",
        mistake="Under autocast to float16, costs are summed over 12 544 points in numbers that end at 65 504. The "
        "assignment refuses infinite costs, or, worse, takes any.",
        question="Which share of the costs can still be compared?",
        unit="{} % of the costs are not finite", right=mask_costs, broken=in_half_precision,
        measure=costs_without_numbers,
        guarded_by="tests/test_matcher.py::test_half_precision_outputs_are_compared_in_float32",
    ),
)  # fmt: skip
