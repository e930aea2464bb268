"""Training, evaluation, prediction and explorers on an emulated CUDA device: no tensor is forgotten on the CPU.

A tensor that is left on the CPU makes an operation raise, as it would on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.emulated_cuda import Device, Kind, Log, emulated_cuda, why_not_emulated
from m2f_lab import build_model, recipes, train
from m2f_lab.data import Dataset, open_dataset
from m2f_lab.evaluation import evaluate
from m2f_lab.explore import (
    CounterfactualExplorer,
    ForceClass,
    LiveMonitor,
    MatchingExplorer,
    Mute,
    PaintAttention,
    PixelExplorer,
    QueryExplorer,
    Replay,
    SamplingExplorer,
    Unmask,
    collect_biographies,
)
from m2f_lab.explore.traps import TRAPS, Bench
from m2f_lab.model import Mask2Former
from m2f_lab.recipes import Recipe
from m2f_lab.scenes import write_ade20k, write_cityscapes
from tests.toy_training import StopAt

pytestmark = [
    pytest.mark.skipif(bool(why_not_emulated()), reason=why_not_emulated() or ""),
    pytest.mark.filterwarnings("ignore:Mean of empty slice"),
]

EVERYTHING = dict(object_mask_threshold=0.0, overlap_threshold=0.0)
SWIN = dict(
    backbone="swin_tiny_patch4_window7_224", drop_path_rate=0.3,
    backbone_options=dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7),
)  # fmt: skip


def small_recipe(**optimization: object) -> Recipe:
    settings = dict(max_iterations=2, evaluate_every=2, checkpoint_every=1, batch_size=2, precision="bfloat16")
    return recipes.debug_tiny().vary(
        model=SWIN,
        data=dict(crop_size=(64, 64), num_workers=0),
        loss=dict(num_points=64),
        optimization=settings | optimization,
    )


@dataclass(frozen=True)
class World:
    """What the uses below work on.

    Attributes:
        streets: folder of drawn streets
        out: an empty folder
        model: on the device
    """

    streets: Path
    rooms: Path
    out: Path
    model: Mask2Former

    @property
    def data(self) -> Dataset:
        return open_dataset("cityscapes", self.streets, "val")

    @property
    def image(self) -> np.ndarray:
        return self.data[0].image


def train_and_resume(world: World) -> None:
    with pytest.raises(KeyError, match="stop"):
        train(small_recipe(), world.streets, world.out, [StopAt(1, KeyError("stop"))])
    assert train(small_recipe(), world.streets, world.out, [LiveMonitor([world.image])]).iteration == 2


def train_as(**optimization: object) -> Callable[[World], None]:
    def use(world: World) -> None:
        assert train(small_recipe(**optimization), world.streets, world.out).iteration == 2

    return use


def predict(task: str, **options: object) -> Callable[[World], None]:
    def use(world: World) -> None:
        assert world.model.predict(world.image, task, **options).task == task
        with torch.autocast("cuda", torch.bfloat16):
            world.model.predict(world.image, task, **options)

    return use


def edit(world: World) -> None:
    replay = Replay(world.model, world.image)
    hidden = np.zeros(replay.grid(1), bool)
    hidden[0] = True
    edits = (Mute(0), ForceClass(1, 2), PaintAttention(1, 2, hidden), Unmask(2))
    replay.run(edits)
    tool = CounterfactualExplorer(world.model, world.image)
    for each in edits:
        tool.apply(each)
    tool.undo()


def match(world: World) -> None:
    MatchingExplorer(world.model, world.image, world.data[0].label_map)


def show(explorer: type) -> Callable[[World], None]:
    return lambda world: explorer(world.model, world.image)


def collect(world: World) -> None:
    collect_biographies(world.model, world.data)


def fall_into_traps(world: World) -> None:
    bench = Bench(
        world.model,
        open_dataset("cityscapes", world.streets, "train"),
        open_dataset("ade20k", world.rooms, "train"),
        count=1,
    )
    for trap in TRAPS:
        trap.try_on(bench)


USES: dict[str, Callable[[World], None]] = {
    "training, resumed": train_and_resume,
    "training in float16": train_as(precision="float16"),
    "training, deterministic": train_as(deterministic=True),
    "training in parts": train_as(accumulation_steps=2, checkpoint_backbone=True, precision="float32"),
    "evaluation": lambda world: evaluate(world.model, small_recipe(), world.streets),
    "semantic": predict("semantic"),
    "semantic, in every way": predict("semantic", tile=96, flip=True, scales=(0.5, 1.0), return_scores=True),
    "panoptic": predict("panoptic", **EVERYTHING),
    "instance": predict("instance"),
    "counterfactuals": edit,
    "queries": show(QueryExplorer),
    "sampling": show(SamplingExplorer),
    "pixels": show(PixelExplorer),
    "matching": match,
    "biographies": collect,
    "traps": fall_into_traps,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    streets = write_cityscapes(folder / "streets", num_train=3, num_val=2, size=(72, 136))
    return streets, write_ade20k(folder / "rooms", num_train=2, num_val=1, size=(64, 64))


@pytest.fixture(scope="module")
def on_cpu(folders) -> Mask2Former:
    torch.manual_seed(0)
    model = build_model(small_recipe().model)
    model.classes = open_dataset("cityscapes", folders[0], "val").classes
    return model


@pytest.fixture
def log() -> Iterator[Log]:
    with emulated_cuda() as log:
        yield log


@pytest.fixture
def world(log, folders, on_cpu, tmp_path) -> World:
    return World(*folders, tmp_path / "run", copy.deepcopy(on_cpu).to("cuda"))


@pytest.mark.parametrize("name", USES)
def test_everything_runs_on_a_gpu(name: str, world: World, log: Log) -> None:
    log.clear()
    USES[name](world)
    assert log.count(Kind.LAUNCH) > 100


# ---------------------------------------------------------------------------------- a tensor that is left on the CPU

KINDS: dict[str, Callable[[Tensor], bool]] = {
    "pixels": lambda x: x.dtype == torch.uint8,
    "images": lambda x: x.dtype == torch.uint8 and x.ndim == 4,
    "id maps": lambda x: x.dtype == torch.uint8 and x.ndim < 4,
    "labels": lambda x: x.dtype == torch.int64 and x.ndim == 1,
    "weights": lambda x: x.dtype == torch.float32 and x.ndim == 2,
}
FORGOTTEN = [
    pytest.param(name, KINDS[kind], id=f"{name}, {kind}")
    for name in USES
    for kind in (("images", "id maps", "labels", "weights") if name.startswith("training") else ("pixels",))
]


@pytest.mark.parametrize(("name", "is_forgotten"), FORGOTTEN)
def test_a_tensor_left_on_the_cpu_is_found(
    name: str, is_forgotten: Callable[[Tensor], bool], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of that kind do not move, as if `.to(device)` were missing."""
    upload, forgotten = Device.upload, []

    def forgetful(self: Device, source: Tensor, options: dict) -> Tensor:
        if is_forgotten(source):
            forgotten.append(source)
            return source.clone()
        return upload(self, source, options)

    monkeypatch.setattr(Device, "upload", forgetful)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        USES[name](world)
    assert forgotten
