"""The model: one file per box of the paper's Figure 2."""

from m2f_lab.model.mask2former import Mask2Former, build_model
from m2f_lab.recipes import ModelConfig

__all__ = ["Mask2Former", "ModelConfig", "build_model"]
