"""Recipes are data: they round-trip, they vary, and they hold what was published."""

import inspect

import pytest

from m2f_lab import recipes
from m2f_lab.recipes import ModelConfig, Recipe

FUNCTIONS = {
    name: f
    for name, f in inspect.getmembers(recipes, inspect.isfunction)
    if not name.startswith("_") and f.__module__ == recipes.__name__ and name not in ("replace", "asdict")
}
ABLATION = FUNCTIONS.pop("ablation")  # takes a name
for name in ("names", "named", "published", "authors"):  # of the zoo: see test_zoo.py
    del FUNCTIONS[name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_round_trip_through_json(name, tmp_path):
    recipe = FUNCTIONS[name]()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_ablation_round_trips_with_its_builder(tmp_path):
    recipe = ABLATION("no_masked_attention")
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert recipe.builder != Recipe.builder
    assert recipe.published == {}


def test_backbone_options_round_trip_too(tmp_path):
    """JSON knows no tuples; a run that is continued compares its recipe with the file."""
    recipe = recipes.debug_tiny().vary(model=dict(backbone_options=dict(depths=(1, 1, 2, 1))))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize(
    ("name", "mean_iou"),
    [
        ("ade20k_swin_tiny", 47.7),
        ("ade20k_swin_small", 51.3),
        ("ade20k_swin_base", 53.9),
        ("ade20k_swin_large", 56.1),
        ("cityscapes_swin_tiny", 82.1),
        ("cityscapes_swin_small", 82.6),
        ("cityscapes_swin_base", 83.3),
        ("cityscapes_swin_large", 83.3),
    ],
)
def test_published_figures(name, mean_iou):
    assert FUNCTIONS[name]().published["mIoU"] == mean_iou


def test_the_papers_ade20k_recipe():
    recipe = recipes.ade20k_swin_tiny()
    assert recipe.data.crop_size == (512, 512)
    assert recipe.data.shortest_edges[:3] == (256, 307, 358)
    assert recipe.data.shortest_edges[-1] == 1024
    assert recipe.data.longest_edge == 2048
    assert (recipe.optimization.max_iterations, recipe.optimization.batch_size) == (160_000, 16)
    assert (recipe.model.num_queries, recipe.model.num_decoder_layers) == (100, 9)
    assert recipes.ade20k_swin_base().data.crop_size == (640, 640)


def test_the_papers_cityscapes_recipe():
    recipe = recipes.cityscapes_swin_large()
    assert recipe.data.crop_size == (512, 1024)
    assert (recipe.data.shortest_edges[0], recipe.data.shortest_edges[-1]) == (512, 2048)
    assert recipe.optimization.max_iterations == 90_000


def test_vary_changes_parts_and_leaves_the_original():
    recipe = recipes.debug_tiny()
    varied = recipe.vary(seed=3, optimization=dict(max_iterations=7))
    assert (varied.seed, varied.optimization.max_iterations) == (3, 7)
    assert varied.optimization.batch_size == recipe.optimization.batch_size
    assert recipe.seed == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_classes=0), "num_classes must be a positive integer, got 0"),
        (dict(num_classes=2, hidden_dim=48), "normalisation = 32"),
        (dict(num_classes=2, hidden_dim=64, num_heads=7), "divisible by num_heads = 7"),
        (dict(num_classes=2, drop_path_rate=1.0), r"in \[0, 1\)"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_other_mistakes_are_refused(tmp_path):
    recipe = recipes.debug_tiny()
    with pytest.raises(ValueError, match="multiple of accumulation_steps = 3"):
        recipe.vary(optimization=dict(accumulation_steps=3))
    with pytest.raises(ValueError, match="evaluate_every must be positive, got 0"):
        recipe.vary(optimization=dict(evaluate_every=0))
    with pytest.raises(ValueError, match="longest_edge -1 are pixels"):
        recipe.vary(data=dict(longest_edge=-1))
    with pytest.raises(ValueError, match="got 'voc'"):
        recipe.vary(data=dict(dataset="voc"))
    with pytest.raises(ValueError, match=r"Recipe\.builder names a function"):
        recipe.vary(builder="build_model")
    (tmp_path / "recipe.json").write_text('{"name": "x", "colour": 3}')
    with pytest.raises(ValueError, match="colour"):
        Recipe.load(tmp_path / "recipe.json")
