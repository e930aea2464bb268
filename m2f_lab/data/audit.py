"""Look at every file of a data set before a GPU does: what is labelled as what, and what would train wrongly.

K classes, H/W height/width.

Mistakes in labels seldom stop a training run. They lower its figures without a trace: ids shifted by one, void
trained as a class, labels resized with interpolation. All of them show in the counts of the raw ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from m2f_lab.data.dataset import (
    DataError,
    Dataset,
    SegmentDataset,
    abbreviate,
    check_same_size,
    image_files,
    orientation,
    read_image,
    shared_labels,
)


@dataclass
class IdCount:
    """Occurrences of a raw id.

    Attributes:
        pixels: over all labels
        images: how many labels contain it
        first: the first label file that does
    """

    pixels: int = 0
    images: int = 0
    first: Path | None = None


@dataclass(frozen=True)
class AuditReport:
    """Findings of `audit`; `print` them.

    Attributes:
        dataset: the data set
        num_images: how many images were looked at
        counts: by raw id, known or not; of a data set of segments by class
        problems: files that stop training, by kind ("no label", "shared label", "other size", "unreadable"); each a
            sentence that names the files
        unlabelled: images without a single pixel that has a class
        empty: images with segments that have no pixel
        overlapping: images with segments that share pixels
        turned: images that EXIF turns upright and whose labels it does not turn
        hints: what the counts look like, in words; they may be innocent
    """

    dataset: Dataset
    num_images: int
    counts: dict[int, IdCount]
    problems: dict[str, list[str]]
    unlabelled: list[Path]
    turned: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    overlapping: list[Path] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def train_ids(self) -> Mapping[int, int]:
        """Train id of every id that is counted."""
        if isinstance(self.dataset, SegmentDataset):
            return {label: label for label in range(len(self.dataset.classes))}
        return self.dataset.train_ids

    @property
    def ignore(self) -> int:
        """Train id of pixels to ignore."""
        return self.dataset.classes.ignore

    @property
    def unknown_ids(self) -> list[int]:
        """Raw ids that the data set does not know."""
        return sorted(set(self.counts) - set(self.train_ids))

    @property
    def never_seen(self) -> list[int]:
        """Classes, as train ids, of which there is no pixel."""
        seen = {self.train_ids.get(raw_id) for raw_id in self.counts}
        return [train_id for train_id in range(len(self.dataset.classes)) if train_id not in seen]

    @property
    def num_pixels(self) -> int:
        return sum(count.pixels for count in self.counts.values())

    def share(self, *raw_ids: int) -> float:
        """Share of all pixels that has one of these raw ids, in 0…1."""
        return sum(self.counts[i].pixels for i in raw_ids if i in self.counts) / max(1, self.num_pixels)

    def raise_if_wrong(self) -> None:
        """Raise a DataError that lists everything that would stop training or make it learn what is not there."""
        wrong = [line for sentences in self.problems.values() for line in _first(sentences)]
        wrong += [
            f"{self.counts[raw_id].first} holds the unknown id {raw_id} "
            f"({self.counts[raw_id].pixels} pixels in {self.counts[raw_id].images} labels)."
            for raw_id in self.unknown_ids
        ]
        if self.num_images and len(self.unlabelled) == self.num_images:
            wrong.append(f"None of the {self.num_images} labels under {self.dataset.root} has a pixel with a class.")
        if wrong:
            wrong += [f"Hint: {hint}" for hint in self.hints]
            raise DataError("\n- ".join([f"{_title(self.dataset)} would train wrongly:", *wrong]))

    def text(self, most: int | None = 20) -> str:
        """The report in words; of each kind of finding, at most so many files, or all."""
        return "\n".join((*_heading(self), *_table(self), *_findings(self, most)))

    def __str__(self) -> str:
        return self.text()


def audit(dataset: Dataset, limit: int | None = None) -> AuditReport:
    """Read the images and labels of a data set and count what is in them.

    Args:
        dataset: opened with `strict=False` if labels may be missing
        limit: look at so many images only, spread evenly; None: at all

    Returns:
        A report to print; its `raise_if_wrong()` stops a script.
    """
    indices = range(len(dataset))
    if limit is not None and limit < len(dataset):
        indices = np.linspace(0, len(dataset) - 1, limit).round().astype(int).tolist()
    pairs = zip(dataset.image_paths, dataset.label_paths, strict=False)
    problems = {"no label": [], "shared label": shared_labels(pairs), "other size": [], "unreadable": []}
    report = AuditReport(dataset, len(indices), defaultdict(IdCount), problems, [])
    audit_one = _audit_segments if isinstance(dataset, SegmentDataset) else _audit_label
    for index in tqdm(indices, desc=f"audit {dataset.name} {dataset.split}", unit="image", disable=None):
        audit_one(report, index)
    report = replace(report, counts=dict(sorted(report.counts.items())))
    looks = _OF_ALL if isinstance(dataset, SegmentDataset) else (*_OF_IDS, *_OF_ALL)
    report.hints.extend(hint for look in looks if (hint := look(report)))
    return report


def _audit_label(report: AuditReport, index: int) -> None:
    """Look at an image and its label map."""
    dataset, problems = report.dataset, report.problems
    image_path, label_path = dataset.image_paths[index], dataset.label_paths[index]
    image = raw = None
    try:
        image = read_image(image_path)
    except DataError as error:
        problems["unreadable"].append(str(error))
    try:
        raw = dataset.raw_label(index)
    except DataError as error:
        problems["unreadable" if label_path.is_file() else "no label"].append(str(error))
    if raw is None:
        return
    if image is not None:
        if orientation(image_path) != 1 == orientation(label_path):
            report.turned.append(image_path)
        try:
            check_same_size(image_path, image, label_path, raw)
        except DataError as error:
            problems["other size"].append(str(error))
    ids, pixels = np.unique(raw, return_counts=True)
    _count(report, label_path, ids.tolist(), pixels.tolist())


def _audit_segments(report: AuditReport, index: int) -> None:
    """Look at an image and its segments."""
    path = report.dataset.image_paths[index]
    try:
        segments = report.dataset[index].segments
    except DataError as error:
        report.problems["unreadable"].append(str(error))
        return
    files = report.dataset.label_paths
    if files and files[index].is_file() and orientation(path) != 1 == orientation(files[index]):
        report.turned.append(path)
    areas = segments.areas
    if not areas.all():
        report.empty.append(path)
    if segments.shapes is not None and segments.masks().sum(0).max(initial=0) > 1:
        report.overlapping.append(path)
    labels = np.unique(segments.labels)
    _count(report, path, labels.tolist(), [int(areas[segments.labels == label].sum()) for label in labels])


def _count(report: AuditReport, path: Path, ids: Sequence[int], pixels: Sequence[int]) -> None:
    for raw_id, number in zip(ids, pixels, strict=True):
        count = report.counts[raw_id]
        count.pixels += number
        count.images += 1
        count.first = count.first or path
    if all(report.train_ids.get(raw_id, report.ignore) == report.ignore for raw_id in ids):
        report.unlabelled.append(path)


# ----------------------------------------------------------------------------------------------------------------------
# The report in words


def _title(dataset: Dataset) -> str:
    return f"{dataset.name} {dataset.split} in {dataset.root}"


def _heading(report: AuditReport) -> list[str]:
    total = len(report.dataset)
    part = f"{report.num_images} images" if report.num_images == total else f"{report.num_images} of {total} images"
    return [f"{_title(report.dataset)}: {part}, {report.num_pixels:,} pixels", ""]


def _table(report: AuditReport) -> list[str]:
    names = {raw_id: _name(report, raw_id) for raw_id in report.counts}
    width = max([len("class"), *map(len, names.values())])
    lines = [f"{'raw id':>6}  {'train id':>8}  {'class':<{width}}  {'pixels':>14}  {'share':>8}  {'images':>6}"]
    for raw_id, count in report.counts.items():
        train_id = report.train_ids.get(raw_id)
        shown = {None: "?", report.ignore: "ignored"}.get(train_id, train_id)
        lines.append(
            f"{raw_id:>6}  {shown:>8}  {names[raw_id]:<{width}}  {count.pixels:>14,}  "
            f"{100 * report.share(raw_id):>6.2f} %  {count.images:>6}"
        )
    return lines


def _name(report: AuditReport, raw_id: int) -> str:
    train_id = report.train_ids.get(raw_id)
    if train_id is None:
        return "UNKNOWN"
    return "–" if train_id == report.ignore else report.dataset.classes.names[train_id]


def _findings(report: AuditReport, most: int | None) -> list[str]:
    names = report.dataset.classes.names
    lines = [""]
    if report.never_seen:
        lines.append(f"Never seen ({len(report.never_seen)}): {abbreviate([names[i] for i in report.never_seen], 20)}")
    if report.unlabelled:
        lines.append(
            f"Without any labelled pixel ({len(report.unlabelled)}): "
            f"{abbreviate([path.name for path in report.unlabelled], most)}"
        )
    if report.unknown_ids:
        lines.append(f"UNKNOWN IDS: {', '.join(map(str, report.unknown_ids))}")
    for kind, sentences in report.problems.items():
        if sentences:
            lines.append(f"{kind.upper()} ({len(sentences)}):")
            lines += [f"  {line}" for line in _first(sentences, most)]
    if report.dataset.left_out:
        left_out = [str(path.relative_to(report.dataset.root)) for path in report.dataset.left_out]
        lines.append(f"LEFT OUT ({len(left_out)}), of no image with a label: {abbreviate(left_out, most)}")
    lines += [f"Hint: {hint}" for hint in report.hints]
    if most is None:  # hints name the first few
        lists = {"turned": report.turned, "empty segments": report.empty, "overlapping": report.overlapping}
        lines += [f"{kind.upper()} ({len(paths)}): {_names(paths)}" for kind, paths in lists.items() if paths]
    if not any(report.problems.values()) and not report.unknown_ids:
        lines.append("Every label fits its image and holds known ids only.")
    return lines


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _first(sentences: list[str], most: int | None = 20) -> list[str]:
    return (
        sentences
        if most is None or len(sentences) <= most
        else [*sentences[:most], f"and {len(sentences) - most} more"]
    )


# ----------------------------------------------------------------------------------------------------------------------
# What the counts may mean. Each looks at a report and says a sentence, or nothing.


def _looks_shifted_down(report: AuditReport) -> str | None:
    """0 is a class and every id is one too low: the one was subtracted already."""
    last = len(report.dataset.classes)
    if report.dataset.name == "cityscapes" or last in report.counts or 0 not in report.counts:
        return None
    if set(report.counts) == {0, 255}:  # adding 1 would make an object's mask void, see _looks_binary
        return None
    if 255 in report.counts or report.share(0) > 0.12 or report.never_seen == [last - 1]:
        also = ", and 255 occurs, the usual id of ignored pixels" if 255 in report.counts else ""
        return (
            f"The ids may be one too low. Id {last} ({report.dataset.classes.names[-1]}) never occurs, while id 0, "
            f"unlabelled here, covers {100 * report.share(0):.0f} % of the pixels{also}. Labels that were shifted to "
            "0…K-1 already must be shifted back: add 1, and make 255 a 0."
        )
    return None


def _looks_binary(report: AuditReport) -> str | None:
    """No ids but 0 and 255: a mask of an object more often than one class and void."""
    if report.dataset.name == "cityscapes" or set(report.counts) != {0, 255} or 255 in report.train_ids:
        return None
    return (
        "The labels hold 0 and 255 only. If they are masks, 255 being the object, name two classes in classes.txt, "
        "background and object, and write label = 1 + (label > 0); "
        "python -m m2f_lab prepare --kind binary does it. If 255 is unlabelled and 0 the only class, add 1 to all ids."
    )


def _looks_shifted_up(report: AuditReport) -> str | None:
    """Ids run to K + 1: there are more classes than lines in classes.txt, or everything was shifted twice."""
    last = len(report.dataset.classes)
    if report.dataset.name == "cityscapes" or report.unknown_ids != [last + 1]:
        return None
    return (
        f"The ids run to {last + 1}, one more than there are classes. Either a class is missing (line {last + 1} of a "
        "classes.txt), or the labels were shifted up once too often."
    )


def _names_unlabelled(report: AuditReport) -> str | None:
    first = report.dataset.classes.names[0]
    if report.dataset.name != "folder" or first.lower() not in (
        "unlabelled", "unlabeled", "background", "void", "ignore", "other", "none", "_background_"
    ):  # fmt: skip
        return None
    return (
        f"The first line of classes.txt is {first!r}. It names id 1; id 0 is unlabelled and has no line. If {first!r} "
        "is id 0 in your labels, every class is named one too low: take the line away."
    )


def _looks_like_train_ids(report: AuditReport) -> str | None:
    if report.dataset.name != "cityscapes" or not report.counts or max(set(report.counts) - {255}, default=0) > 18:
        return None
    return (
        "No id above 18 occurs, except perhaps 255: these look like trainIds. The labels must be labelIds, as in "
        "gtFine_labelIds.png; the shift to trainIds happens when they are read."
    )


def _looks_interpolated(report: AuditReport) -> str | None:
    rare = [raw_id for raw_id in report.unknown_ids if report.share(raw_id) < 0.001]
    if len(rare) < 10:
        return None
    return (
        f"There are {len(rare)} unknown ids with few pixels each. Labels look so after resizing with interpolation, "
        "after JPEG compression, or when they show classes as grey levels for the eye; export them again."
    )


def _labels_of_other_formats(report: AuditReport) -> str | None:
    annotations = report.dataset.root / "annotations"
    found = [path for path in image_files(report.dataset.left_out) if path.is_relative_to(annotations)]
    found = [path for path in found if path.suffix.lower() != ".png"]
    if not found:
        return None
    return (
        f"{len(found)} labels are not PNG: {abbreviate(path.name for path in found)}. JPEG changes ids near edges, so "
        "export those again from their source; other formats can be saved as PNG as they are."
    )


def _turned(report: AuditReport) -> str | None:
    if not report.turned:
        return None
    return (
        f"{len(report.turned)} images are turned upright by their EXIF orientation, their labels are not: "
        f"{abbreviate(path.name for path in report.turned)}. That is right if labels were drawn on what viewers show; "
        "if they were drawn on the pixels as stored, save the images without EXIF."
    )


def _empty_segments(report: AuditReport) -> str | None:
    if not report.empty:
        return None
    names = abbreviate(path.name for path in report.empty)
    return f"{len(report.empty)} images list segments without a pixel, which can only be missed: {names}."


def _overlapping_segments(report: AuditReport) -> str | None:
    if not report.overlapping:
        return None
    names = abbreviate(path.name for path in report.overlapping)
    return f"{len(report.overlapping)} images have instances that overlap, as a panoptic map cannot say: {names}."


def _mostly_ignored(report: AuditReport) -> str | None:
    ignored = report.share(*(raw_id for raw_id, train_id in report.train_ids.items() if train_id == report.ignore))
    if ignored <= 0.5:
        return None
    return f"{100 * ignored:.0f} % of the pixels are ignored; there is little to learn from the rest."


_OF_IDS: tuple[Callable[[AuditReport], str | None], ...] = (
    _looks_binary,
    _looks_shifted_down,
    _looks_shifted_up,
    _names_unlabelled,
    _looks_like_train_ids,
    _looks_interpolated,
)
_OF_ALL = (_mostly_ignored, _labels_of_other_formats, _turned, _empty_segments, _overlapping_segments)
