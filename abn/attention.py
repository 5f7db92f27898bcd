"""How good an attention map is: against a person's mask, and without one. numpy only; maps and masks are 0..1.

Against a mask: energy_inside, iou, pointing_game, context_reliance. Without one: disagreement, equivariance_loss,
entropy, gini, atypicality, deletion_and_insertion. What is asked of the network for them is in abn/predict.py, what
they say together in abn/doubt.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

# --- against a mask


def energy_inside(maps: Float[np.ndarray, "n h w"], masks: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Share of a map's sum that lies inside the mask, 0..1, higher is better; chance is the mask's share of the area.

    sum(M * m) / sum(M): the energy-based pointing game of Wang et al., Score-CAM, CVPRW 2020.
    """
    return (maps * masks).sum(axis=(1, 2)) / np.maximum(maps.sum(axis=(1, 2)), 1e-12)


def iou(maps: Float[np.ndarray, "n h w"], masks: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Intersection over union of map > 0.5 and mask > 0.5, 0..1, higher is better; 1 where both are empty.

    |A and B| / |A or B| (Jaccard, 1901); of attention against masks as in Network Dissection (Bau et al., CVPR 2017),
    where the threshold is a quantile of the maps.
    """
    inside, marked = maps > 0.5, masks > 0.5
    union = (inside | marked).sum(axis=(1, 2))
    return np.where(union > 0, (inside & marked).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def pointing_game(maps: Float[np.ndarray, "n h w"], masks: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Whether the hottest cell lies where mask > 0.5: [m(argmax M) > 0.5], 0..1, higher is better (Zhang et al., ECCV
    2016).

    Of several hottest cells, the share that does, so between 0 and 1; the paper's tolerance of 15 pixels is left out,
    since a cell of a map is wider.
    """
    hottest = maps == maps.max(axis=(1, 2), keepdims=True)
    return (hottest & (masks > 0.5)).sum(axis=(1, 2)) / hottest.sum(axis=(1, 2))


def context_reliance(original: Float[np.ndarray, "n k"], replaced: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """How far the answer moves when everything outside the mask is replaced: total variation, 0..1, lower is better.

    sum |p - p'| / 2, this project's own. Of all scores here it alone measures the decision and not the picture of it.
    Small masks are grown before (`with_surroundings`), so what misleads close beside a small object does not count.
    Without a mask the same is asked of the picture's corners, where the object seldom is (`corner_reliance` of the
    predictions).
    """
    return np.abs(original - replaced).sum(axis=1) / 2


# --- without a mask


def disagreement(first: Float[np.ndarray, "n k"], second: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """Jensen-Shannon divergence of two answers in bits, 0..1, lower is better (Lin, 1991).

    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. Between the two branches of an ABN: where the branch that
    draws the map answers otherwise than the one that uses it, the map explains another decision than the one made.
    """
    mean = (first + second) / 2
    return np.clip((_relative_entropy(first, mean) + _relative_entropy(second, mean)) / 2, 0.0, 1.0)


def equivariance_loss(
    maps: Float[np.ndarray, "n h w"], maps_of_moved: Float[np.ndarray, "n h w"], shift: int = 0
) -> Float[np.ndarray, "n"]:
    """Mean |M(T x) - T M(x)| over the cells that T keeps in the picture, 0..1, lower is better (Guo et al., CVPR 2019).

    T mirrors left and right, then moves down and right by `shift` cells of the map.
    """
    _, height, width = maps.shape
    kept = maps[:, : height - shift, ::-1][:, :, : width - shift]
    return np.abs(maps_of_moved[:, shift:, shift:] - kept).mean(axis=(1, 2))


def entropy(maps: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Of a map as a distribution, -sum p log p / log(h w) with p = M / sum(M): 0 one cell alone, 1 even.

    Neither end is better: a shortcut is often a small spot, and a map that looks everywhere explains nothing. 1 for
    an empty map. Shannon, 1948.
    """
    cells = maps.reshape(len(maps), -1)
    total = cells.sum(axis=1, keepdims=True)
    share = np.where(total > 0, cells / np.maximum(total, 1e-12), 1 / cells.shape[1])
    return -(share * np.log(np.maximum(share, 1e-12))).sum(axis=1) / np.log(cells.shape[1])


def gini(maps: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    """Gini index of a map's cells, 0 even .. 1 - 1/(h w) one cell alone; neither end is better, see `entropy`.

    1 - 2 sum_i (c_i / sum(c)) (N - i + 1/2) / N over the cells c_1 <= ... <= c_N (Hurley and Rickard, 2009; as a
    measure of explanations Chalasani et al., ICML 2020). 0 for an empty map.
    """
    cells = np.sort(maps.reshape(len(maps), -1), axis=1)
    count = cells.shape[1]
    weights = (count - np.arange(1, count + 1) + 0.5) / count
    total = cells.sum(axis=1)
    return np.where(total > 0, 1 - 2 * (cells @ weights) / np.maximum(total, 1e-12), 0.0)


def atypicality(maps: Float[np.ndarray, "n h w"], groups: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Distance of a map to the mean map of its group, in units of the group's root mean square distance: at least 0,
    about 1 for most, higher is odder.

    He et al. (arXiv 2206.05981) take the likelihood under a Gaussian mixture; this is one round Gaussian a group. It
    finds the odd one of a class; where a whole class shares a shortcut, nobody there is odd.
    """
    cells, odd = maps.reshape(len(maps), -1), np.zeros(len(maps))
    for group in np.unique(groups):
        members = groups == group
        distance = np.linalg.norm(cells[members] - cells[members].mean(axis=0), axis=1)
        odd[members] = distance / max(np.sqrt((distance**2).mean()), 1e-12)
    return odd


class Curves(NamedTuple):
    deletion: Float[np.ndarray, "n"]  # area, 0..1, lower is better
    insertion: Float[np.ndarray, "n"]  # area, 0..1, higher is better


def deletion_and_insertion(
    answer: Callable[[Float[np.ndarray, "n 3 h w"]], Float[np.ndarray, "n k"]],
    images: Float[np.ndarray, "n 3 h w"],
    maps: Float[np.ndarray, "n h w"],
    nothing: Float[np.ndarray, "n 3 h w"],
    steps: int = 16,
) -> Curves:
    """Area under the probability of the network's own answer while pixels go, or come, hottest first (RISE, Petsiuk
    et al., BMVC 2018). `maps` have the pictures' size; equally hot pixels go in reading order.

    Pixels go to, or come in place of, `nothing`: the paper takes black for deletion and a blurred picture for
    insertion. Costs 2 steps + 3 forward passes; the trapezoidal rule over the share of pixels, 0..1.
    """
    count, _, height, width = images.shape
    rank = np.argsort(np.argsort(-maps.reshape(count, -1), axis=1, kind="stable"), axis=1, kind="stable")
    rank = rank.reshape(count, 1, height, width)
    own = answer(images).argmax(axis=1)

    def area(kept: Callable[[float], Bool[np.ndarray, "n 1 h w"]]) -> Float[np.ndarray, "n"]:
        shares = np.linspace(0, height * width, steps + 1)
        curve = [answer(np.where(kept(pixels), images, nothing))[np.arange(count), own] for pixels in shares]
        return np.trapezoid(np.stack(curve), dx=1 / steps, axis=0)

    return Curves(deletion=area(lambda pixels: rank >= pixels), insertion=area(lambda pixels: rank < pixels))


def _relative_entropy(p: Float[np.ndarray, "n k"], q: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    ratio = np.where(p > 0, p / np.maximum(q, 1e-12), 1.0)
    return (p * np.log2(ratio)).sum(axis=1)
