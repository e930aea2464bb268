"""Pixel statistics: those of the backbone's pretraining, unless a config says otherwise; saved with the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch

from m2f_lab import build_model, recipes
from m2f_lab.networks import pixel_statistics, settled
from m2f_lab.recipes import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Recipe
from m2f_lab.training.run import open_run
from m2f_lab.weights import load_model, load_weights, save_weights

SMALL = dict(hidden_dim=32, mask_dim=32, num_queries=2, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
RESNET = ModelConfig(num_classes=3, backbone="resnet18", drop_path_rate=0.0, **SMALL)
HALVES = ((127.5,) * 3, (127.5,) * 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", (IMAGENET_MEAN, IMAGENET_STD)),
        ("swin_large_patch4_window12_384.ms_in22k", (IMAGENET_MEAN, IMAGENET_STD)),
        ("tf_efficientnet_lite0", HALVES),
        ("mobilenetv3_large_100.miil_in21k", ((0.0,) * 3, (255.0,) * 3)),
        ("a network that timm does not know", (IMAGENET_MEAN, IMAGENET_STD)),
    ],
)
def test_statistics_are_those_of_the_backbones_tag(name, expected):
    mean, std = pixel_statistics(replace(RESNET, backbone=name))
    assert mean == pytest.approx(expected[0], abs=1e-3)
    assert std == pytest.approx(expected[1], abs=1e-3)


def test_published_models_have_seen_imagenets():
    for name in recipes.names():
        assert pixel_statistics(recipes.named(name).model) == (IMAGENET_MEAN, IMAGENET_STD)


def test_a_config_overrides_the_tag_and_is_checked():
    own = replace(RESNET, pixel_mean=[1, 2.5, 3], pixel_std=(4, 5, 6))
    assert pixel_statistics(own) == ((1, 2.5, 3), (4, 5, 6))
    model = build_model(own)
    image = torch.randint(0, 256, (1, 3, 32, 64))
    expected = (image - torch.tensor([1, 2.5, 3]).view(3, 1, 1)) / torch.tensor([4.0, 5, 6]).view(3, 1, 1)
    torch.testing.assert_close(model.preprocess(image), expected)
    with pytest.raises(ValueError, match=r"pixel_mean has 2 values, but images have 3 channels"):
        pixel_statistics(replace(RESNET, pixel_mean=(1, 2)))
    for wrong in (dict(pixel_std=(1, 0, 1)), dict(pixel_std=("a", 1, 1)), dict(pixel_mean=(float("nan"), 1, 1))):
        with pytest.raises(ValueError, match=f"ModelConfig.{next(iter(wrong))} must be"):
            replace(RESNET, **wrong)


def test_other_numbers_of_channels():
    """Statistics repeat in turn, as timm repeats the first layer's weights."""
    four = replace(RESNET, backbone_options={"in_chans": 4})
    assert pixel_statistics(four) == (IMAGENET_MEAN + IMAGENET_MEAN[:1], IMAGENET_STD + IMAGENET_STD[:1])
    model = build_model(four).eval()
    image = torch.randint(0, 256, (1, 4, 40, 50))
    assert model(image).class_logits[-1].shape == (1, 2, 4)
    with pytest.raises(ValueError, match=r"takes images \[B, 4, H, W\] in 0\.\.255, got shape \(1, 3, 40, 50\)"):
        model(image[:, :3])
    assert pixel_statistics(replace(RESNET, backbone_options={"in_chans": 1}))[0] == IMAGENET_MEAN[:1]


def test_statistics_that_were_set_by_hand_are_saved(tmp_path):
    torch.manual_seed(0)
    model = build_model(RESNET).eval()
    model.pixel_mean.fill_(100.1)
    model.pixel_std.fill_(50.0)
    again = load_model(save_weights(model, tmp_path))
    image = torch.randint(0, 256, (1, 3, 64, 64))
    assert torch.equal(model(image).class_logits[-1], again(image).class_logits[-1])
    with pytest.raises(ValueError, match=r"Set model\.pixel_mean and model\.pixel_std"):
        load_weights(build_model(RESNET), tmp_path)


def test_models_from_before_keep_imagenets(tmp_path):
    """Their backbone's tag says otherwise, but they were trained with these."""
    model = build_model(replace(RESNET, backbone="test_resnet"))
    assert model.pixel_mean.flatten().tolist() == list(HALVES[0])
    save_weights(model, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model"].pop("pixel_mean") == list(HALVES[0])
    del content["model"]["pixel_std"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_model(tmp_path).pixel_mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)


def older_recipe(recipe: Recipe, folder) -> None:
    recipe.save(folder / "recipe.json")
    content = json.loads((folder / "recipe.json").read_text())
    for name in ("pixel_mean", "pixel_std"):
        del content["model"][name]
    (folder / "recipe.json").write_text(json.dumps(content))
    (folder / "checkpoints" / "last").mkdir(parents=True)


def test_runs_from_before_go_on_where_the_statistics_are_the_same(tmp_path):
    same, other = recipes.camvid_small(), recipes.debug_tiny()
    for name, recipe in (("same", same), ("other", other)):
        (tmp_path / name).mkdir()
        older_recipe(recipe, tmp_path / name)
    open_run(tmp_path / "same", same, "must")
    with pytest.raises(ValueError, match=r"model\.pixel_mean: \[123\.675.* there, \[127\.5"):
        open_run(tmp_path / "other", other, "must")
    assert settled(same.model).pixel_mean == IMAGENET_MEAN


def test_frozen_norms_of_a_pretrained_backbone_stay_frozen_when_loaded_and_saved_again(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    model = build_model(replace(RESNET, backbone_weights=str(tmp_path / "resnet18.pth")))
    (tmp_path / "resnet18.pth").unlink()  # not needed again
    for generation in ("first", "second"):
        model = load_model(save_weights(model, tmp_path / generation)).train()
        norm = model.backbone.network.bn1
        before = norm.running_mean.clone()
        model(torch.randint(0, 256, (2, 3, 64, 64)))
        assert torch.equal(norm.running_mean, before)
        assert not norm.weight.requires_grad
        assert model.backbone.network.conv1.weight.requires_grad
