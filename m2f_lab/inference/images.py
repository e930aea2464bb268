"""Reading of an image from a path, a PIL image or an array, and resizing as the official models expect."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from m2f_lab.data.dataset import to_rgb
from m2f_lab.data.transforms import resized_size


def as_rgb(image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
    """Turn an image into RGB as a person sees it: upright (EXIF), without alpha channel.

    Args:
        image: a path, a PIL image of any mode, or a uint8 array [H, W, 3]

    Returns:
        RGB in 0..255. uint8 [H, W, 3]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no readable image, or the array is of another type or shape.
        TypeError: it is none of these.
    """
    if isinstance(image, np.ndarray):
        return _checked_array(image)
    if isinstance(image, Image.Image):
        return to_rgb(image, "The PIL image")
    if isinstance(image, (str, Path)):
        return _read_file(Path(image).expanduser())
    raise TypeError(
        f"An image is a path, a PIL image or a uint8 array [H, W, 3], got {type(image).__name__}. "
        "For a tensor [3, H, W] in 0..255 pass image.permute(1, 2, 0).byte().cpu().numpy()."
    )


def fitted_size(
    size: tuple[int, int], shortest_edge: int | None = None, longest_edge: int | None = None, scale: float = 1.0
) -> tuple[int, int]:
    """The size at which the model sees an image: `resized_size` of the training transforms, times a scale.

    Args:
        size: height and width in pixels
        shortest_edge: in pixels; None leaves the image as it is
        longest_edge: in pixels; None is no limit
        scale: multiplies the result

    Raises:
        ValueError: an edge is no positive number.
    """
    if any(edge is not None and edge < 1 for edge in (shortest_edge, longest_edge)):
        raise ValueError(f"Edges are positive numbers of pixels or None, got {shortest_edge = }, {longest_edge = }.")
    height, width = resized_size(size, min(size) if shortest_edge is None else shortest_edge, longest_edge)
    return max(1, int(scale * height + 0.5)), max(1, int(scale * width + 0.5))


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with antialiasing (PIL), which is what the official models see. uint8 [H, W, 3] → [*size, 3]"""
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _checked_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        hint = ""
        if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
            hint = " Move the channels last: image.transpose(1, 2, 0)."
        elif image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 4)):
            hint = " Grey or RGBA: pass PIL.Image.fromarray(image.squeeze()) instead."
        elif image.dtype != np.uint8:
            hint = " Scale it to 0..255 and call .astype(np.uint8)."
        raise ValueError(f"An image array must be uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}.{hint}")
    return image


def _read_file(path: Path) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"There is no image {path} (looked in {path.absolute().parent}).")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; predict takes one image at a time.")
    try:
        with Image.open(path) as image:
            return to_rgb(image, str(path))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that PIL can read; convert it to JPEG or PNG.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is larger than Pillow opens ({2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels). Cut it into "
            "tiles; or, if you trust the file, set PIL.Image.MAX_IMAGE_PIXELS = None in your script."
        ) from error
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an image, it may be truncated: {error}") from error
