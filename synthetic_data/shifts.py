"""Held-out synthetic images under shifts, to choose a recipe by: `--holdout`.

A student that matches its teacher on shifted images, too, is more likely to match it on real ones.
"""

import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from data import ImageSet


def with_shifted_copies(data: ImageSet) -> ImageSet:
    """The images, then copies of all: brighter, less saturated, blurred, JPEG-compressed, sharper.

    `data` may be empty.
    """
    copies = [data.images]
    if len(data):
        copies += [torch.stack([shift(image) for image in data.images]) for shift in SHIFTS]
    return replace(data, images=torch.cat(copies), labels=data.labels.repeat(len(copies)))


def _jpeg(image: Tensor, quality: int) -> Tensor:
    """uint8 (3, 32, 32), compressed and decoded again; torchvision means to drop its own codecs."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


SHIFTS = (
    lambda image: F.adjust_brightness(image, 1.4),
    lambda image: F.adjust_saturation(image, 0.4),
    lambda image: F.gaussian_blur(image, [3, 3], [0.8, 0.8]),
    lambda image: _jpeg(image, 40),
    lambda image: F.adjust_sharpness(image, 2.0),  # real images have more detail than CIFAKE's
)
