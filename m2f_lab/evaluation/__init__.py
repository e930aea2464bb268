"""Measuring models on data sets."""

from m2f_lab.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesPixelEvaluator
from m2f_lab.evaluation.evaluate import evaluate
from m2f_lab.evaluation.instance import InstanceEvaluator
from m2f_lab.evaluation.panoptic import PanopticEvaluator
from m2f_lab.evaluation.report import worst_images
from m2f_lab.evaluation.semantic import SemanticEvaluator
from m2f_lab.evaluation.submission import write_submission
from m2f_lab.evaluation.table import format_table

__all__ = [
    "CityscapesInstanceEvaluator",
    "CityscapesPixelEvaluator",
    "InstanceEvaluator",
    "PanopticEvaluator",
    "SemanticEvaluator",
    "evaluate",
    "format_table",
    "worst_images",
    "write_submission",
]
