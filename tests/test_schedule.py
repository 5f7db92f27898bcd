"""A workspace that is left alone: what its crons start, what is started again, what is left after the end.

One workspace with one set of services and a cron that comes each minute. Each fixture is one thing that happens, in the
order of the file, and keeps what could be seen then; the tests look.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks.drill import PROJECT, SETTINGS, write_pictures
from flows import services, supervisor
from flows.ingest import change_settings, init_workspace
from flows.processes import stop_group, stop_marked
from flows.services import ask_prefect
from flows.supervisor import SERVED, systemd_unit
from flows.versions import HOLDER, Git
from flows.workspace import InUse, Workspace, open_workspace, read_json
from labeling.client import LabelStudio
from labeling.tasks import verdict_results

pytestmark = [pytest.mark.studio, pytest.mark.timeout(900)]  # a test that is run alone waits for all before it

FLOWS = {"retrain", "collect", "ingest"}
SILENCE = 75  # seconds; a heart beats each 30
PATIENCE = 420.0  # seconds: a cron of one minute, and a machine that does much else
HEARTS = """
import sys, time
from flows import services
from flows.workspace import Workspace
services.connect(Workspace(sys.argv[1]))
from prefect import flow
from flows.slots import training_slot
@flow(name=sys.argv[2])
def beat():
    with training_slot(Workspace(sys.argv[3])):
        time.sleep(3600)
beat()
"""
SOONER = """
import sys
from datetime import timedelta
from flows import services
from flows.workspace import Workspace
services.connect(Workspace(sys.argv[1]))
from prefect.client.orchestration import get_client
from flows import serve
with get_client(sync_client=True) as client:
    (known,) = client.read_automations_by_name(serve.FREES_DEAD_RUNS)
    client.delete_automation(known.id)
serve.SILENCE = timedelta(seconds=float(sys.argv[2]))
serve._free_dead_runs()
"""


def eventually(look: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `look` gives as soon as that is true; services that are away are asked again."""
    deadline = time.monotonic() + seconds
    while True:
        found = None
        with suppress(httpx.HTTPError):
            found = look()
        if found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def known_environment() -> dict[str, str]:
    """What a shell has: nothing that another test has told this process of its services."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    return {**clean, "PYTHONPATH": str(PROJECT), "COLUMNS": "200"}


def abnloop(place: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *words, "--workspace", str(place.root)]
    return subprocess.run(command, cwd=PROJECT, env=known_environment(), capture_output=True, text=True, check=False)


def python(place: Workspace, code: str, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", "-c", code, str(place.root), *words]
    return subprocess.Popen(command, cwd=PROJECT, env=known_environment(), start_new_session=True)


@contextmanager
def served(place: Workspace) -> Iterator[subprocess.Popen[bytes]]:
    """`abnloop serve` in a process of its own, from when its schedule is set until it is told to end."""
    command = [sys.executable, "-W", "ignore", "-m", "flows.cli", "serve", "--workspace", str(place.root)]
    with (place.state / "test-serve.log").open("ab") as log:
        begins = log.tell()
        process = subprocess.Popen(command, cwd=PROJECT, env=known_environment(), stdout=log, stderr=log)
    try:

        def said() -> str:
            return (place.state / "test-serve.log").read_bytes()[begins:].decode()

        assert eventually(lambda: supervisor.READY in said() or process.poll() is not None)
        assert process.poll() is None, said()
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(120)


def runs_of(place: Workspace, name: str, after: datetime | None = None) -> list[dict[str, Any]]:
    """The runs of a deployment that have begun, `after` a moment, oldest first."""
    asked = {
        "deployments": {"name": {"any_": [name]}},
        "flow_runs": {"start_time": {"after_": after.isoformat()}} if after else {},
        "sort": "START_TIME_ASC",
        "limit": 200,
    }
    return [run for run in ask_prefect(place, "flow_runs/filter", asked) if run["start_time"]]


def pause(place: Workspace, name: str, paused: bool) -> None:
    """Let the cron of a deployment rest, or go on."""
    (known,) = ask_prefect(place, "deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    path = f"deployments/{known['id']}/{'pause' if paused else 'resume'}_deployment"
    httpx.post(f"{services.address_of(place, 'prefect')}/api/{path}", timeout=30, trust_env=False).raise_for_status()


def by_cron(place: Workspace, names: set[str], after: datetime | None = None) -> dict[str, dict[str, Any]]:
    """The first run of each deployment that its cron started and that has done its work; empty until each has one."""
    found = {
        name: run
        for name in names
        for run in reversed(runs_of(place, name, after))
        if run["auto_scheduled"] and run["state"]["type"] == "COMPLETED" and "in use by" not in run["state"]["message"]
    }
    return found if found.keys() == names else {}


def now() -> datetime:
    return datetime.now().astimezone()


def processes_in(place: Workspace) -> list[str]:
    """What runs that `abnloop serve` or a run in the workspace has started."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline", "status"]):
        known, ended = process.info["environ"] or {}, process.info["status"] == psutil.STATUS_ZOMBIE
        if not ended and (known.get(SERVED) == str(place.root) or known.get(HOLDER, "").endswith(f" {place.root}")):
            found.append(" ".join(process.info["cmdline"] or []))
    return found


