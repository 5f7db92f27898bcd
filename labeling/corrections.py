"""Annotations become corrections, and several labelers' corrections of a sample one consensus. Pure.

An annotation that cannot be used is set aside with its reason, never fatal.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Float

from labeling.screen import VERDICTS, class_name
from labeling.tasks import read_mask

# Labelers leave for lunch with a task open: no answer counts for more minutes than this, nor for more than so many
# times the median of its verdict.
LONGEST_MINUTES = 30.0
IDLE = 10.0
SKIPPED = "skipped by the labeler"
# A pixel belongs to a mask from here on: a brush writes 255, its rim less.
INSIDE = 128
# Two masks with a smaller IoU have less in common than they differ in: somebody else has to look.
SAME_OBJECT_IOU = 0.5
BAND = 1 << 16  # pixels of all masks that are compared at once


@dataclass(frozen=True)
class Correction:
    """What one labeler said about one sample.

    `revision` is the annotation's time of change, `label` the right class where the verdict is label_wrong or the
    picture had none, `minutes` the time at the screen without idle time, `mask` (height, width) uint8 0..255 where the
    verdict has one, and `moved` 0..1 how far that mask lies from the map that was shown: 0 is the map itself, 1 shares
    nothing with it, None where there is no mask or nothing was shown.
    """

    sample: str
    task: int
    annotation: int
    revision: str
    labeler: str
    verdict: str
    label: str | None
    minutes: float
    model_version: str
    moved: float | None
    mask: np.ndarray | None


@dataclass(frozen=True)
class SetAside:
    """An annotation that teaches nothing, and why: it was skipped, or cannot be used."""

    annotation: int
    sample: str
    reason: str
    labeler: str = ""
    minutes: float = 0.0


@dataclass(frozen=True)
class Consensus:
    """What the labelers of one sample say together.

    `mask` is the mean of the masks of those who carried the verdict, `weight` 0..1 their share of the labelers times
    the mean IoU of their masks: 1 where a labeler answered alone. `opinions` are all corrections that went into it,
    the outvoted ones too; `votes` counts those who carried the verdict.
    """

    sample: str
    verdict: str
    label: str | None
    mask: np.ndarray | None
    weight: float
    opinions: tuple[Correction, ...]
    votes: int


@dataclass(frozen=True)
class Dispute:
    """A sample whose labelers do not agree, and how."""

    sample: str
    reason: str
    opinions: tuple[Correction, ...]


def read_corrections(
    tasks: Iterable[Mapping[str, Any]], classes: Sequence[str]
) -> tuple[list[Correction], list[SetAside]]:
    """One correction a sample and labeler, the latest usable revision, in that order; and what was set aside.

    `tasks` are Label Studio's, as `LabelStudio.answered` gives them.
    """
    latest: dict[tuple[str, str], tuple[datetime, int, Correction]] = {}
    aside: list[SetAside] = []
    for task in tasks:
        for annotation in _annotations(task):
            try:
                correction = _read(task, annotation, classes)
                order = (_time(correction.revision), correction.annotation, correction)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one answer, the others count
                reason = str(error) if type(error) is ValueError else f"unexpected annotation: {error!r:.200}"
                aside.append(set_aside(task, annotation, reason))
                continue
            who = (correction.sample, correction.labeler)
            if who not in latest or order[:2] > latest[who][:2]:
                latest[who] = order
    return _without_idle([latest[who][2] for who in sorted(latest)]), aside


def settle(corrections: Iterable[Correction], panel: int) -> tuple[list[Consensus], list[Dispute]]:
    """What the labelers of each sample agree on, and the samples on which they do not, both in order of sample id.

    The labelers take sides: one for each class that is said to be right, one for unusable, one for a mask, whatever
    the verdict that came with it. The larger side wins; a tie is a dispute. So are masks of up to `panel` labelers
    that have too little in common; those of more are merged all the same, with the small weight that they deserve,
    unless no pixel is in most of them.
    """
    by_sample: dict[str, list[Correction]] = defaultdict(list)
    for correction in corrections:
        by_sample[correction.sample].append(correction)
    agreed, disputes = [], []
    for sample in sorted(by_sample):
        opinions = tuple(by_sample[sample])
        (side, votes), *others = Counter(map(_side, opinions)).most_common()
        winners = [one for one in opinions if _side(one) == side]
        alike = _mean_of_pairs(agreements(winners))
        mask = _mean([one.mask for one in winners if one.mask is not None])
        if others and others[0][1] == votes:
            said = ", ".join(f"{one.labeler} {one.label or one.verdict}" for one in opinions)
            disputes.append(Dispute(sample, f"the labelers disagree: {said}", opinions))
        elif alike < SAME_OBJECT_IOU and (len(opinions) <= panel or (mask is not None and mask.max() < INSIDE)):
            disputes.append(Dispute(sample, f"the labelers' masks have an IoU of only {alike:.2f}", opinions))
        else:
            verdicts = {one.verdict for one in winners}
            verdict = verdicts.pop() if len(verdicts) == 1 else "map_fixed"
            weight = votes / len(opinions) * alike
            agreed.append(Consensus(sample, verdict, winners[0].label, mask, weight, opinions, votes))
    return agreed, disputes


def agreements(corrections: Sequence[Correction]) -> Float[np.ndarray, "n n"]:
    """How far each two labelers say the same of one sample, 0..1: the IoU of their masks where both gave one, 0 where
    they take different sides (see `settle`).

    Pixels in both masks are counted for all pairs at once, in bands, so that hundreds of labelers take no longer than
    reading their masks.
    """
    sides = [_side(one) for one in corrections]
    found = np.array([[float(one == other) for other in sides] for one in sides]).reshape(len(sides), len(sides))
    rows = [row for row, one in enumerate(corrections) if one.mask is not None]
    marked = [one.mask for one in corrections if one.mask is not None]
    both = np.zeros((len(rows), len(rows)))
    for start in range(0, marked[0].size if marked else 0, BAND):
        band = np.stack([mask.reshape(-1)[start : start + BAND] >= INSIDE for mask in marked]).astype(np.float32)
        both += band @ band.T  # whole numbers below 2^24 are exact
    either = both.diagonal()[:, None] + both.diagonal()[None] - both
    found[np.ix_(rows, rows)] *= np.divide(both, either, out=np.ones_like(both), where=either > 0)
    return found


def _mean_of_pairs(values: Float[np.ndarray, "n n"]) -> float:
    """Of each two different ones; 1 where there is one alone."""
    pairs = values[np.triu_indices(len(values), 1)]
    return float(pairs.mean()) if pairs.size else 1.0


def _mean(masks: Sequence[np.ndarray]) -> np.ndarray | None:
    """Rounded down, so that what only one of two labelers painted is no part of the object (see INSIDE): a mask that
    is too large does more harm than one that is too small."""
    return np.mean(masks, axis=0).astype(np.uint8) if masks else None


def _side(correction: Correction) -> tuple[str, str]:
    """A class may have any name, that of a verdict too."""
    if correction.label:
        return "class", correction.label
    return "verdict", "mask" if correction.mask is not None else correction.verdict


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union, of grey levels too: sum of the minima over sum of the maxima; 1 for two empty ones."""
    union = int(np.maximum(one, other).sum())
    return int(np.minimum(one, other).sum()) / union if union else 1.0


