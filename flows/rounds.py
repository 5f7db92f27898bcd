"""The loop, in two short flows: `open_round` trains, judges and asks; `collect_round` takes the answers in.

Labeling takes days, and nothing sleeps through it: a round's state is its files, so a flow that was killed anywhere
goes on from the first file that is missing.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.states import Completed

from abn.config import load_section, read_params
from abn.images import read_rgb
from abn.inferred import read_inferred
from abn.manifest import (
    CORRECTION_COLUMNS,
    DISPUTED,
    EVALUATION,
    WITHDRAWAL_COLUMNS,
    MaskShards,
    Sample,
    class_names,
    read_corrections,
    read_gold,
    read_manifest,
    read_withdrawn,
)
from abn.predictions import read_predictions
from abn.selection import SelectionConfig
from abn.train import TrainConfig
from flows.gallery import Seen, gallery, gold_rows, inferred_sheet, map_tile, shown
from flows.gate import COMPARISON_COLUMNS, GateConfig, Judgement, compare, judge
from flows.gold import (
    BATCH_COLUMNS,
    FIRST_SHARE,
    GOLD,
    askable,
    evaluation_changes,
    gold_masks,
    gold_statements,
    missing_gold,
    mixed_batch,
    split_answers,
)
from flows.lineage import DATA, commit_of_training, find_round, learned_withdrawn, name_of, record, trace
from flows.lineage_report import as_json, describe, describe_history, draw
from flows.people import (
    ANNOTATION_COLUMNS,
    annotation_rows,
    as_asked,
    correction_row,
    latest_annotations,
    simulated_labelers,
    still_standing,
)
from flows.preflight import check_committed, check_settings, state_of
from flows.processes import stop_marked
from flows.progress import StageLines, report, report_step
from flows.services import addresses
from flows.slots import training_slot
from flows.stopping import StopConfig, reason_to_stop
from flows.tracking import STAGES, Tracker
from flows.versions import HOLDER, Dvc, Git, holder_mark, refuse_old_round
from flows.workspace import (
    InUse,
    Round,
    Workspace,
    copy_atomically,
    decision_of,
    open_workspace,
    read_json,
    read_json_lines,
    read_table,
    write_arrays,
    write_atomically,
    write_json,
    write_table,
)
from labeling.client import LabelStudio
from labeling.corrections import Consensus, Correction, SetAside, settle
from labeling.corrections import read_corrections as read_annotations
from labeling.screen import Tool, instructions, labeling_screen
from labeling.simulator import Faults, simulate
from labeling.tasks import Question, make_task

LEAST_GOLD = 10  # masks a split, if labelers are asked for any
ENOUGH_GOLD = 60  # masks of val, or all of it: with fewer no model is refused because too little speaks for it
network_step = task(retries=3, retry_delay_seconds=[2, 10, 30], cache_policy=NO_CACHE, persist_result=False)
science_step = task(cache_policy=NO_CACHE, persist_result=False)


@dataclass(frozen=True)
class ProjectConfig:
    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]{1,40}", self.name):
            raise ValueError(f"project.name is {self.name!r}; use up to 40 letters, digits, _ - .")


@dataclass(frozen=True)
class LabelingConfig:
    url: str
    tool: Tool
    deadline_hours: float
    minimum: int
    labelers_per_task: int = 1
    gold: int = 60  # masks of val, and of test, that labelers shall paint; settings from before say nothing of it
    gold_share: float = 0.3  # of a batch, after the first one that asks for any

    def __post_init__(self) -> None:
        if self.labelers_per_task < 1:
            raise ValueError(f"labeling.labelers_per_task is {self.labelers_per_task}; it must be at least 1")
        if self.gold != 0 and self.gold < LEAST_GOLD:
            raise ValueError(
                f"labeling.gold is {self.gold}; from fewer than {LEAST_GOLD} masks nothing can be told: "
                f"set it to at least {LEAST_GOLD}, or to 0 to ask for none"
            )
        if not 0 < self.gold_share <= 1:
            raise ValueError(f"labeling.gold_share is {self.gold_share}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Opened:
    """What `open_round` did. `new` is False where a round was open already; `stopped` says why nobody was asked."""

    round: int
    new: bool
    tasks: int
    decision: str  # promoted, refused or undecided
    why: str
    stopped: str = ""

    def __str__(self) -> str:
        if not self.new:
            return f"round {self.round} is open already; `abnloop round collect` takes its answers in"
        asked = f"asks nobody: {self.stopped}" if self.stopped else f"{self.tasks} tasks wait in Label Studio"
        return f"{self.decision}: {self.why}\nround {self.round}: {asked}"


@dataclass(frozen=True)
class Collected:
    """What `collect_round` found in the round that was open."""

    round: int
    closed: bool
    answered: int
    tasks: int
    corrections: int
    gold: int  # answers about evaluation samples
    set_aside: int
    commit: str
    judged_again: str = ""  # what the gate says of the round's model now, where it was undecided

    def __str__(self) -> str:
        if not self.closed:
            return f"round {self.round}: {self.answered} of {self.tasks} tasks are answered; it stays open"
        said = (
            f"round {self.round} is closed with {self.corrections} corrections and {self.gold} gold answers, "
            f"{self.set_aside} set aside: {self.commit}"
        )
        return f"{said}\nits model, judged again: {self.judged_again}" if self.judged_again else said


@dataclass(frozen=True)
class Idle:
    """There was nothing to do, or, `in_use`, somebody else does it."""

    why: str
    in_use: bool = False

    def __str__(self) -> str:
        return self.why


Result = TypeVar("Result", Opened, Collected)


@flow(name="open-round")
def open_round(workspace: str = ".") -> Opened | Idle:
    """Train, evaluate, judge, choose whom to ask, and put the batch before the labelers. Then end."""
    return _alone("round open", workspace, _open)


@flow(name="collect-round")
def collect_round(workspace: str = ".") -> Collected | Idle:
    """Pull what was answered since the last time; close the round when its batch is complete or overdue."""
    return _alone("round collect", workspace, _collect)


def _open(place: Workspace) -> Opened | Idle:
    if why := nothing_to_open(place):
        return Idle(why)
    new = check_before_opening(place)
    if new:
        round_ = begin(place)
        reproduce(place, round_)
        report_step("judge")
        weigh(place, round_)
        report_step("register")
        decide(place, round_)
        report_step("ask")
        ask(place, round_)
    keep(place)
    return _opened(place, new)


def _collect(place: Workspace) -> Collected | Idle:
    back_up(place)  # what the remote did not take the last time
    round_ = place.latest()
    state = state_of(place, round_)
    if round_ is None or state not in ("open", "unsealed"):
        return Idle("no round is open, there is nothing to collect; open one with `abnloop round open`")
    if state == "open":
        keep(place)  # unless opening was interrupted before that, there is nothing to do
        pull(place, round_, list(read_json(round_.tasks)["tasks"].values()))
        answers = read_answers(place, round_)
        if not answers.complete and not answers.overdue:
            _warn(answers)
            ask_again(place, answers)
            return _collected(round_, answers, closed=False, commit="")
        pull(place, round_, _earlier_tasks(place, round_))
    answers = read_answers(place, round_)
    _warn(answers)
    learn_from(place, round_, answers)
    ask_again(place, answers)
    weigh_again(place, round_)
    decide_again(place, round_)
    commit = seal(place, round_, answers)
    back_up(place)
    return _collected(round_, answers, closed=True, commit=commit)


def _warn(answers: Answers) -> None:
    for line in answers.changed:
        get_run_logger().warning(line)


def _alone(command: str, workspace: str, work: Callable[[Workspace], Result | Idle]) -> Result | Idle:
    """What `work` gives for the workspace, held by this process alone; what it says is the message of the run's state.

    Where another run holds it, this one ends at once, which is no failure.
    """
    place = open_workspace(workspace)
    try:
        with held(place, command, patience_of(command)) as left_behind:
            if left_behind:
                get_run_logger().warning("%s was killed; its work goes on", left_behind)
            result = work(place)
    except InUse as held_by_another:
        result = Idle(str(held_by_another), in_use=True)
    get_run_logger().info("%s", result)
    return Completed(message=str(result), data=result)  # type: ignore[return-value]  # Prefect takes out the data


def patience_of(command: str) -> float:
    """Seconds that a run waits for another one to end: none where a person started it, who is told at once.

    Scheduled runs may start in the same minute. The next collect comes in minutes, the next retrain tomorrow.
    """
    run = FlowRunContext.get()
    if run is None or run.flow_run is None or run.flow_run.deployment_id is None:
        return 0.0
    return 600.0 if command == "round open" else 30.0


@contextmanager
def held(place: Workspace, command: str, patience: float = 0.0) -> Iterator[str]:
    """The workspace for `command` alone, freed of what a run that was killed still held; gives that run's signature.

    MLflow then says of the round that it was gone on with. Raises InUse where another process still holds it after
    `patience` seconds, and ValueError while an old round is checked out.
    """
    refuse_old_round(place.root)
    with place.lock(command, frees=True, patience=patience) as left_behind:
        if left_behind:
            if pid := re.search(r"\(pid (\d+) ", left_behind):
                stop_marked(HOLDER, holder_mark(int(pid[1]), place.root))  # such as a training that lost its reader
            Git(place.root).free_index()
            round_ = place.latest()
            if round_ and (runs := round_.read().get("mlflow_runs")):
                tracker_of(place).tag(runs["round"], {"abnloop.resumed": "true"})
        yield left_behind


# --- opening -------------------------------------------------------------------------------------------------------


def nothing_to_open(place: Workspace) -> str:
    """Why a new round would do nothing: the loop was told to stop, and nobody said or withdrew anything since. Else
    empty."""
    latest = place.latest()
    if latest is None or state_of(place, latest) != "closed":
        return ""
    state = latest.read()
    if not state.get("stopped") or state["collected"]:
        return ""
    table = place.withdrawals
    if table.is_file():
        learned_without = Git(place.root).content(commit_of_training(place, latest, state), place.relative(table))
        if table.read_bytes() != learned_without:
            return ""
    return _stopped(place)  # a rule that was loosened since lets the loop go on


def check_before_opening(place: Workspace) -> bool:
    """Whether a round may open now; False where one is open already. What a user can mend is a ValueError, and
    nothing has changed by then."""
    latest = place.latest()
    state = state_of(place, latest)
    if state == "open":
        return False
    check_settings(place.params)
    config = load_section(SelectionConfig, place.params, "selection")
    samples, answered = read_manifest(place.root), read_corrections(place.root)
    class_names(samples)
    check_evaluation(samples)
    pool = len(_unanswered(samples, answered))
    if config.budget > pool and not answered:
        raise ValueError(
            f"selection.budget is {config.budget} but the pool holds {pool} images; lower it in params.yaml"
        )
    check_committed(place, latest, state)
    dvc = Dvc(place.root)
    if absent := dvc.missing():
        raise ValueError(f"the DVC cache lacks {min(absent)}; fetch it with `dvc pull`")
    if latest and state == "begun" and _has_judged(place, latest) and not dvc.is_current("train"):
        raise _judged_another(latest)
    label_studio(place).check()
    tracker_of(place).claim(_identity(place))
    return True


def check_evaluation(samples: Sequence[Sample]) -> None:
    """Raises ValueError where a model could not be judged or measured: val or test has no samples."""
    for split in EVALUATION:
        if not any(one.split == split for one in samples):
            raise ValueError(
                f"split {split} has no images in data/manifest.csv that count; give it some, or withdraw what labelers "
                "said of them (`abnloop withdraw`): models are judged by val and measured on test"
            )


@science_step
def begin(place: Workspace) -> Round:
    """The round to work on: the one that was interrupted, or a new one."""
    latest = place.latest()
    if not place.withdrawals.is_file():  # a workspace of before there were any
        write_table(place.withdrawals, WITHDRAWAL_COLUMNS, [])
        Git(place.root).commit([place.relative(place.withdrawals)], "[data] Nothing is withdrawn")
    if not place.gold_table.is_file():
        write_table(place.gold_table, CORRECTION_COLUMNS, [])
        Git(place.root).commit([place.relative(place.gold_table)], "[data] No gold mask is painted")
    if latest and state_of(place, latest) == "begun":
        get_run_logger().info("round %d goes on where it was interrupted", latest.number)
        return latest
    round_ = place.round(latest.number + 1 if latest else 1)
    if load_section(TrainConfig, place.params, "train").start == "champion" and place.champion.is_file():
        if learned_withdrawn(place, find_round(place)):
            get_run_logger().warning("the champion learned from what was withdrawn: this round trains from scratch")
            write_atomically(place.start_model, b"")
        else:
            copy_atomically(place.champion, place.start_model)
        Dvc(place.root).add([place.relative(place.start_model)])
    round_.write({"round": round_.number, "state": "begun", "begun": _now()})
    return round_


@science_step
def reproduce(place: Workspace, round_: Round) -> None:
    """`dvc repro`: train, predict, evaluate, select and the control, whichever is out of date."""
    logger, git = get_run_logger(), Git(place.root)
    run = FlowRunContext.get()
    tags = {
        "abnloop.git_commit": git.head(),
        "abnloop.workspace": place.root.name,
        "abnloop.prefect_run": str(run.flow_run.id) if run and run.flow_run else "",
    }
    tracker = tracker_of(place)
    runs = tracker.begin_round(round_.number, tags, read_params(place.params))
    round_.write({**round_.read(), "mlflow_runs": runs})
    # Until the first correction the control's training is the round's.
    watched, curve = ("train", place.train_log) if read_corrections(place.root) else ("control", place.control_log)
    stages = StageLines()

    def on_line(line: str) -> None:
        if stages(line):
            return
        logger.info(line)
        if stages.stage == watched and line.startswith("epoch "):
            tracker.follow(runs["train"], curve)

    with training_slot(place):
        Dvc(place.root).repro(on_line)
    tracker.follow(runs["train"], curve)


@science_step
def weigh(place: Workspace, round_: Round) -> None:
    """The gate's verdict on this round's model, kept in round.json before anything follows from it.

    `parent` is the champion that it was weighed against, None before there is one, and says whether the training went
    on from that one's weights. Raises ValueError where the round has judged another model.
    """
    state, model = round_.read(), Dvc(place.root).hashes()["results/model.pt"]
    if state.get("verdict", {}).get("model") == model:
        return
    champion, parent = read_json(place.champion_record), None
    if _has_judged(place, round_):
        raise _judged_another(round_)
    if champion:
        starts = load_section(TrainConfig, place.params, "train").start
        weights = "champion" if starts == "champion" and place.start_model.stat().st_size else "scratch"
        parent = {"round": champion["round"], "model_version": champion["model_version"], "weights": weights}
    verdict = _judged(place, round_, model, champion)
    round_.write({**state, "verdict": {**verdict, "parent": parent}})


@science_step
def weigh_again(place: Workspace, round_: Round) -> None:
    """The gate's new verdict on a model that it could not decide on, by the gold masks that there are now; the model is
    not trained anew. What the gate said before is kept under `earlier`."""
    state, champion = round_.read(), read_json(place.champion_record)
    if decision_of(state) != "undecided":
        return
    verdict = state["verdict"]
    if (verdict["gold"], verdict["gold_painted"]) == (gold_masks(place), gold_statements(place, "val")):
        return
    if not place.model.is_file() or Dvc(place.root).hashes().get("results/model.pt") != verdict["model"]:
        get_run_logger().warning("results/model.pt is not the model that was undecided; the next round judges anew")
        return
    before = {name: verdict[name] for name in ("decision", "reason", "decided", "gold")}
    again = _judged(place, round_, verdict["model"], champion)
    earlier = [*verdict.get("earlier", []), before]
    round_.write({**state, "verdict": {**again, "parent": verdict["parent"], "earlier": earlier}})


def _judged(place: Workspace, round_: Round, model: str, champion: Mapping[str, Any]) -> dict[str, Any]:
    """What the gate says of the model in results/ with the MD5 `model`, and by which gold masks; the round keeps both
    models' answers."""
    known = gold_masks(place)
    judgement, rows = Judgement("promoted", "the first model"), []
    if champion and champion.get("md5") == model:
        judgement = Judgement("refused", "it is the champion itself: nothing was learned since")
    elif champion:
        compared = compare(place.root, place.champion, place.model)
        config = load_section(LabelingConfig, place.params, "labeling")
        masks = int(np.isfinite(compared.champion.context_reliance).sum())
        waiting = askable(compared.samples, MaskShards(place.root))["val"]
        wanted = min(max(config.gold, ENOUGH_GOLD), masks + waiting)
        judgement = judge(compared, load_section(GateConfig, place.params, "gate"), wanted)
        if judgement.verdict == "undecided" and masks >= config.gold:
            remedy = f"labelers are asked for {config.gold}; set labeling.gold to {ENOUGH_GOLD} and commit it"
            judgement = judgement._replace(reason=f"{judgement.reason}; {remedy}")
        rows = compared.rows()
        names = [sample.id for sample in compared.samples]
        models = [
            Seen.of(title, names, seen.maps, seen.answers)
            for title, seen in (("champion", compared.champion), ("challenger", compared.challenger))
        ]
        gallery(place.root, shown(place.root, compared.samples, 8), models).save(round_.comparison_gallery)
    write_table(round_.comparison, COMPARISON_COLUMNS, rows)
    return {
        "model": model,
        "decision": judgement.verdict,
        "promoted": judgement.promoted,
        "reason": judgement.reason,
        "decided": _now(),
        "criteria": judgement.numbers(),
        "missing_gold": judgement.missing_gold,
        "gold": known,
        "gold_painted": gold_statements(place, "val"),
    }