# --- what happens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A tiny workspace with a cron of one minute; its services are down."""
    root = tmp_path_factory.mktemp("schedule") / "a folder"
    (root / "source").mkdir(parents=True)
    index = write_pictures(root / "source", {"train": 24, "val": 8, "test": 8})
    crons = {"flows.retrain_cron": "* * * * *", "flows.collect_cron": "* * * * *", "flows.gpu_concurrency": 3}
    init_workspace(PROJECT, root / "leaves", root / "source", index=index, settings={**SETTINGS, **crons})
    workspace = open_workspace(root / "leaves")
    yield workspace
    stop_marked(SERVED, str(workspace.root))
    if process := services.serving_process(workspace):
        process.kill()
        process.wait(10)
    services.down(workspace)


@dataclass(frozen=True)
class Scheduled:
    process: subprocess.Popen[bytes]  # abnloop serve
    first: dict[str, dict[str, Any]]  # the runs that the crons started, by deployment
    second_serve: subprocess.CompletedProcess[str]
    down: subprocess.CompletedProcess[str]
    status: str
    doctor: str


@pytest.fixture(scope="module")
def scheduled(place: Workspace) -> Iterator[Scheduled]:
    """`abnloop serve` starts everything, and the first minute passes."""
    with served(place) as process:
        first = by_cron_in_time(place)
        told = abnloop(place, "serve"), abnloop(place, "down")
        yield Scheduled(process, first, *told, abnloop(place, "status").stdout, abnloop(place, "doctor").stdout)


def by_cron_in_time(place: Workspace, after: datetime | None = None) -> dict[str, dict[str, Any]]:
    return eventually(lambda: by_cron(place, FLOWS, after))


@dataclass(frozen=True)
class Hearts:
    dead: str  # the id of a flow run whose process was killed
    alive: str


