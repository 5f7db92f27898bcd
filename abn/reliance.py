"""Background reliance: how far the baseline's answers follow what people left out of their masks.

Each corrected object is shown on the backgrounds of corrected pictures of other classes, and the baseline is asked what
it sees. Where its answer goes with the background's class, the background misleads it and has to be unlearned; where it
stays with the object's, there is nothing to unlearn, and training anew on swapped backgrounds would only cost.

Related: background-swapped test sets, as in Xiao et al., "Noise or Signal" (ICLR 2021); here they are made of the masks
that people painted, and the labels of the backgrounds are permuted to tell reliance from chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from abn.context import binarised, replace_context, with_surroundings, without_objects
from abn.data import Pictures, in_order
from abn.model import ABN

OBJECTS = BACKGROUNDS = 32  # pictures at most: about a thousand answers, whatever the data
BATCH_SIZE = 64
PERMUTATIONS = 999
WHOLE = 0.95  # of a picture: what is kept from there on leaves no background
PRIOR_COUNT = 2  # backgrounds of a class by which its reliance is drawn to the mean of all classes


class Reliance(NamedTuple):
    """Rises of the baseline's probability of a class, -1..1, where the background is of that class, on objects of
    others: 0 where the background tells it nothing, near 1 where its answer is the background's class."""

    mean: float  # of the classes
    by_class: Float[np.ndarray, "k"]
    p_value: float  # of the mean, if the labels of the backgrounds were exchangeable


@torch.no_grad()
def background_reliance(
    network: ABN, pictures: Pictures, corrected: Sequence[int], classes: int, seed: int, device: torch.device
) -> Reliance | None:
    """The reliance of `network`, which is left in evaluation mode, by the painted masks of the `corrected` pictures
    (indices). None where they do not suffice: it takes objects, and backgrounds of two classes.

    A class without a background is given the mean; others are drawn to it, the more the fewer they have. What is small
    is shown with its surroundings, as in training; what fills more than half of its picture is no object here, and
    where nearly all is marked there is no background.
    """
    random = np.random.default_rng(seed)
    painted = [index for index in corrected if pictures.samples[index].painted]
    if not painted:
        return None
    batch = pictures[_in_turns(pictures.labels.numpy(), random.permutation(painted))[: OBJECTS + BACKGROUNDS]]
    images, marked = batch.images.to(device).float() / 255, binarised(batch.masks.to(device).float() / 255)
    keep, share = with_surroundings(marked), marked.mean(dim=(1, 2, 3)).cpu().numpy()
    objects = np.flatnonzero((share > 0) & (share <= 0.5))[:OBJECTS]
    backgrounds = np.flatnonzero((share > 0) & (keep.mean(dim=(1, 2, 3)).cpu().numpy() < WHOLE))[:BACKGROUNDS]
    shown, behind = batch.labels.numpy()[objects], batch.labels.numpy()[backgrounds]
    if len(np.unique(behind)) < 2 or not len(objects):
        return None
    network.eval()
    others = without_objects(images, keep)
    pairs = [(row, ground) for row in objects.tolist() for ground in backgrounds.tolist()]
    answers = []
    for rows in in_order(len(pairs), BATCH_SIZE):
        front, back = (torch.tensor(side, device=device) for side in zip(*(pairs[row] for row in rows), strict=True))
        composed = replace_context(images[front], keep[front], others[back])
        answers.append(network(composed).logits.float().softmax(dim=1).cpu())
    probabilities = torch.cat(answers).view(len(objects), len(backgrounds), classes).double().numpy()
    by_background = np.full((len(backgrounds), classes), np.nan)
    for name in range(classes):
        if (shown != name).any():
            by_background[:, name] = probabilities[shown != name, :, name].mean(axis=0)
    found = _rises(by_background, behind)
    chance = [np.nanmean(_rises(by_background, random.permutation(behind))) for _ in range(PERMUTATIONS)]
    mean = float(np.nanmean(found))
    counts = np.bincount(behind, minlength=classes)
    drawn = (counts * np.nan_to_num(found) + PRIOR_COUNT * mean) / (counts + PRIOR_COUNT)
    p_value = (1 + sum(value >= mean for value in chance)) / (1 + PERMUTATIONS)
    return Reliance(mean, np.where(np.isnan(found), mean, drawn), float(p_value))


def _rises(by_background: Float[np.ndarray, "d k"], behind: Int[np.ndarray, "d"]) -> Float[np.ndarray, "k"]:
    """Of each class: the mean probability on backgrounds of that class, less that on others; NaN where either lacks."""
    own = behind[:, None] == np.arange(by_background.shape[1])
    counts = own.sum(axis=0)
    known = (counts > 0) & (counts < len(behind))
    values = np.nan_to_num(by_background)
    with_it = (values * own).sum(axis=0) / np.maximum(counts, 1)
    without = (values * ~own).sum(axis=0) / np.maximum(len(behind) - counts, 1)
    return np.where(known & ~np.isnan(by_background).all(axis=0), with_it - without, np.nan)


def _in_turns(labels: Int[np.ndarray, "n"], order: Int[np.ndarray, "m"]) -> list[int]:
    """The rows in `order`, but the classes taking turns."""
    turns: dict[int, int] = {}
    ranked = []
    for row in order.tolist():
        turn = turns[int(labels[row])] = turns.get(int(labels[row]), -1) + 1
        ranked.append((turn, row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]
