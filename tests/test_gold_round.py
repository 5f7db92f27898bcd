"""A workspace without masks, as users have it: labelers paint the gold by which the gate judges. All parts are real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from abn.manifest import read_corrections, read_gold, read_manifest
from flows import services
from flows.gold import GOLD, gold_masks
from flows.ingest import init_workspace
from flows.lineage import models_that_learned, trace
from flows.summary import summarise
from flows.versions import Dvc, Git
from flows.withdrawals import withdraw
from flows.workspace import Workspace, decision_of, open_workspace, read_json, read_table
from labeling.client import LabelStudio
from tiny import write_few_digits

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

pytestmark = [
    pytest.mark.studio,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated"),
]

PROJECT = Path(__file__).resolve().parent.parent
CLASSES, COUNTS = ("0", "1", "7"), {"train": 30, "val": 4, "test": 6}  # pictures a class
NAME = "digits"  # of the workspace, and so of the model
BUDGET, WANTED = 10, 12  # all of val, which is less than the default of labeling.gold
SETTINGS = {
    "data.flip": False,
    "model.backbone": "cifar_resnet8",
    "train.epochs": 3,
    "train.batch_size": 32,
    "selection.budget": BUDGET,
    "labeling.gold_share": 1.0,
    **{f"services.{name}_port": 0 for name in ("label_studio", "prefect", "mlflow", "live")},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """Digits whose masks simulated labelers alone know, and the services up."""
    root = tmp_path_factory.mktemp("gold")
    index = write_few_digits(root / "source", CLASSES, COUNTS)
    init_workspace(PROJECT, root / "digits", root / "source", index=index, settings=SETTINGS, hide_masks=True)
    workspace = open_workspace(root / "digits")
    try:
        services.up(workspace)
        yield workspace
    finally:
        services.down(workspace)


def abnloop(place: Workspace, *words: str) -> str:
    """What the command prints; it must succeed. In a process of its own: Prefect reads its addresses once a process."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, "--workspace", str(place.root)],
        cwd=PROJECT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "1000"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer_and_collect(place: Workspace) -> str:
    abnloop(place, "simulate")
    said = abnloop(place, "round", "collect")
    assert "is closed with" in said
    return said


def mlflow_of(place: Workspace) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=services.addresses(place).mlflow)


@dataclass(frozen=True)
class Seen:
    state: dict[str, Any]
    batch: list[dict[str, str]]
    tasks: dict[str, dict[str, Any]]  # as Label Studio has them, by sample
    model: tuple[int, int]  # of its file: when it was written, its inode
    alias: str  # the version that is champion in MLflow
    gold: dict[str, int]


def look(place: Workspace, number: int) -> Seen:
    known = services.addresses(place)
    studio = LabelStudio(known.label_studio, known.label_studio_token)
    asked = read_json(place.round(number).tasks)["tasks"]
    written = place.model.stat()
    return Seen(
        place.round(number).read(),
        read_table(place.round(number).batch),
        {sample: studio.task(task) for sample, task in asked.items()},
        (written.st_mtime_ns, written.st_ino),
        str(mlflow_of(place).get_model_version_by_alias(NAME, "champion").version),
        gold_masks(place),
    )


@dataclass(frozen=True)
class Story:
    first_open: Seen
    first_closed: Seen
    undecided: Seen
    judged_again: Seen
    said: str


@pytest.fixture(scope="module")
def story(place: Workspace) -> Story:
    abnloop(place, "round", "open")
    first_open = look(place, 1)
    answer_and_collect(place)
    first_closed = look(place, 1)
    abnloop(place, "round", "open")
    undecided = look(place, 2)
    said = answer_and_collect(place)
    return Story(first_open, first_closed, undecided, look(place, 2), said)


def splits_of(place: Workspace, batch: list[dict[str, str]]) -> Counter[str]:
    splits = {one.id: one.split for one in read_manifest(place.root, gold=False)}
    return Counter(splits[row["sample"]] for row in batch)


