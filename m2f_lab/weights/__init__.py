"""Checkpoints in and out: ours, the official ones, Hugging Face's and SSSegmentation's."""

from m2f_lab.weights.huggingface import to_huggingface
from m2f_lab.weights.loading import LoadReport, load_model, load_weights
from m2f_lab.weights.native import save_weights
from m2f_lab.weights.official import to_official
from m2f_lab.weights.pickles import UnsafeFileError
from m2f_lab.weights.sssegmentation import to_sssegmentation

__all__ = [
    "LoadReport",
    "UnsafeFileError",
    "load_model",
    "load_weights",
    "save_weights",
    "to_huggingface",
    "to_official",
    "to_sssegmentation",
]
