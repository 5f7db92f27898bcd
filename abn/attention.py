"""How good an attention map is: against a person's mask, and without one. numpy only; maps and masks are 0..1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def energy_inside(maps: Float[np.ndarray, "n h w"], masks: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Share of a map's sum that lies inside the mask, 0..1, higher is better; chance is the mask's share of the area.

    sum(M * m) / sum(M): the energy-based pointing game of Wang et al., Score-CAM, CVPRW 2020.
    """
    return (maps * masks).sum(axis=(1, 2)) / np.maximum(maps.sum(axis=(1, 2)), 1e-12)


def iou(maps: Float[np.ndarray, "n h w"], masks: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Intersection over union of map > 0.5 and mask > 0.5, 0..1, higher is better; 1 where both are empty."""
    inside, marked = maps > 0.5, masks > 0.5
    union = (inside | marked).sum(axis=(1, 2))
    return np.where(union > 0, (inside & marked).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def disagreement(first: Float[np.ndarray, "n k"], second: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """Jensen-Shannon divergence of two answers in bits, 0..1, lower is better.

    Between the two branches of an ABN: where the branch that draws the map answers otherwise than the one that uses
    it, the map explains another decision than the one that was made.
    """
    mean = (first + second) / 2
    return np.clip((_relative_entropy(first, mean) + _relative_entropy(second, mean)) / 2, 0.0, 1.0)


def context_reliance(original: Float[np.ndarray, "n k"], replaced: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """How far the answer moves when everything outside the mask is replaced: total variation, 0..1, lower is better.

    Of all scores here it alone measures the decision and not the picture of it.
    """
    return np.abs(original - replaced).sum(axis=1) / 2


def equivariance_loss(
    maps: Float[np.ndarray, "n h w"], maps_of_mirrored: Float[np.ndarray, "n h w"]
) -> Float[np.ndarray, "n"]:
    """Mean |M(flip x) - flip M(x)|, 0..1, lower is better (Guo et al., CVPR 2019)."""
    return np.abs(maps_of_mirrored - maps[:, :, ::-1]).mean(axis=(1, 2))


def _relative_entropy(p: Float[np.ndarray, "n k"], q: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    ratio = np.where(p > 0, p / np.maximum(q, 1e-12), 1.0)
    return (p * np.log2(ratio)).sum(axis=1)
