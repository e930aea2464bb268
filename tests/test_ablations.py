"""The paper's ablations, trained through the doors alone."""

import pytest
import torch

from m2f_lab import recipes, train
from m2f_lab.model import build_model
from m2f_lab.references import resolve
from tests.toy_training import toy_recipe, write_toy_data

NAMES = (
    "no_masked_attention",
    "single_scale",
    "no_learnable_queries",
    "self_attention_first",
    "learnable_queries_not_supervised",
    "mask_loss_on_full_masks",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_toy_data(root)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_ablation_trains_and_reopens(name, data, tmp_path):
    recipe = recipes.ablation(name, toy_recipe(max_iterations=2))
    run = train(recipe, data, tmp_path / "run")
    assert run.finished
    assert run.recipe == recipe
    model = run.model("last")
    with torch.no_grad():
        output = model(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    assert all(logits.isfinite().all() for logits in output.class_logits)


def test_ablations_change_the_step_they_name():
    config = toy_recipe(max_iterations=1).model
    torch.manual_seed(0)
    paper = build_model(config).eval()
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    outputs = {}
    for name in NAMES[:4]:
        model = resolve(recipes.ablation(name).builder)(config).eval()
        model.load_state_dict(paper.state_dict())
        with torch.no_grad():
            outputs[name] = model(images)
    with torch.no_grad():
        expected = paper(images)
    assert any(state.blocked.any() for state in expected.states[1:])
    assert not any(state.blocked.any() for state in outputs["no_masked_attention"].states[1:])
    assert {state.level for state in outputs["single_scale"].states[1:]} == {0}
    assert len({state.level for state in expected.states[1:]}) > 1
    first = outputs["self_attention_first"]
    assert torch.equal(first.class_logits[0], expected.class_logits[0])
    assert not torch.allclose(first.class_logits[1], expected.class_logits[1])
    fresh = resolve(recipes.ablation("no_learnable_queries").builder)(config)
    assert not fresh.transformer_decoder.query_features.any()
    assert not fresh.transformer_decoder.query_features.requires_grad


def test_unsupervised_start_has_no_loss_before_the_first_layer(data, tmp_path):
    recipe = recipes.ablation("learnable_queries_not_supervised", toy_recipe(max_iterations=1))
    row = train(recipe, data, tmp_path / "run").steps[-1]
    numbers = {key.split(".")[0] for key in row if "." in key}
    assert numbers == {str(number) for number in range(1, recipe.model.num_decoder_layers + 1)}


def test_unknown_ablation_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="no_masked_attention"):
        recipes.ablation("no_attention")
