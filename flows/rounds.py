"""The loop, in two short flows: `open_round` trains, judges and asks; `collect_round` takes the answers in.

Labeling takes days, and nothing sleeps through it: a round's state is its files, so a flow that was killed anywhere
goes on from the first file that is missing.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext

from abn.config import load_section, read_params
from abn.manifest import (
    CORRECTION_COLUMNS,
    LATER_COLUMNS,
    Sample,
    class_names,
    mask_sha256,
    read_corrections,
    read_manifest,
)
from abn.predict import PredictConfig
from abn.predictions import read_predictions
from abn.selection import SelectionConfig
from abn.train import Settings, TrainConfig, choose_device
from flows.gallery import gallery, gold_rows, map_tile, read_rgb
from flows.gate import GateConfig, Judgement, judge
from flows.progress import report
from flows.services import addresses
from flows.tracking import STAGES, Tracker
from flows.versions import Dvc, Git
from flows.workspace import (
    Round,
    Workspace,
    open_workspace,
    read_json,
    write_arrays,
    write_atomically,
    write_json,
    write_table,
)
from labeling.client import LabelStudio
from labeling.corrections import Correction
from labeling.corrections import read_corrections as read_annotations
from labeling.screen import INSTRUCTIONS, Tool, labeling_screen
from labeling.simulator import Faults, simulate
from labeling.tasks import Question, make_task

GPU = "abnloop-gpu"  # Prefect's limit of trainings at once
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


# What a round reads of params.yaml beside a training's own, looked at before anything begins.
SECTIONS = {"project": ProjectConfig, "predict": PredictConfig, "gate": GateConfig, "labeling": LabelingConfig}


@dataclass(frozen=True)
class Opened:
    """What `open_round` did. `new` is False where a round was open already."""

    round: int
    new: bool
    tasks: int
    promoted: bool
    why: str


@dataclass(frozen=True)
class Collected:
    """What `collect_round` found. `round` is 0 where none was open."""

    round: int
    closed: bool
    answered: int
    tasks: int
    corrections: int
    set_aside: int
    commit: str


@flow(name="open-round")
def open_round(workspace: str = ".") -> Opened:
    """Train, evaluate, judge, choose whom to ask, and put the batch before the labelers. Then end."""
    place = open_workspace(workspace)
    with place.lock("round open"):
        new = check_before_opening(place)
        if new:
            round_ = begin(place)
            reproduce(place, round_)
            decide(place, round_)
            ask(place, round_)
        keep(place)
        return _opened(place, new)


@flow(name="collect-round")
def collect_round(workspace: str = ".") -> Collected:
    """Pull what was answered since the last time; close the round when its batch is complete or overdue."""
    place = open_workspace(workspace)
    with place.lock("round collect"):
        round_ = place.latest()
        state = state_of(place, round_)
        if round_ is None or state not in ("open", "unsealed"):
            get_run_logger().info("no round is open, there is nothing to collect")
            return Collected(round_.number if round_ else 0, True, 0, 0, 0, 0, "")
        if state == "open":
            keep(place)  # unless opening was interrupted before that, there is nothing to do
            pull(place, round_)
        answers = read_answers(place, round_)
        if state == "open" and not answers.complete and not answers.overdue:
            get_run_logger().info("%d of %d tasks are answered", answers.answered, answers.tasks)
            return _collected(round_, answers, closed=False, commit="")
        learn_from(place, round_, answers)
        return _collected(round_, answers, closed=True, commit=seal(place, round_, answers))


State = Literal["none", "begun", "open", "unsealed", "closed"]


def state_of(place: Workspace, round_: Round | None) -> State:
    """Where a round stands: `begun` until its tasks are pushed, `open` until it is collected, `closed` once tagged;
    `unsealed` in between, where closing it was interrupted."""
    if round_ is None:
        return "none"
    state = round_.read().get("state", "begun")
    if state == "closed" and round_.tag not in Git(place.root).tags(round_.tag):
        return "unsealed"
    return state


# --- opening -------------------------------------------------------------------------------------------------------


def check_before_opening(place: Workspace) -> bool:
    """Whether a round may open now; False where one is open already. What a user can mend is a ValueError, and
    nothing has changed by then."""
    latest = place.latest()
    state = state_of(place, latest)
    if state == "open":
        return False
    if latest and state == "unsealed":
        raise ValueError(f"collecting round {latest.number} was interrupted; finish it with `abnloop round collect`")
    choose_device(Settings.load(place.params).train.device)
    for name, section in SECTIONS.items():
        load_section(section, place.params, name)
    config = load_section(SelectionConfig, place.params, "selection")
    samples, answered = read_manifest(place.root), read_corrections(place.root)
    class_names(samples)
    pool = [sample for sample in samples if sample.split in ("train", "pool") and sample.id not in answered]
    if config.budget > len(pool):
        raise ValueError(
            f"selection.budget is {config.budget} but the pool holds {len(pool)} images; lower it in params.yaml"
        )
    interrupted = f"|{place.relative(latest.folder)}/.*" if latest and state == "begun" else ""
    ours = re.compile(rf"dvc\.lock|results/.*|models/.*{interrupted}")
    if foreign := [path for path in Git(place.root).changed_paths() if not ours.fullmatch(path)]:
        raise ValueError(
            f"{foreign[0]} has changes that are not committed ({len(foreign)} file(s)); "
            "commit them with `git add` and `git commit`, or undo them, so that the round can be restored"
        )
    if absent := Dvc(place.root).missing():
        raise ValueError(f"the DVC cache lacks {min(absent)}; fetch it with `dvc pull`")
    label_studio(place).check()
    return True


@science_step
def begin(place: Workspace) -> Round:
    """The round to work on: the one that was interrupted, or a new one."""
    latest = place.latest()
    if latest and state_of(place, latest) == "begun":
        get_run_logger().info("round %d goes on where it was interrupted", latest.number)
        return latest
    round_ = place.round(latest.number + 1 if latest else 1)
    if load_section(TrainConfig, place.params, "train").start == "champion" and place.champion.is_file():
        shutil.copyfile(place.champion, place.start_model)
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
    stage = ""

    def on_line(line: str) -> None:
        nonlocal stage
        logger.info(line)
        if started := re.match(r"Running stage '(\w+)'", line):
            stage = started[1]
        if counted := re.match(r"(\w+) (\d+)/(\d+)", line):
            report(f"{stage}: {counted[1]}", int(counted[2]), int(counted[3]))
            if stage == watched:
                tracker.follow(runs["train"], curve)

    with concurrency(GPU, occupy=1, strict=False):
        Dvc(place.root).repro(on_line)
    tracker.follow(runs["train"], curve)


@network_step
def decide(place: Workspace, round_: Round) -> None:
    """Log what came out, register the challenger, and promote it or say why not."""
    state = round_.read()
    if "promoted" in state:
        return
    tracker, runs, hashes = tracker_of(place), state["mlflow_runs"], Dvc(place.root).hashes()
    metrics = json.loads(place.metrics.read_text())
    control = json.loads(place.control_metrics.read_text())
    samples = read_manifest(place.root)
    corrections = sorted(read_corrections(place.root).values(), key=lambda row: row["sample"])
    learned = [sample for sample in samples if sample.split in ("train", "pool")]
    judged = [sample for sample in samples if sample.split in ("val", "test")]

    versions = {
        "abnloop.git_commit": Git(place.root).head(),
        "abnloop.round": str(round_.number),
        "abnloop.dvc_images": hashes["data/images"],
        "abnloop.dvc_corrections": hashes["data/corrections.csv"],
        "abnloop.dvc_model": hashes["results/model.pt"],
        "abnloop.corrections": str(len(corrections)),
    }
    for run in runs.values():
        tracker.tag(run, versions)
    tracker.log_inputs(runs["train"], learned, hashes, "training")
    tracker.log_inputs(runs["evaluate"], judged, hashes, "evaluation")
    tracker.log_metrics(runs["evaluate"], metrics)
    tracker.log_metrics(runs["round"], {"corrections": len(corrections), **metrics, "control": control})
    predictions = read_predictions(place.predictions)
    images = {sample.id: sample.image for sample in samples}
    files: dict[str, Path | Image.Image | str] = {"metrics.json": place.metrics, "params.yaml": place.params}
    files |= {f"plots/{path.name}": path for path in sorted(place.plots.iterdir())}
    if rows := gold_rows(predictions, 8):
        files["gallery.png"] = gallery(place.root, images, predictions, rows)
    tracker.log_files(runs["evaluate"], files)
    tracker.log_files(runs["round"], {"corrections.csv": place.corrections})
    tracker.log_files(runs["select"], {"batch.csv": place.batch})

    description = f"Round {round_.number}, learned from {len(corrections)} corrections."
    version = tracker.register(runs["train"], place.model, place.root / "abn", versions, description)
    champion = read_json(place.champion_record)
    if champion.get("round") == round_.number:  # promoted, then interrupted
        verdict = Judgement(True, champion["gate"])
    else:
        verdict = judge(metrics["val"], champion.get("metrics"), load_section(GateConfig, place.params, "gate"))
    tracker.tag_version(version, {"abnloop.promoted": verdict.promoted, "abnloop.gate": verdict.reason})
    tracker.tag(runs["round"], {"abnloop.promoted": verdict.promoted, "abnloop.gate": verdict.reason})
    if verdict.promoted:
        tracker.promote(version)
        shutil.copyfile(place.model, place.champion)
        Dvc(place.root).add([place.relative(place.champion)])
        named = {"round": round_.number, "model_version": version, "gate": verdict.reason, "metrics": metrics["val"]}
        write_json(place.champion_record, named)
    for run in STAGES:
        tracker.finish(runs[run])
    create_table_artifact(key=f"metrics-{round_.name}", table=_metrics_table(metrics, control), description=description)
    known = {"corrections": len(corrections), "model_version": version, "metrics": metrics["test"]}
    known |= {"control": control["test"], "promoted": verdict.promoted, "gate": verdict.reason}
    round_.write({**state, **known})


@network_step
def ask(place: Workspace, round_: Round) -> None:
    """Put the batch before the labelers: a task a sample, the network's own map its editable prediction."""
    state, config = round_.read(), load_section(LabelingConfig, place.params, "labeling")
    shutil.copyfile(place.batch, round_.batch)
    samples = {sample.id: sample for sample in read_manifest(place.root)}
    studio = label_studio(place)
    title = f"abnloop {load_section(ProjectConfig, place.params, 'project').name}"
    classes = class_names(list(samples.values()))
    project = studio.ensure_project(title, labeling_screen(classes, config.tool), INSTRUCTIONS)
    tasks = list(_tasks(place, round_, samples, classes, f"v{state['model_version']}", config.tool))
    for folder in (place.images, round_.heatmaps):
        studio.serve_folder(project, folder)
    studio.attach_backend(project, addresses(place).live, "abnloop")
    pushed = studio.push(project, tasks, lambda done, total: report("ask: tasks", done, total))
    write_json(round_.tasks, {"project": project, "tasks": pushed})
    tracker_of(place).tag(state["mlflow_runs"]["round"], {"abnloop.label_studio_project": project})
    url = f"{studio.url}/projects/{project}/data?task="
    rows = [{**row, "task": f"[{pushed[row['sample']]}]({url}{pushed[row['sample']]})"} for row in _read_batch(round_)]
    create_markdown_artifact(key=f"batch-{round_.name}", markdown=_markdown(rows), description="Who is asked, and why.")
    round_.write({**state, "state": "open", "opened": _now(), "project": project})  # last: now nothing is left to do


