"""Semantic segmentation: intersection over union and accuracy over a whole data set.

K classes, H/W height/width.

All figures come from one K × K table of pixel counts, filled over the whole data set: a class that covers ten pixels
of one image and a million of another is one class with one IoU. A mean of per-image values would be a different, and
usually larger, number. The definitions are those of detectron2's SemSegEvaluator, hence of the published results.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from m2f_lab.data.dataset import abbreviate
from m2f_lab.evaluation.counts import summed_over_processes
from m2f_lab.structures import IGNORE, WIDE_IGNORE, Prediction, ignored_label


class SemanticEvaluator:
    """Counts pixels by true and predicted class.

    Args:
        num_classes: K
        class_names: for the table; by default the numbers. K × str

    Attributes:
        matrix: pixels of true class i that were predicted as class j. int64 [K, K]
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None) -> None:
        if not 0 < num_classes <= WIDE_IGNORE:
            raise ValueError(f"Label maps hold 1 to {WIDE_IGNORE} classes beside what is ignored, got {num_classes}.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"There are {num_classes} classes but {len(class_names)} names.")
        self.num_classes, self.ignore = num_classes, ignored_label(num_classes)
        # All values of bytes are counted. Wider labels would be too many: those to ignore are counted as class K.
        self._values = 256 if self.ignore == IGNORE else num_classes + 1
        self.class_names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.num_images = 0

    def update(self, prediction: Prediction | np.ndarray | Tensor, label_map: np.ndarray | Tensor) -> None:
        """Count the pixels of one image.

        Args:
            prediction: a semantic Prediction or its label map, classes 0…K-1. [H, W]
            label_map: the truth, classes 0…K-1, or 255 for pixels that do not count (65535 beside more than 255
                classes). Any integers. [H, W]

        Raises:
            ValueError: the sizes differ, a map is not of integers, or it holds a number that is no class.
        """
        predicted = prediction.label_map if isinstance(prediction, Prediction) else prediction
        if predicted is None:
            raise ValueError(
                f'A prediction of task="{prediction.task}" has no label_map; predict with task="semantic".'
            )
        predicted, truth = _tensor("prediction", predicted), _tensor("truth", label_map)
        if predicted.shape != truth.shape:
            raise ValueError(
                f"The prediction is {list(predicted.shape)}, the truth {list(truth.shape)}: they are compared at the "
                "size of the truth. Resize the class scores (not the labels) to it before taking the best class."
            )
        for name, values in (("prediction", predicted), ("truth", truth)):
            if (
                values.dtype != torch.uint8
                and len(values.flatten())
                and not 0 <= values.min() <= values.max() <= self.ignore
            ):
                raise ValueError(f"The {name} holds {int(values.min())}…{int(values.max())}, expected 0…{self.ignore}.")
        if self.ignore != IGNORE:
            truth, predicted = self._narrowed("truth", truth), self._narrowed("prediction", predicted)
        pairs = truth.int() * self._values + predicted.to(truth.device)
        counts = torch.bincount(pairs.flatten(), minlength=self._values**2).view(self._values, -1)  # [truth, predicted]
        if self.ignore == IGNORE:
            self._check_counts(counts)
        self.matrix += counts[: self.num_classes, : self.num_classes].cpu()
        self.num_images += 1

    def _check_counts(self, counts: Tensor) -> None:
        """Raise if a map of bytes holds a number that is no class. Counting all 256 values costs nothing."""
        known = torch.arange(len(counts), device=counts.device) < self.num_classes
        self._refuse("prediction", torch.nonzero((counts.sum(0) > 0) & ~known))
        known[self.ignore] = True
        self._refuse("truth", torch.nonzero((counts.sum(1) > 0) & ~known))

    def _narrowed(self, name: str, values: Tensor) -> Tensor:
        """Wide labels, of which those to ignore become class K."""
        is_ignored = (values == self.ignore) & (name == "truth")
        self._refuse(name, torch.unique(values[(values >= self.num_classes) & ~is_ignored]))
        return values.int().clamp(max=self.num_classes)

    def _refuse(self, name: str, wrong: Tensor) -> None:
        if len(wrong):
            found, beside = f"[{abbreviate(wrong.flatten().tolist())}]", f" (and {self.ignore} for pixels to ignore)"
            raise ValueError(
                f"The {name} holds {found}, but there are {self.num_classes} classes, 0…{self.num_classes - 1}"
                f"{beside if name == 'truth' else ''}."
            )

    def merge(self, other: SemanticEvaluator) -> None:
        """Add what another evaluator counted, on other images."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"Cannot merge the counts of {other.num_classes} classes into those of {self.num_classes}."
            )
        self.matrix += other.matrix
        self.num_images += other.num_images

    def all_reduce(self) -> None:
        """Add up the counts of all processes of `torch.distributed`; afterwards each holds the sum."""
        self.matrix, self.num_images = summed_over_processes(self.matrix, self.num_images)

    def state(self) -> dict:
        """What was counted so far, as tensors and numbers that a file can hold."""
        return {"matrix": self.matrix, "num_images": self.num_images}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.matrix, self.num_images = state["matrix"], state["num_images"]

    def result(self) -> dict:
        """Compute the figures so far, in percent.

        Returns:
            "mIoU", "fwIoU" (IoU weighted by the pixels of each class), "mACC" (mean of the classes' accuracies),
            "pACC" (share of correct pixels), "num_images", and "classes": one dict per class with "name", "IoU",
            "accuracy" and "share" of the labelled pixels. A class that the truth never holds has no IoU and no
            accuracy (None) and is left out of the means, even where it was predicted; those pixels lower the IoU
            of the classes that they belong to. Without one labelled pixel all means are None.

        With one class, every figure is 100 whatever the model: a warning says so.
        """
        correct = self.matrix.diagonal().double()
        true = self.matrix.sum(1).double()
        predicted = self.matrix.sum(0).double()
        total = true.sum()
        if self.num_classes == 1:
            warnings.warn(
                f"With one class ({self.class_names[0]}), any model has an mIoU of 100 %: pixels of the background are "
                "255, which is not evaluated. Make the background a class of its own, or train and evaluate with "
                'task="instance" or task="panoptic".',
                stacklevel=2,
            )
        present = true > 0
        iou = correct / (true + predicted - correct)  # NaN where the class is nowhere
        accuracy = correct / true
        share = true / total
        percent = {
            "mIoU": iou[present].mean(),
            "fwIoU": (iou * share)[present].sum(),
            "mACC": accuracy[present].mean(),
            "pACC": correct.sum() / total,
        }
        columns = (self.class_names, present.tolist(), *((100 * c).tolist() for c in (iou, accuracy, share)))
        classes = [
            {
                "name": name,
                "IoU": iou if known else None,
                "accuracy": accuracy if known else None,
                "share": share if total else 0.0,
            }
            for name, known, iou, accuracy, share in zip(*columns, strict=True)
        ]
        return {name: 100 * float(value) if total else None for name, value in percent.items()} | {
            "num_images": self.num_images,
            "classes": classes,
        }


def _tensor(name: str, values: np.ndarray | Tensor) -> Tensor:
    """A map of integers: uint8 without a copy where possible, all others as int64.

    PyTorch takes neither read-only nor mirrored arrays, and hardly computes with uint16, uint32 and uint64.
    """
    if isinstance(values, Tensor):
        is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
    else:
        values = np.asarray(values)
        is_integer = values.dtype.kind in "iu"
    if values.ndim != 2 or not is_integer:
        raise ValueError(
            f"The {name} is {str(values.dtype).removeprefix('torch.')} {list(values.shape)}, expected a map of "
            "classes, integers [H, W]."
        )
    if isinstance(values, Tensor):
        return values if values.dtype == torch.uint8 else values.long()
    values = values if values.dtype == np.uint8 else values.astype(np.int64)
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
