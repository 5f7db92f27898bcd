"""Whether a challenger takes the champion's place. Judged on the validation set; test data plays no part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class GateConfig:
    accuracy_tolerance: float  # how much balanced accuracy a challenger may lose
    map_tolerance: float  # how much of attention inside the mask, and of context reliance, may get worse

    def __post_init__(self) -> None:
        for name in ("accuracy_tolerance", "map_tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"gate.{name} is {getattr(self, name)}; it must be from 0 to 1")


class Judgement(NamedTuple):
    promoted: bool
    reason: str  # with the numbers that it stands on


def judge(challenger: Mapping[str, float], champion: Mapping[str, float] | None, config: GateConfig) -> Judgement:
    """The challenger's validation metrics against the champion's (None: there is none yet).

    It must not be worse in balanced accuracy, and not worse in attention inside the mask and context reliance where
    both were measured on a gold set: a model that is right for the wrong reason is no champion.
    """
    if champion is None:
        return Judgement(True, "the first model")
    compared, faults = [], []
    for name, better, tolerance in (
        ("balanced_accuracy", 1, config.accuracy_tolerance),
        ("attention_inside_mask", 1, config.map_tolerance),
        ("context_reliance", -1, config.map_tolerance),
    ):
        if name in challenger and name in champion:
            line = f"{name.replace('_', ' ')} {champion[name]:.3f} -> {challenger[name]:.3f}"
            compared.append(line)
            if better * (challenger[name] - champion[name]) < -tolerance:
                faults.append(f"{line} (may lose {tolerance})")
    return Judgement(not faults, "; ".join(faults or compared))
