"""What a pretrained network sees in pictures, from fine to coarse: much to go by where there are few examples.

Lineage: skips of a pretrained encoder, as in TernausNet (Iglovikov and Shvets, 2018); here frozen: there are few
masks to learn from.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from abn.backbones import Parts

LEAST = 32  # pixels a side that each layer has something left of; long pictures are seen with their edge repeated
SIDE = 64  # pixels of the picture by which the resolutions are told: of a smaller one the coarse ones are one pixel


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
        everything = self._features(torch.zeros(1, 3, SIDE, SIDE))
        last = {features.shape[2]: number for number, features in enumerate(everything)}
        self.kept = list(last.values())
        self.steps = [(everything[number].shape[1], SIDE / side) for side, number in last.items()]

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Of pictures in 0..1."""
        height, width = images.shape[-2:]
        beyond = (0, max(0, LEAST - width), 0, max(0, LEAST - height))
        everything = self._features(F.pad(images, beyond, mode="replicate"))
        kept = zip(self.kept, self.steps, strict=True)
        return [
            everything[number][..., : math.ceil(height / step), : math.ceil(width / step)] for number, (_, step) in kept
        ]

    @torch.no_grad()
    def _features(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "b _ _ _"]]:
        """What each layer gives."""
        features, found = (images - self.mean) / self.std, []
        for layer in self.layers:
            features = layer(features)
            found.append(features)
        return found
