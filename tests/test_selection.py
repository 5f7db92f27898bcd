from __future__ import annotations

import csv
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abn import selection
from abn.manifest import CORRECTION_COLUMNS, MANIFEST_COLUMNS, read_corrections
from abn.predictions import Answers, Predictions, Shards, write_shard
from abn.selection import (
    STRATEGIES,
    GoldQuestion,
    Pick,
    SelectionConfig,
    Told,
    gold_questions,
    main,
    read_told,
    select,
    told_by,
)
from labeling.screen import reason_shown
from tiny import PROJECT, correction, write_csv

CLASSES = ["cat", "dog"]
BY_NAME = sorted(set(STRATEGIES) - {"random"})


def answers(probabilities: list[list[float]], names: list[str] | None = None, **columns: Any) -> Predictions:
    count = len(probabilities)
    given = np.array(probabilities, dtype=np.float32)
    return Predictions(
        samples=np.array(names or [f"s{i:02d}" for i in range(count)]),
        probabilities=given,
        attention_probabilities=given,
        maps=np.zeros((count, 2, 2), np.float32),
        embeddings=np.array(columns.get("embeddings", np.eye(count)), np.float32),
        corner_reliance=np.array(columns.get("corner_reliance", [0.0] * count), np.float32),
        early_confidence=np.array(columns.get("early_confidence", [np.nan] * count), np.float32),
        has_gold=np.zeros(count, bool),
        gold_maps=np.zeros((count, 2, 2), np.float32),
        replaced_probabilities=np.full((count, 2), np.nan, np.float32),
    )


def config(strategy: str = "benefit", budget: int = 2, **changes: Any) -> SelectionConfig:
    values: dict[str, Any] = {"budget_minutes": 0.0, "random_share": 0.0, "seed": 0, **changes}
    return SelectionConfig(strategy, budget, **values)  # type: ignore[arg-type]


def choose(
    predictions: Predictions, labels: list[int], chosen: SelectionConfig, told: Told | None = None
) -> list[Pick]:
    candidates = range(len(labels)) if told is None else np.flatnonzero(~told.answered).tolist()
    picks = select(predictions, np.array(labels), candidates, CLASSES, chosen, told)
    assert all(reason_shown(pick.reason) != pick.reason for pick in picks)  # the desk speaks two languages
    return picks


def names(picks: list[Pick]) -> list[str]:
    return [pick.sample for pick in picks]


def many(count: int) -> Predictions:
    rng = np.random.default_rng(0)
    return answers(
        rng.dirichlet([1, 1], count).tolist(),
        embeddings=rng.standard_normal((count, 5)),
        corner_reliance=rng.random(count),
        early_confidence=rng.random(count),
    )


# --- strategies


