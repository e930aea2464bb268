"""From a data set to an endless row of training batches, the same whatever loads them.

B batch, H/W height/width, N images in the data set.

Position p of the row is image p % N of epoch p // N, in an order drawn from (seed, epoch). How the image is varied is
drawn from (seed, epoch, image). So batch n can be made without making those before it: any number of workers gives
the same batches, a run resumes at any batch, and a batch may begin in one epoch and end in the next.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from m2f_lab.data.dataset import Dataset
from m2f_lab.data.transforms import TrainingTransform
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import Target

T = TypeVar("T")

_PREFETCH = 2  # batches that wait for each worker
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Batch:
    """Images of one size and their targets.

    Attributes:
        images: red, green, blue. uint8 [B, 3, H, W]
        targets: one per image; the labels travel as a uint8 id map. B × Target
        names: where the images come from. B × str
    """

    images: Tensor
    targets: list[Target]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device: one transfer for the images, and one for each type of tensor in the targets."""
        device = torch.device(device)
        if all(tensor.device == device for tensor in self.tensors()):
            return self
        return _Packed.of(self).map(lambda tensor: tensor.to(device, non_blocking=non_blocking)).unpack()

    def pin_memory(self) -> Batch:
        return _Packed.of(self).pin_memory().unpack()

    def tensors(self) -> list[Tensor]:
        return [self.images, *(tensor for target in self.targets for tensor in _tensors(target).values())]


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    num_batches: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    task: str = "semantic",
) -> Iterator[Batch]:
    """Batches number `start_batch` to `start_batch + num_batches - 1` of the endless row.

    Args:
        dataset: the training split; it may hold fewer images than a batch
        config: the transforms, and how many workers load (never more than there are processors)
        batch_size: images per batch, over all processes
        seed: of the order and of all variations
        start_batch: where to go on after a resume
        num_batches: how many to give
        rank, world_size: this process and how many there are; each gets every `world_size`-th image of the batch
        pin_memory: put batches where a GPU can fetch them while it computes
        task: which targets to make, "semantic", "panoptic" or "instance"

    Raises:
        ValueError: batch_size is not a multiple of world_size, or a number is out of its range.
        DataError: a file is not as it must be; raised when its batch is due.
    """
    if batch_size <= 0 or batch_size % world_size:
        raise ValueError(
            f"batch_size = {batch_size} counts the images of all processes, so it must be a positive multiple of "
            f"world_size = {world_size}."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0…{world_size - 1}, got {rank}.")
    if min(seed, start_batch, num_batches) < 0:
        raise ValueError(
            f"seed = {seed}, start_batch = {start_batch}, num_batches = {num_batches}: none may be negative."
        )
    num_workers = min(config.num_workers, _num_processors())
    batch_bytes = batch_size // world_size * math.prod(config.crop_size) * 4  # three colours and a segment number
    loader = DataLoader(
        _Examples(dataset, TrainingTransform(config, task), seed),
        batch_sampler=_Row(
            len(dataset), seed, batch_size, range(start_batch, start_batch + num_batches), rank, world_size
        ),
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        collate_fn=partial(_collate, through_pipe=not _fits_shared_memory(num_workers, batch_bytes, world_size)),
        pin_memory=pin_memory,
        # Of its own, because a loader draws a number when it starts: a resumed run, which starts one more, would
        # otherwise go on with other random numbers than an uninterrupted one.
        generator=torch.Generator(),
    )
    return map(_Packed.unpack, iter(loader))


@dataclass(frozen=True)
class _Examples:
    """Training examples by (epoch, image)."""

    dataset: Dataset
    transform: TrainingTransform
    seed: int

    def __getitem__(self, position: tuple[int, int]) -> tuple[Tensor, Target, str]:
        epoch, index = position
        sample = self.dataset[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        return *self.transform(sample, rng), sample.name


@dataclass(frozen=True)
class _Row:
    """The (epoch, image) pairs of each batch of this process."""

    num_images: int
    seed: int
    batch_size: int
    batches: range
    rank: int
    world_size: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            first = batch * self.batch_size
            positions = range(first + self.rank, first + self.batch_size, self.world_size)
            yield [self._locate(position) for position in positions]

    def _locate(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_images)
        return epoch, int(_order(self.seed, epoch, self.num_images)[place])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of an epoch. [N]"""
    # The third number sets it apart from the generators of the images, which have 0…N-1 there.
    return np.random.default_rng([seed, epoch, num_images]).permutation(num_images)


@dataclass(frozen=True)
class _Packed:
    """A batch on its way: all tensors of one type in its targets are one flat tensor.

    Each transfer to a GPU costs the host some time whatever its size. And while a tensor waits between two processes it
    holds a file descriptor, and a system gives a process only so many: 16 workers with two batches of 16 images each
    would need a thousand.
    """

    images: Tensor  # (B, 3, H, W)
    joined: dict[torch.dtype, Tensor]  # of all targets, one after the other
    shapes: list[dict[str, tuple[torch.dtype, torch.Size]]]  # of a target's tensors, by name
    names: list[str]

    @classmethod
    def of(cls, batch: Batch) -> _Packed:
        parts = defaultdict(list)
        for target in batch.targets:
            for tensor in _tensors(target).values():
                parts[tensor.dtype].append(tensor)
        shapes = [{name: (t.dtype, t.shape) for name, t in _tensors(target).items()} for target in batch.targets]
        return cls(batch.images, {dtype: _joined(tensors) for dtype, tensors in parts.items()}, shapes, batch.names)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Packed:
        joined = {dtype: function(flat) for dtype, flat in self.joined.items()}
        return _Packed(function(self.images), joined, self.shapes, self.names)

    def pin_memory(self) -> _Packed:
        return self.map(lambda tensor: torch.as_tensor(tensor).pin_memory())

    def unpack(self) -> Batch:
        """The batch, whose targets are views."""
        arrived = self.map(torch.as_tensor)  # through a pipe come arrays
        sizes = defaultdict(list)
        for shapes in self.shapes:
            for dtype, shape in shapes.values():
                sizes[dtype].append(shape.numel())
        parts = {dtype: iter(flat.split(sizes[dtype])) for dtype, flat in arrived.joined.items()}
        targets = [
            Target(**{name: next(parts[dtype]).view(shape) for name, (dtype, shape) in shapes.items()})
            for shapes in self.shapes
        ]
        return Batch(arrived.images, targets, self.names)


def _tensors(target: Target) -> dict[str, Tensor]:
    return {name: value for name, value in vars(target).items() if value is not None}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors in one row; a view where they lie so in memory, as those of a packed batch do."""
    base, place, lie_so = parts[0]._base, parts[0].storage_offset(), True
    for part in parts:
        lie_so = lie_so and base is not None and part._base is base and part.is_contiguous()
        lie_so = lie_so and part.storage_offset() == place
        place += part.numel()
    if lie_so:
        return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
    return torch.cat([part.flatten() for part in parts])


def _collate(examples: list[tuple[Tensor, Target, str]], through_pipe: bool) -> _Packed:
    """Pack a batch for the way from a worker: tensors go through shared memory, arrays through a pipe."""
    images, targets, names = zip(*examples, strict=True)
    packed = _Packed.of(Batch(torch.stack(images), list(targets), list(names)))
    return packed.map(Tensor.numpy) if through_pipe else packed


def _fits_shared_memory(num_workers: int, batch_bytes: int, world_size: int) -> bool:
    """True if shared memory holds all batches that wait; the log says what to do if it does not.

    A worker that finds no room there dies. A Docker container has 64 MiB unless it is given more.
    """
    free = _free_shared_memory()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    waiting = num_workers * _PREFETCH + 2  # and one in use, one on its way
    needed = waiting * batch_bytes * local_processes
    if num_workers == 0 or needed <= free:
        return True
    logging.getLogger("m2f_lab").warning(
        f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB free; {num_workers * local_processes} workers need "
        f"{needed / 2**20:.0f} MiB there. Batches go through pipes instead, which takes longer. Start the Docker "
        f"container with --shm-size={math.ceil(1.1 * needed / 2**30)}g or --ipc=host, or lower data.num_workers."
    )
    return False


def _free_shared_memory() -> float:
    """Bytes; without limit on a system that keeps no such folder."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else math.inf


def transfer_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on a device; to a GPU, each travels while the one before it is used.

    Args:
        batches: in pinned memory for a GPU, or the host waits for each.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        # Not into memory of an earlier batch that is still read. The step to overlap with is queued after this.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            return batch.to(device, non_blocking=True), stream.record_event()

    for batch, arrived in _one_ahead(map(send, batches)):
        torch.cuda.current_stream(device).wait_event(arrived)
        yield batch


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each asked for before the one before it is given; an error is raised when its item is due."""

    def ask() -> T | Exception:
        try:
            return next(items)
        except Exception as error:  # the end as well
            return error

    due = ask()
    while not isinstance(due, StopIteration):
        if isinstance(due, Exception):
            raise due
        later = ask()
        yield due
        due = later


def _num_processors() -> int:
    """Those this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
