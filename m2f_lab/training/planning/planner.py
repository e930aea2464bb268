"""Memory and time of a training, estimated within minutes, before a run of two days.

    >>> print(plan(recipes.ade20k_swin_tiny()))

Memory and time are measured, not guessed: single training steps on one image, two, four, … at once, each in a process
of its own (see `probe`), until that is the whole batch, or takes long, or memory might run out. Both grow linearly with
the images, so a line says the rest: of memory through the two largest probes, of time through the largest and half of
it, which took turns. Counting the tensors that autograd keeps would need no probe, but it knows neither the allocator
nor the buffers of the libraries; nor does it know the time.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from m2f_lab.recipes import Recipe

_USABLE = 0.9  # share of the memory that is planned with; the rest is for what the allocator cannot use
_OUT_OF_MEMORY = ("OutOfMemoryError", "not enough memory", "can't allocate memory")  # as PyTorch says it
_PATIENCE = 20.0  # seconds of probing after which no larger batch is tried
_FEWEST_PROBES = 3  # but in any case four images: one image's products are slow, so the second seems to cost little


@dataclass(frozen=True)
class Probe:
    """Memory and time of a training step on so many images at once.

    Attributes:
        images: number of images
        gib: the peak of the memory in GiB; of the process, or of the GPU
        seconds: per step
        half_seconds: per step on half of it (of the parts, or of the images, rounded down), measured in turn with the
            whole; None for a single image
    """

    images: int
    gib: float
    seconds: float
    half_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """A way to train a recipe on a device.

    Attributes:
        recipe: to train
        device: in words
        available: its memory in GiB
        probes: measurements, by number of images
        in_two_parts: measurement of two images, one after the other, if the recipe's batch does not fit at once
    """

    recipe: Recipe
    device: str
    available: float
    probes: tuple[Probe, ...]
    in_two_parts: Probe | None = None

    def memory(self, images: int, parts: int = 1) -> float:
        """Estimate the peak of the memory in GiB of a step that takes so many images at once, in so many parts.

        On the line through the two largest probes, never falling; a single one is divided among its images. From the
        second part on, the gradients of those before lie beside it.
        """
        gradients = max(0.0, self.in_two_parts.gib - self.probes[0].gib) if self.in_two_parts and parts > 1 else 0.0
        last = self.probes[-1]
        before = self.probes[-2] if len(self.probes) > 1 else Probe(0, 0.0, 0.0, None)
        slope = max(0.0, (last.gib - before.gib) / (last.images - before.images))
        return last.gib + slope * (images - last.images) + gradients

    def seconds(self, images: int, parts: int = 1) -> float:
        """Estimate the time of a step that takes so many images at once, in so many parts, with one update.

        On the line through the largest probe and half of it, never falling; a single image counts for each.
        """
        two, last = self.in_two_parts, self.probes[-1]
        update = max(0.0, 2 * two.half_seconds - two.seconds) if two else 0.0
        slope = max(0.0, (last.seconds - (last.half_seconds or 0.0)) / (last.images - last.images // 2))
        return parts * (last.seconds + slope * (images - last.images)) - (parts - 1) * update

    def fits(self, images: int, parts: int = 1) -> bool:
        return self.memory(images, parts) <= _USABLE * self.available

    @property
    def largest_batch(self) -> int:
        """The most images that fit into the memory at once."""
        room, fixed = _USABLE * self.available, self.memory(0)
        return max(0, int((room - fixed) / max(self.memory(1) - fixed, 1e-6)))

    @property
    def accumulation_steps(self) -> int:
        """Fewest equal parts of the recipe's batch such that each fits."""
        batch_size = self.recipe.optimization.batch_size
        divisors = [parts for parts in range(1, batch_size + 1) if batch_size % parts == 0]
        return next((parts for parts in divisors if self.fits(batch_size // parts, parts)), batch_size)

    @property
    def images_at_once(self) -> int:
        return self.recipe.optimization.batch_size // self.accumulation_steps

    @property
    def peak_gib(self) -> float:
        """The peak of the memory if trained as planned."""
        return self.memory(self.images_at_once, self.accumulation_steps)

    @property
    def step_seconds(self) -> float:
        """The time of an optimiser step on the recipe's whole batch, if trained as planned."""
        return self.seconds(self.images_at_once, self.accumulation_steps)

    def applied(self) -> Recipe:
        """The recipe, trained as planned: the same batch, in as many parts as it takes."""
        return self.recipe.vary(optimization=dict(accumulation_steps=self.accumulation_steps))

    def __str__(self) -> str:
        config = self.recipe.optimization
        parts = f" in {self.accumulation_steps} parts of {self.images_at_once}" if self.accumulation_steps > 1 else ""
        days = config.max_iterations * self.step_seconds / 86400
        whole = f"{days:.1f} days" if days >= 2 else f"{24 * days:.1f} hours"
        probes = ", ".join(f"{p.images}: {p.gib:.2f} GiB, {p.seconds:.2f} s" for p in self.probes)
        return (
            f"{self.recipe.name} on {self.device}, {self.available:.1f} GiB\n"
            f"  batch of {config.batch_size}{parts}: accumulation_steps = {self.accumulation_steps}\n"
            f"  memory  {self.peak_gib:.2f} GiB at the peak; {self.largest_batch} images would fit at once\n"
            f"  time    {self.step_seconds:.2f} s a step, {whole} for {config.max_iterations:,} steps\n"
            f"  measured with images at once – {probes}"
        )


def plan(recipe: Recipe, device: str | torch.device | None = None, available: float | None = None) -> Plan:
    """Estimate memory and time of a training step, and how to keep the recipe's batch on this device.

    Args:
        recipe: to train, by one process. Its builder and criterion are imported in other processes, so they must lie
            in modules, not in a notebook.
        device: by default the GPU if there is one
        available: plan for so many GiB, say those of another card; by default the device's free memory

    Raises:
        ValueError: the recipe's builder or criterion lies in a notebook or script.
        MemoryError: not even one image fits.
        RuntimeError: a probe failed for another reason; the message ends as the probe did.
    """
    for reference in (recipe.builder, recipe.criterion):
        if reference.startswith("__main__:"):
            raise ValueError(f"plan measures in other processes, which cannot import {reference!r}; move it to a file.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    available = free_memory(device) if available is None else available
    batch_size = recipe.optimization.batch_size
    probes = probed(batch_size, available, lambda images: _probe(recipe, device, images))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if not probes or probes[0].gib > _USABLE * available:
        needed = f"one image needs {probes[0].gib:.2f} GiB" if probes else "a step on one image ran out of memory"
        raise MemoryError(
            f"{recipe.name} does not fit into {available:.2f} GiB ({name}), of which {_USABLE:.0%} can be used: "
            f"{needed}. "
            'Take a smaller data.crop_size or backbone, or optimization.precision = "bfloat16" where the device has it.'
        )
    found = Plan(recipe, name, available, probes)
    return found if found.fits(batch_size) else replace(found, in_two_parts=_probe(recipe, device, 1, parts=2))


def probed(batch_size: int, available: float, run: Callable[[int], Probe | None]) -> tuple[Probe, ...]:
    """Probe 1, 2, 4, … images, up to the batch, while the next ones are sure to fit and, from 4 on, patience lasts.

    Args:
        batch_size: the most images that are ever taken at once
        available: in GiB
        run: measures so many images; None where the memory ran out
    """
    probes: list[Probe] = []
    images, start = 1, time.perf_counter()
    while (probe := run(images)) is not None:
        probes.append(probe)
        images = min(2 * images, batch_size)
        fits = probe.gib * images / probe.images < _USABLE * available
        impatient = len(probes) >= _FEWEST_PROBES and time.perf_counter() - start > _PATIENCE
        if images == probe.images or not fits or impatient:
            break
    return tuple(probes)


def _probe(recipe: Recipe, device: torch.device, images: int, parts: int = 1) -> Probe | None:
    """Measure a step of so many images at once, in so many parts; None where the memory ran out."""
    took = took_in_a_process(
        recipe.vary(optimization=dict(batch_size=images * parts, accumulation_steps=parts)), device
    )
    return took and Probe(images, **took)


def took_in_a_process(recipe: Recipe, device: torch.device) -> dict[str, float | None] | None:
    """Take a few training steps of the recipe, as it is and on half its batch, in a process of its own.

    Returns:
        The result of `probe.measure`; None where the memory ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.json")
        recipe.save(path)
        command = [sys.executable, "-m", "m2f_lab.training.planning.probe", str(path), str(device)]
        settings = {
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as many as this process would compute with
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # it imports the same builder
        }
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    # A process that takes all memory is killed by Linux without a word.
    if done.returncode == -signal.SIGKILL or any(words in done.stderr for words in _OUT_OF_MEMORY):
        return None
    raise RuntimeError(f"Training steps of {recipe.name} failed where they were tried out:\n{done.stderr[-2000:]}")


def free_memory(device: torch.device) -> float:
    """Memory that a new process could have, in GiB. This process's share of a GPU does not count: close it first."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    file = Path("/proc/meminfo")
    if file.is_file():
        entries = dict(line.split(":", 1) for line in file.read_text().splitlines())
        return min(int(entries["MemAvailable"].split()[0]) / 2**20, _container_memory())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _container_memory() -> float:
    """Rest of the limit of a container (cgroup v2), in GiB; infinite where there is none."""
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return math.inf
    return (int(most) - int(used.read_text())) / 2**30
