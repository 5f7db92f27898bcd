"""Annotations become corrections. Pure; an annotation that cannot be used is set aside, never fatal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from labeling.screen import VERDICTS, class_name
from labeling.tasks import read_mask

# Labelers leave for lunch with a task open.
LONGEST_MINUTES = 30.0
# A pixel belongs to a mask from here on: a brush writes 255, its rim less.
INSIDE = 128


@dataclass(frozen=True)
class Correction:
    """What one labeler said about one sample.

    `revision` is the annotation's time of change, `label` the right class where the verdict is label_wrong,
    `minutes` the capped time at the screen, `mask` (height, width) uint8 0..255 where the verdict has one.
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
    mask: np.ndarray | None


@dataclass(frozen=True)
class SetAside:
    """An annotation that cannot be used, and why."""

    annotation: int
    sample: str
    reason: str


def read_corrections(
    tasks: Iterable[Mapping[str, Any]], classes: Sequence[str]
) -> tuple[list[Correction], list[SetAside]]:
    """One correction a sample, the latest usable revision, in order of sample id; and what was set aside.

    `tasks` are Label Studio's, as `LabelStudio.answered` gives them.
    """
    latest: dict[str, tuple[datetime, int, Correction]] = {}
    aside: list[SetAside] = []
    for task in tasks:
        for annotation in _annotations(task):
            try:
                correction = _read(task, annotation, classes)
                order = (_time(correction.revision), correction.annotation, correction)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                reason = str(error) if type(error) is ValueError else f"unexpected annotation: {error!r}"
                aside.append(SetAside(_whole(annotation, "id"), _sample(task), reason))
                continue
            if correction.sample not in latest or order[:2] > latest[correction.sample][:2]:
                latest[correction.sample] = order
    return [latest[sample][2] for sample in sorted(latest)], aside


def _read(task: Mapping[str, Any], annotation: Mapping[str, Any], classes: Sequence[str]) -> Correction:
    if annotation.get("was_cancelled"):
        raise ValueError("skipped by the labeler")
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

    label = None
    if verdict == "label_wrong":
        key = _choice(results, "new_class")
        if key is None:
            raise ValueError("the class is said to be wrong, but no class was chosen")
        label = class_name(key)
        if label not in classes:
            raise ValueError(f"unknown class {label!r}")

    shown = _shown(task, annotation)
    mask = None
    if verdict == "whole_image":
        mask = np.full((height, width), 255, np.uint8)
    elif verdict in ("map_ok", "map_fixed"):
        mask = read_mask(results, height, width)
        if mask is None and verdict == "map_ok" and shown is not None:
            mask = read_mask(shown["result"], height, width)
        if mask is None:
            raise ValueError("no mask")
        if not (mask >= INSIDE).any():
            raise ValueError("empty mask")
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
        mask=mask,
    )


def _shown(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prediction that the labeler was shown: the annotation's parent, else the task's latest."""
    predictions = task.get("predictions") or []
    parent = [prediction for prediction in predictions if prediction["id"] == annotation.get("parent_prediction")]
    return (parent or predictions or [None])[-1]


def _choice(results: Sequence[Mapping[str, Any]], name: str) -> str | None:
    chosen = [result["value"]["choices"] for result in results if result.get("from_name") == name]
    if len(chosen) > 1 or any(len(choices) != 1 for choices in chosen):
        raise ValueError(f"more than one {name}, or an empty one")
    return chosen[0][0] if chosen else None


def _minutes(lead_time: Any) -> float:
    """Seconds as minutes, within 0 and LONGEST_MINUTES; 0 where the time got lost."""
    if not isinstance(lead_time, (int, float)) or not math.isfinite(lead_time):
        return 0.0
    return min(max(lead_time / 60, 0.0), LONGEST_MINUTES)


def _time(revision: str) -> datetime:
    time = datetime.fromisoformat(revision)
    if time.tzinfo is None:
        raise ValueError(f"the time of change {revision} has no time zone")
    return time


def _annotations(task: Any) -> list[Any]:
    annotations = task.get("annotations") if isinstance(task, Mapping) else None
    return annotations if isinstance(annotations, list) else []


def _sample(task: Mapping[str, Any]) -> str:
    data = task.get("data")
    return str(data.get("sample", "")) if isinstance(data, Mapping) else ""


def _whole(annotation: Any, key: str) -> int:
    value = annotation.get(key) if isinstance(annotation, Mapping) else None
    return value if isinstance(value, int) else -1
