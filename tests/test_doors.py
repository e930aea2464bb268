"""The doors: a model, a loss term and a data set of one's own, from a file outside the package, all the way.

Only public names are used, as a user would.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from m2f_lab import (
    Run,
    build_model,
    evaluate,
    load_model,
    load_weights,
    open_dataset,
    predict,
    save_pretrained,
    save_weights,
    train,
)
from m2f_lab import __main__ as cli
from m2f_lab.data import Classes, Sample
from m2f_lab.loss import Criterion, sees_output
from m2f_lab.structures import Target
from m2f_lab.training import ablations, plan
from tests.toy_output import toy_output
from tests.toy_training import (
    CLASSES,
    StopAt,
    assert_same_run,
    assert_same_tensors,
    toy_recipe,
    write_toy_data,
)

REPOSITORY = Path(__file__).parents[1]

# A user's file. No part of the model comes from the library, and the library knows none of its parameters' names.
OWN_FILE = '''
"""Crayons: a model of tokens and two convolutions, with a loss term of its own."""

import os
import signal

import torch
from torch import nn

from m2f_lab import Criterion, ModelConfig, Output, Recipe, open_dataset, recipes
from m2f_lab.loss import build_criterion
from m2f_lab.structures import MaskLogits


class Crayons(nn.Module):
    """Two predictions, each with mask features of its own."""

    def __init__(self, config):
        super().__init__()
        width = config.mask_dim
        self.coarse = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        self.fine = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
        self.crayon = nn.Parameter(torch.randn(config.num_queries, width))
        self.hue = nn.Linear(width, config.num_classes + 1)
        self.calls = 0

    def forward(self, images):
        self.calls += self.training
        if self.calls == int(os.environ.get("CRAYONS_DIE_IN_STEP", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        first = self.coarse(images.float() / 255 - 0.5)
        second = self.fine(first)
        masks, logits = [], []
        for features in (first, second):
            crayons = self.crayon + torch.tanh(features.mean(dim=(2, 3)))[:, None]
            masks.append(MaskLogits(crayons, features))
            logits.append(self.hue(crayons))
        size = tuple(images.shape[2:])
        return Output(class_logits=logits, masks=masks, image_size=size, padded_size=size)


def build(config: ModelConfig) -> nn.Module:
    return Crayons(config)


def build_wider(config: ModelConfig) -> nn.Module:
    return nn.ModuleDict({"other": nn.Linear(2, 2)})


def area(logits, truth):
    """Squared difference of the areas. [M, P], [M, P] → [M]"""
    return (logits.sigmoid().mean(1) - truth.mean(1)) ** 2


def with_area(recipe: Recipe) -> Criterion:
    paper = build_criterion(recipe)
    return Criterion(
        recipe.model.num_classes,
        terms={**paper.terms, "area": area},
        weights={**paper.weights, "area": 3.0},
        num_points=recipe.loss.num_points,
    )


def own_data(root, split):
    return open_dataset("folder", root, split)


def recipe() -> Recipe:
    return recipes.debug_tiny(num_classes=3, dataset="folder").vary(
        name="crayons",
        model=dict(mask_dim=32, num_queries=6),
        data=dict(dataset="own_file:own_data", crop_size=(64, 96), shortest_edges=(64, 80), longest_edge=200),
        loss=dict(num_points=64),
        optimization=dict(max_iterations=20, batch_size=2, log_every=1, evaluate_every=10, checkpoint_every=4),
    )
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the user's file and data."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_file.py").write_text(OWN_FILE)
    write_toy_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def own(folder):
    """The user's file, imported as a notebook beside it would."""
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("own_file")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("own_file", None)


