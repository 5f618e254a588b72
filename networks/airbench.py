"""The small, fast networks of airbench, for 32x32 images (Jordan 2024, arXiv 2404.00498).

A frozen convolution whitens 2x2 patches; three groups of two 3x3 convolutions follow, from 31x31
pixels to 15x15, 7x7 and 3x3. airbench94 has a fifth of a ResNet18's arithmetic and reaches
93 % on CIFAR-10 in ten epochs. As published, but for the averaging of mirrored and shifted copies
at test time, with which it reaches 94 %. Here it is trained with a mean loss, without label
smoothing, and its whitening bias learns throughout.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

WHITENING_IMAGES = 5_000  # as published
WIDTHS = {"airbench94": (64, 256, 256), "airbench95": (128, 384, 384)}


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm without a scale: the bias alone is trained."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class Conv(nn.Conv2d):
    """A 3x3 convolution whose first filters start as the identity, one for each input channel."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])


class Group(nn.Sequential):
    """Convolution, max-pool, BatchNorm, GELU, convolution, BatchNorm, GELU: half the size."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(
            Conv(channels_in, channels),
            nn.MaxPool2d(2),
            BatchNorm(channels),
            nn.GELU(),
            Conv(channels, channels),
            BatchNorm(channels),
            nn.GELU(),
        )


class Airbench(nn.Module):
    """(B, 3, 32, 32) -> logits (B, num_classes). Call `whiten` before training from random weights.

    `widths` are the channels of the three groups.
    """

    def __init__(self, widths: tuple[int, int, int], num_classes: int = 10) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)
        self.groups = nn.Sequential(nn.GELU(), *(Group(*pair) for pair in pairwise((24, *widths))))
        self.pool = nn.MaxPool2d(3)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, num_classes)
        x = self.groups(self.whitening(x))  # (B, 24, 31, 31) -> (B, widths[-1], 3, 3)
        return self.head(self.pool(x).flatten(1)) / 9  # as published: small logits, a slow head

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the frozen filters from normalised training images, (N, 3, 32, 32), on the CPU.

        They are the twelve eigenvectors of the mean of x x^T over all 2x2 patches x, each divided
        by the root of its eigenvalue + 5e-4, and their negatives: projections whose mean square is
        one.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, 31, 31, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
