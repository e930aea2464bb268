"""The training loop: deterministic, exact after any interruption, honest about parts and processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import m2f_lab.training.loop as loop
from m2f_lab import recipes
from m2f_lab.data import open_dataset, training_batches
from m2f_lab.data.scenes import write_cityscapes
from m2f_lab.evaluation import evaluate, format_table
from m2f_lab.loss import Criterion
from m2f_lab.model import build_model
from m2f_lab.structures import Target
from m2f_lab.training import ProgressBar, Run, train
from m2f_lab.training.distributed import Processes
from m2f_lab.training.optimizer import build_optimizer, clipped_step
from m2f_lab.training.step import Learner, Share, autocast_dtype, gradient_shares, seed_everything, split
from tests.toy_training import all_tensors, assert_same_tensors, timeless, toy_recipe, write_toy_data

CPU = torch.device("cpu")
ALONE = Processes(rank=0, size=1, device=CPU)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Run:
    """The run that was never stopped."""
    return train(toy_recipe(), root, tmp_path_factory.mktemp("runs") / "whole")


def assert_same_run(run: Run, whole: Run) -> None:
    for which in ("last", "best"):
        assert_same_tensors(all_tensors(run.checkpoint(which)), all_tensors(whole.checkpoint(which)))
    assert timeless(run.metrics) == timeless(whole.metrics)


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events, self.rows = [], []

    def on_start(self, run: Run) -> None:
        self.events.append(("start", run.iteration))

    def on_step(self, row: dict) -> None:
        self.events.append(("step", row["iteration"]))
        self.rows.append(row)

    def on_evaluation(self, row: dict) -> None:
        self.events.append(("evaluation", row["iteration"]))

    def on_end(self, run: Run) -> None:
        self.events.append(("end", run.iteration))


class StopAt(Recorder):
    """Raises after some step, as a machine that dies would stop the run."""

    def __init__(self, iteration: int, error: BaseException) -> None:
        super().__init__()
        self.iteration, self.error = iteration, error

    def on_step(self, row: dict) -> None:
        super().on_step(row)
        if row["iteration"] == self.iteration:
            raise self.error


class TestRun:
    def test_rows(self, whole):
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

    def test_every_line_is_json_for_everyone(self, whole):
        for line in (whole.path / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON

    def test_learning_rate_follows_the_schedule(self, whole):
        rates = [row["learning_rate"] for row in whole.steps]  # warm-up over 20 steps, in a run of 6
        assert rates == pytest.approx([1e-3 * (i + 1) / 20 * (1 - i / 6) ** 0.9 for i in range(6)])

    def test_best_and_last(self, whole):
        assert whole.last == whole.evaluations[-1]
        assert whole.best["mIoU"] == max(row["mIoU"] for row in whole.evaluations)

    def test_the_best_weights_are_those_of_the_best_evaluation(self, root, tmp_path, monkeypatch):
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

    def test_repr_is_short_and_says_nothing_that_varies(self, whole):
        assert repr(whole) == "Run(toy, 6 of 6 iterations)"
        assert whole.finished

    def test_model_holds_the_trained_weights(self, whole, root):
        model = whole.model("last")
        assert not model.training
        assert model.classes.names == ("ground", "box", "ball")
        assert evaluate(model, whole.recipe, root) == {
            k: v for k, v in whole.last.items() if k not in ("kind", "iteration")
        }

    def test_recipe_comes_back(self, whole):
        assert whole.recipe == toy_recipe()

    def test_log_every_thins_out_the_rows_but_not_what_callbacks_hear(self, root, tmp_path):
        recorder = Recorder()
        run = train(toy_recipe(max_iterations=5, log_every=2, evaluate_every=100), root, tmp_path / "run", [recorder])
        assert [row["iteration"] for row in run.steps] == [2, 4, 5]
        assert [row["iteration"] for row in recorder.rows] == [1, 2, 3, 4, 5]
        assert run.steps == [recorder.rows[i] for i in (1, 3, 4)]

    def test_a_folder_that_is_no_run(self, tmp_path):
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

    def test_workers_make_no_difference(self, root, whole, tmp_path):
        run = train(toy_recipe().vary(data=dict(num_workers=2)), root, tmp_path / "workers")
        assert timeless(run.metrics) == timeless(whole.metrics)

    def test_nothing_between_the_steps_makes_a_difference(self, root, whole, tmp_path):
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


class TestResume:
    @pytest.mark.parametrize("iteration", [1, 2, 3, 5])
    def test_killed_between_steps(self, root, whole, tmp_path, iteration):
        """Checkpoints are at 2, 4, 6: up to two steps are taken again, and end in the same bits."""
        stop = StopAt(iteration, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            train(toy_recipe(), root, tmp_path / "run", callbacks=[stop])
        assert stop.events[-1] == ("step", iteration)  # no on_end after an error
        recorder = Recorder()
        run = train(toy_recipe(), root, tmp_path / "run", callbacks=[recorder])
        start = (iteration - 1) // 2 * 2  # the checkpoint of a step is written after its callbacks
        assert recorder.events[:2] == [("start", start), ("step", start + 1)]
        assert_same_run(run, whole)

    @pytest.mark.slow
    def test_killed_by_the_system(self, root, whole, tmp_path):
        """SIGKILL at an arbitrary moment."""
        script = (
            "import sys, torch; torch.set_num_threads(int(sys.argv[3]))\n"
            "from tests.toy_training import toy_recipe\n"
            "from m2f_lab.training import train\n"
            "train(toy_recipe(), sys.argv[1], sys.argv[2])\n"
        )
        metrics = tmp_path / "run" / "metrics.jsonl"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(root), str(tmp_path / "run"), str(torch.get_num_threads())],
            cwd=Path(__file__).parents[1],
        )
        try:
            deadline = time.monotonic() + 120
            while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
                assert process.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        assert 0 < Run(tmp_path / "run").iteration < 6
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_a_finished_run_is_returned_as_it_is(self, root, whole, tmp_path):
        recorder = Recorder()
        before = all_tensors(whole.checkpoint("last"))
        run = train(toy_recipe(), root, whole.path, callbacks=[recorder])
        assert recorder.events == [("start", 6), ("end", 6)]
        assert_same_tensors(all_tensors(run.checkpoint("last")), before)

    def test_another_recipe_is_refused_by_the_names_of_its_fields(self, root, whole):
        other = toy_recipe(learning_rate=0.5).vary(model=dict(num_queries=7), seed=9)
        with pytest.raises(ValueError, match="another recipe") as error:
            train(other, root, whole.path)
        for line in ("model.num_queries: 6 there, 7 here", "optimization.learning_rate: 0.001 there, 0.5 here",
                     "seed: 0 there, 9 here", 'resume="never"'):  # fmt: skip
            assert line in str(error.value)
        assert "batch_size" not in str(error.value)
        with pytest.raises(ValueError, match=r"max_iterations: 6 there, 12 here"):  # the schedule hangs on it
            train(toy_recipe(max_iterations=12), root, whole.path)

    def test_what_does_not_reach_the_weights_may_change(self, root, whole, tmp_path):
        with pytest.raises(RuntimeError):
            train(toy_recipe(), root, tmp_path / "run", callbacks=[StopAt(3, RuntimeError())])
        changed = toy_recipe(checkpoint_every=5, log_every=3).vary(data=dict(num_workers=1), notes="on another machine")
        run = train(changed, root, tmp_path / "run")
        assert run.recipe == changed
        assert_same_tensors(all_tensors(run.checkpoint("last")), all_tensors(whole.checkpoint("last")))

    def test_must(self, root, whole, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing to continue"):
            train(toy_recipe(), root, tmp_path / "run", resume="must")
        assert train(toy_recipe(), root, whole.path, resume="must").finished

    def test_never(self, root, whole, tmp_path):
        short = toy_recipe(max_iterations=1)
        run = train(short.vary(seed=5), root, tmp_path / "run")
        run = train(short, root, tmp_path / "run", resume="never")
        assert run.recipe == short
        assert [row["iteration"] for row in run.metrics] == [1, 1]
        assert run.steps[0]["0.class"] == whole.steps[0]["0.class"]

    def test_never_deletes_nothing_before_the_data_are_found(self, root, tmp_path):
        run = train(toy_recipe(max_iterations=1), root, tmp_path / "run")
        with pytest.raises(ValueError, match="No data set here"):
            train(toy_recipe(), tmp_path / "nowhere", tmp_path / "run", resume="never")
        assert run.finished

    def test_no_other_word(self, root, tmp_path):
        with pytest.raises(ValueError, match='"auto", "must" or "never"'):
            train(toy_recipe(), root, tmp_path / "run", resume="yes")

    def test_a_run_without_checkpoint_starts_anew(self, root, whole, tmp_path):
        """Killed before its first checkpoint: rows are there, but nothing to continue from."""
        with pytest.raises(RuntimeError):
            train(toy_recipe(), root, tmp_path / "run", callbacks=[StopAt(1, RuntimeError())])
        assert len(Run(tmp_path / "run").metrics) == 1
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)


class TestInterrupt:
    def test_from_a_callback(self, root, whole, tmp_path, capsys):
        run = train(toy_recipe(), root, tmp_path / "run", callbacks=[stop := StopAt(3, KeyboardInterrupt())])
        assert not run.finished
        assert repr(run) == "Run(toy, 3 of 6 iterations)"  # not that of the last regular checkpoint, 2
        assert stop.events[-1] == ("end", 3)
        assert "a checkpoint at iteration 3;" in capsys.readouterr().out
        assert run.evaluations == []  # what was due at 3 is made up for
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_during_a_step_the_step_is_finished(self, root, whole, tmp_path, monkeypatch):
        step = Learner.step

        def interrupted(self, batch, iteration):
            if iteration == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, batch, iteration)

        monkeypatch.setattr(Learner, "step", interrupted)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == 3
        assert len(run.steps) == 3
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    @pytest.mark.parametrize(("iteration", "kept"), [(0, 0), (3, 2)])
    def test_a_second_one_ends_a_step_at_once_and_torn_weights_are_not_kept(
        self, root, whole, tmp_path, monkeypatch, capsys, iteration, kept
    ):
        calls = iter(range(10))

        def torn(*arguments):
            if next(calls) < iteration:
                return clipped_step(*arguments)
            with torch.no_grad():
                next(arguments[2].parameters()).zero_()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second interrupt was not raised at once")

        monkeypatch.setattr("m2f_lab.training.step.clipped_step", torn)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == kept
        assert (f"a checkpoint at iteration {kept}" if kept else "no checkpoint") in capsys.readouterr().out
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_during_an_evaluation(self, root, whole, tmp_path, monkeypatch):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "evaluate", interrupted)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == 3
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_interrupts_are_as_before_afterwards(self, root, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        train(toy_recipe(max_iterations=1), root, tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is before

    def test_in_another_thread(self, root, tmp_path):
        """A thread cannot set signal handlers; training there works all the same."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(train, toy_recipe(max_iterations=1), root, tmp_path / "run").result().finished