def test_misclassified_puts_the_surest_error_first() -> None:
    predictions = answers([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    picks = choose(predictions, [1, 0, 0, 1], config("misclassified"))
    assert [(pick.sample, pick.score) for pick in picks] == [("s01", pytest.approx(0.9)), ("s02", pytest.approx(0.8))]
    assert picks[0].reason == "misclassified: answers dog (80%), labeled cat"


def test_margin_prefers_the_closest_pair() -> None:
    picks = choose(answers([[0.9, 0.1], [0.45, 0.55], [0.3, 0.7]]), [0, 1, 1], config("margin"))
    assert [(pick.sample, pick.score) for pick in picks] == [("s01", pytest.approx(0.9)), ("s02", pytest.approx(0.6))]
    assert picks[0].reason == "unsure: dog (55%) or cat (45%)"


def test_entropy_is_a_share_of_the_largest() -> None:
    picks = choose(answers([[1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]), [0, 1, 0], config("entropy"))
    # -(3/4 log2 3/4 + 1/4 log2 1/4) = 0.8113 bits of 1
    assert [(pick.sample, pick.score) for pick in picks] == [
        ("s01", pytest.approx(1.0)),
        ("s02", pytest.approx(0.8113, abs=1e-4)),
    ]


def test_attention_asks_about_the_most_suspicious_map() -> None:
    sure = [[0.98, 0.02]] * 60
    near = np.repeat(np.eye(3), 20, axis=0) + np.random.default_rng(0).normal(0, 0.01, (60, 3))
    corner_reliance = [0.1] * 20 + [0.8] * 20 + [0.0] * 20
    predictions = answers(sure, embeddings=near, corner_reliance=corner_reliance)
    picks = choose(predictions, [0] * 60, config("attention", 5))
    assert all(20 <= int(name[1:]) < 40 for name in names(picks))
    assert picks[0].reason == "doubtful attention: the answer hangs on the picture's corners (80%)"
    early = [0.3] * 40 + [0.9] * 20
    picks = choose(answers(sure, embeddings=near, early_confidence=early), [0] * 60, config("attention", 5))
    assert all(int(name[1:]) >= 40 for name in names(picks))
    assert picks[0].reason == "doubtful attention: learned before most others, as shortcuts are"


def test_verdicts_point_to_the_pictures_that_are_alike() -> None:
    sure = [[0.98, 0.02]] * 60
    near = np.repeat(np.eye(3), 20, axis=0) + np.random.default_rng(0).normal(0, 0.01, (60, 3))
    verdicts = np.full(60, np.nan)
    verdicts[40:50] = 1
    verdicts[[*range(5), *range(20, 25)]] = 0
    told = Told(np.isfinite(verdicts), verdicts)
    picks = choose(answers(sure, embeddings=near), [0] * 60, config("attention", 6), told)
    assert set(names(picks)) <= {f"s{i}" for i in range(50, 60)}
    assert picks[0].reason == "doubtful attention: labelers called the maps of similar pictures wrong"


def test_k_center_takes_the_farthest_from_all_before() -> None:
    """On a circle: after the first, the one opposite, then one at a right angle to both."""
    angles = np.deg2rad([0, 10, 90, 170, 180, 270])
    circle = np.column_stack([np.cos(angles), np.sin(angles)])
    circle -= circle.mean(axis=0)
    picks = choose(answers([[0.5, 0.5]] * 6, embeddings=circle), [0] * 6, config("k-center", 3))
    found = {names(picks)[0], names(picks)[1]}
    assert found <= {"s00", "s01", "s03", "s04"} and len({int(name[1:]) < 2 for name in found}) == 2
    assert names(picks)[2] in {"s02", "s05"}
    answered = np.array([True, False, False, False, True, False])
    told = Told(answered, np.full(6, np.nan))
    picks = choose(answers([[0.5, 0.5]] * 6, embeddings=circle), [0] * 6, config("k-center", 2), told)
    assert set(names(picks)) == {"s02", "s05"}
    assert picks[0].reason == "unlike every picture that was asked about so far"


def test_badge_takes_the_unsure_and_not_two_alike() -> None:
    unsure, sure = [0.5, 0.5], [1.0, 0.0]
    embeddings = np.array([[1.0, 0], [1.0, 0.001], [0, 1.0], [0, 1.001], [5.0, 0], [0, 5.0]])
    predictions = answers([unsure] * 4 + [sure] * 2, embeddings=embeddings)
    picked = {
        frozenset(int(name[1:]) // 2 for name in names(choose(predictions, [0] * 6, config("badge", seed=seed))))
        for seed in range(10)
    }
    assert picked <= {frozenset({0, 1}), frozenset({0, 1, 2}), frozenset({0, 2}), frozenset({1, 2})}
    assert frozenset({0, 1}) in picked


def test_benefit_prefers_what_teaches_over_what_does_not() -> None:
    predictions = answers([[0.9, 0.1]] * 3, corner_reliance=[0.0, 0.9, 0.0])
    wrong_then_doubtful = choose(predictions, [1, 0, 0], config())
    assert names(wrong_then_doubtful)[0] == "s00"
    assert wrong_then_doubtful[0].reason.startswith("misclassified")


def test_benefit_asks_about_near_duplicates_once() -> None:
    rng = np.random.default_rng(0)
    where = rng.standard_normal((40, 8))
    where[20:] = where[20] + rng.normal(0, 1e-4, (20, 8))  # twenty shots of one thing, all misclassified
    predictions = answers([[0.3, 0.7]] * 20 + [[0.2, 0.8]] * 20, embeddings=where)
    labels = [0] * 40
    alike = [int(name[1:]) >= 20 for name in names(choose(predictions, labels, config(budget=10)))]
    assert sum(alike) <= 3
    assert sum(int(name[1:]) >= 20 for name in names(choose(predictions, labels, config("misclassified", 10)))) == 10


def test_benefit_lets_classes_take_turns_where_they_are_alike() -> None:
    """Dogs are all a little more surely wrong than cats, and yet nearly half of the batch are cats."""
    where = np.random.default_rng(0).standard_normal((40, 8))
    predictions = answers([[0.05, 0.95]] * 20 + [[0.6, 0.4]] * 20, embeddings=where)
    picks = choose(predictions, [0] * 20 + [1] * 20, config(budget=10))
    assert 4 <= sum(int(name[1:]) >= 20 for name in names(picks)) <= 6


def test_benefit_turns_to_the_class_that_was_asked_about_less() -> None:
    """Ten dogs are answered: most of the batch are cats. Where nobody was, or ten of either, half are."""
    where = np.random.default_rng(0).standard_normal((80, 8))
    predictions = answers([[0.05, 0.95]] * 40 + [[0.95, 0.05]] * 40, embeddings=where)

    def cats(answered: list[int]) -> int:
        told = Told(np.isin(np.arange(80), answered), np.full(80, np.nan))
        picks = choose(predictions, [0] * 40 + [1] * 40, config(budget=8), told)
        return sum(int(name[1:]) >= 40 for name in names(picks))

    assert cats([]) == cats([*range(10), *range(40, 50)]) == 4
    assert cats([*range(10)]) >= 6


def test_benefit_stays_with_the_class_that_is_much_worse() -> None:
    where = np.random.default_rng(0).standard_normal((40, 8))
    predictions = answers([[0.05, 0.95]] * 20 + [[0.99, 0.01]] * 20, embeddings=where)
    picks = choose(predictions, [0] * 40, config(budget=10))
    assert sum(int(name[1:]) < 20 for name in names(picks)) >= 9


def test_benefit_does_not_ask_again_about_what_is_answered() -> None:
    where = np.random.default_rng(0).standard_normal((20, 8))
    where[1] = where[0]
    told = Told(np.arange(20) == 0, np.full(20, np.nan))
    picks = choose(answers([[0.3, 0.7]] * 20, embeddings=where), [0] * 20, config(budget=18), told)
    assert "s01" not in names(picks)


# --- what holds for every strategy


@pytest.mark.parametrize("strategy", BY_NAME)
def test_the_order_follows_the_score(strategy: str) -> None:
    for share in (0.0, 0.3):
        picks = choose(many(60), [0, 1] * 30, config(strategy, 25, random_share=share))
        scores = [pick.score for pick in picks]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 15
        assert 0 <= min(scores) <= max(scores) <= 1
        assert len(set(names(picks))) == 25


@pytest.mark.parametrize("strategy", BY_NAME)
def test_the_same_seed_gives_the_same_batch_whatever_the_order_of_rows_and_candidates(strategy: str) -> None:
    predictions, labels = many(40), np.array([0, 1] * 20)
    order = np.random.default_rng(1).permutation(40)
    chosen = config(strategy, 15, random_share=0.4, seed=3)
    forth = select(predictions, labels, list(range(40)), CLASSES, chosen)
    assert forth == select(predictions, labels, list(range(39, -1, -1)), CLASSES, chosen)
    assert names(forth) == names(select(predictions[order], labels[order], list(range(40)), CLASSES, chosen))
    assert forth != select(
        predictions, labels, list(range(40)), CLASSES, config(strategy, 15, random_share=0.4, seed=4)
    )


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"badge"}))
def test_ties_break_by_sample_id_whatever_the_order_of_the_rows(strategy: str) -> None:
    predictions = answers([[0.1, 0.9]] * 5, names=["d", "b", "e", "a", "c"])
    picks = choose(predictions, [0] * 5, config(strategy, 3))
    assert names(picks) == sorted(names(picks))
    if strategy != "random":
        assert names(picks) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("benefit", "unsure: cat (90%) or dog (10%); no label yet"),
        *(
            (name, "unsure: cat (90%) or dog (10%); no label yet")
            for name in ("badge", "entropy", "margin", "misclassified")
        ),
        ("k-center", "unlike every picture that was asked about so far; no label yet: answers cat (90%)"),
        (
            "attention",
            "doubtful attention: the answer hangs on the picture's corners (5%); no label yet: answers cat (90%)",
        ),
        ("random", "picked at random, to learn how many maps are wrong"),
    ],
)
def test_an_unlabeled_picture_is_asked_about_for_a_reason_too(strategy: str, expected: str) -> None:
    predictions = answers([[0.9, 0.1], [0.2, 0.8]], corner_reliance=[0.05, 0.0], early_confidence=[0.1, 0.9])
    picks = choose(predictions, [-1, -1], config(strategy))
    assert next(pick for pick in picks if pick.sample == "s00").reason == expected


