"""From the last prediction to results: reference vectors, dense oracles, and what must never be in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.inference import postprocess
from m2f_lab.inference.rows import Rows, average
from m2f_lab.structures import MaskLogits, Output

GOLDEN = Path(__file__).parent / "golden" / "official_swin"
IMAGE_SIZES = ((64, 80), (61, 75))  # both padded to 64 × 96


@pytest.fixture(scope="module")
def golden() -> dict:
    return load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def reference() -> dict:
    return json.loads(GOLDEN.with_suffix(".json").read_text())


def golden_output(golden: dict, index: int) -> Output:
    masks = golden["decoder.4.mask_logits"]  # (2, 20, 16, 24); identity embeddings leave them as they are
    identity = torch.eye(masks.shape[1]).expand(2, -1, -1)
    return Output([golden["decoder.4.class_logits"]], [MaskLogits(identity, masks)], IMAGE_SIZES[index], (64, 96))


def random_output(image_size=(45, 70), num_queries=12, num_classes=5, batch=2, confidence=3.0) -> Output:
    """A random output whose earlier prediction is nonsense, so that using it shows."""
    padded = tuple(-(-s // 32) * 32 for s in image_size)
    features = torch.randn(batch, 8, padded[0] // 4, padded[1] // 4)
    embeddings = torch.randn(2, batch, num_queries, 8)
    logits = confidence * torch.randn(2, batch, num_queries, num_classes + 1)
    return Output(list(logits), [MaskLogits(e, features) for e in embeddings], image_size, padded)


# Dense oracles: the formulas of the paper and of the official implementation, on arrays of full size.


def dense_masks(output: Output, index: int, size: tuple[int, int] | None) -> torch.Tensor:
    masks = output.masks[-1].dense()[index : index + 1]
    masks = F.interpolate(masks, size=output.padded_size, mode="bilinear", align_corners=False)
    masks = masks[..., : output.image_size[0], : output.image_size[1]]
    return masks[0] if size is None else F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[0]


def dense_semantic(output: Output, index: int, size: tuple[int, int], order: str) -> torch.Tensor:
    classes = output.class_logits[-1][index].softmax(-1)[:, :-1]
    if order == "resize_first":
        return torch.einsum("qc,qhw->chw", classes, dense_masks(output, index, size).sigmoid())
    scores = torch.einsum("qc,qhw->chw", classes, dense_masks(output, index, None).sigmoid())
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def dense_panoptic(output: Output, index: int, size, things, object_mask_threshold, overlap_threshold):
    """Per pixel and per segment, in plain loops. Returns the map and (id, class, query) of its segments."""
    probabilities = output.class_logits[-1][index].softmax(-1)
    masks = dense_masks(output, index, size).sigmoid()
    kept = [
        q for q, p in enumerate(probabilities)
        if p.argmax() != output.num_classes and p.max() > object_mask_threshold
    ]  # fmt: skip
    segments_map, segments, stuff = torch.zeros(size, dtype=torch.int32), [], {}
    if not kept:
        return segments_map, segments
    winner = torch.stack([probabilities[q].max() * masks[q] for q in kept]).argmax(0)
    for k, q in enumerate(kept):
        label, own, won = int(probabilities[q].argmax()), masks[q] >= 0.5, winner == k
        if own.sum() == 0 or (own & won).sum() == 0 or won.sum() / own.sum() < overlap_threshold:
            continue
        if label in stuff:
            segments_map[own & won] = stuff[label]
            continue
        segments.append((len(segments) + 1, label, q))
        segments_map[own & won] = len(segments)
        if label not in things:
            stuff[label] = len(segments)
    return segments_map, segments


# Semantic


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("order", "name"), [("combine_first", "semantic_only"), ("resize_first", "semantic")])
def test_semantic_agrees_with_the_official_implementation(golden, index, order, name):
    expected = golden[f"{name}.{index}"]
    size = tuple(expected.shape[1:])
    assert size != IMAGE_SIZES[index]
    got = postprocess.semantic(golden_output(golden, index), index, size, order=order, return_scores=True)
    torch.testing.assert_close(torch.from_numpy(got.scores), expected, rtol=1e-5, atol=1e-5)
    assert got.label_map.dtype == np.uint8
    assert got.task == "semantic"
    assert (got.label_map == expected.argmax(0).numpy()).all()


@pytest.mark.parametrize("order", postprocess.ORDERS)
@pytest.mark.parametrize("size", [(45, 70), (90, 140), (61, 33), (7, 200), (1, 1)])
@pytest.mark.parametrize("rows_per_strip", [1, 3, 16, 1000, None])
def test_strips_of_any_height_equal_the_dense_formula(order, size, rows_per_strip):
    output = random_output()
    for index in (0, 1):
        expected = dense_semantic(output, index, size, order)
        got = postprocess.semantic(output, index, size, order=order, return_scores=True, rows_per_strip=rows_per_strip)
        torch.testing.assert_close(torch.from_numpy(got.scores), expected, rtol=1e-5, atol=1e-5)
        assert (got.label_map == got.scores.argmax(0)).all()
        without = postprocess.semantic(output, index, size, order=order, rows_per_strip=rows_per_strip)
        assert without.scores is None
        assert (without.label_map == got.label_map).all()


def test_the_default_size_is_that_of_the_image_and_the_default_order_combines_first():
    output = random_output()
    assert postprocess.semantic(output).label_map.shape == (45, 70)
    explicit = postprocess.semantic(output, 0, (99, 99), order="combine_first")
    other = postprocess.semantic(output, 0, (99, 99), order="resize_first")
    assert (postprocess.semantic(output, 0, (99, 99)).label_map == explicit.label_map).all()
    assert (explicit.label_map != other.label_map).any()


def test_a_large_image_is_placed_row_by_row_as_pytorch_does():
    """Far from the origin, positions rounded differently would shift rows."""
    maps = torch.randn(1, 1, 2049, 5).cumsum(2)
    got = torch.cat([rows for _, rows in Rows.of(maps[0]).resized((3001, 5)).strips(64)], dim=1)
    expected = F.interpolate(maps, size=(3001, 5), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)


def test_padding_is_cropped_before_scores_are_resized():
    output = random_output(image_size=(33, 33))  # padded to 64 × 64: most of it is padding
    output.masks[-1].features[..., 9:, :] = 50.0  # the padding shouts
    output.masks[-1].features[..., :, 9:] = 50.0
    size = (66, 66)
    right = dense_semantic(output, 0, size, "combine_first")
    classes = output.class_logits[-1][0].softmax(-1)[:, :-1]
    padded = F.interpolate(output.masks[-1].dense()[:1], size=(64, 64), mode="bilinear")[0].sigmoid()
    wrong = F.interpolate(torch.einsum("qc,qhw->chw", classes, padded)[None], size=size, mode="bilinear")[0]
    got = torch.from_numpy(postprocess.semantic(output, 0, size, return_scores=True).scores)
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    assert (wrong - right).abs().max() > 0.1


def test_scores_are_resized_not_labels():
    """Three classes in a row: halfway from the first to the last, the one in the middle never wins by labels."""
    class_logits = 20 * torch.eye(3, 4)[None]  # each query is sure of its class
    columns = torch.tensor([[8.0, 8.0, -8.0, -8.0], [-2.0, 1.0, 1.0, -2.0], [-8.0, -8.0, 8.0, 8.0]])
    masks = columns[:, None].expand(3, 4, 4)[None]
    output = Output([class_logits], [MaskLogits(torch.eye(3)[None], masks)], (4, 4), (4, 4))
    size = (4, 16)
    small = torch.from_numpy(postprocess.semantic(output).label_map)
    of_labels = F.interpolate(small[None, None].float(), size=size, mode="nearest")[0, 0]
    got = torch.from_numpy(postprocess.semantic(output, 0, size).label_map)
    assert (got == dense_semantic(output, 0, size, "combine_first").argmax(0)).all()
    assert set(small.unique().tolist()) == {0, 2}
    assert (got == 1).any(), "between two rivals of equal strength, the third has the best score"
    assert (got != of_labels).any()


def test_many_classes_do_not_run_into_the_ignored_label():
    output = random_output(num_classes=300, num_queries=3, batch=1)
    output.class_logits[-1][..., 255] += 40
    got = postprocess.semantic(output)
    assert got.label_map.dtype == np.int64
    assert (got.label_map == 255).all()
    for num_classes, dtype in ((255, np.uint8), (256, np.int64)):
        assert postprocess.semantic(random_output(num_classes=num_classes, batch=1)).label_map.dtype == dtype


def test_everything_after_the_model_is_float32_under_autocast():
    output = random_output()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = postprocess.semantic(output, 0, (50, 80), return_scores=True).scores
    assert got.dtype == np.float32
    assert (got == postprocess.semantic(output, 0, (50, 80), return_scores=True).scores).all()
    half = Output([c.half() for c in output.class_logits], [MaskLogits(m.embeddings.half(), m.features.half())
                  for m in output.masks], output.image_size, output.padded_size)  # fmt: skip
    assert np.abs(postprocess.semantic(half, 0, (50, 80), return_scores=True).scores - got).max() < 0.02


def test_no_gradients_are_recorded_and_the_output_is_left_alone():
    output = random_output()
    output.masks[-1].features.requires_grad_()
    before = output.masks[-1].features.clone()
    for size in ((45, 70), (64, 96)):
        postprocess.semantic(output, 0, size, return_scores=True)
        postprocess.panoptic(output, 0, size, things={0}, object_mask_threshold=0.2)
        postprocess.instance(output, 0, size)
    assert torch.equal(output.masks[-1].features, before)


def test_what_is_at_image_size_already_is_not_overwritten():
    masks = torch.randn(1, 3, 8, 8)
    output = Output([torch.randn(1, 3, 3)], [MaskLogits(torch.eye(3)[None], masks)], (8, 8), (8, 8))
    first = postprocess.semantic(output, return_scores=True).scores
    assert (postprocess.semantic(output, return_scores=True).scores == first).all()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.numel:
                self.numel, self.what = tensor.numel(), f"{func} {tuple(tensor.shape)}"
        return result


@pytest.mark.parametrize("order", postprocess.ORDERS)
@pytest.mark.parametrize("size", [(224, 320), (336, 480)])
def test_no_map_of_all_queries_or_all_classes_is_ever_stored(order, size):
    num_queries, num_classes, strip = 20, 30, 8
    output = random_output((220, 300), num_queries, num_classes, batch=1)
    width = max(output.padded_size[1], size[1])
    with Largest() as largest:
        postprocess.semantic(output, 0, size, order=order, rows_per_strip=strip)
    assert largest.numel <= max(num_classes * (strip + 2) * width, size[0] * size[1]), largest.what
    assert largest.numel < num_queries * size[0] * size[1] / 10, largest.what

    with Largest() as largest:
        postprocess.panoptic(output, 0, size, things={0}, object_mask_threshold=0.0, rows_per_strip=strip)
    assert largest.numel <= max(num_queries * (strip + 2) * width, 2 * size[0] * size[1]), largest.what

    with Largest() as largest:
        dense_semantic(output, 0, size, order)
    assert largest.numel >= num_queries * 220 * 300, "the measurement itself must see the dense arrays"


def test_the_default_strips_are_small_too():
    output = random_output((400, 640), num_queries=100, num_classes=150, batch=1)
    with Largest() as largest:
        postprocess.semantic(output)
    assert largest.numel < 100 * 400 * 640 / 8, largest.what


# Panoptic


@pytest.mark.parametrize("index", [0, 1])
def test_panoptic_agrees_with_the_official_implementation(golden, reference, index):
    config, expected = reference["config"], golden[f"panoptic.{index}"]
    got = postprocess.panoptic(
        golden_output(golden, index),
        index,
        tuple(expected.shape),
        things=config["things"],
        object_mask_threshold=config["object_mask_threshold"],
        overlap_threshold=config["overlap_threshold"],
    )
    assert got.segments_map.dtype == np.int32
    assert (got.segments_map == expected.numpy()).all()
    segments = [{"id": s.id, "isthing": s.is_thing, "category_id": s.label} for s in got.segments]
    assert segments == reference["panoptic_segments"][index]


@pytest.mark.parametrize("rows_per_strip", [1, 5, None])
@pytest.mark.parametrize("seed", range(4))
def test_panoptic_equals_a_loop_over_segments(seed, rows_per_strip):
    torch.manual_seed(seed)
    output = random_output(num_queries=25, num_classes=4, batch=1)
    size, things = (57, 93), {1, 3}
    expected, segments = dense_panoptic(output, 0, size, things, 0.5, 0.1)
    got = postprocess.panoptic(
        output, 0, size, things=things, object_mask_threshold=0.5, overlap_threshold=0.1, rows_per_strip=rows_per_strip
    )
    assert (got.segments_map == expected.numpy()).all()
    assert [(s.id, s.label, s.query) for s in got.segments] == segments
    assert len(segments) > 3
    probabilities = output.class_logits[-1][0].softmax(-1)
    for s in got.segments:
        assert s.area == (got.segments_map == s.id).sum() > 0
        assert s.is_thing == (s.label in things)
        assert s.score == pytest.approx(float(probabilities[s.query, s.label]))


def stripes(labels: list[int], columns: list[slice], num_classes: int = 4) -> Output:
    """One sure query per label; each masks some columns of an 8 × 12 image."""
    class_logits = torch.full((1, len(labels), num_classes + 1), -10.0)
    masks = torch.full((1, len(labels), 8, 12), -10.0)
    for q, (label, where) in enumerate(zip(labels, columns, strict=True)):
        class_logits[0, q, label] = 10 - q  # earlier queries are surer, to the eye not by much
        masks[0, q, :, where] = 10.0
    return Output([class_logits], [MaskLogits(torch.eye(len(labels))[None], masks)], (8, 12), (8, 12))


def test_merged_stuff_keeps_one_id_and_things_do_not_merge():
    output = stripes([2, 2, 1, 1], [slice(0, 2), slice(2, 5), slice(5, 8), slice(8, 11)])
    got = postprocess.panoptic(output, things={1})
    assert [(s.id, s.label, s.is_thing, s.query, s.area) for s in got.segments] == [
        (1, 2, False, 0, 40), (2, 1, True, 2, 24), (3, 1, True, 3, 24)
    ]  # fmt: skip
    assert got.segments_map[0].tolist() == [1] * 5 + [2] * 3 + [3] * 3 + [0], "no query wants the last column: void"


def test_hidden_queries_are_dropped_and_leave_void():
    """The second query wins only 2 of its 8 columns: too little. Its pixels go to nobody."""
    output = stripes([1, 1], [slice(0, 6), slice(0, 8)])
    got = postprocess.panoptic(output, things={1})
    assert [s.query for s in got.segments] == [0]
    assert got.segments_map[0].tolist() == [1] * 6 + [0] * 6
    lenient = postprocess.panoptic(output, things={1}, overlap_threshold=0.2)
    assert lenient.segments_map[0].tolist() == [1] * 6 + [2] * 2 + [0] * 4


def test_no_confident_query_is_no_segment():
    output = random_output(confidence=0.0)
    got = postprocess.panoptic(output, 1, (10, 12), things={0})
    assert got.segments == ()
    assert got.segments_map.shape == (10, 12)
    assert not got.segments_map.any()
    output.class_logits[-1][..., -1] = 30  # all are sure that there is nothing
    assert postprocess.panoptic(output, 1, (10, 12), things={0}, object_mask_threshold=0.0).segments == ()


# Instance


@pytest.mark.parametrize("index", [0, 1])
def test_instance_agrees_with_the_official_implementation(golden, reference, index):
    config, masks = reference["config"], golden[f"instance.{index}.masks"]
    got = postprocess.instance(
        golden_output(golden, index), index, tuple(masks.shape[1:]), things=config["things"], top_k=config["top_k"]
    )
    best_first = golden[f"instance.{index}.scores"].argsort(descending=True)  # the official order is arbitrary
    np.testing.assert_allclose(
        [s.score for s in got.segments], golden[f"instance.{index}.scores"][best_first], rtol=1e-5
    )
    assert [s.label for s in got.segments] == golden[f"instance.{index}.classes"][best_first].tolist()
    assert got.masks.dtype == bool
    assert (got.masks == masks[best_first].numpy()).all()


@pytest.mark.parametrize("rows_per_strip", [1, 5, None])
@pytest.mark.parametrize(("top_k", "things"), [(7, None), (30, {0, 2}), (10_000, None)])
def test_instance_equals_a_loop_over_pairs(top_k, things, rows_per_strip):
    output, size = random_output(), (57, 93)
    probabilities = output.class_logits[-1][1].softmax(-1)[:, :-1]
    masks = dense_masks(output, 1, size)
    expected = []
    pairs = [(float(p), q, k) for q, row in enumerate(probabilities) for k, p in enumerate(row)]
    for score, q, k in sorted(pairs, reverse=True)[:top_k]:
        if things is None or k in things:
            inside = masks[q] > 0
            score *= float(masks[q].sigmoid()[inside].sum() / (inside.sum() + 1e-6))
            expected.append((score, q, k, int(inside.sum())))
    expected.sort(reverse=True)
    got = postprocess.instance(output, 1, size, top_k=top_k, things=things, rows_per_strip=rows_per_strip)
    assert len(got.segments) == len(got.masks) == len(expected) > 0
    np.testing.assert_allclose([s.score for s in got.segments], [e[0] for e in expected], rtol=1e-4)
    assert [(s.query, s.label, s.area) for s in got.segments] == [e[1:] for e in expected]
    assert [s.id for s in got.segments] == list(range(1, len(expected) + 1))
    for mask, s in zip(got.masks, got.segments, strict=True):
        assert (mask == (masks[s.query] > 0).numpy()).all()
        assert s.is_thing


def test_a_query_may_be_two_instances_and_low_scores_can_be_left_out():
    output = stripes([1, 2], [slice(0, 4), slice(4, 12)])
    output.class_logits[-1][0, 0, 3] = 10.0  # the first query is undecided
    got = postprocess.instance(output, top_k=3)
    assert [(s.query, s.score > 0.9) for s in got.segments] == [(1, True), (0, False), (0, False)]
    assert {s.label for s in got.segments[1:]} == {1, 3}
    assert (got.masks[1] == got.masks[2]).all()
    assert got.masks[1].sum() == 32
    assert len(postprocess.instance(output, top_k=3, score_threshold=0.9).segments) == 1
    empty = postprocess.instance(output, top_k=3, things=())
    assert empty.segments == ()
    assert empty.masks.shape == (0, 8, 12)


def test_a_mask_without_pixels_scores_zero():
    output = stripes([1], [slice(0, 0)])
    (segment,) = postprocess.instance(output, top_k=1).segments
    assert segment.score == 0
    assert segment.area == 0


# Errors, and the rows themselves


def test_errors_name_what_was_expected():
    output = random_output()
    with pytest.raises(ValueError, match=r"order must be one of .*combine_first.*'dense'"):
        postprocess.semantic(output, order="dense")
    with pytest.raises(ValueError, match=r"size must be .* got \(0, 5\)"):
        postprocess.semantic(output, 0, (0, 5))
    with pytest.raises(ValueError, match="rows_per_strip = 0"):
        postprocess.semantic(output, rows_per_strip=0)
    with pytest.raises(ValueError, match="top_k must be positive"):
        postprocess.instance(output, top_k=0)
    with pytest.raises(ValueError, match="larger"):
        Rows.of(torch.zeros(1, 4, 4)).cropped((5, 4))
    with pytest.raises(ValueError, match="one size"):
        average([Rows.of(torch.zeros(1, 4, 4)), Rows.of(torch.zeros(1, 4, 5))])


def test_rows_are_read_only_where_they_are_needed():
    asked = []
    maps = torch.randn(2, 100, 4)

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return maps[:, start:stop]

    got = Rows((100, 4), maps.device, read).resized((200, 4)).read(50, 60)
    (span,) = asked
    assert span == (24, 31), "rows 50…59 of the doubled map lie between rows 24.75 and 29.25 of the original"
    torch.testing.assert_close(got, F.interpolate(maps[None], size=(200, 4), mode="bilinear")[0, :, 50:60])
