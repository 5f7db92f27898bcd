from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from abn.losses import (
    MAP_LOSSES,
    bce_map_loss,
    energy_map_loss,
    input_gradients,
    l1_map_loss,
    rrr_loss,
    suppress_map_loss,
)

MAPS = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
MASKS = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
ATTENTION = [name for name in MAP_LOSSES if name != "rrr"]


def test_l1_of_a_worked_example() -> None:
    assert l1_map_loss(MAPS, MASKS).item() == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)


def test_cross_entropy_of_a_worked_example() -> None:
    assert bce_map_loss(MAPS, MASKS).item() == pytest.approx((math.log(2) + math.log(2)) / 4, abs=1e-5)


def test_energy_is_the_share_of_the_map_outside() -> None:
    assert energy_map_loss(MAPS, MASKS).item() == pytest.approx(0.5 / 2, abs=1e-5)
    assert energy_map_loss(MAPS / 10, MASKS).item() == pytest.approx(0.5 / 2, abs=1e-4)


def test_suppression_is_the_mean_outside_and_leaves_the_inside_free() -> None:
    assert suppress_map_loss(MAPS, MASKS).item() == pytest.approx((0.5 + 0.0) / 2, abs=1e-5)
    inside_changed = MAPS * (1 - MASKS)
    assert torch.equal(suppress_map_loss(MAPS, MASKS), suppress_map_loss(inside_changed, MASKS))


@pytest.mark.parametrize("name", ATTENTION)
def test_a_map_that_equals_the_mask_costs_next_to_nothing_and_its_opposite_much(name: str) -> None:
    loss = MAP_LOSSES[name]
    assert loss(MASKS, MASKS).item() == pytest.approx(0, abs=1e-5)
    assert loss(1 - MASKS, MASKS).item() > 0.9


@pytest.mark.parametrize("name", list(MAP_LOSSES))
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_masks_of_the_whole_picture_and_of_nothing_give_finite_losses_and_gradients(name: str, level: float) -> None:
    for mask in (torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3)):
        maps = torch.full((2, 1, 3, 3), level, requires_grad=True)
        losses = MAP_LOSSES[name](maps, mask)
        assert losses.shape == (2,)
        losses.sum().backward()
        assert maps.grad is not None
        assert torch.isfinite(losses).all() and torch.isfinite(maps.grad).all()


def test_input_gradients_of_a_linear_network() -> None:
    """log p_k = z_k - log sum exp z with z = W x: the gradient of the sum over k is sum_k W_k - K sum_k p_k W_k."""
    linear = nn.Linear(3 * 2 * 2, 4)
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = linear(images.flatten(1))
    weights, answers = linear.weight, logits.softmax(dim=1)
    gradients = (weights.sum(dim=0) - 4 * answers @ weights).view(2, 3, 2, 2)
    found = input_gradients(logits, images)
    torch.testing.assert_close(found, gradients.square().sum(dim=1, keepdim=True))
    found.sum().backward()
    assert weights.grad is not None and weights.grad.abs().max() > 0


def test_gradients_inside_the_mask_are_free() -> None:
    gradients = torch.tensor([[[[2.0, 3.0], [4.0, 5.0]]]])
    assert rrr_loss(gradients, MASKS).item() == pytest.approx(3 + 5)
