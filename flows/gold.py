"""The gold set that labelers paint: evaluation samples in every batch, and what the answers to them say.

Labelers see gold questions and others on the same screen, in one shuffled batch. What they say of them goes into
data/gold.csv, by which models are judged and from which nothing learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np

from abn.manifest import DISPUTED, EVALUATION, MaskShards, Sample, read_gold, read_manifest
from flows.lineage import statements
from flows.workspace import Workspace
from labeling.corrections import Consensus, Dispute

BATCH_COLUMNS = ("sample", "score", "reason", "minutes", "at_random", "shown", "purpose")
LEARN, GOLD = "learn", "gold"  # what a question of a batch is for
FIRST_SHARE = 0.5  # of the first batch that holds gold questions
VAL_SHARE = 2 / 3  # of a batch's gold questions, while both splits lack masks: val judges models, test only reports
AGREE = 2  # labelers who must say so before an evaluation sample gets another class, or is left out for good


def gold_masks(place: Workspace) -> dict[str, int]:
    """How many samples of val, and of test, have a mask that marks something: given at `abnloop init`, or painted."""
    shards, counts = MaskShards(place.root), dict.fromkeys(EVALUATION, 0)
    for sample in read_manifest(place.root, corrected=False):
        mask = shards.gold(sample)
        if mask is not None and mask.any():
            counts[sample.split] += 1
    return counts


def askable(samples: Sequence[Sample], shards: MaskShards) -> dict[str, int]:
    """How many samples of val, and of test, labelers can still be asked for a gold mask."""
    waiting = Counter(one.split for one in samples if one.split in EVALUATION and not shards.has_gold(one))
    return {split: waiting[split] for split in EVALUATION}


def missing_gold(place: Workspace, wanted: int) -> dict[str, int]:
    """How many gold masks of val, and of test, labelers shall still paint, where each split shall have `wanted`."""
    known, waiting = gold_masks(place), askable(read_manifest(place.root, corrected=False), MaskShards(place.root))
    return {split: min(max(wanted - known[split], 0), waiting[split]) for split in EVALUATION}


def gold_statements(place: Workspace, split: str) -> list[dict[str, Any]]:
    """The annotations behind the painted gold masks of a split, as `flows.lineage.statements` gives them, by sample."""
    rows = read_gold(place.root)
    masked = sorted(one.id for one in read_manifest(place.root, corrected=False) if one.split == split and one.masks)
    return statements(place, [rows[name] for name in masked])


def evaluation_changes(place: Workspace) -> dict[str, int]:
    """What labelers changed of the evaluation: `labels_changed` samples have another class now, `left_out` are
    unusable, or wait for a second labeler."""
    rows = read_gold(place.root)
    before = {one.id: one.label for one in read_manifest(place.root, corrected=False, gold=False)}
    changed = sum(bool(row["label"]) and row["label"] != before.get(name) for name, row in rows.items())
    left_out = sum(row["verdict"] in ("unusable", DISPUTED) for row in rows.values())
    return {"labels_changed": changed, "left_out": left_out}


# --- asking


def mixed_batch(
    picks: Sequence[Mapping[str, str]],
    questions: Sequence[Mapping[str, str]],
    missing: Mapping[str, int],
    share: float,
    budget: int,
    budget_minutes: float,
    judging: bool,
    seed: Sequence[int],
) -> list[dict[str, str]]:
    """The rows of a round's batch.csv (BATCH_COLUMNS), shuffled: gold questions, and as many of the picks as the budget
    leaves room for.

    `picks` are the rows of results/batch.csv, `questions` those of results/gold.csv. At most `share` of the budget goes
    to gold: pictures or, where `budget_minutes` is not 0, expected minutes. `judging`: a verdict waits for masks of
    val, so those come first. Of the picks the lowest scores are left out, and of the random ones as large a share.
    """
    generator = np.random.default_rng(seed)
    gold = _gold_questions(questions, missing, int(share * budget), share * budget_minutes, judging)
    spent = sum(float(row["minutes"]) for row in gold)
    used = max(len(gold) / budget, spent / budget_minutes if budget_minutes else 0.0)
    by_chance = [row for row in picks if row["at_random"]]
    kept = generator.permutation(len(by_chance))[: round(len(by_chance) * (1 - used))]
    chosen = [by_chance[i] for i in sorted(kept)]
    left = budget_minutes - spent - sum(float(row["minutes"]) for row in chosen) if budget_minutes else np.inf
    for row in sorted((one for one in picks if not one["at_random"]), key=lambda one: -float(one["score"])):
        left -= float(row["minutes"])
        if left < 0 or len(chosen) >= budget - len(gold):
            break
        chosen.append(row)
    rows = [{**row, "purpose": LEARN} for row in chosen]
    for row in gold:
        reason = f"gold mask of {row['split']}, drawn at random within its class: models are judged by it"
        told = {"score": "0.000000", "reason": reason, "at_random": "", "purpose": GOLD}
        rows.append({name: row[name] for name in ("sample", "minutes", "shown")} | told)
    return [rows[i] for i in generator.permutation(len(rows))]


def _gold_questions(
    questions: Sequence[Mapping[str, str]], missing: Mapping[str, int], most: int, minutes: float, judging: bool
) -> list[Mapping[str, str]]:
    """At most `most` questions, and no more than fit into `minutes` (0: no limit), in the order of each split."""
    val = min(missing["val"], most if judging else ceil(VAL_SHARE * most))
    test = min(missing["test"], most - val)
    wanted = {"val": min(missing["val"], most - test), "test": test}
    chosen: list[Mapping[str, str]] = []
    for split in EVALUATION:
        chosen += [row for row in questions if row["split"] == split][: wanted[split]]
    while minutes and sum(float(row["minutes"]) for row in chosen) > minutes:
        chosen.pop()
    return chosen


# --- what was answered


def split_answers(
    agreed: Sequence[Consensus], disputes: Sequence[Dispute], evaluation: Collection[str]
) -> tuple[list[Consensus], list[Consensus], list[Dispute]]:
    """What is learned from, what is gold, and the disputes that hold a round open.

    Of `evaluation` samples one labeler's doubt is not enough: who says that the class is wrong or the picture unusable
    needs a second one who agrees. Until then the sample is `DISPUTED`, which takes it out of the evaluation and holds
    no round open.
    """
    learned = [one for one in agreed if one.sample not in evaluation]
    gold = [_doubted(one) for one in agreed if one.sample in evaluation]
    holding = []
    for dispute in disputes:
        if dispute.sample in evaluation and any(_doubts(one.verdict, one.label) for one in dispute.opinions):
            gold.append(Consensus(dispute.sample, DISPUTED, None, None, 0.0, dispute.opinions, 0))
        else:
            holding.append(dispute)
    return learned, sorted(gold, key=lambda one: one.sample), holding


def _doubted(one: Consensus) -> Consensus:
    """`DISPUTED` where a single labeler would change the evaluation."""
    if _doubts(one.verdict, one.label) and one.votes < AGREE:
        return replace(one, verdict=DISPUTED, label=None, mask=None)
    return one


def _doubts(verdict: str, label: str | None) -> bool:
    """Whether an answer would change which evaluation samples there are, or their classes."""
    return bool(label) or verdict == "unusable"
