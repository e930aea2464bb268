"""Traps between the last prediction and the number in the table: label maps, mIoU, panoptic segments.

B batch, Q queries, K classes, H/W height/width of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from m2f_lab.data import Classes, distinct_colors
from m2f_lab.explore.traps.measures import mean_iou_of_maps
from m2f_lab.explore.traps.trap import Bench, Finding, Trap
from m2f_lab.inference.postprocess import panoptic, semantic
from m2f_lab.structures import IGNORE, MaskLogits, Output, Prediction, resize

# --- label maps -------------------------------------------------------------------------------------------------------


def mean_iou_of(bench: Bench, to_label_map: Callable[[Output], np.ndarray]) -> Finding:
    """mIoU of the model's outputs, made label maps by the variant."""
    return mean_iou_of_maps(bench, [to_label_map(bench.output(index)) for index in range(len(bench.samples))])


def scores_resized(output: Output) -> np.ndarray:
    """The library's: class scores over the image, then the best of them."""
    return semantic(output).label_map


def class_scores(output: Output) -> Tensor:
    """Class scores at stride 4 over the padded image, multiplied out. [1, K, H/4, W/4]"""
    classes = output.class_logits[-1].softmax(-1)[..., :-1]
    return torch.einsum("bqk,bqhw->bkhw", classes, output.masks[-1].dense().sigmoid())


def padding_not_cropped(output: Output) -> np.ndarray:
    """Resizes the padded map to the image: everything is squeezed by the padding."""
    return resize(class_scores(output), output.image_size).argmax(1)[0].cpu().numpy()


def labels_resized(output: Output) -> np.ndarray:
    """Takes the best class at stride 4 and enlarges labels."""
    labels = class_scores(output).argmax(1)[0].cpu().numpy()
    height, width = output.image_size
    return labels.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


def no_object_first(output: Output) -> np.ndarray:
    """Drops the first class as "no object"; it is the last."""
    classes = output.class_logits[-1].softmax(-1)[..., 1:]
    masks = resize(output.masks[-1].dense(), output.padded_size).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", classes, masks)
    height, width = output.image_size
    return scores.argmax(1)[0, :height, :width].cpu().numpy()


# --- mIoU -------------------------------------------------------------------------------------------------------------


def mean_iou_by(bench: Bench, count: Callable[..., float]) -> Finding:
    """mIoU of the model's predictions, counted by the variant."""
    return Finding(count(bench, [scores_resized(bench.output(index)) for index in range(len(bench.samples))]))


def mean_over_images(bench: Bench, label_maps: Sequence[np.ndarray]) -> float:
    """A mIoU for each image, and the mean of those."""
    each = [bench.mean_iou([label_map], [sample]) for label_map, sample in zip(label_maps, bench.samples, strict=True)]
    return float(np.mean(each))


# --- panoptic ---------------------------------------------------------------------------------------------------------


def perfect_output(bench: Bench) -> tuple[Output, Classes]:
    """A prediction without error of the first street, in which two queries share every class, half and half.

    Returns:
        The output, and what to call its queries.
    """
    label_map = torch.from_numpy(bench.samples[0].label_map).long()
    height, width = label_map.shape
    left = torch.arange(width) < width // 2
    halves = [(int(k), (label_map == k) & side) for k in label_map.unique() if k != IGNORE for side in (left, ~left)]
    labels, masks = zip(*((label, mask) for label, mask in halves if mask.any()), strict=True)
    class_logits = torch.zeros(1, len(labels), len(bench.streets.classes) + 1)
    class_logits[0, range(len(labels)), labels] = 20.0
    factors = MaskLogits(torch.eye(len(labels))[None], torch.where(torch.stack(masks), 20.0, -20.0)[None])
    names = tuple(f"query {query}: {bench.streets.classes.names[label]}" for query, label in enumerate(labels))
    queries = Classes(names, distinct_colors(len(names)))
    return Output([class_logits], [factors], (height, width), (height, width)), queries


def _finding(value: float, bench: Bench, prediction: Prediction, queries: Classes) -> Finding:
    """With a picture of the query that every pixel's segment comes from; void is nothing."""
    query_of = {segment.id: segment.query for segment in prediction.segments} | {0: IGNORE}
    picture = np.vectorize(query_of.get, otypes=[np.uint8])(prediction.segments_map)
    return Finding(value, bench.samples[0].image, picture, queries)


def segments_per_stuff(bench: Bench, combine: Callable[..., Prediction]) -> Finding:
    """Mean number of segments of a class of stuff."""
    output, queries = perfect_output(bench)
    things = bench.streets.classes.things
    prediction = combine(output, things=things)
    stuff = [segment.label for segment in prediction.segments if segment.label not in things]
    return _finding(len(stuff) / len(set(stuff)), bench, prediction, queries)


def stuff_as_things(output: Output, things: Collection[int]) -> Prediction:
    """Treats every class alike."""
    return panoptic(output, things=range(output.num_classes))


