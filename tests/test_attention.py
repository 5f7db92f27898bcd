from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import jaccard_score

from abn.attention import (
    atypicality,
    context_reliance,
    deletion_and_insertion,
    disagreement,
    energy_inside,
    entropy,
    equivariance_loss,
    gini,
    iou,
    pointing_game,
)

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


def test_equivariance_loss_undoes_the_shift_and_leaves_out_what_moved_away() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((3, 5, 4))
    moved = rng.random((3, 5, 4))  # anything where the edge moved in
    moved[:, 1:, 1:] = maps[:, :-1, ::-1][:, :, :-1]
    assert equivariance_loss(maps, moved, shift=1).tolist() == [0.0] * 3
    moved[0, 4, 3] += 0.3
    assert equivariance_loss(maps, moved, shift=1) == pytest.approx([0.3 / 12, 0, 0])


def test_pointing_game_asks_where_the_hottest_cell_is() -> None:
    assert pointing_game(MAP, RIGHT_COLUMN).tolist() == [1.0]
    assert pointing_game(MAP, 1 - RIGHT_COLUMN).tolist() == [0.0]
    assert pointing_game(np.full((1, 2, 2), 0.3), RIGHT_COLUMN).tolist() == [0.5]


def test_entropy_agrees_with_scipy_and_ends_at_zero_and_one() -> None:
    maps = np.random.default_rng(0).random((9, 3, 4))
    expected = [scipy_entropy(one.ravel()) / np.log(12) for one in maps]
    assert entropy(maps) == pytest.approx(expected)
    one_cell = np.zeros((1, 3, 4))
    one_cell[0, 1, 1] = 0.5
    assert entropy(one_cell) == pytest.approx([0.0], abs=1e-9)
    assert entropy(np.full((1, 3, 4), 0.2)) == pytest.approx([1.0])
    assert entropy(np.zeros((1, 3, 4))) == pytest.approx([1.0])


def test_gini_is_the_mean_difference_of_two_cells() -> None:
    """Gini's own definition: mean |a - b| over all pairs of cells, over twice the mean."""
    maps = np.random.default_rng(0).random((9, 3, 4))
    cells = maps.reshape(9, -1)
    expected = np.abs(cells[:, :, None] - cells[:, None, :]).mean(axis=(1, 2)) / (2 * cells.mean(axis=1))
    assert gini(maps) == pytest.approx(expected)
    assert gini(np.full((1, 2, 2), 0.4)) == pytest.approx([0.0])
    assert gini(np.array([[[1.0, 0.0], [0.0, 0.0]]])) == pytest.approx([0.75])
    assert gini(np.zeros((1, 2, 2))).tolist() == [0.0]


def test_atypicality_is_measured_within_the_group() -> None:
    """Distances to the group's mean map: 1, 1, 1, 3; their root mean square is sqrt(3). The other group is one."""
    maps = np.zeros((5, 1, 4))
    maps[:4, 0, 0] = [-1.0, -1.0, -1.0, 3.0]
    maps[4] = 0.9
    found = atypicality(maps, np.array([0, 0, 0, 0, 1]))
    assert found == pytest.approx([1 / 3**0.5] * 3 + [3**0.5, 0.0])


def test_deletion_and_insertion_of_a_worked_example() -> None:
    """The answer is the brightness of the left pixel: gone with the first of two pixels deleted where the map is
    hottest there, with the last where it is hottest at the right."""

    def answer(images: np.ndarray) -> np.ndarray:
        left = images[:, 0, 0, 0]
        return np.stack([left, 0.25 * (1 - left)], axis=1)

    images = np.ones((2, 3, 1, 2))
    maps = np.array([[[0.9, 0.1]], [[0.1, 0.9]]])
    curves = deletion_and_insertion(answer, images, maps, np.zeros_like(images), steps=2)
    # at 0, 1/2, 1 of the pixels: deleted 1 0 0 and 1 1 0, inserted 0 1 1 and 0 0 1
    assert curves.deletion == pytest.approx([0.25, 0.75])
    assert curves.insertion == pytest.approx([0.75, 0.25])


def test_deletion_takes_pixels_of_equal_heat_in_reading_order() -> None:
    seen = []

    def answer(images: np.ndarray) -> np.ndarray:
        seen.append(images[0, 0, 0].tolist())
        return np.ones((len(images), 1))

    deletion_and_insertion(answer, np.ones((1, 3, 1, 4)), np.full((1, 1, 4), 0.5), np.zeros((1, 3, 1, 4)), steps=4)
    assert [0, 1, 1, 1] in seen and [0, 0, 1, 1] in seen


def test_equivariance_loss_is_zero_where_the_map_mirrors_with_its_picture() -> None:
    assert equivariance_loss(MAP, MAP[:, :, ::-1]).tolist() == [0.0]
    # a map that stays where it is: |0.2 - 0|, |0 - 0.2|, |0.6 - 0.2|, |0.2 - 0.6|
    assert equivariance_loss(MAP, MAP) == pytest.approx([0.3])
