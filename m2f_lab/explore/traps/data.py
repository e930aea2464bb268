"""Traps between a label file and a training example: ids, padding, resizing.

H/W height/width of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from m2f_lab.data import Classes, Dataset, Sample, TrainingTransform, read_label, split_instance_ids
from m2f_lab.data.cityscapes import CLASSES, TRAIN_IDS
from m2f_lab.data.transforms import crop_of_resized_image, crop_of_resized_labels
from m2f_lab.explore.traps.measures import wrong_pixels
from m2f_lab.explore.traps.trap import Bench, Finding, Trap
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import IGNORE

# What labelIds of Cityscapes mean to the evaluation server, for pictures of label files.
UNTRAINED = len(CLASSES)
AS_SERVED = Classes((*CLASSES.names, "not evaluated"), (*CLASSES.colors, (150, 150, 150)))


def as_served(label_ids: np.ndarray) -> np.ndarray:
    """LabelIds → what the server takes them for: one of 19 classes, or nothing it evaluates. [H, W]"""
    table = np.array([UNTRAINED if train_id == IGNORE else train_id for train_id in TRAIN_IDS.values()], np.uint8)
    return table[label_ids]


# --- ids --------------------------------------------------------------------------------------------------------------


Convert = Callable[[Dataset, np.ndarray], np.ndarray]
"""Labels of a file → classes, or the other way round."""


def wrongly_read(dataset: Dataset, index: int, to_label_map: Convert) -> Finding:
    """Pixels that get another class than the file says."""
    sample = dataset[index]
    found = to_label_map(dataset, dataset.raw_label(index))
    return wrong_pixels(sample.image, sample.label_map, found, dataset.classes)


def rooms_read_with(bench: Bench, to_label_map: Convert) -> Finding:
    return wrongly_read(bench.rooms, bench.room, to_label_map)


def streets_read_with(bench: Bench, to_label_map: Convert) -> Finding:
    return wrongly_read(bench.streets, 0, to_label_map)


def streets_written_with(bench: Bench, to_raw: Convert) -> Finding:
    """Pixels of a perfect prediction that the evaluation server takes for something else."""
    street = bench.samples[0]
    known = street.label_map != IGNORE
    found = as_served(to_raw(bench.streets, np.where(known, street.label_map, 0)))
    return wrong_pixels(street.image, street.label_map, np.where(known, found, IGNORE), AS_SERVED)


def instances_split_with(bench: Bench, split: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Finding:
    """Pixels whose labelId means something else than that in the file beside."""
    path = bench.streets.label_paths[0]
    label_ids, _ = split(read_label(path.with_name(path.name.replace("_labelIds", "_instanceIds"))))
    truth = as_served(bench.streets.raw_label(0))
    return wrong_pixels(bench.samples[0].image, truth, as_served(label_ids), AS_SERVED)


def unchanged(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """Takes numbers as they are: of ADE20K, "other" becomes a class; of Cityscapes, ids are taken for other ids."""
    return labels


def shifted_twice(dataset: Dataset, raw: np.ndarray) -> np.ndarray:
    """Once when the files were prepared and once when they are read: walls are ignored, buildings become walls."""
    return np.where((raw <= 1) | (raw == IGNORE), IGNORE, raw - 2)


def other_becomes_a_class(dataset: Dataset, raw: np.ndarray) -> np.ndarray:
    """Keeps the ids from 0 up: what has no name is learned as the first class."""
    return np.maximum(raw, 1) - 1


def always_divided(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forgets that stuff, and groups of things, have no number: their id is a bare labelId."""
    return ids // 1000, ids % 1000


# --- geometry ---------------------------------------------------------------------------------------------------------


def streets_padded_with(bench: Bench, pad: Callable[[Sample, tuple[int, int]], np.ndarray]) -> Finding:
    """Pixels of a padded example that are taught as something, though there is nothing."""
    street = bench.samples[0]
    height, width = street.label_map.shape
    bottom, right = height // 4, width // 4
    image = np.pad(street.image, ((0, bottom), (0, right), (0, 0)), constant_values=128)
    truth = np.pad(street.label_map, ((0, bottom), (0, right)), constant_values=IGNORE)
    found = pad(street, (height + bottom, width + right))
    return wrong_pixels(image, truth, found, bench.streets.classes)