def _without_idle(corrections: list[Correction]) -> list[Correction]:
    times = defaultdict(list)
    for one in corrections:
        if one.minutes > 0:  # else the time got lost
            times[one.verdict].append(one.minutes)
    longest = {verdict: IDLE * median(minutes) for verdict, minutes in times.items()}
    return [replace(one, minutes=min(one.minutes, longest.get(one.verdict, 0.0))) for one in corrections]


def _read(task: Mapping[str, Any], annotation: Mapping[str, Any], classes: Sequence[str]) -> Correction:
    if annotation.get("was_cancelled"):
        raise ValueError(SKIPPED)
    data, results = task["data"], annotation["result"]
    height, width = data["height"], data["width"]
    if not isinstance(data["sample"], str) or any(
        type(number) is not int for number in (height, width, task["id"], annotation["id"])
    ):
        raise ValueError("the task or annotation lacks its sample, size or id")
    verdict = _choice(results, "verdict")
    if verdict is None:
        raise ValueError("no verdict")
    if verdict not in VERDICTS:
        raise ValueError(f"unknown verdict {verdict!r}")

    shown = _shown(task, annotation)
    label, mask = _label(task, results, verdict, classes), None
    if verdict == "whole_image":
        mask = np.full((height, width), 255, np.uint8)
    elif verdict in ("map_ok", "map_fixed", "all_but_map"):
        mask = read_mask(results, height, width)
        if mask is None and verdict == "map_ok" and shown is not None:
            mask = read_mask(shown["result"], height, width)
        if mask is None:
            raise ValueError("no mask")
        if verdict == "all_but_map":
            mask = np.where(mask >= INSIDE, 0, 255).astype(np.uint8)
        if not (mask >= INSIDE).any():
            raise ValueError("empty mask")
    elif verdict == "label_wrong" and _painted(results):
        mask = read_mask(results, height, width)
        if mask is not None and not (mask >= INSIDE).any():
            mask = None
    return Correction(
        sample=data["sample"],
        task=task["id"],
        annotation=annotation["id"],
        revision=annotation["updated_at"],
        labeler=str(annotation.get("labeler") or ""),
        verdict=verdict,
        label=label,
        minutes=_minutes(annotation.get("lead_time")),
        model_version=str((shown or data).get("model_version") or ""),
        moved=_moved(mask, shown),
        mask=mask,
    )


