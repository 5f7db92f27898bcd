"""How often the gate errs: `python -m benchmarks.gate --json FILE`.

Simulates what two models of known accuracy answer on a validation set, and counts the gate's verdicts. Each model is
right on a picture, as it is or with swapped background, where a normal variable is under the quantile of its accuracy.
The four variables of a picture (two models, two backgrounds) are correlated, since difficult pictures are difficult for
both models and in both backgrounds. Classes are of unequal size (Zipf), and gold masks are drawn in proportion to the
classes, each at least one.

Columns: `10 of 60` is the verdict on the first 10 gold masks where 60 are wanted, `60 of 60` that on complete gold (on
all pictures where val has fewer), `sequence` what becomes of a challenger that is judged at 10, 20, 40 and 60 masks
until it is promoted or refused, and how many masks that takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from abn.config import load_section
from abn.files import write_json
from flows.gate import GateConfig, weigh

PROJECT = Path(__file__).parent.parent
ACROSS_MODELS, ACROSS_BACKGROUNDS, ACROSS_BOTH = 0.6, 0.6, 0.45  # correlations; 0.6 leaves much to chance
LOOKS = (10, 20, 40, 60)
OUTCOMES = np.indices((2, 2, 2, 2)).reshape(4, 16)  # champion, challenger as they are; then with swapped background


@dataclass(frozen=True)
class Scenario:
    """True accuracies, 0..1, on pictures as they are and with swapped background."""

    name: str
    champion: tuple[float, float]
    challenger: tuple[float, float]
    wanted: str  # the right verdict; empty where neither is an error
    lost_class: float = 0.0  # share of its accuracy that the challenger loses in the class of middle size


SCENARIOS = (
    Scenario("shortcut unlearned", (1.00, 0.10), (0.98, 0.97), "promoted"),
    Scenario("shortcut unlearned, hard task", (1.00, 0.14), (0.52, 0.52), "promoted"),
    Scenario("partial shortcut unlearned", (0.95, 0.55), (0.90, 0.85), "promoted"),
    Scenario("as the coffee leaves", (0.939, 0.564), (0.898, 0.846), "promoted"),
    Scenario("worse by 0.03", (0.95, 0.93), (0.92, 0.90), "refused"),
    Scenario("worse by 0.05", (0.95, 0.93), (0.90, 0.88), "refused"),
    Scenario("worse by 0.10", (0.95, 0.93), (0.85, 0.83), "refused"),
    Scenario("worse as it is, same swapped", (0.95, 0.90), (0.90, 0.90), "refused"),
    Scenario("worse as it is by 0.15", (0.677, 0.45), (0.527, 0.50), "refused"),
    Scenario("shortcut relearned", (0.98, 0.97), (1.00, 0.10), "refused"),
    Scenario("partial shortcut relearned", (0.90, 0.85), (0.95, 0.55), "refused"),
    Scenario("better, but one class given up", (0.90, 0.88), (0.95, 0.93), "refused", lost_class=0.6),
    Scenario("equal", (0.95, 0.93), (0.95, 0.93), ""),
    Scenario("better by 0.02", (0.93, 0.91), (0.95, 0.93), ""),
    Scenario("better by 0.05", (0.90, 0.88), (0.95, 0.93), ""),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, nargs="+", default=[50, 200, 1000], help="sizes of the validation set")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 5, 10])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args(arguments)
    config = load_section(GateConfig, PROJECT / "params.yaml", "gate")
    rows = []
    print("promoted/refused in percent, the rest undecided\n")
    print(f"{'scenario':30}   val classes   10 of 60  20 of 60  60 of 60  sequence masks")
    for scenario in SCENARIOS:
        for pictures in options.pictures:
            for classes in options.classes:
                found = simulate(scenario, config, pictures, classes, options.draws, options.seed)
                rows.append({"scenario": scenario.name, "wanted": scenario.wanted, **found})
                shown = [f"{100 * one[0]:.1f}/{100 * one[1]:.1f}" for one in found["verdicts"].values()]
                print(f"{scenario.name:30} {pictures:5} {classes:7}  " + " ".join(f"{one:>9}" for one in shown), end="")
                print(f" {found['masks']:5.1f}", flush=True)
    if options.json:
        write_json(options.json, {"draws": options.draws, "seed": options.seed, "rows": rows})


def simulate(
    scenario: Scenario, config: GateConfig, pictures: int, classes: int, draws: int, seed: int
) -> dict[str, Any]:
    """Rates (promoted, refused), 0..1, at the looks of LOOKS and in sequence, and the mean number of masks that the
    sequence takes."""
    generator = np.random.default_rng(seed)
    each = class_sizes(pictures, classes)
    looks = [min(look, pictures) for look in LOOKS if look == LOOKS[0] or look < pictures + 20]
    gold = gold_sizes(each, looks)
    as_is, in_both = draw(scenario, each, gold, draws, generator)
    verdicts: dict[str, tuple[float, float]] = {}
    open_, promoted, refused, masks = np.ones(draws, bool), 0.0, 0.0, 0.0
    for number, look in enumerate(looks):
        complete = number == len(looks) - 1
        evidence = weigh(as_is, in_both[number], config, complete)
        if complete or look in (10, 20):
            verdicts["60 of 60" if complete else f"{look} of 60"] = _rates(evidence.promoted, evidence.refused)
        masks += look * float((open_ & (evidence.promoted | evidence.refused)).mean())
        promoted += float((open_ & evidence.promoted).mean())
        refused += float((open_ & evidence.refused).mean())
        open_ &= ~(evidence.promoted | evidence.refused)
    verdicts["sequence"] = (promoted, refused)
    return {"pictures": pictures, "classes": classes, "verdicts": verdicts, "masks": masks}


def draw(
    scenario: Scenario, each: np.ndarray, gold: np.ndarray, draws: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of won, lost and tied: as they are, (draws, classes, 3), and in both backgrounds on the gold pictures of
    each look, (looks, draws, classes, 3).

    `each` is (classes,) pictures, `gold` (looks, classes) masks, growing from look to look.
    """
    champion, challenger, champion_swapped, challenger_swapped = OUTCOMES
    kinds_as_is = _kinds(champion, challenger)
    kinds_in_both = _kinds(champion & champion_swapped, challenger & challenger_swapped)
    as_is = np.zeros((draws, len(each), 3))
    in_both = np.zeros((len(gold), draws, len(each), 3))
    steps = np.diff(gold, axis=0, prepend=0)
    for label, chances in enumerate(_class_chances(scenario, len(each), generator)):
        seen = np.zeros((draws, 16))
        for look, masks in enumerate(steps[:, label]):
            seen += generator.multinomial(masks, chances, size=draws)
            in_both[look, :, label] = seen @ kinds_in_both
        seen += generator.multinomial(each[label] - gold[-1, label], chances, size=draws)
        as_is[:, label] = seen @ kinds_as_is
    return as_is, in_both


