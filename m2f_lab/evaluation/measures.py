"""One way of measuring for each task: what is predicted for an image, and what counts it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor, nn

from m2f_lab.data import Classes, Sample, Segments
from m2f_lab.evaluation.instance import InstanceEvaluator
from m2f_lab.evaluation.panoptic import PanopticEvaluator
from m2f_lab.evaluation.semantic import SemanticEvaluator
from m2f_lab.inference import predict
from m2f_lab.inference.predict import Model
from m2f_lab.recipes import EvaluationConfig
from m2f_lab.structures import Output, Prediction


class Measure(Protocol):
    """A task's predictions and evaluators."""

    classes: Classes
    config: EvaluationConfig
    evaluators: tuple

    def has_truth(self, sample: Sample) -> bool:
        """Whether the sample has the annotation that the task is measured by."""

    def predict(self, model: Model, image: np.ndarray) -> tuple[Prediction, ...]:
        """One prediction for each evaluator."""

    def update(self, predictions: tuple[Prediction, ...], sample: Sample, number: int) -> None:
        """Count them. `number` is that of the image in its data set."""

    def result(self) -> dict:
        """The figures so far, in percent, with "num_images" and "classes"."""

    @property
    def matrix(self) -> Tensor | None:
        """Pixels by true and predicted class, where label maps are counted. int64 [K, K]"""


class SemanticMeasure:
    """Label maps: mIoU; at the configuration's several sizes and mirrored if `multi_scale`."""

    def __init__(self, classes: Classes, config: EvaluationConfig, multi_scale: bool = False) -> None:
        self.classes, self.config = classes, config
        self.sizes = config.multi_scale if multi_scale else {}
        self.evaluators = (SemanticEvaluator(len(classes), classes.names),)

    def has_truth(self, sample: Sample) -> bool:
        return sample.label_map is not None

    def predict(self, model: Model, image: np.ndarray) -> tuple[Prediction, ...]:
        return (_predicted("semantic", model, image, self.classes, self.config, **self.sizes),)

    def update(self, predictions: tuple[Prediction, ...], sample: Sample, number: int) -> None:
        self.evaluators[0].update(predictions[0], sample.label_map)

    def result(self) -> dict:
        return self.evaluators[0].result()

    @property
    def matrix(self) -> Tensor:
        return self.evaluators[0].matrix


class InstanceMeasure:
    """Scored masks that may overlap: AP."""

    def __init__(self, classes: Classes, config: EvaluationConfig) -> None:
        self.classes, self.config = classes, config
        self.evaluators = (InstanceEvaluator(len(classes), classes.names, max_detections=config.top_k),)

    def has_truth(self, sample: Sample) -> bool:
        return sample.segments is not None

    def predict(self, model: Model, image: np.ndarray) -> tuple[Prediction, ...]:
        return (_predicted("instance", model, image, self.classes, self.config),)

    def update(self, predictions: tuple[Prediction, ...], sample: Sample, number: int) -> None:
        self.evaluators[0].update(predictions[0], sample.segments, image=number)

    def result(self) -> dict:
        return self.evaluators[0].result()

    matrix = None


class PanopticMeasure:
    """Segments that do not overlap: PQ. The same model's things are measured by AP, its label maps by mIoU.

    Source: Mask2Former (Cheng et al. 2022), section 4.2, "AP^Th_pan" and "mIoU_pan".
    """

    def __init__(self, classes: Classes, config: EvaluationConfig) -> None:
        self.classes, self.config = classes, config
        count, names = len(classes), classes.names
        self.evaluators = (
            PanopticEvaluator(count, classes.things, names),
            InstanceEvaluator(count, names, max_detections=config.top_k),
            SemanticEvaluator(count, names),
        )

    def has_truth(self, sample: Sample) -> bool:
        return sample.segments is not None and sample.segments.id_map is not None

    def predict(self, model: Model, image: np.ndarray) -> tuple[Prediction, ...]:
        once = _AskedOnce(model)
        return tuple(
            _predicted(task, once, image, self.classes, self.config) for task in ("panoptic", "instance", "semantic")
        )

    def update(self, predictions: tuple[Prediction, ...], sample: Sample, number: int) -> None:
        panoptic, instance, semantic = self.evaluators
        segments = sample.segments
        things = segments.select(np.isin(segments.labels, list(self.classes.things)))
        panoptic.update(predictions[0], *numbered_from_one(segments))
        instance.update(predictions[1], things, image=number)
        semantic.update(predictions[2], sample.label_map)

    def result(self) -> dict:
        panoptic, instance, semantic = (evaluator.result() for evaluator in self.evaluators)
        rows = zip(panoptic["classes"], instance["classes"], semantic["classes"], strict=True)
        classes = [first | {"AP": second["AP"], "IoU": third["IoU"]} for first, second, third in rows]
        figures = semantic | instance | panoptic
        order = [*panoptic, *instance, *semantic]
        return {name: figures[name] for name in order if name not in ("num_images", "classes")} | {
            "num_images": panoptic["num_images"],
            "classes": classes,
        }

    @property
    def matrix(self) -> Tensor:
        return self.evaluators[2].matrix


class _AskedOnce(nn.Module):
    """A model that runs once for each image or tile, however many tasks ask for it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.outputs = model, {}

    def forward(self, images: Tensor) -> Output:
        key = images.shape, images.cpu().numpy().tobytes()
        if key not in self.outputs:
            self.outputs[key] = self.model(images)
        return self.outputs[key]


MEASURES = {"semantic": SemanticMeasure, "panoptic": PanopticMeasure, "instance": InstanceMeasure}


def _predicted(
    task: str, model: Model, image: np.ndarray, classes: Classes, config: EvaluationConfig, **changed
) -> Prediction:
    options = {**config.edges, **config.tiles, **config.options(task), **changed}
    return predict(model, image, task, classes=classes, **options)


def numbered_from_one(segments: Segments) -> tuple[np.ndarray, dict[int, int], list[int]]:
    """Segments as `PanopticEvaluator.update` takes the truth: a map with 0 for void, classes by id, ids of crowds."""
    labels = dict(enumerate(segments.labels.tolist(), start=1))
    return segments.id_map + 1, labels, (np.flatnonzero(segments.crowd) + 1).tolist()