@science_step
def keep(place: Workspace) -> None:
    """Commit what the round stands on: code and data versions, metrics, the batch and its tasks."""
    round_ = place.latest()
    assert round_ is not None
    files = [round_.batch, round_.tasks, round_.state]
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
        answer = int(predictions.probabilities[row].argmax())
        question = Question(
            sample=sample.id,
            image_url=LabelStudio.local_file_url(place.root, path),
            heatmap_url=LabelStudio.local_file_url(place.root, heat),
            width=width,
            height=height,
            label=sample.label,
            predicted=classes[answer],
            confidence=float(predictions.probabilities[row, answer]),
            reason=pick["reason"],
            attention_map=predictions.maps[row],
        )
        yield make_task(question, version, round_.number, tool)


# --- collecting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a round's annotations say so far."""

    corrections: list[Correction]
    set_aside: list[dict[str, Any]]
    answered: int
    tasks: int
    overdue: bool

    @property
    def complete(self) -> bool:
        return self.answered >= self.tasks


@network_step
def pull(place: Workspace, round_: Round) -> None:
    """Append what changed in Label Studio since the last pull to annotations.jsonl, as received."""
    asked = read_json(round_.tasks)
    lines = _read_lines(round_.annotations)
    known = {(task["id"], task["updated_at"]) for task in lines}
    latest = max((task["updated_at"] for task in lines), default=None)
    # A minute of overlap: a transaction may become visible after a later one.
    since = _label_studio_time(datetime.fromisoformat(latest) - timedelta(minutes=1)) if latest else None
    tasks = label_studio(place).answered(asked["project"], since, list(asked["tasks"].values()))
    new = [task for task in tasks if (task["id"], task["updated_at"]) not in known]
    write_atomically(round_.annotations, "".join(json.dumps(task, ensure_ascii=False) + "\n" for task in lines + new))
    get_run_logger().info("%d tasks changed since %s", len(new), latest or "the start")


