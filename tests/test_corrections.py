"""Annotations become corrections; what cannot be used is set aside with its id and a reason."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest

from labeling.corrections import Correction, Dispute, agreements, read_corrections, settle
from labeling.screen import class_key
from labeling.simulator import FAULTS, Faults, human_mask
from labeling.tasks import Question, as_mask, heatmap, make_task, mask_result, verdict_results

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


def test_all_but_the_map_is_the_mask_turned_over() -> None:
    result = [mask_result(disc(), "bitmask"), *verdict_results("all_but_map")]
    (correction,), _ = read_corrections([a_task(an_annotation(result))], CLASSES)
    assert correction.mask is not None and np.array_equal(correction.mask, 255 - disc())
    everything = [mask_result(np.full((HEIGHT, WIDTH), 255, np.uint8), "bitmask"), *verdict_results("all_but_map")]
    assert only_reason(a_task(an_annotation(everything))) == "empty mask"
    assert only_reason(a_task(an_annotation(verdict_results("all_but_map")))) == "no mask"


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_label_carries_the_right_class(name: str) -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("label_wrong", name)))], CLASSES)
    assert (correction.verdict, correction.label, correction.mask) == ("label_wrong", name, None)


def test_a_class_from_a_long_list_is_a_path_of_one_step() -> None:
    def chosen(*path: str) -> list[dict[str, Any]]:
        return [*verdict_results("label_wrong"), {"from_name": "new_class", "value": {"taxonomy": [list(path)]}}]

    (correction,), _ = read_corrections([a_task(an_annotation(chosen(class_key("dog"))))], CLASSES)
    assert correction.label == "dog"
    assert "more than one new_class" in only_reason(a_task(an_annotation(chosen("class:cat", "class:dog"))))


@pytest.mark.parametrize("verdict", ["map_ok", "map_fixed", "whole_image"])
def test_a_verdict_on_the_map_of_a_picture_without_a_label_confirms_the_networks_answer(verdict: str) -> None:
    answer = an_annotation([mask_result(disc(), "bitmask"), *verdict_results(verdict)])
    (correction,), _ = read_corrections([a_task(answer, label="")], CLASSES)
    assert correction.label == "dog" and correction.mask is not None
    (correction,), _ = read_corrections([a_task(answer)], CLASSES)
    assert correction.label is None
    (correction,), _ = read_corrections([a_task(an_annotation(verdict_results("unusable")), label="")], CLASSES)
    assert correction.label is None


def test_a_class_and_a_painted_mask_come_together() -> None:
    shown = mask_result(disc(), "bitmask")
    for origin, kept in (("prediction", False), ("prediction-changed", True)):
        answer = an_annotation([{**shown, "origin": origin}, *verdict_results("label_wrong", "犬")])
        (correction,), _ = read_corrections([a_task(answer, label="")], CLASSES)
        assert correction.label == "犬" and (correction.mask is not None) == kept
    nothing = {**mask_result(np.zeros((HEIGHT, WIDTH), np.uint8), "bitmask"), "origin": "prediction-changed"}
    (correction,), _ = read_corrections(
        [a_task(an_annotation([nothing, *verdict_results("label_wrong", "cat")]))], CLASSES
    )
    assert (correction.label, correction.mask) == ("cat", None)


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
    [(60, 1.0), (0.0, 0.0), (-5, 0.0), (None, 0.0), ("3", 0.0), (1e9, 30.0), (float("nan"), 0.0), (10**400, 30.0)],
)
def test_minutes_are_capped_and_never_fatal(lead_time: object, minutes: float) -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(fixed(), lead_time=lead_time))], CLASSES)
    assert correction.minutes == minutes


def test_an_answer_far_longer_than_the_others_was_interrupted() -> None:
    times = [30, 60, 60, 120, 1500]
    tasks = [a_task(an_annotation(fixed(), lead_time=time), sample=f"s{time}{n}") for n, time in enumerate(times)]
    tasks.append(a_task(an_annotation(verdict_results("unusable"), lead_time=1500), sample="t"))
    corrections, _ = read_corrections(tasks, CLASSES)
    assert sorted(one.minutes for one in corrections if one.verdict == "map_fixed") == [0.5, 1.0, 1.0, 2.0, 10.0]
    assert [one.minutes for one in corrections if one.verdict == "unusable"] == [25.0], "another verdict, another time"


def test_a_correction_says_how_far_the_mask_moved_from_the_shown_map() -> None:
    def moved(shown: np.ndarray, result: list[dict[str, Any]]) -> float | None:
        task = a_task(an_annotation(result), attention_map=shown.astype(np.float32) / 255)
        (correction,), _ = read_corrections([task], CLASSES)
        return correction.moved

    left = np.zeros((HEIGHT, WIDTH), np.uint8)
    left[:, : WIDTH // 2] = 255
    assert moved(left, fixed(left)) == moved(left, verdict_results("map_ok")) == 0
    assert moved(left, fixed(255 - left)) == 1
    assert moved(left, verdict_results("whole_image")) == 0.5
    assert moved(left, verdict_results("unusable")) is None


def test_an_answer_that_was_changed_to_a_skip_no_longer_counts() -> None:
    (correction,), _ = read_corrections([a_task(an_annotation(fixed(), 1))], CLASSES)
    skipped = an_annotation([], 1, was_cancelled=True, updated_at="2026-01-01T00:01:00Z")
    assert (correction.annotation, only_reason(a_task(skipped))) == (1, "skipped by the labeler")


# --- several labelers


def block(first: int, last: int) -> np.ndarray:
    """A mask of the columns from `first` up to `last`, without it."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, first:last] = 255
    return mask


