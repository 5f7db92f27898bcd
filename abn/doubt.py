"""How likely is it that a map is unreasonable: from what the network does, and from people's verdicts once there are.

Before any verdict two signals speak: the answer moves with the picture's corners, where the object seldom is, and the
sample was learned earlier than others. Both are averaged over the nearest neighbours by embedding, since a shortcut is
shared by many pictures, and count as far as they stand out from what is usual in the pool. Verdicts then teach a
logistic regression where in the embedding the unreasonable maps are; the two signals go on counting like a few
verdicts more. What was tried beside these, and what it was worth, is in benchmarks/README.md.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from abn.predictions import Answers

NEIGHBOURS = 20
EVEN = 3.0  # deviations from the usual at which one signal alone makes it as likely as not
LOUDEST = 10.0  # deviations that count at most
QUIET = 0.02  # added to a deviation: signals that hardly differ at all tell nothing
WORTH = 10.0  # verdicts that the signals count like


class Doubt:
    """Of any samples, by what is seen in a `reference`: the whole pool, or a random part of one that is too large.

    `told` are samples about whose maps people have spoken, `verdicts` what they said: 1 the map is wrong, 0 it is fine.
    """

    def __init__(
        self, reference: Answers, told: Answers | None = None, verdicts: Float[np.ndarray, "v"] | None = None
    ) -> None:
        self.reference = reference
        self.centre = reference.embeddings.mean(axis=0, dtype=np.float64)
        count = min(NEIGHBOURS, len(reference))
        self.near = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(self.directions(reference))
        self.signals = np.column_stack([reference.corner_reliance.astype(np.float64), self.early_rank(reference)])
        self.shared = self._shared(reference)
        self.usual = np.median(self.shared, axis=0)
        deviation = np.median(np.abs(self.shared - self.usual), axis=0)
        self.deviation = 1.4826 * deviation + QUIET  # sigma, where they are normal
        self.regression: LogisticRegression | None = None
        if told is not None and verdicts is not None and len(told):
            self._learn(told, verdicts)

    def directions(self, answers: Answers) -> Float[np.ndarray, "n d"]:
        """Embeddings seen from the reference's mean, each of length 1, so that distances (0..2) know no scale."""
        centred = answers.embeddings.astype(np.float64) - self.centre
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    def early_rank(self, answers: Answers) -> Float[np.ndarray, "n"]:
        """`early_rank` among the reference."""
        return early_rank(answers.early_confidence, self.reference.early_confidence)

    def suspicion(self, answers: Answers) -> Float[np.ndarray, "n"]:
        """How much speaks against each map before any verdict, 0..1, higher is worse; for ranking, not a probability.

        1 - (1 - Z / (Z + 9)) (1 - c^2). c is the corner reliance, the mean over the 20 nearest of the reference (itself
        among them if it is one); Z sums over c and the early rank, such a mean too, the square of how many
        deviations (median absolute, robust to the unreasonable ones) it lies above the reference's median. Where the
        whole pool shares a shortcut nobody stands out, but c speaks for itself.
        """
        return self._loudness(self._shared(answers))

    def _loudness(self, shared: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n"]:
        """`suspicion` of what neighbours share."""
        loud = np.clip((shared - self.usual) / self.deviation, 0, LOUDEST)
        stands_out = (loud**2).sum(axis=1)
        return 1 - (1 - stands_out / (stands_out + EVEN**2)) * (1 - shared[:, 0] ** 2)

    def _shared(self, answers: Answers) -> Float[np.ndarray, "n 2"]:
        """Mean of the signals over the nearest of the reference."""
        return self.signals[self.near.kneighbors(self.directions(answers), return_distance=False)].mean(axis=1)

    def unreasonable(self, answers: Answers, suspected: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """P(this map is unreasonable), 0..1; `suspected` is the samples' `suspicion`.

        Without any verdict it is what this is. Else a logistic regression on embedding and suspicion (as Platt, 1999,
        calibrates scores) that is fitted to the verdicts and, with the weight of 10 verdicts in all, to the reference
        as unreasonable by its suspicion: so a few verdicts, or verdicts that all say the same, cannot mislead it far.
        """
        if self.regression is None:
            return suspected
        return self.regression.predict_proba(self._features(answers, suspected))[:, 1]

    def _learn(self, told: Answers, verdicts: Float[np.ndarray, "v"]) -> None:
        suspected = self._loudness(self.shared)
        self.mean, self.spread = suspected.mean(), max(suspected.std(), 1e-12)
        asked, seen = self._features(told, self.suspicion(told)), self._features(self.reference, suspected)
        count, each = len(seen), WORTH / len(seen)
        wrong = np.concatenate([verdicts, np.ones(count), np.zeros(count)]).astype(int)
        weight = np.concatenate([np.ones(len(asked)), each * suspected, each * (1 - suspected)])
        self.regression = LogisticRegression(max_iter=1000).fit(np.concatenate([asked, seen, seen]), wrong, weight)

    def _features(self, answers: Answers, suspected: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n e"]:
        return np.column_stack([3 * self.directions(answers), (suspected - self.mean) / self.spread])


def early_rank(confidence: Float[np.ndarray, "n"], among: Float[np.ndarray, "m"]) -> Float[np.ndarray, "n"]:
    """Share of those `among` which a sample is ranked that were less confident early in training, 0..1, of equals half;
    0.5 where it is not known (NaN). Higher is more suspicious: shortcuts are learned first (Nam et al., 2020;
    abn/early.py)."""
    rank, known, others = np.full(len(confidence), 0.5), np.isfinite(confidence), np.sort(among[np.isfinite(among)])
    if len(others) > 1:
        below, up_to = (np.searchsorted(others, confidence[known], side=side) for side in ("left", "right"))
        rank[known] = np.clip((below + up_to - 1) / 2 / (len(others) - 1), 0, 1)
    return rank
