"""Training that starts from the weights of another model: the same classes, others, some of the same name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from m2f_lab import build_model
from m2f_lab.__main__ import main
from m2f_lab.data import Classes
from m2f_lab.training import Run, train
from m2f_lab.training.loop import start_from
from m2f_lab.weights import save_weights
from tests.toy_training import assert_same_run, assert_same_tensors, toy_recipe

HEAD = "transformer_decoder.class_head.weight"


def started(recipe, init, classes: Classes | None = None, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(recipe.model)
    model.classes = classes
    start_from(model, init, **options)
    return model.state_dict()


def test_a_run_of_the_same_classes_is_taken_whole(root, whole, tmp_path, capsys):
    recipe = toy_recipe(max_iterations=1, evaluate_every=1)
    train(recipe, root, tmp_path / "tuned", init=whole.path)
    assert "Loaded" in capsys.readouterr().out
    classes = whole.model("best").classes
    assert_same_tensors(started(recipe, whole.path, classes), dict(whole.model("best").state_dict()))
    tuned, best = Run(tmp_path / "tuned").model("last").state_dict(), whole.model("best").state_dict()
    assert 0 < (tuned[HEAD] - best[HEAD]).abs().max() < 0.01, "one step away"


@pytest.mark.parametrize("names", [("ground", "ball", "box"), ("ground", "sky", "box", "tree", "car")])
def test_other_classes_get_a_head_of_their_own(whole, names):
    recipe = toy_recipe().vary(model=dict(num_classes=len(names)))
    classes = Classes(names, ((0, 0, 0),) * len(names))
    best = whole.model("best").state_dict()
    torch.manual_seed(0)
    fresh = build_model(recipe.model).state_dict()[HEAD]
    new = started(recipe, whole.path, classes)
    assert torch.equal(new[HEAD], fresh)
    assert all(torch.equal(new[name], best[name]) for name in new if "class_head" not in name)
    kept = started(recipe, whole.path, classes, keep_classes=True)
    assert torch.equal(kept[HEAD][names.index("box")], best[HEAD][1])
    assert torch.equal(kept[HEAD][-1], best[HEAD][-1])
    if "sky" in names:
        assert torch.equal(kept[HEAD][names.index("sky")], fresh[names.index("sky")])


def test_nameless_weights_are_judged_by_their_number_of_classes(tmp_path):
    recipe = toy_recipe()
    other = build_model(recipe.vary(model=dict(num_classes=7)).model)
    new = started(recipe, save_weights(other, tmp_path / "seven"), Classes(("a", "b", "c"), ((0, 0, 0),) * 3))
    assert new[HEAD].shape[0] == 4
    name = "transformer_decoder.query_features"
    assert torch.equal(new[name], other.state_dict()[name])
    with pytest.raises(ValueError, match="does not fit the model"):
        started(recipe.vary(model=dict(num_queries=5)), tmp_path / "seven")


def test_a_run_that_goes_on_keeps_its_own_weights(root, whole, tmp_path):
    recipe = replace(whole.recipe, name="again")
    first = train(recipe, root, tmp_path / "a", init=whole.path)
    again = train(recipe, root, tmp_path / "a", init="there is nothing here")
    assert_same_run(again, first)


def test_the_command_takes_weights_to_start_from(root, whole, tmp_path, capsys):
    whole.recipe.vary(optimization=dict(max_iterations=1)).save(tmp_path / "recipe.json")
    arguments = ["--recipe", str(tmp_path / "recipe.json"), "--data-root", str(root), "--out", str(tmp_path / "run")]
    assert main(["train", *arguments, "--init", str(whole.path), "--keep-classes"]) == 0
    assert f"from {whole.path}" in capsys.readouterr().out
