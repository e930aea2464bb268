"""Take a few training steps in a process of its own, and say what they took. `planner` starts this:

python -m m2f_lab.training.probe recipe.json DEVICE

A process of its own, because only there the peak of the resident memory is that of the steps, and because one that runs
out of memory takes nobody with it. The steps are those of training, on the recipe's own model and crop; only the images
are noise, and their labels are stripes.

B images, H/W height/width of the crop.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import torch

from m2f_lab.data import Batch
from m2f_lab.loss import Criterion
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Target
from m2f_lab.training.distributed import Processes
from m2f_lab.training.loop import model_to_train, peak_memory
from m2f_lab.training.memory import kept_memory
from m2f_lab.training.optimizer import build_optimizer
from m2f_lab.training.step import Learner, autocast_dtype

NUM_SEGMENTS = 8  # per image, as in benchmarks.training_step
WARM_UP = 2  # the first step sets everything up; in the second, memory reaches its peak beside the optimiser's state
FEWEST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 3, 15, 10.0


def main(arguments: Sequence[str]) -> None:
    path, device = arguments
    print(json.dumps(measure(Recipe.load(path), torch.device(device))))


def measure(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Train a few steps.

    Returns:
        "gib": the peak of this process's memory, or of the GPU's; "seconds": of a step, the median.
    """
    seconds: list[float] = []
    with kept_memory(device):  # as `train` does
        learner, batch = learner_for(recipe, device), noise(recipe)
        while len(seconds) < WARM_UP + MOST_STEPS:
            start = time.perf_counter()
            # Each step under a seed of its own: stochastic depth makes one longer than the other.
            learner.step(batch, iteration=len(seconds) % recipe.optimization.max_iterations)
            seconds.append(time.perf_counter() - start)  # it has returned numbers, so it is over
            timed = seconds[WARM_UP:]
            if len(timed) >= FEWEST_STEPS and sum(timed) >= ENOUGH_SECONDS:
                break
    return {"gib": peak_memory(device), "seconds": median(timed)}


def learner_for(recipe: Recipe, device: torch.device) -> Learner:
    """What `train` would train with, but for the pretrained weights, which change neither time nor memory."""
    model = model_to_train(recipe.vary(model=dict(backbone_weights=None)), device).train()
    precision = autocast_dtype(recipe.optimization.precision, device)
    return Learner(
        recipe=recipe,
        model=model,
        criterion=Criterion(recipe.model.num_classes, **asdict(recipe.loss)),
        optimizer=build_optimizer(model, recipe.optimization),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        precision=precision,
        world=Processes(0, 1, device),
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