class TestCallbacks:
    def test_order(self, root, tmp_path):
        recorder = Recorder()
        train(toy_recipe(max_iterations=4), root, tmp_path / "run", callbacks=[recorder])
        assert recorder.events == [
            ("start", 0), ("step", 1), ("step", 2), ("step", 3), ("evaluation", 3), ("step", 4), ("evaluation", 4),
            ("end", 4),
        ]  # fmt: skip

    def test_what_they_hear_is_on_disk(self, root, tmp_path):
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

    def test_progress_bar_goes_on_where_the_run_does(self, root, tmp_path, capsys):
        stop = StopAt(2, KeyboardInterrupt())
        train(toy_recipe(max_iterations=3), root, tmp_path / "run", callbacks=[ProgressBar(), stop])
        assert "2 of 3 iterations" in capsys.readouterr().out.splitlines()[-1]
        train(toy_recipe(max_iterations=3), root, tmp_path / "run", callbacks=[ProgressBar()])
        assert "2/3" in capsys.readouterr().err.split("\r")[1]


class TestErrors:
    def test_a_loss_that_is_not_finite_names_iteration_and_images(self, root, tmp_path, monkeypatch):
        """The checkpoint before it stays."""
        step = Learner.step

        def poisoned(self, batch, iteration):
            if iteration == 3:
                with torch.no_grad():
                    self.model.transformer_decoder.class_head.weight.fill_(torch.nan)
            return step(self, batch, iteration)

        monkeypatch.setattr(Learner, "step", poisoned)
        with pytest.raises(FloatingPointError, match=r"Iteration 3, images 0 = training_\d, 1 = training_\d.*class"):
            train(toy_recipe(), root, tmp_path / "run")
        assert Run(tmp_path / "run").iteration == 2
        weights = all_tensors(Run(tmp_path / "run").checkpoint("last"))
        assert all(torch.isfinite(value).all() for value in weights.values())

    def test_another_number_of_classes(self, root, tmp_path):
        with pytest.raises(ValueError, match=r"has 3 classes.*vary\(model=dict\(num_classes=3\)\)"):
            train(toy_recipe().vary(model=dict(num_classes=4)), root, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_batch_that_cannot_be_shared(self, root, tmp_path, monkeypatch):
        dataset = open_dataset("folder", root, "train")
        with pytest.raises(ValueError, match=r"batch of 6 images cannot be shared by 4 processes.*multiple of 12"):
            loop.check_fit(toy_recipe(batch_size=6, accumulation_steps=3), dataset, Processes(0, 4, CPU))


class TestPrecision:
    def test_choice(self):
        assert autocast_dtype("auto", CPU) == torch.float32
        assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
        assert autocast_dtype("float16", CPU) == torch.float16

    def test_bfloat16_trains_close_to_float32(self, root, whole, tmp_path):
        run = train(toy_recipe(max_iterations=2, precision="bfloat16"), root, tmp_path / "run")
        assert run.steps[0]["loss"] == pytest.approx(whole.steps[0]["loss"], rel=0.02)
        assert run.steps[0]["loss"] != whole.steps[0]["loss"]
        assert {v.dtype for v in run.model().state_dict().values()} == {torch.float32, torch.int64}

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    def test_on_a_gpu(self, root, whole, tmp_path, precision):
        before = torch.cuda.memory_allocated()
        recipe = toy_recipe(precision=precision)
        run = train(recipe, root, tmp_path / "run", callbacks=[StopAt(3, KeyboardInterrupt())])
        assert torch.cuda.memory_allocated() == before
        run = train(recipe, root, tmp_path / "run")
        assert run.finished
        assert run.steps[0]["loss"] == pytest.approx(whole.steps[0]["loss"], rel=0.05)


def fixed_points(num_sets: int, num_points: int, like: torch.Tensor) -> torch.Tensor:
    """The same points for everyone, in place of random ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, num_points, 2, generator=generator).to(like).expand(num_sets, -1, -1)


class TestParts:
    """Gradient accumulation is the big batch, but for batch norm and the random points."""

    RECIPE = toy_recipe(backbone="test_convnext", batch_size=4, clip_norm=1e9)  # no batch norm

    def batch(self, root: Path):
        dataset = open_dataset("folder", root, "train")
        return next(training_batches(dataset, self.RECIPE.data, batch_size=4, seed=0, num_batches=1))

    def gradient(self, root: Path, num_parts: int) -> tuple[dict[str, torch.Tensor], dict]:
        recipe = self.RECIPE.vary(optimization=dict(accumulation_steps=num_parts))
        torch.manual_seed(0)
        model = build_model(recipe.model)
        criterion = Criterion(recipe.model.num_classes, num_points=recipe.loss.num_points)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer = build_optimizer(model, recipe.optimization)
        learner = Learner(recipe, model, criterion, optimizer, scaler, torch.float32, ALONE)
        losses = learner.step(self.batch(root), 0)
        return {name: p.grad for name, p in model.named_parameters()}, losses

    @pytest.mark.parametrize("num_parts", [2, 4])
    def test_parts_add_up_to_the_gradient_of_the_batch(self, root, monkeypatch, num_parts):
        monkeypatch.setattr("m2f_lab.loss.points.random_points", fixed_points)
        monkeypatch.setattr("m2f_lab.loss.matcher.random_points", fixed_points)
        expected, expected_losses = self.gradient(root, 1)
        found, losses = self.gradient(root, num_parts)
        scale = max(g.abs().max() for g in expected.values())
        for name, gradient in expected.items():
            difference = (found[name] - gradient).abs().max() / scale
            assert difference < 1e-5, f"{name}: {difference:.1e}"
        assert losses == pytest.approx(expected_losses, rel=1e-4)

    def test_a_plain_average_of_parts_would_not(self, root, monkeypatch):
        """The images differ in their number of segments, so the weights matter."""
        monkeypatch.setattr("m2f_lab.loss.points.random_points", fixed_points)
        monkeypatch.setattr("m2f_lab.loss.matcher.random_points", fixed_points)
        monkeypatch.setattr("m2f_lab.training.step.gradient_shares", lambda parts, *_: [Share(0.25, 0.25)] * 4)
        _, losses = self.gradient(root, 4)
        monkeypatch.undo()
        assert losses["loss"] != pytest.approx(self.gradient(root, 1)[1]["loss"], rel=1e-3)

    def test_shares_by_hand(self):
        def target(num_segments: int) -> Target:
            return Target(labels=torch.zeros(num_segments, dtype=torch.long), masks=torch.zeros(num_segments, 2, 2) > 0)

        # 10 queries; parts of one image with 3 and 1 segments: class weights 3 + 0.7 and 1 + 0.9.
        shares = gradient_shares([[target(3)], [target(1)]], 10, 0.1, ALONE)
        assert [s.masks for s in shares] == pytest.approx([3 / 4, 1 / 4])
        assert [s.classes for s in shares] == pytest.approx([3.7 / 5.6, 1.9 / 5.6])
        # More segments than queries: only as many as there are queries count as matched, but all as segments.
        shares = gradient_shares([[target(12)], [target(0)]], 10, 0.1, ALONE)
        assert [s.classes for s in shares] == pytest.approx([10 / 11, 1 / 11])
        assert [s.masks for s in shares] == pytest.approx([1, 1 / 12])  # an empty part adds nothing, divided by 1
        assert gradient_shares([[target(3), target(0)]], 10, 0.1, ALONE) == [Share(1.0, 1.0)]

    def test_split_keeps_the_order(self, root):
        batch = self.batch(root)
        parts = split(batch, 2)
        assert [n for part in parts for n in part.names] == batch.names
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


@pytest.mark.slow
def test_two_processes_are_one(root, tmp_path):
    """Started as torchrun starts them: the gradient is that of one process, and the files are written once."""
    recipe = TestParts.RECIPE.vary(optimization=dict(max_iterations=2, evaluate_every=1, accumulation_steps=1))
    recipe.save(tmp_path / "recipe.json")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import m2f_lab.loss.points, m2f_lab.loss.matcher\n"
        "from m2f_lab.recipes import Recipe\n"
        "from m2f_lab.training import train\n"
        "from tests.test_training import fixed_points\n"
        "m2f_lab.loss.points.random_points = m2f_lab.loss.matcher.random_points = fixed_points\n"
        "train(Recipe.load(sys.argv[1]), sys.argv[2], sys.argv[3])\n"
    )

    def run(name: str, size: int) -> Run:
        port = str(29500 + os.getpid() % 1000)
        common = dict(os.environ, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environments = [common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]
        command = [sys.executable, "-c", script, str(tmp_path / "recipe.json"), str(root), str(tmp_path / name)]
        started = [subprocess.Popen(command, env=e, cwd=Path(__file__).parents[1]) for e in environments]
        try:
            assert [process.wait(timeout=240) for process in started] == [0] * size
        finally:
            for process in started:
                process.kill()
        return Run(tmp_path / name)

    one, two = run("one", 1), run("two", 2)
    assert [row["kind"] for row in two.metrics] == ["step", "evaluation"] * 2
    for a, b in zip(timeless(one.steps), timeless(two.steps), strict=True):
        assert (a.pop("kind"), b.pop("kind")) == ("step", "step")
        assert b == pytest.approx(a, rel=1e-3)
    assert two.evaluations[0]["num_images"] == one.evaluations[0]["num_images"]
    assert two.evaluations[0]["mIoU"] == pytest.approx(one.evaluations[0]["mIoU"], abs=0.5)
    first_moments = {n: v for n, v in all_tensors(one.checkpoint("last")).items() if ".exp_avg." in n}
    scale = max(v.abs().max() for v in first_moments.values())
    for name, value in first_moments.items():
        found = all_tensors(two.checkpoint("last"))[name]
        difference = (found - value).abs().max() / scale
        assert difference < 1e-4, f"{name}: {difference:.1e}"


@pytest.mark.slow
def test_four_street_scenes_are_learned_by_heart(tmp_path):
    """The whole chain learns: drawn scenes, their readers, model, losses, evaluation; to the last lamp post.

    The scenes are small, so that it takes minutes, and shown four times as large, so that the masks at stride 4 have a
    cell for each of their pixels. In the scenes of seed 39 no class has fewer than 38 pixels.
    """
    root = write_cityscapes(tmp_path / "streets", num_train=4, num_val=1, size=(48, 96), seed=39)
    recipe = recipes.debug_tiny().vary(
        data=dict(crop_size=(192, 384), shortest_edges=(192,), longest_edge=384, flip=False, color_jitter=False),
        loss=dict(num_points=4096),
        optimization=dict(max_iterations=250, learning_rate=1.5e-3, evaluate_every=250),
        evaluation=dict(shortest_edge=192),
    )
    run = train(recipe, root, tmp_path / "run")
    result = evaluate(run.model("last"), recipe, root, split="train")
    assert result["mIoU"] > 95, format_table(result)
