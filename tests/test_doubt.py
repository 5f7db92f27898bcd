from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from abn.doubt import WORTH, Doubt, early_rank
from abn.predictions import Predictions


def pool(count: int = 200, seed: int = 0) -> tuple[Predictions, np.ndarray]:
    """Ten clusters by embedding, the maps of two of which are wrong; the signals of those are louder, with noise."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(count) % 10
    wrong = cluster < 2
    table = Predictions(
        samples=np.array([f"s{i:03d}" for i in range(count)]),
        probabilities=np.full((count, 2), 0.5),
        attention_probabilities=np.full((count, 2), 0.5),
        maps=np.zeros((count, 2, 2)),
        embeddings=np.eye(10)[cluster] + rng.normal(0, 0.1, (count, 10)),
        corner_reliance=np.clip(0.3 * wrong + rng.random(count) * 0.7, 0, 1),
        early_confidence=np.clip(0.3 * wrong + rng.random(count) * 0.7, 0, 1),
        has_gold=np.zeros(count, bool),
        gold_maps=np.zeros((count, 2, 2)),
        replaced_probabilities=np.full((count, 2), np.nan),
    )
    return table, wrong


NOTHING = np.full(200, np.nan)


def suspicion(table: Predictions) -> np.ndarray:
    return Doubt(table).suspicion(table)


def unreasonable(table: Predictions, verdicts: np.ndarray) -> np.ndarray:
    asked = np.flatnonzero(np.isfinite(verdicts))
    doubt = Doubt(table, table[asked], verdicts[asked])
    return doubt.unreasonable(table, doubt.suspicion(table))


def test_directions_know_no_scale_and_no_place() -> None:
    table, _ = pool(9)
    elsewhere = replace(table, embeddings=3 * table.embeddings + 7)
    assert np.linalg.norm(Doubt(table).directions(table), axis=1) == pytest.approx(np.ones(9))
    np.testing.assert_allclose(Doubt(elsewhere).directions(elsewhere), Doubt(table).directions(table), atol=1e-6)


def test_early_rank_of_a_worked_example() -> None:
    confidence, unknown, alike = np.array([0.2, 0.9, np.nan, 0.5]), np.full(3, np.nan), np.array([0.4, 0.4])
    assert early_rank(confidence, confidence).tolist() == [0.0, 1.0, 0.5, 0.5]
    assert early_rank(unknown, unknown).tolist() == [0.5] * 3
    assert early_rank(alike, alike).tolist() == [0.5, 0.5]
    assert early_rank(np.array([0.1, 0.6, 1.0]), confidence).tolist() == [0.0, 0.75, 1.0]


def test_suspicion_of_a_worked_example() -> None:
    """Two groups of 20, none the other's neighbour."""
    table, _ = pool(40)
    group = np.arange(40) < 20
    table = replace(
        table,
        embeddings=np.where(group[:, None], [1.0, 0.0], [0.0, 1.0]),
        corner_reliance=np.where(group, 0.0, 0.6),
        early_confidence=np.where(group, 0.1, 0.2),
    )
    early = [9.5 / 39, 29.5 / 39]  # each group's mean rank
    above = [0.3 / (1.4826 * 0.3 + 0.02), (early[1] - early[0]) / 2 / (1.4826 * (early[1] - early[0]) / 2 + 0.02)]
    stands_out = above[0] ** 2 + above[1] ** 2
    expected = 1 - (1 - stands_out / (stands_out + 9)) * (1 - 0.36)
    assert suspicion(table) == pytest.approx(np.where(group, 0.0, expected))


def test_a_shortcut_of_the_whole_pool_stands_out_nowhere_and_speaks_for_itself() -> None:
    table, _ = pool()
    table = replace(table, corner_reliance=np.full(200, 0.9), early_confidence=NOTHING)
    assert suspicion(table) == pytest.approx(np.full(200, 0.81))


def test_doubt_that_a_part_of_the_pool_has_taught_finds_the_same_maps() -> None:
    table, wrong = pool(2000)
    part = np.random.default_rng(0).permutation(2000)[:500]
    assert roc_auc_score(wrong, Doubt(table[part]).suspicion(table)) > 0.95


def test_neighbours_make_a_noisy_signal_sure() -> None:
    table, wrong = pool()
    alone = roc_auc_score(wrong, table.corner_reliance)
    assert alone < 0.9 < roc_auc_score(wrong, suspicion(table))


def test_without_a_verdict_the_probability_is_the_suspicion() -> None:
    table, _ = pool()
    assert np.array_equal(unreasonable(table, NOTHING), suspicion(table))


def test_verdicts_make_a_probability_of_it() -> None:
    """Even where the signals know nothing; the more verdicts, the surer."""
    table, wrong = pool()
    table = replace(table, corner_reliance=np.zeros(200), early_confidence=NOTHING)
    errors = []
    for asked in (30, 100):
        verdicts = NOTHING.copy()
        verdicts[:asked] = wrong[:asked]
        found = unreasonable(table, verdicts)[100:]
        assert found.min() >= 0 and found.max() <= 1
        assert roc_auc_score(wrong[100:], found) > 0.97
        errors.append(np.square(found - wrong[100:]).mean())
    assert errors[1] < errors[0] < 0.2 * 0.8  # that is what the share of wrong maps, said of everyone, would give


def test_verdicts_that_all_say_the_same_mislead_no_further_than_they_weigh() -> None:
    table, wrong = pool()
    verdicts = NOTHING.copy()
    verdicts[np.flatnonzero(wrong)[: int(WORTH)]] = 1
    found = unreasonable(table, verdicts)
    rest = np.isnan(verdicts)
    assert roc_auc_score(wrong[rest], found[rest]) > 0.9
    assert found[rest & ~wrong].mean() < found[rest & wrong].mean() - 0.2


def test_one_contrary_verdict_does_not_turn_the_order_over() -> None:
    table, _ = pool()
    verdicts = NOTHING.copy()
    verdicts[suspicion(table).argmax()] = 0
    assert spearmanr(suspicion(table), unreasonable(table, verdicts)).statistic > 0.5
