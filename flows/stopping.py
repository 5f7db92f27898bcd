"""When the loop stops asking: the labelers' time is spent, nothing gets better, or nothing is left to correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from abn.selection import SAYS_WRONG

# What a round may gain, on the validation set: name, whether higher is better, what counts its pictures.
GAINS = (
    ("balanced_accuracy", 1, "samples"),
    ("attention_inside_mask", 1, "gold_samples"),
    ("context_reliance", -1, "gold_samples"),
)
SIGNIFICANT = 1.645  # standard errors: one-sided, 5 %


@dataclass(frozen=True)
class StopConfig:
    """Each rule is off at 0."""

    minutes: float  # of labelers, in all rounds
    plateau: int  # rounds in a row without a significant gain
    unreasonable: float  # share of a batch's maps that people called wrong

    def __post_init__(self) -> None:
        for name in ("minutes", "plateau", "unreasonable"):
            if getattr(self, name) < 0:
                raise ValueError(f"stop.{name} is {getattr(self, name)}; it must be at least 0, and 0 is off")
        if self.unreasonable > 1:
            raise ValueError(f"stop.unreasonable is {self.unreasonable}; it is a share, from 0 to 1")


def reason_to_stop(rounds: Sequence[Mapping[str, Any]], config: StopConfig) -> str:
    """Why no batch should be asked after `rounds`, with the numbers; an empty text where there is no reason.

    `rounds` are what round.json says of each, oldest first; the last one may not have been asked yet.
    """
    return _spent(rounds, config) or _plateau(rounds, config) or _reasonable(rounds, config)


def _spent(rounds: Sequence[Mapping[str, Any]], config: StopConfig) -> str:
    spent = sum(state.get("minutes", 0.0) for state in rounds)
    if not config.minutes or spent < config.minutes:
        return ""
    return f"labelers spent {spent:.1f} minutes, of {config.minutes:g} that they have (stop.minutes)"


def _plateau(rounds: Sequence[Mapping[str, Any]], config: StopConfig) -> str:
    judged = [state["validation"] for state in rounds if "validation" in state]
    if not config.plateau or len(judged) <= config.plateau:
        return ""
    before, *latest = judged[-config.plateau - 1 :]
    if any(_gained(before, after, *gain) for after in latest for gain in GAINS):
        return ""
    named = [name for name, _, _ in GAINS if name in before]
    numbers = "; ".join(
        f"{name.replace('_', ' ')} " + " -> ".join(f"{one[name]:.3f}" for one in (before, *latest) if name in one)
        for name in named
    )
    return f"{config.plateau} rounds in a row brought no significant gain (stop.plateau): {numbers}"


def _gained(before: Mapping[str, float], after: Mapping[str, float], name: str, better: int, counted: str) -> bool:
    """Whether the mean grew by more than chance explains, were the two measured on different pictures.

    The variance of values from 0 to 1 with mean m is at most m(1 - m) (Bhatia and Davis, 2000), and is that for right
    or wrong answers. So noise is rarely called a gain, and for maps, whose values differ less, a small gain may pass
    for noise.
    """
    if name not in before or name not in after:
        return False
    variance = sum(one[name] * (1 - one[name]) / one[counted] for one in (before, after))
    return better * (after[name] - before[name]) > SIGNIFICANT * sqrt(max(variance, 0.0))


def _reasonable(rounds: Sequence[Mapping[str, Any]], config: StopConfig) -> str:
    asked = [state["verdicts"] for state in rounds if state.get("verdicts")]
    if not config.unreasonable or not asked:
        return ""
    verdicts = asked[-1]
    on_maps = {name: count for name, count in verdicts.items() if name in SAYS_WRONG}
    told, wrong = sum(on_maps.values()), sum(count for name, count in on_maps.items() if SAYS_WRONG[name])
    if not told or wrong / told > config.unreasonable:
        return ""
    return (
        f"people called {wrong} of the {told} maps of the last batch wrong, "
        f"at most {config.unreasonable:.0%} (stop.unreasonable): nothing unreasonable is left"
    )
