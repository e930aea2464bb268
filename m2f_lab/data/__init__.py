"""From files to training batches: readers, transforms, loading, and an audit that finds what would train wrongly.

dataset = open_dataset("ade20k", "data/ADEChallengeData2016", "train")
print(audit(dataset, limit=200))
batches = training_batches(dataset, recipe.data, batch_size=16, seed=0, num_batches=100)

Scenes to practise on: m2f_lab.scenes.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from m2f_lab.data.ade20k import open_ade20k
from m2f_lab.data.audit import AuditReport, audit
from m2f_lab.data.cityscapes import open_cityscapes, split_instance_ids
from m2f_lab.data.coco import open_coco
from m2f_lab.data.colors import colorize, distinct_colors, overlay
from m2f_lab.data.dataset import Classes, DataError, Dataset, Sample, SegmentDataset, read_image, read_label
from m2f_lab.data.folder import open_folder
from m2f_lab.data.loading import Batch, training_batches, transfer_ahead
from m2f_lab.data.mapillary import open_mapillary
from m2f_lab.data.segments import Segments
from m2f_lab.data.transforms import TrainingTransform, resized_size
from m2f_lab.references import is_reference, resolve

__all__ = [
    "AuditReport",
    "Batch",
    "Classes",
    "DataError",
    "Dataset",
    "Sample",
    "SegmentDataset",
    "Segments",
    "TrainingTransform",
    "audit",
    "colorize",
    "distinct_colors",
    "open_dataset",
    "overlay",
    "read_image",
    "read_label",
    "resized_size",
    "split_instance_ids",
    "training_batches",
    "transfer_ahead",
]

_READERS = {
    "ade20k": open_ade20k,
    "cityscapes": open_cityscapes,
    "coco": open_coco,
    "mapillary": open_mapillary,
    "folder": open_folder,
}


def open_dataset(name: str, root: str | Path, split: str, *, strict: bool = True, task: str = "semantic") -> Dataset:
    """Open a data set.

    Args:
        name: "ade20k", "cityscapes", "coco", "mapillary", "folder" for your own images in ADE20K's layout with a
            classes.txt, or "package.module:function" for a reader of your own: (root, split) → Dataset, which may also
            take strict and task
        root: the data set's folder; data/README.md shows the layouts
        split: "train" or "val"
        strict: refuse images without labels now rather than when their turn comes. False is for `audit`.
        task: "semantic", "panoptic" or "instance": which of its annotations to read

    Raises:
        DataError: folders or labels are missing, or there are no images.
        ValueError: there is no reader of this name.
    """
    if name not in _READERS and not is_reference(name):
        raise ValueError(
            f"There is no data set called {name!r}; there are {', '.join(_READERS)}, and readers of your own by "
            '"package.module:function".'
        )
    reader = _READERS.get(name) or resolve(name)
    options = {"strict": strict, "task": task}
    taken = {option: value for option, value in options.items() if option in inspect.signature(reader).parameters}
    if "task" not in taken and name in _READERS and task != "semantic":
        raise ValueError(f'{name!r} has no annotations for task={task!r}; it is read for task="semantic" only.')
    return reader(root, split, **taken)
