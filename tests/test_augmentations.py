"""Whole batches on the device, against torchvision or an obvious loop on the same draws."""

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from augmentations import (
    AUGMENTATIONS,
    MIXES,
    crop_and_flip,
    cutmix,
    draw_mixes,
    draw_strong,
    jitter,
    mix_labels,
    mixup,
    strong,
)
from data import CLASSES, DeviceLoader, ImageSet


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
    got = strong(images, whole, flip, same)
    assert torch.allclose(got[0], images[0].float(), atol=1e-2)
    assert torch.allclose(got[1], images[1].flip(2).float(), atol=1e-2)
    # rows 8 to 24 and columns 16 to 32; at the rim of the part, ours looks over it and theirs not
    part = torch.tensor([[0.5, 0.5, 0.5, 0.0]] * 2)
    got = strong(images, part, torch.tensor([False, False]), same)
    theirs = F.resized_crop(images.float(), 8, 16, 16, 16, [32, 32], antialias=False)
    assert torch.allclose(got[..., 1:-1, 1:-1], theirs[..., 1:-1, 1:-1], atol=1e-2)


def test_strong_draws_keep_to_their_ranges():
    torch.manual_seed(0)
    box, flip, factors = draw_strong(20_000)
    width, height, x, y = box.unbind(1)
    assert (width.max(), height.max()) <= (1, 1)
    assert 0.24 < (width * height).min() < 0.27
    assert ((x.abs() + width).max(), (y.abs() + height).max()) <= (1 + 1e-6, 1 + 1e-6)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (factors[:, 2] == 0).float().mean() == pytest.approx(0.1, abs=0.01)
    assert 0.59 < factors[:, :2].min() < factors.max() < 1.41


def test_mixup_is_a_blend_of_neighbours():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    share = torch.tensor(0.3)
    mixed, kept = mixup(images, share, torch.rand(2))
    targets = mix_labels(labels, kept, 3)
    for i in range(6):
        assert torch.allclose(mixed[i], 0.3 * images[i] + 0.7 * images[i - 1])
        expected = torch.zeros(3)
        expected[labels[i]] += 0.3
        expected[labels[i - 1]] += 0.7
        assert torch.allclose(targets[i], expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.1, 0.95)])
def test_cutmix_pastes_a_box(share, centre):
    images = torch.randn(4, 3, 32, 32)
    mixed, kept = cutmix(images, torch.tensor(share), torch.tensor(centre))
    foreign, reach = 0, (1 - share) ** 0.5 / 2
    for y in range(32):
        for x in range(32):
            inside = all(
                abs((at + 0.5) / 32 - c) < reach for at, c in zip((y, x), centre, strict=True)
            )
            foreign += inside
            source = images.roll(1, 0) if inside else images
            assert torch.equal(mixed[:, :, y, x], source[:, :, y, x])
    assert kept == pytest.approx(1 - foreign / 32**2)
    if centre == (0.5, 0.5):
        assert kept == pytest.approx(share, abs=0.05)


def test_mixes_are_drawn_for_every_batch():
    torch.manual_seed(0)
    share, centre = draw_mixes(5000, 1.0)
    assert (share.shape, centre.shape) == ((5000,), (5000, 2))
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert draw_mixes(5000, 0.1)[0].std() > share.std()


@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("mix", ["none", *MIXES])
def test_a_loader_serves_every_kind(augment, mix):
    images = ImageSet(made_images(50), torch.arange(50) % 10, CLASSES)
    loader = DeviceLoader(images, 16, "cpu", True, augment, mix)

    def epoch(seed):
        torch.manual_seed(seed)
        return list(loader)

    one, again, other = epoch(0), epoch(0), epoch(1)
    assert len(one) == 3
    for (a, labels), (b, _), (c, _) in zip(one, again, other, strict=True):
        assert (a.shape, a.dtype) == ((16, 3, 32, 32), torch.float32)
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        if mix == "none":
            assert (labels.shape, labels.dtype) == ((16,), torch.int64)
        else:
            assert labels.shape == (16, 10)
            assert torch.allclose(labels.sum(1), torch.ones(16))
