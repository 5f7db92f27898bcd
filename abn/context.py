"""The same object in another context, so that nothing outside the mask can carry the decision.

A corrected map alone moves the explanation and not the decision; a picture whose surroundings tell nothing about
its class leaves the network only what the person marked. Related: CAIPI's counterexamples (Teso and Kersting, 2019).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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


def random_contexts(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Half of the time another picture of the batch, else noise."""
    pictures: Bool[Tensor, "b"] = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(
        pictures.view(-1, 1, 1, 1).to(images.device), other_pictures(images, generator), noise(images, generator)
    )


def overlap(first: Float[Tensor, "b 1 h w"], second: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Mean intersection over union of two sets of masks, each 0 or 1 per pixel; 0 where there are none."""
    if not len(first):
        return first.new_zeros(())
    either = torch.maximum(first, second).sum(dim=(1, 2, 3))
    return ((first * second).sum(dim=(1, 2, 3)) / either.clamp(min=1)).mean()


def binarised(masks: Float[Tensor, "b 1 h w"], grow: int = 0) -> Float[Tensor, "b 1 h w"]:
    """mask > 0.5, grown by `grow` pixels."""
    hard = (masks > 0.5).to(masks.dtype)
    return F.max_pool2d(hard, 2 * grow + 1, stride=1, padding=grow) if grow else hard
