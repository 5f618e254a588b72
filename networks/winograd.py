"""3x3 convolutions with a quarter of the multiplications, for CPUs that compute in float32.

Winograd's F(4x4, 3x3) (Lavin & Gray 2015, arXiv 1509.09308): a tile of 4x4 outputs takes 36
multiplications instead of 144. The transforms before and after them are bound by memory, so only a
few images are taken at a time, which stay in the cache. Rounding is coarser than that of PyTorch's
own convolution: the logits of a ResNet18 are about twice as far from float64's, by 1e-6 to 1e-5.

Enabled on processors with AVX2 and without AVX-512: only there, and at 32x32, was its speed
measured (docs/speed.md).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ENABLED = torch.backends.cpu.get_cpu_capability() == "AVX2"
MIN_CHANNELS = MIN_TILES = 64  # with fewer, the transforms cost more than they save
CACHE = 2**20  # numbers to work on at a time: 4 MB

# The paper's matrices: for the 6x6 pixels under a tile, for a filter, and back to a tile. They are
# in float64, so that sixths are rounded only once.
B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
G = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)
G /= 24
A_T = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution, stride 1 and padding 1; in float32 on a CPU, by `Winograd` if that gains.

    It does not for a few images at a time, nor where they fill less than half of their tiles.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _gains_on(x):
            return super().forward(x)  # a compiler would unroll the loop over the images
        y = Winograd.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def use_winograd(model: nn.Module) -> nn.Module:
    """Turn the convolutions that gain by it into WinogradConv2d, in place. Returns `model`.

    The state dict stays as it is. Nothing happens where it is not ENABLED.
    """
    for module in model.modules():
        if ENABLED and isinstance(module, nn.Conv2d) and _gains(module):
            module.__class__ = WinogradConv2d
    return model


def _gains(conv: nn.Conv2d) -> bool:
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return (
        type(conv).forward is nn.Conv2d.forward  # a subclass may compute something else
        and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    )


def _gains_on(x: Tensor) -> bool:
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    tiles = _tiles(x)
    return len(x) * tiles >= MIN_TILES and x.shape[2] * x.shape[3] >= 8 * tiles


class Winograd(torch.autograd.Function):
    """(N, C, H, W), filters (O, C, 3, 3) -> what `F.conv2d(x, filters, padding=1)` gives.

    It has no second derivative.
    """

    @staticmethod
    def forward(ctx, x: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(x, filters)
        return _convolve(x, filters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, filters = ctx.saved_tensors
        for_x, for_filters = ctx.needs_input_grad
        turned = filters.flip(2, 3).transpose(0, 1)  # by 180 degrees, from outputs to inputs
        return (
            _convolve(grad, turned) if for_x else None,
            _filter_gradient(x, grad) if for_filters else None,
        )


def _convolve(x: Tensor, filters: Tensor) -> Tensor:
    weights = _transform(G, filters.permute(2, 3, 1, 0)).flatten(0, 1)  # (36, C, O)
    (height, width), (channels, channels_in) = x.shape[2:], filters.shape[:2]
    shape, layout = (len(x), channels, height, width), torch.channels_last
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    for images, out in _in_parts(x, y):
        pixels = _cut(images, B_T)  # (6, 6, n, rows, columns, C)
        products = pixels.view(36, -1, channels_in) @ weights
        tiles = _transform(A_T, products.view(*pixels.shape[:-1], channels))
        tiles = tiles.permute(2, 3, 0, 4, 1, 5)  # (n, rows, 4, columns, 4, O)
        out = out.permute(0, 2, 3, 1)
        if height % 4 == width % 4 == 0:
            out.view(tiles.shape).copy_(tiles)
        else:  # flatten copies
            out.copy_(tiles.flatten(1, 2).flatten(2, 3)[:, :height, :width])
    return y


def _filter_gradient(x: Tensor, grad: Tensor) -> Tensor:
    channels = x.shape[1], grad.shape[1]
    sums = x.new_zeros(36, *channels)
    for images, gradients in _in_parts(x, grad):
        pixels, tiles = _cut(images, B_T), _cut(gradients, A_T.T)
        sums.baddbmm_(pixels.view(36, -1, channels[0]).mT, tiles.view(36, -1, channels[1]))
    return _transform(G.T, sums.view(6, 6, *channels)).permute(3, 2, 0, 1)


def _in_parts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, a few images at a time: as many as the cache holds, or outweigh the filters."""
    channels = x.shape[1], y.shape[1]
    per_image, in_filters = 36 * _tiles(x) * sum(channels), 36 * math.prod(channels)
    count = max(1, max(CACHE, in_filters) // per_image)
    return zip(x.split(count), y.split(count), strict=True)


def _tiles(x: Tensor) -> int:
    """How many tiles of 4x4 cover an image of `x`, (N, C, H, W)."""
    height, width = x.shape[2:]
    return -(-height // 4) * -(-width // 4)


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
