"""Query biographies: counted by hand and by brute force, collected from models and runs, stored and read again."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_lab import recipes
from m2f_lab.data import Classes, open_dataset
from m2f_lab.explore import Biographies, BiographyCollector, biographies_of, collect_biographies
from m2f_lab.explore.biographies.data import SIZE_BINS
from m2f_lab.explore.parts.reading import grid_size, read_masks, winning_queries
from m2f_lab.model import build_model
from m2f_lab.structures import Output
from tests.toy_biographies import ALL, CLASSES, FIRST, NONE, by_hand, cells, grey, some_output
from tests.toy_output import toy_output
from tests.toy_training import CLASSES as TOY_CLASSES


def values(biographies: Biographies) -> dict:
    found = {entry.name: getattr(biographies, entry.name) for entry in fields(Biographies)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------ what is counted


def test_two_images_counted_by_hand() -> None:
    found = by_hand()
    assert (found.num_images, found.num_pixels, found.num_queries, found.num_classes) == (2, 32 * 32 + 32 * 64, 5, 3)
    assert (found.won_pixels / 16).tolist() == [[96, 0, 0], [0, 0, 0], [0, 16, 64], [0, 0, 16], [0, 0, 0]]
    assert found.won_images.tolist() == [2, 0, 2, 1, 0]
    assert found.wins.tolist() == [96 / 192, 0, 80 / 192, 16 / 192, 0]
    assert found.dead.tolist() == [False, True, False, False, True]
    assert found.predicted.tolist() == [[2, 0, 0, 0], [2, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 2]]
    assert found.active_images.tolist() == [2, 2, 2, 1, 0]
    assert found.main_class.tolist() == [0, 0, 2, 2, -1]
    np.testing.assert_allclose(found.mean_size, [0.5, (3 / 8 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2, 1 / 4, np.nan])


def test_overlap_is_averaged_where_both_are_active_and_needs_the_same_class() -> None:
    found = by_hand()
    assert found.together.tolist() == [[2, 2, 2, 1, 0], [2, 2, 2, 1, 0], [2, 2, 2, 1, 0], [1, 1, 1, 1, 0], [0] * 5]
    assert found.overlap[0, 1] == (3 / 4 + 1) / 2
    assert found.overlap[2, 3] == 1 / 2  # in the first image query 3 stands for no object, and does not count
    assert found.overlap[0, 2] == 0
    np.testing.assert_array_equal(found.overlap, found.overlap.T)
    assert found.duplicates() == [(0, 1, 0.875)]
    assert found.duplicates(0.4) == [(0, 1, 0.875), (2, 3, 0.5)]
    assert found.duplicate_of().tolist() == [-1, 0, -1, -1, -1]
    assert found.duplicate_of(0.4).tolist() == [-1, 0, -1, 2, -1]


def test_masks_of_different_classes_are_no_duplicates() -> None:
    everywhere = cells(ALL, ALL)
    collector = BiographyCollector()
    collector.add(some_output(((0, 1), everywhere), ((0, 1), everywhere)), grey(32, 32))
    assert collector.result().overlap[0, 1] == 1
    for _ in range(3):
        collector.add(some_output(((0, 1), everywhere), ((1, 0), everywhere)), grey(32, 32))
    assert collector.result().overlap[0, 1] == 1 / 4


def test_heat_is_what_a_query_claims_averaged_over_stretched_images() -> None:
    found = by_hand()
    assert found.heat.shape == (5, 32, 32)
    expected = np.zeros((32, 32))
    expected[:16, 16:] += 0.5  # the first image: top right
    expected[:, 16:] += 0.5  # the second one: the right half
    np.testing.assert_allclose(found.heat[2], expected, atol=1e-3)
    in_second = np.zeros((32, 32))
    in_second[:, 24:] = 0.5
    np.testing.assert_allclose(found.heat[3], in_second, atol=1e-3)  # in the first it claims to be nothing
    assert found.heat[4].max() < 2e-3
    assert (found.mean_image == 150).all()
    assert found.mean_image.shape == (64, 64, 3)
    assert found.aspect == 1.5


def test_everything_against_loops() -> None:
    """Random outputs whose images are padded and of different sizes."""
    outputs = [toy_output(size, num_queries=4, num_classes=3) for size in ((50, 70), (64, 96), (33, 40))]
    collector, seen = BiographyCollector(), []
    for output in outputs:
        output.class_logits[-1][..., NONE] += 1  # so that some queries stand for no object
        collector.add(output, grey(*output.image_size))
        probabilities = output.class_logits[-1][0].softmax(-1)
        masks = read_masks(output, 0, grid_size(output.image_size, 1 << 14))[-1]
        seen.append((probabilities.numpy(), masks.numpy(), winning_queries(probabilities, masks).numpy()))
    found = collector.result()
    won, won_images, sizes = np.zeros((4, 3)), np.zeros(4), [[] for _ in range(4)]
    pairs = {pair: [] for pair in itertools.combinations(range(4), 2)}
    for output, (probabilities, masks, winners) in zip(outputs, seen, strict=True):
        num_queries, height, width = masks.shape
        for y in range(height):
            for x in range(width):
                scores = (probabilities[:, :3] * masks[:, y, x, None]).sum(0)
                won[winners[y, x], scores.argmax()] += np.prod(output.image_size) / (height * width)
        won_images += [(winners == query).any() for query in range(num_queries)]
        areas = [set(zip(*np.nonzero(mask > 0.5), strict=True)) for mask in masks]
        active = [bool(area) and best.argmax() < 3 for area, best in zip(areas, probabilities, strict=True)]
        for query in range(num_queries):
            if active[query]:
                sizes[query].append(len(areas[query]) / (height * width))
        for a, b in pairs:
            if active[a] and active[b]:
                same = probabilities[a].argmax() == probabilities[b].argmax()
                pairs[a, b].append(same * len(areas[a] & areas[b]) / len(areas[a] | areas[b]))
    np.testing.assert_allclose(found.won_pixels, won)
    assert found.won_images.tolist() == won_images.tolist()
    assert found.active_images.tolist() == [len(each) for each in sizes]
    assert 0 < found.active_images.sum() < 12
    np.testing.assert_allclose(found.mean_size, [np.mean(each) if each else np.nan for each in sizes], rtol=1e-6)
    for (a, b), overlaps in pairs.items():
        assert found.overlap[a, b] == pytest.approx(np.mean(overlaps) if overlaps else 0)
        assert found.together[a, b] == len(overlaps)
    assert found.wins.sum() == pytest.approx(1)


def test_only_the_last_prediction_counts() -> None:
    wrong = some_output(*[((1, 0), cells(ALL, ALL))] * 5)
    both = Output(wrong.class_logits + FIRST.class_logits, wrong.masks + FIRST.masks, (32, 32), (32, 32))
    collectors = BiographyCollector(), BiographyCollector()
    for collector, output in zip(collectors, (both, FIRST), strict=True):
        collector.add(output, grey(32, 32))
    assert values(collectors[0].result()) == values(collectors[1].result())


def test_the_order_of_the_images_does_not_matter() -> None:
    outputs = [toy_output((32, 32), num_queries=4) for _ in range(6)]
    images = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(6)]
    results = []
    for order in (range(6), (3, 1, 5, 0, 4, 2)):
        collector = BiographyCollector()
        for i in order:
            collector.add(outputs[i], images[i])
        results.append(collector.result())
    for name, value in values(results[0]).items():
        if isinstance(value, list | float):
            np.testing.assert_allclose(getattr(results[1], name), value, rtol=1e-6, err_msg=name)


def test_memory_does_not_grow_with_the_images() -> None:
    collector, sizes = BiographyCollector(), []
    for _ in range(3):
        collector.add(toy_output((32, 64)), grey(32, 64))
        sizes.append(sum(np.asarray(value).nbytes for value in collector._sums.values()))
    assert len(set(sizes)) == 1


def test_quantiles_of_sizes() -> None:
    collector = BiographyCollector()
    for columns in range(1, 9):  # sizes 1/8, 2/8, … 1
        collector.add(some_output(((0, 1), cells(ALL, slice(0, columns)))), grey(32, 32))
    found = collector.result()
    for share, size in ((0, 1 / 8), (0.5, 4 / 8), (0.75, 6 / 8), (1, 1)):
        assert np.sqrt(found.size_quantile(share)[0]) == pytest.approx(np.sqrt(size), abs=1 / SIZE_BINS)
    assert np.isnan(by_hand().size_quantile(0.5)[4])
    with pytest.raises(ValueError, match="between 0 and 1, got 50"):
        found.size_quantile(50)


def test_what_cannot_be_counted_is_named() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        BiographyCollector().result()
    with pytest.raises(ValueError, match="at least one image"):
        collect_biographies(lambda images: FIRST, [])
    collector = BiographyCollector()
    with pytest.raises(ValueError, match=r"image of \(32, 32\) pixels, but this one has \(32, 64\)"):
        collector.add(FIRST, grey(32, 64))
    collector.add(FIRST, grey(32, 32))
    with pytest.raises(ValueError, match=r"numbers of queries or classes differ \(now \(2, 3\), before \(5, 3\)\)"):
        collector.add(some_output(*[((1, 0), cells(ALL, ALL))] * 2), grey(32, 32))
    with pytest.raises(ValueError, match="predicts 3 classes, but there are 1 class names"):
        collector.result(Classes(("road",), ((0, 0, 0),)))
    with pytest.raises(ValueError, match="limit is a positive number of images, got 0"):
        collect_biographies(lambda images: FIRST, [grey(32, 32)], limit=0)


# ------------------------------------------------------------------------------------------------- models, runs, files


def test_a_model_is_run_over_images_of_any_kind(tmp_path: Path) -> None:
    model = build_model(recipes.debug_tiny(num_classes=3).model)
    model.classes = CLASSES
    pictures = [np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8) for i in range(3)]
    Image.fromarray(pictures[1]).save(tmp_path / "one.png")
    mixed = (each for each in (pictures[0], tmp_path / "one.png", Image.fromarray(pictures[2]), "missing.png"))
    found = collect_biographies(model, mixed, shortest_edge=48, limit=3)
    assert model.training
    assert (found.num_images, found.num_pixels, found.classes) == (3, 3 * 48 * 64, CLASSES)
    collector = BiographyCollector()
    model.eval()
    for picture in pictures:
        seen = np.array(Image.fromarray(picture).resize((64, 48), Image.Resampling.BILINEAR))
        with torch.inference_mode():
            collector.add(model(torch.from_numpy(seen).permute(2, 0, 1)[None]), seen)
    assert values(collector.result(CLASSES)) == values(found)


def test_what_is_stored_is_read_again(tmp_path: Path) -> None:
    found = by_hand()
    found.save(tmp_path / "run" / "biographies")
    assert values(Biographies.load(tmp_path / "run" / "biographies")) == values(found)
    nameless = BiographyCollector()
    nameless.add(FIRST, grey(32, 32))
    nameless.result(source={"split": "val"}).save(tmp_path / "run" / "biographies")  # in its place
    again = Biographies.load(tmp_path / "run" / "biographies")
    assert (again.classes, again.num_images, again.source) == (None, 1, {"split": "val"})
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["biographies"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no biographies"):
        Biographies.load(tmp_path / "nothing")
    by_hand().save(tmp_path)
    words = json.loads((tmp_path / "biographies.json").read_text())
    (tmp_path / "biographies.json").write_text(json.dumps(words | {"format": 99}))
    with pytest.raises(ValueError, match="another version of m2f_lab"):
        Biographies.load(tmp_path)


def test_a_run_keeps_its_biographies(root: Path, whole, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    found = biographies_of(whole, root)
    assert capsys.readouterr().out == "Collected the biographies of 2 images into whole/biographies.\n"
    assert (found.classes.names, found.num_queries, found.num_images) == (TOY_CLASSES, 6, 2)
    sizes = {
        "shortest_edge": whole.recipe.evaluation.shortest_edge,
        "longest_edge": whole.recipe.evaluation.longest_edge,
    }
    expected = collect_biographies(whole.model(), open_dataset("folder", root, "val"), source=found.source, **sizes)
    assert values(found) == values(expected)
    with monkeypatch.context() as patch:
        patch.setattr("m2f_lab.explore.biographies.collect.collect_biographies", None)  # is not called
        assert values(biographies_of(str(whole.path), root)) == values(found)
    assert capsys.readouterr().out == "Read the biographies of 2 images from whole/biographies.\n"
    for other in ({"split": "train"}, {"limit": 1}):
        assert biographies_of(whole, root, **other).num_images != 2
        assert capsys.readouterr().out.startswith("Collected")
    with pytest.raises(
        ValueError, match='which must be "best" or "last", got "newest"'.replace('"newest"', "'newest'")
    ):
        biographies_of(whole, root, which="newest")


def test_other_weights_are_collected_anew(root: Path, whole, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole.path, folder)
    shutil.rmtree(folder / "biographies", ignore_errors=True)
    shutil.copytree(whole.checkpoint("last"), folder / "checkpoints" / "best", dirs_exist_ok=True)
    biographies_of(folder, root)
    biographies_of(folder, root)
    file = folder / "checkpoints" / "best" / "model.safetensors"
    weights = file.read_bytes()
    file.write_bytes(weights[:-4] + bytes(4))  # the last number
    biographies_of(folder, root)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Collected", "Read", "Collected"]
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        biographies_of(folder, root)
