"""Who is worth a labeler's minute, and why: `python -m abn.selection` writes results/batch.csv."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from abn.attention import disagreement
from abn.config import load_section
from abn.evaluate import align
from abn.files import replacing
from abn.manifest import class_names, read_corrections
from abn.predictions import Predictions, read_predictions
from abn.stage import ROUND

MINUTES_TO_PAINT, MINUTES_TO_CONFIRM = 0.5, 0.1  # a first guess, until lead times are known


@dataclass(frozen=True)
class SelectionConfig:
    budget: int  # pictures a round
    random_share: float
    seed: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"selection.budget is {self.budget}; it must be at least 1 picture")
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"selection.random_share is {self.random_share}; it must be from 0 to 1")


class Pick(NamedTuple):
    sample: str
    score: float  # 0..1, higher is more worth asking
    reason: str  # in words that a labeler understands
    minutes: float  # expected


def select(
    predictions: Predictions,
    labels: Int[np.ndarray, "n"],
    candidates: Collection[int],
    classes: list[str],
    config: SelectionConfig,
) -> list[Pick]:
    """The batch: `random_share` of it at random (the unbiased estimate of how many maps are wrong), the rest by score,
    highest first, classes taking turns so that no class is left out; ties break by sample id.

    The score of a sample is 0.5 + half of how wrong its answer is where it is misclassified; else half of the rank of
    its map among the candidates by what speaks against a map without a mask: the two branches answer differently,
    and the map does not mirror with its picture. Raises ValueError where the budget is more than the candidates.
    """
    if config.budget > len(candidates):
        raise ValueError(
            f"selection.budget is {config.budget} but the pool holds {len(candidates)} images; lower it in params.yaml"
        )
    rows = np.array(sorted(candidates, key=lambda row: str(predictions.samples[row])))
    answers, truth = predictions.probabilities[rows].argmax(axis=1), labels[rows]
    confidence = predictions.probabilities[rows].max(axis=1)
    wrong = (answers != truth) & (truth >= 0)
    apart = disagreement(predictions.probabilities[rows], predictions.attention_probabilities[rows]).astype(float)
    apart_rank = _rank(apart)
    doubt = (apart_rank + _rank(predictions.equivariance[rows])) / 2
    score = np.where(wrong, 0.5 + confidence / 2, doubt / 2)

    def pick(i: int, at_random: bool) -> Pick:
        answer = classes[answers[i]]
        if at_random:
            reason = "picked at random, to learn how many maps are wrong"
        elif wrong[i]:
            reason = f"misclassified: answers {answer} ({confidence[i]:.0%}), labeled {classes[truth[i]]}"
        elif truth[i] < 0:
            reason = f"no label yet: answers {answer} ({confidence[i]:.0%})"
        else:
            reason = f"doubtful attention: {_doubt_in_words(apart[i], apart_rank[i], doubt[i])}"
        minutes = MINUTES_TO_PAINT if wrong[i] or score[i] > 0.25 else MINUTES_TO_CONFIRM
        return Pick(str(predictions.samples[rows[i]]), float(score[i]), reason, minutes)

    generator = np.random.default_rng(config.seed)
    at_random = set(generator.permutation(len(rows))[: round(config.random_share * config.budget)].tolist())
    by_score = [i for i in _take_turns(score, answers) if i not in at_random]
    chosen = [(i, False) for i in by_score[: config.budget - len(at_random)]] + [(i, True) for i in at_random]
    picks = [pick(i, random) for i, random in chosen]
    return sorted(picks, key=lambda pick: (-pick.score, pick.sample))


def _doubt_in_words(apart: float, rank: float, doubt: float) -> str:
    if rank >= doubt:
        return f"the two branches of the network answer differently (divergence {apart:.2f})"
    return "the map does not follow the picture when it is mirrored"


def _rank(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Share of the values that are smaller, 0..1; equal values share their mean rank."""
    ordered = np.sort(values)
    below, upto = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (below + upto - 1) / 2 / max(len(values) - 1, 1)


def _take_turns(score: Float[np.ndarray, "n"], group: Int[np.ndarray, "n"]) -> list[int]:
    """All indices: the best of each group first, then each group's second, ...; within a turn by score."""
    best_first = np.argsort(-score, kind="stable")
    turns = np.empty(len(score), dtype=int)
    seen: dict[int, int] = {}
    for i in best_first.tolist():
        turns[i] = seen[group[i]] = seen.get(group[i], -1) + 1
    return sorted(best_first.tolist(), key=lambda i: turns[i])


def main() -> None:
    config = load_section(SelectionConfig, "params.yaml", "selection")
    samples, predictions = ROUND.samples(), read_predictions(ROUND.results / "predictions")
    classes = class_names(samples)
    labels, splits = align(samples, predictions, classes)
    answered = set(read_corrections(Path()))
    candidates = [
        row
        for row, name in enumerate(predictions.samples.tolist())
        if splits[row] in ("train", "pool") and name not in answered
    ]
    picks = select(predictions, labels, candidates, classes, config)
    with replacing(ROUND.results / "batch.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Pick._fields)
        writer.writerows((pick.sample, f"{pick.score:.6f}", pick.reason, pick.minutes) for pick in picks)


if __name__ == "__main__":
    main()
