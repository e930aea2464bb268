"""Predictions of files and folders, written for other tools."""

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco
from PIL import Image
from test_segment_tiles import ShadeReader, picture

from m2f_lab import predict
from m2f_lab.data import Classes
from m2f_lab.data.coco import segment_ids
from m2f_lab.inference.files import predict_files

CLASSES = Classes(("square",), ((200, 0, 0),), frozenset({0}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a.png", (64, 96)), ("deep/b.png", (64, 80))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(size)).save(path)
    return tmp_path / "images"


def test_label_maps_are_those_of_predict(folder, tmp_path):
    results = predict_files(ShadeReader(), [folder], tmp_path / "out", classes=CLASSES)
    for name in ("a", "deep/b"):
        expected = predict(ShadeReader(), folder / f"{name}.png", classes=CLASSES).label_map
        np.testing.assert_array_equal(np.asarray(Image.open(results / f"{name}.png")), expected)


def test_panoptic_pictures_and_their_segments(folder, tmp_path):
    results = predict_files(
        ShadeReader(), [folder], tmp_path / "out", "panoptic", classes=CLASSES, overlap_threshold=0.3
    )
    content = json.loads(results.read_text())
    assert content["categories"] == [{"id": 0, "name": "square", "isthing": 1, "color": [200, 0, 0]}]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        ids = segment_ids(np.asarray(Image.open(tmp_path / "out" / "panoptic" / annotation["file_name"])))
        assert (image["height"], image["width"]) == ids.shape
        areas = {segment["id"]: segment["area"] for segment in annotation["segments_info"]}
        assert areas
        assert {number: int((ids == number).sum()) for number in np.unique(ids[ids > 0]).tolist()} == areas


def test_instances_are_cocos_results(folder, tmp_path):
    results = predict_files(ShadeReader(), [folder / "a.png"], tmp_path / "out", "instance", classes=CLASSES, top_k=4)
    rows = json.loads(results.read_text())
    expected = predict(ShadeReader(), folder / "a.png", "instance", classes=CLASSES, top_k=4)
    assert [row["score"] for row in rows] == [segment.score for segment in expected.segments]
    assert {(row["image_id"], row["file_name"], row["category_id"]) for row in rows} == {(1, "a.png", 0)}
    for row, mask in zip(rows, expected.masks, strict=True):
        np.testing.assert_array_equal(coco.decode(row["segmentation"]).astype(bool), mask)


def test_a_second_call_goes_on_where_the_first_stopped(folder, tmp_path):
    class Stops(ShadeReader):
        def __call__(self, images):
            if self.sizes:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        predict_files(Stops(), [folder], tmp_path / "out", "instance", classes=CLASSES)
    model = ShadeReader()
    results = predict_files(model, [folder], tmp_path / "out", "instance", classes=CLASSES)
    assert model.sizes == [(64, 80)], "the first image has its result"
    assert {row["image_id"] for row in json.loads(results.read_text())} == {1, 2}
    predict_files(model, [folder], tmp_path / "out", "instance", classes=CLASSES, overwrite=True)
    assert model.sizes[1:] == [(64, 96), (64, 80)]


def test_what_cannot_be_predicted_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere"):
        predict_files(ShadeReader(), [tmp_path / "nowhere"], tmp_path / "out", classes=CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no images"):
        predict_files(ShadeReader(), [tmp_path / "empty"], tmp_path / "out", classes=CLASSES)
    with pytest.raises(ValueError, match=r"a\.png and .*a\.png would both be written as a;"):
        predict_files(ShadeReader(), [folder, folder / "a.png"], tmp_path / "out", classes=CLASSES)


def test_several_images_in_a_call_equal_single_calls(folder):
    images = [picture((64, 96)), folder / "deep" / "b.png"]
    together = predict(ShadeReader(), images, "instance", top_k=3)
    for image, prediction in zip(images, together, strict=True):
        alone = predict(ShadeReader(), image, "instance", top_k=3)
        assert prediction.segments == alone.segments
        np.testing.assert_array_equal(prediction.masks, alone.masks)
