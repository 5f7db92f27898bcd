"""The steps of a round one by one, on the history that test_lineage.py writes by hand: no service, no DVC."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from abn.manifest import CORRECTION_COLUMNS, WITHDRAWAL_COLUMNS, read_corrections, read_manifest
from flows import rounds
from flows.growing import ingest
from flows.ingest import change_settings
from flows.reconcile import reconcile
from flows.versions import Dvc, Git
from flows.withdrawals import withdraw
from flows.workspace import Round, Workspace, write_atomically, write_json, write_table
from labeling.tasks import verdict_results
from test_lineage import ANNA, BEN, history, open_round, place, said  # noqa: F401 - fixtures
from tiny import SIZE


@pytest.fixture(autouse=True)
def _no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is called outside a flow logs as anything else does."""
    monkeypatch.setattr(rounds, "get_run_logger", lambda: logging.getLogger(__name__))


@pytest.mark.parametrize("command", ["round open", "round collect", "round reconcile", "ingest", "withdraw"])
def test_while_an_old_round_is_checked_out_nothing_is_written(place: Workspace, command: str) -> None:  # noqa: F811
    git = Git(place.root)
    git.tag("round/0001")
    git.checkout("round/0001")
    do: dict[str, Callable[[], object]] = {
        "round open": lambda: rounds.open_round.fn(str(place.root)),
        "round collect": lambda: rounds.collect_round.fn(str(place.root)),
        "round reconcile": lambda: reconcile(place, fix=True),
        "ingest": lambda: ingest(place),
        "withdraw": lambda: withdraw(place, {"labeler": ANNA}, "test"),
    }
    with pytest.raises(ValueError, match="an old round is checked out; `git checkout main && dvc checkout` first$"):
        do[command]()
    assert git.is_clean() and git.head() == git.commit_of("round/0001") and not place.state.exists()


# --- what labelers say


def a_task(number: int, sample: str, *annotations: dict[str, Any]) -> dict[str, Any]:
    """A task as Label Studio gives it."""
    image = f"/data/local-files/?d=data/images/{sample}.png"
    data = {"sample": sample, "image": image, "height": SIZE, "width": SIZE, "model_version": "v4"}
    updated = max((one["updated_at"] for one in annotations), default="2026-03-04T00:00:00Z")
    told = {"id": number, "updated_at": updated, "data": data, "annotations": list(annotations)}
    return {**told, "total_annotations": len(annotations), "cancelled_annotations": 0}


def an_annotation(number: int, labeler: str, hour: int = 10, verdict: str = "unusable") -> dict[str, Any]:
    """One of the fourth of March, while round 4 is open."""
    return {
        "id": number,
        "labeler": labeler,
        "updated_at": f"2026-03-04T{hour}:00:00Z",
        "lead_time": 30.0,
        "result": verdict_results(verdict),
    }


def ask(place: Workspace, asked: dict[str, int], *received: dict[str, Any]) -> Round:  # noqa: F811
    """Round 4 asks about samples, each its task, and has pulled some of the tasks, later ones as they changed."""
    round_ = place.round(4)
    write_json(place.round(1).tasks, {"project": 1, "tasks": {"train00": 1}})
    write_json(round_.tasks, {"project": 1, "tasks": asked})
    round_.write({"round": 4, "state": "open", "opened": "2026-03-04T02:00:00+00:00"})
    write_atomically(round_.annotations, "".join(json.dumps(one) + "\n" for one in received))
    return round_


def learn(place: Workspace, round_: Round) -> dict[str, str]:  # noqa: F811
    """Take in what was received; the annotations that count by sample."""
    rounds.learn_from.fn(place, round_, rounds.read_answers(place, round_))
    return {sample: row["annotation"] for sample, row in read_corrections(place.root).items()}


