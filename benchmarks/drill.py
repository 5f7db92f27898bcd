"""What the loop survives: it is killed before and after everything it does, and what it stands on fails.

Each case is a copy of the same workspace, in which a child process runs a flow until something happens to it, and then
the flow is run again as its schedule would. What there is in the end must be what an undisturbed copy has: the same
batch, each task once, the same corrections, the same data. `python -m benchmarks.drill` does every case and writes
docs/reliability.md from what it saw; tests/test_drill.py does a few of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from PIL import Image

from abn.manifest import read_corrections
from benchmarks.faulty import Fault, Proxy, proxy
from flows import services
from flows.ingest import change_settings, init_workspace
from flows.versions import HOLDER, Dvc, Git
from flows.workspace import Workspace, open_workspace, read_json, read_json_lines, write_json, write_table

PROJECT = Path(__file__).resolve().parent.parent
SIDE, BUDGET = 16, 6  # of a picture in pixels; of a batch
SETTINGS: dict[str, Any] = {
    "data.size": [SIDE, SIDE],
    "model.backbone": "cifar_resnet8",
    "train.epochs": 2,
    "train.batch_size": 8,
    "train.device": "cpu",
    "selection.budget": BUDGET,
    **{f"services.{name}_port": 0 for name in ("label_studio", "prefect", "mlflow", "live")},
}

# What a flow does, in its order, and the function that does it; a stage has none, DVC says when it runs.
OPENING = {
    "create runs": "flows.tracking.Tracker.begin_round",
    "control": "",
    "train": "",
    "predict": "",
    "evaluate": "",
    "select": "",
    "weigh": "flows.rounds.weigh",
    "upload": "flows.tracking.Tracker.log_files",
    "register": "flows.tracking.Tracker.register",
    "alias": "flows.tracking.Tracker.promote",
    "dvc add champion": "flows.versions.Dvc.add",
    "create project": "labeling.client.LabelStudio.ensure_project",
    "serve pictures": "labeling.client.LabelStudio.serve_folder",
    "attach service": "labeling.client.LabelStudio.attach_backend",
    "push half a batch": "labeling.client.LabelStudio._push_part",
    "push": "labeling.client.LabelStudio.push",
    "commit": "flows.versions.Git.commit",
}
CLOSING = {
    "pull": "labeling.client.LabelStudio.answered",
    "write annotations": "flows.rounds.write_atomically",
    "write masks": "flows.rounds.write_arrays",
    "write corrections": "flows.rounds.write_table",
    "dvc add": "flows.versions.Dvc.add",
    "commit answers": "flows.versions.Git.commit",
    "finish run": "flows.tracking.Tracker.finish",
    "tag": "flows.versions.Git.tag",
    "dvc push": "flows.versions.Dvc.push",
}
SECOND_CALL = {"commit answers"}  # the first is the commit that opening may have left out


@dataclass(frozen=True)
class Event:
    """What happens to a child: `what` is "kill", "full" (the disk), "clock" (set back a day) or an address to call."""

    when: str  # before, during (a training) or after
    point: str
    what: str = "kill"


@dataclass
class Case:
    """One line of the table."""

    flow: str
    what: str
    seen: list[str] = field(default_factory=list)  # what the first run ended with, and those after it
    same: bool = False  # the end is that of the undisturbed copy
    resumed: bool = False  # MLflow says that the round was gone on with
    differs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Ended:
    """A child: its exit code (negative: the signal), what it said last, what there was in the end."""

    code: int
    said: str
    outcome: dict[str, Any]


# --- in the child


def runner(workspace: str) -> None:
    """Import once, which takes longer than a tiny round, and fork for each run that standard input asks for."""
    services.connect(open_workspace(workspace))
    importlib.import_module("flows.rounds")
    importlib.import_module("mlflow.pyfunc")
    print("ready", flush=True)
    for line in sys.stdin:
        flow, root, log, events = json.loads(line)
        pid = os.fork()
        if pid == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, sys.stdout.fileno())
            os.dup2(descriptor, sys.stderr.fileno())
            code = 1
            try:
                _run(flow, open_workspace(root), [Event(*event) for event in events])
                code = 0
            except Exception:  # noqa: BLE001  # how a run fails is what is looked at
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(flow: str, place: Workspace, events: Sequence[Event]) -> None:
    """Run a flow as the schedule would, simulated labelers or reconcile; print what there is then as JSON."""
    rounds = importlib.import_module("flows.rounds")
    for event in events:
        _arm(event)
    if flow == "simulate":
        said = str(rounds.simulate_labelers(place))
    elif flow.startswith("reconcile"):
        found = importlib.import_module("flows.reconcile").reconcile(place, fix=flow.endswith("--fix"))
        said = json.dumps([[one.where, one.what, one.mended] for one in found])
    elif flow == "ingest":
        growing = importlib.import_module("flows.growing")
        said = growing.in_words(growing.ingest_flow(str(place.root)))
    else:
        said = str(getattr(rounds, f"{flow}_round")(str(place.root)))
    services.disconnect()
    print(json.dumps({"said": said, "outcome": outcome(place)}))


def _arm(event: Event) -> None:
    """Wrap the function behind the event's point, so that it happens before or after its first call."""

    def happens() -> None:
        if event.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif event.what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        elif event.what == "clock":
            importlib.import_module("flows.rounds").__dict__["datetime"] = _Yesterday
        else:
            httpx.get(event.what, timeout=300, trust_env=False).raise_for_status()

    name = (OPENING | CLOSING)[event.point]
    if not name:
        _arm_stage(event, happens)
        return
    if event.point == "push half a batch":
        importlib.import_module("labeling.client").__dict__["PART"] = BUDGET // 2
    words = name.split(".")
    owner: Any = importlib.import_module(".".join(words[:2]))
    for word in words[2:-1]:
        owner = getattr(owner, word)
    function, left = getattr(owner, words[-1]), [2 if event.point in SECOND_CALL else 1]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and event.when == "before":
            happens()
        result = function(*arguments, **named)
        if left[0] == 0 and event.when == "after":
            happens()
        return result

    setattr(owner, words[-1], wrapped)


