"""One step: in parts, in several processes and in lower precision."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2f_lab import ops
from m2f_lab.data import Batch, open_dataset, training_batches
from m2f_lab.loss import Criterion, Divisors, build_criterion
from m2f_lab.model import build_model
from m2f_lab.structures import MaskLogits, Output, Target
from m2f_lab.training import Run, train
from m2f_lab.training import step as step_module
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.step import TrainStep, autocast_dtype, split, tensor_cores, whole_batch_divisors
from tests.toy_training import (
    StopAt,
    all_tensors,
    fixed_points,
    timeless,
    toy_recipe,
)

CPU = torch.device("cpu")
compile_plainly = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
ALONE = DistributedContext(rank=0, size=1, device=CPU)


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
        criterion = build_criterion(recipe)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer = build_optimizer(model, recipe.optimization)
        train_step = TrainStep(recipe, model, criterion, optimizer, scaler, torch.float32, ALONE)
        losses = train_step.step(self.batch(root), 0)
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
        monkeypatch.setattr(step_module, "whole_batch_divisors", lambda *_: Divisors(4 * 1.1, 4 * 2))
        _, losses = self.gradient(root, 4)
        monkeypatch.undo()
        assert losses["loss"] != pytest.approx(self.gradient(root, 1)[1]["loss"], rel=1e-3)

    def test_divisors_by_hand(self):
        def divisors(counts: list[int], world: DistributedContext = ALONE, class_weights=None) -> Divisors:
            targets = [Target(torch.zeros(n, dtype=torch.long), masks=torch.zeros(n, 2, 2) > 0) for n in counts]
            batch = Batch(torch.zeros(len(counts), 3, 8, 8), targets, [""] * len(counts))
            criterion = Criterion(3, no_object_weight=0.1, class_weights=class_weights)
            return whole_batch_divisors(batch, output, criterion, world)

        logits = torch.zeros(1, 10, 4)
        output = Output([logits], [MaskLogits(torch.zeros(1, 10, 1), torch.zeros(1, 1, 2, 2))], (8, 8), (8, 8))
        # 10 queries; images with 3 and 1 segments: class weights 3 + 0.7 and 1 + 0.9.
        assert divisors([3, 1]) == pytest.approx((5.6, 4))
        # More segments than queries: only as many as there are queries are matched, but all count as segments.
        assert divisors([12, 0]) == pytest.approx((11, 12))
        assert divisors([0, 0]) == pytest.approx((2, 1))
        # Of class 0, which weighs 5.
        assert divisors([3, 1], class_weights=(5.0, 1.0, 1.0)) == pytest.approx((4 * 5 + 1.6, 4))

        class Three(DistributedContext):
            def sum(self, values: torch.Tensor) -> torch.Tensor:
                return 3 * values

        assert divisors([3, 1], Three(rank=0, size=3, device=CPU)) == pytest.approx((5.6, 4))

    @pytest.mark.parametrize("class_weights", [None, (0.5, 4.0, 2.0)])
    def test_divisors_are_those_of_the_criterion(self, root, class_weights):
        recipe = self.RECIPE.vary(loss=dict(class_weights=class_weights))
        batch = self.batch(root)
        torch.manual_seed(0)
        output, criterion = build_model(recipe.model)(batch.images), build_criterion(recipe)
        results = []
        for divisors in (None, whole_batch_divisors(batch, output, criterion, ALONE)):
            torch.manual_seed(1)
            results.append(criterion(output, batch.targets, divisors))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, msg=name)

    def test_compiled_steps_are_the_same_steps(self, root, monkeypatch, caplog):
        """On a CPU, torch.compile is left out; what a GPU runs is traced here, and runs as PyTorch's own operations."""
        caplog.set_level(logging.INFO, logger="m2f_lab")
        recipe, compiled = self.RECIPE.vary(optimization=dict(compile=True)), []
        monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_plainly(model))
        torch.manual_seed(0)
        model = build_model(recipe.model)
        others = build_criterion(recipe), build_optimizer(model, recipe.optimization), torch.amp.GradScaler("cpu")
        results = []
        for device in ("cpu", "meta"):  # which decides whether to compile, and nothing else here
            world = DistributedContext(0, 1, torch.device(device))
            run = TrainStep(recipe, model, *others, torch.float32, world)._run
            with ops.plain():
                results.append(run(self.batch(root).images).class_logits[-1])
        torch.compiler.reset()
        assert compiled == [model]
        assert "left out on a CPU" in caplog.text
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)

    def test_float32_products_use_tensor_cores_only_beside_16_bits(self):
        seen = []
        for precision, device in ((torch.bfloat16, "cuda"), (torch.float32, "cuda"), (torch.bfloat16, "cpu")):
            with tensor_cores(precision, torch.device(device)):
                seen.append(torch.get_float32_matmul_precision())
        assert seen == ["high", "highest", "highest"]
        assert torch.get_float32_matmul_precision() == "highest"

    def test_split_keeps_the_order(self, root):
        batch = self.batch(root)
        parts = split(batch, 2)
        assert [n for part in parts for n in part.names] == batch.names
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)


def test_two_processes_are_one(root, tmp_path):
    """Started as torchrun starts them: the gradient is that of one process, and the files are written once."""
    recipe = TestParts.RECIPE.vary(optimization=dict(max_iterations=2, evaluate_every=1, accumulation_steps=1))
    recipe.save(tmp_path / "recipe.json")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import m2f_lab.loss.points, m2f_lab.loss.matcher\n"
        "from m2f_lab.recipes import Recipe\n"
        "from m2f_lab.training import train\n"
        "from tests.toy_training import fixed_points\n"
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
