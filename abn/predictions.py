"""The table that predict writes and everything downstream reads: one row a sample, in shards of npz."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from abn.files import replacing

Table = TypeVar("Table", bound="Answers")


@dataclass(frozen=True)
class Answers:
    """What of a prediction tells whether to ask about the sample; a small part of its bytes."""

    samples: Shaped[np.ndarray, "n"]  # ids
    probabilities: Float[np.ndarray, "n k"]  # of the perception branch
    embeddings: Float[np.ndarray, "n d"]
    corner_reliance: Float[np.ndarray, "n"]  # how far the answer moves when the picture's corners are replaced, 0..1
    early_confidence: Float[np.ndarray, "n"]  # probability of the label early in training; NaN without a label then

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self: Table, rows: Int[np.ndarray, "m"]) -> Table:
        """The table of these rows, in their order."""
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


@dataclass(frozen=True)
class Predictions(Answers):
    attention_probabilities: Float[np.ndarray, "n k"]  # of the attention branch
    maps: Float[np.ndarray, "n h w"]  # attention maps, 0..1
    has_gold: Bool[np.ndarray, "n"]  # a gold mask that marks something
    gold_maps: Float[np.ndarray, "n h w"]  # that mask at the map's resolution, 0..1; zero without
    replaced_probabilities: Float[np.ndarray, "n k"]  # with everything outside the gold mask replaced; NaN without


class Shards:
    """The answers of all shards of a folder as one table, of which only the rows that are asked for are read, so that
    memory does not hold the pool. Raises ValueError where there are no shards."""

    def __init__(self, folder: str | Path) -> None:
        self.paths = _paths(folder)
        samples = [_read(path, ["samples"])["samples"] for path in self.paths]
        self.samples = np.concatenate(samples)
        self.ends = np.cumsum([len(part) for part in samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Int[np.ndarray, "m"]) -> Answers:
        """The table of these rows, in their order."""
        shard = np.searchsorted(self.ends, rows, side="right")
        names = [field.name for field in fields(Answers)]
        parts = []
        for number in np.unique(shard) if len(rows) else [0]:
            stored = _read(self.paths[number], names)
            first = self.ends[number] - len(stored["samples"])
            parts.append({name: stored[name][rows[shard == number] - first] for name in names})
        back = np.argsort(np.argsort(shard, kind="stable"), kind="stable")
        return Answers(**{name: np.concatenate([part[name] for part in parts])[back] for name in names})


def write_shard(path: Path, predictions: Predictions) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{field.name: getattr(predictions, field.name) for field in fields(predictions)})


def read_predictions(folder: str | Path) -> Predictions:
    """All shards of a folder as one table. Raises ValueError where there are none."""
    names = [field.name for field in fields(Predictions)]
    shards = [_read(path, names) for path in _paths(folder)]
    return Predictions(**{name: np.concatenate([shard[name] for shard in shards]) for name in names})


def _paths(folder: str | Path) -> list[Path]:
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder} holds no predictions; run `dvc repro predict`, or `dvc checkout` to restore them")
    return paths


def _read(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as shard:
        return {name: shard[name] for name in names}