def test_the_first_batch_is_half_gold_and_the_screen_does_not_tell(place: Workspace, story: Story) -> None:
    assert splits_of(place, story.first_open.batch) == {"train": 5, "val": 4, "test": 1}
    assert {row["purpose"] for row in story.first_open.batch if row["sample"] in place_gold(place)} <= {GOLD}
    tasks = story.first_open.tasks.values()
    assert len({frozenset(task["data"]) for task in tasks}) == 1, "all tasks hold the same fields"
    texts = " ".join(str({**task["data"], **(task.get("meta") or {})}) for task in tasks).casefold()
    assert not any(word in texts for word in ("gold", "'val", "'test", "evaluation", "judge"))


def place_gold(place: Workspace) -> set[str]:
    return {one.id for one in read_manifest(place.root, gold=False) if one.split in ("val", "test")}


def test_gold_answers_are_versioned_and_teach_nothing(place: Workspace, story: Story) -> None:
    assert story.first_closed.gold == {"val": 4, "test": 1}
    assert (story.first_closed.state["collected"], story.first_closed.state["gold_collected"]) == (5, 5)
    git = Git(place.root)
    assert git.content("round/0001", "data/gold.csv") is not None
    assert not read_gold(place.root).keys() & read_corrections(place.root).keys()
    assert set(read_gold(place.root)) <= place_gold(place)
    assert trace(place, place.round(2))["masks"]["used"] == sum(
        bool(row["masks"]) for row in read_corrections(place.root).values() if row["round"] == "1"
    )


def test_with_too_little_gold_the_gate_is_undecided_and_the_champion_stays(place: Workspace, story: Story) -> None:
    state = story.undecided.state
    assert (state["decision"], state["promoted"], state["verdict"]["missing_gold"]) == ("undecided", False, 6)
    assert "6 more gold masks" in state["gate"]
    assert story.undecided.alias == "1"
    assert splits_of(place, story.undecided.batch) == {"val": 8, "test": 2}, "what is missing comes first"


def test_the_same_model_is_judged_again_once_the_gold_is_there_without_training(place: Workspace, story: Story) -> None:
    state = story.judged_again.state
    assert story.judged_again.gold["val"] == WANTED
    assert decision_of(state) in ("promoted", "refused")
    assert story.judged_again.model == story.undecided.model and state["model_version"] == "2"
    assert [one["decision"] for one in state["verdict"]["earlier"]] == ["undecided"]
    assert (story.judged_again.alias == "2") == state["promoted"]
    assert (read_json(place.champion_record)["model_version"] == "2") == state["promoted"]
    assert f"judged again: {state['decision']}: {state['gate']}" in story.said
    decisions = [(row["round"], row["decision"]) for row in read_table(place.decisions)]
    assert decisions == [("1", "promoted"), ("2", "undecided"), ("2", state["decision"])]
    git = Git(place.root)
    assert git.is_clean() and git.commit_of("round/0002") == git.head() and not Dvc(place.root).missing()


def test_mlflow_and_the_summary_tell_the_verdict_and_the_gold(place: Workspace, story: Story) -> None:
    client = mlflow_of(place)
    run = client.get_run(story.judged_again.state["mlflow_runs"]["round"])
    decision = story.judged_again.state["decision"]
    assert run.data.tags["abnloop.decision"] == decision
    assert run.data.metrics["gold.val"] == WANTED
    assert (run.data.metrics["evaluation.labels_changed"], run.data.metrics["evaluation.left_out"]) == (0, 0)
    version = client.get_model_version(NAME, "2")
    assert version.tags["abnloop.decision"] == decision
    assert f"Judged by {WANTED} gold masks of val: admin@example.com ({WANTED})." in str(version.description)
    assert [one["verdict"] for one in summarise(place)] == ["promoted", decision]


def test_a_gold_mask_that_is_withdrawn_names_the_models_that_it_judged(place: Workspace, story: Story) -> None:
    painted = trace(place, place.round(2))["gate"]["gold_painted"]
    assert len(painted) == WANTED
    number = str(painted[0]["id"])
    assert [(one["round"], len(one["judged_by"])) for one in models_that_learned(place, {"annotation": number})] == [
        (2, 1)
    ]
    withdraw(place, {"annotation": number}, "a shadow")
    assert gold_masks(place)["val"] == WANTED - 1
    withdraw(place, {"annotation": number}, "none after all", undo=True)
    assert gold_masks(place)["val"] == WANTED
