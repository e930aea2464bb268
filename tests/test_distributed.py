"""Several processes that train together do what one process would do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from m2f_lab.__main__ import main
from m2f_lab.recipes import Recipe
from m2f_lab.training import Run, train
from tests.several_processes import read_steps, start_processes, take_steps
from tests.test_backbone import SMALL_SWIN
from tests.toy_training import assert_same_run, assert_same_tensors, toy_recipe


def swin_recipe(drop_rate: float, batch_size: int, **optimization) -> Recipe:
    """Swin, whose branches an image loses with a probability of up to `drop_rate`; the gradient is not clipped."""
    settings = dict(batch_size=batch_size, max_iterations=50, clip_norm=1e9) | optimization
    return toy_recipe(**settings).vary(model=SMALL_SWIN | dict(drop_path_rate=drop_rate))


def steps_of(
    recipe: Recipe, root: Path, folder: Path, size: int, num_steps: int, static_sizes: bool = False
) -> list[dict[str, torch.Tensor]]:
    """What each of `size` processes computes."""
    folder.mkdir()
    recipe.save(folder / "recipe.json")
    arguments = str(folder / "recipe.json"), str(root), str(folder), num_steps, static_sizes
    if size == 1:
        take_steps(*arguments)
    else:
        start_processes("tests.several_processes:take_steps", size, *arguments)
    return read_steps(folder)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], num_steps: int) -> None:
    """To 1e-5 of the largest number in the gradient of a step."""
    for step in range(num_steps):
        gradients = {name: value for name, value in expected.items() if name.startswith(f"gradient.{step}.")}
        scale = max(value.abs().max() for value in gradients.values())
        for name, value in gradients.items():
            difference = (found[name] - value).abs().max() / scale
            assert difference < 1e-5, f"{name}: {difference:.1e}"


@pytest.mark.parametrize(("drop_rate", "static_sizes"), [(0.0, False), (0.3, False), (0.3, True)])
def test_gradients_of_two_processes_with_an_image_each_are_those_of_one(root, tmp_path, drop_rate, static_sizes):
    """Weights stand still, so that the steps differ in nothing but their images and in what is dropped.

    With one image, a process drops whole branches in most steps, and seldom the same as the other.
    """
    recipe = swin_recipe(drop_rate, batch_size=2, learning_rate=1e-20)
    one = steps_of(recipe, root, tmp_path / "one", 1, num_steps=4)[0]
    two = steps_of(recipe, root, tmp_path / "two", 2, 4, static_sizes)
    for found in two:
        assert_same_gradients(found, one, num_steps=4)
        assert found["blocks"] < 10 < one["blocks"]  # gradients lie where they are sent from
    assert bool(sum(found["lost"] for found in two)) == (drop_rate > 0)


@pytest.mark.parametrize(
    ("size", "images"), [(2, 2), (4, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 1), (4, 2)))]
)
def test_fifty_steps_with_stochastic_depth(root, tmp_path, size, images):
    """All processes end with the same weights; the first gradient is that of one process, and training learns."""
    recipe = swin_recipe(0.3, batch_size=size * images)
    one = steps_of(recipe, root, tmp_path / "one", 1, num_steps=1)[0]
    ranks = steps_of(recipe, root, tmp_path / "several", size, num_steps=50)
    assert len(ranks) == size
    assert all(found.pop("lost") > 0 for found in ranks)
    for found in ranks:
        assert_same_gradients(found, one, num_steps=1)
        assert_same_tensors(found, ranks[0])
    losses = [ranks[0][f"loss.{i}"].item() for i in range(50)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


RESUMED = swin_recipe(0.3, batch_size=2, max_iterations=6, evaluate_every=6, checkpoint_every=2, ema_decay=0.7)


def train_in_own_folders(recipe: Recipe, root: Path, folder: Path, stop: int | None = None) -> list[dict]:
    """Train in two processes with a folder each; what each of them says."""
    folder.mkdir(exist_ok=True)
    recipe.save(folder / "recipe.json")
    start_processes("tests.several_processes:train_in_own_folder", 2, folder / "recipe.json", root, folder, stop)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def never_stopped(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_in_own_folders(RESUMED, root, folder)
    return folder


@pytest.mark.parametrize("stale", [False, True], ids=["no checkpoint", "another checkpoint"])
def test_without_a_shared_disk_all_go_on_from_the_main_ones_checkpoint(root, never_stopped, tmp_path, stale):
    """Whatever the other process finds in a folder of its own."""
    folder = tmp_path / "run"
    first = train_in_own_folders(RESUMED, root, folder, stop=3)
    assert [words["error"] for words in first] == ["power cut"] * 2
    assert Run(folder / "0").iteration == 2
    assert not (folder / "1").exists()
    if stale:
        shutil.copytree(never_stopped / "0", folder / "1")
    expected = json.loads((never_stopped / "0.json").read_text())
    assert [iteration for iteration, _ in expected["steps"]] == [0, 1, 2, 3, 4, 5]
    for words in train_in_own_folders(RESUMED, root, folder):
        assert words == expected | {"steps": expected["steps"][2:]}
    assert_same_run(Run(folder / "0"), Run(never_stopped / "0"))


def test_all_processes_raise_what_the_main_one_raises(root, tmp_path):
    """None of them waits for another that has given up."""
    run = train(RESUMED.vary(optimization=dict(max_iterations=1)), root, tmp_path / "run" / "0")
    for words in train_in_own_folders(run.recipe.vary(seed=9), root, tmp_path / "run"):
        assert "holds a run of another recipe" in words["error"]
        assert "seed: 0 there, 9 here" in words["error"]


def test_the_main_process_alone_reports_whether_a_run_is_finished(root, tmp_path, monkeypatch):
    """The others may run on machines without its folder, and `torchrun` takes their status for a failure."""
    toy_recipe(max_iterations=1).save(tmp_path / "recipe.json")
    arguments = ["train", "--recipe", str(tmp_path / "recipe.json"), "--data-root", str(root), "--out"]
    monkeypatch.setattr("m2f_lab.__main__.train", lambda *_, **__: Run(tmp_path / "elsewhere"))
    assert main([*arguments, str(tmp_path / "run")]) == 1
    monkeypatch.setenv("RANK", "1")
    assert main([*arguments, str(tmp_path / "run")]) == 0
