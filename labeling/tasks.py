"""Samples and attention maps become Label Studio tasks with an editable prediction. Pure: no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from labeling.masks import decode_png, decode_rle, encode_png, encode_rle
from labeling.screen import LABEL, VERDICTS, Tool, class_key, reason_shown


@dataclass(frozen=True)
class Question:
    """What is asked about one sample.

    `width` and `height` are the picture's, in pixels; `attention_map` is (h, w) float32 0..1 of any size;
    `confidence` is the probability 0..1 of `predicted`, `label` the class on file, perhaps empty, and
    `label_confidence` its probability.
    """

    sample: str
    image_url: str
    heatmap_url: str
    width: int
    height: int
    label: str
    predicted: str
    confidence: float
    reason: str
    attention_map: np.ndarray
    label_confidence: float | None = None


def make_task(question: Question, model_version: str, round_number: int, tool: Tool) -> dict[str, Any]:
    """The task {data, meta, predictions} of one question; the network's own map is its editable prediction."""
    mask = as_mask(question.attention_map, question.height, question.width)
    data = {
        "sample": question.sample,
        "round": round_number,
        "image": question.image_url,
        "heatmap": question.heatmap_url,
        "width": question.width,
        "height": question.height,
        "model_version": model_version,
        "network_says": f"{question.predicted} {question.confidence:.0%}",
        "on_file": _on_file(question),
        "asked_because": reason_shown(question.reason),
        "live_title": "The network's answer for this map · この地図での答え",
    }
    meta = {
        "label": question.label,
        "predicted": question.predicted,
        "confidence": question.confidence,
        "reason": question.reason,
    }
    prediction = {"model_version": model_version, "result": [mask_result(mask, tool)]}
    return {"data": data, "meta": meta, "predictions": [prediction]}


def mask_result(mask: np.ndarray, tool: Tool) -> dict[str, Any]:
    """`mask` (height, width) uint8 as one region of an annotation or prediction."""
    height, width = mask.shape
    if tool == "brush":
        value: dict[str, Any] = {"format": "rle", "rle": encode_rle(mask), "brushlabels": [LABEL]}
    else:
        value = {"imageDataURL": encode_png(mask), "bitmasklabels": [LABEL]}
    return {
        "id": "attention",
        "type": f"{tool}labels",
        "from_name": "mask",
        "to_name": "img",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        # Without this undocumented key the editor never asks the network about a stroke.
        "dynamic": True,
        "value": value,
    }


def verdict_results(verdict: str, label: str | None = None) -> list[dict[str, Any]]:
    """A verdict, and the right class `label` with it, as the screen stores them."""
    chosen = [("verdict", verdict)] + ([] if label is None else [("new_class", class_key(label))])
    return [
        {"id": name, "type": "choices", "from_name": name, "to_name": "img", "value": {"choices": [choice]}}
        for name, choice in chosen
    ]


def read_mask(results: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray | None:
    """The mask (height, width) uint8 in an annotation's results, None where nothing was painted.

    Several regions are joined by their maximum. Raises ValueError for another size, a rotated picture, or
    a region that cannot be decoded.
    """
    joined: np.ndarray | None = None
    for result in results:
        if not is_mask(result):
            continue
        value = result["value"]
        claimed = (result.get("original_width"), result.get("original_height"))
        if claimed != (width, height):
            raise ValueError(f"the mask is for {claimed[0]} x {claimed[1]}, but the picture is {width} x {height}")
        if result.get("image_rotation"):
            raise ValueError(f"the picture was rotated by {result['image_rotation']} degrees while painting")
        if "rle" in value:
            mask = decode_rle(value["rle"], height, width)
        else:
            mask = decode_png(value["imageDataURL"], height, width)
        joined = mask if joined is None else np.maximum(joined, mask)
    return joined


def is_mask(result: Mapping[str, Any]) -> bool:
    """Whether a result holds a painted region, not a verdict or a text."""
    value = result.get("value")
    return isinstance(value, Mapping) and ("rle" in value or "imageDataURL" in value)


def as_mask(attention_map: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map (h, w) 0..1 as a mask (height, width) uint8: resized bilinearly, grey levels kept."""
    if attention_map.ndim != 2 or not np.isfinite(attention_map).all():
        raise ValueError(f"an attention map is (h, w) finite numbers 0..1, not of shape {attention_map.shape}")
    small = Image.fromarray(attention_map.astype(np.float32))
    large = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    return (large.clip(0, 1) * 255).round().astype(np.uint8)


def heatmap(image: np.ndarray, attention_map: np.ndarray) -> np.ndarray:
    """`image` (H, W, 3) uint8 under its map (h, w) 0..1 in colours, blue 0 to red 1: (H, W, 3) uint8."""
    height, width = image.shape[:2]
    heat = as_mask(attention_map, height, width)[..., None] / 255.0
    # The rainbow of matplotlib's "jet", which labelers know from other tools.
    colours = (1.5 - np.abs(4 * heat - np.array([3.0, 2.0, 1.0]))).clip(0, 1) * 255
    return (0.5 * image + 0.5 * colours).round().astype(np.uint8)


def _on_file(question: Question) -> str:
    if not question.label:
        other = list(VERDICTS).index("label_wrong") + 1
        english = f"no label yet: 1 to {other - 1} confirm the network's, {other} chooses another"
        return f"{english} · 未登録：1〜{other - 1}で予測を確定"
    share = "" if question.label_confidence is None else f" {question.label_confidence:.0%}"
    return f"{question.label}{share}"
