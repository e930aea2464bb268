"""Matching of queries and segments, and the losses of the matched pairs."""

from m2f_lab.loss.criterion import Criterion, Divisors, build_criterion
from m2f_lab.loss.matcher import Matcher
from m2f_lab.loss.terms import sees_output
from m2f_lab.structures import Matching, NonFiniteError

__all__ = ["Criterion", "Divisors", "Matcher", "Matching", "NonFiniteError", "build_criterion", "sees_output"]