def class_sizes(pictures: int, classes: int) -> np.ndarray:
    """Pictures of each class, proportional to 1 / rank, at least one."""
    shares = 1 / np.arange(1, classes + 1)
    each = np.maximum(1, np.floor(pictures * shares / shares.sum())).astype(int)
    each[0] += pictures - each.sum()
    return each


def gold_sizes(each: np.ndarray, looks: Sequence[int]) -> np.ndarray:
    """(looks, classes) gold masks: one of each class first, then in proportion to the classes."""
    order = sorted((number / size, label) for label, size in enumerate(each) for number in range(size))
    labels = np.array([label for _, label in order])
    return np.array([np.bincount(labels[:look], minlength=len(each)) for look in looks])


def outcome_chances(scenario: Scenario, generator: np.random.Generator, points: int = 400_000) -> np.ndarray:
    """(16,) probabilities of OUTCOMES."""
    a, b, c = ACROSS_MODELS, ACROSS_BACKGROUNDS, ACROSS_BOTH
    correlation = np.array([[1, a, b, c], [a, 1, c, b], [b, c, 1, a], [c, b, a, 1]])
    normal = generator.standard_normal((points, 4)) @ np.linalg.cholesky(correlation).T
    accuracies = np.array([scenario.champion[0], scenario.challenger[0], scenario.champion[1], scenario.challenger[1]])
    right = normal < ndtri(accuracies)
    return np.bincount(right @ np.array([8, 4, 2, 1]), minlength=16) / points


def _class_chances(scenario: Scenario, classes: int, generator: np.random.Generator) -> list[np.ndarray]:
    chances = [outcome_chances(scenario, generator)] * classes
    if scenario.lost_class:
        kept = 1 - scenario.lost_class
        lost = replace(scenario, challenger=(scenario.challenger[0] * kept, scenario.challenger[1] * kept))
        chances[classes // 2] = outcome_chances(lost, generator)
    return chances


def _kinds(champion: np.ndarray, challenger: np.ndarray) -> np.ndarray:
    """(16, 3): whether an outcome is won, lost or tied."""
    return np.stack([challenger > champion, challenger < champion, challenger == champion], axis=1).astype(float)


def _rates(promoted: np.ndarray, refused: np.ndarray) -> tuple[float, float]:
    return float(promoted.mean()), float(refused.mean())


if __name__ == "__main__":
    main()
