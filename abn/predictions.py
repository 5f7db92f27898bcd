"""The table that predict writes and everything downstream reads: one row a sample, in shards of npz."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from abn.files import replacing


@dataclass(frozen=True)
class Predictions:
    samples: Shaped[np.ndarray, "n"]  # ids
    probabilities: Float[np.ndarray, "n k"]  # of the perception branch
    attention_probabilities: Float[np.ndarray, "n k"]  # of the attention branch
    maps: Float[np.ndarray, "n h w"]  # attention maps, 0..1
    embeddings: Float[np.ndarray, "n d"]
    equivariance: Float[np.ndarray, "n"]  # equivariance_loss of the map
    margin_reliance: Float[np.ndarray, "n"]  # how far the answer moves when the picture's margin is replaced, 0..1
    early_confidence: Float[np.ndarray, "n"]  # probability of the label early in training; NaN without a label then
    has_gold: Bool[np.ndarray, "n"]  # a gold mask that marks something
    gold_maps: Float[np.ndarray, "n h w"]  # that mask at the map's resolution, 0..1; zero without
    replaced_probabilities: Float[np.ndarray, "n k"]  # with everything outside the gold mask replaced; NaN without

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Int[np.ndarray, "m"]) -> Predictions:
        """The table of these rows, in their order."""
        return Predictions(**{field.name: getattr(self, field.name)[rows] for field in fields(Predictions)})


def write_shard(path: Path, predictions: Predictions) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **{field.name: getattr(predictions, field.name) for field in fields(predictions)})


def read_predictions(folder: str | Path) -> Predictions:
    """All shards of a folder as one table. Raises ValueError where there are none."""
    paths = sorted(Path(folder).glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder} holds no predictions; run `dvc repro predict`, or `dvc checkout` to restore them")
    shards = [np.load(path, allow_pickle=False) for path in paths]
    return Predictions(
        **{field.name: np.concatenate([shard[field.name] for shard in shards]) for field in fields(Predictions)}
    )
