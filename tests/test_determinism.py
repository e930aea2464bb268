"""Deterministic algorithms: on inside a run that asks for them, and as before afterwards."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from m2f_lab.training import train
from m2f_lab.training.determinism import deterministic_algorithms
from tests.toy_training import Recorder, StopAt, assert_same_run, toy_recipe


def settings() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def stop_inside(expected: tuple) -> None:
    with deterministic_algorithms(True):
        assert settings() == expected
        raise RuntimeError("stop")


@pytest.mark.parametrize("workspace", [None, ":16:8"])
@pytest.mark.parametrize("before", [False, True])
def test_settings_hold_inside_and_are_restored_after_an_error(monkeypatch, before, workspace):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        outside = settings()
        with pytest.raises(RuntimeError, match="stop"):
            stop_inside((True, False, False, workspace or ":4096:8"))
        assert settings() == outside
        with deterministic_algorithms(False):
            assert settings() == outside
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_process_that_used_a_gpu_before_is_warned(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with caplog.at_level(logging.WARNING), deterministic_algorithms(True):
        assert "Start Python with CUBLAS_WORKSPACE_CONFIG=:4096:8" in caplog.text
    caplog.clear()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with caplog.at_level(logging.WARNING), deterministic_algorithms(True):
        assert not caplog.text


class Watching(Recorder):
    def on_step(self, row: dict) -> None:
        super().on_step(row)
        self.seen = settings()


def test_a_run_is_deterministic_from_its_first_to_its_last_step(root, whole, tmp_path):
    """On a CPU that changes nothing but the time."""
    watching, outside = Watching(), settings()
    run = train(toy_recipe(deterministic=True), root, tmp_path / "run", callbacks=[watching])
    assert watching.seen == (True, False, False, ":4096:8")
    assert settings() == outside
    assert_same_run(run, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_deterministic_run_repeats_and_resumes_bit_by_bit_on_a_gpu(root, tmp_path, precision):
    recipe = toy_recipe("test_convnext", deterministic=True, precision=precision)
    runs = [train(recipe, root, tmp_path / name) for name in ("one", "two")]
    train(recipe, root, tmp_path / "resumed", callbacks=[StopAt(3, KeyboardInterrupt())])
    runs.append(train(recipe, root, tmp_path / "resumed"))
    for run in runs[1:]:
        assert_same_run(run, runs[0])