def read_answers(place: Workspace, round_: Round) -> Answers:
    """The annotations received so far; those that cannot be learned from are set aside with their reason."""
    config, state = load_section(LabelingConfig, place.params, "labeling"), round_.read()
    latest = {task["id"]: task for task in _read_lines(round_.annotations)}  # later lines replace earlier ones
    corrections, aside = read_annotations(latest.values(), class_names(read_manifest(place.root)))
    overdue = datetime.now(UTC) > datetime.fromisoformat(state["opened"]) + timedelta(hours=config.deadline_hours)
    return Answers(
        corrections,
        [asdict(one) for one in aside],
        sum(bool(task["annotations"]) for task in latest.values()),
        len(read_json(round_.tasks)["tasks"]),
        overdue and len(corrections) >= config.minimum,
    )


@science_step
def learn_from(place: Workspace, round_: Round, answers: Answers) -> None:
    """Masks into the round's shard, corrections into the table that training reads."""
    masks = {one.sample: one.mask for one in answers.corrections if one.mask is not None}
    write_arrays(round_.masks, sorted(masks.items()))
    rows = read_corrections(place.root)
    for one in answers.corrections:
        mask = masks.get(one.sample)
        rows[one.sample] = {
            **LATER_COLUMNS,
            **{name: str(getattr(one, name)) for name in ("sample", "annotation", "revision", "labeler", "verdict")},
            "round": str(round_.number),
            "label": one.label or "",
            "minutes": f"{one.minutes:.2f}",
            "model_version": one.model_version,
            "masks": "" if mask is None else place.relative(round_.masks),
            "sha256": "" if mask is None else mask_sha256(mask),
        }
    write_table(place.corrections, CORRECTION_COLUMNS, sorted(rows.values(), key=lambda row: row["sample"]))


