"""Errors by distance and by size against scipy, and the parts of the report."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import ndimage

from m2f_lab.data import Sample, Segments
from m2f_lab.evaluation import InstanceEvaluator, PanopticEvaluator, page, worst_images
from m2f_lab.evaluation.breakdown import DISTANCES, Breakdown, distance_bands
from m2f_lab.structures import Prediction, Segment


def patches(seed: int, num_classes: int = 4, size: tuple[int, int] = (70, 90)) -> np.ndarray:
    """A map with smooth regions of several sizes. uint8 [H, W]"""
    noise = np.random.default_rng(seed).standard_normal((num_classes, *size))
    return np.stack([ndimage.gaussian_filter(field, 4) for field in noise]).argmax(0).astype(np.uint8)


def semantic(predicted: np.ndarray) -> Prediction:
    return Prediction("semantic", label_map=predicted)


def sample(truth: np.ndarray | None = None, segments: Segments | None = None) -> Sample:
    size = truth.shape if truth is not None else segments.size
    return Sample("x", np.zeros((*size, 3), np.uint8), truth, segments)


@pytest.mark.parametrize("size", [(70, 90), (3, 50), (1, 1), (5, 2)])
def test_bands_are_those_of_the_chessboard_distance(size):
    truth = patches(0, size=size)
    outline = np.zeros(size, bool)
    for (y, x), value in np.ndenumerate(truth):
        beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        outline[y, x] = any(truth[p] != value for p in beside if 0 <= p[0] < size[0] and 0 <= p[1] < size[1])
    if outline.any():
        distance = 1 + ndimage.distance_transform_cdt(~outline, metric="chessboard")
    else:
        distance = np.full(size, 1000)
    np.testing.assert_array_equal(distance_bands(truth), np.searchsorted(DISTANCES, distance))


def test_wrong_pixels_are_counted_in_their_band():
    """A column of ten pixels, classes 0 and 1 with five each: distances 5 4 3 2 1 1 2 3 4 5."""
    truth = np.repeat(np.uint8([[0, 1]]), 5, axis=1).T
    predicted = truth.copy()
    predicted[[4, 0]] = 1
    breakdown = Breakdown(2)
    error = breakdown.update(semantic(predicted), sample(truth))
    assert breakdown.distances.tolist() == [[2, 1], [2, 0], [4, 0], [2, 1], [0, 0], [0, 0], [0, 0]]
    assert error == pytest.approx(100 / 8)
    rows = breakdown.by_distance()
    assert rows[0] == {"from": 1, "to": 1, "pixels": 2, "error": 50.0}
    assert rows[2] == {"from": 3, "to": 4, "pixels": 4, "error": 0.0}
    assert rows[-1] == {"from": 33, "to": None, "pixels": 0, "error": None}


def test_ignored_pixels_are_in_no_band_but_have_an_outline():
    truth = np.uint8([[0, 0, 0, 255]])
    breakdown = Breakdown(1)
    assert breakdown.update(semantic(np.zeros_like(truth)), sample(truth)) == 0
    assert breakdown.distances[:3].tolist() == [[1, 0], [1, 0], [1, 0]]
    assert breakdown.update(semantic(np.zeros((1, 2), np.uint8)), sample(np.uint8([[255, 255]]))) is None


@pytest.mark.parametrize("seed", range(4))
def test_regions_are_those_of_scipy(seed):
    truth, predicted = patches(seed), patches(seed + 10)
    truth[20:30, :40] = 255
    truth[35:] = 1  # 35 × 90 pixels at least
    breakdown = Breakdown(4)
    breakdown.update(semantic(predicted), sample(truth))
    expected = np.zeros((3, 6), np.int64)
    known, right = truth < 4, truth == predicted
    for column, labels in ((0, truth), (3, predicted)):
        for k in range(4):
            regions, count = ndimage.label(labels == k)
            for number in range(1, count + 1):
                region = regions == number
                if (region & known).any():
                    size = 0 if region.sum() <= 32**2 else 1 if region.sum() <= 96**2 else 2
                    expected[size, column : column + 3] += (1, (region & known).sum(), (region & right).sum())
    np.testing.assert_array_equal(breakdown.regions, expected)
    assert np.count_nonzero(expected[:, 0]) == 2, "small and medium ones"
    small = breakdown.by_size()[0]
    assert small["recall"] == pytest.approx(100 * expected[0, 2] / expected[0, 1])
    assert small["precision"] == pytest.approx(100 * expected[0, 5] / expected[0, 4])
    assert breakdown.by_size()[2] == {"size": "large", "true": 0, "recall": None, "predicted": 0, "precision": None}


def instances(masks: np.ndarray, labels: list[int], scores: list[float]) -> Prediction:
    rows = enumerate(zip(labels, scores, strict=True))
    segments = tuple(Segment(i + 1, label, True, score, i, int(masks[i].sum())) for i, (label, score) in rows)
    return Prediction("instance", segments=segments, masks=masks)


@pytest.mark.parametrize("single", [False, True])
def test_instances_are_compared_with_their_background_and_without_crowds(single):
    masks = np.zeros((3, 4, 40), bool)
    masks[0, :, :10], masks[1, :, 20:30], masks[2, :, 30:] = True, True, True
    truth = Segments(np.array([0, 0, 1]), np.array([False, False, True]), (4, 40), shapes=tuple(masks))
    if single:
        ids = np.where(masks.any(0), masks.argmax(0), -1).astype(np.int32)
        truth = Segments(truth.labels, truth.crowd, truth.size, id_map=ids)
    breakdown = Breakdown(2)
    said = instances(masks[:2], [0, 0], [0.9, 0.4])
    breakdown.update(said, sample(truth.label_map() if single else None, truth))
    pixels, wrong = breakdown.distances.sum(0)
    assert (pixels, wrong) == (4 * 30, 4 * 10), "the second has a score below one half; the third is crowd"
    assert not breakdown.regions.any()


def test_panoptic_counts_by_size_add_up_and_go_by_area():
    """A small one found, a medium one missed, a large one invented."""
    truth, predicted = np.zeros((100, 200), np.int32), np.zeros((100, 200), np.int32)
    truth[:20, :20] = predicted[:20, :20] = 1
    truth[50:100, :50] = 2
    predicted[:, 100:] = 3
    truth[:, 100:] = 4
    evaluator = PanopticEvaluator(3, {0, 1})
    evaluator.update((predicted, {1: 0, 3: 1}), truth, {1: 0, 2: 0, 4: 2})
    assert evaluator.counts_by_size.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(evaluator.counts_by_size.sum(0), evaluator.counts.sum(0))
    rows = evaluator.by_size()
    assert [row["size"] for row in rows] == ["small", "medium", "large"]
    assert [row["PQ"] for row in rows] == [100, 0, 0]
    assert PanopticEvaluator(1, {0}).by_size()[0]["PQ"] is None
    twice = PanopticEvaluator(3, {0, 1})
    twice.merge(evaluator)
    twice.merge(evaluator)
    np.testing.assert_array_equal(twice.counts_by_size, 2 * evaluator.counts_by_size)


def test_curves_have_the_precision_that_ap_is_the_mean_of():
    random = np.random.default_rng(0)
    evaluator = InstanceEvaluator(3, ("a", "b", "c"))
    for _ in range(6):
        ids = patches(int(random.integers(100)), 8)
        masks = np.stack([ids == k for k in range(8)])
        labels = [k % 2 for k in range(8)]
        truth = Segments(np.array(labels), np.zeros(8, bool), ids.shape, shapes=tuple(masks))
        strayed = np.roll(masks, 1, axis=2)
        strayed[random.integers(8)] = False
        evaluator.update(instances(strayed, labels, random.random(8).tolist()), truth)
    figures = evaluator.result()["classes"]
    rows = evaluator.curves()
    for row, figure in zip(rows[:2], figures[:2], strict=True):
        assert 100 * np.mean(row["precision50"]) == pytest.approx(figure["AP50"])
        assert np.mean(row["precision75"]) <= np.mean(row["precision50"])
        best = row["best"]
        reached = [p for r, p in zip(np.linspace(0, 1, 101), row["precision50"], strict=True) if r <= best["recall"]]
        assert best["precision"] <= reached[-1] + 1e-9, "the curve has the best of this recall or a larger one"
        f1 = [2 * r * p / (r + p) for r, p in zip(np.linspace(0, 1, 101), row["precision50"], strict=True) if p]
        own = 2 * best["precision"] * best["recall"] / (best["precision"] + best["recall"])
        assert own >= max(f1) - 0.02
    assert rows[2] == {"name": "c", "precision50": None, "precision75": None, "best": None}


def test_the_best_score_takes_equal_scores_together():
    """Two right ones and one wrong one, which has the score of a right one."""
    masks = np.eye(3, dtype=bool)[:, None, :]
    truth = Segments(np.zeros(2, np.int64), np.zeros(2, bool), (1, 3), shapes=tuple(masks[:2]))
    evaluator = InstanceEvaluator(1)
    evaluator.update(instances(masks, [0, 0, 0], [0.9, 0.5, 0.5]), truth)
    assert evaluator.curves()[0]["best"] == {"score": 0.5, "precision": pytest.approx(2 / 3), "recall": 1}
    alone = InstanceEvaluator(1)
    alone.update(instances(masks[2:], [0], [0.5]), truth)
    assert alone.curves()[0]["best"] is None


class _Balanced(HTMLParser):
    """Raises where a tag is closed that is not the last one open, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_parts_of_the_page_are_sound_html_for_any_names_and_values():
    nasty = 'a<b>"&'
    row = {"name": nasty, "precision": None, "recall": 50.0}
    best = {"score": 0.5, "precision": 0.5, "recall": 1.0}
    parts = [
        page.precision_and_recall("pixels", [row, {"name": "never", "precision": None, "recall": None}]),
        page.curves([{"name": nasty, "precision50": [1.0] * 101, "precision75": [0.0] * 101, "best": best}]),
        page.curves([{"name": nasty, "precision50": [0.0] * 101, "precision75": [0.0] * 101, "best": None}]),
        page.sizes("Regions", "", Breakdown(2).by_size()),
        page.distances(Breakdown(2).by_distance()),
        page.confusions([{"is": nasty, "was called": "x", "pixels": 1234, "share": 10.0}]),
        page.images([{"name": "</script>", "number": 0, "classes": {}, "confused": []}], "PQ"),
    ]
    parser = _Balanced()
    parser.feed(page.page(nasty, parts))
    assert not parser.open
    text = "".join(parser.text)
    assert text.count(nasty) == 6, "title, heading, two tables and two curves"
    assert "never" not in text
    assert "1,234" in text
    assert "more than 32" in text
    assert json.loads(text[text.index('[{"name":') : text.index("}]") + 2])[0]["name"] == "</script>"


