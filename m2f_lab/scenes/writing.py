"""Draw single scenes, and write sets of them in the layouts of Cityscapes and ADE20K.

H/W height/width.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from m2f_lab.data.dataset import DataError
from m2f_lab.scenes import room, street

MARKER = "scenes.json"
VERSION = 1  # version of the drawings; raise it when a seed gives another picture
_TOWNS = {"train": ("farbdorf", "kreidestadt", "tuschingen"), "val": ("papierburg", "pinselbach")}
_VALIDATION = 500_000  # distance of the first validation seed from the first training seed


@dataclass(frozen=True)
class Scene:
    """A picture and its exact labels.

    A pixel belongs to the object that covers most of it.

    Attributes:
        image: uint8 [H, W, 3]
        class_ids: raw ids, as in a label file: labelIds of Cityscapes, or ids of ADE20K. uint8 [H, W]
        instance_ids: class id × 1000 + n for the n-th instance of a thing, the class id alone for stuff. int32 [H, W]
    """

    image: np.ndarray
    class_ids: np.ndarray
    instance_ids: np.ndarray


def draw_street(seed: int, size: tuple[int, int] = (256, 512)) -> Scene:
    """Draw a street with Cityscapes' labelIds; the same seed always gives the same street.

    Args:
        seed: any integer
        size: height and width in pixels
    """
    return Scene(*street.draw(seed, _checked(size)))


def draw_room(seed: int, size: tuple[int, int] = (256, 256)) -> Scene:
    """Draw a room with ADE20K's ids, 0 for "other"; the same seed always gives the same room.

    Args:
        seed: any integer
        size: height and width in pixels
    """
    return Scene(*room.draw(seed, _checked(size)))


def write_cityscapes(
    root: str | Path, num_train: int = 200, num_val: int = 50, size: tuple[int, int] = (256, 512), seed: int = 0
) -> Path:
    """Write drawn streets in Cityscapes' layout: leftImg8bit, and gtFine with labelIds and instanceIds.

    Does nothing if they exist already. An interrupted call leaves nothing behind.

    Args:
        root: the folder to write; it does not exist, is empty, or holds the result of the same call
        num_train, num_val: scenes per split
        size: height and width in pixels
        seed: seed of the whole set; training and validation share no scene

    Returns:
        root

    Raises:
        DataError: the folder holds something else, which is never overwritten.
    """

    def write(folder: Path, split: str, index: int, scene: Scene) -> None:
        town = _TOWNS[split][index % len(_TOWNS[split])]
        name = f"{town}_{index:06d}_000019"
        images, labels = folder / "leftImg8bit" / split / town, folder / "gtFine" / split / town
        _save(scene.image, images / f"{name}_leftImg8bit.png")
        _save(scene.class_ids, labels / f"{name}_gtFine_labelIds.png")
        _save(scene.instance_ids.astype(np.uint16), labels / f"{name}_gtFine_instanceIds.png")

    return _write(root, "cityscapes", num_train, num_val, size, seed, draw_street, write)


def write_ade20k(
    root: str | Path, num_train: int = 200, num_val: int = 50, size: tuple[int, int] = (256, 256), seed: int = 0
) -> Path:
    """Write drawn rooms in the layout of ADEChallengeData2016: images and annotations.

    See `write_cityscapes` for the arguments.
    """

    def write(folder: Path, split: str, index: int, scene: Scene) -> None:
        part, name = {"train": "training", "val": "validation"}[split], f"ADE_{split}_{index + 1:08d}"
        _save(scene.image, folder / "images" / part / f"{name}.jpg")
        _save(scene.class_ids, folder / "annotations" / part / f"{name}.png")

    return _write(root, "ade20k", num_train, num_val, size, seed, draw_room, write)


def render_sample(root: str | Path, num_cityscapes: int = 200, num_ade20k: int = 200, seed: int = 0) -> dict[str, Path]:
    """Write the sample that the notebooks use: root/cityscapes and root/ADEChallengeData2016.

    `open_dataset("cityscapes" | "ade20k", root, …)` finds both. A quarter as many scenes are for validation.
    """
    root = Path(root)
    return {
        "cityscapes": write_cityscapes(root / "cityscapes", num_cityscapes, -(-num_cityscapes // 4), seed=seed),
        "ade20k": write_ade20k(root / "ADEChallengeData2016", num_ade20k, -(-num_ade20k // 4), seed=seed),
    }


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if min(height, width) < 16:
        raise ValueError(f"A scene is (height, width) pixels of at least 16 × 16, got {size}.")
    return int(height), int(width)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 92} if path.suffix == ".jpg" else {"compress_level": 1}
    Image.fromarray(pixels).save(path, **options)


def _write(
    root: str | Path,
    layout: str,
    num_train: int,
    num_val: int,
    size: tuple[int, int],
    seed: int,
    draw: Callable[[int, tuple[int, int]], Scene],
    write: Callable[[Path, str, int, Scene], None],
) -> Path:
    """Write a set into a draft folder and move it into place when it is complete."""
    if num_train < 1 or num_val < 1 or max(num_train, num_val) > _VALIDATION:
        raise ValueError(f"Each split has 1 to {_VALIDATION} scenes, got {num_train} and {num_val}.")
    root = Path(root).expanduser().resolve()
    wanted = {
        "version": VERSION, "layout": layout, "num_train": num_train,
        "num_val": num_val, "size": list(_checked(size)), "seed": seed,
    }  # fmt: skip
    if _is_there(root, wanted):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for split, count in (("train", num_train), ("val", num_val)):
            first = seed * 2 * _VALIDATION + (_VALIDATION if split == "val" else 0)
            for index in range(count):
                write(draft, split, index, draw(first + index, size))
        (draft / MARKER).write_text(json.dumps({"drawn by": "m2f_lab.scenes", **wanted}, indent=2) + "\n")
        draft.chmod(0o755)  # mkdtemp's folders are private
        if not _is_there(root, wanted):  # another process may have been faster
            if root.exists():
                root.rmdir()
            draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _is_there(root: Path, wanted: dict) -> bool:
    """Return True if the folder holds exactly the wanted scenes, False if it holds nothing.

    Raises:
        DataError: it holds something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / MARKER
    if not marker.is_file():
        raise DataError(
            f"{root} holds something that was not drawn by m2f_lab, perhaps a real data set, and is not overwritten. "
            "Name another folder for the scenes."
        )
    found = json.loads(marker.read_text())
    differs = [f"{k} is {found.get(k)!r}, not {v!r}" for k, v in wanted.items() if found.get(k) != v]
    if differs:
        raise DataError(
            f"{root} holds other drawn scenes ({'; '.join(differs)}). Delete the folder to draw them again, or name "
            "another one."
        )
    return True
