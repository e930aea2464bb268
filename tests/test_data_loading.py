from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_lab.data import (
    Batch,
    DataError,
    Dataset,
    TrainingTransform,
    loading,
    open_dataset,
    training_batches,
    transfer_ahead,
)
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import Target
from tests.small_data import raw_label, write_folder

CONFIG = DataConfig(
    dataset="folder", crop_size=(8, 12), shortest_edges=(10, 12, 14), longest_edge=100, num_workers=0
)  # fmt: skip
# From Python 3.12 on, forking warns once torch has started threads. The workers use none of them.
forks = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return open_dataset("folder", write_folder(tmp_path, count=7), "train")


def batches(dataset: Dataset, config: DataConfig = CONFIG, **options) -> list[Batch]:
    return list(training_batches(dataset, config, **({"batch_size": 3, "seed": 5, "num_batches": 5} | options)))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.names == b.names
        assert torch.equal(a.images, b.images)
        for target, other in zip(a.targets, b.targets, strict=True):
            assert torch.equal(target.labels, other.labels)
            assert torch.equal(target.id_map, other.id_map)


def test_a_batch_is_typed_and_shaped_as_promised(dataset: Dataset) -> None:
    batch = batches(dataset)[0]
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (3, 3, 8, 12))
    assert len(batch) == len(batch.targets) == len(batch.names) == 3
    assert all(target.id_map.dtype == torch.uint8 and target.size == (8, 12) for target in batch.targets)
    assert all(target.masks is None for target in batch.targets)


@forks
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(dataset: Dataset, num_workers: int) -> None:
    assert_same(batches(dataset), batches(dataset, replace(CONFIG, num_workers=num_workers)))


@forks
def test_more_workers_than_processors_are_not_started(dataset: Dataset) -> None:
    """PyTorch would warn, and warnings are errors here."""
    assert_same(batches(dataset), batches(dataset, replace(CONFIG, num_workers=1000)))


@forks
@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_waiting_batches_hold_few_files_open(dataset: Dataset) -> None:
    """Workers hand tensors over as open files. One per image and target runs into the system's limit."""
    config = replace(CONFIG, num_workers=1)
    row = training_batches(dataset, config, batch_size=64, seed=5, num_batches=4)
    taken, most = 0, 0
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in row:
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before)
        taken += 1
    assert taken == 4
    assert most < 64


@pytest.mark.parametrize("start", [1, 2, 4])
def test_the_row_can_be_taken_up_anywhere(dataset: Dataset, start: int) -> None:
    assert_same(batches(dataset)[start:], batches(dataset, start_batch=start, num_batches=5 - start))


def test_starting_a_loader_leaves_the_random_numbers_alone(dataset: Dataset) -> None:
    """A resumed run starts one loader more than an uninterrupted one and must go on with the same numbers."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(dataset)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(dataset: Dataset) -> None:
    """Seven images in batches of three: the epochs end within batches."""
    names = [name for batch in batches(dataset, num_batches=14) for name in batch.names]
    epochs = [names[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == [f"{i:03}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4


def test_fewer_images_than_a_batch(dataset: Dataset) -> None:
    """A batch takes in several epochs, and an image that comes twice comes in two variants."""
    small = replace(dataset, image_paths=dataset.image_paths[:2], label_paths=dataset.label_paths[:2])
    batch = batches(small, batch_size=5, num_batches=1)[0]
    assert [sorted(batch.names[i : i + 2]) for i in (0, 2)] == [["000", "001"], ["000", "001"]]
    same = [i for i, name in enumerate(batch.names) if name == batch.names[0]]
    assert not torch.equal(batch.images[same[0]], batch.images[same[1]])


def test_a_single_image(dataset: Dataset) -> None:
    single = replace(dataset, image_paths=dataset.image_paths[:1], label_paths=dataset.label_paths[:1])
    assert batches(single, batch_size=4, num_batches=2)[1].names == ["000"] * 4


def test_processes_share_a_batch(dataset: Dataset) -> None:
    """Together they see what one process would see."""
    whole = batches(dataset, batch_size=4)
    parts = [batches(dataset, batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for batch, even, odd in zip(whole, *parts, strict=True):
        assert (batch.names[::2], batch.names[1::2]) == (even.names, odd.names)
        assert torch.equal(batch.images[1::2], odd.images)
        assert torch.equal(batch.images[::2], even.images)


def test_the_variation_depends_on_seed_epoch_and_image_alone(dataset: Dataset) -> None:
    """Not on where in the order the image comes: the documented generator gives the very example."""
    batch = batches(dataset, start_batch=2, num_batches=1)[0]  # positions 6, 7, 8: one of epoch 0, two of epoch 1
    for place, epoch in ((0, 0), (1, 1), (2, 1)):
        index = int(batch.names[place])
        image, target = TrainingTransform(CONFIG)(dataset[index], np.random.default_rng([5, epoch, index]))
        assert torch.equal(batch.images[place], image)
        assert torch.equal(batch.targets[place].id_map, target.id_map)


def test_seeds_differ(dataset: Dataset) -> None:
    assert [b.names for b in batches(dataset)] != [b.names for b in batches(dataset, seed=6)]


@forks
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_is_named_when_its_batch_is_due(dataset: Dataset, num_workers: int) -> None:
    Image.fromarray(raw_label() + 100).save(dataset.label_paths[4])
    with pytest.raises(DataError, match=r"annotations.training.004\.png holds the 5 unknown ids 100, 101"):
        batches(dataset, replace(CONFIG, num_workers=num_workers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "world_size": 2}, "positive multiple of world_size = 2"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"rank": 1}, r"rank must be in 0…0, got 1"),
        ({"seed": -1}, "none may be negative"),
    ],
)
def test_arguments_are_checked_at_once(dataset: Dataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_batches(dataset, CONFIG, **({"batch_size": 3, "seed": 5, "num_batches": 5} | options))


def test_no_batches(dataset: Dataset) -> None:
    assert batches(dataset, num_batches=0) == []


def test_batches_move_to_a_device(dataset: Dataset) -> None:
    batch = batches(dataset)[0]
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert all(target.id_map.device.type == target.labels.device.type == "meta" for target in moved.targets)
    assert moved.names == batch.names


class Transfers(TorchDispatchMode):
    """Bytes of everything that is copied to another device or type, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._to_copy.default:
            self.sizes.append(arguments[0].nbytes)
        assert function is not torch.ops.aten.cat.default, "a copy, and not into pinned memory"
        return function(*arguments, **options or {})