def test_worst_images_in_every_order(tmp_path):
    def row(number, figure, boundary, classes, *confused):
        pairs = [{"is": a, "was called": b, "pixels": n} for a, b, n in confused]
        return {"number": number, "PQ": figure, "boundary_error": boundary, "classes": classes, "confused": pairs}

    images = [
        row(0, 50, 10, {"car": 5.0}, ("car", "bus", 7)),
        row(1, None, None, {}),
        row(2, 20, 30, {"bus": 1.0, "car": 9.0}, ("bus", "car", 99), ("car", "bus", 8)),
        row(3, 20, 20, {"car": 1.0}),
    ]
    content = {"metric": "PQ", "classes": [{"name": "car"}, {"name": "bus"}], "images": images}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    assert worst_images(tmp_path) == [2, 3, 0]
    assert worst_images(tmp_path / "evaluation.json", most=1) == [2]
    assert worst_images(tmp_path, of_class="car") == [3, 0, 2]
    assert worst_images(tmp_path, pair=("car", "bus")) == [2, 0]
    assert worst_images(tmp_path, near_outlines=True) == [2, 3, 0]
    with pytest.raises(ValueError, match=r"figure for cat.* car, bus"):
        worst_images(tmp_path, of_class="cat")
    with pytest.raises(ValueError, match="No image has a figure for bus called tree"):
        worst_images(tmp_path, pair=("bus", "tree"))
    with pytest.raises(ValueError, match="one order"):
        worst_images(tmp_path, of_class="car", near_outlines=True)