def _arm_stage(event: Event, happens: Callable[[], None]) -> None:
    """Before a stage: DVC says that it runs; after it: DVC says another, or ends; during: an epoch is done."""
    repro = Dvc.repro

    def watched(self: Dvc, on_line: Callable[[str], None], targets: Sequence[str] = ()) -> None:
        stage = ""

        def look(line: str) -> None:
            nonlocal stage
            before = stage
            if began := re.match(r"Running stage '(\w+)'", line):
                stage = began[1]
            elif event.when == "during" and stage == event.point and line.startswith("epoch 1/"):
                happens()
            if stage != before and event.point == {"before": stage, "after": before}.get(event.when):
                happens()
            on_line(line)

        repro(self, look, targets)
        if event.when == "after" and stage == event.point:
            happens()

    Dvc.repro = watched  # type: ignore[method-assign]


class _Yesterday(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) - timedelta(days=1)


def outcome(place: Workspace) -> dict[str, Any]:
    """All that must not depend on what happened on the way; times, ids and what follows from them are left out."""
    from flows import rounds

    round_, git = place.latest(), Git(place.root)
    if round_ is None:  # it ended before it began
        return {}
    state, studio, tracker = round_.read(), rounds.label_studio(place), rounds.tracker_of(place)
    lock = yaml.safe_load((place.root / "dvc.lock").read_text())["stages"] if state.get("promoted") is not None else {}
    outs = {out["path"]: out["md5"] for stage in lock.values() for out in stage["outs"]}
    tasks = studio.overview(state["project"]) if "project" in state else []
    asked = Counter(task["data"]["sample"] for task in tasks if task["data"]["round"] == round_.number)
    runs = tracker.client.search_runs([tracker.experiment()], f"tags.`abnloop.round` = '{round_.number}'")
    parts = Counter(run.data.tags["abnloop.part"] for run in runs)
    versions = tracker.client.search_model_versions(f"name = '{place_name(place)}'")
    trained = [run for run in runs if run.data.tags["abnloop.part"] == "train"]
    rows = [
        {key: value for key, value in row.items() if key not in ("annotation", "revision", "model_version")}
        for row in read_corrections(place.root).values()
    ]
    lines = read_json_lines(round_.annotations)
    head = {"state": state.get("state"), "promoted": state.get("promoted"), "gate": state.get("gate")}
    return head | {
        "round": round_.number,
        "metrics": state.get("metrics"),
        "batch": _sha256(round_.batch),
        "tasks in Label Studio": dict(sorted(asked.items())),
        "tasks.json": sorted(read_json(round_.tasks).get("tasks", {})),
        "data": {path: md5 for path, md5 in sorted(outs.items()) if not path.endswith("train.jsonl")},
        "champion": _sha256(place.champion),
        "runs": dict(sorted(parts.items())),
        "points of the curve": [len(tracker.client.get_metric_history(run.info.run_id, "loss")) for run in trained],
        "model versions of the round": sum(one.tags.get("abnloop.round") == str(round_.number) for one in versions),
        "corrections": sorted(rows, key=lambda row: row["sample"]),
        "annotations": sorted(Counter(one["id"] for task in lines for one in task["annotations"]).values()),
        "masks": _sha256(round_.masks),
        "commits": git._run("log", "--format=%s", "-3").splitlines()[: 2 if state.get("state") == "closed" else 1],
        "tags": git.tags(),
        "not committed": [path for path in git.changed_paths() if path != "params.yaml"],
        "not in the cache": Dvc(place.root).missing(),
        "resumed": any(run.data.tags.get("abnloop.resumed") == "true" for run in runs),
    }