@pytest.mark.parametrize("images", [slice(0, 7), slice(2, 5)], ids=["whole", "part"])
def test_a_batch_travels_in_three_pieces(dataset: Dataset, images: slice) -> None:
    """Images, id maps and labels; so does a part of it that is a step of gradient accumulation."""
    whole = batches(dataset, batch_size=7, num_batches=1)[0]
    batch = Batch(whole.images[images], whole.targets[images], whole.names[images])
    with Transfers() as transfers:
        moved = batch.to("meta", non_blocking=True)
    size, segments = 8 * 12 * len(batch), sum(target.num_segments for target in batch.targets)
    assert sorted(transfers.sizes) == sorted([3 * size, size, 8 * segments])
    assert [t.num_segments for t in moved.targets] == [t.num_segments for t in batch.targets]


def test_a_batch_stays_where_it_is(dataset: Dataset) -> None:
    batch = batches(dataset, num_batches=1)[0]
    assert batch.to("cpu") is batch


def mixed_batch() -> Batch:
    """Masks of different sizes beside an id map, no segments at all, and numbers of two types."""
    targets = [
        Target(torch.tensor([2, 1]), masks=torch.rand(2, 3, 5) < 0.5),
        Target(torch.tensor([], dtype=torch.int64), id_map=torch.full((4, 4), 255, dtype=torch.uint8)),
        Target(torch.tensor([0]), masks=torch.rand(1, 7, 2) < 0.5),
        Target(torch.tensor([3, 3, 0], dtype=torch.int32), id_map=torch.randint(0, 3, (2, 6))),
    ]
    return Batch(torch.rand(4, 3, 8, 8), targets, ["a", "b", "c", "d"])


def assert_equal(found: Batch, expected: Batch) -> None:
    assert found.names == expected.names
    assert torch.equal(found.images, expected.images)
    for a, b in zip(found.targets, expected.targets, strict=True):
        assert vars(a).keys() == vars(b).keys()
        for name, value in vars(b).items():
            assert (getattr(a, name) is None) == (value is None)
            if value is not None:
                assert getattr(a, name).dtype == value.dtype
                assert torch.equal(getattr(a, name), value)


def test_any_batch_packs_and_unpacks() -> None:
    batch = mixed_batch()
    packed = loading._Packed.of(batch)
    assert len(packed.joined) == 4  # booleans, bytes, and integers of 32 and 64 bits
    unpacked = packed.unpack()
    assert_equal(unpacked, batch)
    again = loading._Packed.of(unpacked)  # what is packed is not copied again
    assert all(again.joined[dtype].data_ptr() == flat.data_ptr() for dtype, flat in packed.joined.items())
    reordered = Batch(unpacked.images, unpacked.targets[::-1], unpacked.names)
    assert_equal(loading._Packed.of(reordered).unpack(), reordered)


