"""What the network is told beside the labels: losses between its attention map and a person's mask.

A registry by name; all take maps and masks (b, 1, h, w) in 0..1 at the map's resolution and give one value a sample.
`rrr` alone is given another map, that of `input_gradients`, at the picture's resolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def l2_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Root mean square of M' - M over the map, 0..1.

    Mitsuhara et al. (VISAPP 2021) take ||M' - M||_2, the root of the sum; ours does not grow with the map's size.
    """
    return ((maps - masks).square().mean(dim=(1, 2, 3)) + 1e-12).sqrt()


def l1_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Mean |M' - M|, 0..1."""
    return (maps - masks).abs().mean(dim=(1, 2, 3))


def bce_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Mean of -m log M - (1 - m) log (1 - M), at least 0: each cell as a classifier of inside and outside."""
    return F.binary_cross_entropy(maps.clamp(1e-6, 1 - 1e-6), masks, reduction="none").mean(dim=(1, 2, 3))


def energy_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """1 - sum(M m) / sum(M), 0..1: the share of the map outside the mask; where inside is left free.

    Rao et al., ICCV 2023, who subtract the share inside; ours is that plus one.
    """
    return 1 - (maps * masks).sum(dim=(1, 2, 3)) / (maps.sum(dim=(1, 2, 3)) + 1e-6)


def suppress_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """sum(M (1 - m)) / sum(1 - m), 0..1: the mean of the map outside the mask, and nothing of the inside."""
    outside = 1 - masks
    return (maps * outside).sum(dim=(1, 2, 3)) / (outside.sum(dim=(1, 2, 3)) + 1e-6)


def input_gradients(logits: Float[Tensor, "b k"], images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Sum over the channels of (d sum_k log p_k / dx)^2: where a changed pixel would change the answer.

    `images` must require gradients; what is given can be descended itself.
    """
    answers = logits.float().log_softmax(dim=1).sum()
    (gradients,) = torch.autograd.grad(answers, images, create_graph=True)
    return gradients.square().sum(dim=1, keepdim=True)


def rrr_loss(gradients: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """sum((1 - m) (d sum_k log p_k / dx)^2), at least 0: right for the right reasons, Ross et al., IJCAI 2017."""
    return (gradients * (1 - masks)).sum(dim=(1, 2, 3))


MAP_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": l2_map_loss,
    "l1": l1_map_loss,
    "bce": bce_map_loss,
    "energy": energy_map_loss,
    "suppress": suppress_map_loss,
    "rrr": rrr_loss,
}
