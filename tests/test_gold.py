"""The gold set that labelers paint: who is asked about, and what the answers say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abn.config import make_section
from abn.gold import gold_order
from abn.manifest import (
    CORRECTION_COLUMNS,
    DISPUTED,
    MaskShards,
    mask_sha256,
    read_corrections,
    read_gold,
    read_manifest,
)
from abn.stage import CONTROL, ROUND
from flows import rounds
from flows.gate import Comparison, View
from flows.gold import (
    GOLD,
    LEARN,
    askable,
    evaluation_changes,
    gold_masks,
    gold_statements,
    missing_gold,
    mixed_batch,
    split_answers,
)
from flows.versions import Dvc
from flows.withdrawals import withdraw
from flows.workspace import Round, Workspace, write_atomically, write_json
from labeling.corrections import Consensus, Correction, settle
from labeling.tasks import mask_result, verdict_results
from test_lineage import ANNA, BEN, history, place  # noqa: F401 - fixtures
from test_round_steps import _no_flow, a_task, an_annotation, ask  # noqa: F401 - a fixture
from tiny import SHARD, correction, make_workspace, square, write_csv

MISSING = {"val": 60, "test": 60}


def gold_row(sample: str, verdict: str = "map_fixed", **columns: str) -> dict[str, str]:
    told = {"round": "1", "annotation": "7", "labeler": "anna@example.com", "revision": "2026-03-01T10:00:00Z"}
    return {**correction(sample, verdict), **told, "minutes": "0.5", **columns}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace without given masks; labelers painted one of val and one of test."""
    root = make_workspace(tmp_path)
    np.savez(root / "data/gold.npz")
    masks = {"val0": square(3), "test0": square(5)}
    (root / SHARD).parent.mkdir(parents=True)
    np.savez(root / SHARD, allow_pickle=False, **masks)
    rows = [gold_row(name, masks=SHARD, sha256=mask_sha256(mask)) for name, mask in masks.items()]
    write_csv(root / "data/gold.csv", CORRECTION_COLUMNS, rows)
    return root


# --- whom to ask


