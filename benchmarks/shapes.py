"""Drawn pictures for the benchmarks: six shapes anywhere, in any size, turn and colour, on cloudy noise.

Unlike digits they are not in the middle, and unlike photographs they can be had in any number without a download.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

TESTED = 400  # pictures of the test half
SMALLEST, LARGEST = 0.12, 0.26  # radius of a shape as a share of the picture's shorter side
FINER = 4  # times the picture's size is what is drawn, so that rims are smooth
CONTRAST = 40  # mean difference of a channel, 0..255, between a shape and what it lies on


def _star(points: int, waist: float) -> list[tuple[float, float]]:
    """Corners (x, y) about the origin, alternately at radius 1 and at `waist`."""
    angles = [math.pi * corner / points for corner in range(2 * points)]
    radii = [waist if corner % 2 else 1.0 for corner in range(2 * points)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _ring(inner: float) -> list[tuple[float, float]]:
    """Around the rim, across, and back around the hole."""
    turn = np.linspace(0, 2 * math.pi, 49)
    outside = [(math.cos(angle), math.sin(angle)) for angle in turn]
    return outside + [(inner * x, inner * y) for x, y in reversed(outside)]


ARM = 0.35  # half the width of the cross's
QUARTER = [(ARM, -1), (ARM, -ARM), (1, -ARM)]  # of its corners
SHAPES: dict[str, list[tuple[float, float]]] = {  # in the order of their names
    "cross": [
        *QUARTER,
        *((-y, x) for x, y in QUARTER),
        *((-x, -y) for x, y in QUARTER),
        *((y, -x) for x, y in QUARTER),
    ],
    "disc": _star(24, 1.0),
    "ring": _ring(0.55),
    "square": _star(2, 1.0),
    "star": _star(5, 0.45),
    "triangle": _star(3, 0.5),
}


def draw(name: str, size: tuple[int, int], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture (h, w, 3) uint8 of the shape `name`, and its mask (h, w) bool."""
    height, width = size
    radius = generator.uniform(SMALLEST, LARGEST) * min(size)
    x, y = generator.uniform(radius, width - radius), generator.uniform(radius, height - radius)
    turn = generator.uniform(0, 2 * math.pi)
    covered = _covered(SHAPES[name], (x, y), radius, turn, size)
    ground, texture = _clouds(size, generator), _clouds(size, generator)
    ground += generator.uniform(30, 120, 3)
    mask = covered > 0.5
    colour = generator.uniform(150, 255, 3)
    while np.abs(colour - ground[mask].mean(axis=0)).mean() < CONTRAST:
        colour = generator.uniform(150, 255, 3)
    image = ground + covered[..., None] * (colour + texture - ground)
    return image.clip(0, 255).astype(np.uint8), mask


def _covered(
    corners: list[tuple[float, float]], centre: tuple[float, float], radius: float, turn: float, size: tuple[int, int]
) -> Float[np.ndarray, "h w"]:
    """How much of each pixel the polygon covers, 0..1."""
    cosine, sine = radius * math.cos(turn) * FINER, radius * math.sin(turn) * FINER
    placed = [
        (centre[0] * FINER + x * cosine - y * sine, centre[1] * FINER + x * sine + y * cosine) for x, y in corners
    ]
    fine = Image.new("L", (size[1] * FINER, size[0] * FINER))
    ImageDraw.Draw(fine).polygon(placed, fill=255)
    return np.asarray(fine.resize((size[1], size[0]), Image.Resampling.BOX)) / 255


def _clouds(size: tuple[int, int], generator: np.random.Generator) -> Float[np.ndarray, "h w 3"]:
    """Noise of all scales about 0, the coarse ones stronger; its standard deviation is some 25 of 255."""
    clouds = np.zeros((*size, 3))
    for octave in range(1, 7):
        grid = generator.normal(size=(3, 2**octave, 2**octave)).astype(np.float32)
        shape = (size[1], size[0])
        layers = [np.asarray(Image.fromarray(plane).resize(shape, Image.Resampling.BICUBIC)) for plane in grid]
        clouds += 30 * 1.6 ** (1 - octave) * np.stack(layers, axis=-1)
    return clouds


def shapes(
    size: tuple[int, int], train: int, seed: int
) -> tuple[UInt8[np.ndarray, "n h w 3"], Bool[np.ndarray, "n h w"], Int[np.ndarray, "n"]]:
    """`train` pictures and then `TESTED` more, their masks, and each one's place in `SHAPES`; these take turns."""
    generator, names = np.random.default_rng([seed, 5]), list(SHAPES)
    labels = np.arange(train + TESTED) % len(names)
    images, masks = zip(*(draw(names[label], size, generator) for label in labels), strict=True)
    return np.stack(images), np.stack(masks), labels
