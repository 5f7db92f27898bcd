"""The same object in another context, so that nothing outside the mask can carry the decision.

A corrected map alone moves the explanation and not the decision; a picture whose surroundings tell nothing about
its class leaves the network only what the person marked. Related: CAIPI's counterexamples (Teso and Kersting, 2019).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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


def other_pictures(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """For each picture another one of the batch: a permutation without a fixed point (unless the batch is one)."""
    count = len(images)
    order = torch.randperm(count, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return images[partner.to(images.device)]


def noise(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Coloured noise of random coarseness, 0..1: a context that belongs to no class."""
    count, channels, height, width = images.shape
    base = torch.rand(count, channels, 1, 1, generator=generator)
    fine = torch.rand(count, channels, height, width, generator=generator)
    return (base + 0.5 * (fine - 0.5)).clamp(0, 1).to(images)


def plain(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """For each picture the mean colour of another one, everywhere: a context in which nothing is to be seen."""
    return other_pictures(images, generator).mean(dim=(2, 3), keepdim=True).expand_as(images)


def random_contexts(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Half of the time another picture of the batch, else noise or one colour."""
    choices = torch.stack([other_pictures(images, generator), noise(images, generator), plain(images, generator)])
    chosen = torch.multinomial(torch.tensor([0.5, 0.25, 0.25]), len(images), replacement=True, generator=generator)
    return choices[chosen.to(images.device), torch.arange(len(images), device=images.device)]


def with_holes(masks: Float[Tensor, "b 1 h w"], rate: float, generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Masks that, with probability `rate`, lack a rectangle of up to 0.4 of the height and 0.6 of the width.

    A mark that lies on the object leaves a hole in its mask, at a place that tells the class; holes anywhere in
    any mask make holes tell less. Related: random erasing (Zhong et al., AAAI 2020).
    """
    count, _, height, width = masks.shape
    random = torch.rand(5, count, generator=generator)
    tall, wide = (0.1 + 0.3 * random[0]) * height, (0.1 + 0.5 * random[1]) * width
    top, left = random[2] * (height + tall) - tall, random[3] * (width + wide) - wide
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    holes = inside_rows[:, None, :, None] & inside_columns[:, None, None, :] & (random[4] < rate).view(-1, 1, 1, 1)
    return masks * ~holes.to(masks.device)


def shrunk(masks: Float[Tensor, "b 1 h w"], most: int, generator: torch.Generator) -> Float[Tensor, "b 1 h w"]:
    """Masks less a rim of 0 to `most` pixels, no wider than leaves half of what is marked.

    People paint over the edge, and what a mask holds beside its object it teaches; too little does far less harm.
    """
    wanted = torch.randint(0, most + 1, (len(masks),), generator=generator).to(masks.device)
    result, smaller, area = masks, masks, masks.sum(dim=(1, 2, 3))
    for rim in range(1, most + 1):
        # A pixel at a time: the wide windows that would do it at once cost their area.
        smaller = 1 - F.max_pool2d(F.pad(1 - smaller, (1, 1, 1, 1), value=1.0), 3, stride=1)
        fits = (wanted >= rim) & (smaller.sum(dim=(1, 2, 3)) >= area / 2)
        result = torch.where(fits.view(-1, 1, 1, 1), smaller, result)
    return result


def overlap(first: Float[Tensor, "b 1 h w"], second: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Mean intersection over union of two sets of masks, each 0 or 1 per pixel; 0 where there are none."""
    if not len(first):
        return first.new_zeros(())
    either = torch.maximum(first, second).sum(dim=(1, 2, 3))
    return ((first * second).sum(dim=(1, 2, 3)) / either.clamp(min=1)).mean()


def binarised(masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """1 where a mask is over a half, else 0."""
    return (masks > 0.5).to(masks.dtype)
