"""The model: one file per box of the paper's Figure 2; and EoMT, which needs no such boxes, in a file of its own."""

from m2f_lab.model.backbone import Backbone
from m2f_lab.model.eomt import EoMT, build_eomt
from m2f_lab.model.mask2former import Mask2Former, build_model
from m2f_lab.model.pixel_decoder import PixelDecoder
from m2f_lab.model.transformer_decoder import DecoderLayer, TransformerDecoder
from m2f_lab.recipes import ModelConfig

__all__ = [
    "Backbone",
    "DecoderLayer",
    "EoMT",
    "Mask2Former",
    "ModelConfig",
    "PixelDecoder",
    "TransformerDecoder",
    "build_eomt",
    "build_model",
]
