"""Read tensors from files of any origin, and never run code from them.

A pickle is a program: loading it may call any function its author wished. The readers here understand tensors,
arrays, numbers, text and containers of these, and refuse the rest:
- safetensors files hold nothing but tensors;
- torch's files are read with `torch.load(weights_only=True)`;
- plain pickles (detectron2's model zoo) with an unpickler that knows arrays and containers only, see `pickles.py`.

The kind of a file is read from its first bytes and from its keys, never from its name.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2f_lab.weights.pickles import PickledArray, UnsafeFileError, read_pickle

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema_state", "ema", "teacher")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and AveragedModel; of torch.compile
_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number of torch < 1.6
_GIT_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """Content of a file or a folder.

    Attributes:
        path: as it was given.
        tensors: the state dict.
        inside: where it was found, such as `model`; empty where the file is the state dict itself.
        config: `config.json` of the folder, if there is one.
        preprocessor: `preprocessor_config.json` of the folder, if there is one.
        passed_over: other entries of the file that hold weights, such as `model_ema`.
    """

    path: Path
    tensors: dict[str, Tensor]
    inside: str = ""
    config: dict | None = None
    preprocessor: dict | None = None
    passed_over: tuple[str, ...] = ()

    def without_prefix(self) -> Checkpoint | None:
        """The checkpoint without the first part of its names; None if they do not share one."""
        prefixes = {name.partition(".")[0] for name in self.tensors}
        if len(prefixes) != 1 or any("." not in name for name in self.tensors):
            return None
        (prefix,) = prefixes
        tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, inside=" → ".join(filter(None, [self.inside, f"{prefix}.*"])))


def read_checkpoint(path: str | Path, entry: str | None = None) -> Checkpoint:
    """Read a state dict from a file, or from a folder with one of `WEIGHT_FILES`.

    Args:
        path: of the file or folder
        entry: of the file, such as "model_ema"; by default the weights themselves, or their average where that is alone

    Raises:
        FileNotFoundError: there is no such file or folder, or nothing in it.
        UnsafeFileError: the file holds more than tensors and containers.
        ValueError: the file is damaged, of no known kind, or holds no state dict.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        weights = _weight_file(path)
        folder = path
    elif path.is_file():
        weights = path
        folder = path.parent if path.name in WEIGHT_FILES else None
    else:
        raise FileNotFoundError(f"There is no checkpoint {path}: expected a file, or a folder with {WEIGHT_FILES[0]}.")
    content = _read_shards(weights) if weights.name.endswith(".index.json") else _read_file(weights)
    tensors, inside, passed_over = _find_state_dict(content, weights, entry)
    return Checkpoint(
        path=path,
        tensors=tensors,
        inside=inside,
        config=_read_json(folder, "config.json"),
        preprocessor=_read_json(folder, "preprocessor_config.json"),
        passed_over=passed_over,
    )


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    nested = sorted({str(p.parent) for name in WEIGHT_FILES for p in folder.glob(f"*/{name}")})
    nested += sorted({str(p.parent) for name in WEIGHT_FILES for p in folder.glob(f"*/*/{name}")})
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".pkl", ".pth", ".pt", ".bin", ".safetensors"))
    if nested:
        hint = f"There are checkpoints further down: {', '.join(nested)}."
    elif files:
        hint = f"Give the path of one of its files instead: {', '.join(files)}."
    else:
        hint = "Is this the right folder?"
    raise FileNotFoundError(f"The folder {folder} has none of {', '.join(WEIGHT_FILES)}. {hint}")


def _read_json(folder: Path | None, name: str) -> dict | None:
    if folder is None or not (folder / name).is_file():
        return None
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / name} is not JSON: {error}. Copy or download the folder again.") from error
    return content if isinstance(content, dict) else None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read a checkpoint that is split over several files, which an index lists."""
    weight_map = (_read_json(index.parent, index.name) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files. Download the folder again.")
    content = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} points to {name!r}, outside its own folder; only files beside it are read.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} lists {name}, which is missing. Download the folder again.")
        content |= _read_file(index.parent / name)
    missing = sorted(set(weight_map) - set(content))
    if missing:
        raise ValueError(f"{index} lists {len(missing)} tensors that its files lack, such as {missing[0]}.")
    return content


def _read_file(path: Path) -> dict:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_GIT_LFS):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights themselves. Fetch them with `git lfs pull`.")
    if head.startswith((_ZIP, _OLD_TORCH)):
        read, kind = _read_torch, "torch checkpoint"
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:  # a length, then JSON
        read, kind = load_file, "safetensors file"
    elif head.startswith(b"\x80"):
        read, kind = read_pickle, "pickle"
    else:
        raise ValueError(
            f"{path} is no checkpoint: it begins with {head[:12]!r}. Expected a safetensors file, a torch checkpoint "
            "or a pickle of arrays."
        )
    try:
        content = read(path)
    except UnsafeFileError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"{path} cannot be read as a {kind}: {error}. Is the download complete?") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict: names and tensors.")
    return dict(content)


def _read_torch(path: Path) -> object:
    try:
        with path.open("rb") as file:  # by its path, torch would read some files by their name
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked_for = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked_for is None:
            raise ValueError("it is damaged") from error
        raise UnsafeFileError(
            f"{path} asks for {asked_for[1]}, which is neither a tensor nor a container: loading it would run code "
            "from the file, which never happens here. If you trust its origin, open it once where it was made and save "
            'the state dict alone: torch.save({"model": model.state_dict()}, "weights.pth").'
        ) from error


def _find_state_dict(content: dict, path: Path, entry: str | None) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Look through wrappers such as {"model": …, "optimizer": …}, and turn arrays into tensors.

    Returns:
        The tensors, where they were, and other entries with weights.
    """
    inside: list[str] = []
    entries = [name for name in (*_WRAPPERS, *_AVERAGES) if isinstance(content.get(name), Mapping)]
    if entry is not None and entry not in entries:
        raise ValueError(f"{path} has no weights under {entry!r}; there are {', '.join(entries) or 'no entries'}.")
    chosen = entries[0] if entry is None and entries else entry
    if chosen is not None:
        content = dict(content[chosen])
        inside.append(chosen)
    while wrapper := next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None):
        content = dict(content[wrapper])
        inside.append(wrapper)
    content = {name: value.array if isinstance(value, PickledArray) else value for name, value in content.items()}
    wrong = [name for name, value in content.items() if not isinstance(name, str) or not _is_array(value)]
    if wrong or not content:
        found = f"its entries {wrong[:6]} are no tensors" if wrong else "it is empty"
        raise ValueError(
            f"{path} holds no state dict: {found}. Expected names and tensors, or these under one of {_WRAPPERS}."
        )
    tensors = {name: _as_tensor(value) for name, value in content.items()}
    if all(name == "n_averaged" or name.startswith("module.") for name in tensors):
        tensors.pop("n_averaged", None)  # steps that an AveragedModel counted
    while prefix := next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        inside.append(f"{prefix}*")
    passed_over = tuple(name for name in entries if name != chosen)
    return tensors, " → ".join(inside), passed_over


def _is_array(value) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _as_tensor(value: Tensor | np.ndarray) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
