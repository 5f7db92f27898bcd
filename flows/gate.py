"""The gate: whether a challenger replaces the champion. Judged on the validation set; test data play no part.

Both models answer the same validation pictures, none of which was ever trained on. These pictures carry the same
shortcut as the training pictures, so a model that unlearned it answers fewer of them correctly, as a worse model does.
Pictures with a gold mask tell the two apart: they are answered once more with their background swapped, where the
shortcut is gone, and a picture counts for a model only if the model is right in both backgrounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from abn.attention import context_reliance, energy_inside
from abn.config import load_section
from abn.data import Pictures
from abn.manifest import Sample, read_manifest
from abn.model import LoadedModel, load_model
from abn.predict import SHARD, PredictConfig, predict
from abn.train import TrainConfig, choose_device
from flows.gate_rule import ROUNDING, Evidence, GateConfig, weigh

MEASURES = ("attention_inside_mask", "context_reliance")
ELSEWHERE = "_in_other_context"
COMPARISON_COLUMNS = (
    *("sample", "label", "champion", "challenger", f"champion{ELSEWHERE}", f"challenger{ELSEWHERE}"),
    *(f"{model}_{measure}" for measure in MEASURES for model in ("champion", "challenger")),
)


NO_VAL = "the split val has no pictures, so no model can be judged; give some to `abnloop init`"
ENOUGH = 60  # gold masks of val that tell an unlearned shortcut from a worse model with few errors
FIRST_LOOK = 10  # gold masks that are asked for first; then as many again each time
Verdict = Literal["promoted", "refused", "undecided"]


@dataclass(frozen=True)
class View:
    """What one model made of some pictures, in their order."""

    answers: list[str]  # class names
    elsewhere: list[str]  # the answers in another context; without a gold mask, the same
    attention_inside_mask: np.ndarray  # (n,) 0..1, higher is better; NaN without a gold mask
    context_reliance: np.ndarray  # (n,) 0..1, lower is better; NaN without a gold mask
    maps: np.ndarray  # (n, h, w) 0..1


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pictures."""

    samples: list[Sample]
    champion: View
    challenger: View

    def rows(self) -> list[dict[str, str]]:
        """COMPARISON_COLUMNS of each picture: its label, each model's answer and what its map measures."""
        rows = []
        for number, sample in enumerate(self.samples):
            row = {"sample": sample.id, "label": sample.label}
            for name, seen in (("champion", self.champion), ("challenger", self.challenger)):
                row |= {name: seen.answers[number], f"{name}{ELSEWHERE}": seen.elsewhere[number]}
                for measure in MEASURES:
                    value = getattr(seen, measure)[number]
                    row[f"{name}_{measure}"] = f"{value:.6f}" if np.isfinite(value) else ""
            rows.append(row)
        return rows


class Criterion(NamedTuple):
    """One comparison of the two models. Without a tolerance it is reported only."""

    name: str
    champion: float  # 0..1
    challenger: float
    gain: float  # of the challenger, positive where it is better
    pictures: int
    tolerance: float | None = None  # a loss above this makes the challenger worse
    probability: float | None = None  # that the challenger is not worse
    required: float | None = None  # the probability that a promotion needs
    passed: bool = True  # False where it is a reason to refuse the challenger


class Judgement(NamedTuple):
    """The verdict on a challenger.

    undecided: too little gold to tell an unlearned shortcut from a worse model. The champion stays, and the same
    challenger is judged again with `missing_gold` more gold masks of val.
    """

    verdict: Verdict
    reason: str  # one line with the numbers that it stands on
    criteria: Sequence[Criterion] = ()
    missing_gold: int = 0  # above 0 exactly where undecided

    @property
    def promoted(self) -> bool:
        return self.verdict == "promoted"

    def numbers(self) -> list[dict[str, Any]]:
        """The criteria as JSON takes them."""
        return [one._asdict() for one in self.criteria]


def compare(root: Path, champion: Path, challenger: Path) -> Comparison:
    """Both models, by their files, on the validation set of the workspace at `root`.

    Raises ValueError where the split val has no pictures.
    """
    samples = [sample for sample in read_manifest(root) if sample.split == "val"]
    if not samples:
        raise ValueError(NO_VAL)
    config = load_section(PredictConfig, root / "params.yaml", "predict")
    device = choose_device(load_section(TrainConfig, root / "params.yaml", "train").device)
    views = [_view(load_model(path, device), root, samples, config) for path in (champion, challenger)]
    return Comparison(samples, *views)


