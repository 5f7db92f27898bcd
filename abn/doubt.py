"""How likely is it that a map is unreasonable: from what the network does, and from people's verdicts once there are.

Before any verdict two signals speak, whichever is louder: the answer moves with the picture's margin, where the object
seldom is, and the sample was learned earlier than others. Both are averaged over the nearest neighbours by embedding,
since a shortcut is shared by many pictures. Verdicts then teach a logistic regression where in the embedding the
unreasonable maps are; the two signals go on counting like a few verdicts more. What was tried beside these, and what
it was worth, is in benchmarks/README.md.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from abn.predictions import Predictions

NEIGHBOURS = 20
WORTH = 10.0  # verdicts that the signals count like


def directions(embeddings: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Embeddings seen from their mean, each of length 1, so that distances (0..2) know no scale."""
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def early_rank(confidence: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Share of the samples that were less confident early in training, 0..1; 0.5 where it is not known (NaN)."""
    rank, known = np.full(len(confidence), 0.5), np.isfinite(confidence)
    if known.sum() > 1:
        rank[known] = (rankdata(confidence[known]) - 1) / (known.sum() - 1)
    return rank


def suspicion(predictions: Predictions) -> Float[np.ndarray, "n"]:
    """How much speaks against each map before any verdict, 0..1, higher is worse; for ranking, not a probability.

    Mean over the 20 nearest neighbours, itself among them, of (margin_reliance^2 + early_rank^2) / 2.
    """
    loud = (predictions.margin_reliance.astype(np.float64) ** 2 + early_rank(predictions.early_confidence) ** 2) / 2
    where = directions(predictions.embeddings)
    count = min(NEIGHBOURS, len(where))
    near = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(where).kneighbors(where, return_distance=False)
    return loud[near].mean(axis=1)


def unreasonable(predictions: Predictions, verdicts: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """P(this map is unreasonable), 0..1. `verdicts`: 1 a person called the map wrong, 0 fine, NaN nobody was asked.

    Without any verdict this is `suspicion`. Else a logistic regression on embedding and suspicion (as Platt, 1999,
    calibrates scores) that is fitted to the verdicts and, with the weight of 10 verdicts in all, to every sample as
    unreasonable by its suspicion: so a few verdicts, or verdicts that all say the same, cannot mislead it far.
    """
    suspected, asked = suspicion(predictions), np.isfinite(verdicts)
    if not asked.any():
        return suspected
    spread = max(suspected.std(), 1e-12)
    seen = np.column_stack([3 * directions(predictions.embeddings), (suspected - suspected.mean()) / spread])
    count, each = len(seen), WORTH / len(seen)
    wrong = np.concatenate([verdicts[asked], np.ones(count), np.zeros(count)]).astype(int)
    weight = np.concatenate([np.ones(asked.sum()), each * suspected, each * (1 - suspected)])
    model = LogisticRegression(max_iter=1000).fit(np.concatenate([seen[asked], seen, seen]), wrong, weight)
    return model.predict_proba(seen)[:, 1]