def test_an_answer_is_of_the_sample_that_was_asked_whatever_its_task_says(place: Workspace) -> None:  # noqa: F811
    """Whoever labels may edit a task: its sample to one of the test set, its size to one that no memory holds."""
    before = {one.id: one.label for one in read_manifest(place.root)}
    answer = {**an_annotation(60, BEN), "result": verdict_results("label_wrong", "dark")}
    edited = a_task(41, "train05", answer)
    edited["data"] |= {"sample": "test1", "height": 10**6, "width": 10**6}
    elsewhere = a_task(42, "train07", {**answer, "id": 61})
    elsewhere["data"]["image"] = "/data/local-files/?d=data/images/test1.png"
    unasked = a_task(99, "test3", {**answer, "id": 62})
    round_ = ask(place, {"train05": 41, "train07": 42}, edited, elsewhere, unasked)
    answers = rounds.read_answers(place, round_)
    assert [(one.sample, one.label) for one in answers.corrections] == [("train05", "dark")]
    assert answers.gold == [] and answers.complete
    (left,) = answers.set_aside
    assert (left.annotation, left.sample) == (61, "train07")
    assert left.reason == "task 42 asks about train07, but it shows '/data/local-files/?d=data/images/test1.png'"
    told = "\n".join(answers.changed)
    assert "task 41 says sample 'test1', height '1000000'" in told and "task 99 was asked by no round" in told
    rounds.learn_from.fn(place, round_, answers)
    after = {one.id: one.label for one in read_manifest(place.root)}
    assert {name for name in after if after[name] != before[name]} == {"train05"}


def test_a_label_on_file_is_not_changed_by_a_map_that_is_called_fine(place: Workspace) -> None:  # noqa: F811
    """An image without a label gets the class that was shown with the map, so a task must not say that it has none."""
    edited = a_task(41, "train05", an_annotation(60, BEN, verdict="whole_image"))
    edited["meta"] = {"label": "", "predicted": "dark"}
    answers = rounds.read_answers(place, ask(place, {"train05": 41}, edited))
    assert [(one.sample, one.label) for one in answers.corrections] == [("train05", None)]


CHANGED = a_task(1, "train00", an_annotation(11, ANNA, hour=12))  # what she had said in round 1


def test_a_withdrawn_answer_that_is_changed_leaves_the_one_that_replaced_it(place: Workspace) -> None:  # noqa: F811
    withdraw(place, {"annotation": "11"}, "test")
    rows = {**read_corrections(place.root, withdrawn=True), "train00": said("train00", 60, BEN, 3)}
    write_table(place.corrections, CORRECTION_COLUMNS, rows.values())
    assert learn(place, ask(place, {}, CHANGED))["train00"] == "60"


@pytest.mark.parametrize("labeler", [ANNA, BEN])
def test_a_withdrawn_answer_that_is_changed_leaves_the_one_that_replaces_it_now(
    place: Workspace,  # noqa: F811
    labeler: str,
) -> None:
    withdraw(place, {"annotation": "11"}, "test")
    round_ = ask(place, {"train00": 41}, CHANGED, a_task(41, "train00", an_annotation(60, labeler)))
    assert learn(place, round_)["train00"] == "60"


def test_a_withdrawn_answer_that_nobody_replaced_is_restored_as_it_was_changed(place: Workspace) -> None:  # noqa: F811
    withdraw(place, {"annotation": "11"}, "test")
    assert "train00" not in learn(place, ask(place, {"train00": 41}, CHANGED))
    withdraw(place, {"annotation": "11"}, "test", undo=True)
    assert read_corrections(place.root)["train00"]["verdict"] == "unusable"


class Studio:
    """A Label Studio of a few tasks."""

    def __init__(self, *tasks: dict[str, Any]) -> None:
        self.tasks = {task["id"]: task for task in tasks}

    def _of(self, task_ids: Sequence[int], annotated: bool) -> list[dict[str, Any]]:
        known = [self.tasks[number] for number in task_ids if number in self.tasks]
        return [task for task in known if bool(task["annotations"]) == annotated]

    def changes(self, project: int, task_ids: Sequence[int]) -> dict[int, str]:
        return {task["id"]: task["updated_at"] for task in self._of(task_ids, annotated=True)}

    def answered(self, project: int, task_ids: Sequence[int]) -> list[dict[str, Any]]:
        return self._of(task_ids, annotated=True)

    def unanswered(self, project: int, task_ids: Sequence[int]) -> list[dict[str, Any]]:
        return self._of(task_ids, annotated=False)