def place_name(place: Workspace) -> str:
    name: str = yaml.safe_load(place.params.read_text())["project"]["name"]
    return name


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# --- around the child


@dataclass(frozen=True)
class Undisturbed:
    """What opening ends with, a workspace whose batch is answered, what collecting it ends with, and where."""

    opened: dict[str, Any]
    answered: Workspace
    closed: dict[str, Any]
    place: Workspace


class Drill:
    """Workspaces that share the services of one, and what an undisturbed one ends with."""

    def __init__(self, base: Workspace, studio: Proxy, tracking: Proxy) -> None:
        self.base, self.studio, self.tracking = base, studio, tracking
        self.copies = 0
        self.runners: list[subprocess.Popen[str]] = []
        self._trained: Workspace | None = None

    def copy(self, source: Workspace | None = None, rename: bool = True) -> Workspace:
        """A copy of the workspace, below it, since Label Studio serves no files from elsewhere.

        `rename`: with a project, an experiment and a model of its own.
        """
        source, self.copies = source or self.base, self.copies + 1
        root = self.base.root / "copies" / f"case{self.copies:03d}"
        hidden = shutil.ignore_patterns("copies", "label-studio", "prefect", "mlflow", "logs", "lock", "services.lock")
        shutil.copytree(source.root, root, ignore=hidden, symlinks=True)
        place = open_workspace(root)
        shutil.copyfile(self.base.services, place.services)  # where they are now, also after a restart
        if rename:
            change_settings(place.params, {"project.name": root.name})
            Git(root).commit(["params.yaml"], "[drill] A name of its own")
        return place

    def trained(self) -> Workspace:
        """A copy whose stages are up to date, as after a round that was interrupted behind them: quicker to open."""
        if self._trained is None:
            self._trained = self.copy(rename=False)
            Dvc(self._trained.root).repro(lambda line: None)
        return self.copy(self._trained)

    def behind_proxy(self, place: Workspace, name: str) -> None:
        """Let a copy reach Label Studio or MLflow through what can fail."""
        records, url = read_json(place.services), {"label_studio": self.studio, "mlflow": self.tracking}[name].url
        write_json(place.services, {**records, name: {**records[name], "url": url}})

    def run(self, place: Workspace, flow: str, *events: Event) -> Ended:
        return self.end(self.start(place, flow, *events))

    def start(self, place: Workspace, flow: str, *events: Event, number: int = 0) -> tuple[int, Path]:
        """Let a runner begin; there are as many as run side by side."""
        self.ready(number + 1)
        log, happens = place.root.with_suffix(f".{number}.log"), [[one.when, one.point, one.what] for one in events]
        asked = self.runners[number].stdin
        assert asked is not None
        asked.write(json.dumps([flow, str(place.root), str(log), happens]) + "\n")
        asked.flush()
        return number, log

    def ready(self, count: int) -> None:
        """Wait until so many runners have imported what they need."""
        while len(self.runners) < count:
            self.runners.append(one := self._runner())
            assert one.stdout and one.stdout.readline() == "ready\n"

    def end(self, started: tuple[int, Path]) -> Ended:
        number, log = started
        answer = self.runners[number].stdout
        assert answer is not None
        code, lines = int(answer.readline()), log.read_text().strip().splitlines() or [""]
        if code:
            return Ended(code, lines[-1], {})
        told = json.loads(lines[-1])
        return Ended(0, told["said"], told["outcome"])

    def _runner(self) -> subprocess.Popen[str]:
        known = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.drill", "--runner", str(self.base.root)],
            cwd=PROJECT,
            env=known,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> None:
        for one in self.runners:
            one.communicate()

    def undisturbed(self) -> Undisturbed:
        """A round that nothing happens to."""
        place = self.copy()
        opened = self.run(place, "open")
        self.run(place, "simulate")
        answered = self.copy(place, rename=False)
        closed = self.run(place, "collect")
        assert opened.code == closed.code == 0, (opened, closed)
        return Undisturbed(opened.outcome, answered, closed.outcome, place)

    def case(
        self, what: str, flow: str, wanted: Mapping[str, Any], place: Workspace, *events: Event, again: int = 1
    ) -> Case:
        """Run the flow with `events`, and then `again` as often as the schedule would until it went well."""
        case, began = Case(flow, what), time.monotonic()
        ended = self.run(place, flow, *events)
        case.seen.append(_words(ended))
        for _ in range(again):
            ended = self.run(place, flow)
            case.seen.append(_words(ended))
        self.judge(case, ended.outcome, wanted)
        case.seconds = time.monotonic() - began
        return case

    def judge(self, case: Case, seen: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = [name for name in wanted if name != "resumed"]
        case.differs = {name: (wanted[name], seen.get(name)) for name in names if wanted[name] != seen.get(name)}
        case.same, case.resumed = not case.differs, bool(seen.get("resumed"))


def _words(ended: Ended) -> str:
    """How a run ended, in a few words."""
    if ended.code < 0:
        return f"killed ({signal.Signals(-ended.code).name})"
    said = re.sub(r"[0-9a-f]{40}", "COMMIT", " ".join(ended.said.split()))
    said = re.sub(r"\S*/copies/case\d+", "WORKSPACE", said)
    said = re.sub(r"pid \d+ on \S+, since [^)]*", "PID, HOST, TIME", said)
    return f"exit {ended.code}: {said}" if ended.code else said


def write_pictures(folder: Path, counts: Mapping[str, int]) -> Path:
    """Noise with a bright or dark square, and its mask, `counts` a split; the path of the index."""
    rows, generator = [], np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            name, label = f"{split}{number:03d}", "light" if number % 2 else "dark"
            picture = generator.integers(40, 160, (SIDE, SIDE, 3)).astype(np.uint8)
            mask, (top, left) = np.zeros((SIDE, SIDE), np.uint8), generator.integers(0, SIDE - 6, 2)
            mask[top : top + 6, left : left + 6] = 255
            picture[mask > 0] = 250 if label == "light" else 5
            rows.append({"id": name, "image": f"{name}.png", "label": label, "split": split, "mask": f"m_{name}.png"})
            Image.fromarray(picture).save(folder / f"{name}.png")
            Image.fromarray(mask).save(folder / f"m_{name}.png")
    write_table(folder / "index.csv", list(rows[0]), rows)
    return folder / "index.csv"


@contextmanager
def drill_in(folder: Path) -> Iterator[Drill]:
    """A tiny workspace below `folder` with its services up, Label Studio and MLflow behind proxies, for a while."""
    (folder / "source").mkdir(parents=True)
    index = write_pictures(folder / "source", {"train": 24, "val": 8, "test": 8})
    init_workspace(PROJECT, folder / "drill", folder / "source", index=index, settings=SETTINGS)
    base = open_workspace(folder / "drill")
    try:
        services.up(base)
        known = services.addresses(base)
        with proxy(known.label_studio) as studio, proxy(known.mlflow) as tracking:
            drill = Drill(base, studio, tracking)
            try:
                yield drill
            finally:
                drill.close()
    finally:
        services.down(base)


# --- the cases


Place = Callable[[], Workspace]  # makes the copy for a case


def killed_opening(drill: Drill, when: str, point: str, wanted: Mapping[str, Any]) -> Case:
    place = drill.trained() if OPENING[point] else drill.copy()
    return drill.case(f"killed {when} {point}", "open", wanted, place, Event(when, point))


def killed_with_the_only_slot(drill: Drill, wanted: Mapping[str, Any]) -> Case:
    """The slot of the dead is a lease: it runs out, and the run of another workspace that waits gets it."""
    what = "killed during control, while the run of another workspace waited for the only training slot"
    case, began = Case("open", what), time.monotonic()
    dies, waits = drill.copy(), drill.copy()
    drill.ready(2)
    first = drill.start(dies, "open", Event("during", "control"), number=0)
    while not dies.slot.is_file():
        time.sleep(0.05)
    second = drill.start(waits, "open", number=1)
    case.seen.append(_words(drill.end(first)))
    waited = not waits.slot.is_file()
    ended = drill.end(second)
    case.seen.append(_words(ended))
    drill.judge(case, ended.outcome, wanted)
    if not waited:
        case.same, case.differs["waited"] = False, (True, waited)
    case.seconds = time.monotonic() - began
    return case


def two_workspaces_train(drill: Drill, wanted: Mapping[str, Any]) -> Case:
    """Two rounds begin at once on one Prefect server that allows one training: one of them trains after the other."""
    case, began = Case("open", "two workspaces that may train one at a time"), time.monotonic()
    places, trained, at_once = [drill.copy(), drill.copy()], set[str](), 0
    drill.ready(2)
    started = [drill.start(place, "open", number=number) for number, place in enumerate(places)]
    while not all(place.round(1).tasks.is_file() for place in places):
        training = {place.root.name for place in places if trains(place)}
        trained |= training
        at_once = max(at_once, len(training))
    for one in started:
        ended = drill.end(one)
        case.seen.append(_words(ended))
        drill.judge(case, ended.outcome, wanted)
    if (len(trained), at_once) != (2, 1):
        case.same, case.differs["trained, at once"] = False, ((2, 1), (len(trained), at_once))
    case.seconds = time.monotonic() - began
    return case


def trains(place: Workspace) -> bool:
    """Whether DVC brings stages of the workspace up to date."""
    for process in psutil.process_iter(["environ", "cmdline", "status"]):
        mine = (process.info["environ"] or {}).get(HOLDER, "").endswith(f" {place.root}")
        if mine and process.info["status"] != psutil.STATUS_ZOMBIE and "repro" in (process.info["cmdline"] or []):
            return True
    return False


def killed_collecting(drill: Drill, when: str, point: str, wanted: Mapping[str, Any], copy: Place) -> Case:
    return drill.case(f"killed {when} {point}", "collect", wanted, copy(), Event(when, point))


def the_disk_is_full(drill: Drill, wanted: Mapping[str, Any], copy: Place) -> Case:
    full = Event("before", "write masks", "full")
    return drill.case("the disk is full when masks are written", "collect", wanted, copy(), full)


def the_clock_is_set_back(drill: Drill, wanted: Mapping[str, Any], copy: Place) -> Case:
    clock = Event("before", "pull", "clock")
    return drill.case("the clock is set back a day", "collect", wanted, copy(), clock, again=0)


def kills(flow: str) -> Iterator[tuple[str, str]]:
    """When and where a flow is killed; in the first round the control's training is the only one."""
    for point in OPENING if flow == "open" else CLOSING:
        yield "before", point
        if point == "control":
            yield "during", point
        yield "after", point


def label_studio_fails(drill: Drill, fault: Fault, count: int, wanted: Mapping[str, Any]) -> Case:
    """While the batch is pushed, for `count` requests (-1: until the run has ended)."""
    words = {"close": "down", "half": "answers with half a body", "slow": "answers after 30 seconds"}
    what = f"Label Studio {words.get(fault, f'answers {fault}')}, " + ("for good" if count < 0 else f"{count} times")
    place = drill.trained()
    drill.behind_proxy(place, "label_studio")
    case, began = Case("open", what), time.monotonic()
    ended = drill.run(place, "open", Event("before", "push", drill.studio.failing(fault, count)))
    case.seen.append(_words(ended))
    drill.studio.fail("close", 0)
    if ended.code:
        ended = drill.run(place, "open")
        case.seen.append(_words(ended))
    drill.judge(case, ended.outcome, wanted)
    case.seconds = time.monotonic() - began
    return case


def token_expires(drill: Drill, wanted: Mapping[str, Any], copy: Place) -> Case:
    place = copy()
    drill.behind_proxy(place, "label_studio")
    case, began = Case("collect", "Label Studio refuses the token, until it gets a new one"), time.monotonic()
    case.seen.append(_words(drill.run(place, "collect", Event("before", "pull", drill.studio.failing("401")))))
    drill.studio.fail("close", 0)
    ended = drill.run(place, "collect")
    case.seen.append(_words(ended))
    drill.judge(case, ended.outcome, wanted)
    case.seconds = time.monotonic() - began
    return case


def mlflow_is_down_while_training(drill: Drill, wanted: Mapping[str, Any]) -> Case:
    place = drill.copy()
    drill.behind_proxy(place, "mlflow")
    down = Event("during", "control", drill.tracking.failing("close"))
    up = Event("after", "control", drill.tracking.failing("close", 0))
    return drill.case("MLflow is down from the first epoch to the last", "open", wanted, place, down, up, again=0)


def prefect_restarts_while_training(drill: Drill, wanted: Mapping[str, Any]) -> Case:
    place = drill.copy()

    def restart() -> None:
        records = read_json(drill.base.services)
        services.end(records["prefect"])
        services.up(drill.base)
        records = read_json(place.services)
        write_json(place.services, {**records, "prefect": read_json(drill.base.services)["prefect"]})

    drill.studio.calls["restart"] = restart
    event = Event("during", "control", f"{drill.studio.url}/__call/restart")
    return drill.case("Prefect's server is restarted", "open", wanted, place, event, again=0)


def remote_is_out_of_reach(drill: Drill, wanted: Mapping[str, Any], copy: Place) -> Case:
    """The round closes; the data go to the remote as soon as there is one."""
    place = copy()
    case, began = Case("collect", "the DVC remote cannot be reached, until the next run"), time.monotonic()
    remote = place.state / "remote"
    remote.write_text("a file where a folder should be")
    Dvc(place.root)._run("remote", "add", "--local", "-d", "store", str(remote / "store"))
    ended = drill.run(place, "collect")
    late = read_json(place.unpushed)
    case.seen += [_words(ended), f"doctor: the DVC remote lacks data{' (' + late['why'][:60] + ')' if late else ''}"]
    remote.unlink()
    case.seen.append(_words(drill.run(place, "collect")))
    drill.judge(case, ended.outcome, wanted)
    pushed = remote.is_dir() and any(path.is_file() for path in remote.rglob("*"))
    if place.unpushed.is_file() or not late or not pushed:
        case.same, case.differs["pushed"] = False, (True, pushed)
    case.seconds = time.monotonic() - began
    return case


def two_at_once(drill: Drill, wanted: Mapping[str, Any]) -> Case:
    place, began = drill.trained(), time.monotonic()
    case = Case("open", "two loops on one workspace")
    drill.ready(2)
    ended = [drill.end(one) for one in [drill.start(place, "open", number=number) for number in (0, 1)]]
    case.seen = sorted((_words(one) for one in ended), key=lambda said: "in use" in said)
    drill.judge(case, ended[0].outcome if "in use" not in ended[0].said else ended[1].outcome, wanted)
    case.same = case.same and sum("is in use by" in said for said in case.seen) == 1
    case.seconds = time.monotonic() - began
    return case


def cases(drill: Drill) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every case with its name."""
    undisturbed = drill.undisturbed()
    opened, closed = undisturbed.opened, undisturbed.closed
    again = partial(drill.copy, undisturbed.answered, rename=False)

    for when, point in kills("open"):
        yield f"open {when} {point}", partial(killed_opening, drill, when, point, opened)
    yield "open slot", partial(killed_with_the_only_slot, drill, opened)
    yield "open limit", partial(two_workspaces_train, drill, opened)
    for when, point in kills("collect"):
        yield f"collect {when} {point}", partial(killed_collecting, drill, when, point, closed, again)
    faults: list[tuple[Fault, int]] = [("close", 3), ("half", 3), ("500", 3), ("429", 3), ("slow", 1), ("close", -1)]
    for fault, count in faults:
        yield f"fault {fault} {count}", partial(label_studio_fails, drill, fault, count, opened)
    yield "token", partial(token_expires, drill, closed, again)
    yield "mlflow", partial(mlflow_is_down_while_training, drill, opened)
    yield "prefect", partial(prefect_restarts_while_training, drill, opened)
    yield "remote", partial(remote_is_out_of_reach, drill, closed, again)
    yield "full", partial(the_disk_is_full, drill, closed, again)
    yield "clock", partial(the_clock_is_set_back, drill, closed, again)
    yield "two", partial(two_at_once, drill, opened)


# --- the report


HEADER = """\
# What the loop survives

Written by `python -m benchmarks.drill`; `tests/test_drill.py` does a selection at each `make test`. Each case is a copy
of one tiny workspace, with real services, in which one thing happens; then the flow runs again, as on its schedule.
*Same end* means: the batch, the tasks (once each), the corrections, the hashes of data, model and masks, the commits,
the tags and the MLflow runs (one a round) are those of a copy that nothing happened to. *Gone on*: the round's run in
MLflow is marked `abnloop.resumed`.

{good} of {all} cases had the same end, at commit {commit}.

| flow | what happened | what the runs said | same end | gone on |
| --- | --- | --- | --- | --- |"""


def table(done: Sequence[Case], commit: str) -> str:
    """docs/reliability.md."""
    good = sum(case.same for case in done)
    lines = [HEADER.format(good=good, all=len(done), commit=commit[:10])]
    for case in done:
        said = " → ".join(case.seen).replace("|", "\\|")
        end = "yes" if case.same else f"no: {', '.join(case.differs)}"
        lines.append(f"| {case.flow} | {case.what} | {said} | {end} | {'yes' if case.resumed else '-'} |")
    return "\n".join(lines) + "\n"


def report(drill: Drill, only: str) -> None:
    done = []
    for name, run in cases(drill):
        if only and not re.search(only, name):
            continue
        done.append(case := run())
        print(
            f"{case.seconds:5.0f} s  {'same' if case.same else 'DIFFERS'}  {name}: {' → '.join(case.seen)}", flush=True
        )
        if not case.same:
            print(f"         {case.differs}", flush=True)
    if not only:
        text = table(done, Git(PROJECT).head())
        (PROJECT / "docs" / "reliability.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", metavar="WORKSPACE", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="cases whose name matches this pattern; writes no report")
    arguments = parser.parse_args()
    if arguments.runner:
        runner(arguments.runner)
        return
    with tempfile.TemporaryDirectory() as folder, drill_in(Path(folder)) as drill:
        report(drill, arguments.only)


if __name__ == "__main__":
    main()
