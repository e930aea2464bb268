"""Recipes of the published checkpoints hold what was published, field by field."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from m2f_lab import __main__ as cli
from m2f_lab import recipes
from m2f_lab.data import _READERS
from m2f_lab.inference import postprocess
from m2f_lab.inference.predict import _OPTIONS as PREDICT_OPTIONS
from m2f_lab.model import build_model
from m2f_lab.networks import settled
from m2f_lab.recipes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizationConfig,
    Recipe,
)
from m2f_lab.training import distributed, train
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from m2f_lab.training.run import open_run
from tests.toy_training import StopAt, assert_same_run, toy_recipe, write_toy_data

HERE = Path(__file__).parent
ROWS = json.loads((HERE / "golden" / "model_zoo.json").read_text())
CONVERTED = [row for row in ROWS if row["family"] == "huggingface"]
TRAINED = [row for row in ROWS if row["family"] != "huggingface"]
REFERENCE = HERE.parents[1] / "shared" / "reference" / "model_zoo.json"
BEFORE = HERE / "golden" / "recipe_of_an_older_version.json"


def name_of(row: dict) -> str:
    dataset = row["dataset"].removesuffix("_vistas")
    small_imagenet = "_in1k" if row["backbone_pretraining"] == "ImageNet-1k, 384" else ""
    source = "" if row["family"] == "official" else f"_{row['family']}"
    return f"{dataset}_{row['task']}_{row['backbone']}{small_imagenet}{source}"


def model_of(row: dict) -> dict:
    """Fields of the ModelConfig that a row decides."""
    if row["backbone"].startswith("resnet"):
        backbone = f"{row['backbone']}.tv_in1k"
        assert row["backbone_pretraining"].startswith("ImageNet-1k, torchvision")
    else:
        imagenet, resolution = row["backbone_pretraining"].removeprefix("ImageNet-").split(", ")
        backbone = f"{row['backbone']}_patch4_window{row['window']}_{resolution}.ms_in{imagenet}"
    norms = {"FrozenBN": "frozen", "SyncBN": "trained", "BN in eval mode, not trained": "frozen",
             "SyncBN, not trained (requires_grad False)": "measured"}  # fmt: skip
    return dict(
        num_classes=row["num_classes"], backbone=backbone, backbone_weights=True, num_queries=row["queries"],
        num_decoder_layers=row["decoder_layers"], batch_norm=norms[row["norm"]] if "norm" in row else "frozen",
        drop_path_rate=0.3 if "window" in row else 0.0, hidden_dim=256, mask_dim=256, num_heads=8,
        num_encoder_layers=6, num_sampling_points=4, encoder_feedforward_dim=1024, decoder_feedforward_dim=2048,
        backbone_options={}, frozen_stages=0, pixel_mean=IMAGENET_MEAN, pixel_std=IMAGENET_STD,
    )  # fmt: skip


def data_of(row: dict) -> dict:
    resize, is_lsj = row["train_resize"], row["train_resize"]["kind"] == "lsj"
    if is_lsj:
        assert row["crop_size"] == [resize["target"]] * 2
    is_official_like = row["family"] in ("official", "mmdetection")
    return dict(
        dataset=row["dataset"].removesuffix("_vistas"),
        crop_size=tuple(row["crop_size"]),
        shortest_edges=() if is_lsj else tuple(resize["choices"]),
        longest_edge=None if is_lsj else resize["max_size"],
        scale_range=(resize["min_scale"], resize["max_scale"]) if is_lsj else None,
        color_jitter=not is_lsj,
        flip=True,
        single_category_max_area=1.0 if is_official_like else 0.75,
        num_workers=DataConfig.num_workers,
    )


def optimization_of(row: dict) -> dict:
    is_poly = row["lr_schedule"] == "poly"
    return dict(
        max_iterations=row["iterations"] if "iterations" in row else row["iterations_computed"],
        batch_size=row["batch"],
        learning_rate=row["lr"],
        step_at=() if is_poly else tuple(row["lr_steps"]),
        step_factor=0.1,
        poly_power=row["lr_power"] if is_poly else 0.9,
        warmup_iterations=0,  # COCO's lasts for 10 iterations and starts at the full rate
        backbone_multiplier=0.1,
        weight_decay=0.05,
        clip_norm=0.01,
    )


def evaluation_of(row: dict) -> dict:
    test = row["test"]
    if row["family"] == "official":
        resizes_first = test["instance_on"] or test["panoptic_on"]
    else:
        resizes_first = row["task"] != "semantic"
    edges = {"ade20k": (256, 384, 512, 640, 768, 896), "cityscapes": (512, 768, 1024, 1280, 1536, 1792)}
    longest = {"ade20k": 3584, "cityscapes": 4096}
    if row["dataset"] == "ade20k" and row["crop_size"] == [640, 640]:
        edges, longest = {"ade20k": (320, 480, 640, 800, 960, 1120)}, {"ade20k": 4480}
    is_official = row["family"] == "official"
    return dict(
        shortest_edge=row["test_resize"]["shortest_edge"],
        longest_edge=row["test_resize"]["max_size"],
        tile=None,
        tile_overlap=0.25,
        semantic_order="resize_first" if resizes_first else "combine_first",
        object_mask_threshold=test.get("object_mask_threshold", 0.8),
        overlap_threshold=test.get("overlap_threshold", test.get("iou_thr", 0.8)),
        top_k=test.get("top_k", test.get("max_per_image", 100)),
        multi_scale_edges=edges.get(row["dataset"], ()) if is_official else (),
        multi_scale_longest_edge=longest.get(row["dataset"]) if is_official else None,
    )


class TestRows:
    def test_there_are_as_many_as_recipes(self):
        assert [row["id"] for row in TRAINED if name_of(row) not in recipes.names()] == []
        assert len(recipes.names()) == len(TRAINED) == 79
        assert sum(row["family"] == "official" for row in TRAINED) == 47

    @pytest.mark.parametrize("row", TRAINED, ids=name_of)
    def test_recipe(self, row):
        recipe = recipes.named(name_of(row))
        assert (recipe.name, recipe.task) == (name_of(row), row["task"])
        assert asdict(settled(recipe.model)) == model_of(row)
        assert asdict(recipe.data) == data_of(row)
        found = asdict(recipe.optimization)
        assert {name: found[name] for name in optimization_of(row)} == optimization_of(row)
        assert asdict(recipe.evaluation) == evaluation_of(row)
        figures = {"mIoU" if name == "mIoU_ss" else name: value for name, value in row["scores"].items()}
        assert recipe.published == {name: value for name, value in figures.items() if value is not None}
        assert recipe.metric in recipe.published
        assert recipe.notes.endswith(row["url"])
        loss = asdict(recipe.loss)
        assert (loss["class_weight"], loss["mask_weight"], loss["dice_weight"]) == (2, 5, 5)
        assert (loss["num_points"], loss["oversample_ratio"], loss["importance_sample_ratio"]) == (12544, 3, 0.75)
        assert loss["no_object_weight"] == 0.1

    @pytest.mark.parametrize("row", CONVERTED, ids=lambda row: row["id"].rpartition("/")[2])
    def test_conversion_has_the_recipe_of_its_source(self, row):
        (source,) = (each for each in TRAINED if each["id"] == row["converted_from"])
        recipe = recipes.named(name_of(source))
        assert asdict(settled(recipe.model)) == model_of(row)
        assert asdict(recipe.data) == data_of(row | {"family": "official"})
        found = asdict(recipe.optimization)
        assert {name: found[name] for name in optimization_of(row)} == optimization_of(row)

    def test_they_are_those_of_the_model_zoo(self):
        if not REFERENCE.is_file():
            pytest.skip("the model zoo is not here")
        zoo = {row["id"]: row for row in json.loads(REFERENCE.read_text())["rows"]}
        assert {row["id"] for row in ROWS} == {i for i, row in zoo.items() if row["task"] != "video_instance"}
        for row in ROWS:
            there = zoo[row["id"]]
            assert row == {name: there[name] for name in row}


class TestNames:
    def test_by_parts(self):
        recipe = recipes.published("coco", "panoptic", "swin_large")
        assert recipe == recipes.named("coco_panoptic_swin_large")
        by_others = recipes.published("coco", "panoptic", "swin_large", source="mmdetection")
        assert (recipe.published["PQ"], by_others.published["PQ"]) == (57.8, 57.6)

    def test_short_ones(self):
        for dataset in ("ade20k", "cityscapes"):
            for backbone in ("swin_tiny", "swin_small", "swin_base", "swin_large", "resnet50"):
                short = getattr(recipes, f"{dataset}_{backbone}")()
                assert short == recipes.published(dataset, "semantic", backbone)

    def test_settings_without_a_published_checkpoint(self):
        """The data set's settings for the task with another backbone, and no figure."""
        recipe = recipes.ade20k_swin_tiny("panoptic")
        assert (recipe.name, recipe.task, recipe.published) == ("ade20k_panoptic_swin_tiny", "panoptic", {})
        assert "no figure to reach" in recipe.notes
        like = recipes.published("ade20k", "panoptic", "swin_large")
        assert recipe.optimization == like.optimization
        assert recipe.evaluation == like.evaluation
        assert (recipe.model.num_queries, like.model.num_queries) == (100, 200)
        assert recipes.authors("ade20k", "panoptic", "swin_large") == like
        with pytest.raises(ValueError, match="no settings for 'semantic' on 'coco'; there are for panoptic, instance"):
            recipes.authors("coco", "semantic", "swin_tiny")
        with pytest.raises(ValueError, match=r"backbone must be one of resnet50, .*, got 'vgg'"):
            recipes.authors("ade20k", "semantic", "vgg")

    def test_unknown_one_is_refused_with_close_ones(self):
        with pytest.raises(ValueError, match=r"no published recipe 'coco_semantic_swin_large'; did you mean .*coco_"):
            recipes.published("coco", "semantic", "swin_large")
        with pytest.raises(ValueError, match=r"recipes\.names\(\) lists them"):
            recipes.named("?")

    def test_every_data_set_that_can_be_opened_may_stand_in_a_recipe(self):
        assert set(_READERS) <= set(recipes.DATASETS)

    def test_a_recipe_that_is_changed_leaves_the_next_one_alone(self):
        recipes.ade20k_swin_tiny().published["mIoU"] = 0.0
        assert recipes.ade20k_swin_tiny().published["mIoU"] == 47.7

    @pytest.mark.parametrize("name", recipes.names())
    def test_round_trip_through_json(self, name, tmp_path):
        recipe = recipes.named(name)
        recipe.save(tmp_path / "recipe.json")
        assert Recipe.load(tmp_path / "recipe.json") == recipe

    def test_command_line_lists_them_by_data_set_and_task(self, capsys):
        assert cli.main(["recipes"]) == 0
        groups = [group.splitlines() for group in capsys.readouterr().out.strip().split("\n\n")]
        headings = [lines[0] for lines in groups]
        assert len(set(headings)) == len(headings) == 11
        (coco,) = (lines[1:] for lines in groups if lines[0] == "# coco, instance, 80 classes")
        assert len(coco) == 11
        assert coco[6].split() == [
            "coco_instance_swin_large", "swin_large_patch4_window12_384.ms_in22k", "1024×1024", "200", "queries",
            "737,500", "iterations", "AP", "50.1,", "boundary_AP", "36.2",
        ]  # fmt: skip
        assert sum(len(lines) - 1 for lines in groups) == 79 + 4

    def test_command_line_lists_those_with_a_word(self, capsys):
        assert cli.main(["recipes", "semantic_swin_tiny"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("#")]
        assert len(lines) == 6
        assert lines[0].startswith("ade20k_swin_tiny ")  # the short name of ade20k_semantic_swin_tiny

    def test_command_line_takes_both_names(self):
        for name in ("ade20k_swin_tiny", "ade20k_semantic_swin_tiny"):
            assert cli.recipe_named(name) == recipes.ade20k_swin_tiny()


class TestModels:
    @pytest.mark.parametrize(
        "row",
        # One of each backbone, number of classes and number of queries.
        {
            (row["backbone"], row["num_classes"], row["queries"], row.get("norm")): row
            for row in TRAINED
            if row["family"] == "official"
        }.values(),
        ids=name_of,
    )
    def test_has_as_many_parameters_as_the_official_one(self, row):
        config = replace(recipes.named(name_of(row)).model, backbone_weights=None)
        with torch.device("meta"):
            model = build_model(config)
        norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bool(norms) == ("norm" in row)
        frozen = sum(p.numel() for norm in norms for p in norm.parameters()) if row.get("norm") == "FrozenBN" else 0
        assert sum(p.numel() for p in model.parameters()) - frozen == row["parameters_counted"]

    @pytest.mark.parametrize("backbone", sorted({recipes.named(name).model.backbone for name in recipes.names()}))
    def test_images_are_normalised_as_the_backbone_was_pretrained(self, backbone):
        config = timm.get_pretrained_cfg(backbone)
        assert [255 * mean for mean in config.mean] == pytest.approx(IMAGENET_MEAN)
        assert [255 * std for std in config.std] == pytest.approx(IMAGENET_STD)

    @pytest.mark.parametrize("row", [row for row in TRAINED if row["family"] == "official"], ids=name_of)
    def test_backbone_starts_from_the_published_weights(self, row):
        published = row["initial_weights"].rpartition("/")[2].removesuffix(".pkl")
        file = Path(timm.get_pretrained_cfg(recipes.named(name_of(row)).model.backbone).url).stem
        if published.startswith("R-"):  # detectron2's copy of torchvision's
            assert file.startswith(published.replace("R-", "resnet") + "-")
        else:
            assert file == published

    @pytest.mark.parametrize(
        ("batch_norm", "measures", "learns"),
        [("frozen", False, False), ("measured", True, False), ("trained", True, True)],
    )
    def test_batch_norms_of_a_pretrained_backbone(self, batch_norm, measures, learns, tmp_path):
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
        small = dict(hidden_dim=32, mask_dim=32, num_queries=2, num_encoder_layers=1, num_decoder_layers=1)
        config = ModelConfig(
            num_classes=2, backbone="resnet18", backbone_weights=str(tmp_path / "weights.pth"),
            batch_norm=batch_norm, drop_path_rate=0.0, **small,
        )  # fmt: skip
        backbone = build_model(config).backbone.train()
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        backbone(torch.randn(2, 3, 64, 64))
        after = backbone.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert ("network.bn1.running_mean" in moved) == measures
        assert backbone.network.bn1.weight.requires_grad == learns
        assert backbone.network.conv1.weight.requires_grad

    def test_impossible_batch_norm_is_refused(self):
        with pytest.raises(ValueError, match=r"batch_norm must be one of .*, got 'sync'"):
            ModelConfig(num_classes=2, batch_norm="sync")

    @pytest.mark.parametrize(("device", "syncs"), [("cuda", True), ("cpu", False)])
    def test_batch_norms_measure_the_whole_batch_on_gpus(self, device, syncs, monkeypatch):
        monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **options: model)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        weight = model[1].weight
        wrapped = DistributedContext(0, 2, torch.device(device)).wrap_ddp(model)
        assert isinstance(wrapped[1], nn.SyncBatchNorm) == syncs
        assert wrapped[1].weight is weight  # which the optimiser holds
        alone = nn.Sequential(nn.BatchNorm2d(4))
        assert DistributedContext(0, 1, torch.device(device)).wrap_ddp(alone) is alone
        assert type(alone[0]) is nn.BatchNorm2d