@pytest.fixture(scope="module")
def hearts(place: Workspace, scheduled: Scheduled) -> Iterator[Hearts]:
    """Two runs of other workspaces, which nobody watches: both hold a training slot, and one is killed. The automation
    that frees dead runs waits for `SILENCE` seconds."""
    assert python(place, SOONER, str(SILENCE)).wait(120) == 0
    both = {}
    for name in ("dead", "alive"):
        other = Workspace(place.root.parent / name)
        other.state.mkdir(parents=True)
        shutil.copy(place.params, other.params)
        both[name] = python(place, HEARTS, name, str(other.root))

    def running() -> dict[str, str]:
        asked = {"flows": {"name": {"any_": list(both)}}, "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
        beats = {"event": {"name": ["prefect.flow-run.heartbeat"]}}
        heard = {
            one["resource"]["prefect.resource.id"].rpartition(".")[2]
            for one in ask_prefect(place, "events/filter", {"filter": beats})["events"]
        }
        flows = {one["id"]: one["name"] for one in ask_prefect(place, "flows/filter", {})}
        runs = ask_prefect(place, "flow_runs/filter", asked)
        found = {flows[run["flow_id"]]: run["id"] for run in runs if run["id"] in heard}
        return found if found.keys() == both.keys() else {}

    try:
        ids = eventually(running)
        assert ids, "no flow run has a heartbeat"
        both["dead"].kill()
        yield Hearts(**ids)
    finally:
        for one in both.values():
            one.kill()
            one.wait()


@dataclass(frozen=True)
class Restarted:
    before: dict[str, int]  # the pids of the services
    states: dict[str, str]
    told: str  # by abnloop status


@pytest.fixture(scope="module")
def restarted(place: Workspace, scheduled: Scheduled, hearts: Hearts) -> Restarted:
    """Each of the services is killed. From here on the crons of the others rest until they are needed."""
    for name in ("retrain", "ingest"):
        pause(place, name, True)
    records = read_json(place.services)
    before = {name: record["pid"] for name, record in records.items()}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    def up() -> bool:
        known = read_json(place.services)
        return all(known[name]["pid"] != pid for name, pid in before.items()) and all(
            one.state == "up" for one in services.status(place)
        )

    assert eventually(up), abnloop(place, "status").stdout
    return Restarted(before, {one.title: one.state for one in services.status(place)}, abnloop(place, "status").stdout)


@dataclass(frozen=True)
class Hinted:
    run: dict[str, Any]


@pytest.fixture(scope="module")
def hinted(place: Workspace, restarted: Restarted) -> Hinted:
    """A labeler answers one task of the batch, in the Label Studio that was started again."""
    known, tasks = services.addresses(place), read_json(place.round(1).tasks)["tasks"]
    began = now()
    LabelStudio(known.label_studio, known.label_studio_token).annotate(
        min(tasks.values()), verdict_results("map_ok"), 1.0
    )

    def early() -> list[dict[str, Any]]:
        runs = [run for run in runs_of(place, "collect", began) if not run["auto_scheduled"]]
        return [run for run in runs if run["state"]["type"] == "COMPLETED"]

    runs = eventually(early)
    assert runs, "the hint made no run"
    return Hinted(runs[0])


@dataclass(frozen=True)
class Overdue:
    before: str  # the state of the round before its deadline passed
    run: dict[str, Any]  # of the cron, that closed it


@pytest.fixture(scope="module")
def overdue(place: Workspace, hinted: Hinted) -> Overdue:
    """The deadline of the batch passes; the training of the next round takes long."""
    before, began = place.round(1).read()["state"], now()
    change_settings(place.params, {"train.epochs": 20000})
    place.params.write_text(place.params.read_text().replace("deadline_hours: 72", "deadline_hours: 0.001"))
    Git(place.root).commit(["params.yaml"], "A deadline that has passed")

    def closing() -> list[dict[str, Any]]:
        runs = [run for run in runs_of(place, "collect", began) if run["auto_scheduled"]]
        return [run for run in runs if "is closed with" in (run["state"]["message"] or "")]

    runs = eventually(closing)
    assert runs, "no run of the cron has closed the round"
    pause(place, "retrain", False)
    return Overdue(before, runs[0])


@dataclass(frozen=True)
class Ended:
    training: str  # the id of the flow run that trained
    during: list[str]  # what ran before the end
    after: list[str]
    services: dict[str, str]
    code: int


@pytest.fixture(scope="module")
def ended(place: Workspace, scheduled: Scheduled, hearts: Hearts, overdue: Overdue) -> Ended:
    """`abnloop serve` is told to end while the second round trains. The services are up again after that."""

    def training() -> list[str]:
        found = processes_in(place)
        return found if any("abn.train" in one or "abn.control" in one for one in found) else []

    during = eventually(training)
    assert during, "no run of the cron has opened the next round"
    (run,) = [run for run in runs_of(place, "retrain") if run["state"]["type"] == "RUNNING" and is_training(place, run)]
    eventually(lambda: state_of(place, hearts.dead) == "CRASHED", 2 * SILENCE)
    scheduled.process.send_signal(signal.SIGTERM)
    code = scheduled.process.wait(120)
    left, states = processes_in(place), {one.title: str(one.state) for one in services.status(place)}
    services.up(place)
    return Ended(run["id"], during, left, states, code)


def is_training(place: Workspace, run: dict[str, Any]) -> bool:
    """Whether that run holds the workspace, rather than waits for it."""
    runs = place.latest()
    assert runs is not None
    asked = {"task_runs": {"flow_run_id": {"any_": [run["id"]]}}}
    return any(one["name"].startswith("reproduce") for one in ask_prefect(place, "task_runs/filter", asked))


def state_of(place: Workspace, run_id: str) -> str:
    asked = {"flow_runs": {"id": {"any_": [run_id]}}}
    (run,) = ask_prefect(place, "flow_runs/filter", asked)
    return str(run["state"]["type"])


@dataclass(frozen=True)
class Pooled:
    first: dict[str, dict[str, Any]]
    resumed: list[dict[str, Any]]
    left: dict[str, str]  # the states of the services after the end of serve
    dead: str  # the states of the two runs of `hearts`
    alive: str
    slots: int  # that are held in the end


@pytest.fixture(scope="module")
def pooled(place: Workspace, ended: Ended, hearts: Hearts) -> Pooled:
    """A worker of a work pool takes over; `abnloop serve` keeps the services alone."""
    dead, alive = state_of(place, hearts.dead), state_of(place, hearts.alive)
    change_settings(place.params, {"flows.work_pool": "gpus", "train.epochs": 2})
    Git(place.root).commit(["params.yaml"], "A pool, and short trainings again")
    ask_prefect(place, "work_pools/", {"name": "gpus", "type": "process"})
    url = services.addresses(place).prefect
    environment = {**known_environment(), "PREFECT_API_URL": url, "PREFECT_HOME": str(place.prefect)}
    began = now()
    with served(place):
        worker = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "prefect", "worker", "start", "--pool", "gpus"],
            cwd=place.root,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            first = eventually(lambda: by_cron(place, FLOWS, began))

            def resumed() -> list[dict[str, Any]]:
                runs = [run for run in runs_of(place, "retrain", began) if not run["auto_scheduled"]]
                return [run for run in runs if run["state"]["type"] == "COMPLETED"]

            gone_on = eventually(resumed)
        finally:
            stop_group(worker.pid)
            worker.wait()

    def held() -> int:
        url = f"{services.address_of(place, 'prefect')}/api/v2/concurrency_limits/abnloop-gpu"
        return int(httpx.get(url, timeout=10, trust_env=False).json()["active_slots"])

    eventually(lambda: held() == 1, 120)
    left = {one.title: str(one.state) for one in services.status(place)}
    return Pooled(first, gone_on, left, dead, alive, held())