def test_an_answer_that_is_deleted_while_its_round_is_open_does_not_count(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that is gone with its answer keeps it, so that the round can close."""
    answered = [a_task(41 + n, f"train0{5 + n}", an_annotation(60 + n, BEN)) for n in range(3)]
    studio = Studio(*answered)
    monkeypatch.setattr(rounds, "label_studio", lambda place: studio)
    round_ = ask(place, {task["data"]["sample"]: task["id"] for task in answered})

    def pull() -> tuple[int, bool, list[str]]:
        rounds.pull.fn(place, round_, list(studio.tasks | {43: None}))
        answers = rounds.read_answers(place, round_)
        return answers.answered, answers.complete, [one.sample for one in answers.corrections]

    assert pull() == (3, True, ["train05", "train06", "train07"])
    studio.tasks[41] = a_task(41, "train05")
    del studio.tasks[43]
    assert pull() == (2, False, ["train06", "train07"])
    kept = round_.annotations.read_text()
    assert pull() == (2, False, ["train06", "train07"]) and round_.annotations.read_text() == kept
    studio.tasks[41] = a_task(41, "train05", an_annotation(63, ANNA, hour=13))
    assert pull() == (3, True, ["train05", "train06", "train07"])


# --- opening


def test_a_loop_that_was_stopped_goes_on_where_something_is_withdrawn(place: Workspace) -> None:  # noqa: F811
    change_settings(place.params, {"stop.minutes": 1})
    Git(place.root).commit(["params.yaml"], "Enough")
    open_round(place, 4, [], promoted=False)
    stopped = {"state": "closed", "stopped": "enough", "minutes": 2.0, "collected": 0}
    place.round(4).write({**place.round(4).read(), **stopped})
    Git(place.root).commit(["rounds"], "[round 4] Learn from 0 corrections")
    Git(place.root).tag("round/0004")
    assert rounds.nothing_to_open(place).startswith("labelers spent 2.0 minutes")
    withdraw(place, {"labeler": ANNA}, "test")
    assert rounds.nothing_to_open(place) == ""
    open_round(place, 4, [], promoted=False)  # once more, without them
    place.round(4).write({**place.round(4).read(), **stopped})
    assert rounds.nothing_to_open(place).startswith("labelers spent 2.0 minutes")


@pytest.fixture(params=["in round.json", "in the champion alone"])
def judged(place: Workspace, request: pytest.FixtureRequest) -> Round:  # noqa: F811
    """A round that was interrupted when its model, 111..., had been promoted; and where that can be seen."""
    round_ = place.round(3)
    state = {**round_.read(), "state": "begun"}
    state["verdict"]["model"] = "1" * 32
    if request.param == "in the champion alone":
        write_json(place.champion_record, {"round": 3, "model_version": "3"})
        state = {name: state[name] for name in ("round", "state", "mlflow_runs", "verdict")}
    round_.write(state)
    return round_


def test_a_round_that_has_judged_a_model_trains_no_other(
    place: Workspace,  # noqa: F811
    judged: Round,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Settings or code changed meanwhile; the model that was judged is still there when they are as they were."""
    Git(place.root).tag("round/0001")
    Git(place.root).commit(["rounds", "models"], "Interrupted")
    monkeypatch.setattr(Dvc, "missing", lambda self: [])
    monkeypatch.setattr(Dvc, "is_current", lambda self, stage: stage != "train")
    with pytest.raises(ValueError, match="^round 3 has judged another model; undo what changed since "):
        rounds.check_before_opening(place)


def test_a_round_that_has_judged_a_model_takes_no_other(
    place: Workspace,  # noqa: F811
    judged: Round,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a `dvc repro` of somebody else's."""
    monkeypatch.setattr(Dvc, "hashes", lambda self: {"results/model.pt": "2" * 32})
    known = judged.read()
    since = f"commit {known['git_commit'][:10]}" if "git_commit" in known else "it was opened"
    with pytest.raises(ValueError, match=f"^round 3 has judged another model; undo what changed since {since}, "):
        rounds.weigh.fn(place, judged)
    monkeypatch.setattr(Dvc, "hashes", lambda self: {"results/model.pt": "1" * 32})
    rounds.weigh.fn(place, judged)
    assert judged.read() == known


@pytest.mark.parametrize("withdrawn", [False, True])
def test_what_a_training_starts_from_is_not_written_through_a_link(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    withdrawn: bool,
) -> None:
    """DVC may link models/start.pt to the object in its cache, which is the start of an earlier round."""
    monkeypatch.setattr(Dvc, "add", lambda self, paths: [])
    write_table(place.withdrawals, WITHDRAWAL_COLUMNS, [])
    change_settings(place.params, {"train.start": "champion"})
    place.champion.write_text("the champion")
    cached = tmp_path / "cached"
    cached.write_text("an earlier start")
    place.start_model.unlink()
    place.start_model.hardlink_to(cached)
    if withdrawn:
        withdraw(place, {"labeler": BEN}, "test")
    rounds.begin.fn(place)
    assert place.start_model.read_text() == ("" if withdrawn else "the champion")
    assert cached.read_text() == "an earlier start"