def pytorch_factors(config: OptimizationConfig, schedule: Callable[[torch.optim.Optimizer], object]) -> list[float]:
    """The factor of every step, as a scheduler of PyTorch sets it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer)
    factors = []
    for _ in range(config.max_iterations):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def chained(optimizer: torch.optim.Optimizer, start: float, warmup: int, at: tuple[int, ...], factor: float):
    lr_scheduler = torch.optim.lr_scheduler
    rise = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=warmup)
    return lr_scheduler.ChainedScheduler([rise, lr_scheduler.MultiStepLR(optimizer, list(at), factor)])


class TestSteps:
    CONFIG = OptimizationConfig(max_iterations=40, step_at=(20, 31))

    def factors(self, config: OptimizationConfig) -> list[float]:
        return [learning_rate_factor(i, config) for i in range(config.max_iterations)]

    def test_are_those_of_pytorch_with_the_published_warm_up(self):
        """Ten iterations that start at the full rate: none in effect."""
        expected = pytorch_factors(self.CONFIG, lambda optimizer: chained(optimizer, 1.0, 10, (20, 31), 0.1))
        assert self.factors(self.CONFIG) == pytest.approx(expected, rel=1e-12)

    def test_are_those_of_pytorch_with_a_warm_up_and_another_factor(self):
        config = replace(self.CONFIG, warmup_iterations=25, step_factor=0.5)  # the first step falls into the warm-up
        expected = pytorch_factors(config, lambda optimizer: chained(optimizer, 1 / 25, 24, (20, 31), 0.5))
        assert self.factors(config) == pytest.approx(expected, rel=1e-12)

    def test_published(self):
        config = recipes.published("coco", "instance", "resnet50").optimization
        at = (0, 327_777, 327_778, 355_091, 355_092, 368_749)
        rates = [config.learning_rate * learning_rate_factor(i, config) for i in at]
        assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6], rel=1e-12)

    def test_all_groups_follow(self):
        model = nn.Module()
        model.backbone, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = build_optimizer(model, self.CONFIG)
        assert set_learning_rate(optimizer, 25, self.CONFIG) == pytest.approx(1e-5)
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
            {"backbone": 1e-6, "decoders": 1e-5}
        )

    def test_continued_run_ends_in_the_bits_of_one_that_was_never_stopped(self, tmp_path):
        root = write_toy_data(tmp_path / "data", num_train=4, num_val=1)
        recipe = toy_recipe(step_at=(1, 2), warmup_iterations=0, max_iterations=3, checkpoint_every=1)
        whole = train(recipe, root, tmp_path / "whole")
        rates = [row["learning_rate"] for row in whole.metrics if "learning_rate" in row]
        assert rates == pytest.approx([1e-3, 1e-4, 1e-5])
        with pytest.raises(RuntimeError, match="power cut"):
            train(recipe, root, tmp_path / "run", callbacks=[StopAt(2, RuntimeError("power cut"))])
        assert_same_run(train(recipe, root, tmp_path / "run"), whole)

    @pytest.mark.parametrize("changes", [dict(step_at=(5, 5)), dict(step_at=(7, 5)), dict(step_at=(0, 5)),
                                         dict(step_at=(5,), step_factor=0.0)])  # fmt: skip
    def test_impossible_ones_are_refused(self, changes):
        with pytest.raises(ValueError, match=r"rising positive iterations|in \(0, 1\]"):
            OptimizationConfig(max_iterations=10, **changes)


class TestInference:
    def test_options_are_taken_by_the_functions_of_their_task(self):
        config = EvaluationConfig()
        for task, function in (
            ("semantic", postprocess.semantic), ("panoptic", postprocess.panoptic), ("instance", postprocess.instance)
        ):  # fmt: skip
            taken = inspect.signature(function).parameters
            options = config.options(task)
            assert options == {name: taken[name].default for name in options}  # the published ones are the defaults
            if task != "semantic":
                assert set(options) <= set(PREDICT_OPTIONS[task])
        assert postprocess.ORDERS == recipes.SEMANTIC_ORDERS

    def test_options_follow_the_fields(self):
        config = EvaluationConfig(
            semantic_order="resize_first", object_mask_threshold=0.1, overlap_threshold=0.2, top_k=3
        )
        assert config.options("semantic") == {"order": "resize_first"}
        assert config.options("panoptic") == {"object_mask_threshold": 0.1, "overlap_threshold": 0.2}
        assert config.options("instance") == {"top_k": 3}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(semantic_order="first"), "semantic_order must be one of .*, got 'first'"),
            (dict(object_mask_threshold=80), "object_mask_threshold is a share"),
            (dict(overlap_threshold=-0.1), "overlap_threshold is a share"),
            (dict(top_k=0), "top_k must be positive"),
            (dict(longest_edge=-1), "longest_edge must be positive"),
            (dict(multi_scale_edges=(0, 1)), "multi_scale_edges are pixels"),
        ],
    )
    def test_impossible_values_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            EvaluationConfig(**changes)

    def test_training_needs_sizes_or_scales(self):
        with pytest.raises(ValueError, match="shortest_edges must name"):
            DataConfig(dataset="coco", crop_size=(8, 8))
        with pytest.raises(ValueError, match="two positive scales"):
            DataConfig(dataset="coco", crop_size=(8, 8), scale_range=(2.0, 0.1))


class TestOlderFiles:
    """`recipes.ade20k_swin_tiny()` as it was saved before there were steps, thresholds and kinds of batch norm."""

    def test_load(self):
        recipe = Recipe.load(BEFORE)
        assert recipe.optimization == recipes.ade20k_swin_tiny().optimization
        assert recipe.model == settled(recipes.ade20k_swin_tiny().model)
        assert recipe.evaluation.options("panoptic") == {"object_mask_threshold": 0.8, "overlap_threshold": 0.8}

    def test_continue(self, tmp_path):
        (tmp_path / "recipe.json").write_bytes(BEFORE.read_bytes())
        (tmp_path / "checkpoints" / "last").mkdir(parents=True)
        open_run(tmp_path, recipes.ade20k_swin_tiny(), "must")  # raises where a field differs that reaches the weights
        assert Recipe.load(tmp_path / "recipe.json") == recipes.ade20k_swin_tiny()
        with pytest.raises(ValueError, match=r"model\.batch_norm: frozen there, trained here"):
            open_run(tmp_path, recipes.ade20k_swin_tiny().vary(model=dict(batch_norm="trained")), "must")