def _has_judged(place: Workspace, round_: Round) -> bool:
    """Whether the round's verdict was acted on: round.json says so, or, where that was interrupted, the champion."""
    return "promoted" in round_.read() or read_json(place.champion_record).get("round") == round_.number


def _judged_another(round_: Round) -> ValueError:
    commit = round_.read().get("git_commit", "")[:10]
    return ValueError(
        f"round {round_.number} has judged another model; undo what changed since "
        f"{f'commit {commit}' if commit else 'it was opened'}, finish it with `abnloop round open`, then change it"
    )


@network_step
def decide(place: Workspace, round_: Round) -> None:
    """Log what came out, register the challenger, and promote it or say why not."""
    state = round_.read()
    if "promoted" in state:
        return
    verdict, runs = state["verdict"], state["mlflow_runs"]
    tracker, head, hashes = tracker_of(place), Git(place.root).head(), Dvc(place.root).hashes()
    metrics = json.loads(place.metrics.read_text())
    control = json.loads(place.control_metrics.read_text())
    samples, corrections = read_manifest(place.root), len(read_corrections(place.root))
    data = {path: hashes[path] for path in DATA if path in hashes}

    tags = {
        "abnloop.git_commit": head,
        "abnloop.round": round_.number,
        "abnloop.corrections": corrections,
        **{f"abnloop.dvc_{name_of(path)}": md5 for path, md5 in data.items()},
        "abnloop.dvc_model": hashes["results/model.pt"],
        "abnloop.parent": json.dumps(verdict["parent"]),
        **_verdict_tags(verdict),
    }
    version = tracker.register(runs["train"], place.model, place.root / "abn", tags)
    known: dict[str, Any] = {"git_commit": head, "corrections": corrections, "model_version": str(version.version)}
    known |= {"metrics": metrics["test"], "validation": metrics["val"], "control": control["test"]}
    known |= _decided(verdict)
    facts = trace(place, round_, {**state, **known})
    tracker.describe_version(version, tags, describe(facts))
    for run in runs.values():
        tracker.tag(run, tags)
    learned = [sample for sample in samples if sample.split in ("train", "pool")]
    judged = [sample for sample in samples if sample.split in EVALUATION]
    tracker.log_inputs(runs["train"], learned, data, "training")
    tracker.log_inputs(runs["evaluate"], judged, data, "evaluation", version)
    tracker.log_metrics(runs["evaluate"], metrics)
    counts = {"corrections": corrections, "gold": verdict["gold"], "evaluation": evaluation_changes(place)}
    tracker.log_metrics(runs["round"], {**counts, **metrics, "control": control})
    if inferred := read_inferred(place.inferred):
        sheet = inferred_sheet(place.root, {sample.id: sample for sample in samples}, inferred)
        tracker.log_files(runs["train"], {"inferred.png": sheet})
    tracker.log_files(runs["evaluate"], _evaluation_files(place, round_, samples))
    files: dict[str, Path | Image.Image | str] = {
        "corrections.csv": place.corrections,
        "gold.csv": place.gold_table,
        **_lineage_files(facts),
    }
    tracker.log_files(runs["round"], files)
    if verdict["promoted"]:
        _promote(place, round_, known["model_version"], verdict, metrics["val"])
    tracker.describe_model(describe_history(record(place, round_, {**state, **known})))
    for run in STAGES:
        tracker.finish(runs[run])
    create_table_artifact(
        key=f"metrics-{round_.name}", table=_metrics_table(metrics, control), description=describe(facts)
    )
    round_.write({**state, **known})


