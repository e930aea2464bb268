"""What the model is taught: matching of queries and segments, and the losses of the matched pairs."""

from m2f_lab.loss.criterion import Criterion, build_criterion
from m2f_lab.loss.matcher import Matcher, Matching, NonFiniteError

__all__ = ["Criterion", "Matcher", "Matching", "NonFiniteError", "build_criterion"]
