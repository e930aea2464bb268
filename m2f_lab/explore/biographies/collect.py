"""Collect query biographies: one pass over images, in memory that does not grow with their number.

Q queries, K classes, h/w height/width of the grid that masks are read on, G cells along each edge of a heat map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from m2f_lab.data import Classes, Dataset, open_dataset
from m2f_lab.explore.biographies.data import SIZE_BINS, Biographies
from m2f_lab.explore.parts.labels import known_classes
from m2f_lab.explore.parts.reading import grid_size, read_masks, winning_queries
from m2f_lab.inference.images import as_rgb, fitted_size, resize_image
from m2f_lab.inference.predict import look
from m2f_lab.references import is_reference, resolve_loaded
from m2f_lab.structures import Output
from m2f_lab.training import Run

MAX_CELLS = 128 * 128
"""Masks are read at stride 4, or more coarsely where that would be more cells than this."""

HEAT_CELLS = 32
"""Along each edge of a heat map."""


class BiographyCollector:
    """Adds up what queries do, image by image; the order of the images does not matter.

    collector = BiographyCollector()
    for image in images:
        collector.add(model(image), image)
    biographies = collector.result()
    """

    def __init__(self) -> None:
        self.num_images = self.num_pixels = 0
        self._sums: dict[str, np.ndarray | float] = {}

    @torch.no_grad()
    def add(self, output: Output, image: np.ndarray, index: int = 0) -> None:
        """Take in one image.

        Args:
            output: of the model; only its last prediction is used.
            image: input of the model. uint8 [H, W, 3]
            index: which image of the batch the output's is.

        Raises:
            ValueError: the output is of an image of another size, or of a model with other queries or classes.
        """
        if image.shape[:2] != tuple(output.image_size):
            raise ValueError(
                f"The output is of an image of {output.image_size} pixels, but this one has {image.shape[:2]}."
            )
        counted = _count(output, index, image)
        shapes = {name: np.shape(value) for name, value in counted.items()}
        if self._sums and shapes != {name: np.shape(value) for name, value in self._sums.items()}:
            raise ValueError(
                "All images must be predicted by one model: the numbers of queries or classes differ "
                f"(now {shapes['won_pixels']}, before {self._sums['won_pixels'].shape})."
            )
        self._sums = {name: self._sums.get(name, 0) + value for name, value in counted.items()}
        self.num_images += 1
        self.num_pixels += image.shape[0] * image.shape[1]

    def result(self, classes: Classes | None = None, source: dict | None = None) -> Biographies:
        """The statistics so far.

        Args:
            classes: names and colours of the classes.
            source: of the numbers, to be stored with them; anything that JSON can hold.

        Raises:
            ValueError: there was no image, or the number of classes is another.
        """
        if self.num_images == 0:
            raise ValueError("Query biographies need at least one image; there was none.")
        sums = dict(self._sums)
        if classes is not None:
            known_classes(classes, sums["won_pixels"].shape[1])
        overlap, heat = sums.pop("overlap"), sums.pop("heat")
        return Biographies(
            num_images=self.num_images,
            num_pixels=self.num_pixels,
            overlap=overlap / np.maximum(sums["together"], 1),
            heat=np.minimum(heat / self.num_images, 1).astype(np.float32),
            mean_image=np.rint(sums.pop("mean_image") / self.num_images).astype(np.uint8),
            aspect=float(sums.pop("aspect")) / self.num_images,
            classes=classes,
            source={} if source is None else source,
            **sums,
        )


def collect_biographies(
    model: Callable[[torch.Tensor], Output],
    images: Dataset | Iterable[str | Path | Image.Image | np.ndarray],
    *,
    classes: Classes | None = None,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    limit: int | None = None,
    progress: bool = False,
    source: dict | None = None,
) -> Biographies:
    """Run a model over images and count what each query does.

    Args:
        model: a Mask2Former, or any callable images [1, 3, H, W] → Output.
        images: a data set, whose labels are not read; or paths, PIL images or uint8 [H, W, 3], for example a generator.
        classes: names and colours; by default those of the model, or of the data set.
        shortest_edge: resize images to this before the model sees them, in pixels; by default they are not resized.
        longest_edge: but to no more than this, in pixels.
        limit: only the first so many images.
        progress: show a progress bar.
        source: see `Biographies.source`.

    Raises:
        ValueError: there is no image, or model and class names do not fit.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a positive number of images, got {limit}.")
    if classes is None:
        classes = getattr(model, "classes", None) or getattr(images, "classes", None)
    paths = images.image_paths if isinstance(images, Dataset) else images
    total = min(len(paths), limit or len(paths)) if hasattr(paths, "__len__") else limit
    collector = BiographyCollector()
    for image in tqdm(islice(paths, limit), "biographies", total, unit="image", disable=not progress):
        pixels = as_rgb(image)
        seen = resize_image(pixels, fitted_size(pixels.shape[:2], shortest_edge, longest_edge))
        collector.add(look(model, seen), seen)
    return collector.result(classes, source)


