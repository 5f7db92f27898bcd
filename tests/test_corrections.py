"""Annotations become corrections; what cannot be used is set aside with its id and a reason."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from labeling.corrections import read_corrections
from labeling.live import create_app
from labeling.simulator import Faults, human_mask
from labeling.tasks import Question, as_mask, heatmap, make_task, mask_result, verdict_results

Serve = Callable[[FastAPI], str]
CLASSES = ["cat", "dog", "犬"]
HEIGHT, WIDTH = 12, 20


def disc(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    rows, columns = np.indices((height, width))
    inside = ((rows - height / 2) / height) ** 2 + ((columns - width / 2) / width) ** 2 < 0.06
    return np.where(inside, 255, 0).astype(np.uint8)


def a_question(**changes: Any) -> Question:
    values: dict[str, Any] = {
        "sample": "s1",
        "image_url": "/image",
        "heatmap_url": "/heatmap",
        "width": WIDTH,
        "height": HEIGHT,
        "label": "cat",
        "predicted": "dog",
        "confidence": 0.75,
        "reason": "misclassified",
        "attention_map": np.full((3, 5), 0.8, np.float32),
    }
    return Question(**{**values, **changes})


def a_task(*annotations: dict[str, Any], task_id: int = 7, **changes: Any) -> dict[str, Any]:
    """A task as Label Studio answers it, with the annotations given."""
    task = make_task(a_question(**changes), "model-3", 1, "bitmask")
    task["predictions"][0]["id"] = 31
    return {"id": task_id, **task, "annotations": list(annotations)}


def an_annotation(result: list[dict[str, Any]], number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "id": number,
        "result": result,
        "was_cancelled": False,
        "updated_at": f"2026-01-01T00:00:{number:02d}.000000Z",
        "lead_time": 90.0,
        "parent_prediction": 31,
        "labeler": "ann@example.com",
        **changes,
    }


def fixed(mask: np.ndarray | None = None, tool: Any = "bitmask") -> list[dict[str, Any]]:
    return [mask_result(disc() if mask is None else mask, tool), *verdict_results("map_fixed")]


def only_reason(task: dict[str, Any]) -> str:
    corrections, aside = read_corrections([task], CLASSES)
    assert corrections == []
    assert len(aside) == 1
    assert (aside[0].annotation, aside[0].sample) == (1, "s1")
    return aside[0].reason


@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_a_fixed_map_becomes_a_correction(tool: str) -> None:
    corrections, aside = read_corrections([a_task(an_annotation(fixed(tool=tool)))], CLASSES)
    (correction,) = corrections
    assert aside == []
    assert correction.mask is not None and np.array_equal(correction.mask, disc())
    assert (correction.sample, correction.task, correction.annotation) == ("s1", 7, 1)
    assert (correction.verdict, correction.label, correction.minutes) == ("map_fixed", None, 1.5)
    assert (correction.labeler, correction.model_version) == ("ann@example.com", "model-3")
    assert correction.revision == "2026-01-01T00:00:01.000000Z"


def test_a_fine_map_keeps_the_map_that_was_shown() -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("map_ok")))], CLASSES)
    assert correction.mask is not None and (correction.mask == 204).all()


def test_a_fine_map_that_was_submitted_with_its_mask_keeps_that_one() -> None:
    result = [mask_result(disc(), "bitmask"), *verdict_results("map_ok")]
    (correction,), _ = read_corrections([a_task(an_annotation(result))], CLASSES)
    assert correction.mask is not None and np.array_equal(correction.mask, disc())


def test_the_whole_image_is_a_full_mask() -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("whole_image")))], CLASSES)
    assert correction.mask is not None and correction.mask.shape == (HEIGHT, WIDTH) and (correction.mask == 255).all()


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_label_carries_the_right_class(name: str) -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("label_wrong", name)))], CLASSES)
    assert (correction.verdict, correction.label, correction.mask) == ("label_wrong", name, None)


def test_an_unusable_picture_needs_no_mask() -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("unusable")))], CLASSES)
    assert (correction.verdict, correction.mask) == ("unusable", None)


def test_regions_are_joined() -> None:
    left, right = disc(), disc()
    left[:, : WIDTH // 2], right[:, WIDTH // 2 :] = 0, 0
    result = [mask_result(left, "brush"), mask_result(right, "bitmask"), *verdict_results("map_fixed")]
    (correction,), _ = read_corrections([a_task(an_annotation(result))], CLASSES)
    assert correction.mask is not None and np.array_equal(correction.mask, disc())


def test_the_latest_usable_revision_counts() -> None:
    first = an_annotation(fixed(), 1)
    last = an_annotation(verdict_results("unusable"), 2)
    empty = an_annotation(fixed(np.zeros((HEIGHT, WIDTH), np.uint8)), 3)
    corrections, aside = read_corrections([a_task(last, empty), a_task(first, task_id=8)], CLASSES)
    assert [correction.verdict for correction in corrections] == ["unusable"]
    assert [(item.annotation, item.reason) for item in aside] == [(3, "empty mask")]


def test_revisions_are_compared_as_times_not_as_text() -> None:
    early = an_annotation(fixed(), 1, updated_at="2026-01-01T00:00:05Z")
    late = an_annotation(verdict_results("unusable"), 2, updated_at="2026-01-01T00:00:05.500000Z")
    (correction,), _ = read_corrections([a_task(late, early)], CLASSES)
    assert correction.annotation == 2


def test_an_empty_mask_is_set_aside() -> None:
    assert only_reason(a_task(an_annotation(fixed(np.full((HEIGHT, WIDTH), 127, np.uint8))))) == "empty mask"


def test_a_missing_mask_is_set_aside() -> None:
    assert only_reason(a_task(an_annotation(verdict_results("map_fixed")))) == "no mask"


def test_a_missing_verdict_is_set_aside() -> None:
    assert only_reason(a_task(an_annotation([mask_result(disc(), "bitmask")]))) == "no verdict"


def test_a_skipped_task_is_no_correction() -> None:
    assert only_reason(a_task(an_annotation([], was_cancelled=True))) == "skipped by the labeler"


def test_a_mask_of_another_size_than_the_task_is_set_aside() -> None:
    assert "30 x 30, but the picture is 20 x 12" in only_reason(a_task(an_annotation(fixed(disc(30, 30)))))


def test_a_mask_that_lies_about_its_size_is_set_aside() -> None:
    for tool in ("bitmask", "brush"):
        result = fixed(disc(30, 30), tool)
        result[0] |= {"original_width": WIDTH, "original_height": HEIGHT}
        assert "20 x 12" in only_reason(a_task(an_annotation(result)))


def test_a_damaged_mask_is_set_aside() -> None:
    result = fixed(tool="brush")
    result[0]["value"]["rle"] = result[0]["value"]["rle"][:12]
    assert "truncated" in only_reason(a_task(an_annotation(result)))


def test_a_rotated_picture_is_set_aside() -> None:
    result = fixed()
    result[0]["image_rotation"] = 90
    assert "rotated by 90" in only_reason(a_task(an_annotation(result)))


def test_a_class_that_is_missing_or_unknown_is_set_aside() -> None:
    assert "no class was chosen" in only_reason(a_task(an_annotation(verdict_results("label_wrong"))))
    assert only_reason(a_task(an_annotation(verdict_results("label_wrong", "cow")))) == "unknown class 'cow'"


@pytest.mark.parametrize(
    ("lead_time", "minutes"),
    [(60, 1.0), (0.0, 0.0), (-5, 0.0), (None, 0.0), ("3", 0.0), (1e9, 30.0), (float("nan"), 0.0)],
)
def test_minutes_are_capped_and_never_fatal(lead_time: object, minutes: float) -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(fixed(), lead_time=lead_time))], CLASSES)
    assert correction.minutes == minutes


def test_nothing_that_an_annotation_may_hold_is_fatal() -> None:
    sound = a_task(an_annotation(fixed()), an_annotation(verdict_results("label_wrong", "cat"), 2))
    rubbish: list[Any] = [None, 3, "x", [], {}, [1], {"id": 1}, float("nan"), True, -1, [None], {"choices": [3]}]
    chance = random.Random(0)
    for _ in range(1500):
        task: Any = copy.deepcopy(sound)
        node: Any = task
        path: list[Any] = []
        while isinstance(node, (dict, list)) and node and (not path or chance.random() < 0.8):
            parent, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
            path.append(key)
        parent[key] = chance.choice(rubbish)
        corrections, aside = read_corrections([task], CLASSES)
        assert len(corrections) <= 1
        assert all(isinstance(item.annotation, int) and item.reason for item in aside)
    assert read_corrections(rubbish, CLASSES)[0] == []


def test_a_prediction_keeps_grey_levels_and_stays_alive() -> None:
    ramp = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    task = make_task(a_question(attention_map=ramp), "model-3", 2, "brush")
    (prediction,) = task["predictions"]
    (result,) = prediction["result"]
    assert (prediction["model_version"], result["dynamic"]) == ("model-3", True)
    assert (task["data"]["sample"], task["data"]["round"]) == ("s1", 2)
    assert np.array_equal(as_mask(ramp, HEIGHT, WIDTH), (ramp * 255).round())


def test_facts_are_escaped() -> None:
    task = make_task(a_question(label="<script>", predicted="a&b", reason="<i>", sample='"x"'), "m", 1, "bitmask")
    facts = task["data"]["facts"]
    assert "<script>" not in facts and "&lt;script&gt;" in facts and "a&amp;b" in facts and "75%" in facts


def test_a_map_of_infinite_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        make_task(a_question(attention_map=np.full((2, 2), np.nan, np.float32)), "m", 1, "bitmask")


def test_a_heatmap_is_blue_where_cold_and_red_where_hot() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    attention = np.repeat(np.array([[0.0, 1.0]], np.float32), 4, axis=1)
    colours = heatmap(image, attention)
    assert colours.shape == image.shape and colours.dtype == np.uint8
    assert colours[0, 0, 2] > colours[0, 0, 0] and colours[0, -1, 0] > colours[0, -1, 2]


def test_human_faults_are_small_seeded_and_never_empty() -> None:
    gold = disc(64, 64)
    first = human_mask(gold, Faults(), np.random.default_rng(5))
    again = human_mask(gold, Faults(), np.random.default_rng(5))
    assert np.array_equal(first, again) and not np.array_equal(first, gold)
    for seed in range(20):
        painted = human_mask(gold, Faults(), np.random.default_rng(seed))
        assert (painted & gold > 0).sum() / (painted | gold > 0).sum() > 0.7
    dot = np.zeros((64, 64), np.uint8)
    dot[5, 5] = 255
    assert all(human_mask(dot, Faults(), np.random.default_rng(seed)).any() for seed in range(20))


def test_without_faults_a_mask_is_painted_exactly() -> None:
    none = Faults(dilate=0, shift=0, wobble=0)
    assert np.array_equal(human_mask(disc(), none, np.random.default_rng(0)), disc())


def test_a_missed_half_is_half() -> None:
    half = human_mask(disc(64, 64), Faults(dilate=0, shift=0, wobble=0, miss=1), np.random.default_rng(0))
    assert 0.4 < (half > 0).sum() / (disc(64, 64) > 0).sum() < 0.6


def the_predictor(sample: str, mask: np.ndarray | None) -> list[tuple[str, float]]:
    if sample != "s1":
        raise ValueError(f"unknown sample {sample}")
    assert mask is not None
    return [("cat", float((mask > 0).mean())), ("dog", 0.2), ("cow", 0.1), ("hen", 0.0)]


def predict_body(result: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {"tasks": [a_task(**changes)], "params": {"context": {"result": result}}}


def test_a_stroke_is_answered_with_the_top_classes_and_the_time(serve: Serve) -> None:
    url = serve(create_app(the_predictor))
    body = httpx.post(f"{url}/predict", json=predict_body(fixed(np.full((HEIGHT, WIDTH), 255, np.uint8)))).json()
    (result,) = body["results"][0]["result"]
    assert (result["type"], result["from_name"], result["to_name"]) == ("textarea", "live", "live_target")
    classes, clock = result["value"]["text"][0].rsplit(" · ", 1)
    assert classes == "cat 1.00 · dog 0.20 · cow 0.10"
    assert len(clock.split(":")) == 3


def test_an_empty_context_leaves_the_text_alone(serve: Serve) -> None:
    url = serve(create_app(the_predictor))
    for body in (predict_body([]), predict_body(verdict_results("map_ok")), {"tasks": [a_task()]}, {}):
        assert httpx.post(f"{url}/predict", json=body).json() == {"results": [{}]}


def test_a_mask_or_sample_that_cannot_be_answered_says_so(serve: Serve) -> None:
    url = serve(create_app(the_predictor))
    for body in (predict_body(fixed(disc(30, 30))), predict_body(fixed(), sample="s2")):
        text = httpx.post(f"{url}/predict", json=body).json()["results"][0]["result"][0]["value"]["text"][0]
        assert text.startswith("no answer: ")


def test_the_service_speaks_the_rest_of_the_protocol(serve: Serve) -> None:
    hints: list[dict[str, Any]] = []
    url = serve(create_app(the_predictor, hints.append))
    assert httpx.get(f"{url}/health").json()["status"] == "UP"
    assert httpx.post(f"{url}/setup", json={}).json()["model_version"]
    assert httpx.get(f"{url}/versions").json()["versions"]
    assert httpx.post(f"{url}/webhook", json={"action": "ANNOTATION_CREATED"}).status_code == 200
    deadline = time.monotonic() + 5
    while not hints and time.monotonic() < deadline:
        time.sleep(0.01)  # the answer comes before the hint is handed on
    assert hints == [{"action": "ANNOTATION_CREATED"}]
