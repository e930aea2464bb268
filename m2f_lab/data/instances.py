"""Your own instances: a folder in ADE20K's layout with a number for each instance, or a mask for each.

    root/classes.txt                        see `folder`; classes of instances are marked "thing"
    root/images/training/x.png              validation/ beside it
    root/instances/training/x.png           0 is background, 1…N are instances; 8, 16 or 32 bits; or
    root/instances/training/x/*.png         a file for each instance, not 0 where it is; they may overlap
    root/annotations/training/x.png         classes, as in `folder`; needed for stuff, and for more than one thing

The class of an instance is that of its pixels in the annotation; where there is one thing only, it needs none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from m2f_lab.data.dataset import DataError, Dataset, SegmentDataset, abbreviate, read_label
from m2f_lab.data.segments import Segments


@dataclass(frozen=True)
class InstanceFolder(SegmentDataset):
    """Images with instances, and with stuff where the task is "panoptic". Open one with `open_dataset("folder", …)`.

    Attributes:
        instance_paths: of each image, a file of numbers or a folder of masks
    """

    instance_paths: tuple[Path, ...] = ()

    def segments(self, index: int) -> Segments:
        path = self.instance_paths[index]
        found = self._masks(path) if path.is_dir() else self._numbers(path)
        if self.label_paths:
            found = self._with_classes(found, index)
        if self.num_stuff:
            found = self._with_stuff(found, index)
        return found

    @property
    def num_stuff(self) -> int:
        return len(self.classes) - len(self.classes.things)

    def _numbers(self, path: Path) -> Segments:
        """Instances that are numbers in one file."""
        if not path.is_file():
            raise DataError(f"There is no {path}. Add it (all 0 where there is no instance), or take the image away.")
        ids = read_label(path)
        numbers = _numbers(ids)
        return Segments.from_id_map(ids, numbers, [min(self.classes.things)] * len(numbers))

    def _masks(self, folder: Path) -> Segments:
        """Instances that have a file each; where none overlap, one map holds them all."""
        files = _masks(folder)
        if not files:
            raise DataError(f"{folder} holds no masks (*.png); each instance of the image needs one.")
        masks = [read_label(file) != 0 for file in files]
        for file, mask in zip(files, masks, strict=True):
            if mask.shape != masks[0].shape:
                raise DataError(f"{file} is {mask.shape[::-1]} pixels, but {files[0].name} is {masks[0].shape[::-1]}.")
        labels, crowd = np.full(len(masks), min(self.classes.things)), np.zeros(len(masks), bool)
        if np.sum(masks, axis=0).max() > 1:
            return Segments(labels, crowd, masks[0].shape, shapes=tuple(masks))
        id_map = np.sum([(number + 1) * mask for number, mask in enumerate(masks)], axis=0, dtype=np.int32) - 1
        return Segments(labels, crowd, masks[0].shape, id_map=id_map)

    def _with_classes(self, found: Segments, index: int) -> Segments:
        """Instances with the classes of their pixels."""
        path = self.label_paths[index]
        label_map = self.to_label_map(self.raw_label(index), source=str(path))
        if label_map.shape != found.size:
            raise DataError(f"{path} and {self.instance_paths[index]} differ in size: they belong to one image.")
        labels = found.labels.copy()
        for number in range(len(found)):
            inside = np.unique(label_map[found.mask(number)]).tolist()
            if len(inside) != 1 or inside[0] not in self.classes.things:
                names = [
                    self.classes.names[label] if label != self.classes.ignore else "unlabelled" for label in inside
                ]
                file = self.instance_paths[index]
                instance = _masks(file)[number].name if file.is_dir() else _numbers(read_label(file))[number]
                raise DataError(
                    f"{path}: instance {instance} of {file.name} covers {abbreviate(names)}; each instance has the "
                    "pixels of one class that classes.txt marks as thing."
                )
            labels[number] = inside[0]
        return replace(found, labels=labels)

    def _with_stuff(self, found: Segments, index: int) -> Segments:
        """The instances, and after them a segment for each stuff class that the annotation shows."""
        if found.id_map is None:
            raise DataError(f"{self.instance_paths[index]}: instances overlap, which a panoptic annotation cannot say.")
        label_map = self.to_label_map(self.raw_label(index), source=str(self.label_paths[index]))
        stuff = sorted(set(np.unique(label_map).tolist()) - self.classes.things - {self.classes.ignore})
        id_map = found.id_map.copy()
        for number, label in enumerate(stuff, start=len(found)):
            id_map[(label_map == label) & (found.id_map < 0)] = number
        labels = np.concatenate([found.labels, np.array(stuff, np.int64)])
        return Segments(labels, np.zeros(len(labels), bool), found.size, id_map=id_map)


def with_instances(
    dataset: Dataset, split_folder: str, task: str, has_labels: bool, strict: bool = True
) -> InstanceFolder:
    """The images of a folder with their instances.

    Args:
        dataset: its images, classes and, if it has any, labels.
        split_folder: "training" or "validation".
        task: "instance", whose classes are the things only, or "panoptic".
        has_labels: whether the labels are there.
        strict: refuse images without instances now, instead of when they are read.

    Raises:
        DataError: images lack instances, no class is a thing, or labels are needed and not there.
    """
    classes_file, folder = dataset.root / "classes.txt", dataset.root / "instances" / split_folder
    things = sorted(dataset.classes.things)
    if not things:
        raise DataError(f'{classes_file} marks no class as a thing: write, for example, "cell #e8a33d thing".')
    if not has_labels and (len(things) > 1 or task == "panoptic"):
        raise DataError(
            f"There is no {dataset.root / 'annotations' / split_folder}, which says of what class each "
            "instance is, and where stuff is."
        )
    classes, train_ids = dataset.classes, dataset.train_ids
    if task == "instance":  # only things are predicted
        classes = classes.only_things()
        train_ids = {raw: things.index(k) if k in things else classes.ignore for raw, k in train_ids.items()}
    images = dataset.root / "images" / split_folder
    paths = [_of_image(folder / image.relative_to(images)) for image in dataset.image_paths]
    missing = [image.name for image, path in zip(dataset.image_paths, paths, strict=True) if not path.exists()]
    if missing and strict:
        raise DataError(
            f"{len(missing)} of {len(paths)} images have no instances in {folder}: {abbreviate(missing)}. Add a PNG "
            "of numbers (all 0 where there is no instance), or a folder of masks, or take the images away."
        )
    return InstanceFolder(
        name=dataset.name,
        root=dataset.root,
        split=dataset.split,
        classes=classes,
        image_paths=dataset.image_paths,
        label_paths=dataset.label_paths if has_labels else (),
        train_ids=train_ids,
        left_out=dataset.left_out,
        instance_paths=tuple(paths),
    )


def _numbers(ids: np.ndarray) -> list[int]:
    """Numbers of the instances of a file, ascending."""
    return [number for number in np.unique(ids).tolist() if number != 0]


def _masks(folder: Path) -> list[Path]:
    """Files of the instances of an image."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".png" and file.name[0] != ".")


def _of_image(path: Path) -> Path:
    masks = path.with_suffix("")
    return masks if masks.is_dir() else path.with_suffix(".png")
