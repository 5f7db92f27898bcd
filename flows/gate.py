"""Whether a challenger takes the champion's place. Judged on the validation set; test data plays no part.

Both models answer the same validation pictures, none of which was ever sent to a labeler or trained on, in the same
contexts, so that each picture compares the one with the other. Validation pictures come from where the training
pictures come from and carry the same shortcut: whoever unlearns it is no longer right by it. So a picture with a gold
mask counts half as it is and half in another context, where the shortcut is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from abn.attention import context_reliance, energy_inside
from abn.config import load_section
from abn.data import Pictures
from abn.manifest import Sample, read_manifest
from abn.model import LoadedModel, load_model
from abn.predict import SHARD, PredictConfig, predict
from abn.train import TrainConfig, choose_device

MEASURES = ("attention_inside_mask", "context_reliance")
ELSEWHERE, BOTH = "_in_other_context", "_in_both_contexts"
COMPARISON_COLUMNS = (
    *("sample", "label", "champion", "challenger", f"champion{ELSEWHERE}", f"challenger{ELSEWHERE}"),
    *(f"{model}_{measure}" for measure in MEASURES for model in ("champion", "challenger")),
)


@dataclass(frozen=True)
class GateConfig:
    confidence: float  # that a loss of accuracy is no chance, before it counts
    accuracy_tolerance: float  # what a challenger may lose all the same
    worst_class_tolerance: float
    map_tolerance: float  # how much attention inside the mask, and context reliance, may get worse on average
    resamples: int  # of the bootstrap
    seed: int

    def __post_init__(self) -> None:
        for name in ("accuracy_tolerance", "worst_class_tolerance", "map_tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"gate.{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"gate.confidence is {self.confidence}; it must be from 0.5 to below 1")
        if self.resamples < 100:
            raise ValueError(f"gate.resamples is {self.resamples}; it must be at least 100")


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
    """One thing that a challenger may not be worse in."""

    name: str
    champion: float
    challenger: float
    gain: float  # what the challenger may have gained at best, negative where it lost
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.gain >= -self.tolerance - 1e-9

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')} {self.champion:.3f} -> {self.challenger:.3f}"


class Judgement(NamedTuple):
    promoted: bool
    reason: str  # with the numbers that it stands on
    criteria: Sequence[Criterion] = ()

    def numbers(self) -> list[dict[str, Any]]:
        """The criteria as JSON takes them."""
        return [{**one._asdict(), "passed": one.passed} for one in self.criteria]


def compare(root: Path, champion: Path, challenger: Path) -> Comparison:
    """Both models, by their files, on the validation set of the workspace at `root`."""
    samples = [sample for sample in read_manifest(root) if sample.split == "val"]
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


def judge(comparison: Comparison, config: GateConfig) -> Judgement:
    """Whether the challenger is not worse than the champion.

    Accuracy and the accuracy of the worst class count a few pictures, so a loss must be more than chance: `gain` is
    the upper end of the bootstrap's one-sided interval, and a challenger fails whose gain is below -tolerance. Maps
    are measured on every picture, so there the mean of the differences is the gain. A model that is right for the
    wrong reason is no champion.
    """
    champion, challenger = comparison.champion, comparison.challenger
    truth = np.array([sample.label for sample in comparison.samples])
    halves = [
        [np.array(answers) == truth for answers in (view.answers, view.elsewhere)] for view in (champion, challenger)
    ]
    where = BOTH if np.isfinite(champion.context_reliance).any() else ""
    criteria = _accuracies(truth, np.array(halves).sum(axis=1), config, where)
    for name, sign in zip(MEASURES, (1, -1), strict=True):
        before, after = getattr(champion, name), getattr(challenger, name)
        if (both := np.isfinite(before) & np.isfinite(after)).any():
            means = float(before[both].mean()), float(after[both].mean())
            criteria.append(Criterion(name, *means, sign * (means[1] - means[0]), config.map_tolerance))
    faults = [f"{one} ({_fault(one, config)})" for one in criteria if not one.passed]
    return Judgement(not faults, "; ".join(faults or map(str, criteria)), criteria)


def _accuracies(truth: np.ndarray, halves: np.ndarray, config: GateConfig, where: str) -> list[Criterion]:
    """Accuracy and worst class accuracy by a paired bootstrap within the classes (Efron and Tibshirani, 1993).

    `halves` is (2, n): how often champion and challenger were right on a picture that was shown twice; `where` that was
    is added to the names. Drawing n pictures with replacement is a multinomial draw of the nine kinds of pictures that
    there are, so the cost does not grow with the set.
    """
    generator, scores = np.random.default_rng(config.seed), np.indices((3, 3)).reshape(2, 9) / 2
    sizes, counted, resampled = [], [], []  # of each class: its pictures; right answers (2,), (2, resamples)
    for label in np.unique(truth):
        of_class = halves[:, truth == label]
        kinds = np.bincount(3 * of_class[0] + of_class[1], minlength=9)
        drawn = generator.multinomial(kinds.sum(), kinds / kinds.sum(), size=config.resamples)
        sizes.append(kinds.sum())
        counted.append(of_class.sum(axis=1) / 2)
        resampled.append(scores @ drawn.T)
    each = np.array(sizes)
    criteria = []
    for name, tolerance, score in (
        ("accuracy", config.accuracy_tolerance, lambda hits: hits.sum(axis=0) / each.sum()),
        ("worst_class_accuracy", config.worst_class_tolerance, lambda hits: (hits.T / each).min(axis=-1).T),
    ):
        before, after = score(np.array(counted))
        champion, challenger = score(np.array(resampled))
        gain = np.quantile(challenger - champion, config.confidence, method="higher")
        criteria.append(Criterion(name + where, float(before), float(after), float(gain), tolerance))
    return criteria


def _fault(criterion: Criterion, config: GateConfig) -> str:
    if criterion.name not in MEASURES:
        return f"{criterion.gain:+.3f} at best with {config.confidence:.0%} confidence, may lose {criterion.tolerance}"
    return f"{criterion.gain:+.3f}, may lose {criterion.tolerance}"
