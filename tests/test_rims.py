"""How much too wide people paint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from abn.rims import rim_width, without_rim


def discs(count: int = 12, side: int = 40) -> tuple[Tensor, Tensor]:
    """Bright discs on a grey and noisy ground, and their masks; the first two lie at the edge of the picture."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    top, left = torch.randint(12, side - 12, (2, count), generator=generator)
    top[:2] = 0
    radius = torch.randint(6, 9, (count,), generator=generator)
    masks = (rows - top.view(-1, 1, 1)) ** 2 + (columns - left.view(-1, 1, 1)) ** 2 <= radius.view(-1, 1, 1) ** 2
    masks = masks.float()[:, None]
    noise = 0.1 * torch.rand(count, 3, side, side, generator=generator)
    return 0.3 + 0.4 * masks + noise, masks


def grown(masks: Tensor, width: int) -> Tensor:
    return F.max_pool2d(masks, 2 * width + 1, stride=1, padding=width)


@pytest.mark.parametrize("width", [2, 3, 6])
def test_masks_are_too_wide_by_what_was_painted_over_the_edge(width: int) -> None:
    images, masks = discs()
    assert rim_width(images, masks) == 0
    assert width - 1 <= rim_width(images, grown(masks, width)) <= width


def test_one_in_a_hurry_does_not_speak_for_all() -> None:
    images, masks = discs()
    masks[:3] = grown(masks[:3], 4)
    assert rim_width(images, masks) == 0


def test_pictures_that_are_marked_nearly_whole_have_no_say_and_no_rim() -> None:
    """Where a class has no object all is marked but what misleads, exactly, and that has a clear edge."""
    images, masks = discs()
    images[:5, :, :6, :6], masks[:5] = 1, 1
    masks[:5, :, :6, :6] = 0
    wide = torch.cat([masks[:5], grown(masks[5:], 4)])
    assert 3 <= rim_width(images, wide) <= 4
    assert torch.equal(without_rim(wide, 4)[:5], masks[:5])


def test_without_a_rim_or_a_contour_nothing_is_too_wide() -> None:
    images, masks = discs()
    assert rim_width(images, torch.ones_like(masks)) == rim_width(images, torch.zeros_like(masks)) == 0
    assert rim_width(images[:0], masks[:0]) == 0
    assert rim_width(torch.full_like(images, 0.5), grown(masks, 3)) == 0


def test_a_box_around_an_object_is_hardly_too_wide() -> None:
    images, masks = discs()
    boxes = masks.amax(dim=3, keepdim=True) * masks.amax(dim=2, keepdim=True)
    assert rim_width(images, boxes) <= 1


def test_a_rim_is_taken_off_but_a_quarter_is_left_of_each_mask() -> None:
    masks = torch.zeros(4, 1, 12, 12)
    masks[0, :, 2:11, 2:11] = 1
    masks[1, :, 6] = 1
    masks[2, :, :8] = 1  # at the edge of the picture, which is a rim too
    masks[3, :, 2:7, 2:7] = 1
    narrow = without_rim(masks, 2)
    assert narrow[0].sum() == 25 and narrow[0, 0, 4:9, 4:9].all()
    assert torch.equal(narrow[1], masks[1])
    assert narrow[2].sum() == 4 * 8
    assert narrow[3].sum() == 9, "one would be left of 25"
    assert torch.equal(without_rim(masks, 0), masks)


def test_what_one_of_several_people_painted_does_not_hide_that_nothing_is_left() -> None:
    """Merged masks are grey where people disagree."""
    masks = torch.zeros(1, 1, 40, 40)
    masks[0, :, 5:35, 5:35] = 1 / 3
    masks[0, :, 16:23, 16:23] = 1
    assert (without_rim(masks, 4) > 0.5).sum() == 25
