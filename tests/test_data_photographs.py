"""The readers and transforms on real photographs, where they are at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m2f_lab import recipes
from m2f_lab.data import audit, open_dataset, training_batches
from m2f_lab.data.ade20k import CLASSES as ADE20K

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data"
CAMVID, SAMPLE = PHOTOGRAPHS / "camvid", PHOTOGRAPHS / "ade20k_sample"

needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not on this machine")
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="the sample of ADE20K is not on this machine")


@needs_camvid
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_camvid_is_in_order(split: str, count: int) -> None:
    dataset = open_dataset("folder", CAMVID, split)
    assert len(dataset) == count
    assert len(dataset.classes) == 11
    report = audit(dataset, limit=60)
    report.raise_if_wrong()
    assert (report.hints, report.never_seen) == ([], [])
    assert report.share(1 + dataset.classes.names.index("road")) > 0.2


@needs_camvid
def test_camvid_makes_batches() -> None:
    config = replace(recipes.camvid_small().data, num_workers=0)
    batches = training_batches(open_dataset("folder", CAMVID, "train"), config, batch_size=4, seed=0, num_batches=3)
    for batch in batches:
        assert batch.images.shape == (4, 3, *config.crop_size)
        assert all(3 <= target.num_segments <= 11 for target in batch.targets)


@needs_sample
def test_ade20k_names_are_the_first_synonyms() -> None:
    lines = (SAMPLE / "objectInfo150.txt").read_text().splitlines()[1:]
    assert ADE20K.names == tuple(line.split("\t")[4].split(",")[0].strip() for line in lines)


@needs_sample
def test_ade20k_reads() -> None:
    dataset = open_dataset("ade20k", SAMPLE, "val")
    audit(dataset).raise_if_wrong()
    for index, sample in enumerate(dataset):
        raw = dataset.raw_label(index).astype(int)
        assert np.array_equal(sample.label_map, np.where(raw == 0, 255, raw - 1))
        assert sample.image.shape == (*raw.shape, 3)
