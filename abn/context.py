"""The same object in another context, so that nothing outside the mask can carry the decision.

A corrected map alone moves the explanation and not the decision; a picture whose surroundings tell nothing about
its class leaves the network only what the person marked. Related: CAIPI's counterexamples (Teso and Kersting, 2019).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

SMALL = 0.1  # share of a picture; what is smaller is shown with what lies around it


def replace_context(
    images: Float[Tensor, "b 3 h w"],
    masks: Float[Tensor, "b 1 h w"],
    contexts: Float[Tensor, "b 3 h w"],
) -> Float[Tensor, "b 3 h w"]:
    """mask * image + (1 - mask) * context: what was marked stays, soft rims blend."""
    return masks * images + (1 - masks) * contexts


def without_objects(images: Float[Tensor, "b 3 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Each picture with the mean colour of its surroundings in the place of what is marked.

    As a context it then brings what surrounds objects and no second object that speaks for another class. A picture
    that is marked (nearly) whole has no surroundings and stays as it is.
    """
    outside = 1 - masks
    share = outside.mean(dim=(1, 2, 3), keepdim=True)
    surroundings = (images * outside).mean(dim=(2, 3), keepdim=True) / share.clamp(min=1e-6)
    return torch.where(share < 0.05, images, replace_context(images, outside, surroundings.expand_as(images)))


def other_pictures(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """For each picture another one of the batch: a permutation without a fixed point (unless the batch is one)."""
    count = len(images)
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return images[partner.to(images.device)]


def in_another_context(
    images: Float[Tensor, "b 3 h w"], masks: Float[Tensor, "b 1 h w"], generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Each picture with what surrounds the object of another one of the batch around its own."""
    return replace_context(images, masks, other_pictures(without_objects(images, masks), generator))


def with_holes(masks: Float[Tensor, "b 1 h w"], rate: float, generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Masks that, with probability `rate`, lack a rectangle of up to 0.4 of the height and 0.6 of the width.

    A mark that lies on the object leaves a hole in its mask, at a place that tells the class; holes anywhere in
    any mask make holes tell less. A hole that would leave less than half of what is marked is not made. Related:
    random erasing (Zhong et al., AAAI 2020).
    """
    count, _, height, width = masks.shape
    random = torch.rand(5, count, generator=generator)
    tall, wide = (0.1 + 0.3 * random[0]) * height, (0.1 + 0.5 * random[1]) * width
    top, left = random[2] * (height + tall) - tall, random[3] * (width + wide) - wide
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    holes = inside_rows[:, None, :, None] & inside_columns[:, None, None, :] & (random[4] < rate).view(-1, 1, 1, 1)
    return _less(masks, holes.to(masks.device))


def with_holes_of_others(
    masks: Float[Tensor, "b 1 h w"], shapes: Float[Tensor, "b 1 h w"], rate: float, generator: torch.Generator
) -> Float[Tensor, "b 1 h w"]:
    """Masks that, with probability `rate`, lack what `shapes` covers in another picture of the batch, as `with_holes`.

    Where the shapes are those of marks, what a mark hides of an object is hidden in other classes, too.
    """
    chosen = (torch.rand(len(masks), generator=generator) < rate).view(-1, 1, 1, 1).to(masks.device)
    return _less(masks, (other_pictures(shapes, generator) > 0.5) & chosen)


def _less(masks: Float[Tensor, "b 1 h w"], holes: Bool[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Masks without the holes; whole where less than half of what is marked would be left."""
    cut = masks * ~holes
    fits = cut.sum(dim=(1, 2, 3)) >= masks.sum(dim=(1, 2, 3)) / 2
    return torch.where(fits.view(-1, 1, 1, 1), cut, masks)


def is_small(masks: Shaped[Tensor, "b 1 h w"]) -> Bool[Tensor, "b 1 1 1"]:
    """Whether less than `SMALL` of the picture is marked."""
    return masks.float().mean(dim=(1, 2, 3), keepdim=True) < SMALL


def with_surroundings(masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Small masks, 0 or 1 per pixel, grown a pixel at a time until they are no longer small, at most by a quarter of
    the longer side; others, and empty ones, as they are.

    A spot on a leaf is known by what lies around it: cut out alone it is like nothing that is ever seen.
    """
    wide, left = masks > 0.5, masks.any(dim=(1, 2, 3))
    for _ in range(max(masks.shape[-2:]) // 4):
        left = left & is_small(wide).view(-1)
        if not left.any():
            break
        wide[left] = grown(wide[left])
    return wide.to(masks.dtype)


def grown(marked: Bool[Tensor, "b 1 h w"], by: int = 1) -> Bool[Tensor, "b 1 h w"]:
    """By so many pixels to all eight sides."""
    for _ in range(by):
        tall = marked.clone()
        tall[..., 1:, :] |= marked[..., :-1, :]
        tall[..., :-1, :] |= marked[..., 1:, :]
        marked = tall.clone()
        marked[..., 1:] |= tall[..., :-1]
        marked[..., :-1] |= tall[..., 1:]
    return marked


def with_soft_rim(marked: Float[Tensor, "b 1 h w"], keep: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """`keep`, what is to be shown, fading out over a sixteenth of the longer side; what is `marked` stays whole."""
    reach = max(keep.shape[-2:]) // 32
    soft = F.pad(keep, (reach,) * 4, mode="replicate")
    for window in ((2 * reach + 1, 1), (1, 2 * reach + 1)):  # a square's mean, a side at a time: far less work
        soft = F.avg_pool2d(soft, window, stride=1)
    return torch.maximum(marked, soft)


def in_light_of(
    images: Float[Tensor, "b 3 h w"], places: Float[Tensor, "b 1 h w"], contexts: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b 3 h w"]:
    """Contexts made brighter or darker until they are as bright as their images where `places` is above 0: the median
    of the difference there, the same for all channels. Without such a place they stay as they are."""
    brighter = (images - contexts).mean(dim=1, keepdim=True)
    offset = torch.where(places > 0, brighter, torch.nan).flatten(1).nanmedian(dim=1).values.nan_to_num()
    return (contexts + offset.view(-1, 1, 1, 1)).clamp(0, 1)


def in_pieces(
    marked: Float[Tensor, "b 1 h w"], keep: Float[Tensor, "b 1 h w"], generator: torch.Generator
) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 1 h w"]]:
    """What is marked and what is kept of it, where more than half of a picture is marked cut to what is marked and
    kept of another picture with less.

    The evidence of a class that is defined by absence is everywhere. Were its pictures shown whole and all others in
    part, or with another rim, that alone would tell the class.
    """
    share = marked.mean(dim=(1, 2, 3))
    shapes = ((share > 0) & (share <= 0.5)).nonzero()[:, 0].cpu()
    if not len(shapes):
        return marked, keep
    chosen = shapes[torch.randint(len(shapes), (len(marked),), generator=generator)].to(marked.device)
    pieces = marked * keep[chosen]
    cut = ((share > 0.5) & pieces.any(dim=(1, 2, 3))).view(-1, 1, 1, 1)
    return torch.where(cut, marked * marked[chosen], marked), torch.where(cut, pieces, keep)


def overlap(first: Float[Tensor, "b 1 h w"], second: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Intersection over union of masks, each 0 or 1 per pixel; 0 where both are empty."""
    either = torch.maximum(first, second).sum(dim=(1, 2, 3))
    return (first * second).sum(dim=(1, 2, 3)) / either.clamp(min=1)


def binarised(masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """1 where a mask is over a half, else 0."""
    return (masks > 0.5).to(masks.dtype)
