"""From a model to what it learned from, and back, on three rounds written by hand: no service, no DVC."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from abn.config import read_params
from abn.manifest import CORRECTION_COLUMNS, read_corrections, read_manifest
from flows.lineage import find_round, learned_withdrawn, models_that_learned, record, sample_of, trace
from flows.lineage_report import BOX, describe, describe_history, layout
from flows.versions import Git
from flows.withdrawals import withdraw
from flows.workspace import Workspace, read_table, write_json, write_table
from test_commands import Run, abnloop  # noqa: F401 - a fixture
from tiny import SIZE, correction, make_workspace, write_params

ANNA, BEN = "anna@example.com", "ben@example.com"


def said(sample: str, annotation: int, labeler: str, number: int, verdict: str = "unusable") -> dict[str, str]:
    revision = f"2026-03-0{number}T10:00:00Z"
    given = {"annotation": str(annotation), "labeler": labeler, "minutes": "0.50", "revision": revision}
    return correction(sample, verdict, round=str(number), model_version=f"v{number}", **given)


FIRST = [said("train00", 11, ANNA, 1, "label_wrong"), said("train01", 12, BEN, 1, "label_wrong")]
SECOND = [said("train02", 13, ANNA, 2, "label_wrong"), said("train03", 14, BEN, 2)]


def open_round(place: Workspace, number: int, asked: Sequence[str], promoted: bool, weights: str = "scratch") -> None:
    """What opening a round leaves behind."""
    round_, git, champion = place.round(number), Git(place.root), number - 1
    parent = {"round": champion, "model_version": str(champion), "weights": weights} if champion else None
    verdict = {"model": "", "promoted": promoted, "reason": f"reason {number}", "criteria": [], "parent": parent}
    state = {
        "round": number,
        "mlflow_runs": {"round": f"{number:032x}", "train": f"{number + 16:032x}"},
        "verdict": {**verdict, "decided": f"2026-03-0{number}T02:00:00+00:00"},
        "git_commit": git.head(),
        "model_version": str(number),
        "promoted": promoted,
        "gate": f"reason {number}",
    }
    rows = [{"sample": name, "score": "0.75", "reason": f"asked in round {number}"} for name in asked]
    write_table(round_.batch, ["sample", "score", "reason"], rows)
    if promoted:
        write_json(place.champion_record, {"round": number, "model_version": str(number)})
    record(place, round_, state)
    round_.write({**state, "state": "open"})
    git.commit(["rounds", "models"], f"[round {number}] Ask")


def collect(place: Workspace, number: int, rows: Sequence[Mapping[str, str]]) -> None:
    """What collecting it leaves behind."""
    write_table(place.corrections, CORRECTION_COLUMNS, [*read_table(place.corrections), *rows])
    place.round(number).write({**place.round(number).read(), "state": "closed"})
    Git(place.root).commit(["rounds", "data/corrections.csv"], f"[round {number}] Learn")


@pytest.fixture
def place(history: Workspace, tmp_path: Path) -> Workspace:
    """The same history, to be changed."""
    return Workspace(shutil.copytree(history.root, tmp_path / "leaves"))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The first model learned from nobody, the second from FIRST, the third from SECOND too and was refused; then
    more came in. The models are called leaves."""
    root = make_workspace(tmp_path_factory.mktemp("history") / "leaves")
    write_params(root, epochs=1)
    params = read_params(root / "params.yaml")
    (root / "params.yaml").write_text(yaml.safe_dump({**params, "project": {"name": "leaves"}}))
    (root / "data/images.dvc").write_text(yaml.safe_dump({"outs": [{"md5": "0123.dir", "path": "images"}]}))
    (root / ".gitignore").write_text("/data/images/\n*.npz\n*.pt\n/.abnloop/\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    workspace = Workspace(root)
    Git(root).commit(["."], "[data] images")
    open_round(workspace, 1, ["train00", "train01"], promoted=True)
    collect(workspace, 1, FIRST)
    open_round(workspace, 2, ["train02", "train03"], promoted=True)
    collect(workspace, 2, SECOND)
    open_round(workspace, 3, ["train04"], promoted=False)
    collect(workspace, 3, [said("train04", 15, ANNA, 3)])
    return workspace


def annotations_of(place: Workspace, number: int) -> list[int]:
    return [one["id"] for one in trace(place, place.round(number))["annotations"]]


def rounds_of(models: Sequence[Mapping[str, Any]]) -> list[int]:
    return [one["round"] for one in models]


# --- from a model to what it learned from


def test_a_model_learned_from_what_was_collected_before_it_trained(history: Workspace) -> None:
    assert [annotations_of(history, number) for number in (1, 2, 3)] == [[], [11, 12], [11, 12, 13, 14]]
    assert len(read_corrections(history.root)) == 5


def test_an_annotation_is_named_with_who_gave_it_and_who_chose_its_sample(history: Workspace) -> None:
    facts = trace(history, history.round(2))
    assert facts["annotations"][0] == {
        "id": 11,
        "revision": "2026-03-01T10:00:00Z",
        "labeler": ANNA,
        "sample": "train00",
        "minutes": 0.5,
        "round": 1,
        "verdict": "label_wrong",
    }
    assert facts["selected_by"][0] == {
        "sample": "train00",
        "round": 1,
        "model_version": "1",
        "score": 0.75,
        "reason": "asked in round 1",
    }


def test_code_parameters_and_data_are_those_of_the_training(place: Workspace) -> None:
    facts, git = trace(place, place.round(2)), Git(place.root)
    (place.root / "params.yaml").write_text((place.root / "params.yaml").read_text().replace("epochs: 1", "epochs: 9"))
    git.commit(["params.yaml"], "[config] Longer")
    assert trace(place, place.round(2)) == facts
    assert facts["parameters"]["train"]["epochs"] == 1
    shown = subprocess.run(
        ["git", "show", f"{facts['git_commit']}:data/corrections.csv"], cwd=place.root, capture_output=True, check=True
    )
    assert facts["data_version"]["data/corrections.csv"] == hashlib.md5(shown.stdout).hexdigest()
    assert facts["data_version"]["data/images"] == "0123.dir"
    assert facts["data_version"]["data/corrections.csv"] != trace(place, place.round(3))["data_version"]


def test_maps_called_fine_are_told_apart_from_the_masks_that_were_used(place: Workspace) -> None:
    mask = {"masks": "data/masks/0003.npz", "sha256": "0"}
    rows = [
        {**said(f"train{number:02d}", number, ANNA, 3, verdict), **mask}
        for number, verdict in ((5, "map_fixed"), (6, "map_ok"), (7, "map_ok"))
    ]
    collect(place, 3, rows)
    open_round(place, 4, ["train08"], promoted=True)
    facts = trace(place, place.round(4))
    assert facts["masks"] == {"used": 1, "set_aside": 2}
    assert "; masks used: 1, maps called fine and set aside beside so few painted ones: 2." in describe(facts)
    assert trace(place, place.round(3))["masks"] == {"used": 0, "set_aside": 0}


def test_the_gate_and_the_parent_are_told(history: Workspace) -> None:
    first, second, third = (trace(history, history.round(number)) for number in (1, 2, 3))
    assert first["parent"] is None
    assert second["parent"] == {"round": 1, "model_version": "1", "weights": "scratch"}
    assert third["gate"] == {
        "decision": "refused",  # as a round says that was judged before there were three answers
        "promoted": False,
        "reason": "reason 3",
        "criteria": [],
        "decided": "2026-03-03T02:00:00+00:00",
        "gold": {},
        "gold_painted": [],
        "earlier": [],
    }


def test_a_round_of_before_lineage_was_kept_is_found_in_git(place: Workspace) -> None:
    known = trace(place, place.round(2))
    state = place.round(2).read()
    place.round(2).write({key: value for key, value in state.items() if key not in ("git_commit", "verdict")})
    old = trace(place, place.round(2))
    assert old["annotations"] == known["annotations"] and old["git_commit"] == known["git_commit"]
    assert old["parent"] is None and old["gate"]["reason"] == "reason 2"


@pytest.mark.parametrize(
    ("model", "number"),
    [
        ("", 2),
        ("models:/leaves@champion", 2),
        ("models:/leaves/3", 3),
        ("3", 3),
        ("v1", 1),
        ("round/0003", 3),
        ("round 1", 1),
        (f"{2:032x}", 2),
        (f"{17:032x}", 1),
    ],
)
def test_a_model_may_be_named_in_many_ways(history: Workspace, model: str, number: int) -> None:
    assert find_round(history, model).number == number


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/roots@champion", "models:/roots@champion is not of this workspace, whose model is leaves"),
        ("models:/leaves@best", "this workspace knows the alias champion alone"),
        ("v7", "no model v7 here; known: v1, v2, v3; write models:/NAME@champion"),
        ("round/0009", "no model round/0009 here"),
        ("ffff", "no model ffff here"),
    ],
)
def test_a_model_that_is_not_known_is_refused(history: Workspace, model: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_round(history, model)


def test_a_workspace_without_a_model_says_so(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "w")
    with pytest.raises(ValueError, match="has no model yet; `abnloop round open` trains the first"):
        find_round(Workspace(root))


# --- and back


@pytest.mark.parametrize(
    ("question", "rounds", "asked"),
    [
        ({"labeler": ANNA}, [2, 3], [[11], [11, 13]]),
        ({"labeler": "carl@example.com"}, [], []),
        ({"annotation": "13"}, [3], [[13]]),
        ({"annotation": "15"}, [], []),  # collected, but no model has trained since
        ({"round": "1"}, [2, 3], [[11, 12], [11, 12]]),
    ],
)
def test_the_models_that_learned_from_somebody(
    history: Workspace, question: dict[str, str], rounds: list[int], asked: list[list[int]]
) -> None:
    models = models_that_learned(history, question)
    assert rounds_of(models) == rounds
    assert [[one["id"] for one in model["annotations"]] for model in models] == asked
    assert [model["champion"] for model in models] == [number == 2 for number in rounds]


def test_the_models_that_learned_from_a_picture(history: Workspace) -> None:
    """train00 is a training picture from the start; nothing learns from a validation picture, nor from one of the
    pool before it has a label, nor from one that was called unusable."""
    models = models_that_learned(history, {"sample": "train00"})
    assert [(one["round"], one["picture"], len(one["annotations"])) for one in models] == [
        (1, True, 0),
        (2, True, 1),
        (3, True, 1),
    ]
    assert models_that_learned(history, {"sample": "val0"}) == models_that_learned(history, {"sample": "pool0"}) == []
    assert [one["picture"] for one in models_that_learned(history, {"sample": "train03"})] == [True, True, False]


def test_what_a_model_learned_goes_on_with_its_weights(place: Workspace) -> None:
    withdraw(place, {"labeler": ANNA}, "test")
    withdraw(place, {"labeler": BEN}, "test")
    open_round(place, 4, ["train05"], promoted=True, weights="champion")
    state = place.round(4).read()
    parent = {"round": 2, "model_version": "2", "weights": "champion"}
    place.round(4).write({**state, "verdict": {**state["verdict"], "parent": parent}})
    (*_, last) = models_that_learned(place, {"labeler": ANNA})
    assert (last["round"], last["annotations"], last["through"]) == (4, [], 2)
    assert rounds_of(models_that_learned(place, {"annotation": "13"})) == [3]


def test_weights_hand_on_what_was_withdrawn(place: Workspace) -> None:
    open_round(place, 4, [], promoted=True, weights="champion")  # went on from the third, which knows all of SECOND
    assert not learned_withdrawn(place, place.round(4))
    withdraw(place, {"annotation": "13"}, "test")
    assert [learned_withdrawn(place, place.round(number)) for number in (1, 2, 3, 4)] == [False, False, True, True]
    open_round(place, 5, [], promoted=True, weights="champion")
    open_round(place, 6, [], promoted=True)
    assert [learned_withdrawn(place, place.round(number)) for number in (5, 6)] == [True, False]


def test_a_picture_is_known_by_what_it_shows(history: Workspace, tmp_path: Path) -> None:
    original = history.root / "data/images/train05.png"
    copy, other = tmp_path / "renamed.png", tmp_path / "saved again.bmp"
    copy.write_bytes(original.read_bytes())
    with Image.open(original) as image:
        image.save(other)
        pixels = np.asarray(image).copy()
    assert sample_of(history, copy) == sample_of(history, other) == "train05"
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(other)
    with pytest.raises(ValueError, match="no picture of .* shows the same as"):
        sample_of(history, other)


def test_a_deep_picture_is_not_the_one_that_it_would_be_clipped_to(place: Workspace, tmp_path: Path) -> None:
    Image.new("RGB", (SIZE, SIZE), "white").save(place.root / "data/images/train05.png")
    Image.fromarray(np.full((SIZE, SIZE), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="no picture of .* shows the same as"):
        sample_of(place, tmp_path / "deep.png")


def test_the_registry_is_told_no_more_than_it_holds(history: Workspace) -> None:
    """PostgreSQL refuses what is longer than MLflow's column; the newest decisions come first."""
    decision = {"decided": "2026-03-01", "decision": "promoted", "champion": "9", "reason": "accuracy +0.01; " * 8}
    told = describe_history([{**decision, "round": str(n), "model_version": str(n)} for n in range(60)])
    assert len(told) < 5000 and told.endswith("\n…") and "(round 59)" in told and "(round 0)" not in told
    facts = trace(history, history.round(2))
    facts["annotations"] = [{**facts["annotations"][0], "labeler": f"{n:03}@example.com"} for n in range(401)]
    assert "009@example.com (1), 391 others (391); masks used" in describe(facts) and len(describe(facts)) < 5000
    assert "…" not in describe(trace(history, history.round(2)))


def test_a_file_that_is_no_picture_is_refused(history: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.txt is not a picture"):
        sample_of(history, tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"b\.png is not a file"):
        sample_of(history, tmp_path / "b.png")


# --- the champion's history


def test_the_history_of_the_champion_can_be_read_off(place: Workspace) -> None:
    decisions = read_table(place.decisions)
    assert [(one["round"], one["decision"], one["champion"]) for one in decisions] == [
        ("1", "promoted", "1"),
        ("2", "promoted", "2"),
        ("3", "refused", "2"),
    ]
    record(place, place.round(3), place.round(3).read())
    assert read_table(place.decisions) == decisions, "a decision is told once"
    told = describe_history(decisions).splitlines()
    assert told[0] == "The champion is v2."
    assert told[4].startswith("| 2026-03-03") and "v3 (round 3) | refused | v2 | reason 3 |" in told[4]


def test_a_version_is_described_for_a_reviewer(history: Workspace) -> None:
    text = describe(trace(history, history.round(3)))
    assert "Round 3: refused, reason 3." in text
    assert f"Learned from 4 annotations, 2.0 minutes: {ANNA} (2), {BEN} (2); masks used: 0." in text
    assert "After v2 (round 2), trained without its weights." in text


# --- withdrawing


def test_what_is_withdrawn_counts_no_more_and_stays_on_file(place: Workspace) -> None:
    before = place.corrections.read_bytes()
    taken = withdraw(place, {"labeler": ANNA}, "took shadows for symptoms")
    assert [one["id"] for one in taken.annotations] == [11, 13, 15]
    assert rounds_of(taken.models) == [2, 3]
    assert set(read_corrections(place.root)) == {"train01", "train03"}
    assert {sample.id for sample in read_manifest(place.root) if sample.split == "train"} >= {"train00", "train04"}
    assert place.corrections.read_bytes() == before
    assert Git(place.root).is_clean()


def test_a_model_keeps_its_lineage_when_something_is_withdrawn(place: Workspace) -> None:
    withdraw(place, {"labeler": ANNA}, "test")
    assert annotations_of(place, 2) == [11, 12]
    open_round(place, 4, ["train00"], promoted=False)  # a withdrawn sample can be asked about again
    assert annotations_of(place, 4) == [12, 14]


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ({"round": "1"}, {"train02", "train03", "train04"}),
        ({"annotation": "12"}, {"train00", "train02", "train03", "train04"}),
    ],
)
def test_a_round_or_one_annotation_can_be_withdrawn(place: Workspace, question: dict[str, str], left: set[str]) -> None:
    withdraw(place, question, "test")
    assert set(read_corrections(place.root)) == left


def test_a_withdrawal_can_be_undone_and_both_stay_on_file(place: Workspace) -> None:
    before = read_corrections(place.root)
    withdraw(place, {"labeler": ANNA}, "a suspicion")
    back = withdraw(place, {"annotation": "13"}, "it was right", undo=True)
    assert [one["id"] for one in back.annotations] == [13]
    assert set(read_corrections(place.root)) == {"train01", "train02", "train03"}
    withdraw(place, {"labeler": ANNA}, "unfounded", undo=True)
    assert read_corrections(place.root) == before
    lines = read_table(place.withdrawals)
    assert [(one["action"], one["annotation"], one["why"]) for one in lines] == [
        *(("withdraw", number, "a suspicion") for number in ("11", "13", "15")),
        ("restore", "13", "it was right"),
        *(("restore", number, "unfounded") for number in ("11", "15")),
    ]


def test_a_new_answer_counts_in_the_place_of_a_withdrawn_one(place: Workspace) -> None:
    withdraw(place, {"annotation": "11"}, "test")
    rows = {**read_corrections(place.root, withdrawn=True), "train00": said("train00", 16, ANNA, 4)}
    write_table(place.corrections, CORRECTION_COLUMNS, rows.values())
    assert read_corrections(place.root)["train00"]["annotation"] == "16"


def test_where_several_answered_a_sample_each_is_named_and_can_be_withdrawn(place: Workspace) -> None:
    """Without one of them the sample is open again: what the others say together was not said of them alone."""
    together = {**said("train06", 0, "", 3, "map_fixed"), "annotation": "21 22", "labeler": f"{ANNA} {BEN}"}
    singles = [
        {**said("train06", 21, ANNA, 3, "map_fixed"), "minutes": "0.2"},
        {**said("train06", 22, BEN, 3, "map_ok"), "minutes": "0.3"},
    ]
    write_table(place.round(3).corrections, list(singles[0]), singles)
    collect(place, 3, [together])
    open_round(place, 4, [], promoted=False)
    named = [one for one in trace(place, place.round(4))["annotations"] if one["sample"] == "train06"]
    assert [(one["id"], one["labeler"], one["minutes"], one["verdict"]) for one in named] == [
        (21, ANNA, 0.2, "map_fixed"),
        (22, BEN, 0.3, "map_ok"),
    ]
    assert rounds_of(models_that_learned(place, {"annotation": "22"})) == [4]
    withdraw(place, {"annotation": "22"}, "test")
    assert "train06" not in read_corrections(place.root)
    withdraw(place, {"annotation": "22"}, "test", undo=True)
    assert "train06" in read_corrections(place.root)


@pytest.mark.parametrize(
    ("question", "why", "undo", "message"),
    [
        ({"labeler": "carl"}, "test", False, "no annotation counts of labeler carl"),
        ({"labeler": ANNA}, "test", True, f"no annotation was withdrawn of labeler {ANNA}"),
        ({"labeler": ANNA}, "  ", False, "--why is empty"),
    ],
)
def test_a_withdrawal_of_nothing_is_refused(
    place: Workspace, question: dict[str, str], why: str, undo: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        withdraw(place, question, why, undo)
    assert not place.withdrawals.exists()


def test_nothing_is_withdrawn_while_a_round_is_being_opened(place: Workspace) -> None:
    place.round(4).write({"round": 4, "state": "begun"})
    with pytest.raises(ValueError, match="opening round 4 was interrupted; finish it with `abnloop round open`"):
        withdraw(place, {"labeler": ANNA}, "test")


# --- as commands


def test_the_command_tells_it_in_words_as_json_and_as_a_page(history: Workspace, abnloop: Run, tmp_path: Path) -> None:  # noqa: F811
    place, page = ["--workspace", str(history.root)], tmp_path / "lineage.html"
    code, text, _ = abnloop("lineage", "--report", str(page), *place)
    assert code == 0
    for words in ("leaves v2, round 2, the champion", "promoted: reason 2", ANNA, "v1: asked in round 1"):
        assert words in text
    code, told, _ = abnloop("lineage", "models:/leaves@champion", "--json", *place)
    assert code == 0 and json.loads(told) == {**trace(history, history.round(2)), "champion": True}
    html = page.read_text()
    assert html.count("<rect") == 9  # v1, round 1, two people, data, code, v2, the champion before, the verdict
    assert not re.search(r"(src|href)=|url\(|@import", html), "it needs no other file"


def test_the_command_tells_who_learned_from_somebody(history: Workspace, abnloop: Run) -> None:  # noqa: F811
    place = ["--workspace", str(history.root)]
    code, text, _ = abnloop("lineage", "--labeler", ANNA, *place)
    assert code == 0 and "annotations 11, 13" in text and "champion" in text
    code, told, _ = abnloop("lineage", "--image", str(history.root / "data/images/train00.png"), "--json", *place)
    assert code == 0 and json.loads(told) == models_that_learned(history, {"sample": "train00"})
    code, text, _ = abnloop("lineage", "--annotation", "99", *place)
    assert code == 0 and "no model learned from annotation 99" in text


def test_the_command_withdraws_and_names_the_models(place: Workspace, abnloop: Run) -> None:  # noqa: F811
    words = ["withdraw", "--labeler", ANNA, "--why", "took shadows for symptoms", "--workspace", str(place.root)]
    code, text, _ = abnloop(*words)
    assert code == 0 and "3 annotations are withdrawn" in text and "trains without them" in text
    assert re.search(r"v2 +2 +champion", text) and re.search(r"v3 +3 +refused", text)
    code, text, _ = abnloop(*words, "--undo")
    assert code == 0 and "3 annotations count again" in text


def test_a_graph_of_many_people_stays_readable(history: Workspace) -> None:
    facts = trace(history, history.round(2))
    (one, *_) = facts["annotations"]
    crowd = [{**one, "labeler": f"person{n}@example.com", "round": n} for n in range(40) for _ in range(n + 1)]
    graph = layout({**facts, "annotations": crowd})
    titles = [node["title"] for node in graph["nodes"]]
    assert "person39@example.com" in titles and "person0@example.com" not in titles
    assert titles.count("other people") == titles.count("other rounds") == 1 and len(titles) < 35
    places = {(node["x"], node["y"]) for node in graph["nodes"]}
    assert len(places) == len(titles)
    assert (
        max(x for x, _ in places) + BOX[0] <= graph["width"] and max(y for _, y in places) + BOX[1] <= graph["height"]
    )
