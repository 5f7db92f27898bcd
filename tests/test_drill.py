"""The loop is killed, starved and lied to: a selection of benchmarks/drill.py, with real services started once."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial

import httpx
import numpy as np
import pytest
from PIL import Image

from abn.manifest import read_manifest
from benchmarks import drill as drills
from benchmarks.drill import Case, Drill, Undisturbed
from flows import services
from flows.answering import Answer, Picture, read_picture
from flows.inbox import open_inbox
from flows.ingest import change_settings
from flows.versions import Dvc, Git
from flows.workspace import Workspace, read_json, write_arrays
from labeling.client import LabelStudio
from labeling.tasks import mask_result, verdict_results

pytestmark = [pytest.mark.studio, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with drills.drill_in(tmp_path_factory.mktemp("drill") / "here") as drill:
        yield drill


@pytest.fixture(scope="module")
def undisturbed(drill: Drill) -> Undisturbed:
    return drill.undisturbed()


@pytest.fixture
def answered(drill: Drill, undisturbed: Undisturbed) -> Callable[[], Workspace]:
    """Makes a copy whose batch is answered and not collected."""
    return partial(drill.copy, undisturbed.answered, rename=False)


def check(case: Case, resumed: bool = True) -> None:
    assert case.differs == {}, case.seen
    assert case.same and case.resumed is resumed


def test_an_undisturbed_round_is_whole(undisturbed: Undisturbed) -> None:
    opened, closed = undisturbed.opened, undisturbed.closed
    assert opened["state"] == "open" and closed["state"] == "closed"
    assert list(opened["tasks in Label Studio"].values()) == [1] * drills.BUDGET
    assert len(closed["corrections"]) == drills.BUDGET and closed["annotations"] == [1] * drills.BUDGET
    assert opened["runs"] == closed["runs"] == {"evaluate": 1, "round": 1, "select": 1, "train": 1}
    assert opened["points of the curve"] == [2] and opened["model versions of the round"] == 1
    assert closed["tags"] == ["round/0001"] and not closed["not committed"] and not closed["not in the cache"]
    assert not closed["resumed"]


@pytest.mark.parametrize(
    ("when", "point"),
    [("during", "control"), ("after", "register"), ("before", "commit")],
)
def test_opening_that_is_killed_comes_to_the_same_end(
    drill: Drill, undisturbed: Undisturbed, when: str, point: str
) -> None:
    case = drills.killed_opening(drill, when, point, undisturbed.opened)
    assert case.seen[0] == "killed (SIGKILL)"
    check(case)


@pytest.mark.parametrize(("when", "point"), [("after", "write masks"), ("before", "tag")])
def test_collecting_that_is_killed_comes_to_the_same_end(
    drill: Drill, undisturbed: Undisturbed, answered: Callable[[], Workspace], when: str, point: str
) -> None:
    case = drills.killed_collecting(drill, when, point, undisturbed.closed, answered)
    assert case.seen[0] == "killed (SIGKILL)"
    check(case)


def test_label_studio_that_answers_by_half_gets_each_task_once(drill: Drill, undisturbed: Undisturbed) -> None:
    case = drills.label_studio_fails(drill, "half", 3, undisturbed.opened)
    check(case, resumed=False)
    assert len(case.seen) == 1, "the run goes through"


def test_training_goes_on_without_mlflow_and_its_curve_is_logged_after(drill: Drill, undisturbed: Undisturbed) -> None:
    check(drills.mlflow_is_down_while_training(drill, undisturbed.opened), resumed=False)


@pytest.mark.parametrize(
    "disturb", [drills.remote_is_out_of_reach, drills.the_disk_is_full, drills.the_clock_is_set_back]
)
def test_collecting_survives(
    drill: Drill, undisturbed: Undisturbed, answered: Callable[[], Workspace], disturb: Callable[..., Case]
) -> None:
    case = disturb(drill, undisturbed.closed, answered)
    check(case, resumed=case.resumed)


def test_two_workspaces_train_one_after_the_other_though_nothing_was_ever_served(
    drill: Drill, undisturbed: Undisturbed
) -> None:
    check(drills.two_workspaces_train(drill, undisturbed.opened), resumed=False)


def test_the_training_slot_of_a_killed_run_goes_to_who_waits_for_it(drill: Drill, undisturbed: Undisturbed) -> None:
    case = drills.killed_with_the_only_slot(drill, undisturbed.opened)
    assert case.seen[0] == "killed (SIGKILL)"
    check(case, resumed=False)


def test_of_two_loops_on_one_workspace_the_second_ends_at_once(drill: Drill, undisturbed: Undisturbed) -> None:
    case = drills.two_at_once(drill, undisturbed.opened)
    check(case, resumed=False)
    assert "is in use by `abnloop round open`" in case.seen[1]


# --- reconcile


@pytest.fixture(scope="module")
def damaged(drill: Drill) -> Workspace:
    """A closed round, with something wrong in each of the four places."""
    place = drill.trained()
    for flow in ("open", "simulate", "collect"):
        drill.run(place, flow)
    known, round_ = services.addresses(place), place.round(1)
    studio, asked = LabelStudio(known.label_studio, known.label_studio_token), read_json(round_.tasks)
    sample, *_, other = sorted(asked["tasks"])
    for name, number in ((sample, 7), ("nobody", 1)):  # a task that no round asks, and one without a sample
        data = {**studio.task(asked["tasks"][sample])["data"], "sample": name, "round": number}
        studio._api.projects.import_tasks(id=asked["project"], request=[{"data": data}])
    studio.annotate(asked["tasks"][other], verdict_results("unusable"), 1.0)  # never collected
    with np.load(round_.masks) as masks:
        write_arrays(round_.masks, [*masks.items(), (name := "stray", np.ones((16, 16), np.uint8))])
    assert name not in asked["tasks"]
    subprocess.run(["git", "tag", "-d", round_.tag], cwd=place.root, check=True, capture_output=True)
    md5 = Dvc(place.root).hashes()["results/model.pt"]
    (place.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).unlink()
    httpx.request(
        "DELETE",
        f"{known.mlflow}/api/2.0/mlflow/registered-models/alias",
        json={"name": drills.place_name(place), "alias": "champion"},
        trust_env=False,
    ).raise_for_status()
    return place


def reconciled(drill: Drill, place: Workspace, flow: str = "reconcile") -> list[tuple[str, str, bool]]:
    ended = drill.run(place, flow)
    assert ended.code == 0, ended.said
    return [(where, what, mended) for where, what, mended in json.loads(ended.said)]


def test_a_round_that_went_well_has_no_differences(drill: Drill, undisturbed: Undisturbed) -> None:
    assert reconciled(drill, undisturbed.place) == []


def test_every_difference_is_told_and_what_is_safe_is_mended(drill: Drill, damaged: Workspace) -> None:
    patterns = {
        r"task \d+ \(sample train\d+, round 7\) is asked by no round": True,
        r"task \d+ is about 'nobody', which is no sample": False,
        r"task \d+ of round 1 was answered or changed after the round had closed": False,
        r"rounds/0001/masks\.npz has a mask of stray that no annotation gave": False,
        r"round 1 is closed and has no tag": False,
        r"model version 1 stands on model [0-9a-f]{10}, which the DVC cache lacks": False,
        r"the champion is version 1 here, and not there": True,
    }
    told = reconciled(drill, damaged)
    fixed = {what: mended for _, what, mended in reconciled(drill, damaged, "reconcile --fix")}
    left = {what for _, what, _ in reconciled(drill, damaged)}
    assert not any(mended for _, _, mended in told)
    for pattern, safe in patterns.items():
        (what,) = [what for _, what, _ in told if re.fullmatch(pattern, what)]
        assert fixed[what] is safe and (what in left) is not safe, what
    assert left == {what for what, mended in fixed.items() if not mended}


# --- the end


def test_the_pool_grows_by_what_was_captured_and_is_asked_until_nothing_is_left(
    drill: Drill, undisturbed: Undisturbed
) -> None:
    place = drill.copy(undisturbed.place, rename=False)
    left = 24 - drills.BUDGET + 1
    change_settings(place.params, {"selection.budget": left + 1})
    Git(place.root).commit(["params.yaml"], "More than there is")
    content = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), (9, 90, 200), np.uint8)).save(content, "PNG")
    seen = read_picture("blue.png", content.getvalue(), (16, 16))
    assert isinstance(seen, Picture)
    unsure = Answer({"light": 0.55, "dark": 0.45}, 0.2, np.zeros((4, 4), np.float32))
    assert open_inbox(place).keep(seen, unsure, "v1", "low confidence (55%)")

    assert drill.run(place, "ingest").said == "1 captured pictures joined the pool, 0 were left out"
    assert f"round 2: {left} tasks wait in Label Studio" in drill.run(place, "open").said
    known, asked = services.addresses(place), read_json(place.round(2).tasks)["tasks"]
    studio = LabelStudio(known.label_studio, known.label_studio_token)
    (captured,) = set(asked) - {one.id for one in read_manifest(undisturbed.place.root)}
    assert "; no label yet" in studio.task(asked[captured])["data"]["asked_because"]
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    said = [mask_result(mask, "bitmask"), *verdict_results("label_wrong", "dark")]
    studio.annotate(asked[captured], said, 20.0)
    drill.run(place, "simulate")
    assert f"round 2 is closed with {left} corrections" in drill.run(place, "collect").said
    assert {one.id: one.label for one in read_manifest(place.root)}[captured] == "dark"

    again, closed, idle = (drill.run(place, flow) for flow in ("open", "collect", "open"))
    assert "round 3: asks nobody: every picture of the pool is answered" in again.said
    assert again.outcome["runs"]["train"] == 1 and "round 3 is closed with 0 corrections" in closed.said
    assert idle.said == "every picture of the pool is answered; `abnloop ingest` brings new ones"
