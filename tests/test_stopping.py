"""When the loop stops asking, by worked examples."""

from __future__ import annotations

from typing import Any

import pytest

from flows.stopping import StopConfig, reason_to_stop

OFF = StopConfig(minutes=0, plateau=0, unreasonable=0)


def judged(*accuracies: float, samples: float = 100, **others: float) -> list[dict[str, Any]]:
    return [
        {"validation": {"balanced_accuracy": one, "samples": samples, "gold_samples": samples, **others}}
        for one in accuracies
    ]


def test_no_rule_is_on_by_default() -> None:
    spent = [{"minutes": 1e6, "verdicts": {"map_ok": 30}, **one} for one in judged(0.9, 0.9, 0.9)]
    assert reason_to_stop(spent, OFF) == "" and reason_to_stop([], OFF) == ""


def test_minutes_of_all_rounds_are_added_up() -> None:
    rounds = [{"minutes": 20.5}, {"minutes": 9.25}, {}]
    assert reason_to_stop(rounds, StopConfig(30, 0, 0)) == ""
    assert reason_to_stop(rounds, StopConfig(29.5, 0, 0)) == (
        "labelers spent 29.8 minutes, of 29.5 that they have (stop.minutes)"
    )


def test_a_plateau_is_as_many_rounds_without_a_significant_gain() -> None:
    # With 100 pictures each, 0.80 against 0.90: sqrt(0.16 / 100 + 0.09 / 100) = 0.05, and 1.645 of that are 0.082.
    config = StopConfig(0, 2, 0)
    assert reason_to_stop(judged(0.8, 0.85, 0.88), config) == (
        "2 rounds in a row brought no significant gain (stop.plateau): balanced accuracy 0.800 -> 0.850 -> 0.880"
    )
    assert reason_to_stop(judged(0.8, 0.85, 0.9), config) == ""
    assert reason_to_stop(judged(0.8, 0.9, 0.85), config) == "", "a gain that was lost again was one"
    assert reason_to_stop(judged(0.85, 0.88), config) == "", "two rounds in a row need three models"


def test_the_same_gain_on_fewer_pictures_is_noise() -> None:
    config = StopConfig(0, 1, 0)
    assert reason_to_stop(judged(0.8, 0.9), config) == ""
    assert reason_to_stop(judged(0.8, 0.9, samples=50), config) != ""


@pytest.mark.parametrize(
    ("name", "first", "then"), [("attention_inside_mask", 0.4, 0.6), ("context_reliance", 0.6, 0.4)]
)
def test_a_gain_in_where_the_network_looks_is_a_gain(name: str, first: float, then: float) -> None:
    config = StopConfig(0, 1, 0)
    (before,), (after,) = judged(0.9, **{name: first}), judged(0.9, **{name: then})
    assert reason_to_stop([before, after], config) == ""
    assert "no significant gain" in reason_to_stop([after, before], config)


def test_nothing_unreasonable_is_left_where_people_mend_few_maps_of_the_last_batch() -> None:
    config = StopConfig(0, 0, 0.05)
    few = {"map_ok": 38, "map_fixed": 2, "whole_image": 5, "label_wrong": 7}
    assert reason_to_stop([{"verdicts": {"map_fixed": 30}}, {"verdicts": few}, {}], config) == (
        "people called 2 of the 40 maps of the last batch wrong, at most 5% (stop.unreasonable): "
        "nothing unreasonable is left"
    )
    assert reason_to_stop([{"verdicts": few}, {"verdicts": {**few, "map_fixed": 3}}], config) == ""
    assert reason_to_stop([{"verdicts": {**few, "all_but_map": 1}}], config) == ""
    assert reason_to_stop([{"verdicts": {"label_wrong": 3}}], config) == "", "that says nothing of maps"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 0, 0), "stop.minutes is -1; it must be at least 0"),
        ((0, -2, 0), "stop.plateau is -2"),
        ((0, 0, 30), "stop.unreasonable is 30; it is a share"),
    ],
)
def test_settings_out_of_range_are_refused(values: tuple[float, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopConfig(*values)
