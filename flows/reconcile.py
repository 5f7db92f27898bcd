"""Label Studio, DVC, git and MLflow side by side: every difference, and its repair where that is safe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException

from abn.manifest import mask_sha256, read_corrections, read_gold, read_manifest
from flows.rounds import changed_tasks, held, label_studio, state_of, tracker_of
from flows.tracking import CHAMPION
from flows.versions import Dvc, Git
from flows.workspace import Round, Workspace, read_json, read_json_lines


@dataclass(frozen=True)
class Difference:
    """What two of them tell differently. `mend`, where there is one, loses nothing; else `remedy` is for a person."""

    where: str
    what: str
    remedy: str
    mend: Callable[[], object] | None = None
    mended: bool = False


def reconcile(place: Workspace, fix: bool = False) -> list[Difference]:
    """Every difference; with `fix` those that can be mended without losing anything are mended.

    Nothing is written without `fix`. Raises InUse, since a round that is at work differs from itself.
    """
    with held(place, "round reconcile"):
        found = [one for check in (_tasks, _annotations, _masks, _data, _rounds, _models) for one in check(place)]
        if not fix:
            return found
        return [replace(one, mended=bool(one.mend) and _mended(one)) for one in found]


def _mended(one: Difference) -> bool:
    assert one.mend is not None
    one.mend()
    return True


def _asked(place: Workspace) -> Iterator[tuple[Round, int, dict[str, int]]]:
    """The rounds that asked something, with Label Studio's project and the tasks by sample."""
    for round_ in place.rounds():
        asked = read_json(round_.tasks)
        if asked.get("tasks"):
            yield round_, asked["project"], asked["tasks"]


def _tasks(place: Workspace) -> Iterator[Difference]:
    """Tasks without a sample, tasks that no round asks, and questions whose task is gone."""
    studio, where = label_studio(place), "Label Studio"
    samples = {sample.id for sample in read_manifest(place.root)}
    latest = place.latest()
    opening = (
        latest.number if latest and state_of(place, latest) == "begun" else 0
    )  # it pushes the rest when it goes on
    asked = list(_asked(place))
    for project in sorted({project for _, project, _ in asked}):
        there = {task["id"]: task for task in studio.overview(project)}
        ours = {
            task: (round_, sample) for round_, one, tasks in asked if one == project for sample, task in tasks.items()
        }
        for number, task in there.items():
            sample, of = task["data"].get("sample", ""), task["data"].get("round")
            if sample not in samples:
                yield Difference(where, f"task {number} is about {sample!r}, which is no sample", "delete it there")
            elif number not in ours and of != opening:
                what = f"task {number} (sample {sample}, round {of}) is asked by no round"
                if _annotated(task):
                    yield Difference(where, f"{what}, and it has an answer", "answer the round's own task alike")
                else:
                    yield Difference(where, what, "delete it", lambda task=number: studio.delete(task))  # type: ignore[misc]
        for number, (round_, sample) in ours.items():
            if number not in there:
                what = f"task {number} (sample {sample}, round {round_.number}) is gone"
                yield Difference(where, what, "what was collected of it is kept; an open round closes at its deadline")
            elif not _annotated(there[number]) and number in _pulled(round_):
                what = f"the answers to task {number} (sample {sample}, round {round_.number}) are gone"
                yield Difference(where, what, "what was collected of them is kept")


def _annotated(task: dict[str, Any]) -> bool:
    return bool(task["total_annotations"] or task["cancelled_annotations"])


def _pulled(round_: Round) -> set[int]:
    return {int(task) for task in round_.read().get("pulled", {})}


def _annotations(place: Workspace) -> Iterator[Difference]:
    """Annotations that were never collected."""
    for round_, project, tasks in _asked(place):
        if state_of(place, round_) == "open":
            continue  # they wait for the next collect, which is no difference
        for task in changed_tasks(place, label_studio(place), project, list(tasks.values())):
            what = f"task {task} of round {round_.number} was answered or changed after the round had closed"
            yield Difference("Label Studio", what, "the round that closes next takes it in")


