"""Whole batches on the device, against torchvision or an obvious loop on the same draws."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from augmentations import (
    AUGMENTATIONS,
    crop_and_flip,
    draw_reflected_crops,
    draw_resized_crop_and_jitter,
    draw_shares,
    jitter,
    mix_labels,
    mixup,
    reflected_crop_and_flip,
    resized_crop_and_jitter,
)
from data import CIFAR10_MEAN, CIFAR10_STD, CLASSES, DeviceLoader, ImageSet
from experiment.device import MEMORY_FORMAT


def made_images(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def test_crops_and_flips_are_torchvisions():
    images = made_images(64)
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
    images = made_images(64).to(dtype)
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
    images = made_images(16).float() / 255
    factors = 0.6 + 0.8 * torch.rand(16, 3, generator=torch.Generator().manual_seed(0))
    ours = jitter(255 * images, factors) / 255
    for i, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        theirs = F.adjust_brightness(images[i], brightness)
        theirs = F.adjust_saturation(F.adjust_contrast(theirs, contrast), saturation)
        assert torch.allclose(ours[i], theirs, atol=1e-3)


def test_a_part_of_a_picture_is_torchvisions_resized_crop():
    images, same = made_images(2), torch.ones(2, 3)
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


def test_mixup_is_a_blend_of_neighbours():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed = mixup(images, torch.tensor(0.3))
    targets = mix_labels(labels, torch.tensor(0.3), 3)
    for i in range(6):
        assert torch.allclose(mixed[i], 0.3 * images[i] + 0.7 * images[i - 1])
        expected = torch.zeros(3)
        expected[labels[i]] += 0.3
        expected[labels[i - 1]] += 0.7
        assert torch.allclose(targets[i], expected)


def test_mixup_is_channels_last_where_roll_is_not(monkeypatch):
    """As on CUDA, where roll makes its input contiguous first."""
    roll = torch.Tensor.roll
    monkeypatch.setattr(torch.Tensor, "roll", lambda x, *args: roll(x, *args).contiguous())
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    mixed = mixup(images, torch.tensor(0.5))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert not mixed.is_contiguous()


def test_shares_are_drawn_for_every_batch():
    torch.manual_seed(0)
    shares = draw_shares(5000, 1.0)
    assert shares.shape == (5000,)
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert draw_shares(5000, 0.1).std() > shares.std()


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_a_loader_serves_every_kind(augment, alpha):
    images = ImageSet(made_images(50), torch.arange(50) % 10, CLASSES)
    loader = DeviceLoader(images, 16, "cpu", True, augment, mixup=alpha)

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
        if alpha == 0:
            assert (labels.shape, labels.dtype) == ((16,), torch.int64)
        else:
            assert labels.shape == (16, 10)
            assert torch.allclose(labels.sum(1), torch.ones(16))
    if alpha:  # not one share for all batches
        assert len({tuple(labels.unique().tolist()) for _, labels in one}) == 3


def test_a_mixed_batch_has_the_labels_of_its_pictures():
    """Each class has pictures of a single shade, so that the shade tells the shares."""
    labels = torch.arange(40) % 10
    images = (25 * labels).to(torch.uint8)[:, None, None, None].expand(40, 3, 32, 32)
    loader = DeviceLoader(ImageSet(images, labels, CLASSES), 20, "cpu", True, mixup=0.4)
    for mixed, shares in loader:
        shades = mixed[:, 0, 16, 16] * 255 * CIFAR10_STD[0] + 255 * CIFAR10_MEAN[0]
        assert torch.allclose(shades, shares @ (25.0 * torch.arange(10)), atol=0.01)
