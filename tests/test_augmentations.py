"""Whole batches on the device, against torchvision or an obvious loop on the same draws."""

import numpy as np
import pytest
import torch
from conftest import random_images
from torchvision.transforms.v2 import functional as F

from augmentations import (
    AUGMENTATIONS,
    crop_and_flip,
    draw_reflected_crops,
    draw_resized_crop_and_jitter,
    jitter,
    reflected_crop_and_flip,
    resized_crop_and_jitter,
)
from data import CLASSES, DeviceLoader, ImageSet
from experiment.device import MEMORY_FORMAT


def test_crops_and_flips_are_torchvisions():
    images = random_images(64)
    generator = torch.Generator().manual_seed(0)
    top, left = torch.randint(0, 9, (2, 64), generator=generator)
    flip = torch.rand(64, generator=generator) < 0.5
    ours = crop_and_flip(images, top, left, flip)
    for i in range(64):
        theirs = F.crop(F.pad(images[i], [4]), int(top[i]), int(left[i]), 32, 32)
        theirs = F.horizontal_flip(theirs) if flip[i] else theirs
        assert torch.equal(ours[i], theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_reflected_crops_are_numpys(dtype):
    images = random_images(64).to(dtype)
    torch.manual_seed(0)
    top, left = draw_reflected_crops(64)
    flip = torch.rand(64) < 0.5
    assert {*top.tolist()} == {*left.tolist()} == {0, 1, 2, 3, 4}
    ours = reflected_crop_and_flip(images, top, left, flip)
    assert ours.dtype == dtype
    for i in range(64):
        padded = np.pad(images[i].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        theirs = padded[:, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert np.array_equal(ours[i].numpy(), theirs[:, :, ::-1] if flip[i] else theirs)


def test_colours_are_torchvisions():
    images = random_images(16).float() / 255
    factors = 0.6 + 0.8 * torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    ours = jitter(255 * images, factors) / 255
    for i, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        theirs = F.adjust_brightness(images[i], brightness)
        theirs = F.adjust_saturation(F.adjust_contrast(theirs, contrast), saturation)
        assert torch.allclose(ours[i], theirs, atol=1e-3)


def test_a_part_of_a_picture_is_torchvisions_resized_crop():
    images, same = random_images(2), torch.ones(2, 3)
    whole = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2)
    flip = torch.tensor([False, True])
    got = resized_crop_and_jitter(images, whole, flip, same)
    assert torch.allclose(got[0], images[0].float(), atol=1e-2)
    assert torch.allclose(got[1], images[1].flip(2).float(), atol=1e-2)
    # rows 16 to 24 and columns 16 to 32; at the rim of the part, ours looks over it and theirs not
    part = torch.tensor([[0.5, 0.25, 0.5, 0.25]] * 2)
    got = resized_crop_and_jitter(images, part, torch.tensor([False, False]), same)
    theirs = F.resized_crop(images.float(), 16, 16, 8, 16, [32, 32], antialias=False)
    assert torch.allclose(got[..., 2:-2, 1:-1], theirs[..., 2:-2, 1:-1], atol=1e-2)


def test_resized_crops_keep_to_their_ranges():
    torch.manual_seed(0)
    box, flip, factors = draw_resized_crop_and_jitter(20_000)
    width, height, x, y = box.unbind(1)
    area, shape = width * height, width / height
    near = pytest.approx  # of 20,000 draws, the extremes are this near the ends of the range
    assert (area.min(), area.max()) == (near(0.25, abs=0.01), near(1, abs=0.02))
    assert (shape.min(), shape.max()) == (near(3 / 4, abs=0.01), near(4 / 3, abs=0.01))
    for size, middle in ((width, x), (height, y)):
        assert size.max() <= 1
        assert (middle + size).max() == near(1, abs=1e-3)  # up to either rim, and not beyond
        assert (middle - size).min() == near(-1, abs=1e-3)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (factors[:, 2] == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    for factor in factors.unbind(1):
        factor = factor[factor > 0]
        assert (factor.min(), factor.max()) == (near(0.6, abs=1e-3), near(1.4, abs=1e-3))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_loader_serves_every_kind(augment):
    images = ImageSet(random_images(50), torch.arange(50) % 10, CLASSES)
    loader = DeviceLoader(images, 16, "cpu", True, augment)

    def epoch(seed):
        torch.manual_seed(seed)
        return list(loader)

    one, again, other = epoch(0), epoch(0), epoch(1)
    assert len(one) == 3
    for (a, labels), (b, labels_again), (c, _) in zip(one, again, other, strict=True):
        assert (a.shape, a.dtype) == ((16, 3, 32, 32), torch.float32)
        assert a.is_contiguous(memory_format=MEMORY_FORMAT)
        assert torch.equal(a, b)
        assert torch.equal(labels, labels_again)
        assert not torch.equal(a, c)
        assert (labels.shape, labels.dtype) == ((16,), torch.int64)


def test_the_draws_of_a_resized_crop_and_jitter_are_independent():
    torch.manual_seed(0)
    box, flip, factors = draw_resized_crop_and_jitter(20_000)
    width, height, x, y = box.unbind(1)
    shape, grey = (width / height).log(), (factors[:, 2] == 0).float()
    assert abs(shape.mean()) < 0.005
    draws = [width * height, shape, x, y, flip.float(), *factors[:, :2].unbind(1), grey]
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(8)).abs().max() < 0.05


def test_a_resized_crop_at_the_rim_shows_no_border():
    white, box = torch.full((1, 3, 32, 32), 255).byte(), torch.full((1, 4), 0.5)
    view = resized_crop_and_jitter(white, box, torch.tensor([False]), torch.ones(1, 3))
    assert view.min() > 254
