"""From an image to a result: `predict` for images, `postprocess` for what the model returned."""

from m2f_lab.inference.predict import predict

__all__ = ["predict"]