def _label(
    task: Mapping[str, Any], results: Sequence[Mapping[str, Any]], verdict: str, classes: Sequence[str]
) -> str | None:
    """The class that the labeler gives the picture: the chosen one, or, where the picture had none and the evidence for
    the network's answer was shown or painted, that answer."""
    if verdict == "label_wrong":
        key = _choice(results, "new_class")
        if key is None:
            raise ValueError("the class is said to be wrong, but no class was chosen")
        label = class_name(key)
    elif verdict != "unusable" and (asked := task.get("meta") or {}).get("label") == "":
        label = asked["predicted"]
    else:
        return None
    if label not in classes:
        raise ValueError(f"unknown class {label!r}")
    return label


def _painted(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a region is not as the network had it."""
    return any(result.get("from_name") == "mask" and result.get("origin") != "prediction" for result in results)


def _shown(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prediction that the labeler was shown: the annotation's parent, else the task's latest."""
    predictions = task.get("predictions") or []
    parent = [prediction for prediction in predictions if prediction["id"] == annotation.get("parent_prediction")]
    return (parent or predictions or [None])[-1]


def _moved(mask: np.ndarray | None, shown: Mapping[str, Any] | None) -> float | None:
    if mask is None or shown is None:
        return None
    before = read_mask(shown["result"], *mask.shape)
    return None if before is None else 1 - _iou(before, mask)


def _choice(results: Sequence[Mapping[str, Any]], name: str) -> str | None:
    """The one answer in the field `name`. A list that is searched stores it as a path of one step, a taxonomy."""
    values = [result["value"] for result in results if result.get("from_name") == name]
    chosen = [value["choices"] if "choices" in value else list(chain(*value["taxonomy"])) for value in values]
    if len(chosen) > 1 or any(len(choices) != 1 for choices in chosen):
        raise ValueError(f"more than one {name}, or an empty one")
    return chosen[0][0] if chosen else None


def _minutes(lead_time: Any) -> float:
    """Seconds as minutes, within 0 and LONGEST_MINUTES; 0 where the time got lost."""
    if not isinstance(lead_time, int) and not (isinstance(lead_time, float) and math.isfinite(lead_time)):
        return 0.0
    return min(max(lead_time, 0.0), 60 * LONGEST_MINUTES) / 60  # as the number that it is: an int may pass all floats


def _time(revision: str) -> datetime:
    time = datetime.fromisoformat(revision)
    if time.tzinfo is None:
        raise ValueError(f"the time of change {revision} has no time zone")
    return time


def _annotations(task: Any) -> list[Any]:
    annotations = task.get("annotations") if isinstance(task, Mapping) else None
    return annotations if isinstance(annotations, list) else []


def set_aside(task: Mapping[str, Any], annotation: Any, reason: str) -> SetAside:
    """An annotation that is not used, by whatever it still tells of itself."""
    known = annotation if isinstance(annotation, Mapping) else {}
    number, data = known.get("id"), task.get("data")
    return SetAside(
        number if isinstance(number, int) else -1,
        str(data.get("sample", "")) if isinstance(data, Mapping) else "",
        reason,
        str(known.get("labeler") or ""),
        _minutes(known.get("lead_time")),
    )
