"""What a pretrained network sees in pictures, from fine to coarse: much to go by where there are few examples.

Lineage: skips of a pretrained encoder, as in TernausNet (Iglovikov and Shvets, 2018); here frozen, since a handful of
masks would spoil it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abn.backbones import Parts

SIDE = 64  # pixels of the picture that tells the resolutions


class Pyramid(nn.Module):
    """The last features of an extractor at each of its resolutions, the finest first. `steps` are their channels and
    the pixels of the picture to one of theirs."""

    mean: Tensor
    std: Tensor

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        extractor = parts.extractor
        self.layers = nn.ModuleList(extractor if isinstance(extractor, nn.Sequential) else [extractor])
        self.register_buffer("mean", torch.tensor(parts.normal.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(parts.normal.std).view(3, 1, 1))
        self.eval().requires_grad_(False)
        self.steps = [(features.shape[1], SIDE / features.shape[2]) for features in self(torch.zeros(1, 3, SIDE, SIDE))]

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Of pictures in 0..1."""
        features = (images - self.mean) / self.std
        found: dict[torch.Size, Tensor] = {}
        for layer in self.layers:
            features = layer(features)
            found[features.shape[-2:]] = features
        return list(found.values())