def biographies_of(
    run: Run | str | Path,
    data_root: str | Path,
    *,
    which: str = "best",
    split: str = "val",
    limit: int | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Biographies:
    """Read the biographies of a run's queries from its folder `biographies`, or collect and store them there.

    Stored ones are read if weights, names of images and sizes are the same. One printed line says what was done.

    Args:
        run: a run, or its folder.
        data_root: the folder of the data set that the run's recipe names.
        which: "best" or "last": which weights. "best" is "last" where nothing was evaluated yet.
        split: "val" or "train".
        limit: only the first so many images.
        device: where the model runs.
        progress: show a progress bar while collecting.

    Raises:
        FileNotFoundError: the run has no checkpoint yet, or there is no such run.
        DataError: the data set is not there.
    """
    run = run if isinstance(run, Run) else Run(run)
    recipe, folder = run.recipe, run.path / "biographies"
    if is_reference(recipe.data.dataset):
        resolve_loaded(recipe.data.dataset)  # the run may be a stranger's: nothing is imported because it says so
    dataset = open_dataset(recipe.data.dataset, data_root, split, strict=False)
    names = [dataset.sample_name(index) for index in range(len(dataset))][:limit]
    source = {
        "weights": hashlib.sha256(np.memmap(run.weights(which) / "model.safetensors", mode="r")).hexdigest(),
        "images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "split": split,
        **recipe.evaluation.edges,
    }
    with suppress(FileNotFoundError, ValueError):  # nothing there, or of another version
        stored = Biographies.load(folder)
        if stored.source == source:
            print(f"Read the biographies of {stored.num_images} images from {run.path.name}/biographies.")
            return stored
    model = run.model(which).to(device)
    options = {"limit": limit, "progress": progress, "source": source}
    biographies = collect_biographies(model, dataset, **options, **recipe.evaluation.edges)
    biographies.save(folder)
    print(f"Collected the biographies of {biographies.num_images} images into {run.path.name}/biographies.")
    return biographies


def _count(output: Output, index: int, image: np.ndarray) -> dict[str, np.ndarray | float]:
    """Statistics of the queries in one image, and the image itself: summands of the fields of `Biographies`."""
    last = replace(output, class_logits=output.class_logits[-1:], masks=output.masks[-1:])
    probabilities = last.class_logits[0][index].float().softmax(-1)  # (Q, K+1)
    masks = read_masks(last, index, grid_size(output.image_size, MAX_CELLS))[0]  # (Q, h, w)
    num_queries, num_classes = len(probabilities), output.num_classes
    classes = probabilities[:, :-1]

    label = torch.einsum("qk,qhw->khw", classes, masks).argmax(0).flatten()  # (h * w,)
    winner = winning_queries(probabilities, masks).flatten()
    cells = torch.bincount(winner * num_classes + label, minlength=num_queries * num_classes).view_as(classes)

    likeliest = probabilities.argmax(1)
    areas = (masks > 0.5).flatten(1).float()  # (Q, h * w)
    size = areas.mean(1)
    active = (likeliest < num_classes) & (size > 0)
    bins = (size.sqrt() * SIZE_BINS).long().clamp(max=SIZE_BINS - 1)
    both = areas @ areas.T
    union = areas.sum(1)[:, None] + areas.sum(1) - both
    together = active[:, None] & active
    overlap = torch.where(together & (likeliest[:, None] == likeliest), both / union.clamp(min=1), 0.0)

    claimed = masks * (1 - probabilities[:, -1])[:, None, None]
    counted = {
        "won_pixels": cells,
        "won_images": cells.any(1),
        "predicted": F.one_hot(likeliest, num_classes + 1),
        "active_images": active,
        "size_sum": torch.where(active, size, 0.0),
        "size_histogram": F.one_hot(bins, SIZE_BINS) * active[:, None],
        "heat": F.adaptive_avg_pool2d(claimed, HEAT_CELLS),
        "overlap": overlap,
        "together": together,
    }
    # Summed in double precision, which not every device has.
    arrays = {name: values.cpu().numpy() for name, values in counted.items()}
    arrays = {name: array.astype(np.float64 if array.dtype.kind == "f" else np.int64) for name, array in arrays.items()}
    small = resize_image(image, (2 * HEAT_CELLS, 2 * HEAT_CELLS))
    return arrays | {
        "won_pixels": arrays["won_pixels"] * (np.prod(output.image_size) / len(winner)),
        "mean_image": small.astype(np.float64),
        "aspect": image.shape[1] / image.shape[0],
    }
