"""Pictures of what a model looks at: a row a sample, the picture, the network's map on it, the person's mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from abn.manifest import MaskShards
from abn.predictions import Predictions
from labeling.tasks import heatmap

TILE = 128  # pixels, the larger side of a picture in the gallery


def gold_rows(predictions: Predictions, count: int, seed: int = 0) -> list[int]:
    """The same `count` samples of the gold set whatever the model: by id, drawn with `seed`."""
    rows = np.flatnonzero(predictions.has_gold)
    rows = rows[np.argsort(predictions.samples[rows])]
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def map_tile(path: Path, attention_map: np.ndarray) -> np.ndarray:
    """The picture at `path` under its map, in the size of a tile."""
    return heatmap(tile(read_rgb(path)), attention_map)


def mask_tile(path: Path, mask: np.ndarray) -> np.ndarray:
    """The picture at `path` darkened outside the mask (H, W) uint8, in the size of a tile."""
    image = read_rgb(path)
    return tile((image * (0.25 + 0.75 * (mask[..., None] > 127))).astype(np.uint8))


def tile(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize(size, smooth))


def gallery(root: Path, images: dict[str, str], predictions: Predictions, rows: Sequence[int]) -> Image.Image:
    """A picture, its map, its gold mask a row. `images`: sample id -> path below `root`."""
    shards = MaskShards(root)
    lines = []
    for row in rows:
        sample = str(predictions.samples[row])
        path = root / images[sample]
        tiles = [
            tile(read_rgb(path)),
            map_tile(path, predictions.maps[row]),
            mask_tile(path, shards.get("data/gold.npz", sample)),
        ]
        lines.append(np.concatenate([np.pad(one, ((2, 2), (2, 2), (0, 0)), constant_values=255) for one in tiles], 1))
    width = max(line.shape[1] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0)), constant_values=255) for line in lines]
    return Image.fromarray(np.concatenate(padded, 0))