def pixels_lost_to_void(bench: Bench, combine: Callable[..., Prediction]) -> Finding:
    """Share of the pixels with a class that are void in a perfect prediction, in percent."""
    output, queries = perfect_output(bench)
    prediction = combine(output, things=bench.streets.classes.things)
    known = bench.samples[0].label_map != IGNORE
    return _finding(100 * float((prediction.segments_map[known] == 0).mean()), bench, prediction, queries)


def numbered_from_zero(output: Output, things: Collection[int]) -> Prediction:
    """The first segment gets the number 0, which means void."""
    prediction = panoptic(output, things=things)
    segments = tuple(replace(segment, id=segment.id - 1) for segment in prediction.segments)
    return replace(prediction, segments_map=np.maximum(prediction.segments_map - 1, 0), segments=segments)


def images_without_result(bench: Bench, combine: Callable[..., Prediction]) -> Finding:
    """Share of the images that end in an error when no query is confident, in percent."""
    output, _ = perfect_output(bench)
    unsure = replace(output, class_logits=[torch.zeros_like(output.class_logits[0])])
    try:
        combine(unsure, things=bench.streets.classes.things)
    except IndexError:  # argmax over no query at all
        return Finding(100.0)
    return Finding(0.0)


def nothing_to_choose_from(output: Output, things: Collection[int], threshold: float = 0.8) -> Prediction:
    """Keeps confident queries and asks which is the best at each pixel, also if none was kept."""
    scores, labels = output.class_logits[-1][0].softmax(-1).max(-1)
    kept = (labels != output.num_classes) & (scores > threshold)
    masks = output.masks[-1].dense()[0, kept].sigmoid()
    return Prediction("panoptic", segments_map=((scores[kept, None, None] * masks).argmax(0) + 1).numpy())


RESULTS = (
    Trap(
        name="padding not cropped",
        mistake="Masks cover the padded image. Resized to the image's size without cropping, everything is squeezed up "
        "and to the left.",
        question="The padding is a fifth of the height. What is left of the mIoU?",
        unit="mIoU {} %", right=scores_resized, broken=padding_not_cropped, measure=mean_iou_of,
        guarded_by="tests/test_postprocess.py::test_padding_is_cropped_before_scores_are_resized",
    ),
    Trap(
        name="labels resized, not scores",
        mistake="The best class is chosen at stride 4, and labels are enlarged. Scores would have told where between "
        "two cells the border runs.",
        question="How much does a border cost that runs in steps of four pixels?",
        unit="mIoU {} %", right=scores_resized, broken=labels_resized, measure=mean_iou_of,
        guarded_by="tests/test_postprocess.py::test_scores_are_resized_not_labels",
    ),
    Trap(
        name="no-object first",
        mistake="“No object” is the last logit. Who drops the first one loses a class, moves all others by one, and "
        "lets “no object” vote.",
        question="What is left of the mIoU?",
        unit="mIoU {} %", right=scores_resized, broken=no_object_first, measure=mean_iou_of,
        guarded_by="tests/test_postprocess.py::test_semantic_agrees_with_the_official_implementation",
    ),
    Trap(
        name="mIoU as a mean over images",
        mistake="Published figures add up the counts of all images first. The mean of per-image values is another "
        "number.",
        question="Nothing about the predictions changes. Does the number go up or down?",
        unit="mIoU {} %", right=Bench.mean_iou, broken=mean_over_images, measure=mean_iou_by,
        guarded_by="tests/test_evaluation.py::test_counts_are_added_up_over_the_data_set_not_figures_averaged",
    ),
    Trap(
        name="stuff not merged",
        mistake="Several queries may see the same kind of stuff; their masks are one segment. Kept apart, each of them "
        "is a false positive of panoptic quality.",
        question="Two queries share the road, half and half. How many roads are there?",
        unit="{} segments per class of stuff", right=panoptic, broken=stuff_as_things, measure=segments_per_stuff,
        guarded_by="tests/test_postprocess.py::test_merged_stuff_keeps_one_id_and_things_do_not_merge",
    ),
    Trap(
        name="segments numbered from 0",
        mistake="In a panoptic map, 0 is void. A segment that is numbered 0 is not there.",
        question="Which segment of a perfect prediction disappears, and how large is it?",
        unit="{} % of the pixels lost to void", right=panoptic, broken=numbered_from_zero,
        measure=pixels_lost_to_void,
        guarded_by="tests/test_postprocess.py::test_hidden_queries_are_dropped_and_leave_void",
    ),
    Trap(
        name="no confident query",
        mistake="An image in which no query is sure has no segments: an empty result, not an argmax over nothing, and "
        "in panoptic quality not a number rather than a crash.",
        question="After how many images of a new data set does this happen first?",
        unit="{} % of such images end in an error", right=panoptic, broken=nothing_to_choose_from,
        measure=images_without_result, guarded_by="tests/test_postprocess.py::test_no_confident_query_is_no_segment",
    ),
)  # fmt: skip