# --- what is seen


def test_the_cron_itself_starts_each_flow(place: Workspace, scheduled: Scheduled) -> None:
    assert scheduled.first.keys() == FLOWS, "no run that a cron started has completed"
    for run in scheduled.first.values():
        assert run["created_by"]["type"] == "SCHEDULE" and run["state"]["type"] == "COMPLETED"
    assert place.round(1).read()["state"] == "open"


def test_status_and_doctor_know_the_schedule(scheduled: Scheduled) -> None:
    assert f"`abnloop serve` runs (pid {scheduled.process.pid})" in scheduled.status
    for name in FLOWS:
        assert f"next {name}: 20" in scheduled.status
    assert not re.search("no run of the deployment|is paused|nothing runs on a schedule", scheduled.doctor)


def test_a_second_serve_is_refused_and_so_is_down(scheduled: Scheduled) -> None:
    second, down = scheduled.second_serve, scheduled.down
    assert second.returncode == down.returncode == 2
    assert f"is in use by `abnloop serve` (pid {scheduled.process.pid}" in second.stderr
    assert f"`abnloop serve` (pid {scheduled.process.pid}) keeps the services up" in down.stderr
    assert second.stderr.count("\n") == down.stderr.count("\n") == 1


def test_services_that_are_killed_are_started_again_and_status_tells(place: Workspace, restarted: Restarted) -> None:
    assert set(restarted.states.values()) == {"up"}
    for title in restarted.states:
        assert f"{title} was started again 1 times" in restarted.told
    assert restarted.told.count("; it was killed (SIGKILL): ") == 4
    said = (place.logs / "serve.log").read_text()
    assert "MLflow was killed (SIGKILL): " in said and "MLflow is started again" in said