@pytest.fixture(scope="module")
def crayons(own, folder, tmp_path_factory) -> Run:
    """A run of 20 steps that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(own.recipe(), folder / "data", out, build=own.build, criterion=own.with_area)


def command(*arguments, **environment: str) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    threads = str(torch.get_num_threads())
    return subprocess.run(
        [sys.executable, "-m", "m2f_lab", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | environment,
    )  # fmt: skip


class TestOwnModel:
    def test_trains_with_a_term_of_its_own(self, crayons):
        assert crayons.finished
        assert {"1.area", "0.mask", "1.class"} <= set(crayons.steps[0])
        assert not any(name.startswith("2.") for name in crayons.steps[0])
        assert crayons.steps[-1]["loss"] < crayons.steps[0]["loss"]
        assert (crayons.recipe.builder, crayons.recipe.criterion) == ("own_file:build", "own_file:with_area")

    def test_killed_on_the_command_line_it_resumes_bit_identically(self, crayons, own, folder, tmp_path):
        """SIGKILL in the middle of step 11: the run goes on from the checkpoint of step 8."""
        file, run = folder / "own_file.py", Run(tmp_path / "run")
        done = command(
            "train", "--recipe", f"{file}:recipe", "--build", f"{file}:build", "--criterion", f"{file}:with_area",
            "--data-root", folder / "data", "--out", run.path, CRAYONS_DIE_IN_STEP="11",
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert run.iteration == 8
        train(own.recipe(), folder / "data", run.path, build=own.build, criterion=own.with_area)
        assert_same_run(run, crayons)

    def test_reopens_and_evaluates(self, crayons, own, folder):
        model = crayons.model("last")
        assert isinstance(model, own.Crayons)
        assert model.classes.names == CLASSES
        expected = {k: v for k, v in crayons.last.items() if k not in ("kind", "iteration")}
        assert evaluate(model, crayons.recipe, folder / "data") == expected
        assert evaluate(model, crayons.recipe, open_dataset("folder", folder / "data", "val")) == expected
        assert predict(model, np.zeros((64, 96, 3), np.uint8)).label_map.shape == (64, 96)

    def test_opens_in_an_explorer(self, crayons, folder):
        from m2f_lab.explore import QueryExplorer

        explorer = QueryExplorer(crayons.model(), folder / "data" / "images" / "validation" / "validation_0.png")
        assert explorer.trace.masks.shape[:2] == (2, 6)
        explorer.close()

    def test_reopens_elsewhere_only_when_its_code_is_there(self, crayons, folder):
        """No code is imported because a checkpoint names it, even where it could be."""
        script = (
            "import sys; sys.path.insert(0, sys.argv[2])\n"
            "from m2f_lab import Run\n"
            "try: Run(sys.argv[1]).model()\n"
            "except ValueError as error: print(error)\n"
            "assert 'own_file' not in sys.modules\n"
            "import own_file\n"
            "print(type(Run(sys.argv[1]).model()).__name__)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(crayons.path), str(folder)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        refused, name = done.stdout.splitlines()
        assert "was built by 'own_file:build'" in refused, done.stderr
        assert "pass the function: build=build" in refused
        assert name == "Crayons"

    def test_command_line_evaluates(self, crayons, folder):
        file = folder / "own_file.py"
        done = command("evaluate", crayons.path, "--build", f"{file}:build", "--data-root", folder / "data")
        assert f"mIoU       {crayons.best['mIoU']:6.2f}" in done.stdout, done.stderr


class TestResume:
    def test_refuses_another_builder_or_criterion_by_both_names(self, crayons, own, folder):
        with pytest.raises(ValueError, match=r"own_file:with_area there, m2f_lab\.loss:build_criterion here") as error:
            train(own.recipe(), folder / "data", crayons.path)
        assert "builder: own_file:build there, m2f_lab.model:build_model here" in str(error.value)

    def test_refuses_other_terms_of_the_same_criterion(self, crayons, own, folder, tmp_path, monkeypatch):
        shutil.copytree(crayons.path, tmp_path / "run")
        monkeypatch.setattr(own.Criterion, "term_names", property(lambda self: ("class", "mask")))
        with pytest.raises(
            ValueError, match=r"loss terms class, mask, dice, area; own_file:with_area now gives class, m"
        ):
            train(own.recipe(), folder / "data", tmp_path / "run", build=own.build, criterion=own.with_area)

    def test_folders_written_before_there_were_builders(self, folder, tmp_path):
        """Neither recipe.json nor config.json named a builder, and no checkpoint its terms."""
        recipe = toy_recipe(max_iterations=2, checkpoint_every=1, evaluate_every=2)
        new, old = tmp_path / "new", tmp_path / "old"
        with pytest.raises(RuntimeError):  # after the checkpoint of step 1
            train(recipe, folder / "data", new, callbacks=[StopAt(2, RuntimeError())])
        shutil.copytree(new, old)
        without(old / "recipe.json", "builder", "criterion")
        without(old / "checkpoints" / "last" / "config.json", "version", "builder")
        without(old / "checkpoints" / "last" / "training.json", "terms", within="progress")
        assert Run(old).recipe == recipe
        assert Run(old).model("last").builder == "m2f_lab.model:build_model"
        resumed = train(recipe, folder / "data", old, resume="must", build=build_model)
        assert_same_run(resumed, train(recipe, folder / "data", new, resume="must"))


def without(file: Path, *names: str, within: str | None = None) -> None:
    """Take fields out of a JSON file."""
    content = json.loads(file.read_text())
    for name in names:
        del (content[within] if within else content)[name]
    file.write_text(json.dumps(content))


class TestBuild:
    def test_what_cannot_be_found_again_is_refused(self, folder, tmp_path):
        with pytest.raises(ValueError, match="cannot be found again by name"):
            train(toy_recipe(), folder / "data", tmp_path / "run", build=lambda config: build_model(config))
        assert not (tmp_path / "run").exists()

    def test_a_builder_returns_a_module(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"returned a NoneType; a builder returns a torch\.nn\.Module"):
            train(toy_recipe(), folder / "data", tmp_path / "run", build=builds_nothing)

    def test_checkpointed_backbone_needs_one_that_can(self, own, folder, tmp_path):
        recipe = own.recipe().vary(optimization=dict(checkpoint_backbone=True))
        with pytest.raises(
            ValueError, match=r"backbone\.recompute\(\), but the Crayons that own_file:build builds has"
        ):
            train(recipe, folder / "data", tmp_path / "run", build=own.build)

    def test_plan_refuses_what_other_processes_cannot_import(self):
        with pytest.raises(ValueError, match="cannot import '__main__:build'; move it to a file"):
            plan(toy_recipe().vary(builder="__main__:build"), "cpu", available=8)


def builds_nothing(config):
    return None


class Drawn:
    """A data set that is no file: squares, drawn when they are asked for."""

    classes = Classes(CLASSES, ((0, 0, 0), (9, 9, 9), (99, 99, 99)))

    def __init__(self, count: int) -> None:
        self.count = count

    def __str__(self) -> str:
        return f"{self.count} drawn squares"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        label = np.zeros((64, 96), np.uint8)
        label[8 : 24 + index, 30:70] = 1 + index % 2
        return Sample(f"square {index}", np.stack([90 * label] * 3, axis=2), label)


class TestData:
    def test_data_sets_as_objects(self, own, tmp_path):
        recipe = own.recipe().vary(optimization=dict(max_iterations=2, evaluate_every=2))
        run = train(recipe, {"train": Drawn(4), "val": Drawn(2)}, tmp_path / "run", build=own.build)
        assert run.last["num_images"] == 2
        assert run.model().classes == Drawn.classes

    @pytest.mark.parametrize("data", [None, {"train": Drawn(1)}, Drawn(1)])
    def test_other_objects_are_refused(self, data, tmp_path):
        with pytest.raises(ValueError, match=r'must be a folder or \{"train": Dataset, "val": Dataset\}'):
            train(toy_recipe(), data, tmp_path / "run")

    def test_a_data_set_is_a_split_already(self, crayons, own):
        with pytest.raises(ValueError, match=r"split='train' belongs to a folder; a data set \(2 drawn squares\)"):
            evaluate(crayons.model(), crayons.recipe, Drawn(2), split="train")

    def test_another_number_of_classes_names_the_data_set(self, own, tmp_path):
        recipe = own.recipe().vary(model=dict(num_classes=4))
        with pytest.raises(ValueError, match="data set 4 drawn squares has 3 classes"):
            train(recipe, {"train": Drawn(4), "val": Drawn(2)}, tmp_path / "run", build=own.build)

    def test_reader_by_name(self, own, folder):
        assert len(open_dataset("own_file:own_data", folder / "data", "train")) == 6

    def test_audit_on_the_command_line(self, folder, own, capsys):
        arguments = ["audit", f"{folder / 'own_file.py'}:own_data", "--data-root", str(folder / "data")]
        assert cli.main(arguments) == 0
        assert "box" in capsys.readouterr().out


class TestWeights:
    def test_any_module_with_a_config_round_trips(self, own, tmp_path):
        model = own.build(own.recipe().model)
        save_pretrained(model, tmp_path)
        with pytest.raises(ValueError, match="saved without a ModelConfig"):
            load_model(tmp_path)
        model.config = own.recipe().model
        save_weights(model, tmp_path)
        with pytest.raises(ValueError, match=r"does not name the builder .* load_model\(folder, build=…\)"):
            load_model(tmp_path)
        other = load_model(tmp_path, build=own.build)
        assert_same_tensors(dict(other.state_dict()), dict(model.state_dict()))
        assert other.builder == "own_file:build"
        assert json.loads((save_weights(other, tmp_path) / "config.json").read_text())["builder"] == "own_file:build"
        assert isinstance(load_model(tmp_path), own.Crayons)

    def test_bare_file_is_recognised_by_the_names_of_the_model(self, own, tmp_path):
        model, other = own.build(own.recipe().model), own.build(own.recipe().model)
        save_weights(model, tmp_path)
        (tmp_path / "config.json").unlink()
        assert load_weights(other, tmp_path / "model.safetensors").format == "m2f_lab"
        assert_same_tensors(dict(other.state_dict()), dict(model.state_dict()))

    def test_tied_weights_are_saved(self, tmp_path):
        model = torch.nn.Module()
        model.one = model.two = torch.nn.Linear(2, 2)
        save_weights(model, tmp_path)
        other = torch.nn.Module()
        other.one = other.two = torch.nn.Linear(2, 2)
        load_weights(other, tmp_path)
        assert torch.equal(other.two.weight, model.one.weight)

    def test_mismatch_of_unknown_names_gives_no_advice_on_ModelConfig(self, own, tmp_path):
        save_weights(own.build(own.recipe().model), tmp_path)
        wider = own.build(own.recipe().vary(model=dict(mask_dim=64)).model)
        with pytest.raises(ValueError, match=r"crayon is \[6, 64\] in the model and \[6, 32\]") as error:
            load_weights(wider, tmp_path)
        assert "built like this one?" in str(error.value)
        with pytest.raises(ValueError, match="does not fit the model"):
            load_weights(own.build_wider(None), tmp_path)

    def test_weights_of_another_builder_are_reported(self, own, tmp_path):
        model = build_model(toy_recipe().model)
        model.builder = "own_file:build"
        save_weights(model, tmp_path)
        report = str(load_weights(build_model(toy_recipe().model), tmp_path))
        assert "builder    own_file:build in the checkpoint, m2f_lab.model:build_model here" in report


class TestCommandLine:
    def test_recipes_from_files(self, folder, tmp_path, own):
        own.recipe().save(tmp_path / "recipe.json")
        assert cli.recipe_from_file(str(tmp_path / "recipe.json")) == own.recipe()
        assert cli.recipe_from_file(f"{folder / 'own_file.py'}:recipe") == own.recipe()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["debug_tiny", "--recipe", "a.json"], "Name one recipe"),
            ([], "Name a recipe"),
            (["--recipe", "nowhere.py:recipe"], "no file nowhere.py"),
            (["--recipe", "recipe"], "no recipe called 'recipe'"),
            (["--recipe", "m2f_lab.recipes:EvaluationConfig"], "returned a EvaluationConfig, expected a Recipe"),
            (["debug_tiny", "--build", "no_such_module:build"], "There is no module 'no_such_module'"),
            (["debug_tiny", "--build", "shutil:rmtree"], "Python's standard library"),
            (["debug_tiny", "--criterion", "m2f_lab.loss:nothing"], "has no 'nothing'"),
        ],
    )
    def test_mistakes_are_a_sentence(self, arguments, message, capsys):
        assert cli.main(["train", *arguments, "--data-root", "x", "--out", "y"]) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert "Traceback" not in printed


class TestMistakes:
    """Changes that would train or predict something else, or fail as a riddle."""

    def test_another_builder_of_the_same_parameters_is_refused(self, tmp_path):
        run = train(toy_recipe(max_iterations=1), write_toy_data(tmp_path / "data"), tmp_path / "run")
        with pytest.raises(ValueError, match=r"built by 'm2f_lab.model:build_model', not by 'no_masked_attention'"):
            run.model("last", build=ablations.no_masked_attention)

    @pytest.mark.parametrize(
        ("term", "expected"),
        [
            (lambda logits, truth: logits.mean(), r"'odd' returned a tensor of shape \(\), not \(\d+,\): one per pair"),
            (lambda logits, truth: logits, r"'odd' returned .* sees_output"),
            (sees_output(lambda output, targets, matching: output.class_logits[0].sum()[None]), "of each prediction"),
        ],
    )
    def test_term_of_another_shape_is_named(self, term, expected):
        criterion = Criterion(3, terms={"odd": term}, weights={"mask": 1.0, "dice": 1.0, "odd": 1.0}, num_points=16)
        target = Target.from_label_map(torch.arange(3, dtype=torch.uint8).repeat_interleave(32)[:, None].expand(96, 64))
        with pytest.raises(ValueError, match=expected):
            criterion(toy_output((96, 64), num_classes=3), [target])

    def test_forward_without_an_output_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"build_tensor built a model whose forward returns a Tensor"):
            train(toy_recipe(), write_toy_data(tmp_path / "data"), tmp_path / "run", build=build_tensor)

    def test_criterion_of_another_kind_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"no_criterion returned a int"):
            train(toy_recipe(), write_toy_data(tmp_path / "data"), tmp_path / "run", criterion=no_criterion)


class Tensorial(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.float() * self.weight


def build_tensor(config):
    return Tensorial()


def no_criterion(recipe):
    return 7


def test_evaluating_a_strangers_run_imports_nothing(tmp_path, monkeypatch):
    run = train(toy_recipe(max_iterations=1), write_toy_data(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "evil_reader.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = run.recipe.vary(data=dict(dataset="evil_reader:read"))
    with pytest.raises(ValueError, match="is not imported, and no code named in a file is imported by itself"):
        evaluate(run.model("last"), recipe, tmp_path / "data")
    recipe.save(run.path / "recipe.json")
    assert cli.main(["evaluate", str(run.path), "--data-root", str(tmp_path / "data")]) != 0
    assert "evil_reader" not in sys.modules
