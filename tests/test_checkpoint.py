"""Checkpoints: complete or absent at every moment, exact, and nothing in them that could run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f_lab.data import Classes
from m2f_lab.model import build_model
from m2f_lab.training import checkpoint
from m2f_lab.training.checkpoint import Progress, recover_folder, replace_folder
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.weights import load_model, load_weights
from tests.toy_training import all_tensors, assert_same_tensors, toy_recipe

RECIPE = toy_recipe()


def no_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


def trained(memory_format: torch.memory_format = torch.contiguous_format, seed: int = 0):
    """A model and an optimiser with two steps behind them."""
    torch.manual_seed(seed)
    model = build_model(RECIPE.model).to(memory_format=memory_format)
    model.classes = Classes(("ground", "box", "ball"), ((0, 0, 0), (9, 9, 9), (99, 99, 99)), frozenset({2}))
    optimizer = build_optimizer(model, RECIPE.optimization)
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.sin(parameter.detach() * 50 + i)
    optimizer.step()


class TestRoundTrip:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_continues_exactly(self, tmp_path, memory_format):
        model, optimizer = trained(memory_format)
        progress = Progress(2, seconds=1.5, num_rows=3, evaluated=2, best={"iteration": 2, "mIoU": 1 / 3})
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), progress)

        other, other_optimizer = trained(memory_format, seed=1)
        assert checkpoint.load(tmp_path / "last", other, other_optimizer, no_scaler()) == progress
        step(model, optimizer)
        step(other, other_optimizer)
        assert_same_tensors(dict(model.state_dict()), dict(other.state_dict()))

    def test_optimiser_state_has_the_memory_format_of_its_parameter(self, tmp_path):
        """The fused optimiser walks through memory: another order would update the wrong weights, or raise."""
        model, optimizer = trained(torch.channels_last)
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress())
        other, other_optimizer = trained(torch.channels_last, seed=1)
        checkpoint.load(tmp_path / "last", other, other_optimizer, no_scaler())
        assert any(not p.is_contiguous() for p in other.parameters())
        for parameter in other.parameters():
            assert other_optimizer.state[parameter]["exp_avg"].stride() == parameter.stride()

    def test_scaler(self, tmp_path):
        model, optimizer = trained()
        scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
        scaler.scale(torch.zeros(()))  # it starts with its first use
        checkpoint.save(tmp_path / "last", model, optimizer, scaler, Progress())
        other = torch.amp.GradScaler("cpu", init_scale=4.0)
        checkpoint.load(tmp_path / "last", model, optimizer, other)
        assert other.get_scale() == 32.0

    def test_load_weights_knows_it(self, tmp_path):
        model, optimizer = trained()
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress())
        other = build_model(RECIPE.model)
        assert load_weights(other, tmp_path / "last").format == "m2f_lab"
        assert_same_tensors(dict(other.state_dict()), dict(model.state_dict()))
        assert load_model(tmp_path / "last").classes == model.classes

    def test_checkpoint_holds_only_numbers_and_text(self, tmp_path):
        model, optimizer = trained()
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress())
        names = sorted(path.name for path in (tmp_path / "last").iterdir())
        assert names == ["config.json", "model.safetensors", "training.json", "training.safetensors"]
        assert json.loads((tmp_path / "last" / "training.json").read_text())["progress"]["iteration"] == 0
        state = load_file(tmp_path / "last" / "training.safetensors")
        assert state["step.transformer_decoder.query_features"] == 2
        assert state["exp_avg.transformer_decoder.query_features"].shape == (6, 32)

    def test_state_of_an_unknown_parameter(self, tmp_path):
        model, optimizer = trained()
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress())
        file = tmp_path / "last" / "training.safetensors"
        save_file(load_file(file) | {"exp_avg.old.weight": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=r"training.safetensors holds the optimiser's state of 'old.weight'"):
            checkpoint.load(tmp_path / "last", model, optimizer, no_scaler())


class Killed(BaseException):
    """The process dies here."""


def write(content: str):
    def into(folder: Path) -> None:
        (folder / "a").write_text(content)
        (folder / "b").write_text(content)

    return into


def content(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in ("a", "b")}


class TestReplaceFolder:
    def test_replaces(self, tmp_path):
        folder = tmp_path / "deep" / "last"
        replace_folder(folder, write("old"))
        replace_folder(folder, write("new"))
        assert content(folder) == {"new"}
        assert [path.name for path in folder.parent.iterdir()] == ["last"]

    @pytest.mark.parametrize("there", [False, True])
    def test_replace_folder_survives_a_kill_at_any_moment(self, tmp_path, monkeypatch, there):
        """Before and after every call that changes the disk: what is found is complete, and the next write works."""
        kills = 0
        for moment in range(100):
            folder = tmp_path / str(moment) / "last"
            if there:
                replace_folder(folder, write("old"))
            calls = iter(range(1000))

            def dying(function, calls=calls, moment=moment):
                def call(*arguments, **options):
                    if next(calls) == moment:
                        raise Killed
                    result = function(*arguments, **options)
                    if next(calls) == moment:
                        raise Killed
                    return result

                return call

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", dying(os.replace))
                patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
                patch.setattr(Path, "mkdir", dying(Path.mkdir))
                patch.setattr(Path, "write_text", dying(Path.write_text))
                try:
                    replace_folder(folder, write("new"))
                except Killed:
                    kills += 1
                else:
                    break
            is_there = recover_folder(folder)
            assert is_there == folder.exists()
            assert is_there or not there
            if is_there:
                assert content(folder) in ({"old"}, {"new"})
            assert [path.name for path in folder.parent.glob("*")] == ["last"] * is_there
            replace_folder(folder, write("next"))
            assert content(folder) == {"next"}
        assert kills >= 10

    def test_an_error_while_writing_leaves_the_old_one(self, tmp_path):
        replace_folder(tmp_path / "last", write("old"))

        def full(folder: Path) -> None:
            (folder / "a").write_text("new")
            raise OSError("No space left on device")

        with pytest.raises(OSError, match="No space"):
            replace_folder(tmp_path / "last", full)
        assert content(tmp_path / "last") == {"old"}

    def test_the_first_write_cut_short_leaves_nothing(self, tmp_path):
        (tmp_path / "last.new").mkdir()
        (tmp_path / "last.new" / "a").write_text("half")
        assert not recover_folder(tmp_path / "last")
        assert list(tmp_path.iterdir()) == []


def test_save_keeps_the_old_checkpoint_until_the_new_one_is_whole(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress(iteration=1))
    before = all_tensors(tmp_path / "last")
    step(model, optimizer)

    def dying(*arguments):
        raise Killed

    monkeypatch.setattr(checkpoint, "save_file", dying)  # after the weights, before the optimiser
    with pytest.raises(Killed):
        checkpoint.save(tmp_path / "last", model, optimizer, no_scaler(), Progress(iteration=2))
    assert recover_folder(tmp_path / "last")
    assert_same_tensors(all_tensors(tmp_path / "last"), before)
    assert json.loads((tmp_path / "last" / "training.json").read_text())["progress"]["iteration"] == 1