@network_step
def decide_again(place: Workspace, round_: Round) -> None:
    """Tell MLflow and the files of the champion what the gate says of the round's model now."""
    state = round_.read()
    if decision_of(state) != "undecided" or state["verdict"]["decided"] == state["decided"]:
        return
    verdict, runs, number = state["verdict"], state["mlflow_runs"], state["model_version"]
    tracker, known = tracker_of(place), _decided(verdict)
    if verdict["promoted"]:
        _promote(place, round_, number, verdict, state["validation"])
    facts, tags = trace(place, round_, {**state, **known}), _verdict_tags(verdict)
    version = tracker.client.get_model_version(tracker.name, number)
    tracker.describe_version(version, tags, describe(facts))
    for run in runs.values():
        tracker.tag(run, tags)
    files = {path.name: path for path in (round_.comparison, round_.comparison_gallery) if path.is_file()}
    tracker.log_files(runs["evaluate"], files)
    tracker.log_files(runs["round"], {"gold.csv": place.gold_table, **_lineage_files(facts)})
    tracker.log_metrics(runs["round"], {"gold": verdict["gold"], "evaluation": evaluation_changes(place)})
    tracker.describe_model(describe_history(record(place, round_, {**state, **known})))
    round_.write({**state, **known})


def _decided(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """What round.json says at its top of the verdict, once it has been acted on."""
    known = {name: verdict[name] for name in ("decision", "promoted", "gold", "decided")}
    return {**known, "gate": verdict["reason"]}


def _verdict_tags(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {f"abnloop.{name}": verdict[name] for name in ("decision", "promoted", "decided")} | {
        "abnloop.gate": verdict["reason"]
    }


def _lineage_files(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"lineage.json": as_json(facts), "lineage.html": draw(facts)}


def _promote(
    place: Workspace, round_: Round, version: str, verdict: Mapping[str, Any], metrics: Mapping[str, Any]
) -> None:
    tracker_of(place).promote(version)
    copy_atomically(place.model, place.champion)
    Dvc(place.root).add([place.relative(place.champion)])
    named = {"round": round_.number, "model_version": version, "md5": verdict["model"]}
    write_json(place.champion_record, {**named, "gate": verdict["reason"], "metrics": metrics})


def _evaluation_files(
    place: Workspace, round_: Round, samples: Sequence[Sample]
) -> dict[str, Path | Image.Image | str]:
    """Numbers and pictures by their name in MLflow."""
    files: dict[str, Path | Image.Image | str] = {"metrics.json": place.metrics, "params.yaml": place.params}
    files |= {f"plots/{path.name}": path for path in sorted(place.plots.iterdir())}
    files |= {path.name: path for path in (round_.comparison, round_.comparison_gallery) if path.is_file()}
    predictions, classes = read_predictions(place.predictions), class_names(samples)
    if rows := gold_rows(predictions, 8):
        names = predictions.samples[rows].tolist()
        answers = [classes[answer] for answer in predictions.probabilities[rows].argmax(axis=1)]
        seen = Seen.of("attention", names, predictions.maps[rows], answers)
        by_id = {sample.id: sample for sample in samples}
        files["gallery.png"] = gallery(place.root, [by_id[name] for name in names], [seen])
    return files


@network_step
def ask(place: Workspace, round_: Round) -> None:
    """Put the batch before the labelers: a task a sample, the network's own map its editable prediction.

    Where a rule says stop, the round has learned from the last answers and asks nobody: its batch is empty.
    """
    state, config = round_.read(), load_section(LabelingConfig, place.params, "labeling")
    stopped = _stopped(place)
    write_table(round_.batch, BATCH_COLUMNS, [] if stopped else _batch(place, round_, config))
    samples = {sample.id: sample for sample in read_manifest(place.root)}
    studio = label_studio(place)
    title = f"abnloop {load_section(ProjectConfig, place.params, 'project').name}"
    classes = class_names(list(samples.values()))
    screen = labeling_screen(classes, config.tool)
    project = studio.ensure_project(
        title, screen, instructions(), config.labelers_per_task, f"abnloop, workspace {_identity(place)[:12]}"
    )
    tasks = list(_tasks(place, round_, samples, classes, f"v{state['model_version']}", config.tool))
    for folder in (place.images, round_.heatmaps):
        studio.serve_folder(project, folder)
    known = addresses(place)
    studio.attach_backend(project, known.live, "abnloop", known.live_secret)
    pushed = studio.push(project, tasks, lambda done, total: report_step("ask", done, total))
    write_json(round_.tasks, {"project": project, "tasks": pushed})
    told = {"abnloop.label_studio_project": project} | ({"abnloop.stopped": stopped} if stopped else {})
    tracker, runs = tracker_of(place), state["mlflow_runs"]
    tracker.tag(runs["round"], told)
    tracker.log_files(runs["select"], {"batch.csv": round_.batch})
    url = f"{studio.url}/projects/{project}/data?task="
    rows = [{**row, "task": f"[{pushed[row['sample']]}]({url}{pushed[row['sample']]})"} for row in _read_batch(round_)]
    create_markdown_artifact(key=f"batch-{round_.name}", markdown=_markdown(rows), description="Who is asked, and why.")
    opened = {"state": "open", "opened": _now(), "project": project} | ({"stopped": stopped} if stopped else {})
    round_.write({**state, **opened})  # last: now nothing is left to do


def _batch(place: Workspace, round_: Round, config: LabelingConfig) -> list[dict[str, str]]:
    """The rows of the round's batch: what the stage select picked, and gold questions beside it."""
    selection, state = load_section(SelectionConfig, place.params, "selection"), round_.read()
    asked_before = any(
        row.get("purpose") == GOLD
        for one in place.rounds()
        if one.number < round_.number
        for row in read_table(one.batch)
    )
    return mixed_batch(
        read_table(place.batch),
        read_table(place.gold_questions),
        missing_gold(place, config.gold),
        config.gold_share if asked_before else FIRST_SHARE,
        selection.budget,
        selection.budget_minutes,
        decision_of(state) == "undecided",
        (selection.seed, 3, round_.number),
    )


@science_step
def keep(place: Workspace) -> None:
    """Commit what the round stands on: code and data versions, metrics, the batch and its tasks."""
    round_ = place.latest()
    assert round_ is not None
    files = [round_.batch, round_.tasks, round_.comparison, round_.state]
    paths = ["dvc.lock", "results", "models", *map(place.relative, files)]
    Git(place.root).commit(paths, f"[round {round_.number}] Ask {len(_read_batch(round_))} questions")


def _tasks(
    place: Workspace, round_: Round, samples: Mapping[str, Sample], classes: list[str], version: str, tool: Tool
) -> Iterator[dict[str, Any]]:
    predictions = read_predictions(place.predictions)
    rows = {name: row for row, name in enumerate(predictions.samples.tolist())}
    round_.heatmaps.mkdir(parents=True, exist_ok=True)
    for pick in _read_batch(round_):
        sample, row = samples[pick["sample"]], rows[pick["sample"]]
        path, heat = place.root / sample.image, round_.heatmaps / f"{sample.id}.png"
        Image.fromarray(map_tile(path, predictions.maps[row])).save(heat)
        height, width = read_rgb(path).shape[:2]
        shares = dict(zip(classes, predictions.probabilities[row].tolist(), strict=True))
        predicted = max(shares, key=shares.__getitem__)
        question = Question(
            sample=sample.id,
            image_url=LabelStudio.local_file_url(place.root, path),
            heatmap_url=LabelStudio.local_file_url(place.root, heat),
            width=width,
            height=height,
            label=sample.label,
            predicted=predicted,
            confidence=shares[predicted],
            reason=pick["shown"],
            attention_map=predictions.maps[row],
            label_confidence=shares.get(sample.label),
        )
        yield make_task(question, version, round_.number, tool)


# --- collecting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a round's annotations say so far."""

    corrections: list[Consensus]  # one a sample: training learns from these
    gold: list[Consensus]  # one an evaluation sample: models are judged by these, and nothing learns from them
    opinions: list[Correction]  # one a sample and labeler: what they stand on, and what is still disputed
    set_aside: list[SetAside]
    asked_again: dict[int, int]  # task whose labelers disagree -> how many shall have answered it
    answered: int
    tasks: int
    overdue: bool
    changed: list[str]  # a line for each task that says something else than what was asked

    @property
    def complete(self) -> bool:
        return self.answered >= self.tasks


@network_step
def pull(place: Workspace, round_: Round, tasks: Sequence[int]) -> None:
    """Append to annotations.jsonl, as received, those of `tasks` that changed since they were last pulled, and those
    whose answers have been deleted since."""
    studio, project = label_studio(place), read_json(round_.tasks)["project"]
    changed = changed_tasks(place, studio, project, tasks)
    lines = read_json_lines(round_.annotations)
    lines += studio.answered(project, task_ids=changed) if changed else []
    said = {line["id"]: line["annotations"] for line in lines}
    lines += studio.unanswered(project, [task for task in tasks if said.get(task) and task not in changed])
    write_atomically(round_.annotations, "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in lines))
    get_run_logger().info("%d of %d tasks changed", len(changed), len(tasks))


def changed_tasks(place: Workspace, studio: LabelStudio, project: int, tasks: Sequence[int]) -> list[int]:
    """Those of `tasks` with answers that no round has pulled.

    A task changed where its time of change is another than it was, so no clock has to be right.
    """
    rounds = place.rounds()
    known = {int(task): at for one in rounds for task, at in one.read().get("pulled", {}).items()}
    if rounds and "pulled" not in rounds[-1].read():
        known |= {task["id"]: task["updated_at"] for task in read_json_lines(rounds[-1].annotations)}
    return [task for task, at in studio.changes(project, tasks).items() if known.get(task) != at]


def _earlier_tasks(place: Workspace, round_: Round) -> list[int]:
    """The tasks of the rounds before: what was said of them after their round had closed enters this one."""
    earlier = [one for one in place.rounds() if one.number < round_.number]
    return [task for one in earlier for task in read_json(one.tasks)["tasks"].values()]


def read_answers(place: Workspace, round_: Round) -> Answers:
    """The annotations received so far; those that cannot be learned from are set aside with their reason.

    A task on which a first panel of labelers disagrees is not answered until somebody else has looked at it, too.
    """
    config, state = load_section(LabelingConfig, place.params, "labeling"), round_.read()
    asked, known = set(read_json(round_.tasks)["tasks"].values()), _known(place)
    received = {task["id"]: task for task in read_json_lines(round_.annotations)}  # later lines replace earlier ones
    on_file = {one.id: one for one in read_manifest(place.root, corrected=False, gold=False)}
    usable, aside, changed = as_asked(place, received.values(), on_file)
    latest = _without_replaced(place, {task["id"]: task for task in usable}, asked)
    latest = {number: one for number, one in latest.items() if number in asked or _is_news(round_, one, known)}
    opinions, unusable = read_annotations(latest.values(), class_names(read_manifest(place.root)))
    aside += unusable
    panel = max(2, config.labelers_per_task)
    agreed, disputes = settle(opinions, panel)
    evaluation = {one.id for one in on_file.values() if one.split in EVALUATION}
    corrections, gold, holding = split_answers(agreed, disputes, evaluation)
    again = [one.opinions[-1].task for one in holding if len(one.opinions) <= panel]
    doubted = [one.opinions[-1].task for one in gold if one.verdict == DISPUTED and len(one.opinions) <= panel]
    aside += [
        SetAside(one.annotation, one.sample, dispute.reason, one.labeler, one.minutes)
        for dispute in disputes
        for one in dispute.opinions
    ]
    said = {task: {one["labeler"] for one in received[task]["annotations"]} for task in asked & received.keys()}
    overdue = datetime.now(UTC) > datetime.fromisoformat(state["opened"]) + timedelta(hours=config.deadline_hours)
    return Answers(
        corrections,
        gold,
        opinions,
        aside,
        {number: received[number]["total_annotations"] + 1 for number in [*again, *doubted]},
        sum(len(labelers) >= config.labelers_per_task for number, labelers in said.items() if number not in again),
        len(asked),
        overdue and len(corrections) + len(gold) >= config.minimum,
        changed,
    )


def _without_replaced(
    place: Workspace, tasks: Mapping[int, dict[str, Any]], asked: set[int]
) -> dict[int, dict[str, Any]]:
    """`tasks`, those of earlier rounds without the withdrawn annotations that another answer has replaced: changed
    later, they would take its place and not count. What nobody has replaced may change until it is restored."""
    out, replaced = read_withdrawn(place.root), {*read_corrections(place.root), *read_gold(place.root)}
    replaced |= {one["data"]["sample"] for number, one in tasks.items() if number in asked and one["annotations"]}

    def stands(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> bool:
        sample = task["data"]["sample"]
        return task["id"] in asked or sample not in replaced or (str(annotation["id"]), sample) not in out

    return {
        number: {**task, "annotations": [one for one in task["annotations"] if stands(task, one)]}
        for number, task in tasks.items()
    }


def _known(place: Workspace) -> dict[str, dict[str, str]]:
    """What people said so far by sample, of those to learn from and of evaluation samples, withdrawn or not."""
    return {**read_corrections(place.root, withdrawn=True), **read_gold(place.root, withdrawn=True)}


def _is_news(round_: Round, task: Mapping[str, Any], known: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a task of an earlier round says more of its sample than earlier rounds took in."""
    row = known.get(task["data"]["sample"])
    if row is None or int(row["round"]) >= round_.number:
        return True
    try:
        learned = datetime.fromisoformat(row["revision"])
        return any(datetime.fromisoformat(one["updated_at"]) > learned for one in task["annotations"])
    except (KeyError, TypeError, ValueError):  # what cannot be read is told when it is read
        return True


@network_step
def ask_again(place: Workspace, answers: Answers) -> None:
    """Disputed tasks go back into the queue, for somebody who has not answered them yet."""
    studio = label_studio(place)
    for task_id, labelers in answers.asked_again.items():
        studio.ask_again(task_id, labelers)


@science_step
def learn_from(place: Workspace, round_: Round, answers: Answers) -> None:
    """Masks into the round's shard, what the labelers agree on into the table that training reads or, of evaluation
    samples, into the gold table, and every single annotation into the round's own table."""
    masks = {one.sample: one.mask for one in [*answers.corrections, *answers.gold] if one.mask is not None}
    write_arrays(round_.masks, sorted(masks.items()))
    annotations = annotation_rows(answers.opinions, answers.set_aside)
    write_table(round_.corrections, ANNOTATION_COLUMNS, annotations)
    for table, before, said in (
        (place.corrections, read_corrections(place.root, withdrawn=True), answers.corrections),
        (place.gold_table, read_gold(place.root, withdrawn=True), answers.gold),
    ):
        rows = still_standing(before, annotations)
        for one in said:
            rows[one.sample] = correction_row(one, round_.number, place.relative(round_.masks))
        write_table(table, CORRECTION_COLUMNS, sorted(rows.values(), key=lambda row: row["sample"]))


@network_step
def seal(place: Workspace, round_: Round, answers: Answers) -> str:
    """Version masks and annotations, commit, tag the round, tell MLflow; the commit."""
    git, dvc, state = Git(place.root), Dvc(place.root), round_.read()
    verdicts = _verdicts(answers.corrections)
    drawn = {row["sample"] for row in _read_batch(round_) if row.get("at_random")}
    at_random = _verdicts(one for one in answers.corrections if one.sample in drawn)
    earlier = latest_annotations(one for one in place.rounds() if one.number < round_.number)
    spent = {number: float(row["minutes"]) for number, row in earlier.items()}  # a changed annotation brings them again
    minutes = round(sum(max(0.0, one.minutes - spent.get(str(one.annotation), 0.0)) for one in answers.opinions), 2)
    found = {
        "collected": len(answers.corrections),
        "gold_collected": len(answers.gold),
        "verdicts": verdicts,
        "at_random": at_random,
        "minutes": minutes,
        "set_aside": [asdict(one) for one in answers.set_aside],
        "pulled": {task["id"]: task["updated_at"] for task in read_json_lines(round_.annotations)},
    }
    closed = state.get("closed") or max(_now(), state["opened"])  # a clock that was set back makes no negative times
    round_.write({**state, **found, "state": "closed", "closed": closed})
    versioned = dvc.add([place.relative(round_.annotations), place.relative(round_.masks)])
    if dvc.remote():
        write_json(place.unpushed, {"since": closed, **read_json(place.unpushed)})
    tables = (round_.state, round_.corrections, round_.comparison, place.corrections, place.gold_table)
    paths = [*versioned, "models", *map(place.relative, tables)]
    said = f"{len(answers.corrections)} corrections" + (f", {len(answers.gold)} gold" if answers.gold else "")
    commit = git.commit(paths, f"[round {round_.number}] Learn from {said}")
    tracker, run = tracker_of(place), state["mlflow_runs"]["round"]
    tracker.tag(run, {"abnloop.round_commit": commit, "abnloop.tag": round_.tag})
    given = {"verdict": verdicts, "verdict_at_random": at_random}
    collected = {"collected": len(answers.corrections), "gold_collected": len(answers.gold), "minutes": minutes}
    tracker.log_metrics(run, {**collected, **given})
    tracker.log_files(run, {"round.json": round_.state})
    tracker.finish(run)
    git.tag(round_.tag)  # last: the tag is what says that nothing is left to do
    return commit


@science_step
def back_up(place: Workspace) -> None:
    """Copy to the DVC remote what it lacks. One that cannot be reached now is tried again by the next run."""
    if not place.unpushed.is_file():
        return
    try:
        Dvc(place.root).push()
    except ValueError as error:
        waiting = {**read_json(place.unpushed), "why": str(error)}
        write_json(place.unpushed, waiting)
        get_run_logger().warning("the DVC remote lacks data since %s: %s", waiting["since"], error)
    else:
        place.unpushed.unlink()


def simulate_labelers(
    place: Workspace,
    faults: Faults = Faults(),  # noqa: B008
    seed: int = 0,
    labelers: int = 1,
) -> Counter[str]:
    """Simulated labelers answer what is open through Label Studio's API; how often each verdict was given.

    They know the masks that `abnloop init` set aside for them. Raises ValueError where there are none, or where no
    round is open.
    """
    round_ = place.latest()
    if round_ is None or state_of(place, round_) != "open":
        raise ValueError("no round is open; open one with `abnloop round open`")
    if not place.simulation.is_file():
        raise ValueError(f"{place.simulation} does not exist; simulated labelers need masks: `abnloop init --masks`")
    asked = read_json(round_.tasks)
    with np.load(place.simulation, allow_pickle=False) as known:
        masks = {sample: known[sample] for sample in asked["tasks"] if sample in known}

    def say(done: int, total: int) -> None:
        report("simulated labelers: tasks", done, total)

    people = simulated_labelers(place, label_studio(place), labelers)
    return simulate(people, asked["project"], asked["tasks"].values(), masks, faults, seed, say)


# --- shared --------------------------------------------------------------------------------------------------------


def label_studio(place: Workspace) -> LabelStudio:
    """The Label Studio of this workspace. Raises ConnectionError where it is down."""
    known = addresses(place)
    return LabelStudio(known.label_studio, known.label_studio_token)


def _identity(place: Workspace) -> str:
    """Tells workspaces of the same name apart: the commit that `abnloop init` made."""
    return Git(place.root).first_with(place.relative(place.manifest))


def tracker_of(place: Workspace) -> Tracker:
    return Tracker(addresses(place).mlflow, load_section(ProjectConfig, place.params, "project").name)


def _opened(place: Workspace, new: bool) -> Opened:
    round_ = place.latest()
    assert round_ is not None
    state, tasks = round_.read(), len(read_json(round_.tasks)["tasks"])
    return Opened(round_.number, new, tasks, decision_of(state), state["gate"], state.get("stopped", ""))


def _unanswered(samples: Sequence[Sample], answered: Mapping[str, Any]) -> list[Sample]:
    """Whom labelers can be asked about."""
    return [one for one in samples if one.split in ("train", "pool") and one.id not in answered]


def _stopped(place: Workspace) -> str:
    """Why the labelers should not be asked any more, or an empty text."""
    wanted = load_section(LabelingConfig, place.params, "labeling").gold
    left = _unanswered(read_manifest(place.root), read_corrections(place.root))
    if not left and not any(missing_gold(place, wanted).values()):
        return "every picture of the pool is answered; `abnloop ingest` brings new ones"
    return reason_to_stop([one.read() for one in place.rounds()], load_section(StopConfig, place.params, "stop"))


def _collected(round_: Round, answers: Answers, closed: bool, commit: str) -> Collected:
    state = round_.read()
    again = f"{decision_of(state)}: {state['gate']}" if closed and state.get("verdict", {}).get("earlier") else ""
    return Collected(
        round_.number,
        closed,
        answers.answered,
        answers.tasks,
        len(answers.corrections),
        len(answers.gold),
        len(answers.set_aside),
        commit,
        again,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _verdicts(corrections: Iterable[Consensus]) -> dict[str, int]:
    return dict(sorted(Counter(one.verdict for one in corrections).items()))


def _read_batch(round_: Round) -> list[dict[str, str]]:
    with round_.batch.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _metrics_table(metrics: Mapping[str, Any], control: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {"validation": metrics["val"], "test": metrics["test"], "test, control": control["test"]}
    return [
        {"metric": name.replace("_", " "), **{title: values.get(name) for title, values in columns.items()}}
        for name in metrics["test"]
    ]


def _markdown(rows: list[dict[str, str]]) -> str:
    columns = ["task", "sample", "score", "reason"]
    lines = [columns, ["---"] * len(columns)]
    lines += [[row[name].replace("|", "\\|") for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
