"""Measuring models on data sets."""

from m2f_lab.evaluation.evaluate import evaluate
from m2f_lab.evaluation.panoptic import PanopticEvaluator
from m2f_lab.evaluation.semantic import SemanticEvaluator, format_table

__all__ = ["PanopticEvaluator", "SemanticEvaluator", "evaluate", "format_table"]
