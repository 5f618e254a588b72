"""Ten classes of 32x32 pictures, drawn by NumPy from a seed: the demo set.

    python synthetic_data/demo_images.py sheet.png      # a contact sheet: five "real" rows, five "synthetic"

Each picture shows one shape, at a random place, size, angle and colour, on a background. The "real" style is
cluttered: uneven light, stripes behind the shape, a second small blob, noise. The "synthetic" style is what a
generator tends to make of it: clean, bright, centred, and more alike. Fore- and background swap their
brightness at random, so that a linear classifier on pixels finds next to nothing.
"""

import sys

import numpy as np

SHAPES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "bar",
    "two bars",
    "star",
    "crescent",
)
SIZE = 32


def draw(style: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pictures in `style` ("real" or "synthetic"): uint8 (N, 3, 32, 32), and int64 (N,) shapes.

    The classes are equally frequent and in random order. The same arguments give the same pictures.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    real = style == "real"
    spread, turn, blur = (6.0, 0.6, 1.2) if real else (2.5, 0.25, 0.6)

    def per_image(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *(shape or (1, 1))))

    # the pixel grid in the frame of each shape: shifted, turned and scaled to a radius of about 1
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float64) - (SIZE - 1) / 2
    dx, dy = x - per_image(-spread, spread), y - per_image(-spread, spread)
    angle, radius = per_image(-turn, turn), per_image(6, 11) if real else per_image(8, 11)
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    distance = np.empty((count, SIZE, SIZE))
    for label in range(len(SHAPES)):
        of = labels == label
        distance[of] = _distance(SHAPES[label], u[of], v[of])
    mask = 1 / (
        1 + np.exp(np.clip(distance * radius / (0.5 * blur), -30, 30))
    )  # 1 inside, 0 outside

    # two colours of different brightness, either of which may be the shape's
    dark, light = per_image(0.0, 0.45, 3, 1, 1), per_image(0.55, 1.0, 3, 1, 1)
    swap = rng.random((count, 1, 1, 1)) < 0.5
    front, back = np.where(swap, dark, light), np.where(swap, light, dark)
    images = back + (front - back) * mask[:, None]

    if real:
        phase, pitch, tilt = per_image(0, 6.3), per_image(0.5, 1.5), per_image(0, 3.15)
        stripes = np.sin(pitch * (np.cos(tilt) * x + np.sin(tilt) * y) + phase)
        images += per_image(0.05, 0.2, 1, 1, 1) * (stripes * (1 - mask))[:, None]
        far = (x - per_image(-14, 14)) ** 2 + (y - per_image(-14, 14)) ** 2
        blob = per_image(0.4, 0.9) * np.exp(-far / per_image(4, 12))
        images += (per_image(0, 1, 3, 1, 1) - images) * blob[:, None]
        light = 1 + 0.03 * (per_image(-1, 1) * x + per_image(-1, 1) * y)
        images = images * light[:, None] + rng.normal(0, 0.09, images.shape)
    else:
        images += rng.normal(0, 0.02, images.shape)
    return (255 * images.clip(0, 1)).round().astype(np.uint8), labels


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Below 0 inside the shape, above 0 outside; about the distance to its edge, in radii."""
    disc = np.hypot(u, v) - 0.9
    square = np.maximum(abs(u), abs(v)) - 0.8
    bar = np.maximum(abs(u) - 1, abs(v) - 0.3)
    if shape == "disc":
        return disc
    if shape == "ring":
        return abs(disc + 0.2) - 0.2
    if shape == "square":
        return square
    if shape == "frame":
        return abs(square + 0.2) - 0.2
    if shape == "triangle":
        return np.maximum(v - 0.6, abs(u) * 0.87 - v * 0.5 - 0.5)
    if shape == "cross":
        return np.minimum(bar, np.maximum(abs(v) - 1, abs(u) - 0.3))
    if shape == "bar":
        return bar
    if shape == "two bars":
        return np.maximum(abs(u) - 1, abs(abs(v) - 0.55) - 0.25)
    if shape == "star":
        return np.hypot(u, v) - 0.65 - 0.35 * np.cos(5 * np.arctan2(u, -v))
    return np.maximum(disc, 0.75 - np.hypot(u - 0.55, v))  # crescent


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} sheet.png")
    import torch
    from torchvision.utils import save_image

    rows = []
    for style in ("real", "synthetic"):
        images, labels = draw(style, 400, seed=0)
        rows += [
            images[np.flatnonzero(labels == c)[k]] for k in range(5) for c in range(len(SHAPES))
        ]
    save_image(torch.from_numpy(np.stack(rows)) / 255, sys.argv[1], nrow=len(SHAPES))
    print(f"{sys.argv[1]}: {', '.join(SHAPES)}")


if __name__ == "__main__":
    main()
