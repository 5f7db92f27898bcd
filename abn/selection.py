"""Who is worth a labeler's minute, and why: `python -m abn.selection` writes results/batch.csv, and results/gold.csv:
which evaluation samples to ask about for gold masks.

Of a pool of any size `LOOKED_AT` samples are in memory at once, beside those that people have answered, as many to tell
what is usual, and a few numbers of each. Up to that many are compared with each other. Of a larger pool a first pass
gives every candidate a worth of its own, and those worth most are compared; neighbours are then looked for in a random
part of the pool (abn/doubt.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from sklearn.cluster import kmeans_plusplus
from sklearn.neighbors import NearestNeighbors

from abn.config import load_section
from abn.doubt import WORTH, Doubt, early_rank
from abn.evaluate import align
from abn.files import write_csv
from abn.gold import gold_order
from abn.manifest import EVALUATION, MaskShards, class_names, read_corrections
from abn.predictions import Answers, Predictions, Shards
from abn.stage import ROUND

LOOKED_AT = 20_000  # samples at once
GRADIENTS = 1 << 28  # numbers that `badge` compares at once, 1 GB; a sample has classes x size of the embedding
AT_RANDOM = "picked at random, to learn how many maps are wrong"
MINUTES_TO_PAINT, MINUTES_TO_CONFIRM = 0.5, 0.1  # a first guess, until lead times are known
# By verdict, 1: the map is wrong, 0: it is fine. The others say nothing of it.
SAYS_WRONG = {"map_fixed": 1.0, "all_but_map": 1.0, "map_ok": 0.0}


@dataclass(frozen=True)
class SelectionConfig:
    strategy: Literal["benefit", "attention", "misclassified", "margin", "entropy", "k-center", "badge", "random"]
    budget: int  # pictures a round
    budget_minutes: float  # of labelers a round, by expected minutes; 0: no limit but the pictures
    random_share: float
    seed: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"selection.budget is {self.budget}; it must be at least 1 picture")
        if self.budget_minutes < 0:
            raise ValueError(
                f"selection.budget_minutes is {self.budget_minutes}; it must be above 0, or 0 for no limit"
            )
        if not 0 <= self.random_share <= 1:
            raise ValueError(f"selection.random_share is {self.random_share}; it must be from 0 to 1")


class Pick(NamedTuple):
    sample: str
    score: float  # 0..1, higher is more worth asking
    reason: str  # in words that a labeler understands
    minutes: float  # expected
    at_random: bool  # of the share that is an unbiased estimate of how many maps are wrong
    shown: str  # what labelers read of it: the loudest of what speaks for asking, whether or not it was picked for that


class GoldQuestion(NamedTuple):
    sample: str
    split: str  # val or test
    shown: str  # as in `Pick`
    minutes: float  # expected


@dataclass(frozen=True)
class Told:
    """What people have said so far, by row of the predictions."""

    answered: Bool[np.ndarray, "n"]
    verdicts: Float[np.ndarray, "n"]  # 1 the map is wrong, 0 it is fine, NaN nothing was said of it
    minutes_to_paint: float = MINUTES_TO_PAINT
    minutes_to_confirm: float = MINUTES_TO_CONFIRM


def told_by(
    verdicts: Sequence[str | None],
    minutes_to_paint: float = MINUTES_TO_PAINT,
    minutes_to_confirm: float = MINUTES_TO_CONFIRM,
) -> Told:
    """From a verdict a row of the predictions, None where nobody answered."""
    answered = np.array([verdict is not None for verdict in verdicts], dtype=bool)
    wrong = np.array([SAYS_WRONG.get(verdict or "", np.nan) for verdict in verdicts], dtype=float)
    return Told(answered, wrong, minutes_to_paint, minutes_to_confirm)


@dataclass(frozen=True)
class Pool:
    """What a strategy sees: a row a candidate, in the order of the sample ids. What only some strategies ask for is
    computed when they do."""

    table: Answers
    labels: Int[np.ndarray, "n"]  # -1 unknown
    answered: Float[np.ndarray, "a d"]  # directions of the samples that people have answered
    answered_as: Int[np.ndarray, "a"]  # what the network answers for them
    doubt: Doubt
    early: Float[np.ndarray, "m"]  # early confidence of the candidates, or of a random part of them
    told: Told
    seed: int

    @cached_property
    def where(self) -> Float[np.ndarray, "n d"]:
        """Directions of the embeddings."""
        return self.doubt.directions(self.table)

    @cached_property
    def suspected(self) -> Float[np.ndarray, "n"]:
        """Before any verdict, 0..1."""
        return self.doubt.suspicion(self.table)

    @cached_property
    def unreasonable(self) -> Float[np.ndarray, "n"]:
        """P(the map is), 0..1."""
        return self.doubt.unreasonable(self.table, self.suspected)

    @cached_property
    def minutes(self) -> Float[np.ndarray, "n"]:
        """Expected. Before any verdict each counts as one to paint: suspicion ranks and is no probability, and a batch
        that takes longer than its budget is worse than one that takes less. Verdicts turn that into P(the map is
        unreasonable), as those that suspicion counts like are outnumbered."""
        paint, confirm = self.told.minutes_to_paint, self.told.minutes_to_confirm
        verdicts = np.isfinite(self.told.verdicts).sum()
        wrong = np.ones(len(self.labels))
        if verdicts:  # else nobody need look for neighbours
            wrong = (WORTH + verdicts * self.unreasonable) / (WORTH + verdicts)
        return confirm + wrong * max(paint - confirm, 0.0)

    @property
    def confidence(self) -> Float[np.ndarray, "n"]:
        return self.table.probabilities.max(axis=1).astype(float)

    @property
    def wrong(self) -> Bool[np.ndarray, "n"]:
        return (self.table.probabilities.argmax(axis=1) != self.labels) & (self.labels >= 0)


# --- strategies: a pool and how many will be asked -> what each candidate is worth, 0..1


def benefit(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """Expected benefit per expected minute, against the cheapest minute, times novelty; the default.

    Benefit is the probability that an answer teaches something: that the map is unreasonable, or the picture
    misclassified, or, as far as the network is unsure, might be. Novelty keeps near-duplicates out; see `_spread`.
    """
    return _spread(_teaches(pool) * pool.minutes.min() / pool.minutes, pool, count)


def attention(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """P(the map is unreasonable)."""
    return pool.unreasonable


def misclassified(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """As Mitsuhara et al. (2021) choose: wrong answers, the surest first (above 0.5), then right ones, the least sure
    first."""
    return np.where(pool.wrong, 0.5 + pool.confidence / 2, (1 - pool.confidence) / 2)


def margin(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """1 - (p1 - p2) of the two likeliest classes (Scheffer et al., 2001)."""
    best = np.sort(pool.table.probabilities.astype(float), axis=1)
    return 1 - (best[:, -1] - best[:, -2])


def entropy(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """-sum p log p / log K of the answer."""
    p = pool.table.probabilities.astype(float)
    return -(p * np.log(np.maximum(p, 1e-12))).sum(axis=1) / np.log(p.shape[1])


def k_center(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """Each the farthest, by embedding, from all that is answered or chosen already (Sener and Savarese, ICLR 2018):
    half of that distance, which only falls from pick to pick; 0 for those not chosen."""
    worth = np.zeros(len(pool.where))
    distance = _nearest(pool.where, pool.answered) if len(pool.answered) else np.full(len(worth), 2.0)
    for _ in range(count):
        best = int(np.where(worth > 0, -1.0, distance).argmax())
        worth[best] = max(distance[best] / 2, 1e-12)
        distance = np.minimum(distance, np.linalg.norm(pool.where - pool.where[best], axis=1))
    return worth


def badge(pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """k-means++ over the gradients of the last layer as if the answer were right, (p - onehot) x embedding: unsure
    and unlike each other (Ash et al., ICLR 2020). Those chosen first are worth most; 0 for those not chosen."""
    gradients = (_errors(pool)[:, :, None] * pool.table.embeddings[:, None, :]).reshape(len(pool.labels), -1)
    _, chosen = kmeans_plusplus(gradients, count, random_state=pool.seed)
    worth = np.zeros(len(pool.labels))
    worth[chosen[::-1]] = np.linspace(0, 1, count + 1)[1:]  # where one is drawn twice its first turn counts
    return worth


STRATEGIES: dict[str, Callable[[Pool, int], Float[np.ndarray, "n"]]] = {
    "benefit": benefit,
    "attention": attention,
    "misclassified": misclassified,
    "margin": margin,
    "entropy": entropy,
    "k-center": k_center,
    "badge": badge,
    "random": lambda pool, count: np.zeros(len(pool.labels)),  # every pick is of the random share
}


# What each candidate of a large pool is worth by itself, where that is not the strategy's score; higher is more. Those
# worth most are compared with each other. k-center compares random ones: to be far is nothing that one is by itself.
WORTH_ALONE: dict[str, Callable[[Pool], Float[np.ndarray, "n"]]] = {
    "benefit": lambda pool: _teaches(pool) / pool.minutes,
    "badge": lambda pool: np.linalg.norm(_errors(pool), axis=1) * np.linalg.norm(pool.table.embeddings, axis=1),
}
COMPARED_AT_RANDOM = ("k-center", "random")


def _errors(pool: Pool) -> Float[np.ndarray, "n k"]:
    """p - onehot, as if the answer were right."""
    p = pool.table.probabilities.astype(np.float32)
    return p - np.eye(p.shape[1], dtype=np.float32)[p.argmax(axis=1)]


def _teaches(pool: Pool) -> Float[np.ndarray, "n"]:
    mistaken = np.where(pool.wrong, 1.0, 1 - pool.confidence)
    return 1 - (1 - pool.unreasonable) * (1 - mistaken)


def _spread(worth: Float[np.ndarray, "n"], pool: Pool, count: int) -> Float[np.ndarray, "n"]:
    """Each worth times its novelty, the worthiest first: (1 - exp(-d^2 / 2 s^2)) / (1 + m / 4e).

    d is the distance to the nearest that is answered or was chosen before it, s the tenth percentile of the pool's
    distances to the nearest neighbour, so that only what lies unusually close counts as the same again. m is how many
    with the same answer were answered or chosen before it, e a class's even share of these and of the batch: where all
    classes are alike they take turns, from batch to batch too, and the one that is much worse can still get most.
    """
    if len(worth) < 2:
        return worth
    nearest = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(pool.where).kneighbors(pool.where)[0][:, 1]
    scale = max(float(np.quantile(nearest, 0.1)), 1e-6)
    answers = pool.table.probabilities.argmax(axis=1)
    classes = pool.table.probabilities.shape[1]
    even_share = (len(pool.answered) + count) / classes
    distance = _nearest(pool.where, pool.answered) if len(pool.answered) else np.full(len(worth), 2.0)
    alike = np.bincount(pool.answered_as, minlength=classes)[answers]
    open_, score = np.ones(len(worth), dtype=bool), worth
    for _ in range(count):
        novelty = (1 - np.exp(-((distance / scale) ** 2) / 2)) / (1 + alike / (4 * even_share))
        score = np.where(open_, worth * novelty, score)
        best = int(np.where(open_, score, -1.0).argmax())
        open_[best] = False
        distance = np.minimum(distance, np.linalg.norm(pool.where - pool.where[best], axis=1))
        alike += answers == answers[best]
    return score


def _nearest(points: Float[np.ndarray, "n d"], others: Float[np.ndarray, "a d"]) -> Float[np.ndarray, "n"]:
    return NearestNeighbors(n_neighbors=1, algorithm="brute").fit(others).kneighbors(points)[0][:, 0]


# --- a batch


def select(
    predictions: Predictions | Shards,
    labels: Int[np.ndarray, "n"],
    candidates: Collection[int],
    classes: list[str],
    config: SelectionConfig,
    told: Told | None = None,
) -> list[Pick]:
    """The batch: `random_share` of it at random (the unbiased estimate of how many maps are wrong), the rest by the
    strategy's score, highest first; ties break by sample id. It ends where pictures or expected minutes are spent.

    How many are at random hangs on what a picture takes on average, never on what those that are drawn take: a map that
    is thought wrong takes longer, and would be left out the more often. Of few minutes some batches have one, others
    none, so that the share is spent on average.

    `labels` of all rows of the predictions, -1 unknown. Raises ValueError where the budget is more than the
    candidates.
    """
    if config.budget > len(candidates):
        raise ValueError(
            f"selection.budget is {config.budget} but the pool holds {len(candidates)} images; lower it in params.yaml"
        )
    everyone = _Candidates(predictions, labels, candidates, told or told_by([None] * len(labels)), config.seed)
    share = 1.0 if config.strategy == "random" else config.random_share
    shuffled = np.random.default_rng(config.seed).permutation(len(everyone))
    random_pictures = round(share * config.budget)
    most = max(everyone.comparable(config.strategy), config.budget)
    if len(everyone) <= most or config.strategy in COMPARED_AT_RANDOM:
        compared = np.sort(shuffled[:most])
    else:
        compared = np.union1d(shuffled[:random_pictures], everyone.worth_most(config.strategy, most))
    pool = everyone[compared]
    minutes = config.budget_minutes or np.inf
    if minutes < (shortest := float(pool.minutes.min())):
        expected = f"one picture is expected to take {shortest:.2f}"
        raise ValueError(f"selection.budget_minutes is {minutes}, but {expected}; raise it in params.yaml")
    count = int(min(config.budget, minutes / shortest))
    score = STRATEGIES[config.strategy](pool, count)
    paid = random_pictures
    if share and config.budget_minutes:
        on_average = share * minutes / pool.minutes.mean()
        rounded = int(on_average + np.random.default_rng([config.seed, 1]).random())
        paid = min(paid, max(rounded, 1) if share == 1 else rounded)
    at_random = np.searchsorted(compared, shuffled[:paid]).tolist()
    asked = set(at_random)
    best_first = [i for i in np.argsort(-score, kind="stable").tolist() if i not in asked]
    rest = minutes - float(pool.minutes[at_random].sum())
    by_score = _fill(best_first[: config.budget - random_pictures], pool.minutes, rest)
    if not at_random + by_score:  # the best one takes too long
        by_score = [next(i for i in best_first if pool.minutes[i] <= minutes)]
    picks = [
        Pick(
            str(pool.table.samples[i]),
            float(score[i]),
            AT_RANDOM if random else _reason(pool, i, classes, config),
            round(float(pool.minutes[i]), 3),
            random,
            _reason(pool, i, classes, config),
        )
        for chosen, random in ((by_score, False), (at_random, True))
        for i in chosen
    ]
    return sorted(picks, key=lambda pick: (-pick.score, pick.sample))


def gold_questions(
    predictions: Predictions | Shards,
    labels: Int[np.ndarray, "n"],
    splits: Shaped[np.ndarray, "n"],
    has_mask: Bool[np.ndarray, "n"],
    classes: list[str],
    config: SelectionConfig,
    told: Told,
) -> list[GoldQuestion]:
    """The next `config.budget` samples of val, and of test, to ask labelers about for a gold mask, in their order.

    `has_mask` says which have one. Nothing that a model makes of them decides which and when (abn/gold.py). What
    labelers read of them is what they would read were they picked to be learned from.
    """
    questions = []
    for number, split in enumerate(EVALUATION):
        rows = np.flatnonzero((splits == split) & (labels >= 0))
        generator = np.random.default_rng([config.seed, 2, number])
        asked = rows[gold_order(labels[rows], has_mask[rows], generator)[: config.budget]]
        if not len(asked):
            continue
        everyone = _Candidates(predictions, labels, asked.tolist(), told, config.seed)
        pool, place = everyone[np.arange(len(everyone))], {row: i for i, row in enumerate(everyone.rows.tolist())}
        for row in asked.tolist():
            i = place[row]
            shown = _reason(pool, i, classes, config)
            questions.append(GoldQuestion(str(pool.table.samples[i]), split, shown, round(float(pool.minutes[i]), 3)))
    return questions


class _Candidates:
    """In the order of their ids, with what is known of the samples that people have answered."""

    def __init__(
        self,
        table: Predictions | Shards,
        labels: Int[np.ndarray, "n"],
        candidates: Collection[int],
        told: Told,
        seed: int,
    ) -> None:
        self.table, self.labels, self.told, self.seed = table, labels, told, seed
        asked = np.zeros(len(labels), dtype=bool)
        asked[list(candidates)] = True
        known = np.flatnonzero(asked | told.answered)
        known = known[np.argsort(table.samples[known])]
        self.rows = known[asked[known]]
        seen = known
        if len(known) > LOOKED_AT:
            seen = known[np.sort(np.random.default_rng(seed).choice(len(known), LOOKED_AT, replace=False))]
        answered = known[told.answered[known]]
        reference, people, verdicts = table[seen], table[answered], told.verdicts[answered]
        on_maps = np.flatnonzero(np.isfinite(verdicts))
        self.doubt = Doubt(reference, people[on_maps], verdicts[on_maps])
        self.answered, self.answered_as = self.doubt.directions(people), people.probabilities.argmax(axis=1)
        self.early = reference.early_confidence[asked[seen]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Int[np.ndarray, "m"]) -> Pool:
        rows = self.rows[chosen]
        table, labels = self.table[rows], self.labels[rows]
        return Pool(table, labels, self.answered, self.answered_as, self.doubt, self.early, self.told, self.seed)

    def comparable(self, strategy: str) -> int:
        """How many may be compared with each other."""
        if strategy != "badge" or not len(self):
            return LOOKED_AT
        one = self.table[self.rows[:1]]
        return min(LOOKED_AT, max(1, GRADIENTS // (one.probabilities.size * one.embeddings.size)))

    def worth_most(self, strategy: str, count: int) -> Int[np.ndarray, "m"]:
        """By themselves, seen a part of the predictions after the other; ties break by sample id."""
        worth, part = np.zeros(len(self)), self.rows // LOOKED_AT
        for number in np.unique(part):
            rows = np.flatnonzero(part == number)
            pool = self[rows]
            worth[rows] = WORTH_ALONE[strategy](pool) if strategy in WORTH_ALONE else STRATEGIES[strategy](pool, 0)
        return np.argsort(-worth, kind="stable")[:count]


def _fill(order: list[int], minutes: Float[np.ndarray, "n"], budget: float) -> list[int]:
    """As many of the first as fit into the budget of minutes."""
    return order[: int((np.cumsum(minutes[order]) <= budget).sum())]


def _reason(pool: Pool, i: int, classes: list[str], config: SelectionConfig) -> str:
    """The loudest of what speaks for asking about candidate `i`, of what its strategy looks at."""
    order = pool.table.probabilities[i].argsort()[::-1]
    confidence = pool.table.probabilities[i][order]
    answer = f"{classes[order[0]]} ({confidence[0]:.0%})"
    unlabeled = "; no label yet" if pool.labels[i] < 0 else ""
    answering = f"{unlabeled}: answers {answer}" if unlabeled else ""
    if config.strategy == "k-center":
        return f"unlike every picture that was asked about so far{answering}"
    if config.strategy != "attention":
        if pool.wrong[i]:
            return f"misclassified: answers {answer}, labeled {classes[pool.labels[i]]}"
        by_answers = config.strategy in ("misclassified", "margin", "entropy", "badge")
        if by_answers or 1 - confidence[0] > pool.unreasonable[i]:
            return f"unsure: {answer} or {classes[order[1]]} ({confidence[1]:.0%}){unlabeled}"
    if pool.unreasonable[i] > pool.suspected[i] + 0.2:
        return f"doubtful attention: labelers called the maps of similar pictures wrong{answering}"
    corners = pool.table.corner_reliance[i]
    if corners >= early_rank(pool.table.early_confidence[[i]], pool.early)[0]:
        return f"doubtful attention: the answer hangs on the picture's corners ({corners:.0%}){answering}"
    return f"doubtful attention: learned before most others, as shortcuts are{answering}"


# --- the stage


def read_told(predictions: Answers | Shards, corrections: Mapping[str, Mapping[str, str]]) -> Told:
    """From the rows of data/corrections.csv by sample id. Minutes are the medians of what painting and confirming took,
    of the times that did not get lost."""
    verdicts = [corrections[name]["verdict"] if name in corrections else None for name in predictions.samples.tolist()]

    def median(verdict: str, guess: float) -> float:
        times = [float(row["minutes"] or 0) for row in corrections.values() if row["verdict"] == verdict]
        known = [time for time in times if time > 0]
        return float(np.median(known)) if known else guess

    return told_by(verdicts, median("map_fixed", MINUTES_TO_PAINT), median("map_ok", MINUTES_TO_CONFIRM))


def main() -> None:
    config = load_section(SelectionConfig, "params.yaml", "selection")
    samples, predictions = ROUND.samples(), Shards(ROUND.results / "predictions")
    classes = class_names(samples)
    labels, splits = align(samples, predictions, classes)
    told = read_told(predictions, read_corrections(Path()))
    candidates = np.flatnonzero(np.isin(splits, ("train", "pool")) & ~told.answered).tolist()
    if told.answered.any() and candidates:  # the pool runs out one day; only the first budget can be a mistake
        config = replace(config, budget=min(config.budget, len(candidates)))
    picks = select(predictions, labels, candidates, classes, config, told) if candidates else []
    rows = [
        (pick.sample, f"{pick.score:.6f}", pick.reason, pick.minutes, "yes" if pick.at_random else "", pick.shown)
        for pick in picks
    ]
    write_csv(ROUND.results / "batch.csv", Pick._fields, rows)
    shards = MaskShards(Path())
    has_mask = {sample.id for sample in samples if shards.has_gold(sample)}
    masked = np.array([name in has_mask for name in predictions.samples.tolist()], dtype=bool)
    questions = gold_questions(predictions, labels, splits, masked, classes, config, told)
    write_csv(ROUND.results / "gold.csv", GoldQuestion._fields, questions)


if __name__ == "__main__":
    main()