def says(labeler: str, result: list[dict[str, Any]], number: int = 1) -> dict[str, Any]:
    return an_annotation(result, number, labeler=labeler)


def opinions(*annotations: dict[str, Any]) -> list[Correction]:
    corrections, aside = read_corrections([a_task(*annotations)], CLASSES)
    assert aside == []
    return corrections


def test_each_labeler_has_one_opinion_the_latest() -> None:
    first, other, last = says("ann", fixed(), 1), says("bob", fixed(), 2), says("ann", verdict_results("unusable"), 3)
    assert [(one.labeler, one.annotation) for one in opinions(first, other, last)] == [("ann", 3), ("bob", 2)]


def test_one_labeler_is_a_consensus_of_full_weight() -> None:
    (consensus,), disputes = settle(opinions(says("ann", fixed())), panel=2)
    assert disputes == [] and consensus.mask is not None
    assert (consensus.verdict, consensus.weight) == ("map_fixed", 1.0) and np.array_equal(consensus.mask, disc())


def test_masks_merge_to_their_mean_and_weigh_as_much_as_they_agree() -> None:
    corrections = opinions(says("ann", fixed(block(0, 8))), says("bob", fixed(block(2, 8)), 2))
    (consensus,), disputes = settle(corrections, panel=2)
    assert disputes == [] and consensus.mask is not None
    assert consensus.mask[0, :9].tolist() == [127, 127, 255, 255, 255, 255, 255, 255, 0]
    assert consensus.weight == 6 / 8
    assert consensus.opinions == tuple(corrections)


def test_what_only_one_of_two_painted_is_outside_and_what_two_of_three_painted_is_inside() -> None:
    masks = [block(0, 8), block(2, 8), block(2, 10)]
    two, three = [opinions(*(says(str(n), fixed(mask), n) for n, mask in enumerate(masks[:k]))) for k in (2, 3)]
    for corrections in (two, three):
        (consensus,), _ = settle(corrections, panel=3)
        assert consensus.mask is not None and np.array_equal(consensus.mask >= 128, block(2, 8) > 0)


def test_a_mixture_of_verdicts_is_a_mask_that_people_made() -> None:
    fine = [mask_result(disc(), "bitmask"), *verdict_results("map_ok")]
    (both,), _ = settle(opinions(says("ann", fine), says("bob", fixed(), 2)), panel=2)
    (same,), _ = settle(opinions(says("ann", fine), says("bob", fine, 2)), panel=2)
    assert (both.verdict, same.verdict) == ("map_fixed", "map_ok")


def test_the_larger_side_wins_and_weighs_less_than_all_would() -> None:
    wrong = verdict_results("label_wrong", "dog")
    corrections = opinions(says("ann", wrong), says("bob", fixed(), 2), says("cyd", wrong, 3))
    (consensus,), disputes = settle(corrections, panel=2)
    assert (consensus.verdict, consensus.label, consensus.mask) == ("label_wrong", "dog", None)
    assert disputes == [] and consensus.weight == 2 / 3 and len(consensus.opinions) == 3


@pytest.mark.parametrize(
    ("ann", "bob", "reason"),
    [
        (fixed(), verdict_results("unusable"), "the labelers disagree: ann map_fixed, bob unusable"),
        (
            verdict_results("label_wrong", "dog"),
            verdict_results("label_wrong", "犬"),
            "the labelers disagree: ann dog, bob 犬",
        ),
        (fixed(block(0, 8)), fixed(block(5, 13)), "the labelers' masks have an IoU of only 0.23"),
    ],
)
def test_a_tie_or_strong_disagreement_is_a_dispute(ann: Any, bob: Any, reason: str) -> None:
    corrections = opinions(says("ann", ann), says("bob", bob, 2))
    assert settle(corrections, panel=2) == ([], [Dispute("s1", reason, tuple(corrections))])


