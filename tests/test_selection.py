from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from abn.manifest import CORRECTION_COLUMNS, MANIFEST_COLUMNS, read_corrections
from abn.predictions import Predictions, write_shard
from abn.selection import Pick, SelectionConfig, main, select
from tiny import PROJECT, correction, write_csv

CLASSES = ["cat", "dog"]


def answers(
    probabilities: list[list[float]],
    attention: list[list[float]] | None = None,
    equivariance: list[float] | None = None,
    names: list[str] | None = None,
) -> Predictions:
    count = len(probabilities)
    given = np.array(probabilities, dtype=np.float32)
    return Predictions(
        samples=np.array(names or [f"s{i:02d}" for i in range(count)]),
        probabilities=given,
        attention_probabilities=given if attention is None else np.array(attention, dtype=np.float32),
        maps=np.zeros((count, 2, 2), np.float32),
        embeddings=np.zeros((count, 3), np.float32),
        equivariance=np.zeros(count, np.float32) if equivariance is None else np.array(equivariance, np.float32),
        has_gold=np.zeros(count, bool),
        gold_maps=np.zeros((count, 2, 2), np.float32),
        replaced_probabilities=np.full((count, 2), np.nan, np.float32),
    )


def choose(
    predictions: Predictions, labels: list[int], budget: int, random_share: float = 0.0, seed: int = 0
) -> list[Pick]:
    config = SelectionConfig(budget, random_share, seed)
    return select(predictions, np.array(labels), range(len(labels)), CLASSES, config)


def many(count: int) -> Predictions:
    rng = np.random.default_rng(0)
    probabilities, attention = rng.dirichlet([1, 1], count), rng.dirichlet([1, 1], count)
    return answers(probabilities.tolist(), attention.tolist(), rng.random(count).tolist())


def test_a_surely_wrong_answer_comes_first_and_its_reason_says_so() -> None:
    predictions = answers([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]])
    picks = choose(predictions, [1, 0, 0, 1], budget=2)
    assert [(pick.sample, pick.score) for pick in picks] == [("s01", pytest.approx(0.9)), ("s02", pytest.approx(0.8))]
    assert picks[0].reason == "misclassified: answers dog (80%), labeled cat"
    assert picks[0].minutes == 0.5


def test_among_right_answers_the_doubtful_map_comes_first() -> None:
    right = [[0.9, 0.1]] * 3
    branches_apart = answers(right, attention=[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    first = choose(branches_apart, [0, 0, 0], budget=1)[0]
    assert first.sample == "s01"
    assert first.reason.startswith("doubtful attention: the two branches of the network answer differently")
    does_not_mirror = answers(right, equivariance=[0.1, 0.0, 0.4])
    first = choose(does_not_mirror, [0, 0, 0], budget=1)[0]
    assert first.sample == "s02"
    assert first.reason == "doubtful attention: the map does not follow the picture when it is mirrored"


def test_the_order_follows_the_score() -> None:
    predictions = many(60)
    for share in (0.0, 0.3):
        scores = [pick.score for pick in choose(predictions, [0, 1] * 30, budget=25, random_share=share)]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) > 20
        assert 0 <= min(scores) <= max(scores) <= 1


def test_one_class_alone_gives_its_highest_scores() -> None:
    predictions = answers([[0.5 + i / 100, 0.5 - i / 100] for i in range(1, 41)])
    picks = choose(predictions, [1] * 40, budget=10)
    assert [pick.sample for pick in picks] == [f"s{i:02d}" for i in range(39, 29, -1)]


def test_ties_break_by_sample_id_whatever_the_order_of_the_rows() -> None:
    names = ["d", "b", "e", "a", "c"]
    picks = choose(answers([[0.1, 0.9]] * 5, names=names), [0] * 5, budget=3)
    assert [pick.sample for pick in picks] == ["a", "b", "c"]


def test_the_order_of_the_candidates_does_not_matter() -> None:
    predictions, labels = many(40), np.array([0, 1] * 20)
    config = SelectionConfig(15, 0.4, 3)
    forth = select(predictions, labels, list(range(40)), CLASSES, config)
    assert forth == select(predictions, labels, list(range(39, -1, -1)), CLASSES, config)


def test_the_same_seed_gives_the_same_batch_and_another_seed_another() -> None:
    predictions, labels = many(60), [0, 1] * 30
    assert choose(predictions, labels, 20, 0.5, seed=1) == choose(predictions, labels, 20, 0.5, seed=1)
    assert choose(predictions, labels, 20, 0.5, seed=1) != choose(predictions, labels, 20, 0.5, seed=2)


def test_a_budget_above_the_pool_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError) as refused:
        choose(many(12), [0] * 12, budget=13)
    assert str(refused.value) == "selection.budget is 13 but the pool holds 12 images; lower it in params.yaml"
    assert len(choose(many(12), [0] * 12, budget=12)) == 12


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.1, 2), (0.5, 10), (1.0, 20)])
def test_the_random_share_is_honoured_and_says_so(share: float, expected: int) -> None:
    picks = choose(many(60), [0, 1] * 30, budget=20, random_share=share)
    assert sum(pick.reason.startswith("picked at random") for pick in picks) == expected
    assert len({pick.sample for pick in picks}) == 20


def test_random_picks_reach_every_sample() -> None:
    predictions = many(20)
    picked = {pick.sample for seed in range(40) for pick in choose(predictions, [0] * 20, 4, 1.0, seed)}
    assert picked == set(predictions.samples.tolist())


def test_classes_take_turns() -> None:
    """Dogs are all more surely wrong than cats, and yet half of the batch are cats."""
    probabilities = [[0.05, 0.95]] * 20 + [[0.6, 0.4]] * 20
    picks = choose(answers(probabilities), [0] * 20 + [1] * 20, budget=10)
    assert sum(int(pick.sample[1:]) >= 20 for pick in picks) == 5


def test_a_class_that_runs_out_leaves_its_turns_to_the_others() -> None:
    probabilities = [[0.05, 0.95]] * 2 + [[0.6, 0.4]] * 20
    picks = choose(answers(probabilities), [0] * 2 + [1] * 20, budget=10)
    assert sum(int(pick.sample[1:]) >= 2 for pick in picks) == 8


def test_what_has_no_label_yet_is_asked_for_in_its_own_words() -> None:
    picks = choose(answers([[0.9, 0.1], [0.2, 0.8]]), [-1, -1], budget=2)
    assert {pick.reason for pick in picks} == {
        "no label yet: answers cat (90%)",
        "no label yet: answers dog (80%)",
    }


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
    (tmp_path / "params.yaml").write_text(params)
    monkeypatch.chdir(tmp_path)
    main()
    with (tmp_path / "results/batch.csv").open(newline="") as file:
        batch = list(csv.DictReader(file))
    assert list(batch[0]) == ["sample", "score", "reason", "minutes"]
    assert {row["sample"] for row in batch} == {"a", "e", "f", "g"}
    assert json.loads(batch[0]["score"]) >= json.loads(batch[-1]["score"])
    assert set(read_corrections(tmp_path)) == {"b"}
