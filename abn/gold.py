"""Gold questions: which samples of val and test labelers are asked about, so that models can be judged by their masks.

They are drawn at random and stratified by class, never by what a model makes of them: only then do they tell without
bias how models do on the whole split.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int


def gold_order(labels: Int[np.ndarray, "n"], known: Bool[np.ndarray, "n"], generator: np.random.Generator) -> list[int]:
    """The samples of a split that have no gold mask yet, in the order in which to ask about them.

    `labels` are the classes of the whole split, `known` says which samples have a gold mask. Every beginning of the
    order, with what is known, mirrors the split: first each class that has none, the most frequent first, then always
    the class that lags furthest behind its share. Within a class the order is random.
    """
    shuffled = generator.permutation(len(labels))
    waiting = {label: [row for row in shuffled if labels[row] == label and not known[row]] for label in set(labels)}
    counts = {label: int((labels == label).sum()) for label in waiting}
    taken = {label: int((known & (labels == label)).sum()) for label in waiting}
    order: list[int] = []
    while left := [label for label in sorted(waiting) if waiting[label]]:
        total = sum(taken.values()) + 1
        lag = {label: counts[label] / len(labels) * total - taken[label] for label in left}
        missing = [label for label in left if not taken[label]]
        chosen = max(missing, key=lambda label: counts[label]) if missing else max(left, key=lambda label: lag[label])
        order.append(int(waiting[chosen].pop(0)))
        taken[chosen] += 1
    return order
