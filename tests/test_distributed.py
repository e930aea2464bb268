"""Several processes that train together do what one process would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2f_lab.recipes import Recipe
from tests.several_processes import read_steps, start_processes, take_steps
from tests.test_backbone import SMALL_SWIN
from tests.toy_training import assert_same_tensors, toy_recipe


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