def padded_by_the_library(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """The labels of a training example that is larger than its image."""
    edges = dict(shortest_edges=(min(sample.label_map.shape),), longest_edge=max(sample.label_map.shape))
    config = DataConfig(dataset="folder", crop_size=size, **edges, color_jitter=False, flip=False)
    _, target = TrainingTransform(config)(sample, np.random.default_rng(0))
    table = np.full(IGNORE + 1, IGNORE, np.uint8)
    table[: target.num_segments] = target.labels.numpy()
    return table[target.id_map.numpy()]


def padded_with_zeros(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """As np.pad and F.pad do unless they are told otherwise: zero is a class, here the road."""
    height, width = sample.label_map.shape
    return np.pad(sample.label_map, ((0, size[0] - height), (0, size[1] - width)))


def streets_resized_with(bench: Bench, resize: Callable) -> Finding:
    """Pixels of an example 1.5 times as large whose class is not that of the pixel they come from."""
    street = bench.samples[0]
    height, width = (edge * 3 // 2 for edge in street.label_map.shape)
    arguments = ((height, width), (0, 0, height, width))
    image = crop_of_resized_image(street.image, *arguments)
    truth = crop_of_resized_labels(street.label_map, *arguments)
    return wrong_pixels(image, truth, resize(street.label_map, *arguments), bench.streets.classes)


def resized_bilinearly(label_map: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Between class 0 and class 10 lies class 5: every edge gets a rim of things that are not there."""
    top, left, height, width = box
    resized = Image.fromarray(label_map).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + height, left : left + width]


_WRONG = "{} % of the pixels wrong"

DATA = (
    Trap(
        name="ADE20K not shifted",
        mistake="ADE20K's files hold 0 for “other” and 1…150 for the classes. Taken as they are, “other” is learned "
        "and every name is off by one.",
        question="How many pixels of a room keep their class?",
        unit=_WRONG, right=Dataset.to_label_map, broken=unchanged, measure=rooms_read_with,
        guarded_by="tests/test_data_readers.py::test_ade20k_shifts_once_and_ignores_zero",
    ),
    Trap(
        name="ADE20K shifted twice",
        mistake="The ids were shifted when the files were prepared, and are shifted again when they are read.",
        question="Walls were class 0. What are they after the second shift?",
        unit=_WRONG, right=Dataset.to_label_map, broken=shifted_twice, measure=rooms_read_with,
        guarded_by="tests/test_data_readers.py::test_ade20k_shifts_once_and_ignores_zero",
    ),
    Trap(
        name="ADE20K's other learned as a class",
        mistake="All ids are shifted, and 0 is kept from becoming −1 by making it 0: “other” is learned as wall.",
        question="How many pixels of a drawn room have no name?",
        unit=_WRONG, right=Dataset.to_label_map, broken=other_becomes_a_class, measure=rooms_read_with,
        guarded_by="tests/test_data_readers.py::test_ade20k_shifts_once_and_ignores_zero",
    ),
    Trap(
        name="Cityscapes' labelIds as classes",
        mistake="The files hold 34 labelIds; 19 of them are trained, under other numbers. A labelId below 19 is a "
        "valid class, only the wrong one.",
        question="Road is labelId 7 and class 0. What will the road be?",
        unit=_WRONG, right=Dataset.to_label_map, broken=unchanged, measure=streets_read_with,
        guarded_by="tests/test_data_readers.py::test_cityscapes_maps_all_34_label_ids",
    ),
    Trap(
        name="trainIds submitted",
        mistake="The evaluation server wants labelIds back. A file of trainIds is accepted and scored.",
        question="A perfect model submits its trainIds. What does it score?",
        unit=_WRONG, right=Dataset.to_raw, broken=unchanged, measure=streets_written_with,
        guarded_by="tests/test_data_readers.py::test_cityscapes_gives_label_ids_back_for_submission",
    ),
    Trap(
        name="instance ids divided throughout",
        mistake="An instance id is labelId · 1000 + n, but only for single things: stuff and groups have the bare "
        "labelId, which divided by 1000 is 0.",
        question="How much of a street is left?",
        unit=_WRONG, right=split_instance_ids, broken=always_divided, measure=instances_split_with,
        guarded_by="tests/test_data_readers.py::test_instance_ids_come_apart",
    ),
    Trap(
        name="labels padded with a class",
        mistake="A crop that is larger than its image is padded. Labels need 255 there; a default of 0 is the road.",
        question="The example is a quarter larger than its image, both ways. How much of it becomes road?",
        unit=_WRONG, right=padded_by_the_library, broken=padded_with_zeros, measure=streets_padded_with,
        guarded_by="tests/test_transforms.py::test_small_images_are_padded_at_the_bottom_and_right",
    ),
    Trap(
        name="labels resized bilinearly",
        mistake="Labels are resized as the image is. Halfway between road (0) and sky (10) then lies class 5, a pole: "
        "every edge gets a thin rim of things that are not there.",
        question="Which classes appear that the street does not have?",
        unit=_WRONG, right=crop_of_resized_labels, broken=resized_bilinearly, measure=streets_resized_with,
        guarded_by="tests/test_transforms.py::test_labels_are_read_at_the_centres_of_the_new_pixels",
    ),
)  # fmt: skip
