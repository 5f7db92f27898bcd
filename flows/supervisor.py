"""`abnloop serve`: starts the services and the runner of the scheduled flows, and keeps them running for months."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import psutil

from abn.config import read_params
from flows import services
from flows.processes import running_process, stop_marked
from flows.services import HEALTH, TITLES, answers, embedded, launch, log_of, tail_log
from flows.workspace import InUse, Workspace, read_json, write_json

RUNNER = "runner"  # the process that runs the flows (flows/runner.py)
TAG = "abnloop"  # of the deployments in prefect.yaml
READY = "the schedule is set"  # what it says once Prefect knows the deployments
SERVED = "ABNLOOP_SERVED"  # in the environment of the runner and of all that it starts: the workspace
CHECK = 2.0  # seconds between two looks at what is kept running
ASK = 60.0  # seconds between two questions whether a service answers, each of which is a line in its log
HUNG = 120.0  # seconds without an answer after which a service that runs is started again
FIRST_WAIT, LONGEST_WAIT = 1.0, 300.0  # seconds before a start: doubled each time, up to the longest
STABLE = 600.0  # seconds that a service has to run until the next wait is the first again
GRACE = 30.0  # seconds that the runner may take to end: it pauses the schedules and tells Prefect how its runs ended

log = logging.getLogger("abnloop.serve")


class Ending(BaseException):
    """A signal asks `abnloop serve` to end."""


@dataclass
class Kept:
    """A process that is kept running. Times are seconds of the monotonic clock."""

    name: str
    title: str
    failures: int = 0  # ends and failed starts since it last ran for STABLE seconds
    due: float | None = None  # when it may be started again, None while it runs
    began: float = field(default_factory=time.monotonic)
    asked: float = field(default_factory=time.monotonic)  # when it was last asked for an answer
    silent: float | None = None  # since when it runs without an answer


def serve(place: Workspace) -> None:
    """Start what is down of the services, run the flows on their schedule, and keep all of it running until a signal.

    Then everything ends that was started here, a training that is under way as well; services that were up before
    stay up. With `flows.work_pool` and no service to keep running it returns as soon as the deployments are made.
    Raises InUse where another `abnloop serve` has the workspace, and ValueError for what does not start at first.
    """
    with place.lock("serve", "serve.lock"), _told(place), _signals():
        supervisor = _Supervisor(place)
        try:
            supervisor.start()
            supervisor.keep()
        except Ending:
            log.info("asked to end")
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # what ends now ends in bounded time
            supervisor.end()


class _Supervisor:
    def __init__(self, place: Workspace) -> None:
        self.place = place
        self.kept = [Kept(name, TITLES[name]) for name in embedded(place)]
        self.runner: dict[str, Any] = {}  # its record
        self.blind = False  # whether the runner has lost what Prefect's server tells it
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.record: dict[str, Any] = {"since": now, "restarts": {}}
        # The services that an earlier one had started are ours now, and end with us; its runs end at once.
        if stop_marked(SERVED, str(place.root)):
            log.warning("an earlier `abnloop serve` was killed; the runs that it left behind have been ended")

    def start(self) -> None:
        """Start the services that are down, then the runner, and wait until the schedule is set."""
        self.record |= {"pid": os.getpid(), "started": psutil.Process().create_time()}
        write_json(self.place.serving, self.record)
        services.up(self.place, lambda title, what: log.info("%s: %s", title, what), served=True)
        self._end_runner()  # what Prefect may still take for alive
        self._start_runner()
        path = log_of(self.place, RUNNER)
        while True:
            runs = running_process(self.runner)
            if READY in path.read_text(errors="replace"):
                break
            if not runs:  # an error in one line, or a traceback
                raise ValueError(tail_log(path).rpartition("abnloop: ")[2])
            time.sleep(0.2)
        if work_pool(self.place):
            log.info("%s; the workers of the work pool run the flows", READY)
        else:
            self.kept.append(Kept(RUNNER, "the runner of the flows"))
            log.info("%s; the flows run here until this process ends", READY)

    def keep(self) -> None:
        """Start again whatever ends; returns only where there is nothing to keep."""
        while self.kept:
            for one in self.kept:
                self._look(one)
            if self.blind and self._runs_nothing():
                log.info("the runner is started anew, since Prefect was: it no longer hears of runs that are cancelled")
                self._end_runner()
                self._start_runner()
                self.blind = False
            time.sleep(CHECK)

    def end(self) -> None:
        """End the runner with its runs, then the services that were started here."""
        log.info("ending")
        self._end_runner()
        self.place.serving.unlink(missing_ok=True)
        with suppress(InUse):
            services.down(self.place, lambda title, what: log.info("%s: %s", title, what), served_only=True)
        log.info("ended")

    def _look(self, one: Kept) -> None:
        now = time.monotonic()
        if one.due is None:
            why = self._what_is_wrong(one, now)
            if not why:
                if now - one.began > STABLE:
                    one.failures = 0
                return
            self._put_off(one, why)
        elif now >= one.due and (one.name != RUNNER or self._all_run()):
            self._start_again(one)

    def _what_is_wrong(self, one: Kept, now: float) -> str:
        """Why the process has to be started again, or an empty text."""
        record = self.runner if one.name == RUNNER else read_json(self.place.services).get(one.name, {})
        process = running_process(record)
        if process is None:
            return f"{services.how_it_ended(record)}: {tail_log(log_of(self.place, one.name))}"
        if one.name == RUNNER or now - one.asked < (CHECK if one.silent else ASK):
            return ""
        one.asked = now
        if answers(record["url"] + HEALTH[one.name]):
            one.silent = None
            return ""
        one.silent = one.silent or now
        if now - one.silent < HUNG:
            return ""
        services.end(record)
        return f"did not answer for {HUNG:.0f} s: {tail_log(log_of(self.place, one.name))}"

    def _put_off(self, one: Kept, why: str) -> None:
        """Note why the process is not there, and when it is started again."""
        wait = min(FIRST_WAIT * 2**one.failures, LONGEST_WAIT)
        one.failures, one.due, one.silent = one.failures + 1, time.monotonic() + wait, None
        log.warning("%s %s; it starts again in %.0f s", one.title, why, wait)
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        known = self.record["restarts"].get(one.name, {"count": 0})
        told = why if len(why) < 500 else f"{why[:200]} ... {why[-300:]}"
        self.record["restarts"][one.name] = {"count": known["count"] + 1, "last": when, "why": told}
        write_json(self.place.serving, self.record)

    def _start_again(self, one: Kept) -> None:
        try:
            if one.name == RUNNER:
                self._end_runner()  # runs that outlived it hold the workspace
                self._start_runner()
            else:
                services.up(self.place, only=[one.name], served=True)
        except InUse:
            return  # somebody runs `abnloop up`
        except (ValueError, OSError) as error:
            self._put_off(one, f"does not start: {' '.join(str(error).split())}")
            return
        one.due, one.began = None, time.monotonic()
        log.info("%s is started again", one.title)
        self.blind = one.name == "prefect" or (self.blind and one.name != RUNNER)

    def _runs_nothing(self) -> bool:
        process = running_process(self.runner)
        return process is not None and self._all_run() and not process.children()

    def _all_run(self) -> bool:
        records = read_json(self.place.services)
        return all(running_process(records.get(name, {})) for name in embedded(self.place))

    def _start_runner(self) -> None:
        argv = [sys.executable, "-m", "flows.runner", "--workspace", str(self.place.root)]
        code = str(Path(__file__).resolve().parent.parent)  # Prefect imports from the current folder first
        environment = {
            **os.environ,
            SERVED: str(self.place.root),
            "PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH", "")])),
            "PYTHONUNBUFFERED": "1",
        }
        self.runner = launch(argv, environment, Path(code), log_of(self.place, RUNNER))

    def _end_runner(self) -> None:
        """End the runner with all that it started, and tell Prefect which runs have ended with it."""
        services.end(self.runner, GRACE)
        stop_marked(SERVED, str(self.place.root))  # DVC and its stages lead sessions of their own
        self.runner = {}
        if not work_pool(self.place):
            with suppress(httpx.HTTPError):
                self._close_runs()

    def _close_runs(self) -> None:
        """Call every run of the deployments crashed that Prefect takes for alive: only the runner has started any."""
        under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
        ours = {"tags": {"all_": [TAG]}}
        crashed = {"type": "CRASHED", "message": "`abnloop serve` or its runner ended while this run was under way"}
        for run in services.ask_prefect(self.place, "flow_runs/filter", {"flow_runs": under_way, "deployments": ours}):
            services.ask_prefect(self.place, f"flow_runs/{run['id']}/set_state", {"state": crashed, "force": True})


def work_pool(place: Workspace) -> str:
    """The name of the work pool whose workers run the flows, empty where `abnloop serve` runs them itself."""
    pool = str(read_params(place.params).get("flows", {}).get("work_pool", "none"))
    return "" if pool == "none" else pool


def restarts(place: Workspace) -> dict[str, dict[str, Any]]:
    """What the `abnloop serve` that runs now had to start again: name -> its `title`, `count`, `last` and `why`."""
    record = read_json(place.serving) if services.serving_process(place) else {}
    titles = {**TITLES, RUNNER: "the runner of the flows"}
    return {name: {"title": titles[name], **one} for name, one in record.get("restarts", {}).items()}


def systemd_unit(place: Workspace) -> str:
    """A unit of systemd that runs `abnloop serve` in the workspace from boot on, for the user who makes it."""
    root = str(place.root).replace("%", "%%")
    words = [sys.executable, "-m", "flows.cli", "serve", "--workspace", str(place.root)]
    command = " ".join(_quoted(word) for word in words)
    modules = _quoted(f"PYTHONPATH={Path(__file__).resolve().parent.parent}")
    return f"""\
