"""Predictions for the same few images over a run, as small label maps stored beside it.

    <run>/predictions/classes.json      names and colours
    <run>/predictions/0/image.png       the first image, small
    <run>/predictions/0/000300.png      its label map after 300 iterations: a picture whose palette are the classes

H/W height/width of an image, h/w of its small copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore.parts.reading import nearest
from m2f_lab.inference import predict
from m2f_lab.inference.images import fitted_size, resize_image
from m2f_lab.model import Mask2Former
from m2f_lab.recipes import EvaluationConfig

LONGEST_EDGE = 192
"""Of the stored copies, in pixels: as much as a strip of pictures shows."""


class Snapshots:
    """The stored predictions of a run. A run without any has an empty one.

    Attributes:
        folder: where they are.
        images: small copies. N × uint8 [h, w, 3]
        label_maps: iteration → one small label map per image. {iteration: N × integers [h, w]}
        classes: names and colours; None before the first prediction.
    """

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "predictions"
        self.images: list[np.ndarray] = []
        self.label_maps: dict[int, list[np.ndarray]] = {}
        self.classes: Classes | None = None
        self.load()

    def load(self) -> None:
        """Read the files that are new. An iteration counts once the maps of all images are there."""
        files = self.folder.glob("*/image.png")
        self.images = [_read(file) for file in sorted(files, key=lambda file: int(file.parent.name))]
        if (self.folder / "classes.json").is_file():
            words = json.loads((self.folder / "classes.json").read_text(encoding="utf-8"))
            self.classes = Classes.from_json({"things": ()} | words)  # earlier releases did not store them
        if not self.images:
            return
        stored = [{int(file.stem) for file in (self.folder / str(i)).glob("[0-9]*.png")} for i in self._numbers]
        for iteration in sorted(set.intersection(*stored) - self.label_maps.keys()):
            self.label_maps[iteration] = [_read(self._file(i, iteration)) for i in self._numbers]

    def keep(self, iterations: set[int]) -> None:
        """Delete the predictions of all other iterations: a run that continues from a checkpoint makes them again."""
        for iteration in self.label_maps.keys() - iterations:
            del self.label_maps[iteration]
            for i in self._numbers:
                self._file(i, iteration).unlink(missing_ok=True)

    def begin(self, images: Sequence[np.ndarray]) -> None:
        """Make ready to predict these images, uint8 [H, W, 3] each; predictions for others are deleted."""
        small = [resize_image(image, fitted_size(image.shape[:2], None, LONGEST_EDGE)) for image in images]
        if len(small) == len(self.images) and all(map(np.array_equal, small, self.images)):
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.label_maps, self.images = {}, small
        for i, image in enumerate(small):
            (self.folder / str(i)).mkdir(parents=True)
            _write(self.folder / str(i) / "image.png", partial(Image.fromarray(image).save, format="png"))

    def add(self, iteration: int, model: Mask2Former, images: Sequence[np.ndarray], sizes: EvaluationConfig) -> None:
        """Predict the label maps of all images and store them.

        Args:
            iteration: of the run.
            model: at that iteration, with `classes`.
            images: those that `begin` was given.
            sizes: how large the model sees them, as in evaluation.
        """
        predictions = [predict(model, image, **sizes.edges) for image in images]
        self.classes = classes = model.classes
        words = json.dumps(classes.to_json(), ensure_ascii=False) + "\n"
        _write(self.folder / "classes.json", partial(Path.write_text, data=words, encoding="utf-8"))
        self.label_maps[iteration] = []
        for i, (prediction, image) in enumerate(zip(predictions, self.images, strict=True)):
            # Small by leaving pixels out: classes have no mean.
            labels = nearest(prediction.label_map, image.shape[:2]).astype(classes.label_dtype)
            self.label_maps[iteration].append(labels)
            picture = Image.fromarray(labels)
            if picture.mode == "L":  # a palette is for bytes
                picture.putpalette(np.array(classes.colors, np.uint8).tobytes())
            _write(self._file(i, iteration), partial(picture.save, format="png"))

    @property
    def _numbers(self) -> range:
        return range(len(self.images))

    def _file(self, image: int, iteration: int) -> Path:
        return self.folder / str(image) / f"{iteration:06}.png"


def evenly_spaced(items: Sequence, most: int) -> list:
    """Choose at most `most` items at even distances, among them the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, most)]


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one step: other processes that watch the run never read half of it."""
    new = file.with_suffix(".tmp")
    write(new)
    os.replace(new, file)
