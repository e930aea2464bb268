"""Take a few training steps in a process of its own, and print their time and memory. `planner` starts this:

python -m m2f_lab.training.planning.probe recipe.json DEVICE

In a process of its own the peak of the resident memory is that of the steps, and an out-of-memory probe cannot kill its
caller. The steps are those of training, on the recipe's own model and crop; only the images are noise, and their labels
are stripes.

The cost of more images is the difference of two times, and from one process to the next a shared machine's speed drifts
by more than that. So steps on half the batch are taken in turn with those on all of it.

B images, H/W height/width of the crop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from m2f_lab.data import Batch
from m2f_lab.recipes import Recipe
from m2f_lab.references import resolve
from m2f_lab.structures import Target
from m2f_lab.training.determinism import deterministic_algorithms
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.training.loop import model_to_train, peak_memory
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.planning.memory import keep_freed_memory
from m2f_lab.training.step import TrainStep, autocast_dtype

NUM_SEGMENTS = 8  # per image, as in benchmarks.training_step
WARM_UP = 3  # the first step sets everything up; in the next ones memory reaches its peak beside the optimiser's state
FEWEST_TURNS, MOST_TURNS, ENOUGH_SECONDS = 3, 15, 10.0


def main(arguments: Sequence[str]) -> None:
    path, device = arguments
    print(json.dumps(measure(Recipe.load(path), torch.device(device))))


def measure(recipe: Recipe, device: torch.device) -> dict[str, float | None]:
    """Train a few steps, and in turn with them a few on half the batch.

    Returns:
        "gib": the peak of this process's memory, or of the GPU's; "seconds": of a step, the median; "half_seconds":
        that less the median of the difference between the whole and half of it, None for a single image.
    """
    smaller = half(recipe)
    sizes = [recipe, smaller] if smaller else [recipe]
    times: list[list[float]] = []  # of all sizes in turn
    # Both as `train` does.
    with deterministic_algorithms(recipe.optimization.deterministic), keep_freed_memory(device):
        learner, batches = learner_for(recipe, device), [noise(each).to(device) for each in sizes]
        for iteration in range(WARM_UP):
            timed_step(learner, batches[0], iteration)
        peak = peak_memory(device)  # before steps of another size cut up what is kept
        while len(times) < 1 + MOST_TURNS:
            times.append([
                timed_step(replace(learner, recipe=each), batch, WARM_UP + len(times))
                for each, batch in zip(sizes, batches, strict=True)
            ])  # fmt: skip
            timed = times[1:]  # the first step on half the batch sets things up as well
            if len(timed) >= FEWEST_TURNS and sum(map(sum, timed)) >= ENOUGH_SECONDS:
                break
    seconds = median(whole for whole, *_ in timed)
    more = median(whole - less for whole, less in timed) if smaller else None  # within a turn: all else drifts
    return {"gib": peak, "seconds": seconds, "half_seconds": seconds - more if smaller else None}


def half(recipe: Recipe) -> Recipe | None:
    """Half the batch, rounded down: half of the parts, or half of the only part; None where one image is all."""
    batch_size, parts = recipe.optimization.batch_size, recipe.optimization.accumulation_steps
    if batch_size == 1:
        return None
    if parts == 1:
        return recipe.vary(optimization=dict(batch_size=batch_size // 2))
    return recipe.vary(optimization=dict(batch_size=batch_size // parts * (parts // 2), accumulation_steps=parts // 2))


def timed_step(learner: TrainStep, batch: Batch, iteration: int) -> float:
    """Seconds of a step. Every turn has a seed of its own: stochastic depth makes one longer than the other."""
    start = time.perf_counter()
    learner.step(batch, iteration % learner.recipe.optimization.max_iterations)
    return time.perf_counter() - start  # it has returned numbers, so it is over


def learner_for(recipe: Recipe, device: torch.device) -> TrainStep:
    """Build what `train` trains with, without pretrained weights, which change neither time nor memory."""
    model = model_to_train(recipe.vary(model=dict(backbone_weights=None)), device).train()
    precision = autocast_dtype(recipe.optimization.precision, device)
    return TrainStep(
        recipe=recipe,
        model=model,
        criterion=resolve(recipe.criterion)(recipe),
        optimizer=build_optimizer(model, recipe.optimization),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        precision=precision,
        world=DistributedContext(0, 1, device),
    )


def noise(recipe: Recipe) -> Batch:
    """A batch of random images, with vertical stripes for segments."""
    batch_size, (height, width) = recipe.optimization.batch_size, recipe.data.crop_size
    images = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8)
    count = min(NUM_SEGMENTS, recipe.model.num_classes)
    stripes = (torch.arange(width) * count // width).to(torch.uint8).expand(height, width)
    return Batch(images, [Target.from_label_map(stripes)] * batch_size, ["noise"] * batch_size)


if __name__ == "__main__":
    main(sys.argv[1:])
