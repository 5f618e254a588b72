"""Ten classes of small pictures, drawn by NumPy from a seed: the demo set.

Each picture shows one shape. In the "real" style its position, size and angle vary, on a striped
background with a blob, uneven light and noise. The "synthetic" style imitates a generator: clean,
centred, larger and less varied. Shape and background swap their brightness at random, so a linear
classifier on pixels learns next to nothing.
"""

import functools

import numpy as np
import torch

from data import ImageSet

SHAPES = tuple("disc ring square frame triangle cross bar bars star crescent".split())
SIZE = 32


def draw(style: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures in the style "real" or "synthetic", from a seed.

    Returns images, uint8 (N, 3, 32, 32), and labels, int64 (N,), indices into `SHAPES`: all equally
    frequent, in random order. The same arguments give the same pictures.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(SHAPES))
    real = style == "real"

    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (count, channels, 1, 1)).astype(np.float32)

    # the pixel grid in each shape's coordinates: shifted, turned, and in units of its radius
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    shift, turn, smallest = (6, 0.5, 7) if real else (3, 0.3, 8)
    dx, dy = x - uniform(-shift, shift), y - uniform(-shift, shift)
    angle, radius = uniform(-turn, turn), uniform(smallest, 11)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    distance = np.empty((count, 1, SIZE, SIZE), np.float32)
    for label, shape in enumerate(SHAPES):
        distance[labels == label] = _distance(shape, u[labels == label], v[labels == label])
    inside = 1 / (1 + np.exp((distance * radius / 0.4).clip(-30, 30)))  # from 1 to 0 over a pixel

    dark, bright = uniform(0, 0.45, 3), uniform(0.55, 1, 3)
    swap = rng.random((count, 1, 1, 1)) < 0.5
    colour, ground = np.where(swap, dark, bright), np.where(swap, bright, dark)
    if real:
        tilt = uniform(0, np.pi)
        stripes = np.sin(uniform(0.5, 1.5) * (np.cos(tilt) * x + np.sin(tilt) * y) + uniform(0, 6))
        ground = ground + uniform(0, 0.15) * stripes
    images = ground + (colour - ground) * inside
    if real:
        blob = np.exp(-((x - uniform(-14, 14)) ** 2 + (y - uniform(-14, 14)) ** 2) / uniform(4, 10))
        images += (uniform(0, 1, 3) - images) * blob
        images *= 1 + 0.02 * (uniform(-1, 1) * x + uniform(-1, 1) * y)
    images += (0.07 if real else 0.02) * rng.standard_normal(images.shape, np.float32)
    return (255 * images.clip(0, 1)).round().astype(np.uint8), labels


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Approximate distance to the edge of the shape, in radii: negative inside it."""
    disc = np.hypot(u, v) - 0.9
    square = np.maximum(abs(u), abs(v)) - 0.8
    bar = np.maximum(abs(u) - 1, abs(v) - 0.3)
    return {
        "disc": disc,
        "ring": abs(disc + 0.2) - 0.2,
        "square": square,
        "frame": abs(square + 0.2) - 0.2,
        "triangle": np.maximum(v - 0.6, 0.87 * abs(u) - 0.5 * v - 0.5),
        "cross": np.minimum(bar, np.maximum(abs(v) - 1, abs(u) - 0.3)),
        "bar": bar,
        "bars": np.maximum(abs(u) - 1, abs(abs(v) - 0.55) - 0.25),
        "star": np.hypot(u, v) - 0.65 - 0.35 * np.cos(5 * np.arctan2(u, -v)),
        "crescent": np.maximum(disc, 0.75 - np.hypot(u - 0.55, v)),
    }[shape]


@functools.cache
def load_demo(part: str) -> ImageSet:
    """The demo set: `part` is "train" or "test", in the real style, or "synthetic"."""
    style, count, seed = {
        "train": ("real", 3000, 1),
        "test": ("real", 1000, 2),
        "synthetic": ("synthetic", 3000, 3),
    }[part]
    images, labels = draw(style, count, seed)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), SHAPES)
