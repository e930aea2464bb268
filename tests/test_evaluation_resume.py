"""An interrupted evaluation goes on and ends in the very same files."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from m2f_lab import recipes
from m2f_lab.data import Segments, open_dataset
from m2f_lab.evaluation import InstanceEvaluator, evaluate, unfinished
from m2f_lab.evaluation.unfinished import key_of
from m2f_lab.structures import MaskLogits, Output, Prediction, Segment

COUNT = 5


class Reader(nn.Module):
    """Query k finds the pixels of shade 60 k, roughly; stops at the image of a number."""

    def __init__(self, num_classes: int, stop: int | None = None) -> None:
        super().__init__()
        self.shades = nn.Parameter(60.0 * torch.arange(num_classes) + 5, requires_grad=False)
        self.stop, self.calls = stop, 0

    def forward(self, images: torch.Tensor) -> Output:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        size, count = tuple(images.shape[2:]), len(self.shades)
        value = F.avg_pool2d(images.float()[:, :1], 4)
        masks = 25 - (value - self.shades[:, None, None]).abs()
        logits = 5 * torch.eye(count + 1)[:count][None]
        return Output([logits], [MaskLogits(torch.eye(count)[None], masks)], size, size)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Blocks of four classes with noise; the last two are things, in two halves."""
    random = np.random.default_rng(0)
    for split in ("training", "validation"):
        for number in range(COUNT):
            label = np.kron(random.integers(0, 4, (4, 6)), np.ones((16, 16), int))
            noise = random.normal(0, 12, label.shape)
            image = (60 * label + noise).clip(0, 255).astype(np.uint8)
            numbers = np.where(label >= 2, 1 + 2 * label + (np.arange(96) >= 48), 0)
            files = {
                "images": np.repeat(image[..., None], 3, 2),
                "annotations": (label + 1).astype(np.uint8),
                "instances": numbers.astype(np.uint16),
            }
            for kind, pixels in files.items():
                path = tmp_path / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (tmp_path / "classes.txt").write_text("a #101010\nb #008000\nc #0000ff thing\nd #ffff00 thing\n")
    return tmp_path


def recipe_of(task: str) -> recipes.Recipe:
    count = 2 if task == "instance" else 4
    return recipes.debug_tiny(num_classes=count, dataset="folder").vary(task=task)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_evaluation_ends_in_the_same_files(root, tmp_path, monkeypatch, task, stop):
    monkeypatch.setattr(unfinished, "SECONDS", 0)
    recipe = recipe_of(task)
    count = recipe.model.num_classes
    figures = evaluate(Reader(count), recipe, root, out=tmp_path / "whole")
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Reader(count, stop), recipe, root, out=out)
    assert (out / "unfinished.pt").is_file()
    assert not (out / "report.html").exists()
    rest = Reader(count)
    assert evaluate(rest, recipe, root, out=out) == figures
    assert rest.calls == COUNT - stop
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "report.html"]
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_another_evaluation_starts_over(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(unfinished, "SECONDS", 0)
    recipe = recipe_of("semantic")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Reader(4, stop=3), recipe, root, out=out)
    other = Reader(4)
    other.shades[0] += 1
    with caplog.at_level(logging.WARNING):
        evaluate(other, recipe, root, out=out)
    assert other.calls == COUNT
    assert "starts over" in caplog.text
    assert len(json.loads((out / "evaluation.json").read_text())["images"]) == COUNT


def test_the_key_tells_evaluations_apart(root):
    recipe, dataset = recipe_of("semantic"), open_dataset("folder", root, "val")
    key = key_of(Reader(4), recipe, dataset, 5)
    assert key == key_of(Reader(4), recipe, open_dataset("folder", root, "val"), 5)
    assert key != key_of(Reader(4), recipe, dataset, 4)
    assert key != key_of(Reader(4).double(), recipe, dataset, 5)
    assert key != key_of(Reader(4), recipe.vary(evaluation=dict(shortest_edge=80)), dataset, 5)
    assert key != key_of(Reader(4), recipe, open_dataset("folder", root, "train"), 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert key != key_of(Reader(4), recipe, dataset, 5)
    path = root / "annotations" / "validation" / "3.png"
    label = np.asarray(Image.open(path)).copy()
    label[0] = 0
    Image.fromarray(label).save(path)
    assert key != key_of(Reader(4), recipe, dataset, 5), "a label was changed"
    assert key_of(lambda images: None, recipe, dataset, 5) is None
    assert key_of(Reader(4), recipe, list(dataset), 5) is None


def test_a_broken_file_is_named(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "unfinished.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"unfinished.pt cannot be read\. Delete it"):
        evaluate(Reader(4), recipe_of("semantic"), root, out=out)


def test_states_of_instances_hold_everything(tmp_path):
    """Also of a class or an image without any."""
    random = np.random.default_rng(1)
    first, second, whole = (InstanceEvaluator(3, max_detections=7) for _ in range(3))
    first.load_state(InstanceEvaluator(3).state())
    for number in range(4):
        masks = random.random((8, 40, 40)) < 0.5
        labels = random.integers(0, 2, 8)
        kept = 5 if number else 0
        truth = Segments(labels[:kept], random.random(kept) < 0.2, (40, 40), shapes=tuple(masks[:kept]))
        segments = tuple(Segment(i, int(labels[i]), True, float(random.random()), i, 1) for i in range(8))
        said = Prediction("instance", segments=segments, masks=masks)
        for evaluator in (first if number < 2 else second, whole):
            evaluator.update(said, truth, image=number)
        if number == 1:
            torch.save(first.state(), tmp_path / "state.pt")
            second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.result() == whole.result()
    assert whole.result()["AP"] > 0