[Unit]
Description=abnloop serve in {root}
After=network.target
StartLimitIntervalSec=0

[Service]
ExecStart={command}
WorkingDirectory={root}
Environment={modules}
# Passwords and tokens, such as LABEL_STUDIO_API_KEY=..., one a line; readable for you alone.
EnvironmentFile=-{root}/.abnloop/serve.env
# SIGTERM goes to `abnloop serve` alone, which ends the others in their order; what is left after that is killed.
KillMode=mixed
TimeoutStopSec=120
Restart=on-failure
RestartSec=30

[Install]
WantedBy=default.target
"""


def _quoted(word: str) -> str:
    """A word as systemd reads it: in quotes, its `\\`, `"`, `%` and `$` as themselves."""
    for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        word = word.replace(character, escaped)
    return f'"{word}"'


@contextmanager
def _told(place: Workspace) -> Iterator[None]:
    """Lines of the log go to standard output and to `.abnloop/logs/serve.log`, which is kept small."""
    place.logs.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(sys.stdout),
        RotatingFileHandler(place.logs / "serve.log", maxBytes=2**20, backupCount=1),
    ]
    for one in handlers:
        one.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(one)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        for one in handlers:
            log.removeHandler(one)
            one.close()


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise `Ending`, once; one that is ignored, as by nohup, stays ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Ending

    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