def _view(model: LoadedModel, root: Path, samples: Sequence[Sample], config: PredictConfig) -> View:
    """A shard of the pictures in memory at a time."""
    answers: list[str] = []
    elsewhere: list[str] = []
    parts = []
    for start in range(0, len(samples), SHARD):
        pictures = Pictures(root, samples[start : start + SHARD], model.classes, model.size)
        seen = predict(model, pictures, config)
        judged = np.where(seen.has_gold[:, None], seen.replaced_probabilities, seen.probabilities)
        answers += [model.classes[answer] for answer in seen.probabilities.argmax(axis=1)]
        elsewhere += [model.classes[answer] for answer in judged.argmax(axis=1)]
        inside = np.where(seen.has_gold, energy_inside(seen.maps, seen.gold_maps), np.nan)
        parts.append((inside, context_reliance(seen.probabilities, seen.replaced_probabilities), seen.maps))
    return View(answers, elsewhere, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def judge(comparison: Comparison, config: GateConfig, wanted: int) -> Judgement:
    """The verdict on the challenger; see `weigh` for the rule.

    `wanted` is how many gold masks val shall have in the end: with as many the gold is complete, and the verdict is
    promoted or refused. Without any gold mask it is undecided, and where none is wanted the reason says what to do.
    Raises ValueError where val has no pictures.
    """
    if not comparison.samples:
        raise ValueError(NO_VAL)
    champion, challenger = comparison.champion, comparison.challenger
    truth = np.array([sample.label for sample in comparison.samples])
    gold = np.isfinite(champion.context_reliance) & np.isfinite(challenger.context_reliance)
    masks = int(gold.sum())
    wanted = min(wanted, len(truth))
    complete = 0 < masks >= wanted

    as_is, swapped = (
        np.array([np.array(answers) == truth for answers in pair])
        for pair in ((champion.answers, challenger.answers), (champion.elsewhere, challenger.elsewhere))
    )
    classes = np.unique(truth)
    outcomes = np.array([_outcomes(as_is[:, truth == label]) for label in classes])
    in_both = np.array([_outcomes((as_is & swapped)[:, gold & (truth == label)]) for label in classes])
    evidence = weigh(outcomes, in_both, config, complete)

    worst = int(np.lexsort((evidence.class_as_is, ~evidence.class_in_doubt, ~evidence.class_lost))[0])
    rows = [_criterion("accuracy", as_is, config.accuracy_tolerance, evidence.as_is)]
    if masks:
        both = _criterion("accuracy_in_both_backgrounds", (as_is & swapped)[:, gold], config.accuracy_tolerance)
        reached = evidence.in_both >= evidence.required - ROUNDING
        rows += [
            _criterion("accuracy_background_swap", swapped[:, gold]),
            both._replace(
                probability=float(evidence.in_both),
                required=float(evidence.required),
                passed=bool(reached if complete else not evidence.worse),
            ),
        ]
    of_class = as_is[:, truth == classes[worst]], config.worst_class_tolerance, evidence.class_as_is[worst]
    rows.append(_criterion(f"accuracy_of_class_{classes[worst]}", *of_class))
    rows[-1] = rows[-1]._replace(passed=not evidence.class_lost[worst])

    missing = 0
    if evidence.promoted:
        verdict: Verdict = "promoted"
    elif evidence.refused:
        verdict = "refused"
    else:
        verdict, missing = "undecided", min(max(FIRST_LOOK, 2 * masks), wanted or len(truth)) - masks
    reason = _reason(rows, evidence, in_both.sum(axis=0), missing, comes=wanted > 0)
    return Judgement(verdict, reason, [*rows, *_map_measures(champion, challenger)], missing)


def _outcomes(right: np.ndarray) -> tuple[int, int, int]:
    """Pictures won, lost and tied of (2, n) bool: whether champion and challenger were right."""
    champion, challenger = right
    won, lost = int((challenger & ~champion).sum()), int((champion & ~challenger).sum())
    return won, lost, len(champion) - won - lost


def _criterion(
    name: str, right: np.ndarray, tolerance: float | None = None, probability: np.ndarray | None = None
) -> Criterion:
    """Of (2, n) bool: whether champion and challenger were right."""
    before, after = (float(one.mean()) for one in right)
    known = None if probability is None else float(probability)
    return Criterion(name, before, after, after - before, right.shape[1], tolerance, known)


def _map_measures(champion: View, challenger: View) -> list[Criterion]:
    """Means over the pictures where both models were measured; reported, never a reason to refuse.

    A map that looks right does not show that the decision rests on it, and how far the answer hangs on the background
    is what the answers with swapped background say more directly.
    """
    rows = []
    for name, sign in zip(MEASURES, (1, -1), strict=True):
        before, after = getattr(champion, name), getattr(challenger, name)
        if (both := np.isfinite(before) & np.isfinite(after)).any():
            means = float(before[both].mean()), float(after[both].mean())
            rows.append(Criterion(name, *means, sign * (means[1] - means[0]), int(both.sum())))
    return rows


def _reason(rows: Sequence[Criterion], evidence: Evidence, in_both: np.ndarray, missing: int, comes: bool) -> str:
    """One line: both accuracies, how sure the verdict is, and what it needed."""
    accuracy, *of_gold, of_class = rows
    parts = [f"accuracy {_change(accuracy)} on {accuracy.pictures} val pictures"]
    if accuracy.gain < 0:
        parts[0] += f" (a loss with probability {1 - evidence.as_is:.3f})"
    if of_gold:
        swapped, both = of_gold
        worse = f"worse by more than {both.tolerance:g}" if both.tolerance else "worse"
        needed = f"a promotion needs {evidence.required:.3f}"
        if missing:
            needed += f", a refusal at most {1 - evidence.required:.3f}"
        parts += [
            f"with swapped background {_change(swapped)} on {swapped.pictures} gold masks",
            f"right in both {_change(both)} ({in_both[0]} won, {in_both[1]} lost)",
            f"not {worse} with probability {evidence.in_both:.3f} ({needed})",
        ]
    if (evidence.class_lost | evidence.class_in_doubt).any():
        lost = 1 - (of_class.probability or 0)
        name = of_class.name.removeprefix("accuracy_of_class_")
        parts.append(f"class {name} {_change(of_class)} on {of_class.pictures}, a loss with probability {lost:.3f}")
    if missing and not of_gold:
        parts.append("without gold masks an unlearned shortcut cannot be told from a worse model")
    if missing and not comes:
        parts.append(f"none is to come: set labeling.gold, at best to {ENOUGH}, so that labelers paint some")
    elif missing:
        parts.append(f"{missing} more gold mask{'s' * (missing > 1)} of val needed before it is judged again")
    return "; ".join(parts)


def _change(criterion: Criterion) -> str:
    return f"{criterion.champion:.3f} -> {criterion.challenger:.3f}"
