"""Handwritten digits with a shortcut: what the demo learns from.

The digits that scikit-learn ships (Alpaydin and Kaynak, 1998; 1797 of 8x8 pixels, by 43 people), at 32x32, with a
patch in a corner whose colour tells the class in train and val, and nothing in test.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, PATCH = 32, 6  # pixels
TRAIN, VAL = 1000, 200  # the rest is test
# Ten colours as far apart as the corners and edges of the RGB cube allow.
COLOURS = np.array(
    [
        *[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)],
        *[(0, 255, 255), (255, 128, 0), (128, 0, 255), (0, 128, 255), (128, 255, 0)],
    ],
    dtype=np.uint8,
)


def write_digits(folder: Path, seed: int = 0) -> Path:
    """Pictures, masks and index.csv below `folder`; the path of the index.

    A digit's mask is where its ink is. The same seed gives the same files.
    """
    from sklearn.datasets import load_digits

    generator = np.random.default_rng(seed)
    digits = load_digits()
    # The same drawing twice would be the same picture in two splits.
    _, unique = np.unique(digits.data, axis=0, return_index=True)
    order = generator.permutation(np.sort(unique))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    index = folder / "index.csv"
    with index.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "label", "split", "mask"])
        for rank, number in enumerate(order.tolist()):
            split = "train" if rank < TRAIN else "val" if rank < TRAIN + VAL else "test"
            name, label = f"digit{number:04d}", int(digits.target[number])
            ink = Image.fromarray((digits.images[number] * 255 / 16).astype(np.uint8))
            grey = np.array(ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            picture = np.repeat(grey[..., None], 3, axis=2)
            picture[:PATCH, :PATCH] = COLOURS[label if split != "test" else generator.integers(len(COLOURS))]
            mask = np.array(Image.fromarray(grey > 110).convert("L"))
            Image.fromarray(picture).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            writer.writerow([name, f"images/{name}.png", label, split, f"masks/{name}.png"])
    return index