def test_every_beginning_of_the_order_mirrors_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    order = gold_order(labels, np.zeros(100, bool), np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    assert Counter(labels[order[:3]].tolist()) == {0: 1, 1: 1, 2: 1}
    for count in (10, 20, 50):
        assert Counter(labels[order[:count]].tolist()) == {
            0: round(0.6 * count),
            1: round(0.3 * count),
            2: round(0.1 * count),
        }


def test_what_is_known_counts_and_is_not_asked_again() -> None:
    labels, known = np.repeat([0, 1], [50, 50]), np.zeros(100, bool)
    known[:10] = True
    order = gold_order(labels, known, np.random.default_rng(0))
    assert set(order).isdisjoint(range(10)) and len(order) == 90
    assert (labels[order[:10]] == 1).all()  # the class that lags behind comes first


def test_within_a_class_the_order_is_random_and_the_same_for_the_same_seed() -> None:
    labels = np.zeros(50, int)
    orders = [gold_order(labels, np.zeros(50, bool), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    firsts = [gold_order(labels, np.zeros(50, bool), np.random.default_rng(seed))[0] for seed in range(2000)]
    assert min(Counter(firsts).values()) > 15  # of 40


# --- a batch


def pick(number: int, at_random: bool = False, minutes: float = 0.5) -> dict[str, str]:
    return {
        "sample": f"train{number:02d}", "score": f"{1 - number / 100:.6f}", "reason": "why", "minutes": str(minutes),
        "at_random": "yes" if at_random else "", "shown": "what stands out",
    }  # fmt: skip


def question(number: int, split: str = "val", minutes: float = 0.5) -> dict[str, str]:
    return {"sample": f"{split}{number}", "split": split, "shown": "what stands out", "minutes": str(minutes)}


PICKS = [pick(number, at_random=number % 10 == 9) for number in range(30)]
QUESTIONS = [question(number, split) for split in ("val", "test") for number in range(30)]


def batch(**changes: Any) -> list[dict[str, str]]:
    told: dict[str, Any] = {
        "picks": PICKS, "questions": QUESTIONS, "missing": MISSING, "share": 0.5, "budget": 30, "budget_minutes": 0.0,
        "judging": False, "seed": (0,), **changes,
    }  # fmt: skip
    return mixed_batch(**told)


def test_half_of_the_first_batch_is_gold_most_of_it_of_val() -> None:
    rows = batch()
    assert Counter(row["purpose"] for row in rows) == {LEARN: 15, GOLD: 15}
    assert Counter(row["sample"][:3] for row in rows if row["purpose"] == GOLD) == {"val": 10, "tes": 5}
    learned = {row["sample"] for row in rows if row["purpose"] == LEARN and not row["at_random"]}
    assert learned == {f"train{number:02d}" for number in range(14) if number != 9}  # the highest scores
    assert sum(bool(row["at_random"]) for row in rows) == 2  # of three, as large a share as of the others


def test_a_verdict_that_waits_gets_masks_of_val_alone() -> None:
    rows = batch(judging=True, share=0.3)
    assert Counter(row["sample"][:3] for row in rows if row["purpose"] == GOLD) == {"val": 9}


def test_once_a_split_has_its_masks_the_other_one_gets_the_rest_and_then_none() -> None:
    assert Counter(row["sample"][:3] for row in batch(missing={"val": 2, "test": 60}) if row["purpose"] == GOLD) == {
        "val": 2, "tes": 13,
    }  # fmt: skip
    assert all(row["purpose"] == LEARN for row in batch(missing={"val": 0, "test": 0}))
    assert sorted(row["sample"] for row in batch(missing={"val": 0, "test": 0})) == [row["sample"] for row in PICKS]


def test_minutes_are_shared_as_pictures_are() -> None:
    rows = batch(budget_minutes=6.0)
    gold = [float(row["minutes"]) for row in rows if row["purpose"] == GOLD]
    assert sum(gold) == 3.0 and sum(float(row["minutes"]) for row in rows) <= 6.0


def test_labelers_cannot_tell_gold_by_its_place_or_what_they_read() -> None:
    places = [i for seed in range(300) for i, row in enumerate(batch(seed=(seed,))) if row["purpose"] == GOLD]
    assert np.mean(places) == pytest.approx(14.5, abs=0.5)
    rows = batch()
    assert {row["shown"] for row in rows} == {"what stands out"}
    assert all("gold" not in row["shown"] for row in rows)


# --- what was answered


def said(sample: str, labeler: str, verdict: str = "map_fixed", label: str | None = None) -> Correction:
    mask = square(0) if verdict == "map_fixed" else None
    return Correction(sample, 1, 1, "2026-03-01T10:00:00Z", labeler, verdict, label, 0.5, "v1", None, mask)


def gold_of(*opinions: Correction) -> Consensus:
    _, (gold,), holding = split_answers(*settle(opinions, 2), {"val0"})
    assert not holding, "a doubt about the evaluation holds no round open"
    return gold


@pytest.mark.parametrize(("verdict", "label"), [("label_wrong", "dark"), ("unusable", None)])
def test_one_labeler_who_doubts_an_evaluation_sample_takes_it_out_until_a_second_one_agrees(
    verdict: str, label: str | None
) -> None:
    anna, ben, cleo = (said("val0", name, verdict, label) for name in ("anna", "ben", "cleo"))
    alone = gold_of(anna)
    assert alone.verdict == DISPUTED and alone.label is None and alone.opinions == (anna,)
    both = gold_of(anna, ben)
    assert (both.verdict, both.label, both.votes) == (verdict, label, 2)
    against = gold_of(anna, said("val0", "ben"))
    assert against.verdict == DISPUTED  # a third one has to look
    assert gold_of(anna, said("val0", "ben"), cleo).label == label
    assert gold_of(anna, said("val0", "ben"), said("val0", "cleo")).verdict == "map_fixed"


def test_what_is_learned_from_needs_no_second_labeler() -> None:
    learned, gold, _ = split_answers(*settle([said("train00", "anna", "label_wrong", "dark")], 2), {"val0"})
    assert [one.label for one in learned] == ["dark"] and not gold


# --- what the stages make of it


def test_gold_masks_judge_and_train_nothing(root: Path) -> None:
    shards, samples = MaskShards(root), {one.id: one for one in read_manifest(root)}
    mask = shards.gold(samples["val0"])
    assert mask is not None and (mask == square(3)).all()
    assert shards.gold(samples["val1"]) is None and shards.gold(samples["train00"]) is None
    assert not any(one.masks for one in read_manifest(root, gold=False))


def test_training_reads_nothing_that_labelers_said_of_evaluation_samples(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = ROUND.samples(gold=False)
    rows = [gold_row("val1", "label_wrong", label="dark"), gold_row("test1", "unusable"), gold_row("val2", DISPUTED)]
    write_csv(root / "data/gold.csv", CORRECTION_COLUMNS, rows)
    assert ROUND.samples(gold=False) == before
    for stage in (ROUND, CONTROL):
        labels = {one.id: one.label for one in stage.samples()}
        assert labels["val1"] == "dark" and not {"test1", "val2"} & labels.keys()
    assert evaluation_changes(Workspace(root)) == {"labels_changed": 1, "left_out": 2}


def test_a_painted_mask_takes_the_place_of_a_given_one_and_withdrawing_it_brings_that_back(root: Path) -> None:
    np.savez(root / "data/gold.npz", allow_pickle=False, val0=square(9), val1=np.zeros_like(square(0)))
    samples = read_manifest(root)
    assert gold_masks(Workspace(root)) == {"val": 1, "test": 1}  # an empty mask marks nothing
    assert askable(samples, MaskShards(root)) == {"val": 2, "test": 3}
    assert missing_gold(Workspace(root), 60) == {"val": 2, "test": 3}
    withdrawn = {"time": "", "action": "withdraw", "annotation": "7", "labeler": "", "round": "1", "why": "test"}
    rows = [{**withdrawn, "sample": "val0"}]
    write_csv(root / "data/withdrawals.csv", list(rows[0]), rows)
    first = next(one for one in read_manifest(root) if one.id == "val0")
    mask = MaskShards(root).gold(first)
    assert mask is not None and (mask == square(9)).all()


def test_a_workspace_of_before_there_was_a_gold_table_goes_on(root: Path) -> None:
    (root / "data/gold.csv").unlink()
    assert gold_masks(Workspace(root)) == {"val": 0, "test": 0}
    assert len(read_manifest(root)) == 30


# --- the steps of a round, on the history that test_lineage.py writes by hand


def answer(number: int, labeler: str, verdict: str = "unusable", label: str | None = None) -> dict[str, Any]:
    return {**an_annotation(number, labeler), "result": verdict_results(verdict, label)}


def painted(number: int, labeler: str, mask: np.ndarray) -> dict[str, Any]:
    return {**an_annotation(number, labeler), "result": [mask_result(mask, "bitmask"), *verdict_results("map_fixed")]}


def test_answers_about_evaluation_samples_become_gold_and_teach_nothing(place: Workspace) -> None:  # noqa: F811
    tasks = [
        a_task(41, "val0", painted(60, ANNA, square(7))),
        a_task(42, "train05", painted(61, BEN, square(8))),
    ]
    before = read_corrections(place.root)
    round_ = ask(place, {"val0": 41, "train05": 42}, *tasks)
    answers = rounds.read_answers(place, round_)
    assert answers.complete and [one.sample for one in answers.gold] == ["val0"]
    rounds.learn_from.fn(place, round_, answers)
    assert read_corrections(place.root).keys() - before.keys() == {"train05"}
    mask = MaskShards(place.root).gold(next(one for one in read_manifest(place.root) if one.id == "val0"))
    assert mask is not None and (mask == square(7)).all()
    (statement,) = gold_statements(place, "val")
    assert (statement["labeler"], statement["id"], statement["revision"]) == (ANNA, 60, "2026-03-04T10:00:00Z")
    taken = withdraw(place, {"labeler": ANNA}, "paints shadows")
    assert "val0" in {one["sample"] for one in taken.annotations} and not gold_statements(place, "val")
    withdraw(place, {"labeler": ANNA}, "it was fine", undo=True)
    assert len(gold_statements(place, "val")) == 1


def test_a_doubted_class_is_asked_again_and_holds_no_round_open(place: Workspace) -> None:  # noqa: F811
    first = a_task(41, "val0", answer(60, ANNA, "label_wrong", "light"))
    round_ = ask(place, {"val0": 41}, first)
    answers = rounds.read_answers(place, round_)
    assert answers.complete and answers.asked_again == {41: 2}
    rounds.learn_from.fn(place, round_, answers)
    assert read_gold(place.root)["val0"]["verdict"] == DISPUTED
    assert "val0" not in {one.id for one in read_manifest(place.root)}
    write_json(round_.tasks, {"project": 1, "tasks": {}})  # the second answer comes in a later round
    write_json(place.round(3).tasks, {"project": 1, "tasks": {"val0": 41}})
    later = {**answer(70, BEN, "label_wrong", "light"), "updated_at": "2026-03-05T10:00:00Z"}
    second = {**first, "annotations": [*first["annotations"], later], "updated_at": later["updated_at"]}
    write_atomically(round_.annotations, json.dumps({**second, "total_annotations": 2}) + "\n")
    answers = rounds.read_answers(place, round_)
    rounds.learn_from.fn(place, round_, answers)
    row = read_gold(place.root)["val0"]
    assert (row["label"], row["labeler"], row["annotation"]) == ("light", f"{ANNA} {BEN}", "60 70")
    assert {one.id: one.label for one in read_manifest(place.root)}["val0"] == "light"
    assert evaluation_changes(place) == {"labels_changed": 1, "left_out": 0}


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("gold", 5, "at least 10, or to 0"), ("gold", -1, "at least 10"), ("gold_share", 0.0, "above 0 and at most 1")],
)
def test_settings_that_can_tell_nothing_are_refused(name: str, value: float, remedy: str) -> None:
    values = {"url": "embedded", "tool": "bitmask", "deadline_hours": 72, "minimum": 1, name: value}
    with pytest.raises(ValueError, match=rf"^labeling\.{name} is {value}; .*{remedy}"):
        make_section(rounds.LabelingConfig, values, "labeling")


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_workspace_without_val_or_test_is_told_before_it_trains(root: Path, split: str) -> None:
    samples = [one for one in read_manifest(root) if one.split != split]
    with pytest.raises(ValueError, match=f"^split {split} has no images"):
        rounds.check_evaluation(samples)
    rounds.check_evaluation(read_manifest(root))


def test_a_wish_for_more_gold_than_a_split_has_asks_for_all_of_it(root: Path) -> None:
    assert missing_gold(Workspace(root), 60) == {"val": 3, "test": 3}  # of four each, one is painted
    assert missing_gold(Workspace(root), 0) == {"val": 0, "test": 0}


def wait_for_gold(place: Workspace, monkeypatch: pytest.MonkeyPatch, *names: str) -> Round:  # noqa: F811
    """Round 3 made a model that is right for the right reason; the gate was undecided by the gold of `names`."""
    monkeypatch.setattr(Dvc, "hashes", lambda self: {"results/model.pt": "1" * 32})
    monkeypatch.setattr(rounds, "compare", lambda root, champion, challenger: compared(place))
    place.results.mkdir(exist_ok=True)
    place.model.write_text("the model")
    np.savez(place.gold)
    paint(place, *names)
    round_ = place.round(3)
    state = round_.read()
    known = {"gold": gold_masks(place), "gold_painted": gold_statements(place, "val")}
    verdict = {**state["verdict"], "decision": "undecided", "reason": "too little", "model": "1" * 32, **known}
    round_.write({**state, "decision": "undecided", "decided": verdict["decided"], "verdict": verdict})
    return round_


def paint(place: Workspace, *names: str) -> None:  # noqa: F811
    masks = {name: square(number) for number, name in enumerate(names)}
    (place.root / SHARD).parent.mkdir(parents=True, exist_ok=True)
    np.savez(place.root / SHARD, allow_pickle=False, **masks)
    rows = [
        gold_row(name, masks=SHARD, sha256=mask_sha256(mask), annotation=str(70 + number))
        for number, (name, mask) in enumerate(masks.items())
    ]
    write_csv(place.gold_table, CORRECTION_COLUMNS, rows)


def compared(place: Workspace) -> Comparison:  # noqa: F811
    """A champion that is right as the pictures are and wrong with swapped background; a challenger that always is."""
    samples, shards = [one for one in read_manifest(place.root) if one.split == "val"], MaskShards(place.root)
    gold = np.array([1.0 if shards.has_gold(one) else np.nan for one in samples])
    right = [one.label for one in samples]
    elsewhere = [label if np.isnan(known) else "else" for label, known in zip(right, gold, strict=True)]
    maps = np.zeros((len(samples), 2, 2))
    return Comparison(samples, View(right, elsewhere, gold, gold, maps), View(right, right, gold, 0 * gold, maps))


def test_an_undecided_model_is_judged_again_when_its_gold_is_there(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_ = wait_for_gold(place, monkeypatch, "val0")
    before = round_.read()
    rounds.weigh_again.fn(place, round_)
    assert round_.read() == before, "nothing is judged again by the same gold"
    paint(place, "val0", "val1", "val2", "val3")
    rounds.weigh_again.fn(place, round_)
    verdict = round_.read()["verdict"]
    assert (verdict["decision"], verdict["gold"]["val"]) == ("promoted", 4), "of four pictures in val all are gold"
    assert [(one["decision"], one["gold"]["val"]) for one in verdict["earlier"]] == [("undecided", 1)]
    assert (verdict["model"], verdict["parent"]) == (before["verdict"]["model"], before["verdict"]["parent"])


def test_a_gold_mask_that_is_withdrawn_while_the_gate_waits_is_missed(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_ = wait_for_gold(place, monkeypatch, "val0", "val1")
    withdraw(place, {"annotation": "70"}, "a shadow")
    rounds.weigh_again.fn(place, round_)
    verdict = round_.read()["verdict"]
    assert (verdict["decision"], verdict["gold"]["val"]) == ("undecided", 1)
    assert verdict["missing_gold"] == 3 and "3 more gold masks" in verdict["reason"]


def test_a_model_that_is_no_longer_there_is_not_judged_again(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_ = wait_for_gold(place, monkeypatch, "val0")
    paint(place, "val0", "val1", "val2", "val3")
    monkeypatch.setattr(Dvc, "hashes", lambda self: {"results/model.pt": "2" * 32})
    before = round_.read()
    rounds.weigh_again.fn(place, round_)
    assert round_.read() == before
