"""Masks to and from Label Studio: seconds of this project's code and of the SDK's own converter, in one run.

    python -m benchmarks.masks                    # the ratios
    python -m benchmarks.masks --fuzz 10000       # and as many random masks compared byte by byte

A soft mask is what a network makes: 14 x 14 grey levels, enlarged smoothly. Each time is the shortest of some.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from label_studio_sdk.converter import brush
from PIL import Image

from labeling.masks import decode_png, decode_rle, encode_png, encode_rle

SIZES = (224, 1024)  # pixels, of both sides
GRID = 14


def soft_mask(size: int, seed: int = 0) -> np.ndarray:
    grid = np.random.default_rng(seed).random((GRID, GRID)).astype(np.float32)
    large = np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BILINEAR))
    return (large * 255).round().astype(np.uint8)


def random_mask(rng: np.random.Generator) -> np.ndarray:
    """Noise, few levels, or long runs, of a random size; now and then runs around the longest that one code holds."""
    if rng.random() < 0.02:
        lengths = rng.choice([8, 16, 256, 65536], 3) // 4 + rng.integers(-1, 2, 3)
        return np.repeat(rng.permutation(256)[:3], np.maximum(lengths, 1)).astype(np.uint8)[None]
    height, width = rng.integers(1, 40, 2)
    levels = rng.choice([1, 2, 3, 256])
    values = rng.integers(0, 256, levels)[rng.integers(0, levels, height * width)]
    runs = np.repeat(values, rng.integers(1, 30, values.size))[: values.size]
    return (runs if rng.random() < 0.6 else values).reshape(height, width).astype(np.uint8)


def compare(mask: np.ndarray) -> None:
    """AssertionError where one of the two cannot read the other, or writes another stream."""
    rle = encode_rle(mask)
    assert rle == brush.mask2rle(mask), mask
    assert np.array_equal(brush.decode_rle(rle).reshape(*mask.shape, 4)[..., 3], mask), mask
    assert np.array_equal(decode_rle(rle, *mask.shape), mask), mask


def shortest(call: Callable[[], object], seconds: float) -> float:
    """Of several calls within about `seconds`, two at least; in seconds of this process, whatever else runs."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        begin = time.process_time()
        call()
        taken.append(time.process_time() - begin)
    return min(taken)


def measure(size: int, seconds: float) -> dict[str, tuple[float, float]]:
    """What is done -> seconds here, seconds of the SDK."""
    mask = soft_mask(size)
    rle, url = encode_rle(mask), encode_png(mask)
    return {
        "encode RLE": (shortest(lambda: encode_rle(mask), seconds), shortest(lambda: brush.mask2rle(mask), seconds)),
        "decode RLE": (
            shortest(lambda: decode_rle(rle, size, size), seconds),
            shortest(lambda: brush.decode_rle(rle), seconds),
        ),
        "encode PNG": (shortest(lambda: encode_png(mask), seconds), float("nan")),  # the SDK has nothing for it
        "decode PNG": (shortest(lambda: decode_png(url, size, size), seconds), float("nan")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=0, help="random masks to compare with the SDK")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time")
    arguments = parser.parse_args()
    for size in SIZES:
        for what, (ours, theirs) in measure(size, arguments.seconds).items():
            ratio = "" if np.isnan(theirs) else f"  SDK {theirs * 1000:8.1f} ms  {theirs / ours:5.1f} times as fast"
            print(f"{size:4} x {size:<4}  {what}  {ours * 1000:7.2f} ms{ratio}", flush=True)
    rng = np.random.default_rng(0)
    for _ in range(arguments.fuzz):
        compare(random_mask(rng))
    if arguments.fuzz:
        print(f"{arguments.fuzz} random masks: the same streams, each read by the other")


if __name__ == "__main__":
    main()
