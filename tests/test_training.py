"""The training loop: what a run leaves behind, how it repeats, and what it says when something is wrong."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

import m2f_lab.training.loop as loop
from m2f_lab import recipes
from m2f_lab.data import DataError, open_dataset
from m2f_lab.evaluation import evaluate, format_table
from m2f_lab.scenes import write_cityscapes
from m2f_lab.training import ProgressBar, Run, train
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.run import append_row
from m2f_lab.training.step import TrainStep, seed_everything
from tests.toy_training import (
    Recorder,
    StopAt,
    all_tensors,
    assert_same_run,
    assert_same_tensors,
    timeless,
    toy_recipe,
    write_toy_data,
)

CPU = torch.device("cpu")


class TestRun:
    def test_metrics_hold_steps_and_evaluations_in_order(self, whole):
        assert [row["iteration"] for row in whole.steps] == [1, 2, 3, 4, 5, 6]
        assert [row["iteration"] for row in whole.evaluations] == [3, 6]
        kinds = [row["kind"] for row in whole.metrics]
        assert kinds == ["step"] * 3 + ["evaluation"] + ["step"] * 3 + ["evaluation"]
        terms = {f"{i}.{name}" for i in range(3) for name in ("class", "mask", "dice")}
        figures = {"loss", "learning_rate", "gradient_norm", "images_per_second", "seconds", "memory_gib"}
        for row in whole.steps:
            assert set(row) == {"kind", "iteration"} | terms | figures
            assert row["loss"] == pytest.approx(
                sum(row[t] * (2 if t.endswith("class") else 5) for t in terms), rel=1e-5
            )
            assert 0 < row["memory_gib"] < 50
            assert row["images_per_second"] > 0

    def test_metrics_are_strict_json(self, whole):
        for line in (whole.path / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON

    def test_learning_rate_follows_the_schedule(self, whole):
        rates = [row["learning_rate"] for row in whole.steps]  # warm-up over 20 steps, in a run of 6
        assert rates == pytest.approx([1e-3 * (i + 1) / 20 * (1 - i / 6) ** 0.9 for i in range(6)])

    def test_best_and_last_are_evaluations(self, whole):
        assert whole.last == whole.evaluations[-1]
        assert whole.best["mIoU"] == max(row["mIoU"] for row in whole.evaluations)

    def test_best_ignores_evaluations_without_a_figure(self, tmp_path):
        append_row(tmp_path / "metrics.jsonl", {"kind": "evaluation", "iteration": 1, "mIoU": None})
        assert Run(tmp_path).best is None
        append_row(tmp_path / "metrics.jsonl", {"kind": "evaluation", "iteration": 2, "mIoU": 3.0})
        append_row(tmp_path / "metrics.jsonl", {"kind": "evaluation", "iteration": 3, "mIoU": None})
        assert Run(tmp_path).best["iteration"] == 2

    def test_best_weights_are_those_of_the_best_evaluation(self, root, tmp_path, monkeypatch):
        """The first of equals; and not those of a later, worse one."""
        figures, weights = iter([10.0, 30.0, 20.0, 30.0]), []

        def fake_evaluate(model, *arguments, **options):
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
            return {"mIoU": next(figures)}

        monkeypatch.setattr(loop, "evaluate", fake_evaluate)
        run = train(toy_recipe(max_iterations=4, evaluate_every=1), root, tmp_path / "run")
        assert (run.best["iteration"], run.best["mIoU"], run.last["mIoU"]) == (2, 30.0, 30.0)
        assert_same_tensors(dict(run.model("best").state_dict()), weights[1])
        assert_same_tensors(dict(run.model("last").state_dict()), weights[3])

    def test_repr_names_recipe_and_iterations(self, whole):
        assert repr(whole) == "Run(toy, 6 of 6 iterations)"
        assert whole.finished

    def test_model_has_the_trained_weights(self, whole, root):
        model = whole.model("last")
        assert not model.training
        assert model.classes.names == ("ground", "box", "ball")
        assert evaluate(model, whole.recipe, root) == {
            k: v for k, v in whole.last.items() if k not in ("kind", "iteration")
        }

    def test_recipe_is_read_back(self, whole):
        assert whole.recipe == toy_recipe()

    def test_log_every_thins_out_rows_but_not_callbacks(self, root, tmp_path):
        recorder = Recorder()
        run = train(toy_recipe(max_iterations=5, log_every=2, evaluate_every=100), root, tmp_path / "run", [recorder])
        assert [row["iteration"] for row in run.steps] == [2, 4, 5]
        assert [row["iteration"] for row in recorder.rows] == [1, 2, 3, 4, 5]
        assert run.steps == [recorder.rows[i] for i in (1, 3, 4)]

    def test_run_refuses_other_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is not a run: there is no .*recipe.json"):
            _ = Run(tmp_path).recipe
        with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
            Run(tmp_path).model()
        with pytest.raises(ValueError, match='"best" or "last"'):
            Run(tmp_path).model("first")


class TestDeterminism:
    def test_the_same_seed_gives_the_same_run(self, root, whole, tmp_path):
        torch.rand(3)  # whatever was drawn before
        np.random.rand()
        assert_same_run(train(toy_recipe(), root, tmp_path / "again"), whole)

    def test_another_seed_gives_another(self, root, whole, tmp_path):
        other = train(toy_recipe(max_iterations=1).vary(seed=1), root, tmp_path / "other")
        assert other.steps[0]["loss"] != whole.steps[0]["loss"]

    def test_number_of_workers_does_not_change_the_run(self, root, whole, tmp_path):
        run = train(toy_recipe().vary(data=dict(num_workers=2)), root, tmp_path / "workers")
        assert timeless(run.metrics) == timeless(whole.metrics)

    def test_callbacks_and_evaluations_do_not_change_the_steps(self, root, whole, tmp_path):
        """Neither a callback that draws random numbers nor another rhythm of evaluation."""

        class Drawing(Recorder):
            def on_step(self, row: dict) -> None:
                torch.rand(5), np.random.rand(5), random.random()

        recipe = toy_recipe(evaluate_every=1, checkpoint_every=6)
        run = train(recipe, root, tmp_path / "run", callbacks=[Drawing()])
        assert timeless(run.steps) == timeless(whole.steps)
        assert_same_tensors(all_tensors(run.checkpoint("last")), all_tensors(whole.checkpoint("last")))

    def test_seed_everything(self):
        def draw() -> tuple:
            return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

        seed_everything(3, 0, 1)
        first = draw()
        seed_everything(3, 1, 0)
        assert all(a != b for a, b in zip(first, draw(), strict=True))
        seed_everything(3, 0, 1)
        assert first == draw()


class TestCallbacks:
    def test_order(self, root, tmp_path):
        recorder = Recorder()
        train(toy_recipe(max_iterations=4), root, tmp_path / "run", callbacks=[recorder])
        assert recorder.events == [
            ("start", 0), ("step", 1), ("step", 2), ("step", 3), ("evaluation", 3), ("step", 4), ("evaluation", 4),
            ("end", 4),
        ]  # fmt: skip

    def test_callbacks_find_their_rows_on_disk(self, root, tmp_path):
        test = self

        class Reader(Recorder):
            def on_start(self, run: Run) -> None:
                test.run = run

            def on_step(self, row: dict) -> None:
                assert test.run.metrics[-1] == row

            def on_evaluation(self, row: dict) -> None:
                assert test.run.last == row
                assert test.run.model("best") is not None

            def on_end(self, run: Run) -> None:
                assert run.finished

        train(toy_recipe(max_iterations=2, evaluate_every=1), root, tmp_path / "run", callbacks=[Reader()])

    def test_progress_bar(self, root, tmp_path, capsys):
        train(toy_recipe(max_iterations=3), root, tmp_path / "run", callbacks=[ProgressBar()])
        printed = capsys.readouterr()
        assert "3/3" in printed.err
        assert "mIoU" in printed.err
        line = printed.out.strip()
        assert line.startswith("toy: 3 of 3 iterations in 0 min 0")
        assert "best mIoU" in line
        assert str(tmp_path / "run") in line

    def test_progress_bar_continues_with_the_run(self, root, tmp_path, capsys):
        stop = StopAt(2, KeyboardInterrupt())
        train(toy_recipe(max_iterations=3), root, tmp_path / "run", callbacks=[ProgressBar(), stop])
        assert "2 of 3 iterations" in capsys.readouterr().out.splitlines()[-1]
        train(toy_recipe(max_iterations=3), root, tmp_path / "run", callbacks=[ProgressBar()])
        assert "2/3" in capsys.readouterr().err.split("\r")[1]


class TestErrors:
    def test_non_finite_loss_names_iteration_and_images(self, root, tmp_path, monkeypatch):
        """The checkpoint before it stays."""
        step = TrainStep.step

        def poisoned(self, batch, iteration):
            if iteration == 3:
                with torch.no_grad():
                    self.model.transformer_decoder.class_head.weight.fill_(torch.nan)
            return step(self, batch, iteration)

        monkeypatch.setattr(TrainStep, "step", poisoned)
        with pytest.raises(FloatingPointError, match=r"Iteration 3, images 0 = training_\d, 1 = training_\d.*class"):
            train(toy_recipe(), root, tmp_path / "run")
        assert Run(tmp_path / "run").iteration == 2
        weights = all_tensors(Run(tmp_path / "run").checkpoint("last"))
        assert all(torch.isfinite(value).all() for value in weights.values())

    def test_missing_validation_data_raise_before_the_first_step(self, tmp_path):
        root = write_toy_data(tmp_path / "data")
        shutil.rmtree(root / "images" / "validation")
        with pytest.raises(DataError, match=r"no folder .*validation"):
            train(toy_recipe(), root, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_failed_evaluation_keeps_the_steps(self, root, tmp_path, monkeypatch):
        def unreadable(*arguments, **options):
            raise DataError("7.png cannot be read")

        monkeypatch.setattr(loop, "evaluate", unreadable)
        with pytest.raises(DataError, match=r"7\.png"):
            train(toy_recipe(), root, tmp_path / "run")
        assert Run(tmp_path / "run").iteration == 3
        monkeypatch.undo()
        run = train(toy_recipe(), root, tmp_path / "run")
        assert [row["iteration"] for row in run.evaluations] == [3, 6]

    def test_home_folder_is_expanded(self, root, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert train(toy_recipe(max_iterations=1), root, "~/run").path == tmp_path / "run"

    def test_another_number_of_classes_is_refused(self, root, tmp_path):
        with pytest.raises(ValueError, match=r"has 3 classes.*vary\(model=dict\(num_classes=3\)\)"):
            train(toy_recipe().vary(model=dict(num_classes=4)), root, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_batch_that_processes_cannot_share_is_refused(self, root, tmp_path, monkeypatch):
        dataset = open_dataset("folder", root, "train")
        with pytest.raises(ValueError, match=r"batch of 6 images cannot be shared by 4 processes.*multiple of 12"):
            loop.check_fit(toy_recipe(batch_size=6, accumulation_steps=3), dataset, DistributedContext(0, 4, CPU))


@pytest.mark.slow
def test_training_overfits_four_street_scenes(tmp_path):
    """The whole chain learns: drawn scenes, their readers, model, losses, evaluation; to the last lamp post.

    The scenes are small, so that it takes minutes, and shown four times as large, so that the masks at stride 4 have a
    cell for each of their pixels. In the scenes of seed 39 no class has fewer than 38 pixels.
    """
    root = write_cityscapes(tmp_path / "streets", num_train=4, num_val=1, size=(48, 96), seed=39)
    recipe = recipes.debug_tiny().vary(
        data=dict(crop_size=(192, 384), shortest_edges=(192,), longest_edge=384, flip=False, color_jitter=False),
        loss=dict(num_points=4096),
        optimization=dict(max_iterations=300, learning_rate=1.5e-3, evaluate_every=300),
        evaluation=dict(shortest_edge=192),
    )
    run = train(recipe, root, tmp_path / "run")
    result = evaluate(run.model("last"), recipe, root, split="train")
    print(format_table(result))
    assert result["mIoU"] > 95
