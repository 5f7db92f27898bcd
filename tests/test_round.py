"""The whole loop, as a person runs it: real git, DVC, Prefect, MLflow and Label Studio, and three classes of digits.

Each fixture is one thing that happens, in the order of the file, and keeps what could be seen then; the tests look.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import os
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import yaml

from abn.config import read_params
from abn.manifest import mask_sha256, read_corrections, read_manifest
from abn.predictions import Predictions, read_predictions
from flows import services
from flows.gallery import GAP, TILE
from flows.ingest import change_settings, init_workspace
from flows.people import latest_annotations
from flows.summary import summarise
from flows.versions import Dvc, Git
from flows.workspace import Workspace, open_workspace, read_json, read_table, write_json
from labeling.client import LabelStudio, LabelStudioUnreachable, TokenRefused
from labeling.screen import reason_shown
from labeling.tasks import as_mask, mask_result, read_mask, verdict_results
from tiny import write_few_digits

if TYPE_CHECKING:  # both read their settings when they are imported: first the servers, then the import
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from prefect.client.schemas.objects import FlowRun

    from flows.rounds import Collected, Idle, Opened

pytestmark = [
    pytest.mark.studio,
    pytest.mark.timeout(900),  # a test that is run alone waits for two rounds
    # The SDK exchanges the personal tokens of simulated labelers with a call that pydantic 2 has renamed.
    pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated"),
]

PROJECT = Path(__file__).resolve().parent.parent
CLASSES, COUNTS = ("0", "1", "7"), {"train": 30, "val": 8, "test": 8}  # pictures a class
EPOCHS, BUDGET = 3, 6
NAME = "digits"  # of the workspace, and so of the experiment and the model
SETTINGS = {
    "data.flip": False,
    "model.backbone": "cifar_resnet8",
    "train.epochs": EPOCHS,
    "train.batch_size": 32,
    "selection.budget": BUDGET,
    "flows.retrain_cron": "30 4 1 1 *",
    "flows.collect_cron": "*/7 * * * *",
    **{f"services.{name}_port": 0 for name in ("label_studio", "prefect", "mlflow", "live")},
}

# What a loop with S3 and a Label Studio elsewhere is given; nothing here uses it, everything could write it down.
SECRETS_OF_THE_ENVIRONMENT = {name: secrets.token_hex(16) for name in ("AWS_SECRET_ACCESS_KEY", "LABEL_STUDIO_API_KEY")}


class Killed(BaseException):
    """What nobody catches, as a signal would end the process."""


def snapshot(place: Workspace) -> dict[str, str]:
    """Every file that git or DVC keeps with the hash of its content, and git's HEAD."""
    hidden = {".git", ".dvc", ".abnloop", "__pycache__", "heatmaps", "comparison.png"}
    scratch = tuple(f"results/control/{name}/" for name in ("predictions", "plots"))  # on the way to its metrics
    files = [path for path in place.root.rglob("*") if path.is_file()]
    kept = [path for path in files if not hidden & set(path.relative_to(place.root).parts)]
    kept = [path for path in kept if not place.relative(path).startswith(scratch)]
    hashes = {place.relative(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
    return {"HEAD": Git(place.root).head(), **hashes}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tool(
    place: Workspace, *words: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A module of this Python as a command in the workspace, with none of the services' addresses."""
    known = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    known["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), known["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd or place.root,
        env={**known, "DVC_NO_ANALYTICS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def abnloop(place: Workspace, *words: str) -> str:
    """What the command prints; it must succeed."""
    done = tool(place, "flows.cli", *words, "--workspace", str(place.root), cwd=PROJECT, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_open(place: Workspace) -> Opened:
    from flows import rounds

    opened = rounds.open_round(str(place.root))
    assert isinstance(opened, rounds.Opened)
    return opened


def run_collect(place: Workspace) -> Collected:
    from flows import rounds

    collected = rounds.collect_round(str(place.root))
    assert isinstance(collected, rounds.Collected)
    return collected


# --- what happens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace of 90 pictures to learn from, its services up, this process connected to them."""
    root = tmp_path_factory.mktemp("round")
    environment = dict(os.environ)
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", **SECRETS_OF_THE_ENVIRONMENT)
    index = write_few_digits(root / "source", CLASSES, COUNTS)
    home = root / "a folder"  # paths with spaces are everybody's
    home.mkdir()
    init_workspace(PROJECT, home / NAME, root / "source", index=index, settings=SETTINGS)
    workspace = open_workspace(home / NAME)
    try:
        services.up(workspace)
        services.connect(workspace)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns of its own types while it is imported
            importlib.import_module("mlflow.pyfunc")
        yield workspace
    finally:
        services.disconnect()
        services.down(workspace)
        os.environ.clear()
        os.environ.update(environment)


@dataclass(frozen=True)
class Refusal:
    message: str
    changed: bool


@pytest.fixture(scope="module")
def refused(place: Workspace) -> dict[str, Refusal]:
    """Before the first round: everything that must stop it."""
    from flows import rounds

    def attempt(*errors: type[Exception]) -> Refusal:
        before = snapshot(place)
        with pytest.raises(errors or (ValueError,)) as raised:
            rounds.open_round(str(place.root))
        return Refusal(str(raised.value), snapshot(place) != before)

    def with_setting(name: str, value: Any) -> Refusal:
        section, _, key = name.partition(".")
        text = place.params.read_text()
        if key in read_params(place.params)[section]:
            change_settings(place.params, {name: value})
        else:  # a key that nobody knows
            place.params.write_text(text.replace(f"\n{section}:", f"\n{section}:\n  {key}: {value}", 1))
        try:
            return attempt()
        finally:
            place.params.write_text(text)

    seen = {name: with_setting(name, value) for name, value in REFUSED_SETTINGS.items()}

    stray = place.root / "notes.txt"
    stray.write_text("not committed")
    seen["dirty tree"] = attempt()
    stray.unlink()

    secret = read_json(place.secrets)
    write_json(place.secrets, {**secret, "token": "0" * 40}, mode=0o600)
    seen["token"] = attempt(TokenRefused)
    write_json(place.secrets, secret, mode=0o600)

    records = read_json(place.services)
    nowhere = {**records["label_studio"], "url": "http://127.0.0.1:9"}
    write_json(place.services, {**records, "label_studio": nowhere})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "LabelStudio", partial(LabelStudio, patience=0.5))
        seen["unreachable"] = attempt(LabelStudioUnreachable)
    write_json(place.services, records)

    hold = "import sys; from flows.workspace import *\nwith Workspace(sys.argv[1]).lock('round open'): print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(place.root)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout and other.stdout.readline()
        before = snapshot(place)
        held = rounds.open_round(str(place.root))
        assert isinstance(held, rounds.Idle) and held.in_use
        seen["lock"] = Refusal(held.why.replace(str(other.pid), "PID"), snapshot(place) != before)
        other.communicate(b"\n")

    cached, hidden = place.root / ".dvc/cache", place.state / "cache"
    cached.rename(hidden)
    images = place.images.rename(place.state / "images")
    seen["cache"] = attempt()
    images.rename(place.images)
    shutil.rmtree(cached, ignore_errors=True)
    hidden.rename(cached)

    with pytest.raises(ValueError) as raised:
        rounds.simulate_labelers(place)
    seen["nothing to simulate"] = Refusal(str(raised.value), False)
    return seen


REFUSED_SETTINGS = {
    "selection.budget": 91,
    "train.epoch": 5,
    "predict.batchsize": 1,
    "labeling.minimun": 1,
    "project.name": "no spaces",
}


@dataclass(frozen=True)
class Kill:
    state: dict[str, Any]  # round.json
    runs: list[str]
    model: tuple[int, int]  # of its file: when it was written, its inode
    tasks: int
    head: str


@pytest.fixture(scope="module")
def killed(place: Workspace, refused: dict[str, Refusal]) -> Kill:
    """The first round: it trains, and is killed when two of its tasks are pushed."""
    from flows.rounds import label_studio, open_round

    head = Git(place.root).head()
    push = LabelStudio.push

    def push_two(self: LabelStudio, project: int, tasks: list[dict[str, Any]], *rest: Any) -> dict[str, int]:
        push(self, project, tasks[:2])
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LabelStudio, "push", push_two)
        with pytest.raises(Killed):
            open_round(str(place.root))
    return Kill(
        place.round(1).read(),
        sorted(run.info.run_id for run in runs_of(place)),
        (place.model.stat().st_mtime_ns, place.model.stat().st_ino),
        len(all_tasks(label_studio(place))),
        head,
    )


@dataclass(frozen=True)
class Open:
    opened: Opened
    tasks: dict[int, dict[str, Any]]  # as Label Studio has them
    asked: dict[str, Any]  # tasks.json
    predictions: Predictions
    model: tuple[int, int]
    runs: list[str]


def look_at_open(place: Workspace, opened: Opened) -> Open:
    from flows.rounds import label_studio

    studio = label_studio(place)
    asked = read_json(place.round(opened.round).tasks)
    return Open(
        opened,
        {task: studio.task(task) for task in all_tasks(studio, opened.round)},
        asked,
        read_predictions(place.predictions),
        (place.model.stat().st_mtime_ns, place.model.stat().st_ino),
        sorted(run.info.run_id for run in runs_of(place)),
    )


def all_tasks(studio: LabelStudio, round_number: int | None = None) -> list[int]:
    """Ids of the tasks that Label Studio has, of one round or all of them."""
    tasks = list(studio._api.tasks.list(project=1, page_size=100))
    return sorted(task.id for task in tasks if round_number in (None, task.data["round"]))


@pytest.fixture(scope="module")
def first(place: Workspace, killed: Kill) -> Open:
    """The same round again: it goes on."""
    return look_at_open(place, run_open(place))


@dataclass(frozen=True)
class Pause:
    again: Opened  # opened while open
    changed_by_opening: bool
    unanswered: Collected
    partly: Collected
    changed_by_a_part: set[str]
    again_partly: Opened
    changed_by_opening_partly: bool
    pushed_again: dict[str, int]
    tasks_after: list[int]
    broken: int  # task with an annotation that nobody can use


@pytest.fixture(scope="module")
def paused(place: Workspace, first: Open) -> Pause:
    """While labelers think: everything is called once more, and one of them submits an empty mask."""
    from prefect import flow

    from flows.rounds import ask, label_studio

    studio, round_ = label_studio(place), place.round(1)
    before = snapshot(place)
    again = run_open(place)
    changed = snapshot(place) != before
    unanswered = run_collect(place)

    # As if it had been killed after the push and before it said so.
    state = round_.read()
    round_.write({key: value for key, value in state.items() if key not in ("opened", "project")} | {"state": "begun"})
    round_.tasks.unlink()
    flow(name="ask-again")(lambda: ask(place, round_))()
    pushed_again = read_json(round_.tasks)["tasks"]
    write_json(round_.state, state)

    sample = min(first.asked["tasks"])
    broken = first.asked["tasks"][sample]
    height, width = (first.tasks[broken]["data"][side] for side in ("height", "width"))
    nothing = mask_result(np.zeros((height, width), np.uint8), "bitmask")
    studio.annotate(broken, [nothing, *verdict_results("map_fixed")], 12.0)
    before = snapshot(place)
    partly = run_collect(place)
    after = snapshot(place)
    again_partly = run_open(place)
    return Pause(
        again,
        changed,
        unanswered,
        partly,
        {path for path in before | after if before.get(path) != after.get(path)},
        again_partly,
        snapshot(place) != after,
        pushed_again,
        all_tasks(studio),
        broken,
    )


@dataclass(frozen=True)
class Close:
    collected: Collected
    files: dict[str, str]  # of the round that was closed
    again: Idle | None = None
    changed_by_collecting_again: bool = False
    interrupted: str = ""  # HEAD when it was killed
    refused: Refusal | None = None


@pytest.fixture(scope="module")
def closed(place: Workspace, paused: Pause) -> Close:
    """The answers come in; collecting is killed between its commit and its tag, and then called again, twice."""
    from flows.rounds import Idle, collect_round, open_round, simulate_labelers

    root = str(place.root)
    simulate_labelers(place)

    def no_tag(self: Git, name: str) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Git, "tag", no_tag)
        with pytest.raises(Killed):
            collect_round(root)
    interrupted = snapshot(place)
    with pytest.raises(ValueError) as raised:
        open_round(root)
    refusal = Refusal(str(raised.value), snapshot(place) != interrupted)
    collected = run_collect(place)
    files = snapshot(place)
    again = collect_round(root)
    assert isinstance(again, Idle)
    return Close(collected, files, again, snapshot(place) != files, interrupted["HEAD"], refusal)


@dataclass(frozen=True)
class Second:
    said: list[str]  # by open, simulate, collect
    seen: Open
    changed: str  # sample of the first round whose answer a labeler changed meanwhile
    reproduced: subprocess.CompletedProcess[str]  # dvc repro while the round is open
    disputed: int  # the task that a second labeler answered otherwise
    disagreed: Collected  # then


@pytest.fixture(scope="module")
def second(place: Workspace, first: Open, closed: Close) -> Second:
    """The second round, by the commands. Two labelers share the work; they disagree on one task, a third decides.

    One has second thoughts about a picture of the first round.
    """
    from flows.people import simulated_labelers
    from flows.rounds import Opened, label_studio, simulate_labelers

    said = [abnloop(place, "round", "open")]
    state = place.round(2).read()
    seen = look_at_open(place, Opened(2, True, BUDGET, state["promoted"], state["gate"]))
    reproduced = tool(place, "dvc", "repro")
    said.append(abnloop(place, "simulate", "--labelers", "2"))
    one, other = simulated_labelers(place, label_studio(place), 2)
    disputed = max(seen.tasks)
    (answer,) = one.task(disputed)["annotations"]
    late = other if answer["completed_by"]["email"] == one.who() else one
    late.annotate(disputed, verdict_results("unusable"), 4.0)
    disagreed = run_collect(place)
    assert simulate_labelers(place, labelers=3).total() == 1
    changed = max(first.asked["tasks"])
    (annotation,) = label_studio(place).task(first.asked["tasks"][changed])["annotations"]
    url, token = services.label_studio_access(place)
    httpx.patch(
        f"{url}/api/annotations/{annotation['id']}/",
        json={"result": verdict_results("whole_image")},
        headers={"Authorization": f"Token {token}"},
        trust_env=False,
    ).raise_for_status()
    said.append(abnloop(place, "round", "collect"))
    return Second(said, seen, changed, reproduced, disputed, disagreed)


@pytest.fixture(scope="module")
def restored(place: Workspace, second: Second, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A clone of the finished workspace, at the end of its first round; it shares nothing but DVC's cache."""
    folder = tmp_path_factory.mktemp("restored") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(place.root), str(folder)], check=True)
    clone = Workspace(folder)
    assert tool(clone, "dvc", "cache", "dir", "--local", str(place.root / ".dvc/cache")).returncode == 0
    Git(folder).checkout("round/0001")
    Dvc(folder).checkout()
    return clone


# --- what could be seen: refusals


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("selection.budget", "selection.budget is 91 but the pool holds 90 images; lower it in params.yaml"),
        ("train.epoch", "train.epoch is not a setting; did you mean epochs?"),
        ("predict.batchsize", "predict.batchsize is not a setting; did you mean batch_size?"),
        ("labeling.minimun", "labeling.minimun is not a setting; did you mean minimum?"),
        ("project.name", "project.name is 'no spaces'; use up to 40 letters, digits"),
        ("dirty tree", "notes.txt has changes that are not committed (1 file(s)); commit them with `git add`"),
        ("token", "refused the token (401); make a new personal access token"),
        ("unreachable", "Label Studio at http://127.0.0.1:9 does not answer; start it with `abnloop up`"),
        ("lock", "is in use by `abnloop round open` (pid PID on"),
        ("cache", "the DVC cache lacks data/gold.npz; fetch it with `dvc pull`"),
        ("nothing to simulate", "no round is open; open one with `abnloop round open`"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(
    refused: dict[str, Refusal], what: str, message: str
) -> None:
    assert message in refused[what].message and "\n" not in refused[what].message
    assert not refused[what].changed


# --- interrupted, and gone on


def test_a_killed_round_has_trained_and_not_asked(killed: Kill) -> None:
    assert killed.state["state"] == "begun" and killed.state["promoted"] is True
    assert killed.tasks == 2 and len(killed.runs) == 4


def test_a_killed_round_goes_on_and_does_not_train_again(place: Workspace, killed: Kill, first: Open) -> None:
    assert first.opened.round == 1 and first.opened.new
    assert first.model == killed.model
    lines = logs_of(flow_runs("open-round")["COMPLETED"][1])  # the first found the workspace in use
    assert "round 1 goes on where it was interrupted" in lines
    for stage in ("control", "train", "predict", "evaluate", "select"):
        assert f"Stage '{stage}' didn't change, skipping" in lines
    assert not any(re.match("epoch 1/", line) for line in lines)


def test_a_killed_round_goes_on_in_the_same_runs(place: Workspace, killed: Kill, first: Open) -> None:
    assert first.runs == killed.runs
    (parent,) = [run for run in runs_of(place) if run.info.run_id == killed.state["mlflow_runs"]["round"]]
    assert parent.data.tags["abnloop.resumed"] == "true"
    assert [version.run_id for version in versions()].count(killed.state["mlflow_runs"]["train"]) == 1


def test_a_killed_round_asks_each_question_once(place: Workspace, first: Open) -> None:
    assert sorted(first.tasks) == sorted(first.asked["tasks"].values())
    assert len(first.tasks) == first.opened.tasks == BUDGET


def test_one_commit_holds_what_a_round_asks(place: Workspace, killed: Kill, first: Open, closed: Close) -> None:
    said = git(place, "log", "--format=%s", f"{killed.head}..round/0001").splitlines()
    assert said == ["[round 1] Learn from 5 corrections", f"[round 1] Ask {BUDGET} questions"]
    named = git(place, "show", "--format=", "--name-only", "round/0001~").splitlines()
    ours = {"dvc.lock", "models/champion.json", "models/champion.pt.dvc", "results/metrics.json", "results/batch.csv"}
    ours |= {f"rounds/0001/{name}" for name in ("batch.csv", "tasks.json", "round.json", "comparison.csv")}
    assert ours | {"models/decisions.csv"} <= set(named)


# --- the tasks


def test_tasks_follow_the_batch_in_its_order(place: Workspace, first: Open) -> None:
    batch = read_csv(place.round(1).batch)
    assert [first.asked["tasks"][row["sample"]] for row in batch] == sorted(first.tasks)
    assert [first.tasks[task]["data"]["sample"] for task in sorted(first.tasks)] == [row["sample"] for row in batch]
    picked = read_csv(place.root / "results/batch.csv")
    assert {row["sample"] for row in batch} == {row["sample"] for row in picked}, "no gold mask is missing"
    assert [row["sample"] for row in batch] != [row["sample"] for row in picked], "shuffled"
    splits = {sample.id: sample.split for sample in read_manifest(place.root)}
    assert {splits[row["sample"]] for row in batch} == {"train"}


def test_a_task_shows_the_map_as_a_prediction_that_can_be_edited(first: Open) -> None:
    rows = {name: row for row, name in enumerate(first.predictions.samples.tolist())}
    for task in first.tasks.values():
        data, (prediction,) = task["data"], task["predictions"]
        height, width = data["height"], data["width"]
        shown = read_mask(prediction["result"], height, width)
        own = as_mask(first.predictions.maps[rows[data["sample"]]], height, width)
        assert shown is not None and np.array_equal(shown, own)
        assert prediction["result"][0]["dynamic"] is True and prediction["result"][0]["from_name"] == "mask"
        assert prediction["model_version"] == data["model_version"] == "v1"


def test_a_task_names_both_classes_and_why_it_is_asked(place: Workspace, first: Open) -> None:
    batch = {row["sample"]: row["shown"] for row in read_csv(place.round(1).batch)}
    labels = {row["id"]: row["label"] for row in read_csv(place.manifest)}
    for task in first.tasks.values():
        data, meta, sample = task["data"], task["meta"], task["data"]["sample"]
        assert meta["label"] == labels[sample] and meta["predicted"] in CLASSES and meta["reason"] == batch[sample]
        assert data["network_says"] == f"{meta['predicted']} {meta['confidence']:.0%}"
        assert data["on_file"].startswith(f"{labels[sample]} ") and data["on_file"].endswith("%")
        assert data["asked_because"] == reason_shown(batch[sample]) != batch[sample]


def test_pictures_and_heatmaps_are_served_to_who_is_logged_in(place: Workspace, first: Open) -> None:
    url, token = services.label_studio_access(place)
    for task in first.tasks.values():
        for name in ("image", "heatmap"):
            seen = httpx.get(url + task["data"][name], headers={"Authorization": f"Token {token}"}, trust_env=False)
            assert (seen.status_code, seen.headers["content-type"]) == (200, "image/png")
        original = next(sample for sample in read_manifest(place.root) if sample.id == task["data"]["sample"])
        picture = httpx.get(
            url + task["data"]["image"], headers={"Authorization": f"Token {token}"}, trust_env=False
        ).content
        assert picture == (place.root / original.image).read_bytes()
        assert httpx.get(url + task["data"]["image"], trust_env=False).status_code in (302, 401, 403)


def test_masks_of_the_gold_set_never_reach_labelers(place: Workspace, first: Open, second: Second) -> None:
    gold = {sample.id for sample in read_manifest(place.root) if sample.split in ("val", "test")}
    asked = set(first.asked["tasks"]) | set(second.seen.asked["tasks"])
    assert not gold & asked and not gold & set(read_corrections(place.root))


def test_opening_an_open_round_changes_nothing_and_says_so(paused: Pause) -> None:
    assert (paused.again.round, paused.again.new, paused.again.tasks) == (1, False, BUDGET)
    assert not paused.changed_by_opening
    assert not paused.again_partly.new and not paused.changed_by_opening_partly


def test_pushing_again_makes_no_second_task(first: Open, paused: Pause) -> None:
    assert paused.pushed_again == first.asked["tasks"]
    assert paused.tasks_after == sorted(first.tasks)


# --- collecting


def test_a_round_stays_open_until_its_batch_is_complete(paused: Pause) -> None:
    assert (paused.unanswered.closed, paused.unanswered.answered, paused.unanswered.tasks) == (False, 0, BUDGET)
    assert (paused.partly.closed, paused.partly.answered, paused.partly.set_aside) == (False, 1, 1)
    assert paused.changed_by_a_part == {"rounds/0001/annotations.jsonl"}


def test_an_empty_mask_is_set_aside_with_its_id_and_reason(place: Workspace, paused: Pause, closed: Close) -> None:
    assert (closed.collected.corrections, closed.collected.set_aside) == (BUDGET - 1, 1)
    (aside,) = place.round(1).read()["set_aside"]
    lines = [json.loads(line) for line in place.round(1).annotations.read_text().splitlines()]
    (annotation,) = {one["id"] for task in lines if task["id"] == paused.broken for one in task["annotations"]}
    assert (aside["annotation"], aside["reason"]) == (annotation, "empty mask")
    kept = csv.DictReader(git(place, "show", "round/0001:data/corrections.csv").splitlines())
    learned = {row["sample"] for row in kept}
    assert len(learned) == BUDGET - 1 and aside["sample"] not in learned
    assert aside["sample"] not in np.load(place.round(1).masks).files


def test_the_table_and_the_masks_agree(place: Workspace, second: Second) -> None:
    rows = read_corrections(place.root)
    counted = Counter(row["round"] for row in rows.values())
    assert counted == {"1": BUDGET - 2, "2": place.round(2).read()["collected"]}
    for number in (1, 2):
        shard = f"rounds/{number:04d}/masks.npz"
        with np.load(place.root / shard) as masks:
            named = {row["sample"]: row["sha256"] for row in rows.values() if row["masks"] == shard}
            kept = set(masks.files) - ({second.changed} if number == 1 else set())  # its answer is another now
            assert {sample: mask_sha256(masks[sample]) for sample in kept} == named
    for row in rows.values():
        assert bool(row["masks"]) == (row["verdict"] in ("map_ok", "map_fixed", "whole_image"))
        assert float(row["minutes"]) > 0
        assert row["model_version"] == ("v1" if row["sample"] == second.changed else f"v{row['round']}")


def test_a_dispute_keeps_a_round_open_until_somebody_else_has_looked(place: Workspace, second: Second) -> None:
    assert (second.disagreed.closed, second.disagreed.answered, second.disagreed.set_aside) == (False, BUDGET - 1, 2)
    sample = second.seen.tasks[second.disputed]["data"]["sample"]
    row = read_corrections(place.root)[sample]
    people = [services.EMAIL, "simulated-2@example.com", "simulated-3@example.com"]
    assert sorted(row["labeler"].split()) == people and row["verdict"] != "unusable"
    assert 0 < float(row["weight"]) <= 0.667  # two of three agree; written with three digits
    assert next(one for one in read_manifest(place.root) if one.id == sample).weight == float(row["weight"])


def test_every_annotation_of_a_round_is_in_its_table(place: Workspace, second: Second) -> None:
    for number, amount in ((1, BUDGET), (2, BUDGET + 3)):
        table = read_csv(place.round(number).corrections)
        lines = [json.loads(line) for line in place.round(number).annotations.read_text().splitlines()]
        assert {row["annotation"] for row in table} == {str(one["id"]) for task in lines for one in task["annotations"]}
        assert len(table) == amount
        learned = {name for row in read_corrections(place.root).values() for name in row["annotation"].split()}
        assert {row["annotation"] for row in table if not row["set_aside"]} <= learned
    report = json.loads(abnloop(place, "labelers", "report", "--json"))
    assert sum(one["tasks"] + one["set_aside"] for one in report) == 2 * BUDGET + 2


def test_collecting_that_was_killed_is_finished_by_the_next(place: Workspace, closed: Close) -> None:
    assert closed.refused is not None and not closed.refused.changed
    assert "collecting round 1 was interrupted; finish it with `abnloop round collect`" in closed.refused.message
    assert closed.collected.closed and closed.collected.commit == closed.interrupted
    assert Git(place.root).commit_of("round/0001") == closed.interrupted


def test_collecting_a_closed_round_does_nothing(closed: Close) -> None:
    assert closed.again is not None and "no round is open, there is nothing to collect" in closed.again.why
    assert not closed.changed_by_collecting_again


def test_nothing_is_left_uncommitted_and_git_holds_no_data(place: Workspace, second: Second) -> None:
    assert Git(place.root).is_clean()
    kept = git(place, "ls-files").split("\n")
    data = (".pt", ".npz", ".jsonl", ".png", ".jpg")
    assert not [path for path in kept if path.endswith(data) and not path.startswith("docs/")]
    assert Dvc(place.root).missing() == []


# --- the second round, by the commands


def test_the_commands_say_what_happened(place: Workspace, second: Second) -> None:
    opened, simulated, collected = second.said
    state = place.round(2).read()
    assert f"{state['decision']}: {state['gate']}" in opened
    assert f"round 2: {BUDGET} tasks wait in Label Studio" in opened
    assert re.fullmatch(r"\d map_\w+(, \d map_\w+)*", simulated.splitlines()[-1])
    said = rf"round 2 is closed with {BUDGET + 1} corrections and \d+ gold answers, 0 set aside: "
    assert re.search(said + git(place, "rev-parse", "HEAD"), collected)


def test_a_round_learns_from_the_corrections_before_it(place: Workspace, second: Second) -> None:
    lines = [json.loads(line) for line in place.train_log.read_text().splitlines()]
    assert [line["corrected"] for line in lines] == [BUDGET - 1] * EPOCHS
    assert all(line["map_loss"] > 0 for line in lines)
    assert [one["corrections"] for one in summarise(place)] == [0, BUDGET - 1]
    answered = {row["sample"] for row in read_corrections(place.root).values() if row["round"] == "1"}
    assert not answered & set(second.seen.asked["tasks"]), "nobody is asked about the same picture again"


def test_what_was_said_after_a_round_had_closed_enters_the_next(place: Workspace, second: Second) -> None:
    row = read_corrections(place.root)[second.changed]
    assert (row["round"], row["verdict"]) == ("2", "whole_image")
    with np.load(place.round(2).masks) as masks:
        assert second.changed in masks.files and (masks[second.changed] == 255).all()
    before = git(place, "show", "round/0001:data/corrections.csv")
    (was,) = [line for line in before.splitlines() if line.startswith(f"{second.changed},")]
    assert "whole_image" not in was, "the first round stays what it was"


def test_the_minutes_of_an_annotation_that_is_changed_later_count_once(place: Workspace, second: Second) -> None:
    first_rows, rows = (read_table(place.round(number).corrections) for number in (1, 2))
    assert {row["annotation"] for row in first_rows} & {row["annotation"] for row in rows}
    latest = latest_annotations(place.rounds()).values()
    minutes = [float(row["minutes"]) for row in latest if row["verdict"]]
    rounding = 0.005 * (len(minutes) + 2)  # of each row and of each round, written with two digits
    assert sum(one["minutes"] for one in summarise(place)) == pytest.approx(sum(minutes), abs=rounding)


def test_the_first_round_is_the_control(place: Workspace, second: Second) -> None:
    one, two = summarise(place)
    assert one["test_accuracy"] == one["control_accuracy"] == two["control_accuracy"]
    assert [one[name] for name in ("state", "collected", "set_aside")] == ["closed", BUDGET - 1, 1]
    assert two["git_commit"] == git(place, "rev-parse", "round/0002")


def test_labelers_see_the_prediction_of_the_latest_model(second: Second) -> None:
    assert {task["data"]["model_version"] for task in second.seen.tasks.values()} == {"v2"}
    assert len(second.seen.tasks) == BUDGET


def test_everything_is_up_to_date_without_any_service(second: Second) -> None:
    assert second.reproduced.returncode == 0, second.reproduced.stderr
    assert "Data and pipelines are up to date." in second.reproduced.stdout


def test_dvc_shows_metrics_and_plots(place: Workspace, second: Second, tmp_path: Path) -> None:
    shown = tool(place, "dvc", "metrics", "show", "--json")
    metrics = json.loads(shown.stdout)[""]["data"]
    assert metrics["results/metrics.json"]["data"] == json.loads(place.metrics.read_text())
    assert "results/control/metrics.json" in metrics
    drawn = tool(place, "dvc", "plots", "show", "--out", str(tmp_path / "plots"))
    assert drawn.returncode == 0, drawn.stderr
    page = (tmp_path / "plots/index.html").read_text()
    assert "confusion.csv" in page and "training.csv" in page


# --- restoring


def test_a_tag_restores_a_round_to_the_byte(closed: Close, restored: Workspace) -> None:
    again = snapshot(restored)
    assert again == closed.files
    for name in ("data/gold.npz", "results/model.pt", "models/champion.pt", "rounds/0001/masks.npz"):
        assert name in again
    assert sum(name.startswith("data/images/") for name in again) == len(CLASSES) * sum(COUNTS.values())


def test_what_came_later_comes_back(place: Workspace, restored: Workspace) -> None:
    branch = git(place, "branch", "--show-current")
    Git(restored.root).checkout(branch)
    Dvc(restored.root).checkout()
    try:
        assert snapshot(restored) == snapshot(place)
    finally:
        Git(restored.root).checkout("round/0001")
        Dvc(restored.root).checkout()


def test_training_goes_on_from_the_champion_where_that_is_set(place: Workspace, restored: Workspace) -> None:
    from flows.rounds import begin

    Git(restored.root).checkout("round/0002")
    Dvc(restored.root).checkout()
    try:
        assert restored.start_model.stat().st_size == 0
        change_settings(restored.params, {"train.start": "champion"})
        round_ = begin.fn(restored)
        assert round_.number == 3 and round_.read()["state"] == "begun"
        assert restored.start_model.read_bytes() == restored.champion.read_bytes() != b""
        assert git(restored, "diff", "--name-only").split() == ["models/start.pt.dvc", "params.yaml"]
    finally:
        shutil.rmtree(restored.root / "rounds/0003")
        git(restored, "checkout", "--quiet", "--", ".")
        Git(restored.root).checkout("round/0001")
        Dvc(restored.root).checkout()


# --- MLflow


def mlflow_client() -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def runs_of(place: Workspace) -> list[Run]:
    client = mlflow_client()
    experiment = client.get_experiment_by_name(NAME)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def versions() -> list[Any]:
    return list(mlflow_client().search_model_versions(f"name = '{NAME}'"))


@dataclass(frozen=True)
class Tracked:
    """The runs of one round."""

    round: Run
    train: Run
    evaluate: Run
    select: Run


def tracked(place: Workspace, number: int) -> Tracked:
    return Tracked(
        **{part: mlflow_client().get_run(run) for part, run in place.round(number).read()["mlflow_runs"].items()}
    )


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


def test_a_round_is_one_run_with_its_stages_below(place: Workspace, second: Second) -> None:
    assert len(runs_of(place)) == 8
    for number in (1, 2):
        runs = tracked(place, number)
        assert "mlflow.parentRunId" not in runs.round.data.tags
        for run in (runs.train, runs.evaluate, runs.select):
            assert run.data.tags["mlflow.parentRunId"] == runs.round.info.run_id
        assert {run.info.status for run in vars(runs).values()} == {"FINISHED"}


@pytest.mark.parametrize("number", [1, 2])
def test_a_curve_has_one_point_an_epoch(place: Workspace, second: Second, number: int) -> None:
    run = tracked(place, number).train.info.run_id
    for name in ("loss", "accuracy", "learning_rate"):
        points = mlflow_client().get_metric_history(run, name)
        assert [point.step for point in points] == list(range(1, EPOCHS + 1))
    if number == 2:
        lines = [json.loads(line) for line in place.train_log.read_text().splitlines()]
        assert [point.value for point in mlflow_client().get_metric_history(run, "loss")] == [
            line["loss"] for line in lines
        ]


def test_a_run_has_every_parameter(place: Workspace, second: Second) -> None:
    params, runs = read_params(place.params), tracked(place, 2)
    assert runs.round.data.params == flattened(params)
    sections = {name: params[name] for name in ("data", "model", "train", "corrections")}
    assert runs.train.data.params == flattened(sections)
    assert runs.select.data.params == flattened({"selection": params["selection"]})


def test_a_run_leads_to_code_data_tasks_and_flow(place: Workspace, second: Second) -> None:
    for number in (1, 2):
        runs, round_ = tracked(place, number), place.round(number)
        tags = runs.round.data.tags
        assert tags["abnloop.round"] == str(number)
        assert tags["abnloop.git_commit"] == git(place, "rev-parse", f"{round_.tag}~2")
        assert tags["abnloop.round_commit"] == git(place, "rev-parse", round_.tag)
        assert tags["abnloop.label_studio_project"] == str(read_json(round_.tasks)["project"])
        assert tags["abnloop.prefect_run"] in [str(run.id) for run in all_flow_runs("open-round")]
        lock = git(place, "show", f"{round_.tag}:dvc.lock")
        for name in ("images", "corrections", "model"):
            assert runs.train.data.tags[f"abnloop.dvc_{name}"] in lock
        assert tags["abnloop.promoted"] == str(round_.read()["promoted"])
    assert tracked(place, 1).train.data.tags["abnloop.dvc_corrections"] != tags["abnloop.dvc_corrections"]


def data_sets(run: Run) -> dict[str, dict[str, Any]]:
    """Profile and source of each data set that a run saw, by name."""
    assert run.inputs is not None
    seen = [one.dataset for one in run.inputs.dataset_inputs]
    return {one.name: json.loads(str(one.profile)) | json.loads(str(one.source)) for one in seen}


def test_a_run_names_the_data_it_saw(place: Workspace, second: Second) -> None:
    runs = tracked(place, 2)
    learned, judged = data_sets(runs.train), data_sets(runs.evaluate)
    assert set(learned) == {f"{NAME} train"}
    train = learned[f"{NAME} train"]
    assert (train["samples"], train["with_mask"]) == (90, BUDGET - 1)
    assert train["data/corrections.csv"] == runs.train.data.tags["abnloop.dvc_corrections"]
    assert {name: one["samples"] for name, one in judged.items()} == {f"{NAME} test": 24, f"{NAME} val": 24}
    assert judged[f"{NAME} test"]["class 7"] == 8


def test_a_run_has_metrics_gallery_and_batch(place: Workspace, second: Second, tmp_path: Path) -> None:
    from PIL import Image

    runs, client = tracked(place, 2), mlflow_client()
    metrics = json.loads(place.metrics.read_text())
    assert runs.evaluate.data.metrics == pytest.approx(
        {name: float(value) for name, value in flattened(metrics).items()}
    )
    assert runs.round.data.metrics["control.test.accuracy"] == summarise(place)[1]["control_accuracy"]
    assert runs.round.data.metrics["collected"] == BUDGET + 1

    names = {file.path for file in client.list_artifacts(runs.evaluate.info.run_id)}
    assert {"gallery.png", "metrics.json", "params.yaml", "plots"} <= names
    with Image.open(client.download_artifacts(runs.evaluate.info.run_id, "gallery.png", str(tmp_path))) as gallery:
        assert gallery.size[0] == 3 * (TILE + GAP) and gallery.size[1] > 8 * TILE
    with Image.open(client.download_artifacts(runs.train.info.run_id, "inferred.png", str(tmp_path))) as sheet:
        assert sheet.size[0] == 2 * (TILE + GAP) and sheet.size[1] > 8 * TILE  # without weights nothing misleads
    batch = Path(client.download_artifacts(runs.select.info.run_id, "batch.csv", str(tmp_path)))
    assert batch.read_bytes() == place.round(2).batch.read_bytes()


def test_a_model_version_says_what_it_is_of(place: Workspace, second: Second) -> None:
    by_number = {int(one.version): one for one in versions()}
    assert sorted(by_number) == [1, 2]
    for number, version in by_number.items():
        state = place.round(number).read()
        assert state["model_version"] == str(number)
        assert version.run_id == state["mlflow_runs"]["train"]
        assert version.tags["abnloop.promoted"] == str(state["promoted"])
        assert version.tags["abnloop.gate"] == state["gate"]
        assert version.tags["abnloop.dvc_model"] in git(place, "show", f"round/{number:04d}:dvc.lock")
        verdict = "promoted" if state["promoted"] else "refused"
        assert version.description.startswith(f"Round {number}: {verdict}, {state['gate']}.")
        assert json.loads(version.tags["abnloop.parent"]) == state["verdict"]["parent"]


def test_the_champion_is_the_last_that_was_promoted(place: Workspace, second: Second, restored: Workspace) -> None:
    last = max(number for number in (1, 2) if place.round(number).read()["promoted"])
    assert mlflow_client().get_model_version_by_alias(NAME, "champion").version == str(last)
    assert read_json(place.champion_record)["round"] == last
    model = place.model if last == 2 else restored.model
    assert place.champion.read_bytes() == model.read_bytes()


# --- lineage


@pytest.mark.parametrize("number", [1, 2])
def test_lineage_is_the_same_in_mlflow_and_from_the_files(
    place: Workspace, second: Second, tmp_path: Path, number: int
) -> None:
    known = json.loads(abnloop(place, "lineage", f"v{number}", "--json"))
    run = place.round(number).read()["mlflow_runs"]["round"]
    artifact = Path(mlflow_client().download_artifacts(run, "lineage.json", str(tmp_path)))
    logged = json.loads(artifact.read_text())
    assert {**logged, "champion": known["champion"]} == known
    lock = yaml.safe_load(git(place, "show", f"round/{number:04d}:dvc.lock"))["stages"]
    hashes = {one["path"]: one["md5"] for stage in lock.values() for one in stage["deps"]}
    assert known["data_version"] == {path: hashes[path] for path in known["data_version"]}
    assert set(known["data_version"]) >= {"data/images", "data/corrections.csv", "data/withdrawals.csv"}


def test_a_model_is_traced_to_the_annotations_it_learned_from(place: Workspace, second: Second) -> None:
    first, latest = (json.loads(abnloop(place, "lineage", f"round/000{n}", "--json")) for n in (1, 2))
    assert first["annotations"] == first["selected_by"] == [] and first["parent"] is None
    lines = [json.loads(line) for line in place.round(1).annotations.read_text().splitlines()]
    received = {one["id"]: one["updated_at"] for task in lines for one in task["annotations"]}
    assert len(latest["annotations"]) == BUDGET - 1
    for one in latest["annotations"]:
        assert received[one["id"]] == one["revision"] and one["labeler"] == services.EMAIL and one["round"] == 1
    reasons = {row["sample"]: row["reason"] for row in read_csv(place.round(1).batch)}
    assert {one["sample"]: one["reason"] for one in latest["selected_by"]} == {
        one["sample"]: reasons[one["sample"]] for one in latest["annotations"]
    }
    assert latest["parent"] == {"round": 1, "model_version": "1", "weights": "scratch"}
    (back,) = json.loads(abnloop(place, "lineage", "--labeler", services.EMAIL, "--json"))
    assert (back["round"], back["annotations"]) == (2, latest["annotations"])


def test_mlflow_tells_the_history_of_the_champion(place: Workspace, second: Second) -> None:
    """From the versions' tags alone, what models/decisions.csv says too."""
    decided = sorted(versions(), key=lambda version: version.tags["abnloop.decided"])
    champion, history = "", []
    for version in decided:
        promoted = version.tags["abnloop.promoted"] == "True"
        champion = str(version.version) if promoted else champion
        history.append((str(version.version), version.tags["abnloop.decision"], champion))
    rows = read_csv(place.decisions)
    assert [(row["model_version"], row["decision"], row["champion"]) for row in rows] == history
    assert mlflow_client().get_model_version_by_alias(NAME, "champion").version == champion
    described = mlflow_client().get_registered_model(NAME).description
    assert described.startswith(f"The champion is v{champion}.")
    assert all(row["reason"] in described for row in rows)


def test_the_gate_shows_both_models_on_the_same_pictures(place: Workspace, second: Second, tmp_path: Path) -> None:
    from PIL import Image

    run = tracked(place, 2).evaluate.info.run_id
    with Image.open(mlflow_client().download_artifacts(run, "comparison.png", str(tmp_path))) as pictures:
        assert pictures.size[0] == 4 * (TILE + GAP)  # picture, champion, challenger, mask
    val = {row["id"] for row in read_csv(place.manifest) if row["split"] == "val"}
    assert {row["sample"] for row in read_csv(place.round(2).comparison)} == val
    assert read_csv(place.round(1).comparison) == []
    names = [one["name"] for one in place.round(2).read()["verdict"]["criteria"]]
    accuracies = ["accuracy", "accuracy_background_swap", "accuracy_in_both_backgrounds"]
    assert names[:3] == accuracies and re.fullmatch("accuracy_of_class_[017]", names[3])
    assert names[4:] == ["attention_inside_mask", "context_reliance"]


def test_the_model_is_linked_to_what_judged_it(place: Workspace, second: Second) -> None:
    for number, version in {int(one.version): one for one in versions()}.items():
        inputs = tracked(place, number).evaluate.inputs
        assert inputs is not None
        assert [f"models:/{one.model_id}" for one in inputs.model_inputs] == [version.source]


def test_a_withdrawal_makes_training_out_of_date(second: Second, restored: Workspace) -> None:
    from flows.withdrawals import withdraw

    git(restored, "checkout", "--quiet", "-B", "again", "round/0002")
    try:
        taken = withdraw(restored, {"round": "1"}, "a test")
        assert [one["round"] for one in taken.models] == [2]
        assert len(read_corrections(restored.root)) == BUDGET + 1
        status = tool(restored, "dvc", "status", "train").stdout
        assert re.search(r"modified:\s+data/withdrawals\.csv", status), status
    finally:
        Git(restored.root).checkout("round/0001")


ANSWER = """
import sys, mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/{name}@champion")
generator = np.random.default_rng(0)
for count, height, width in ((1, 32, 32), (5, 32, 32), (2, 50, 70)):
    answer = model.predict(generator.integers(0, 256, (count, height, width, 3)).astype(np.uint8))
    shares, maps = answer["probabilities"], answer["attention_maps"]
    assert shares.shape == (count, {classes}) and np.allclose(shares.sum(axis=1), 1, atol=1e-5), shares
    assert maps.shape[0] == count and maps.ndim == 3 and 0 <= maps.min() <= maps.max() <= 1, maps.shape
    assert list(answer["classes"]) == {names}
print(sys.modules["abn"].__file__)
"""


def test_the_champion_answers_anywhere(place: Workspace, second: Second, tmp_path: Path) -> None:
    code = ANSWER.format(name=NAME, classes=len(CLASSES), names=list(CLASSES))
    empty, downloads = tmp_path / "empty", tmp_path / "downloads"  # MLflow leaves what it fetched behind
    empty.mkdir()
    downloads.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "MLFLOW_TRACKING_URI": services.addresses(place).mlflow, "TMPDIR": str(downloads)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.strip()).is_relative_to(PROJECT), "it brings the code that it needs"


# --- Prefect


def all_flow_runs(flow: str) -> list[FlowRun]:
    """Of the flow called so, oldest first, without those on a schedule."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), sort=FlowRunSort.START_TIME_ASC, limit=200
        )
    return [run for run in runs if run.deployment_id is None]


def flow_runs(flow: str) -> dict[str, list[FlowRun]]:
    """By the state that they ended in."""
    found: dict[str, list[FlowRun]] = {}
    for run in all_flow_runs(flow):
        found.setdefault(str(run.state_type.value if run.state_type else ""), []).append(run)
    return found


def logs_of(run: FlowRun) -> list[str]:
    """Everything that a flow run said; log lines arrive some seconds late."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import LogSort

    lines: list[str] = []
    with get_client(sync_client=True) as client:
        only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
        while page := client.read_logs(only, limit=200, offset=len(lines), sort=LogSort.TIMESTAMP_ASC):
            lines += [entry.message for entry in page]
    return lines


def eventually(look: Callable[[], Any], seconds: float = 20) -> Any:
    """What `look` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.25)
    return found


def test_flow_runs_end_as_they_went(second: Second) -> None:
    opened, collected = flow_runs("open-round"), flow_runs("collect-round")
    # Opened: while it was in use, gone on after the kill, twice while it was open, the second round. Collected: before
    # and with a part of the answers, finished after the kill, once more, the second round with a dispute and without.
    assert {state: len(runs) for state, runs in collected.items()} == {"COMPLETED": 6, "CRASHED": 1}
    assert len(opened["COMPLETED"]) == 5 and len(opened["CRASHED"]) == 1
    assert set(opened) == {"COMPLETED", "CRASHED", "FAILED"}


def test_logs_hold_the_epochs(killed: Kill, second: Second) -> None:
    (crashed,) = flow_runs("open-round")["CRASHED"]
    for run in (crashed, flow_runs("open-round")["COMPLETED"][-1]):
        epochs = [line for line in logs_of(run) if re.match(rf"epoch \d/{EPOCHS}  loss", line)]
        assert [line[6] for line in epochs] == [str(epoch) for epoch in range(1, EPOCHS + 1)]


def test_each_round_leaves_its_batch_and_metrics_as_artifacts(place: Workspace, second: Second) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        artifacts = {one.key: one for one in client.read_artifacts()}
    assert {"batch-0001", "metrics-0001", "batch-0002", "metrics-0002"} <= set(artifacts)
    url, asked = services.addresses(place).label_studio, second.seen.asked
    markdown = str(artifacts["batch-0002"].data)
    for sample, task in asked["tasks"].items():
        assert f"[{task}]({url}/projects/{asked['project']}/data?task={task}) | {sample} |" in markdown
    metrics = {row["metric"]: row for row in json.loads(str(artifacts["metrics-0002"].data))}
    assert metrics["accuracy"]["test"] == summarise(place)[1]["test_accuracy"]
    assert metrics["accuracy"]["test, control"] == summarise(place)[1]["control_accuracy"]


def deployments() -> dict[str, Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {one.name: one for one in client.read_deployments()}


def waited_for(trigger: Any) -> tuple[set[str], dict[str, Any]]:
    return set(trigger.expect), trigger.match.model_dump()


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_a_work_pool_gets_the_same_deployments_as_are_served(place: Workspace, second: Second, kind: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    from flows.serve import deployments as served
    from flows.serve import serve

    text = place.params.read_text()
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=f"on-{kind}", type=kind))
        try:
            change_settings(place.params, {"flows.work_pool": f"on-{kind}", "flows.gpu_concurrency": 2})
            serve(place)
            limit = client.read_global_concurrency_limit_by_name("abnloop-gpu").limit
        finally:
            place.params.write_text(text)
        made, wanted = deployments(), {one.name: one for one in served(place)}
        assert limit == 2 and set(wanted) == {"retrain", "collect", "ingest"}
        for name, one in wanted.items():
            assert made[name].work_pool_name == f"on-{kind}"
            assert made[name].parameters == one.parameters == {"workspace": str(place.root)}
            assert [said.schedule for said in made[name].schedules] == [said.schedule for said in one.schedules or []]
            assert (made[name].tags, made[name].description) == (one.tags, one.description)
            owned = client.read_resource_related_automations(f"prefect.deployment.{made[name].id}")
            assert [waited_for(said.trigger) for said in owned] == [waited_for(said) for said in one.triggers]


def test_a_work_pool_that_does_not_exist_is_refused(place: Workspace, second: Second, tmp_path: Path) -> None:
    from flows.serve import serve

    other = Workspace(tmp_path)
    shutil.copy(place.params, other.params)
    change_settings(other.params, {"flows.work_pool": "nobody"})
    with pytest.raises(ValueError, match=r"flows\.work_pool is nobody.*prefect work-pool create"):
        serve(other)


@pytest.mark.parametrize("name", ["retrain_cron", "collect_cron"])
def test_a_schedule_that_is_none_is_refused(name: str) -> None:
    from flows.serve import FlowsConfig

    good = FlowsConfig(retrain_cron="0 2 * * *", collect_cron="*/5 * * * *", work_pool="none", gpu_concurrency=1)
    with pytest.raises(ValueError, match=rf"flows\.{name} is 'at night'; write minute, hour, day, month, weekday"):
        replace(good, **{name: "at night"})  # type: ignore[arg-type]


def git(place: Workspace, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=place.root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def where_written(place: Workspace, words: Iterable[str]) -> set[str]:
    """Everything that holds one of the words: files (a database as its statements), and git, by any commit.

    Label Studio's own database is left out: it is where its accounts are.
    """
    sought, found = [word.encode() for word in words], set()

    def look(name: str, content: bytes) -> None:
        if any(word in content for word in sought):
            found.add(name)

    for path in sorted(place.root.rglob("*")):
        name = place.relative(path)
        if name.startswith(".git/") or path.name.startswith("label_studio.sqlite3") or not path.is_file():
            continue
        if path.suffix in (".db", ".sqlite3"):
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                look(name, "\n".join(database.iterdump()).encode())
        elif not path.name.endswith(("-wal", "-shm", "-journal")):  # of a database, which is read with them
            look(name, path.read_bytes())
    objects = ["git", "cat-file", "--batch", "--batch-all-objects", "--unordered"]
    look("git", subprocess.run(objects, cwd=place.root, check=True, capture_output=True).stdout)
    return found


def test_no_secret_is_written_anywhere_but_into_its_own_file(place: Workspace, second: Second) -> None:
    own, tokens = read_json(place.secrets), read_json(place.simulated_labelers)
    assert set(own) == {"password", "token", "live"} and tokens
    known = [*own.values(), *tokens.values(), *SECRETS_OF_THE_ENVIRONMENT.values()]
    assert min(map(len, known)) >= 16
    files = {place.relative(path): path for path in (place.secrets, place.simulated_labelers)}
    assert where_written(place, known) == set(files)
    for path in files.values():
        assert path.stat().st_mode & 0o077 == 0
        assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=place.root, check=False).returncode == 0
    read = where_written(place, [NAME, "http"])
    databases = {".abnloop/mlflow/mlflow.db", ".abnloop/prefect/prefect.db"}
    logs = {f".abnloop/logs/{name}.log" for name in ("label-studio", "mlflow", "prefect")}
    assert {"git", *databases, *logs} <= read, "the search looks where secrets could be"
    assert any(name.startswith(".abnloop/mlflow/artifacts/") for name in read)