def test_an_answer_in_label_studio_makes_collect_run_early(hinted: Hinted) -> None:
    assert hinted.run["state"]["message"] == "round 1: 1 of 6 tasks are answered; it stays open"


def test_the_cron_closes_a_round_after_its_deadline(place: Workspace, overdue: Overdue) -> None:
    assert overdue.before == "open"
    assert "round 1 is closed with 1 corrections" in overdue.run["state"]["message"]
    assert place.round(1).tag in Git(place.root).tags()


def test_the_end_of_serve_leaves_no_process_behind(ended: Ended) -> None:
    assert any("dvc" in one for one in ended.during)
    assert ended.code == 0
    assert ended.after == []
    assert set(ended.services.values()) == {"down"}, "it had started all of them"


def test_prefect_knows_that_the_training_has_ended(place: Workspace, ended: Ended) -> None:
    assert state_of(place, ended.training) == "CRASHED"


def test_a_run_without_a_heartbeat_is_called_crashed_and_no_other(pooled: Pooled) -> None:
    assert pooled.dead == "CRASHED"
    assert pooled.alive == "RUNNING"


def test_a_lease_outlives_a_restart_of_prefect_and_not_its_run(pooled: Pooled) -> None:
    assert pooled.slots == 1, "the living run holds one, the dead ones hold none"


def test_a_worker_of_a_pool_runs_what_the_cron_starts(pooled: Pooled) -> None:
    assert pooled.first.keys() == FLOWS
    assert all(run["work_pool_name"] == "gpus" for run in pooled.first.values())


def test_an_interrupted_round_goes_on_with_the_next_serve(place: Workspace, pooled: Pooled) -> None:
    # Within the minute the cron may have started another run, which then has done it.
    said = pooled.resumed[0]["state"]["message"]
    assert "round 2: 6 tasks wait" in said or "is in use by `abnloop round open`" in said
    assert place.round(2).read()["state"] == "open"


def test_services_that_were_up_before_serve_stay_up(pooled: Pooled) -> None:
    assert set(pooled.left.values()) == {"up"}


# --- without services


@pytest.mark.parametrize(("holder", "waited_for"), [("round collect", True), ("round open", False)])
def test_a_run_waits_for_another_one_unless_that_trains(tmp_path: Path, holder: str, waited_for: bool) -> None:
    place, held, release = Workspace(tmp_path), threading.Event(), threading.Event()

    def hold() -> None:
        with place.lock(holder):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    threading.Timer(0.5, release.set).start()
    refused = nullcontext() if waited_for else pytest.raises(InUse, match=f"is in use by `abnloop {holder}`")
    with refused, place.lock("ingest", patience=20):
        pass
    thread.join()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    folder = tmp_path / "100 % leaves"
    folder.mkdir()
    unit = tmp_path / "abnloop.service"
    unit.write_text(systemd_unit(Workspace(folder)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_service_that_ends_again_and_again_is_started_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workspace(tmp_path)
    shutil.copy(PROJECT / "params.yaml", place.params)
    place.state.mkdir()
    clock, starts = [0.0], list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def fail(*_: Any, only: Sequence[str], **__: Any) -> None:
        starts.append(clock[0])
        raise ValueError(f"{only[0]} is out of luck")

    monkeypatch.setattr(services, "up", fail)
    watcher = supervisor._Supervisor(place)
    (mlflow,) = [one for one in watcher.kept if one.name == "mlflow"]
    while clock[0] < 2000:
        watcher._look(mlflow)
        clock[0] += 1
    waits = [round(after - before) for before, after in itertools.pairwise(starts)]
    assert waits[:8] == [2, 4, 8, 16, 32, 64, 128, 256] and set(waits[8:]) == {300}
    told = read_json(place.serving)["restarts"]["mlflow"]
    assert told["count"] == len(starts) + 1 and "mlflow is out of luck" in told["why"]
