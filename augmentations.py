"""Augmentations of training images, a whole batch at a time and on the device.

They are deterministic: their random parameters are passed in, one set per image. The functions
draw_* draw those of an epoch from PyTorch's CPU generator, so a seed gives the same views on every
device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING, REFLECTION = 4, 2  # pixels


def draw_crops(n: int) -> tuple[Tensor, ...]:
    """Parameters of `crop_and_flip` for n images: the corner of the crop, and whether to mirror."""
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n))
    return top, left, torch.rand(n) < 0.5


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad each image, crop it to its former size, and mirror it where `flip`.

    images: (B, 3, H, W) of any dtype; top, left: int64 (B,) from 0 to 8; flip: bool (B,). The same
    as torchvision's RandomCrop with padding 4 and RandomHorizontalFlip on these draws.
    """
    return _crop_and_flip(F.pad(images, [PADDING] * 4), images.shape[2:], top, left, flip)


def draw_reflected_crops(n: int) -> tuple[Tensor, ...]:
    """Corners of `reflected_crop_and_flip` for n images. The loader adds the flips."""
    top, left = torch.randint(0, 2 * REFLECTION + 1, (2, n))
    return top, left


def reflected_crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Like `crop_and_flip`, but by up to 2 pixels, and padded with the image's reflection.

    top, left: from 0 to 4. As airbench does it (Jordan 2024, arXiv 2404.00498).
    """
    padded = F.pad(images.float(), [REFLECTION] * 4, mode="reflect").to(images.dtype)
    return _crop_and_flip(padded, images.shape[2:], top, left, flip)


def _crop_and_flip(
    padded: Tensor, size: torch.Size, top: Tensor, left: Tensor, flip: Tensor
) -> Tensor:
    windows = padded.unfold(2, size[0], 1).unfold(3, size[1], 1)  # (B, 3, top, left, H, W), a view
    crops = windows[torch.arange(len(padded), device=padded.device), :, top, left]  # (B, 3, H, W)
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


def draw_resized_crop_and_jitter(n: int) -> tuple[Tensor, ...]:
    """Parameters of `resized_crop_and_jitter` for n images: a crop, a flip, colour factors.

    The crop has 25 to 100 % of the area and an aspect ratio of 3:4 to 4:3, as in torchvision's
    RandomResizedCrop. Brightness, contrast and saturation are multiplied by 0.6 to 1.4, and one
    image in ten becomes grey.
    """
    area, shape, x, y, flip, brightness, contrast, saturation, grey = torch.rand(9, n)
    area, shape = 0.25 + 0.75 * area, (4 / 3) ** (2 * shape - 1)
    width, height = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    x, y = (2 * x - 1) * (1 - width), (2 * y - 1) * (1 - height)  # the centre, from -1 to 1
    factors = 0.6 + 0.8 * torch.stack([brightness, contrast, saturation])
    factors[2, grey < 0.1] = 0
    return torch.stack([width, height, x, y], dim=1), flip < 0.5, factors.T


def resized_crop_and_jitter(images: Tensor, box: Tensor, flip: Tensor, factors: Tensor) -> Tensor:
    """Crop a part of each image, resize it to full size, mirror it and change its colours.

    images: uint8 (B, 3, H, W); box: (B, 4), width, height and centre of the crop in an image that
    spans -1 to 1; flip: bool (B,); factors: (B, 3), see `jitter`. Float32 from 0 to 255.
    """
    width, height, x, y = box[:, :, None].unbind(1)  # each (B, 1)
    width = torch.where(flip[:, None], -width, width)
    rows, columns = (
        (middle + size * _centres(n, images.device)).clamp(1 / n - 1, 1 - 1 / n)  # (B, n)
        for middle, size, n in zip((y, x), (height, width), images.shape[2:], strict=True)
    )
    grid = torch.stack(  # (B, H, W, 2)
        torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3
    )
    parts = F.grid_sample(images.float(), grid, align_corners=False)
    return jitter(parts, factors)


def _centres(n: int, device: torch.device) -> Tensor:
    """Where the pixels of a side lie, from -1 to 1: float32 (n,)."""
    return (2 * torch.arange(n, device=device) + 1) / n - 1


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, in this order, by factors (B, 3).

    images: float (B, 3, H, W) from 0 to 255. The same as torchvision's adjust_brightness,
    adjust_contrast and adjust_saturation, image by image.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 255)
    mean = grey(images).mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 255)
    shade = grey(images)
    return (shade + saturation * (images - shade)).clamp(0, 255)


def grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601: (B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


AUGMENTATIONS = {
    "crop": (draw_crops, crop_and_flip),
    "reflect": (draw_reflected_crops, reflected_crop_and_flip),
    "rrc_jitter": (draw_resized_crop_and_jitter, resized_crop_and_jitter),
}
