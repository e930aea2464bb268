"""Submissions go around the circle: what is written scores as it should with the benchmarks' own figures."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_lab import __main__ as command_line
from m2f_lab import recipes
from m2f_lab.__main__ import main
from m2f_lab.data import Classes, DataError, cityscapes, open_dataset
from m2f_lab.data.coco import panoptic_picture
from m2f_lab.evaluation.submission import CLASS_IDS, write_submission
from m2f_lab.inference import files
from m2f_lab.structures import Prediction, Segment

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco_panoptic_sample" / "panoptic_coco_categories.json"
CITY = "frankfurt_000000_000294", "munster_000001_000019"


def encoded(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """A picture of class and segment of each pixel, which `oracle` reads. uint8 [H, W, 3]"""
    return np.stack([labels, numbers, 0 * labels], -1).astype(np.uint8)


def oracle(model, image: np.ndarray, task: str, *, classes: Classes, **options) -> Prediction:
    """The prediction that a picture holds; `model` says which classes are left out."""
    labels, numbers, _ = np.moveaxis(image.astype(np.int32), -1, 0)
    if task == "semantic":
        return Prediction(task, label_map=labels.astype(np.uint8))
    found = [n for n in np.unique(numbers).tolist() if n and labels[numbers == n][0] not in model]
    masks = np.array([numbers == n for n in found], bool).reshape(-1, *labels.shape)
    rows = zip(found, masks, strict=True)
    segments = tuple(Segment(n, int(labels[m][0]), True, 0.75, i, int(m.sum())) for i, (n, m) in enumerate(rows))
    if task == "instance":
        return Prediction(task, segments=segments, masks=masks)
    return Prediction(task, segments_map=np.where(np.isin(numbers, found), numbers, 0), segments=segments)


@pytest.fixture
def predicted(tmp_path, monkeypatch):
    """A function that predicts pictures by the oracle and returns the folder of the predictions."""
    monkeypatch.setattr(files, "predict", oracle)

    def predict(pictures: dict[str, np.ndarray], task: str, classes: Classes, without: set[int] = frozenset()) -> Path:
        for name, picture in pictures.items():
            path = tmp_path / f"images_{task}" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        out = tmp_path / f"out_{task}"
        files.predict_files(without, [tmp_path / f"images_{task}"], out, task, classes=classes, overwrite=True)
        return out

    return predict


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def scored(capsys, *arguments) -> dict:
    assert main(["score", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def streets(tmp_path) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Folder of the truth, and pictures of train ids and of things."""
    semantic, things = {}, {}
    for turn, name in enumerate(CITY):
        labels = np.tile(np.repeat(np.arange(19), 16)[None], (40, 1))
        numbers = np.where(labels >= 11, 1 + np.arange(labels.shape[1]) // 16 * 2 + (np.arange(40)[:, None] >= 20), 0)
        labels, numbers = np.roll(labels, 5 * turn, 1), np.roll(numbers, 5 * turn, 1)
        raw = np.array(CLASS_IDS["cityscapes", "semantic"])[labels]
        city = name.split("_")[0]
        save(tmp_path / "gtFine" / city / f"{name}_gtFine_labelIds.png", raw.astype(np.uint8))
        ids = np.where(numbers > 0, 1000 * raw + numbers, raw)
        save(tmp_path / "gtFine" / city / f"{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
        semantic[f"{city}/{name}_leftImg8bit"] = encoded(labels, numbers)
        things[f"{city}/{name}_leftImg8bit"] = encoded(np.maximum(labels - 11, 0), numbers)
    return tmp_path / "gtFine", semantic, things


def test_cityscapes_label_ids_score_full(streets, predicted, tmp_path, capsys):
    truth, pictures, _ = streets
    out = write_submission(
        predicted(pictures, "semantic", cityscapes.CLASSES), tmp_path / "send", "cityscapes", "semantic"
    )
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in CITY]
    figures = scored(capsys, "cityscapes", truth, out)
    assert figures["IoU"] == figures["IoU_categories"] == 1


def test_cityscapes_instances_score_full_and_less_without_a_class(streets, predicted, tmp_path, capsys):
    truth, _, pictures = streets
    out = write_submission(
        predicted(pictures, "instance", cityscapes.THINGS), tmp_path / "send", "cityscapes", "instance"
    )
    first = (out / f"{CITY[0]}.txt").read_text().splitlines()
    assert first[0].split() == [f"masks/{CITY[0]}_0.png", "24", "0.75"]
    assert len(first) == 16
    assert set(np.unique(np.asarray(Image.open(out / first[0].split()[0])))) == {0, 255}
    figures = scored(capsys, "cityscapes", truth, out)
    assert figures["AP"] == figures["AP50"] == 1
    fewer = predicted(pictures, "instance", cityscapes.THINGS, without={0, 3})
    write_submission(fewer, out, "cityscapes", "instance")
    assert len(list((out / "masks").iterdir())) == 2 * 12, "those of the first time are gone"
    figures = scored(capsys, "cityscapes", truth, out)
    assert figures["AP"] == pytest.approx(6 / 8)
    assert [name for name, of in figures["classes"].items() if of["ap"] == 0] == ["person", "truck"]


def test_an_image_without_an_instance_has_an_empty_list(streets, predicted, tmp_path):
    _, _, pictures = streets
    none = predicted(pictures, "instance", cityscapes.THINGS, without=set(range(8)))
    out = write_submission(none, tmp_path / "send", "cityscapes", "instance")
    assert [(out / f"{name}.txt").read_text() for name in CITY] == ["", ""]


def test_ade20k_maps_are_its_own_labels(predicted, tmp_path):
    """Read back as labels they are the train ids."""
    labels = np.arange(150).reshape(10, 15)
    out = predicted({"ADE_val_00000001": encoded(labels, labels)}, "semantic", open_classes(150))
    send = write_submission(out, tmp_path / "send", "ade20k", "semantic")
    written = np.asarray(Image.open(send / "ADE_val_00000001.png"))
    assert (written.min(), written.max(), written.dtype) == (1, 150, np.uint8)
    for folder, pixels in (("images", encoded(labels, labels)), ("annotations", written)):
        save(tmp_path / "ade" / folder / "validation" / "ADE_val_00000001.png", pixels)
    sample = open_dataset("ade20k", tmp_path / "ade", "val")[0]
    np.testing.assert_array_equal(sample.label_map, labels)


def open_classes(count: int) -> Classes:
    return Classes(tuple(map(str, range(count))), ((0, 0, 0),) * count, frozenset(range(count)))


CATEGORIES = [
    {"id": 92, "name": "banner", "isthing": 0},
    {"id": 90, "name": "toothbrush", "isthing": 1},
    {"id": 1, "name": "person", "isthing": 1},
]


def coco_truth(folder: Path, names: dict[str, int], raw: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Write a truth of three classes in both of COCO's formats; return pictures for the oracle.

    Args:
        raw: category ids of the classes that the pictures have
    """
    from faster_coco_eval.core import mask as coco

    pictures, panoptic, instances = {}, [], []
    for turn, (name, image) in enumerate(names.items()):
        numbers = 1 + (np.arange(48)[None] + np.zeros((30, 1), np.int64)) // 12  # four segments
        kinds = np.array([0, 0, 1, 2, 0])[numbers]
        pictures[name] = encoded(kinds if turn else 2 - kinds, numbers)
        labels = pictures[name][..., 0]
        save(folder / "panoptic" / f"{name}.png", panoptic_picture(numbers))
        infos = []
        for n in range(1, 5):
            category, mask = raw[labels[numbers == n][0]], numbers == n
            area = int(mask.sum())
            infos.append({"id": n, "category_id": category, "area": area, "iscrowd": 0})
            runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            runs["counts"] = runs["counts"].decode() if isinstance(runs["counts"], bytes) else runs["counts"]
            row = {"id": 10 * image + n, "image_id": image, "category_id": category, "segmentation": runs}
            instances.append(row | {"area": area, "iscrowd": 0, "bbox": [0, 0, 1, 1]})
        panoptic.append({"image_id": image, "file_name": f"{name}.png", "segments_info": infos})
    images = [{"id": i, "file_name": f"{name}.jpg", "height": 30, "width": 48} for name, i in names.items()]
    for stem, rows in (("panoptic", panoptic), ("instances", instances)):
        content = {"images": images, "annotations": rows, "categories": CATEGORIES}
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return pictures


@pytest.mark.parametrize("like", [False, True])
def test_coco_results_score_full_with_its_own_ids(predicted, tmp_path, capsys, like):
    """Built in, classes are COCO's: 0 is category 1, 79 is 90, 80 is 92. A file's go things first."""
    truth = tmp_path / "truth"
    names = {"shot": 7, "b": 12} if like else {"000000000139": 139, "000000000285": 285}
    pictures = coco_truth(truth, names, (1, 90, 92))
    if not like:
        for picture in pictures.values():
            picture[..., 0] = np.array([0, 79, 80])[picture[..., 0]]
    source = truth / "panoptic.json" if like else None
    classes = open_classes(3 if like else 133)
    name = "own" if like else "coco"
    out = predicted(pictures, "panoptic", classes)
    send = write_submission(out, tmp_path / "send", name, "panoptic", like=source)
    figures = scored(capsys, "panoptic", truth / "panoptic.json", send / "panoptic.json")
    assert figures["PQ"] == 1
    assert [row["TP"] for row in figures["classes"]] == [3, 2, 3]
    stuff = {2} if like else {80}
    out = predicted(pictures, "instance", classes, without=stuff)
    write_submission(out, send, name, "instance", like=source)
    rows = json.loads((send / "instances.json").read_text())
    assert {row["image_id"] for row in rows} == set(names.values())
    figures = scored(capsys, "coco", truth / "instances.json", send / "instances.json")
    by_name = {row["name"]: row["AP"] for row in figures["classes"]}
    assert by_name == {"banner": 0, "toothbrush": pytest.approx(1), "person": pytest.approx(1)}


def test_the_order_of_ade20k_is_that_of_its_category_ids(predicted, tmp_path):
    """Its things stand among the stuff, so class 2 is the third category, a banner by its id here."""
    pictures = coco_truth(tmp_path / "truth", {"a": 1}, (1, 90, 92))
    (tmp_path / "truth" / "mixed.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [
            {"id": 5, "isthing": 0}, {"id": 9, "isthing": 1}, {"id": 4, "isthing": 1}]})
    )  # fmt: skip
    out = predicted(pictures, "panoptic", open_classes(3))
    ids = {}
    for dataset in ("ade20k", "own"):
        send = write_submission(out, tmp_path / dataset, dataset, "panoptic", like=tmp_path / "truth" / "mixed.json")
        content = json.loads((send / "panoptic.json").read_text())
        ids[dataset] = [info["category_id"] for info in content["annotations"][0]["segments_info"]]
    labels = [int(pictures["a"][numbers == n, 0][0]) for numbers in [pictures["a"][..., 1]] for n in range(1, 5)]
    assert ids["ade20k"] == [(4, 5, 9)[k] for k in labels]
    assert ids["own"] == [(4, 9, 5)[k] for k in labels]


def test_ids_of_coco_are_its_published_ones():
    things, both = CLASS_IDS["coco", "instance"], CLASS_IDS["coco", "panoptic"]
    assert (len(things), len(both), both[:80]) == (80, 133, things)
    if not COCO.is_file():
        pytest.skip("the published categories are not there")
    published = json.loads(COCO.read_text())
    assert things == tuple(c["id"] for c in published if c["isthing"])
    assert both[80:] == tuple(c["id"] for c in published if not c["isthing"])


def test_what_cannot_be_submitted_is_said(predicted, tmp_path):
    labels = np.arange(20).reshape(4, 5)
    out = predicted({"photo": encoded(labels, labels)}, "semantic", open_classes(20))
    for dataset, options, message in (
        ("folder", {}, "no submission for semantic segmentation of folder, only for cityscapes semantic"),
        ("ade20k", {"like": tmp_path / "x.json"}, "hold no ids of images"),
        ("cityscapes", {}, "photo has class 19, but the data set has 19 classes"),
    ):
        with pytest.raises(DataError, match=message):
            write_submission(out, tmp_path / "send", dataset, "semantic", **options)
    with pytest.raises(DataError, match="has no instance prediction of photo; predict with task='instance'"):
        write_submission(out, tmp_path / "send", "coco", "instance")
    with pytest.raises(DataError, match="holds no predictions"):
        write_submission(tmp_path / "send", tmp_path / "send", "ade20k", "semantic")
    segments = predicted({"photo": encoded(0 * labels, labels)}, "panoptic", open_classes(1))
    with pytest.raises(DataError, match="called by their number, but one is called photo"):
        write_submission(segments, tmp_path / "send", "coco", "panoptic")
    coco_truth(tmp_path / "truth", {"a": 1}, (1, 90, 92))
    with pytest.raises(DataError, match="lists no image photo"):
        write_submission(segments, tmp_path / "send", "own", "panoptic", like=tmp_path / "truth" / "panoptic.json")
    twice = predicted({"deep/photo": encoded(labels, labels)}, "semantic", open_classes(20))
    with pytest.raises(DataError, match="several images called photo"):
        write_submission(twice, tmp_path / "send", "ade20k", "semantic")


def test_the_command_predicts_and_writes_the_submission(streets, predicted, tmp_path, monkeypatch, capsys):
    _, pictures, _ = streets
    predicted(pictures, "semantic", cityscapes.CLASSES)
    recipe = recipes.debug_tiny()
    monkeypatch.setattr(command_line, "loaded", lambda options: (frozenset(), recipe, contextlib.nullcontext()))
    arguments = [
        "predict",
        "weights",
        str(tmp_path / "images_semantic"),
        "--out",
        str(tmp_path / "out"),
        "--submission",
    ]
    assert main(arguments) == 0
    assert [path.stem for path in sorted((tmp_path / "out" / "submission").iterdir())] == list(CITY)
    recipe = recipe.vary(data=dict(dataset="folder"))
    arguments[4] = str(tmp_path / "other")
    assert main(arguments) == 1
    assert "no submission for semantic segmentation of folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists(), "said before anything is predicted"
