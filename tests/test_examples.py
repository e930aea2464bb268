"""The examples: each trained, interrupted, resumed, reopened, evaluated and explored by public functions only."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from examples.boundary_loss import boundary, signed_distances, with_boundary
from examples.denoising import NUM_DENOISING, DenoisingMask2Former, build_denoising, denoising_criterion, disturb
from examples.feature_pyramid import FeaturePyramid, build_fpn
from m2f_lab import QueryExplorer, evaluate, load_model, open_dataset, train
from m2f_lab.loss import Matching
from m2f_lab.structures import MaskLogits, Output, Target
from tests.toy_training import StopAt, assert_same_run, toy_recipe, write_toy_data

EXAMPLES = {
    "feature_pyramid": dict(build=build_fpn),
    "boundary_loss": dict(criterion=with_boundary),
    "denoising": dict(build=build_denoising, criterion=denoising_criterion),
}


@dataclass
class Trained:
    name: str
    data: object
    run: object
    folder: object = field(default=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy_data(tmp_path_factory.mktemp("examples") / "data")


@pytest.fixture(scope="module", params=EXAMPLES)
def trained(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run = train(toy_recipe(), data, folder / "whole", **EXAMPLES[request.param])
    return Trained(request.param, data, run, folder)


def test_example_resumes_where_it_was_interrupted(trained):
    options = EXAMPLES[trained.name]
    interrupted = train(
        toy_recipe(), trained.data, trained.folder / "parts", callbacks=[StopAt(3, KeyboardInterrupt())], **options
    )
    assert not interrupted.finished
    resumed = train(toy_recipe(), trained.data, trained.folder / "parts", **options)
    assert resumed.finished
    assert_same_run(resumed, trained.run)


def test_example_reopens_and_evaluates(trained):
    model = trained.run.model("last")
    assert type(model) is type(load_model(trained.run.checkpoint("last")))
    result = evaluate(model, trained.run.recipe, trained.data)
    assert result["num_images"] == 2


def test_example_opens_in_an_explorer(trained):
    model = trained.run.model("last")
    image = open_dataset("folder", trained.data, "val")[0].image
    explorer = QueryExplorer(model, image)
    assert explorer.trace.num_queries == toy_recipe().model.num_queries
    assert explorer.trace.num_predictions == toy_recipe().model.num_decoder_layers + 1
    explorer.close()


def test_example_rows_hold_its_terms(trained):
    terms = {name.split(".")[1] for name in trained.run.steps[-1] if "." in name}
    extra = {
        "feature_pyramid": set(),
        "boundary_loss": {"boundary"},
        "denoising": {"class_restored", "mask_restored", "dice_restored"},
    }
    assert terms == {"class", "mask", "dice"} | extra[trained.name]


def test_denoising_losses_are_means_over_their_pairs(data, tmp_path):
    """A dice loss is at most 1 for a pair, and so is their mean, in one part and in two."""
    for parts in (1, 2):
        recipe = toy_recipe(max_iterations=1, accumulation_steps=parts)
        row = train(recipe, data, tmp_path / str(parts), **EXAMPLES["denoising"]).steps[-1]
        restored = [value for name, value in row.items() if name.endswith("dice_restored")]
        assert restored
        assert all(0 < value <= 1 for value in restored)


def test_feature_pyramid_has_the_shapes_of_a_pixel_decoder():
    decoder = FeaturePyramid([8, 16, 24, 32], toy_recipe().model)
    pyramid = [torch.randn(2, c, 64 // s, 96 // s) for c, s in zip((8, 16, 24, 32), (4, 8, 16, 32), strict=True)]
    mask_features, levels = decoder(pyramid)
    assert mask_features.shape == (2, 32, 16, 24)
    assert [tuple(level.shape[2:]) for level in levels] == [(2, 3), (4, 6), (8, 12)]


def test_boundary_distances_are_negative_inside_and_zero_without_outline():
    masks = torch.zeros(3, 32, 32, dtype=torch.bool)
    masks[0, 8:24, 8:24] = True
    masks[2] = True
    distances = signed_distances(Target(torch.tensor([0, 1, 2]), masks=masks), (32, 32), (8, 8))
    assert (distances[0][2:6, 2:6] < 0).all()
    assert distances[0][0, 0] > distances[0][1, 1] > 0
    assert not distances[1:].any()


def test_boundary_prefers_a_mask_that_lies_on_its_segment():
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 8:24, 8:24] = True
    target = Target(torch.tensor([0]), masks=masks)
    inside = torch.full((8, 8), -5.0)
    inside[2:6, 2:6] = 5.0
    pair = Matching(*(torch.tensor([0]) for _ in range(4)))
    losses = []
    for features in (inside, -inside):
        masks = [MaskLogits(torch.ones(1, 1, 1), features[None, None])]
        output = Output([torch.zeros(1, 1, 2)], masks, (32, 32), (32, 32))
        losses.append(boundary(output, [target], pair).item())
    assert losses[0] < 0 < losses[1]


def test_denoising_queries_exist_in_training_only_and_see_their_group_alone():
    model: DenoisingMask2Former = build_denoising(toy_recipe().model)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    id_map = torch.full((64, 96), 255, dtype=torch.uint8)
    id_map[:32], id_map[32:] = 0, 1
    targets = [Target.from_id_map(id_map, torch.tensor([0, 2])), Target.from_label_map(torch.full((64, 96), 255))]
    output = model(images, targets)
    assert output.class_logits[-1].shape[1] == toy_recipe().model.num_queries
    assert output.restored.class_logits[-1].shape[1] == NUM_DENOISING
    assert type(model.eval()(images)) is Output
    decoder = model.transformer_decoder
    mask_features, levels = model.pixel_decoder(model.backbone(model.preprocess(images)))
    memory = decoder.prepare(levels, mask_features, targets=targets)
    hidden = decoder.queries_blocked(decoder.start(memory), memory)[0]
    learned = toy_recipe().model.num_queries
    assert hidden[:learned, learned:].all()  # learned queries see no denoising query
    assert not hidden[:, :learned].any()  # and are seen by all
    assert not hidden[learned : learned + 2, learned : learned + 2].any()
    assert hidden[learned : learned + 2, learned + 2 :].all()


def test_denoising_never_changes_what_learned_queries_predict():
    """Otherwise training would differ from testing."""
    model = build_denoising(toy_recipe().model)
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    target = Target.from_label_map(torch.zeros(64, 96, dtype=torch.uint8))
    model.eval()
    with torch.no_grad():
        alone, beside = model(images), model(images, [target])
    for a, b in zip(alone.class_logits, beside.class_logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_denoising_boxes_surround_their_segments():
    id_map = torch.full((64, 96), 255, dtype=torch.uint8)
    id_map[16:32, 24:72] = 0
    torch.manual_seed(0)
    draws = [disturb(Target.from_id_map(id_map, torch.tensor([1])), 3, 96, 64) for _ in range(20)]
    labels, boxes = (torch.cat(values) for values in zip(*draws, strict=True))
    torch.testing.assert_close(boxes.mean(0), torch.tensor([0.5, 0.375, 0.5, 0.25]), atol=0.02, rtol=0)
    assert 0.5 < (labels == 1).float().mean() < 0.85  # half of them drawn at random among three classes
