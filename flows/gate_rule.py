"""The rule of the gate: paired outcomes of two models, as counts, give promoted, refused or undecided.

The arrays may have any leading shape, so that benchmarks/gate.py can draw thousands of validation sets at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betainc, betaincinv

LOOKS = 4  # verdicts on one challenger: at 10, 20 and 40 gold masks, and at the 60 that are wanted by default
CONTRADICTED = 0.3  # up to here the gold of a class agrees with the loss of the class on pictures as they are
QUANTILES = 64  # of the share of pictures that are not tied, in the mean over it
ROUNDING = 1e-9


@dataclass(frozen=True)
class GateConfig:
    """What a verdict needs. Probabilities are 0..1, tolerances are shares of the pictures, 0..1."""

    confidence: float  # from which on a loss on pictures as they are counts as shown; an early verdict needs more
    accuracy_tolerance: float  # a model is worse where it is right on fewer pictures by more than this share
    worst_class_tolerance: float  # the same within a class
    complete_confidence: float = 0.8  # that the challenger is not worse, for a promotion once the gold is complete
    map_tolerance: float = 0.0  # without effect, as the next two; accepted because earlier workspaces have them
    resamples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("accuracy_tolerance", "worst_class_tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"gate.{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0.85 <= self.confidence <= 0.95:
            raise ValueError(f"gate.confidence is {self.confidence}; it must be from 0.85 to 0.95")
        if not 0.75 <= self.complete_confidence <= self.confidence:
            raise ValueError(
                f"gate.complete_confidence is {self.complete_confidence}; "
                f"it must be from 0.75 to gate.confidence, {self.confidence}"
            )

    @property
    def early_confidence(self) -> float:
        """For a verdict before the gold is complete: the chance of an error is shared among LOOKS verdicts."""
        return 1 - (1 - self.confidence) / LOOKS


class Evidence(NamedTuple):
    """What the counts say; arrays of the leading shape of the counts. Probabilities are 0..1."""

    as_is: np.ndarray  # that the challenger is not worse on pictures as they are
    in_both: np.ndarray  # that it is not worse in both backgrounds
    required: np.ndarray  # what `in_both` must reach for a promotion
    class_as_is: np.ndarray  # (..., classes): `as_is` within each class
    class_lost: np.ndarray  # (..., classes) bool: a class that the challenger has given up
    class_in_doubt: np.ndarray  # (..., classes) bool: lost as it is, and too little gold to say whether given up
    worse: np.ndarray  # bool: shown to be worse in both backgrounds
    promoted: np.ndarray  # bool; neither promoted nor refused is undecided
    refused: np.ndarray


def weigh(as_is: np.ndarray, in_both: np.ndarray, config: GateConfig, complete: bool) -> Evidence:
    """The rule of the gate, on counts of paired outcomes.

    `as_is` and `in_both` are (..., classes, 3) counts of pictures that the challenger won (it alone is right), lost
    (the champion alone is right) and tied; `as_is` on all pictures as they are, `in_both` on those with a gold mask,
    where right means right in both backgrounds. `complete`: whether no more gold is to come.

    A loss on pictures as they are is excused by a gain in both backgrounds that is as sure as the loss, at most
    `confidence`. Before the gold is complete, a verdict needs `early_confidence`, and without gold there is
    none.

    A class is given up where its loss on pictures as they are is shown (with the error shared among the classes,
    Bonferroni) and its gold does not contradict, or where its gold alone shows the loss.
    """
    error = 1 - (config.confidence if complete else config.early_confidence)
    accuracy = probability_not_worse(as_is.sum(axis=-2), config.accuracy_tolerance)
    both = probability_not_worse(_in_proportion(in_both, as_is), config.accuracy_tolerance)
    if complete:
        required = np.maximum(config.complete_confidence, np.minimum(1 - accuracy, config.confidence))
    else:
        required = np.full_like(both, config.early_confidence)

    won, lost, _ = np.moveaxis(in_both.sum(axis=-2), -1, 0)
    share = (won + 1) / (won + lost + 2)
    borrowed = np.stack([2 * share, 2 * (1 - share), np.ones_like(share)], axis=-1)[..., None, :]
    class_as_is = probability_not_worse(as_is, config.worst_class_tolerance)
    class_in_both = probability_not_worse(in_both, config.worst_class_tolerance, borrowed)
    limit = error / as_is.shape[-2]
    shown, by_gold = class_as_is <= limit, class_in_both <= limit
    class_lost = by_gold | (shown & (class_in_both <= CONTRADICTED) & complete)
    class_in_doubt = shown & ~class_lost & (class_in_both <= 0.5 + ROUNDING) & (not complete)

    worse = both <= error + ROUNDING
    given_up = class_lost.any(axis=-1)
    promoted = (both >= required - ROUNDING) & ~given_up
    if complete:
        refused = ~promoted
    else:
        gold = in_both.sum(axis=(-2, -1)) > 0
        promoted &= gold & ~class_in_doubt.any(axis=-1)
        refused = gold & (worse | given_up)
    return Evidence(accuracy, both, required, class_as_is, class_lost, class_in_doubt, worse, promoted, refused)


def probability_not_worse(counts: np.ndarray, tolerance: float, prior: np.ndarray | float = 1.0) -> np.ndarray:
    """Posterior probability that lost - won <= tolerance, as shares of all pictures; (..., 3) counts give (...).

    won, lost and tied pictures are multinomial with a Dirichlet prior, flat by default (one picture each). Without a
    tolerance this is the Bayesian form of the sign test, the probability that a Beta(lost + 1, won + 1) is below one
    half: 0.5 for equal counts, 0.25 for one lost and none won, 0.9375 for three won and none lost. With a tolerance
    it is the mean over the share of pictures that are not tied, which is a Beta of its own.
    """
    won, lost, tied = np.moveaxis(counts + prior, -1, 0)
    if tolerance == 0:
        return betainc(lost, won, 0.5)
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    differing = betaincinv((won + lost)[..., None], tied[..., None], quantiles)
    at_most = np.minimum((1 + tolerance / np.maximum(differing, 1e-12)) / 2, 1.0)
    return betainc(lost[..., None], won[..., None], at_most).mean(axis=-1)


def _in_proportion(in_both: np.ndarray, as_is: np.ndarray) -> np.ndarray:
    """Counts of the gold pictures over all classes, (..., 3), as if each class had its share of val.

    Small classes have more than their share, since each has at least one gold picture. Classes are weighted back, and
    the counts scaled to the effective number of pictures (Kish, 1965); without weights they stay as they are.
    """
    masks = in_both.sum(axis=-1, keepdims=True)
    weights = np.where(masks > 0, as_is.sum(axis=-1, keepdims=True) / np.maximum(masks, 1), 0.0)
    total, squares = (weights * masks).sum(axis=-2), (weights**2 * masks).sum(axis=-2)
    return (weights * in_both).sum(axis=-2) * total / np.maximum(squares, 1e-12)
