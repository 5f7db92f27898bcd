from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import jaccard_score

from abn.attention import context_reliance, disagreement, energy_inside, equivariance_loss, iou

MAP = np.array([[[0.0, 0.2], [0.2, 0.6]]])
RIGHT_COLUMN = np.array([[[0.0, 1.0], [0.0, 1.0]]])


def test_energy_inside_is_the_share_of_the_sum() -> None:
    assert energy_inside(MAP, RIGHT_COLUMN) == pytest.approx([0.8])
    assert energy_inside(MAP, 1 - RIGHT_COLUMN) == pytest.approx([0.2])


def test_a_soft_mask_counts_by_its_grey_levels() -> None:
    assert energy_inside(MAP, RIGHT_COLUMN / 2) == pytest.approx([0.4])


def test_an_empty_map_has_no_energy_anywhere() -> None:
    assert energy_inside(np.zeros((1, 2, 2)), RIGHT_COLUMN).tolist() == [0.0]


def test_an_even_map_has_as_much_inside_as_the_mask_covers() -> None:
    assert energy_inside(np.full((1, 2, 2), 0.3), RIGHT_COLUMN) == pytest.approx([0.5])


def test_iou_counts_cells_above_a_half() -> None:
    assert iou(MAP, RIGHT_COLUMN) == pytest.approx([1 / 2])
    assert iou(RIGHT_COLUMN, RIGHT_COLUMN).tolist() == [1.0]
    assert iou(RIGHT_COLUMN, 1 - RIGHT_COLUMN).tolist() == [0.0]


def test_iou_of_two_empty_maps_is_one_and_of_one_empty_map_zero() -> None:
    nothing = np.zeros((1, 2, 2))
    assert iou(nothing, nothing).tolist() == [1.0]
    assert iou(nothing, RIGHT_COLUMN).tolist() == [0.0]


def test_iou_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    maps, masks = rng.random((20, 7, 5)), rng.random((20, 7, 5))
    expected = [jaccard_score(m.ravel() > 0.5, n.ravel() > 0.5) for m, n in zip(maps, masks, strict=True)]
    assert iou(maps, masks) == pytest.approx(expected)


def test_disagreement_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet(np.full(5, 0.3), 50), rng.dirichlet(np.full(5, 0.3), 50)
    first[0], second[0] = np.eye(5)[0], np.eye(5)[1]
    first[1], second[1] = np.eye(5)[0], np.eye(5)[0]
    expected = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(first, second, strict=True)]
    assert disagreement(first, second) == pytest.approx(expected, abs=1e-12)


def test_disagreement_is_one_bit_at_most_and_the_same_both_ways() -> None:
    sure, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert disagreement(sure, other) == pytest.approx([1.0])
    assert disagreement(sure, sure).tolist() == [0.0]
    even = np.array([[0.5, 0.5]])
    assert disagreement(sure, even) == pytest.approx(disagreement(even, sure))
    # H(3/4, 1/4) - (H(1, 0) + H(1/2, 1/2)) / 2 = 0.8113 - 0.5 bits
    assert disagreement(sure, even) == pytest.approx([0.311278], abs=1e-6)


def test_context_reliance_is_the_probability_that_moved() -> None:
    before, after = np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.2, 0.7]])
    assert context_reliance(before, after) == pytest.approx([0.6])
    assert context_reliance(before, before).tolist() == [0.0]


def test_equivariance_loss_is_zero_where_the_map_mirrors_with_its_picture() -> None:
    assert equivariance_loss(MAP, MAP[:, :, ::-1]).tolist() == [0.0]
    # a map that stays where it is: |0.2 - 0|, |0 - 0.2|, |0.6 - 0.2|, |0.2 - 0.6|
    assert equivariance_loss(MAP, MAP) == pytest.approx([0.3])
