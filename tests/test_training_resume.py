"""Runs that are killed, interrupted and continued end as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import m2f_lab.training.loop as loop
from m2f_lab.training import Run, train
from m2f_lab.training.optimizer import update_weights
from m2f_lab.training.step import TrainStep
from tests.toy_training import (
    Recorder,
    StopAt,
    all_tensors,
    assert_same_run,
    assert_same_tensors,
    toy_recipe,
)


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

    def test_finished_run_is_returned_unchanged(self, root, whole, tmp_path):
        recorder = Recorder()
        before = all_tensors(whole.checkpoint("last"))
        run = train(toy_recipe(), root, whole.path, callbacks=[recorder])
        assert recorder.events == [("start", 6), ("end", 6)]
        assert_same_tensors(all_tensors(run.checkpoint("last")), before)

    def test_another_recipe_is_refused_by_its_fields(self, root, whole):
        other = toy_recipe(learning_rate=0.5).vary(model=dict(num_queries=7), seed=9)
        with pytest.raises(ValueError, match="another recipe") as error:
            train(other, root, whole.path)
        for line in ("model.num_queries: 6 there, 7 here", "optimization.learning_rate: 0.001 there, 0.5 here",
                     "seed: 0 there, 9 here", 'resume="never"'):  # fmt: skip
            assert line in str(error.value)
        assert "batch_size" not in str(error.value)
        with pytest.raises(ValueError, match=r"max_iterations: 6 there, 12 here"):  # the schedule hangs on it
            train(toy_recipe(max_iterations=12), root, whole.path)

    def test_fields_that_do_not_reach_the_weights_may_change(self, root, whole, tmp_path):
        with pytest.raises(RuntimeError):
            train(toy_recipe(), root, tmp_path / "run", callbacks=[StopAt(3, RuntimeError())])
        changed = toy_recipe(checkpoint_every=5, log_every=3).vary(data=dict(num_workers=1), notes="on another machine")
        run = train(changed, root, tmp_path / "run")
        assert run.recipe == changed
        assert_same_tensors(all_tensors(run.checkpoint("last")), all_tensors(whole.checkpoint("last")))

    def test_resume_must_needs_a_checkpoint(self, root, whole, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing to continue"):
            train(toy_recipe(), root, tmp_path / "run", resume="must")
        assert train(toy_recipe(), root, whole.path, resume="must").finished

    def test_resume_never_deletes_the_run(self, root, whole, tmp_path):
        short = toy_recipe(max_iterations=1)
        run = train(short.vary(seed=5), root, tmp_path / "run")
        run = train(short, root, tmp_path / "run", resume="never")
        assert run.recipe == short
        assert [row["iteration"] for row in run.metrics] == [1, 1]
        assert run.steps[0]["0.class"] == whole.steps[0]["0.class"]

    def test_resume_never_deletes_nothing_before_the_data_are_found(self, root, tmp_path):
        run = train(toy_recipe(max_iterations=1), root, tmp_path / "run")
        with pytest.raises(ValueError, match="No data set here"):
            train(toy_recipe(), tmp_path / "nowhere", tmp_path / "run", resume="never")
        assert run.finished

    def test_resume_refuses_other_words(self, root, tmp_path):
        with pytest.raises(ValueError, match='"auto", "must" or "never"'):
            train(toy_recipe(), root, tmp_path / "run", resume="yes")

    def test_run_without_checkpoint_starts_over(self, root, whole, tmp_path):
        """Killed before its first checkpoint: rows are there, but nothing to continue from."""
        with pytest.raises(RuntimeError):
            train(toy_recipe(), root, tmp_path / "run", callbacks=[StopAt(1, RuntimeError())])
        assert len(Run(tmp_path / "run").metrics) == 1
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)


class TestInterrupt:
    def test_interrupt_from_a_callback_saves(self, root, whole, tmp_path, capsys):
        run = train(toy_recipe(), root, tmp_path / "run", callbacks=[stop := StopAt(3, KeyboardInterrupt())])
        assert not run.finished
        assert repr(run) == "Run(toy, 3 of 6 iterations)"  # not that of the last regular checkpoint, 2
        assert stop.events[-1] == ("end", 3)
        assert "a checkpoint at iteration 3;" in capsys.readouterr().out
        assert run.evaluations == []  # what was due at 3 is made up for
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_interrupt_during_a_step_waits_for_the_step(self, root, whole, tmp_path, monkeypatch):
        step = TrainStep.step

        def interrupted(self, batch, iteration):
            if iteration == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, batch, iteration)

        monkeypatch.setattr(TrainStep, "step", interrupted)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == 3
        assert len(run.steps) == 3
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    @pytest.mark.parametrize(("iteration", "kept"), [(0, 0), (3, 2)])
    def test_second_interrupt_stops_the_step_and_its_weights_are_not_kept(
        self, root, whole, tmp_path, monkeypatch, capsys, iteration, kept
    ):
        calls = iter(range(10))

        def torn(*arguments):
            if next(calls) < iteration:
                return update_weights(*arguments)
            with torch.no_grad():
                arguments[0].param_groups[0]["params"][0].zero_()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second interrupt was not raised at once")

        monkeypatch.setattr("m2f_lab.training.step.update_weights", torn)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == kept
        assert (f"a checkpoint at iteration {kept}" if kept else "no checkpoint") in capsys.readouterr().out
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_interrupt_during_an_evaluation_saves(self, root, whole, tmp_path, monkeypatch):
        def interrupted(*arguments, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "evaluate", interrupted)
        run = train(toy_recipe(), root, tmp_path / "run")
        assert run.iteration == 3
        monkeypatch.undo()
        assert_same_run(train(toy_recipe(), root, tmp_path / "run"), whole)

    def test_signal_handler_is_restored(self, root, tmp_path):
        before = signal.getsignal(signal.SIGINT)
        train(toy_recipe(max_iterations=1), root, tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is before

    def test_training_runs_in_another_thread(self, root, tmp_path):
        """A thread cannot set signal handlers; training there works all the same."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(train, toy_recipe(max_iterations=1), root, tmp_path / "run").result().finished
