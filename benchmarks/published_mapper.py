"""The data mapper of the official Mask2Former, as published, for `benchmarks.data` to compare with.

H/W height/width of the sample, h/w of the crop, T classes in the crop.

MaskFormerSemanticDatasetMapper with what it calls in detectron2 (ResizeShortestEdge, ResizeTransform,
RandomCrop_CategoryAreaConstraint, RandomFlip, BitMasks) and in its own ColorAugSSDTransform, line by line. Only the
random numbers are drawn otherwise: all of them beforehand and in the order in which `TrainingTransform` draws them,
so that both make the same example of the same generator, and can be compared.

Needs OpenCV: pip install opencv-python-headless
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from m2f_lab.data import resized_size
from m2f_lab.data.jitter import ColorJitter
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import IGNORE


def published_example(
    image_path: Path, label_path: Path, config: DataConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Read a sample and make a training example of it.

    Args:
        image_path, label_path: the labels are train ids already, as the official preparation script writes them
        config: the transforms
        rng: in the state in which `TrainingTransform` would get it

    Returns:
        The image, uint8 [3, h, w], the classes in it, int64 [T], and a mask for each, bool [T, h, w].
    """
    image = read(image_path, "RGB")
    labels = read(label_path).astype("double")

    edge = config.shortest_edges[rng.integers(len(config.shortest_edges))]
    size = resized_size(labels.shape, edge, config.longest_edge)
    image, labels = resized_image(image, size), resized_labels(labels, size)
    image, labels = cropped(image, labels, config, rng)
    if config.color_jitter:
        image = jittered(image, ColorJitter.draw(rng))
    if config.flip and rng.random() < 0.5:
        image, labels = np.flip(image, axis=1), np.flip(labels, axis=1)

    image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    labels = torch.as_tensor(labels.astype("long"))
    padding = [0, config.crop_size[1] - labels.shape[1], 0, config.crop_size[0] - labels.shape[0]]
    image = F.pad(image, padding, value=128).contiguous()
    labels = F.pad(labels, padding, value=IGNORE).contiguous().numpy()

    return image, *instances(labels)


def instances(labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """The classes in a label map, and a mask for each. int64 [h, w] → int64 [T], bool [T, h, w]"""
    classes = np.unique(labels)
    classes = classes[classes != IGNORE]
    masks = [torch.from_numpy(np.ascontiguousarray(labels == class_id)) for class_id in classes]
    masks = torch.stack(masks) if masks else torch.zeros(0, *labels.shape, dtype=torch.bool)
    return torch.tensor(classes, dtype=torch.int64), masks


def read(path: Path, mode: str | None = None) -> np.ndarray:
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert(mode) if mode else image)


def resized_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 images go through Pillow. [H, W, 3] → [*size, 3]"""
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resized_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Numbers in floating point go through PyTorch. [H, W] → [*size]"""
    return F.interpolate(torch.from_numpy(labels)[None, None], size, mode="nearest")[0, 0].numpy()


def cropped(
    image: np.ndarray, labels: np.ndarray, config: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    height, width = np.minimum(config.crop_size, labels.shape)
    for _ in range(10):
        y0 = rng.integers(labels.shape[0] - height + 1)
        x0 = rng.integers(labels.shape[1] - width + 1)
        crop = slice(y0, y0 + height), slice(x0, x0 + width)
        if config.single_category_max_area >= 1:
            break
        found, counts = np.unique(labels[crop], return_counts=True)
        counts = counts[found != IGNORE]
        if len(counts) > 1 and np.max(counts) < np.sum(counts) * config.single_category_max_area:
            break
    return image[crop], labels[crop]


def jittered(image: np.ndarray, draw: ColorJitter) -> np.ndarray:
    """Brightness, contrast, saturation and hue. A step is left out where it would change nothing. uint8 [h, w, 3]"""
    image = image[:, :, [2, 1, 0]]  # OpenCV's order
    if draw.brightness != 0:
        image = converted(image, beta=draw.brightness)
    if draw.contrast_first and draw.contrast != 1:
        image = converted(image, alpha=draw.contrast)
    if draw.saturation != 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        image[:, :, 1] = converted(image[:, :, 1], alpha=draw.saturation)
        image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if draw.hue != 0:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        image[:, :, 0] = (image[:, :, 0].astype(int) + int(draw.hue / 2)) % 180  # in steps of two degrees
        image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR)
    if not draw.contrast_first and draw.contrast != 1:
        image = converted(image, alpha=draw.contrast)
    return image[:, :, [2, 1, 0]]


def converted(image: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
    image = image.astype(np.float32) * alpha + beta
    return np.clip(image, 0, 255).astype(np.uint8)
