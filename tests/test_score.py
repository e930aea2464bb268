"""Figures of files of any origin, on the command line and as functions."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from m2f_lab.__main__ import main
from m2f_lab.data import DataError
from m2f_lab.data.coco import panoptic_picture
from m2f_lab.evaluation.score import COCO_NAMES, score_cityscapes, score_coco, score_panoptic

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CITYSCAPES = GOLDEN / "cityscapes_eval"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference vectors are not there")


def load(path: Path):
    return json.loads(path.read_text())


def save(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def printed(capsys, *arguments) -> dict:
    """The JSON object that the command prints."""
    assert main(["score", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def assert_figures(found: dict, expected: dict) -> None:
    """pycocotools says -1 where there is nothing to measure."""
    for name, value in expected.items():
        missing = value is None or value == -1
        assert found[name] == (None if missing else pytest.approx(value, abs=1e-12)), name


# COCO


@needs_golden
@pytest.mark.parametrize("case", ["all", "results_in_reverse_order", "without_detections_on_image_12"])
def test_coco_figures_are_those_of_pycocotools(case, tmp_path, capsys):
    folder = GOLDEN / "instance_ap"
    results = load(folder / "results.json")
    if case == "results_in_reverse_order":
        results.reverse()
    if case == "without_detections_on_image_12":
        results = [result for result in results if result["image_id"] != 12]
    path = save(tmp_path / "results.json", results)
    assert_figures(printed(capsys, "coco", folder / "ground_truth.json", path), load(folder / "expected.json")[case])


@needs_golden
def test_coco_figures_of_each_category(tmp_path):
    folder = GOLDEN / "instance_ap"
    expected = load(folder / "expected.json")["per_category"]
    classes = score_coco(folder / "ground_truth.json", folder / "results.json")["classes"]
    assert [row["name"] for row in classes] == list(expected)
    for row in classes:
        assert_figures(row, {name: expected[row["name"]][name] for name in ("AP", "AP50")})
        assert row["instances"] == expected[row["name"]]["gt"]


def random_file(rng: np.random.Generator, kind: str) -> tuple[dict, list[dict]]:
    """An annotation file of rectangles and results for it, of few different scores."""
    num_true, share_of_crowds = {"plain": (6, 0.1), "crowded": (30, 0.2), "crowds": (8, 0.8), "sparse": (1, 0.0)}[kind]
    annotations, results = [], []

    def rectangle() -> dict:
        mask = np.zeros((60, 120), np.uint8, order="F")
        y, x, h, w = rng.integers((0, 0, 1, 1), (50, 100, 60, 120))
        mask[y : y + h, x : x + w] = 1
        encoded = coco_mask.encode(mask)
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}

    for image in range(4):
        own = []
        for _ in range(rng.integers(0, num_true + 1)):
            own.append(rectangle())
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image, "category_id": int(rng.choice([3, 7])),
                    "segmentation": own[-1], "area": int(coco_mask.area(own[-1])), "bbox": [0, 0, 1, 1],
                    "iscrowd": int(rng.random() < share_of_crowds),
                }
            )  # fmt: skip
        for _ in range(rng.integers(1, 3 * num_true + 2)):
            copied = own and rng.random() < 0.6
            results.append(
                {
                    "image_id": image, "category_id": int(rng.choice([3, 7, 9])),
                    "segmentation": own[rng.integers(len(own))] if copied else rectangle(),
                    "score": float(rng.integers(1, 5)) / 4,
                }
            )  # fmt: skip
    annotations = annotations or [annotations_entry(rectangle())]
    images = [{"id": image, "height": 60, "width": 120, "file_name": f"{image}.jpg"} for image in range(4)]
    categories = [{"id": number, "name": f"class {number}"} for number in (3, 7, 9)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


def annotations_entry(shape: dict) -> dict:
    area = int(coco_mask.area(shape))
    return {"id": 1, "image_id": 0, "category_id": 3, "segmentation": shape, "area": area, "iscrowd": 0}


def by_pycocotools(truth: Path, results: Path, kind: str = "segm") -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        evaluation = COCOeval(known, known.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(COCO_NAMES, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "crowded", "crowds", "sparse"])
@pytest.mark.parametrize("seed", range(3))
def test_random_files_have_the_figures_of_pycocotools(kind, seed, tmp_path):
    truth, results = random_file(np.random.default_rng(seed), kind)
    paths = save(tmp_path / "truth.json", truth), save(tmp_path / "results.json", results)
    assert_figures(score_coco(*paths), by_pycocotools(*paths))


def test_boxes_are_compared_if_there_are_no_masks(tmp_path):
    truth, _ = random_file(np.random.default_rng(1), "plain")
    for annotation in truth["annotations"]:
        annotation["bbox"] = coco_mask.toBbox(annotation.pop("segmentation")).tolist()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": [x + 1, y, w, h], "score": 0.5}
        for a in truth["annotations"]
        for x, y, w, h in [a["bbox"]]
    ]
    paths = save(tmp_path / "truth.json", truth), save(tmp_path / "results.json", results)
    assert_figures(score_coco(*paths), by_pycocotools(*paths, "bbox"))


def test_masks_may_be_run_lengths_of_both_kinds_or_polygons_and_boxes_beside_them_change_nothing(tmp_path):
    square = np.zeros((20, 30), np.uint8, order="F")
    square[4:12, 6:20] = 1
    encoded = coco_mask.encode(square)
    compressed = {"size": [20, 30], "counts": encoded["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(square.ravel(order="F"), prepend=0, append=0)))
    first = int(np.flatnonzero(square.ravel(order="F"))[0])
    counts = [first, *runs.tolist()]
    plain = {"size": [20, 30], "counts": [*counts, square.size - sum(counts)]}
    polygon = [[6, 4, 20, 4, 20, 12, 6, 12]]
    truth = {
        "images": [{"id": 0, "height": 20, "width": 30}],
        "categories": [{"id": 3, "name": "square"}],
        "annotations": [annotations_entry(compressed)],
    }
    truth_path = save(tmp_path / "truth.json", truth)
    for shape in (compressed, plain, polygon):
        result = {"image_id": 0, "category_id": 3, "segmentation": shape, "score": 1.0, "bbox": [0, 0, 500, 500]}
        figures = score_coco(truth_path, save(tmp_path / "results.json", [result]))
        assert figures["AP"] == figures["APs"] == pytest.approx(1)
        assert figures["APl"] is None


def test_no_result_at_all_is_nothing_found(tmp_path):
    truth, _ = random_file(np.random.default_rng(0), "plain")
    figures = score_coco(save(tmp_path / "truth.json", truth), save(tmp_path / "results.json", []))
    assert figures["AP"] == figures["AR100"] == 0


def _first(results: list, **changes) -> list:
    return [results[0] | changes, *results[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda truth, results: (truth, {"annotations": results}), r"results\.json holds dict at its top"),
        (lambda truth, results: (truth, _first(results, image_id=77)), r"results\.json has the image_id 77, which"),
        (lambda truth, results: (truth, _first(results, category_id=5)), r"results\.json has the category_id 5, which"),
        (lambda truth, results: (truth, _first(results, score=None)), r"results\.json: .* has the score None"),
        (
            lambda truth, results: (truth, _first(results, segmentation={"size": [120, 60], "counts": "x"})),
            r"results\.json: a mask of image 0 has the size \[120, 60\], but the image has \[60, 120\]",
        ),
        (
            lambda truth, results: (truth, [{k: v for k, v in results[0].items() if k != "score"}]),
            r'results\.json: an entry lacks "score"',
        ),
        (lambda truth, results: (truth, [*results, {**results[0], "segmentation": 5}]), "cannot be read"),
        (lambda truth, results: (truth | {"images": []}, results), r'truth\.json is empty: its list "images"'),
        (lambda truth, results: (truth | {"annotations": []}, results), r'truth\.json is empty: .*"annotations"'),
        (lambda truth, results: (results, results), r'truth\.json has no list "images"'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_coco_files_is_named(change, message, tmp_path):
    truth, results = change(*random_file(np.random.default_rng(2), "plain"))
    with pytest.raises(DataError, match=message):
        score_coco(save(tmp_path / "truth.json", truth), save(tmp_path / "results.json", results))


def test_files_that_are_missing_or_no_json_are_named(tmp_path, capsys):
    assert main(["score", "coco", str(tmp_path / "truth.json"), str(tmp_path / "results.json")]) == 1
    assert f"There is no file {tmp_path / 'truth.json'}" in capsys.readouterr().err
    (tmp_path / "truth.json").write_text("{")
    with pytest.raises(DataError, match=r"truth\.json is not JSON"):
        score_coco(tmp_path / "truth.json", tmp_path / "results.json")


# Panoptic


def assert_qualities(found: dict, expected: dict) -> None:
    for group, ending in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for name in ("pq", "sq", "rq"):
            assert found[name.upper() + ending] == pytest.approx(expected[group][name], abs=1e-12), (name, group)
        assert found["n" + ending] == expected[group]["n"]


@needs_golden
def test_panoptic_figures_are_those_of_panopticapi(capsys):
    folder = GOLDEN / "panoptic_quality"
    found = printed(capsys, "panoptic", folder / "gt.json", folder / "pred.json")
    expected = load(folder / "expected.json")
    assert_qualities(found, expected)
    for number, row in enumerate(found["classes"], 1):
        for name in ("pq", "sq", "rq"):
            assert (row[name.upper()] or 0) == pytest.approx(expected["per_class"][str(number)][name], abs=1e-12)


@needs_golden
def test_cityscapes_panoptic_figures_are_those_of_its_scripts(tmp_path):
    files = CITYSCAPES / "gtFine/cityscapes_panoptic_val.json", CITYSCAPES / "predictions/cityscapes_panoptic_val.json"
    expected = load(CITYSCAPES / "expected.json")["panoptic"]
    assert_qualities(score_panoptic(*files), expected)
    moved = [shutil.copy(path, tmp_path / f"{place}.json") for place, path in enumerate(files)]
    assert_qualities(score_panoptic(*moved, *(path.with_suffix("") for path in files)), expected)


CATEGORIES = [{"id": 10, "name": "grass", "isthing": 0}, {"id": 20, "name": "cat", "isthing": 1}]


def panoptic_file(path: Path, pictures: dict[str, np.ndarray], infos: dict[str, list[dict]]) -> Path:
    path.with_suffix("").mkdir(exist_ok=True)
    for name, ids in pictures.items():
        Image.fromarray(panoptic_picture(ids)).save(path.with_suffix("") / f"{name}.png")
    images = [{"id": name, "height": ids.shape[0], "width": ids.shape[1]} for name, ids in pictures.items()]
    annotations = [
        {"image_id": name, "file_name": f"{name}.png", "segments_info": infos[name]} for name in pictures
    ]  # fmt: skip
    return save(path, {"images": images, "annotations": annotations, "categories": CATEGORIES})


def segment(number: int, category: int, crowd: int = 0) -> dict:
    return {"id": number, "category_id": category, "iscrowd": crowd}


def test_of_several_crowds_of_a_category_the_last_one_counts_as_in_panopticapi(tmp_path):
    ids = np.repeat([[1, 2, 3]], 4, axis=0).repeat(4, axis=1)
    infos = [segment(1, 10), segment(2, 20, 1), segment(3, 20, 1)]
    truth = panoptic_file(tmp_path / "truth.json", {"a": ids}, {"a": infos})
    for column, invented in ((2, 1), (3, 0)):
        said = np.where(ids == column, 70000, 1)
        prediction = panoptic_file(tmp_path / "said.json", {"a": said}, {"a": [segment(1, 10), segment(70000, 20)]})
        cat = score_panoptic(truth, prediction)["classes"][1]
        assert (cat["TP"], cat["FP"], cat["FN"]) == (0, invented, 0)


GRASS = np.ones((4, 6), np.int32)


@pytest.mark.parametrize(
    ("pictures", "infos", "message"),
    [
        ({}, {}, r"said\.json has no prediction for the images a of .*truth\.json"),
        ({"a": GRASS, "b": GRASS}, [segment(1, 10)], r"said\.json has the images b, which .*truth\.json does not have"),
        ({"a": GRASS}, [segment(1, 30)], r"said\.json: segment 1 of a\.png is of the unknown category 30"),
        ({"a": GRASS + 1}, [segment(1, 10)], r"said/a\.png, against .*truth/a\.png: .* holds the ids \[2\]"),
        ({"a": GRASS.T}, [segment(1, 10)], r"said/a\.png, against .*truth/a\.png: The prediction is \[6, 4\]"),
    ],
)
def test_what_is_wrong_with_panoptic_files_is_named(pictures, infos, message, tmp_path):
    truth = panoptic_file(tmp_path / "truth.json", {"a": GRASS}, {"a": [segment(1, 10)]})
    prediction = panoptic_file(tmp_path / "said.json", pictures, dict.fromkeys(pictures, infos))
    with pytest.raises(DataError, match=message):
        score_panoptic(truth, prediction)


def test_a_panoptic_picture_that_is_missing_is_named(tmp_path):
    truth = panoptic_file(tmp_path / "truth.json", {"a": GRASS}, {"a": [segment(1, 10)]})
    prediction = save(tmp_path / "said.json", load(truth))
    with pytest.raises(DataError, match=r"There is no file .*said/a\.png"):
        score_panoptic(truth, prediction)


# Cityscapes


@needs_golden
def test_cityscapes_figures_are_those_of_its_scripts(capsys):
    found = printed(capsys, "cityscapes", CITYSCAPES / "gtFine/val", CITYSCAPES / "predictions")
    expected = load(CITYSCAPES / "expected.json")
    assert_figures(
        found,
        {
            "IoU": expected["pixel"]["averageScoreClasses"],
            "iIoU": expected["pixel"]["averageScoreInstClasses"],
            "IoU_categories": expected["pixel"]["averageScoreCategories"],
            "iIoU_categories": expected["pixel"]["averageScoreInstCategories"],
            "AP": expected["instance"]["averages"]["allAp"],
            "AP50": expected["instance"]["averages"]["allAp50%"],
            "num_images": 4,
        },
    )
    assert_figures(found["classScores"], expected["pixel"]["classScores"])
    assert_figures(found["classes"]["person"], expected["instance"]["averages"]["classes"]["person"])


def street(root: Path, names=("ulm_000000_000001", "ulm_000000_000002")) -> tuple[Path, Path]:
    """Truth and perfect results of both kinds, the masks in the folder of the maps."""
    truth, results = root / "truth", root / "results"
    (truth / "ulm").mkdir(parents=True)
    results.mkdir()
    ids = np.full((20, 30), 7, np.uint16)
    ids[:15, :15] = 26001
    for name in names:
        Image.fromarray(ids).save(truth / "ulm" / f"{name}_gtFine_instanceIds.png")
        labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
        Image.fromarray(labels).save(truth / "ulm" / f"{name}_gtFine_labelIds.png")
        Image.fromarray(labels).save(results / f"{name}_pred.png")
        Image.fromarray((ids == 26001).astype(np.uint8)).save(results / f"{name}_0.png")
        (results / f"{name}.txt").write_text(f"{name}_0.png 26 0.5\n")
    return truth, results


def test_results_of_one_kind_or_both_are_recognised(tmp_path):
    truth, results = street(tmp_path)
    figures = score_cityscapes(truth, results)
    assert {figures[name] for name in ("IoU", "iIoU", "AP", "AP50")} == {1.0}
    for path in results.glob("*_pred.png"):
        path.unlink()
    assert {"IoU", "AP"} & score_cityscapes(truth, results).keys() == {"AP"}
    truth, results = street(tmp_path / "again")
    for path in results.glob("*.txt"):
        path.with_name(path.stem + "_0.png").unlink()
        path.unlink()
    assert {"IoU", "AP"} & score_cityscapes(truth, results).keys() == {"IoU"}


def test_truth_without_instance_ids_has_no_instance_figures(tmp_path):
    truth, results = street(tmp_path)
    for path in results.glob("*.txt"):
        path.with_name(path.stem + "_0.png").unlink()
        path.unlink()
    for path in truth.rglob("*_instanceIds.png"):
        path.unlink()
    figures = score_cityscapes(truth, results)
    assert (figures["IoU"], figures["iIoU"]) == (1.0, None)


A = "ulm_000000_000001"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda truth, results: (results / f"{A}_pred.png").unlink(), f"results has no prediction for {A} of"),
        (lambda truth, results: (results / f"{A}.txt").unlink(), f"There are two results for {A}"),
        (lambda truth, results: shutil.rmtree(truth), r"truth holds no \*_gtFine_labelIds"),
        (lambda truth, results: shutil.rmtree(results), "results holds no results for the 2 images"),
        (
            lambda truth, results: shutil.copy(results / f"{A}_pred.png", results / f"{A}_more.png"),
            f"two results for {A}: .*{A}_more.png and .*{A}_pred.png",
        ),
        (
            lambda truth, results: Image.new("L", (20, 30)).save(results / f"{A}_pred.png"),
            rf"{A}_pred\.png, against .*{A}_gtFine_labelIds\.png: The prediction is \[30, 20\], the truth \[20, 30\]",
        ),
        (
            lambda truth, results: Image.new("L", (30, 20), 255).save(results / f"{A}_pred.png"),
            rf"{A}_pred\.png, .* holds the ids \[255\]",
        ),
        (
            lambda truth, results: Image.new("RGB", (30, 20)).save(results / f"{A}_pred.png"),
            rf"{A}_pred\.png is not a label: it has mode RGB",
        ),
        (
            lambda truth, results: (results / f"{A}.txt").write_text(f"{A}_0.png 26\n"),
            rf'{A}\.txt, line 1: expected "mask\.png labelId confidence"',
        ),
        (
            lambda truth, results: (results / f"{A}.txt").write_text("there_is_none.png 26 0.5\n"),
            rf"{A}\.txt, line 1: there is no mask .*there_is_none\.png",
        ),
        (
            lambda truth, results: (results / f"{A}.txt").write_text("../truth/x.png 26 0.5\n"),
            rf"{A}\.txt, line 1: \.\./truth/x\.png must be a relative path",
        ),
        (
            lambda truth, results: (results / f"{A}.txt").write_text(f"{A}_0.png 99 0.5\n"),
            rf"{A}\.txt, against .*: Instance 0 is of labelId 99",
        ),
        (
            lambda truth, results: (truth / "ulm" / f"{A}_gtFine_instanceIds.png").unlink(),
            f"truth has no .*_gtFine_instanceIds.png for {A}",
        ),
    ],
)
def test_what_is_wrong_with_cityscapes_files_is_named(spoil, message, tmp_path):
    truth, results = street(tmp_path)
    spoil(truth, results)
    with pytest.raises(DataError, match=message):
        score_cityscapes(truth, results)


def test_folders_of_pictures_belong_to_panoptic(tmp_path, capsys):
    assert main(["score", "coco", "a.json", "b.json", "--truth-pictures", str(tmp_path)]) == 1
    assert "belong to panoptic, not to coco" in capsys.readouterr().err
