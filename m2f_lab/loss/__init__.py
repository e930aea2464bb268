"""What the model is taught: matching of queries and segments, and the losses of the matched pairs."""

from .criterion import Criterion
from .matcher import Matcher, Matching, NonFiniteError

__all__ = ["Criterion", "Matcher", "Matching", "NonFiniteError"]