@forks
@pytest.mark.parametrize("enough", [True, False])
def test_batches_go_through_pipes_where_shared_memory_is_small(dataset, monkeypatch, caplog, enough) -> None:
    """Two workers with two batches each, and two that are out: 6 × 3 images × 8 × 12 pixels × 4 bytes."""
    config, needed = replace(CONFIG, num_workers=2), 6 * 3 * 8 * 12 * 4
    monkeypatch.setattr(loading, "_num_processors", lambda: 2)
    monkeypatch.setattr(loading, "_free_shared_memory", lambda: needed if enough else needed - 1)
    with caplog.at_level(logging.WARNING):
        found = batches(dataset, config)
    assert_same(found, batches(dataset))
    assert all(tensor.is_shared() == enough for batch in found for tensor in (batch.images, batch.targets[0].id_map))
    assert ("--shm-size=1g or --ipc=host" in caplog.text) == (not enough)


def test_all_processes_of_a_machine_share_its_memory(dataset, monkeypatch, caplog) -> None:
    monkeypatch.setattr(loading, "_free_shared_memory", lambda: 10_000)
    assert loading._fits_shared_memory(num_workers=1, batch_bytes=2500, world_size=1)
    assert not loading._fits_shared_memory(num_workers=1, batch_bytes=2500, world_size=2)
    assert "2 workers" in caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert loading._fits_shared_memory(num_workers=1, batch_bytes=2500, world_size=2)
    assert loading._fits_shared_memory(num_workers=0, batch_bytes=10**9, world_size=2)


def test_a_batch_is_asked_for_before_the_one_before_it_is_used() -> None:
    events = []

    def source() -> Iterator[int]:
        for i in range(3):
            events.append(f"load {i}")
            yield i
        raise DataError("the fourth cannot be read")

    row = loading._one_ahead(source())
    for _ in range(3):
        events.append(f"use {next(row)}")
    assert events == ["load 0", "load 1", "use 0", "load 2", "use 1", "use 2"]
    with pytest.raises(DataError, match="the fourth"):
        next(row)
    assert list(loading._one_ahead(iter([]))) == []
    assert list(loading._one_ahead(iter([1]))) == [1]


def test_a_gpu_waits_for_its_batch_and_not_for_the_next(dataset: Dataset, monkeypatch) -> None:
    """Told by streams that only write down what they are asked."""
    said = []

    class Stream:
        def record_event(self) -> int:
            said.append(f"send {sum(word.startswith('send') for word in said)}")
            return int(said[-1][5:])

        def wait_event(self, event: int) -> None:
            said.append(f"wait {event}")

        def wait_stream(self, stream: Stream) -> None:
            said.append("wait for what is queued")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(Batch, "to", lambda self, device, non_blocking: self)
    given = batches(dataset, num_batches=3)
    for number, batch in enumerate(transfer_ahead(iter(given), torch.device("cuda"))):
        assert batch is given[number]
        said.append(f"use {number}")
    queued = "wait for what is queued"  # before memory is written that an earlier batch had
    assert said == [
        *(queued, "send 0", queued, "send 1", "wait 0", "use 0"), *(queued, "send 2", "wait 1", "use 1"),
        *("wait 2", "use 2"),
    ]  # fmt: skip


@pytest.mark.gpu
def test_batches_are_pinned(dataset: Dataset) -> None:
    batch = batches(dataset, pin_memory=True)[0]
    assert batch.images.is_pinned()
    assert all(target.id_map.is_pinned() for target in batch.targets)
    moved = batch.to("cuda", non_blocking=True)
    assert torch.equal(moved.images.cpu(), batch.images)


@pytest.mark.gpu
def test_batches_that_travel_ahead_arrive_whole(dataset: Dataset) -> None:
    """A busy GPU, so that a batch would be read before it is there, or overwritten while it is read."""
    device, found = torch.device("cuda"), []
    for batch in transfer_ahead(iter(batches(dataset, pin_memory=True, num_batches=20)), device):
        torch.cuda._sleep(20_000_000)
        found.append(Batch(batch.images + 0, [replace(t, id_map=t.id_map + 0) for t in batch.targets], batch.names))
    assert_same([batch.to("cpu") for batch in found], batches(dataset, num_batches=20))


def test_images_without_labels_come_along(dataset: Dataset) -> None:
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(dataset.label_paths[0])
    row = batches(dataset, batch_size=7, num_batches=1)[0]
    assert [target.num_segments == 0 for target in row.targets] == [name == "000" for name in row.names]
