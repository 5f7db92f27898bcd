"""How often the gate errs: `python -m benchmarks.gate --json FILE`.

Simulates what two models of known accuracy answer on a validation set, and counts the gate's verdicts. Each model is
right on a picture, as it is or with swapped background, where a normal variable is under the quantile of its accuracy.
The four variables of a picture (two models, two backgrounds) are correlated, since difficult pictures are difficult for
both models and in both backgrounds. Classes are of unequal size (Zipf), and gold masks are drawn in proportion to the
classes, each at least one.

Columns: `0`, `10` and `20` are the verdicts on the first so many gold masks where `--wanted` are to come, `complete`
those on all of them, or on all pictures where val has fewer. `sequence` is what becomes of a challenger that is judged
at `--looks` until it is promoted or refused, `masks` how many that takes on average.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from abn.config import load_section
from abn.files import write_json
from flows.gate_rule import GateConfig, weigh

PROJECT = Path(__file__).parent.parent
ACROSS_MODELS, ACROSS_BACKGROUNDS, ACROSS_BOTH = 0.6, 0.6, 0.45  # correlations; 0.6 leaves much to chance
LOOKS = (0, 10, 20, 40, 80, 160)  # gold masks, until as many as are wanted are there
POINTS = 400_000
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
    parser.add_argument("--wanted", type=int, default=60, help="gold masks that val shall have, as labeling.gold says")
    parser.add_argument("--looks", type=int, nargs="+", default=LOOKS, help="gold masks at which the gate judges")
    parser.add_argument("--confidence", type=float, help="instead of gate.confidence")
    parser.add_argument("--complete-confidence", type=float, help="instead of gate.complete_confidence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args(arguments)
    config = load_section(GateConfig, PROJECT / "params.yaml", "gate")
    changes = {"confidence": options.confidence, "complete_confidence": options.complete_confidence}
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    shared = options.wanted, options.draws, options.seed, options.looks
    rows = []
    print("promoted/refused in percent, the rest undecided\n")
    for scenario in SCENARIOS:
        for pictures in options.pictures:
            for classes in options.classes:
                found = simulate(scenario, config, pictures, classes, *shared)
                rows.append({"scenario": scenario.name, "wanted": scenario.wanted, **found})
                if len(rows) == 1:
                    heads = " ".join(f"{head:>10}" for head in (*found["verdicts"], "masks"))
                    print(f"{'scenario':30} {'val':>5} {'classes':>7} {heads}")
                rates = [f"{100 * one[0]:.1f}/{100 * one[1]:.1f}" for one in found["verdicts"].values()]
                cells = " ".join(f"{cell:>10}" for cell in (*rates, f"{found['masks']:.1f}"))
                print(f"{scenario.name:30} {pictures:5} {classes:7} {cells}", flush=True)
    if options.json:
        drawn = {name: getattr(options, name) for name in ("draws", "wanted", "seed", "looks")}
        write_json(options.json, {"settings": asdict(config), **drawn, "rows": rows})


def simulate(
    scenario: Scenario,
    config: GateConfig,
    pictures: int,
    classes: int,
    wanted: int,
    draws: int,
    seed: int,
    looks: Sequence[int] = LOOKS,
) -> dict[str, Any]:
    """Rates (promoted, refused), 0..1, at 0, 10 and 20 gold masks (of those in `looks`), complete, and in sequence; and
    the mean number of masks that the sequence takes."""
    generator, wanted = np.random.default_rng(seed), min(wanted, pictures)
    each = class_sizes(pictures, classes)
    looks = [*(look for look in looks if look < wanted), wanted]
    gold = gold_sizes(each, looks)
    as_is, in_both = draw(scenario, each, gold, draws, generator)
    verdicts: dict[str, tuple[float, float]] = {}
    open_, promoted, refused, masks = np.ones(draws, bool), 0.0, 0.0, 0.0
    for number, look in enumerate(looks):
        complete = number == len(looks) - 1
        evidence = weigh(as_is, in_both[number], config, complete)
        if complete or look in (0, 10, 20):
            verdicts["complete" if complete else str(look)] = _rates(evidence.promoted, evidence.refused)
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
    for label, chances in enumerate(_class_chances(scenario, len(each))):
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


@cache
def outcome_chances(champion: tuple[float, float], challenger: tuple[float, float]) -> np.ndarray:
    """(16,) probabilities of OUTCOMES, from POINTS pictures."""
    a, b, c = ACROSS_MODELS, ACROSS_BACKGROUNDS, ACROSS_BOTH
    correlation = np.array([[1, a, b, c], [a, 1, c, b], [b, c, 1, a], [c, b, a, 1]])
    normal = np.random.default_rng(0).standard_normal((POINTS, 4)) @ np.linalg.cholesky(correlation).T
    accuracies = np.array([champion[0], challenger[0], champion[1], challenger[1]])
    right = normal < ndtri(accuracies)
    return np.bincount(right @ np.array([8, 4, 2, 1]), minlength=16) / POINTS


def _class_chances(scenario: Scenario, classes: int) -> list[np.ndarray]:
    champion, challenger = scenario.champion, scenario.challenger
    chances = [outcome_chances(champion, challenger)] * classes
    kept = 1 - scenario.lost_class
    chances[classes // 2] = outcome_chances(champion, (challenger[0] * kept, challenger[1] * kept))
    return chances


def _kinds(champion: np.ndarray, challenger: np.ndarray) -> np.ndarray:
    """(16, 3): whether an outcome is won, lost or tied."""
    return np.stack([challenger > champion, challenger < champion, challenger == champion], axis=1).astype(float)


def _rates(promoted: np.ndarray, refused: np.ndarray) -> tuple[float, float]:
    return float(promoted.mean()), float(refused.mean())


if __name__ == "__main__":
    main()