@pytest.mark.parametrize(("name", "other"), [("mask", fixed()), ("unusable", verdict_results("unusable"))])
def test_a_class_with_the_name_of_a_verdict_is_another_side(name: str, other: Any) -> None:
    task = a_task(says("ann", verdict_results("label_wrong", name)), says("bob", other, 2))
    corrections, _ = read_corrections([task], [*CLASSES, name])
    agreed, disputes = settle(corrections, panel=2)
    assert agreed == [] and len(disputes) == 1 and agreements(corrections)[0, 1] == 0


def test_after_another_look_masks_are_merged_however_little_they_agree_unless_nothing_is_left() -> None:
    masks = [block(0, 8), block(5, 13), block(6, 14)]
    corrections = opinions(*(says(str(n), fixed(mask), n) for n, mask in enumerate(masks)))
    (consensus,), disputes = settle(corrections, panel=2)
    assert disputes == [] and consensus.mask is not None and 0 < consensus.weight < 0.5
    assert np.array_equal(consensus.mask >= 128, block(5, 13) > 0)
    apart = opinions(*(says(str(n), fixed(block(6 * n, 6 * n + 6)), n) for n in range(3)))
    agreed, (dispute,) = settle(apart, panel=2)
    assert agreed == [] and dispute.reason.endswith("only 0.00")


def test_the_agreement_of_many_is_the_mean_of_all_pairs() -> None:
    masks = [block(0, 8), block(2, 10), block(6, 14), block(0, 8)]
    said = [says(str(n), fixed(mask), n) for n, mask in enumerate(masks)]
    corrections = opinions(*said)
    (consensus,), _ = settle(corrections, panel=2)
    pairs = [agreements([one, other])[0, 1] for one, other in itertools.combinations(corrections, 2)]
    assert consensus.weight == pytest.approx(sum(pairs) / len(pairs))


def test_hundreds_of_labelers_of_one_task_take_seconds() -> None:
    """Each with each would be 45,000 comparisons of whole masks; told by what is counted, not by a clock."""
    said = [says(str(n), fixed(block(0, 8 + n % 3)), n % 60) for n in range(300)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labeling.corrections._iou", lambda *masks: pytest.fail("compared one by one"))
        patch.setattr("labeling.corrections._moved", lambda *masks: 0.0)
        agreed, disputes = settle(opinions(*said), panel=2)
    assert len(agreed) == 1 and not disputes and agreed[0].votes == 300


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
        agreed, disputes = settle(corrections, panel=2)
        assert len(agreed) + len(disputes) <= 1
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


def test_a_task_tells_what_the_network_says_what_is_on_file_and_why_it_is_asked() -> None:
    data = make_task(a_question(label="<b>", predicted="日本語", label_confidence=0.125), "m", 1, "bitmask")["data"]
    assert (data["network_says"], data["on_file"]) == ("日本語 75%", "<b> 12%")
    assert data["asked_because"] == "misclassified · 誤分類"
    assert "未登録" in make_task(a_question(label=""), "m", 1, "bitmask")["data"]["on_file"]


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


def test_a_mask_that_grew_holds_the_object_and_more() -> None:
    gold = disc(64, 64)
    grown = human_mask(gold, Faults(grow=0.1, dilate=0, shift=0, wobble=0), np.random.default_rng(0))
    assert (grown[gold > 0] > 0).all()
    rows = [np.flatnonzero(mask.any(axis=1)) for mask in (gold, grown)]
    assert rows[0][0] - rows[1][0] == rows[1][-1] - rows[0][-1] == 6, "a tenth of the picture on each side"


def test_a_wrong_object_has_nothing_in_common_with_the_right_one() -> None:
    wrong = human_mask(disc(64, 64), Faults(dilate=0, shift=0, wobble=0, wrong=1), np.random.default_rng(0))
    assert (wrong > 0).sum() == (disc(64, 64) > 0).sum() and not (wrong & disc(64, 64)).any()


def test_careless_labelers_paint_as_often_wrongly_as_they_are_said_to() -> None:
    gold = np.zeros((64, 64), np.uint8)
    gold[20:30, 20:30] = 255
    painted = [human_mask(gold, FAULTS["careless"], np.random.default_rng(seed)) > 0 for seed in range(300)]
    size = np.array([mask.sum() for mask in painted])
    elsewhere = np.array([not (mask & (gold > 0)).any() for mask in painted])
    assert 0.02 < elsewhere.mean() < 0.09
    assert 0.25 < (size < 0.65 * np.median(size)).mean() < 0.42
    assert np.median(size) > 5 * (gold > 0).sum(), "15 % of the picture too far out on each side"
