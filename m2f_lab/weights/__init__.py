"""Checkpoints in and out: ours, the official ones, Hugging Face's and SSSegmentation's; of Mask2Former and EoMT."""

from m2f_lab.weights.eomt import eomt_to_huggingface
from m2f_lab.weights.huggingface import to_huggingface
from m2f_lab.weights.loading import LoadReport, OtherClassesError, load_model, load_weights, saved_classes
from m2f_lab.weights.native import Builder, build_from, save_weights
from m2f_lab.weights.official import to_official
from m2f_lab.weights.pickles import UnsafeFileError
from m2f_lab.weights.sssegmentation import to_sssegmentation

save_pretrained = save_weights  # under the name that users of Hugging Face expect

__all__ = [
    "Builder",
    "LoadReport",
    "OtherClassesError",
    "UnsafeFileError",
    "build_from",
    "eomt_to_huggingface",
    "load_model",
    "load_weights",
    "save_pretrained",
    "save_weights",
    "saved_classes",
    "to_huggingface",
    "to_official",
    "to_sssegmentation",
]
