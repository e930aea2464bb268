"""Training in several processes on one machine, over gloo: how the tests start them, and what they do there."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m2f_lab.data import Batch, open_dataset, training_batches
from m2f_lab.loss import build_criterion
from m2f_lab.ops import stochastic_depth
from m2f_lab.recipes import Recipe
from m2f_lab.training import train
from m2f_lab.training.distributed import DistributedContext, distributed_context
from m2f_lab.training.loop import model_to_train
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.step import TrainStep
from tests.test_ops_stochastic_depth import add_to_all
from tests.toy_training import fixed_points


def start_processes(function: str, size: int, *arguments, timeout: float = 240) -> None:
    """Call a function, "module:name", in `size` processes as `torchrun` starts them, and wait until all are done.

    Args:
        function: takes the arguments as they come out of JSON.
    """
    module, name = function.split(":")
    script = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        f"from {module} import {name}\n"
        f"{name}(*json.loads(sys.argv[1]))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", script, json.dumps(arguments, default=str)]
    started = [
        subprocess.Popen(
            command,
            env=os.environ
            | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            cwd=Path(__file__).parents[1],
        )
        for rank in range(size)
    ]
    try:
        assert [process.wait(timeout=timeout) for process in started] == [0] * size
    finally:
        for process in started:
            process.kill()
            process.wait()


def take_steps(recipe: str, root: str, out: str, num_steps: int, static_sizes: bool = False) -> None:
    """Take training steps, and write to `out/RANK.safetensors` each step's gradients and loss, the final weights, and
    how many branches this process dropped for all of its images ("lost") and in how many blocks of memory all gradients
    lie ("blocks").

    Every process draws the points that a single one would draw, and drops the branches that a single one would drop
    for the same images.

    Args:
        recipe: a recipe.json.
        root: the data set's folder.
        static_sizes: compute dropped branches too, as on a GPU.
    """
    with distributed_context() as world, pytest.MonkeyPatch.context() as patch:
        settings = Recipe.load(recipe)
        lost = _draw_as_one_process(world, patch)
        if static_sizes:
            patch.setattr(stochastic_depth, "add_to_kept", add_to_all)
        model = model_to_train(settings, world.device).train()
        learner = TrainStep(
            recipe=settings,
            model=world.wrap_ddp(model),
            criterion=build_criterion(settings),
            optimizer=build_optimizer(model, settings.optimization),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            precision=torch.float32,
            world=world,
        )
        batches = training_batches(
            open_dataset("folder", root, "train"),
            settings.data,
            batch_size=settings.optimization.batch_size,
            seed=settings.seed,
            num_batches=num_steps,
            rank=world.rank,
            world_size=world.size,
        )
        tensors = {}
        for iteration, batch in enumerate(batches):
            row = learner.step(batch, iteration)
            tensors[f"loss.{iteration}"] = torch.tensor(row["loss"])
            tensors |= {f"gradient.{iteration}.{name}": p.grad.clone() for name, p in model.named_parameters()}
        tensors["lost"] = torch.tensor(sum(lost))
        tensors["blocks"] = torch.tensor(len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}))
        tensors |= {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
        save_file(tensors, Path(out) / f"{world.rank}.safetensors")


def _draw_as_one_process(world: DistributedContext, patch: pytest.MonkeyPatch) -> list[bool]:
    """Patch all draws; the list grows by one for every branch: True if none of this process's images keeps it."""
    patch.setattr("m2f_lab.loss.points.random_points", fixed_points)
    patch.setattr("m2f_lab.loss.matcher.random_points", fixed_points)
    draw, generator, lost = stochastic_depth.draw_scale, torch.Generator().manual_seed(0), []

    def draw_share(num_images: int, drop_rate: float, device: torch.device) -> torch.Tensor:
        """This process's images of a draw for all images of the batch; the n-th draw is the same everywhere."""
        with torch.random.fork_rng():
            torch.set_rng_state(generator.get_state())
            scale = draw(num_images * world.size, drop_rate, device)
            generator.set_state(torch.get_rng_state())
        own = scale[world.rank :: world.size]
        lost.append(not own.any())
        return own

    patch.setattr(stochastic_depth, "draw_scale", draw_share)
    return lost


def read_steps(folder: Path) -> list[dict[str, torch.Tensor]]:
    """What every process wrote in `take_steps`, by rank."""
    return [load_file(file) for file in sorted(folder.glob("*.safetensors"))]


def train_in_own_folder(recipe: str, root: str, out: str, stop: int | None = None) -> None:
    """Train in `out/RANK`, as on machines without a shared disk, and write what happened to `out/RANK.json`.

    Written are the iterations and learning rates of the steps, a digest of all weights after the last of them, and the
    message of an error.

    Args:
        stop: a step before which all machines lose power.
    """
    step, steps, words = TrainStep.step, [], {}

    def recorded(self: TrainStep, batch: Batch, iteration: int) -> dict:
        if iteration == stop:
            raise RuntimeError("power cut")
        row = step(self, batch, iteration)
        steps.append([iteration, row["learning_rate"]])
        words["weights"] = digest(self.model.state_dict())
        return row

    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "step", recorded)
        try:
            train(Recipe.load(recipe), root, Path(out) / str(rank))
        except (RuntimeError, ValueError) as error:
            words["error"] = str(error)
    (Path(out) / f"{rank}.json").write_text(json.dumps(words | {"steps": steps}))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """One number for all bits of some tensors."""
    found = hashlib.sha256()
    for value in tensors.values():
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()