def _masks(place: Workspace) -> Iterator[Difference]:
    """Masks that no annotation gave, and corrections whose mask is gone or another."""
    gold = read_gold(place.root)
    rows = {**read_corrections(place.root), **gold}
    for round_ in place.rounds():
        if not round_.masks.is_file() or not round_.annotations.is_file():
            continue  # not closed yet, or not checked out, which DVC tells
        answered = {task["data"]["sample"] for task in read_json_lines(round_.annotations) if task["annotations"]}
        shard = place.relative(round_.masks)
        with np.load(round_.masks, allow_pickle=False) as masks:
            for sample in sorted(set(masks.files) - answered):
                yield Difference("DVC", f"{shard} has a mask of {sample} that no annotation gave", "`dvc checkout`")
            for row in rows.values():
                if row["masks"] != shard:
                    continue
                if row["sample"] not in masks.files or mask_sha256(masks[row["sample"]]) != row["sha256"]:
                    table = "data/gold.csv" if row["sample"] in gold else "data/corrections.csv"
                    what = f"{table} names a mask of {row['sample']} in {shard} that is not there"
                    yield Difference("DVC", what, f"`git checkout {round_.tag}` and `dvc checkout` show what was")


def _data(place: Workspace) -> Iterator[Difference]:
    """Data that git names and the cache lacks, and data that the remote lacks."""
    dvc = Dvc(place.root)
    for path in dvc.missing():
        mend = (lambda path=path: dvc.pull([path])) if dvc.remote() else None
        yield Difference("DVC", f"the cache lacks {path}", "`dvc pull`, from where it was pushed to", mend)
    if late := read_json(place.unpushed):

        def push() -> None:
            dvc.push()
            place.unpushed.unlink()

        yield Difference("DVC", f"the remote lacks data since {late['since']}", "`dvc push`", push)


def _rounds(place: Workspace) -> Iterator[Difference]:
    """Rounds and their tags; what is not committed."""
    git = Git(place.root)
    tags, rounds = set(git.tags("round/*")), place.rounds()
    for round_ in rounds:
        if round_.read().get("state") == "closed" and round_.tag not in tags:
            yield Difference("git", f"round {round_.number} is closed and has no tag", "`abnloop round collect`")
    for tag in sorted(tags - {round_.tag for round_ in rounds}):
        yield Difference("git", f"the tag {tag} is of a round that is not here", f"`git tag -d {tag}`, or check it out")
    for path in git.changed_paths():
        if not rounds or state_of(place, rounds[-1]) != "begun":
            yield Difference("git", f"{path} is not committed", "commit it, or undo it")


def _models(place: Workspace) -> Iterator[Difference]:
    """Model versions without their data or their round, rounds without their version, and who is champion."""
    tracker, git, dvc, where = tracker_of(place), Git(place.root), Dvc(place.root), "MLflow"
    versions = {str(one.version): one for one in tracker.client.search_model_versions(f"name = '{tracker.name}'")}
    states = {round_.number: round_.read() for round_ in place.rounds()}
    for number, version in sorted(versions.items(), key=lambda item: int(item[0])):
        tags = version.tags
        if int(tags.get("abnloop.round", 0)) not in states:
            yield Difference(where, f"model version {number} is of a round that is not here", "check its round out")
        for name in ("model", "images"):
            if (md5 := tags.get(f"abnloop.dvc_{name}")) and not dvc.caches(md5):
                what = f"model version {number} stands on {name} {md5[:10]}, which the DVC cache lacks"
                yield Difference(where, what, "`dvc fetch --all-commits`, from where it was pushed to")
        if (commit := tags.get("abnloop.git_commit")) and (md5 := tags.get("abnloop.dvc_corrections")):
            seen = git.content(commit, "data/corrections.csv")
            if seen is None or hashlib.md5(seen, usedforsecurity=False).hexdigest() != md5:
                what = f"model version {number} stands on corrections that commit {commit[:10]} does not have"
                yield Difference(where, what, "fetch that commit from where it was pushed to")
    for round_, state in states.items():
        if (made := state.get("model_version")) and made not in versions:
            what = f"round {round_} made model version {made}, which is gone"
            yield Difference(where, what, f"`git checkout round/{round_:04d}` and `dvc checkout` have its model")
        if state.get("state") == "closed":
            for run in state["mlflow_runs"].values():
                if _status(tracker.client, run) == "RUNNING":
                    what = f"run {run} of round {round_} is not finished, but the round is"
                    yield Difference(where, what, "finish it", lambda run=run: tracker.finish(run))  # type: ignore[misc]
    champion = read_json(place.champion_record).get("model_version")
    if champion in versions and champion not in _aliased(tracker.client, tracker.name):
        what = f"the champion is version {champion} here, and not there"
        yield Difference(where, what, "name it there", lambda: tracker.promote(champion))


def _status(client: Any, run: str) -> str:
    try:
        return str(client.get_run(run).info.status)
    except MlflowException:
        return "gone"


def _aliased(client: Any, name: str) -> list[str]:
    aliases = client.get_registered_model(name).aliases
    return [str(aliases[CHAMPION])] if CHAMPION in aliases else []
