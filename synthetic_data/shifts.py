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
        copies += [shift(data.images) for shift in SHIFTS]
    return replace(data, images=torch.cat(copies), labels=data.labels.repeat(len(copies)))


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Each compressed and decoded again, by Pillow: torchvision means to drop its own codecs."""
    decoded = []
    for pixels in images.permute(0, 2, 3, 1).numpy():  # (32, 32, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        decoded.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)


SHIFTS = (  # of uint8 (N, 3, 32, 32)
    lambda images: F.adjust_brightness(images, 1.4),
    lambda images: F.adjust_saturation(images, 0.4),
    lambda images: F.gaussian_blur(images, [3, 3], [0.8, 0.8]),
    lambda images: _jpeg(images, 40),
    lambda images: F.adjust_sharpness(images, 2.0),  # real images have more detail than CIFAKE's
)
