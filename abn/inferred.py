"""What training inferred for pictures that nobody corrected, of a few of them, so that people can look at it.

The network learns far more from these than from what people painted: the mask that the annotator drew, how far it is
trusted, and what misleads (abn/annotator.py, abn/shortcut.py). train writes them down as it passes by.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from abn.data import Pictures
from abn.files import replacing

SHOWN = 8  # pictures


class Inferred(NamedTuple):
    """Of one picture: its mask, 0..255, all 0 where none was drawn, the trust in it, 0..1, and where something
    misleads, 0 or 255. Each has its own size."""

    sample: str
    mask: UInt8[np.ndarray, "h w"]
    trust: float
    misleads: UInt8[np.ndarray, "i j"]


def write_inferred(path: Path, pictures: Pictures, seed: int) -> None:
    """Of at most `SHOWN` of the pictures that nobody corrected and have any, drawn with `seed`, in their order; of none
    if none has."""
    known = sorted(pictures.drawn.keys() | pictures.shortcuts.keys())
    rows = np.array([row for row in known if not pictures.samples[row].masks], dtype=int)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:SHOWN])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            samples=np.array([pictures.samples[row].id for row in rows], dtype=str),
            masks=_stacked(pictures.drawn, rows),
            trust=np.array([pictures.trust.get(row, 0.0) for row in rows]),
            misleads=_stacked(pictures.shortcuts, rows),
        )


def read_inferred(path: Path) -> list[Inferred]:
    with np.load(path, allow_pickle=False) as file:
        columns = (file["samples"].tolist(), file["masks"], file["trust"].tolist(), file["misleads"])
        return [Inferred(*row) for row in zip(*columns, strict=True)]


def _stacked(masks: dict[int, Tensor], rows: np.ndarray) -> UInt8[np.ndarray, "n h w"]:
    """Zeros for rows that have no mask, as large as those of the others; a pixel each if there are no others."""
    size = next(iter(masks.values())).shape[-2:] if masks else (1, 1)
    stacked = np.zeros((len(rows), *size), np.uint8)
    for place, row in enumerate(rows.tolist()):
        if row in masks:
            stacked[place] = masks[row][0].numpy()
    return stacked