@network_step
def seal(place: Workspace, round_: Round, answers: Answers) -> str:
    """Version masks and annotations, commit, tag the round, tell MLflow; the commit."""
    git, dvc, state = Git(place.root), Dvc(place.root), round_.read()
    verdicts = dict(sorted(Counter(one.verdict for one in answers.corrections).items()))
    minutes = round(sum(one.minutes for one in answers.corrections), 2)
    found = {
        "collected": len(answers.corrections),
        "verdicts": verdicts,
        "minutes": minutes,
        "set_aside": answers.set_aside,
    }
    round_.write({**state, **found, "state": "closed", "closed": state.get("closed") or _now()})
    versioned = dvc.add([place.relative(round_.annotations), place.relative(round_.masks)])
    dvc.push()
    paths = [*versioned, place.relative(round_.state), place.relative(place.corrections)]
    commit = git.commit(paths, f"[round {round_.number}] Learn from {len(answers.corrections)} corrections")
    tracker, run = tracker_of(place), state["mlflow_runs"]["round"]
    tracker.tag(run, {"abnloop.round_commit": commit, "abnloop.tag": round_.tag})
    tracker.log_metrics(run, {"collected": len(answers.corrections), "minutes": minutes, "verdict": verdicts})
    tracker.log_files(run, {"round.json": round_.state})
    tracker.finish(run)
    git.tag(round_.tag)  # last: the tag is what says that nothing is left to do
    return commit


def simulate_labelers(place: Workspace, faults: Faults = Faults(), seed: int = 0) -> Counter[str]:  # noqa: B008
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

    return simulate(label_studio(place), asked["project"], asked["tasks"].values(), masks, faults, seed, say)


# --- shared --------------------------------------------------------------------------------------------------------


def label_studio(place: Workspace) -> LabelStudio:
    """The Label Studio of this workspace. Raises ConnectionError where it is down."""
    known = addresses(place)
    return LabelStudio(known.label_studio, known.label_studio_token)


def tracker_of(place: Workspace) -> Tracker:
    return Tracker(addresses(place).mlflow, load_section(ProjectConfig, place.params, "project").name)


def _opened(place: Workspace, new: bool) -> Opened:
    round_ = place.latest()
    assert round_ is not None
    state = round_.read()
    return Opened(round_.number, new, len(read_json(round_.tasks)["tasks"]), state["promoted"], state["gate"])


def _collected(round_: Round, answers: Answers, closed: bool, commit: str) -> Collected:
    return Collected(
        round_.number,
        closed,
        answers.answered,
        answers.tasks,
        len(answers.corrections),
        len(answers.set_aside),
        commit,
    )


def _label_studio_time(moment: datetime) -> str:
    """The one format that its filters take."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


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
