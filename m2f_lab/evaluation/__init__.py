"""Measuring models on data sets."""

from m2f_lab.evaluation.evaluate import evaluate
from m2f_lab.evaluation.semantic import SemanticEvaluator, format_table

__all__ = ["SemanticEvaluator", "evaluate", "format_table"]
