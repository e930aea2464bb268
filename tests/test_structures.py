"""Factored masks give what multiplied-out masks give; targets are the same in both forms."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from m2f_lab.structures import IGNORE, MaskLogits, PackedMasks, Target, sample_points


@pytest.fixture
def masks():
    generator = torch.Generator().manual_seed(0)
    return MaskLogits(
        torch.randn(2, 5, 8, generator=generator, dtype=torch.float64),
        torch.randn(2, 8, 6, 9, generator=generator, dtype=torch.float64),
    )


def naive_sample(maps, points):
    """Bilinear interpolation between cell centres, one point at a time; zero outside."""
    channels, height, width = maps.shape
    sampled = torch.zeros(channels, len(points), dtype=maps.dtype)
    for p, (x, y) in enumerate(points.tolist()):
        column, row = x * width - 0.5, y * height - 0.5
        for i in (int(row // 1), int(row // 1) + 1):
            for j in (int(column // 1), int(column // 1) + 1):
                if 0 <= i < height and 0 <= j < width:
                    sampled[:, p] += (1 - abs(row - i)) * (1 - abs(column - j)) * maps[:, i, j]
    return sampled


def test_sample_points_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    points = torch.rand(2, 50, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1  # some outside
    expected = torch.stack([naive_sample(m, p) for m, p in zip(maps, points, strict=True)])
    torch.testing.assert_close(sample_points(maps, points), expected)


def test_dense_is_the_dot_product(masks):
    b, q, y, x = 1, 3, 2, 7
    expected = sum(masks.embeddings[b, q, c] * masks.features[b, c, y, x] for c in range(8))
    torch.testing.assert_close(masks.dense()[b, q, y, x], expected)


@pytest.mark.parametrize("size", [(3, 4), (6, 9), (24, 36), (13, 5)])
def test_resizing_commutes_with_the_product(masks, size):
    expected = F.interpolate(masks.dense(), size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(masks.resized(size), expected)


def test_sampling_commutes_with_the_product(masks):
    points = torch.rand(2, 31, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(masks.at(points), sample_points(masks.dense(), points))


@pytest.mark.parametrize(("batch", "query"), [([0, 0, 1], [4, 1, 2]), ([1, 1], [0, 3]), ([], [])])
def test_select_multiplies_out_chosen_queries(masks, batch, query):
    batch, query = torch.tensor(batch, dtype=torch.long), torch.tensor(query, dtype=torch.long)
    torch.testing.assert_close(masks.select(batch, query), masks.dense()[batch, query])


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 3\).*\(1, 4, 5, 6\)"):
        MaskLogits(torch.zeros(1, 2, 3), torch.zeros(1, 4, 5, 6))


def test_label_map_becomes_one_segment_per_class():
    label_map = torch.tensor([[7, 7, 2], [IGNORE, 2, 0]], dtype=torch.uint8)
    target = Target.from_label_map(label_map)
    assert target.labels.tolist() == [0, 2, 7]
    assert target.size == (2, 3)
    expected = torch.stack([label_map == label for label in (0, 2, 7)])
    assert torch.equal(target.dense(), expected)


def test_id_map_and_masks_are_the_same_target():
    id_map = torch.tensor([[0, 1], [1, IGNORE]], dtype=torch.uint8)
    target = Target.from_id_map(id_map, torch.tensor([4, 4]))
    assert torch.equal(target.dense(), torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 0]]], dtype=torch.bool))


def test_a_target_without_segments():
    target = Target.from_label_map(torch.full((4, 5), IGNORE, dtype=torch.uint8))
    assert target.num_segments == 0
    assert target.dense().shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=torch.tensor([0])), "either masks"),
        (dict(labels=torch.tensor([0.5]), masks=torch.zeros(1, 2, 2, dtype=torch.bool)), "integers"),
        (dict(labels=torch.tensor([0]), masks=torch.zeros(1, 2, 2)), "boolean"),
        (dict(labels=torch.tensor([0, 1]), masks=torch.zeros(1, 2, 2, dtype=torch.bool)), "T = 2"),
        (dict(labels=torch.tensor([0]), id_map=torch.zeros(1, 2, 2, dtype=torch.long)), r"\[H, W\]"),
    ],
)
def test_malformed_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(**arguments)


def test_an_unknown_segment_number_is_named():
    with pytest.raises(ValueError, match=r"\[3\].*only 2 labels"):
        Target.from_id_map(torch.tensor([[0, 1, 3]]), torch.tensor([5, 6]))


def test_packed_masks_act_as_the_array():
    dense = np.random.default_rng(0).random((5, 7, 13)) < 0.4
    masks = PackedMasks.empty(5, (7, 13))
    assert masks.bits.nbytes == 5 * 7 * 2
    assert not masks.any()
    for number, mask in enumerate(dense):
        masks[number] = mask
    assert (masks.shape, masks.dtype, masks.ndim, len(masks)) == ((5, 7, 13), np.dtype(bool), 3, 5)
    np.testing.assert_array_equal(np.asarray(masks), dense)
    np.testing.assert_array_equal(list(masks), dense)
    flags = np.array([True, False, True, False, False])
    for index in (
        2,
        -1,
        slice(1, 4),
        [3, 0],
        flags,
        (1, 3),
        (slice(None), 2),
        (0, slice(2, 5), slice(None, None, 2)),
        ...,
    ):
        np.testing.assert_array_equal(masks[index], dense[index])
    np.testing.assert_array_equal(masks == dense, np.ones_like(dense))
    np.testing.assert_array_equal(~masks & True, ~dense)
    np.testing.assert_array_equal(masks.sum((1, 2)), dense.sum((1, 2)))
    np.testing.assert_array_equal(masks.astype(np.float32).max(0), dense.max(0))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(masks))[4], dense[4])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_post_processing_of_a_street_takes_less_than_200_megabytes(task):
    """100 queries, 19 classes, 1024 × 2048 pixels, in a process of its own; the result is part of it."""
    source = f"""
import torch
from m2f_lab.inference import postprocess
from m2f_lab.structures import MaskLogits, Output

torch.manual_seed(0)
size = (1024, 2048)
masks = MaskLogits(torch.randn(1, 100, 256), torch.randn(1, 256, 256, 512) / 4)
output = Output([3 * torch.randn(1, 100, 20)], [masks], size, size)
options = dict(things=range(11, 19)) if "{task}" == "panoptic" else {{}}

def read(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 1000

postprocess.{task}(output, size=(64, 128), **options)
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
result = postprocess.{task}(output, **options)
print(read("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200