def test_answers_that_are_all_sure_do_not_stop_any_strategy() -> None:
    for strategy in STRATEGIES:
        assert len(choose(answers([[1.0, 0.0]] * 8), [0] * 8, config(strategy, 8))) == 8


# --- a pool that does not fit into memory


def stored(folder: Path, predictions: Predictions, size: int = 30) -> Shards:
    """On disk, and only what selection may read."""
    for start in range(0, len(predictions), size):
        rows = predictions[np.arange(start, min(start + size, len(predictions)))]
        np.savez(folder / f"{start:04d}.npz", **{field.name: getattr(rows, field.name) for field in fields(Answers)})
    return Shards(folder)


def test_shards_give_the_rows_that_are_asked_for_in_their_order(tmp_path: Path) -> None:
    table = many(100)
    shards = stored(tmp_path, table)
    assert len(shards) == 100 and shards.samples.tolist() == table.samples.tolist()
    for rows in (np.array([99, 0, 31, 30, 29]), np.arange(100)[::-1], np.array([], int)):
        for field in fields(Answers):
            np.testing.assert_array_equal(getattr(shards[rows], field.name), getattr(table[rows], field.name))


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_of_a_large_pool_only_a_part_is_in_memory_at_once(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a candidate is worth by itself, or at random, is decided as if all of it were."""
    table, labels = many(400), np.array([0, 1] * 200)
    told = Told(np.arange(400) < 40, np.where(np.arange(400) < 30, labels, np.nan))
    arguments = (labels, range(40, 400), CLASSES, config(strategy, 25, random_share=0.2), told)
    shards, whole = stored(tmp_path, table), select(table, *arguments)
    assert select(shards, *arguments) == whole
    read: list[int] = []
    rows_of = Shards.__getitem__

    def watched(self: Shards, rows: np.ndarray) -> Answers:
        read.append(len(rows))
        return rows_of(self, rows)

    monkeypatch.setattr(Shards, "__getitem__", watched)
    monkeypatch.setattr(selection, "LOOKED_AT", 50)
    picks = select(shards, *arguments)
    assert max(read) <= 50 + 5  # and the random share
    assert {pick.sample for pick in picks if pick.at_random} == {pick.sample for pick in whole if pick.at_random}
    assert len(set(names(picks))) == 25
    if strategy in ("misclassified", "margin", "entropy", "random"):
        assert names(picks) == names(whole)
    if strategy == "benefit":
        wrong = {
            name for name, p, label in zip(table.samples, table.probabilities, labels, strict=True) if p[label] < 0.5
        }
        assert {pick.sample for pick in picks if not pick.at_random} <= set(wrong)


def test_badge_compares_as_many_as_their_gradients_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    nearest = selection.kmeans_plusplus

    def watched(gradients: np.ndarray, *arguments: Any, **options: Any) -> Any:
        compared.append(len(gradients))
        return nearest(gradients, *arguments, **options)

    monkeypatch.setattr(selection, "kmeans_plusplus", watched)
    monkeypatch.setattr(selection, "GRADIENTS", 20 * 2 * 5)  # of 20 samples: two classes, embeddings of five
    picks = choose(many(60), [0, 1] * 30, config("badge", 4))
    assert compared == [20] and len(set(names(picks))) == 4
    predictions = many(60)
    p = predictions.probabilities
    length = np.linalg.norm(p - np.eye(2)[p.argmax(axis=1)], axis=1) * np.linalg.norm(predictions.embeddings, axis=1)
    assert set(names(picks)) <= set(predictions.samples[np.argsort(-length)[:20]])


# --- budgets


def test_a_budget_above_the_pool_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError) as refused:
        choose(many(12), [0] * 12, config(budget=13))
    assert str(refused.value) == "selection.budget is 13 but the pool holds 12 images; lower it in params.yaml"
    assert len(choose(many(12), [0] * 12, config(budget=12))) == 12


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_budget_of_minutes_ends_the_batch_earlier(share: float) -> None:
    predictions, labels = many(60), [0, 1] * 30
    whole = choose(predictions, labels, config(budget=40, random_share=share))
    spent = sum(pick.minutes for pick in whole)
    some = choose(predictions, labels, config(budget=40, random_share=share, budget_minutes=spent / 2))
    assert spent / 2 - 0.5 <= sum(pick.minutes for pick in some) <= spent / 2
    assert set(names(some)) < set(names(whole))
    with pytest.raises(ValueError, match=r"selection.budget_minutes is 0.001, but one picture is expected to take"):
        choose(predictions, labels, config(budget=40, budget_minutes=1e-3))


def test_of_a_few_minutes_the_best_that_fits_is_asked_about() -> None:
    predictions = answers([[0.9, 0.1]] * 40, corner_reliance=[0.0] * 20 + [1.0] * 20)
    told = told_by(["map_ok"] * 10 + [None] * 10 + ["map_fixed"] * 10 + [None] * 10, 2.0, 0.1)
    labels = [0] * 40
    fits = choose(predictions, labels, config("attention", 20, budget_minutes=1.0), told)
    assert names(fits) == ["s10"] and fits[0].minutes <= 1.0, "those of the corners take 2"


def test_random_picks_of_a_budget_of_minutes_hold_as_many_wrong_maps_as_the_pool() -> None:
    """A map that is thought wrong takes longer, and must not be left out for that."""
    predictions = answers([[0.9, 0.1]] * 100, corner_reliance=[0.0] * 80 + [1.0] * 20)
    told = told_by((["map_ok"] * 30 + [None] * 50) + (["map_fixed"] * 8 + [None] * 12), 0.5, 0.1)
    budget = config(budget=60, budget_minutes=3.0, random_share=0.1)
    drawn = [
        pick
        for seed in range(300)
        for pick in choose(predictions, [0] * 100, replace(budget, seed=seed), told)
        if pick.at_random
    ]
    wrong = np.mean([int(pick.sample[1:]) >= 80 for pick in drawn])
    assert abs(wrong - 12 / 62) < 3 * np.sqrt(0.16 / len(drawn)), "12 of the 62 that are left"
    assert sum(pick.minutes for pick in drawn) / 300 == pytest.approx(0.3, rel=0.1), "that is its share of the minutes"


def test_before_any_verdict_each_counts_as_one_to_paint() -> None:
    told = Told(np.zeros(60, bool), np.full(60, np.nan), minutes_to_paint=2.0, minutes_to_confirm=0.2)
    batch = choose(many(60), [0, 1] * 30, config(budget=40, budget_minutes=10.0), told)
    assert [pick.minutes for pick in batch] == [2.0] * 5


def test_a_map_that_is_likely_wrong_takes_the_minutes_of_painting() -> None:
    predictions = answers([[0.9, 0.1]] * 40, corner_reliance=[0.0] * 20 + [1.0] * 20)
    verdicts = np.full(40, np.nan)
    verdicts[:10], verdicts[20:30] = 0, 1
    told = Told(np.isfinite(verdicts), verdicts, minutes_to_paint=2.0, minutes_to_confirm=0.2)
    minutes = {pick.sample: pick.minutes for pick in choose(predictions, [0] * 40, config("attention", 20), told)}
    assert all(0.2 <= value <= 2 for value in minutes.values())
    assert min(minutes[f"s{i}"] for i in range(30, 40)) > max(minutes[f"s{i}"] for i in range(10, 20))


def test_a_few_verdicts_do_not_promise_that_the_rest_is_quick() -> None:
    predictions, longest = answers([[0.9, 0.1]] * 60), []
    for fine in (2, 50):
        verdicts = np.full(60, np.nan)
        verdicts[:fine] = 0
        told = Told(np.isfinite(verdicts), verdicts, minutes_to_paint=2.0, minutes_to_confirm=0.2)
        batch = choose(predictions, [0] * 60, config("attention", 10), told)
        longest.append(max(pick.minutes for pick in batch))
    assert longest[0] > 1.5 and longest[1] < 0.7


# --- the random share


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.5, 10), (1.0, 20)])
def test_the_random_share_is_honoured_and_kept_apart(share: float, expected: int) -> None:
    picks = choose(many(60), [0, 1] * 30, config(budget=20, random_share=share))
    assert sum(pick.at_random for pick in picks) == expected
    assert all(pick.reason.startswith("picked at random") == pick.at_random for pick in picks)
    assert len(set(names(picks))) == 20


def test_random_picks_reach_every_sample() -> None:
    picked = {name for seed in range(40) for name in names(choose(many(20), [0] * 20, config("random", 4, seed=seed)))}
    assert len(picked) == 20


# --- what people have said


def test_verdicts_and_minutes_are_read_from_the_corrections() -> None:
    rows = [
        correction("s00", "map_fixed", minutes="0.40"),
        correction("s01", "map_fixed", minutes="0.60"),
        correction("s02", "map_fixed", minutes="0.00"),  # the time got lost
        correction("s03", "map_ok", minutes="0.05"),
        correction("s04", "label_wrong", minutes="9.00"),
        correction("s05", "all_but_map", minutes="0.02"),
    ]
    told = read_told(answers([[0.5, 0.5]] * 7), {row["sample"]: row for row in rows})
    assert told.answered.tolist() == [True] * 6 + [False]
    np.testing.assert_array_equal(told.verdicts, [1, 1, 1, 0, np.nan, 1, np.nan])
    assert (told.minutes_to_paint, told.minutes_to_confirm) == (pytest.approx(0.5), pytest.approx(0.05))
    untold = read_told(answers([[0.5, 0.5]]), {})
    assert (untold.minutes_to_paint, untold.minutes_to_confirm) == (0.5, 0.1)


def test_the_stage_asks_for_train_and_pool_that_nobody_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "pool", "f": "pool", "g": "train"}
    labels = {"a": "cat", "b": "dog", "c": "cat", "d": "dog", "e": "", "f": "", "g": "cat"}
    rows = [
        {"id": name, "image": f"{name}.png", "label": labels[name], "split": split, "group": ""}
        for name, split in splits.items()
    ]
    (tmp_path / "data").mkdir()
    write_csv(tmp_path / "data/manifest.csv", MANIFEST_COLUMNS, rows)
    write_csv(tmp_path / "data/corrections.csv", CORRECTION_COLUMNS, [correction("b", "map_ok")])
    write_shard(tmp_path / "results/predictions/0000.npz", answers([[0.3, 0.7]] * 7, names=list(splits)))
    params = (PROJECT / "params.yaml").read_text().replace("budget: 30", "budget: 4")
    (tmp_path / "params.yaml").write_text(params.replace("random_share: 0.1", "random_share: 0.25"))
    monkeypatch.chdir(tmp_path)
    main()
    with (tmp_path / "results/batch.csv").open(newline="") as file:
        batch = list(csv.DictReader(file))
    assert list(batch[0]) == ["sample", "score", "reason", "minutes", "at_random", "shown"]
    assert all(row["shown"] and not row["shown"].startswith("picked at random") for row in batch)
    with (tmp_path / "results/gold.csv").open(newline="") as file:
        assert [(row["sample"], row["split"]) for row in csv.DictReader(file)] == [("c", "val"), ("d", "test")]
    assert {row["sample"] for row in batch} == {"a", "e", "f", "g"}
    assert json.loads(batch[0]["score"]) >= json.loads(batch[-1]["score"])
    assert sorted(row["at_random"] for row in batch) == ["", "", "", "yes"]
    assert set(read_corrections(tmp_path)) == {"b"}


# --- gold questions


def ask_for_gold(has_mask: list[bool], probabilities: list[list[float]] | None = None) -> list[GoldQuestion]:
    """Ten samples of val, ten of test, of two classes in turn."""
    predictions = answers(probabilities or [[0.9, 0.1]] * 20)
    splits, labels = np.repeat(["val", "test"], 10), np.tile([0, 1], 10)
    told = told_by([None] * 20)
    return gold_questions(predictions, labels, splits, np.array(has_mask), CLASSES, config(budget=4), told)


def test_gold_questions_do_not_depend_on_what_the_model_answers() -> None:
    asked = ask_for_gold([False] * 20)
    assert [one.split for one in asked] == ["val"] * 4 + ["test"] * 4
    assert len({one.sample for one in asked}) == 8
    other = ask_for_gold([False] * 20, np.random.default_rng(1).dirichlet([1, 1], 20).tolist())
    assert [one.sample for one in asked] == [one.sample for one in other]
    assert all(reason_shown(one.shown) != one.shown for one in asked)


def test_where_every_sample_has_a_mask_there_is_no_gold_question() -> None:
    assert ask_for_gold([True] * 20) == []
    assert {one.split for one in ask_for_gold([True] * 10 + [False] * 10)} == {"test"}
