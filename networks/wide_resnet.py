"""Wide ResNets for 32x32 images: WRN-depth-width of Zagoruyko & Komodakis (arXiv 1605.07146).

A 3x3 convolution, three groups of (depth - 4) / 6 blocks at 32x32, 16x16 and 8x8 with 16, 32 and 64
times `width` channels, and global average pooling. A block adds BN-ReLU-conv-BN-ReLU-conv to its
input. Where the number of channels changes, it adds them to a 1x1 convolution of the first BN-ReLU
instead. There is no dropout. torchvision has only the wide ResNet-50 and -101 for ImageNet.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, channels_in, H, W) -> (B, channels, H', W')
        out = F.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = self._group(blocks, 16, 16 * width, stride=1)
        self.layer2 = self._group(blocks, 16 * width, 32 * width, stride=2)
        self.layer3 = self._group(blocks, 32 * width, 64 * width, stride=2)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        rest = [Block(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Block(channels_in, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, num_classes)
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))  # (B, 64 * width) before fc
