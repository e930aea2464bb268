"""Checkpoints: folders that are complete or absent, and hold nothing but numbers and text.

    model.safetensors, config.json           the weights, as `m2f_lab.load_weights` reads them
    average/                                 their average in the same form, where the recipe asks for one
    training.safetensors, training.json      what else it takes to continue as if nothing had happened

No file is pickled: reading one cannot execute code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from m2f_lab.training.average import WeightAverage
from m2f_lab.training.distributed import DistributedContext
from m2f_lab.weights import load_weights, save_weights


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        iteration: optimiser steps taken; also the number of the next batch, and with the seed all random numbers.
        seconds: of training, over all sessions.
        num_rows: rows written to `metrics.jsonl`.
        evaluated: the iteration of the last evaluation.
        best: the row of the best evaluation.
        terms: names of the criterion's terms; None in checkpoints that did not note them.
    """

    iteration: int = 0
    seconds: float = 0.0
    num_rows: int = 0
    evaluated: int = 0
    best: dict | None = None
    terms: list[str] | None = None


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    average: WeightAverage | None = None,
) -> None:
    """Write everything that a run continues from; the folder's previous content stays until all is written."""

    def write(new: Path) -> None:
        save_weights(model, new)
        if average is not None:
            save_weights(average.model, new / "average")
        words = {"progress": asdict(progress), "scaler": scaler.state_dict()}
        save_file(_optimizer_tensors(model, optimizer), new / "training.safetensors")
        (new / "training.json").write_text(json.dumps(words, indent=2) + "\n")
        for name in ("training.safetensors", "training.json"):
            with (new / name).open("rb") as file:
                os.fsync(file.fileno())  # on the disk before the folder gets its name, in case of a power cut

    replace_folder(folder, write)


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
) -> Progress:
    """Read what `save` wrote into the model, the optimiser, the scaler and the average.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    load_weights(model, folder)
    if average is not None:
        load_weights(average.model, folder / "average")
    _restore_optimizer(model, optimizer, load_file(file := folder / "training.safetensors"), file)
    words = json.loads((folder / "training.json").read_text())
    if words["scaler"]:
        scaler.load_state_dict(words["scaler"])
    return Progress(**words["progress"])


def share(
    world: DistributedContext,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None = None,
) -> None:
    """Give all processes the main one's optimiser, scaler and average; the others may run where its folder is not.

    Weights and buffers are left out: `DistributedContext.wrap_ddp` sends those.
    """
    if world.size == 1:
        return
    scale = world.from_main(scaler.state_dict)
    tensors = world.broadcast(_optimizer_tensors(model, optimizer))
    averaged = {} if average is None else world.broadcast(average.model.state_dict())
    if not world.is_main:
        if average is not None:
            average.model.load_state_dict(averaged)
        _restore_optimizer(model, optimizer, tensors, "the main process's checkpoint")
        if scale:
            scaler.load_state_dict(scale)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's averages and step counts by parameter name, for example `exp_avg.backbone.network.conv1.weight`."""
    return {
        f"{kind}.{name}": value.contiguous()  # safetensors refuses channels-last tensors
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], source: Path | str
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, saved in tensors.items():
        kind, name = key.split(".", 1)
        if name not in parameters:
            raise ValueError(
                f"{source} holds the optimiser's state of {name!r}, but the model has "
                "no such parameter. The checkpoint was written by another version; start over in another folder."
            )
        parameter = parameters[name]
        if saved.ndim == 0:  # the step count
            value = saved.to(parameter.device)
        else:  # in the parameter's own memory format, which the fused optimiser insists on
            value = torch.empty_like(parameter, requires_grad=False).copy_(saved)
        optimizer.state[parameter][kind] = value


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder so that, whenever the process is killed, the old or the new content can be found, complete.

    Args:
        folder: the folder; it may be absent.
        write: fills the new, empty folder that it is given.
    """
    folder = Path(folder)
    new, old = _siblings(folder)
    recover_folder(folder)
    new.mkdir(parents=True)
    write(new)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> bool:
    """Undo a replacement that was cut short; return True if the folder is there now."""
    new, old = _siblings(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder.exists()


def _siblings(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
