"""From a data set to an endless row of training batches, the same whatever loads them.

B batch, H/W height/width, N images in the data set.

Position p of the row is image p % N of epoch p // N, in an order drawn from (seed, epoch). How the image is varied is
drawn from (seed, epoch, image). So batch n can be made without making those before it: any number of workers gives
the same batches, a run resumes at any batch, and a batch may begin in one epoch and end in the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from m2f_lab.data.dataset import Dataset
from m2f_lab.data.transforms import TrainingTransform
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import Target


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
        targets = [target.to(device, non_blocking=non_blocking) for target in self.targets]
        return Batch(self.images.to(device, non_blocking=non_blocking), targets, self.names)

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), [target.pin_memory() for target in self.targets], self.names)


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
    loader = DataLoader(
        _Examples(dataset, TrainingTransform(config), seed),
        batch_sampler=_Row(
            len(dataset), seed, batch_size, range(start_batch, start_batch + num_batches), rank, world_size
        ),
        num_workers=min(config.num_workers, _num_processors()),
        collate_fn=_Packed.collate,
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
    """A batch on its way from a worker, as three tensors rather than two per image and one.

    While a tensor waits between two processes it holds a file descriptor, and a system gives a process only so many:
    16 workers with two batches of 16 images each would need a thousand.
    """

    images: Tensor  # (B, 3, H, W)
    id_maps: Tensor  # (B, H, W)
    labels: Tensor  # of all images, one after the other
    num_segments: list[int]
    names: list[str]

    @classmethod
    def collate(cls, examples: list[tuple[Tensor, Target, str]]) -> _Packed:
        images, targets, names = zip(*examples, strict=True)
        return cls(
            images=torch.stack(images),
            id_maps=torch.stack([target.id_map for target in targets]),
            labels=torch.cat([target.labels for target in targets]),
            num_segments=[target.num_segments for target in targets],
            names=list(names),
        )

    def pin_memory(self) -> _Packed:
        tensors = (tensor.pin_memory() for tensor in (self.images, self.id_maps, self.labels))
        return _Packed(*tensors, self.num_segments, self.names)

    def unpack(self) -> Batch:
        labels = self.labels.split(self.num_segments)
        targets = [Target(labels=own, id_map=id_map) for own, id_map in zip(labels, self.id_maps, strict=True)]
        return Batch(self.images, targets, self.names)


def _num_processors() -> int:
    """Those this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
