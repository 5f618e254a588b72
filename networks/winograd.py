"""3x3 convolutions with a quarter of the multiplications, for CPUs that compute in float32.

Winograd's F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): a tile of 4x4 outputs takes 36
multiplications instead of 144. The transforms before and after them are bound by memory, so only a
few images are taken at a time, which stay in the cache. Rounding differs from that of PyTorch's own
convolution, and is no worse: both networks' logits are as far from float64's (docs/speed.md).

Used on processors with AVX2 and without AVX-512, the only ones on which its speed was measured.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FASTER = torch.backends.cpu.get_cpu_capability() == "AVX2"
CHANNELS = 64  # with fewer, the transforms cost more than they save
CACHE = 2**20  # numbers: 4 MB

# The paper's B^T, G and A^T: for the 6x6 pixels under a tile, for a filter, and back to the tile.
matrix = functools.partial(torch.tensor, dtype=torch.float64)
PIXELS = matrix(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
FILTER = matrix([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
TILE = matrix([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, stride 1 and padding 1, by `Winograd` in float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y = Winograd.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def use_winograd(model: nn.Module) -> nn.Module:
    """Make the convolutions that gain by it WinogradConv2d, in place, if this CPU is FASTER so.

    Names, values and order of the weights stay. Returns `model`.
    """
    must = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    must |= dict(padding_mode="zeros")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions if FASTER else ():
        fits = all(getattr(conv, name) == value for name, value in must.items())
        if fits and min(conv.in_channels, conv.out_channels) >= CHANNELS:
            conv.__class__ = WinogradConv2d
    return model


class Winograd(torch.autograd.Function):
    """(N, C, H, W), filters (O, C, 3, 3) -> what `F.conv2d(x, filters, padding=1)` gives."""

    @staticmethod
    def forward(ctx, x: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(x, filters)
        return _convolve(x, filters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, filters = ctx.saved_tensors
        for_x, for_filters = ctx.needs_input_grad
        turned = filters.flip(2, 3).transpose(0, 1)
        return (
            _convolve(grad, turned) if for_x else None,
            _filter_gradient(x, grad) if for_filters else None,
        )


def _convolve(x: Tensor, filters: Tensor) -> Tensor:
    weights = _transform(FILTER, filters.permute(2, 3, 1, 0)).flatten(0, 1)  # (36, C, O)
    height, width = x.shape[2:]
    y = x.new_empty(len(x), height, width, len(filters)).permute(0, 3, 1, 2)  # channels-last
    for images, out in _in_parts(x, y):
        pixels = _cut(images, PIXELS)  # (6, 6, n, rows, columns, C)
        products = pixels.view(36, -1, pixels.shape[-1]) @ weights
        tiles = _transform(TILE, products.view(*pixels.shape[:-1], -1))
        tiles = tiles.permute(2, 3, 0, 4, 1, 5)  # (n, rows, 4, columns, 4, O)
        out = out.permute(0, 2, 3, 1)
        if height % 4 == width % 4 == 0:
            out.view(tiles.shape).copy_(tiles)
        else:
            out.copy_(tiles.flatten(1, 2).flatten(2, 3)[:, :height, :width])
    return y


def _filter_gradient(x: Tensor, grad: Tensor) -> Tensor:
    channels = x.shape[1], grad.shape[1]
    sums = x.new_zeros(36, *channels)
    for images, gradients in _in_parts(x, grad):
        pixels, tiles = _cut(images, PIXELS), _cut(gradients, TILE.T)
        sums.baddbmm_(pixels.view(36, -1, channels[0]).mT, tiles.view(36, -1, channels[1]))
    return _transform(FILTER.T, sums.view(6, 6, *channels)).permute(3, 2, 0, 1)


def _in_parts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, a few images at a time: what the cache holds, or more where the filters are larger."""
    _, channels, height, width = x.shape
    tiles = -(-height // 4) * -(-width // 4)
    of_an_image, of_filters = 36 * tiles * (channels + y.shape[1]), 36 * channels * y.shape[1]
    count = max(1, max(CACHE, of_filters) // of_an_image)
    return zip(x.split(count), y.split(count), strict=True)


def _cut(x: Tensor, matrix: Tensor) -> Tensor:
    """(N, C, H, W) -> its tiles, transformed by a (6, size) matrix: (6, 6, N, rows, columns, C).

    Tiles of size 4 lie side by side; those of size 6 have a margin of one pixel all around.
    """
    size = matrix.shape[1]
    margin, (height, width) = (size - 4) // 2, x.shape[2:]
    x = x.permute(0, 2, 3, 1)
    x = F.pad(x, (0, 0, margin, margin + -width % 4, margin, margin + -height % 4))
    x = x.unfold(1, size, 4).unfold(2, size, 4)  # (N, rows, columns, C, size, size)
    return _transform(matrix, x.permute(4, 5, 0, 1, 2, 3))


def _transform(matrix: Tensor, x: Tensor) -> Tensor:
    """M X M^T for every X of `x`, (size, size, ...) -> (k, k, ...); the matrix is (k, size)."""
    matrix, (k, size) = matrix.to(x), matrix.shape
    columns = matrix @ x.reshape(size, size, -1)  # (size, k, ...)
    return (matrix @ columns.view(size, -1)).view(k, k, *x.shape[2:])
