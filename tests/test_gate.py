from __future__ import annotations

from collections.abc import Mapping

import pytest

from flows.gate import GateConfig, judge

CONFIG = GateConfig(accuracy_tolerance=0.05, map_tolerance=0.02)
CHAMPION = {"balanced_accuracy": 0.9, "attention_inside_mask": 0.7, "context_reliance": 0.3}


def test_the_first_model_is_promoted() -> None:
    assert judge({"balanced_accuracy": 0.1}, None, CONFIG) == (True, "the first model")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"balanced_accuracy": 0.95, "attention_inside_mask": 0.8, "context_reliance": 0.1},
        {"balanced_accuracy": 0.86},  # each loses less than it may
        {"attention_inside_mask": 0.69},
        {"context_reliance": 0.31},
    ],
)
def test_a_challenger_that_is_not_worse_is_promoted_with_the_numbers(change: Mapping[str, float]) -> None:
    promoted, reason = judge({**CHAMPION, **change}, CHAMPION, CONFIG)
    assert promoted
    for name, value in {**CHAMPION, **change}.items():
        assert f"{name.replace('_', ' ')} {CHAMPION[name]:.3f} -> {value:.3f}" in reason


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("balanced_accuracy", 0.84, "balanced accuracy 0.900 -> 0.840 (may lose 0.05)"),
        ("attention_inside_mask", 0.67, "attention inside mask 0.700 -> 0.670 (may lose 0.02)"),
        ("context_reliance", 0.33, "context reliance 0.300 -> 0.330 (may lose 0.02)"),
    ],
)
def test_a_challenger_that_is_worse_in_anything_is_refused_for_that_alone(name: str, value: float, reason: str) -> None:
    better = {"balanced_accuracy": 1.0, "attention_inside_mask": 1.0, "context_reliance": 0.0}
    assert judge({**better, name: value}, CHAMPION, CONFIG) == (False, reason)


def test_every_fault_is_named() -> None:
    worse = {"balanced_accuracy": 0.5, "attention_inside_mask": 0.1, "context_reliance": 0.9}
    promoted, reason = judge(worse, CHAMPION, CONFIG)
    assert not promoted and reason.count("(may lose") == 3


def test_maps_are_judged_only_where_both_were_measured() -> None:
    without = {"balanced_accuracy": 0.9}
    assert judge(without, CHAMPION, CONFIG).promoted
    assert judge({**CHAMPION, "attention_inside_mask": 0.0}, without, CONFIG).promoted
    assert not judge({"balanced_accuracy": 0.8}, CHAMPION, CONFIG).promoted


def test_test_data_play_no_part() -> None:
    """What is handed over holds more than is looked at."""
    more = {"samples": 24, "worst_class_accuracy": 0.0, "map_iou": 0.0, "accuracy": 0.0}
    assert judge({**CHAMPION, **more}, {**CHAMPION, **dict.fromkeys(more, 1.0)}, CONFIG).promoted


@pytest.mark.parametrize("name", ["accuracy_tolerance", "map_tolerance"])
@pytest.mark.parametrize("value", [-0.01, 1.01])
def test_a_tolerance_lies_within_0_and_1(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"gate\.{name} is {value}; it must be from 0 to 1"):
        GateConfig(**{"accuracy_tolerance": 0.0, "map_tolerance": 0.0, name: value})
