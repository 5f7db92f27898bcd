"""`abnloop doctor`: what is wrong with a workspace, or soon will be, each with its remedy."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import httpx
import psutil

from abn.config import load_section
from flows.services import (
    HEALTH,
    TITLES,
    TOKEN_VARIABLE,
    Services,
    answers,
    ask_prefect,
    embedded,
    label_studio_access,
    label_studio_executable,
    listen,
    log_of,
    serving_process,
    status,
    taker,
)
from flows.supervisor import TAG, work_pool
from flows.versions import Dvc, Git
from flows.workspace import Workspace, read_json

LATE = 120.0  # seconds after its date from which on a scheduled run that did not start is late
SETTLED = 90.0  # seconds after which Prefect's scheduler has seen a new schedule
REPEATED = 3  # errors of one kind in the log of a service, within a day, that are told
PASSES = "database is locked"  # SQLite tells Prefect so now and then; its clients try again
STAMP = re.compile(r"\d{4}[-/]\d\d[-/]\d\d[ T]\d\d:\d\d:\d\d")
RAISED = re.compile(r"(?:[a-z_][\w.]*\.)?([A-Z]\w*(?:Error|Exception|Timeout|Refused))(?:: (.*))?$")
CHAINED = re.compile(r"The above exception was the direct cause|During handling of the above exception")


@dataclass(frozen=True)
class Finding:
    """What doctor found: `broken` stops the loop, `advice` does not."""

    level: Literal["broken", "advice"]
    what: str
    remedy: str


def doctor(workspace: Workspace) -> list[Finding]:
    """What is wrong with the workspace, or soon will be, each with its remedy; the worst first."""
    checks: list[Callable[[Workspace], list[Finding]]]
    checks = [_check_params, _check_services, _check_token, _check_loopback, _check_schedule, _check_logs]
    checks += [_check_git, _check_dvc, _check_disk]
    findings = []
    for check in checks:
        try:
            findings += check(workspace)
        except (ValueError, OSError) as error:
            findings.append(Finding("broken", str(error), "see the message"))
    unique = list(dict.fromkeys(findings))  # a broken params.yaml fails several checks
    return sorted(unique, key=lambda finding: finding.level != "broken")


def upcoming(workspace: Workspace) -> dict[str, datetime | None]:
    """When Prefect is going to start each deployment of the workspace next; None where it does not know.

    Empty while Prefect does not answer, or knows no deployments.
    """
    with suppress(httpx.HTTPError):
        return {one.name: one.next_run for one in _deployments(workspace)}
    return {}


# --- what doctor looks at, one thing a function


def _check_params(workspace: Workspace) -> list[Finding]:
    load_section(Services, workspace.params, "services")
    return []


def _check_services(workspace: Workspace) -> list[Finding]:
    findings = []
    section = load_section(Services, workspace.params, "services")
    for state in status(workspace):
        if state.state == "not answering":
            findings.append(
                Finding(
                    "broken", f"{state.title} runs but does not answer", f"look at {state.log}, then `abnloop down`"
                )
            )
        if state.state == "down":
            port = getattr(section, f"{state.name}_port")
            try:
                listen(port).close()
                findings.append(Finding("advice", f"{state.title} is down", "`abnloop up` starts it"))
            except OSError:
                findings.append(
                    Finding(
                        "broken",
                        f"port {port} of {state.title} is taken{taker(port)}",
                        f"end what uses it, or set services.{state.name}_port in params.yaml to 0",
                    )
                )
            if state.name == "label_studio":
                label_studio_executable()
    return findings


def _check_token(workspace: Workspace) -> list[Finding]:
    from labeling.client import LabelStudio, LabelStudioUnreachable, TokenRefused

    label_studio = status(workspace)[0]
    if label_studio.state not in ("up", "external"):
        return []  # told already
    unreachable = "check labeling.url in params.yaml, and that the server is up"
    if not answers(label_studio.address + HEALTH["label_studio"]):  # asked once; the client would try for long
        return [Finding("broken", f"Label Studio at {label_studio.address} does not answer", unreachable)]
    try:
        LabelStudio(*label_studio_access(workspace)).check()
    except LabelStudioUnreachable as error:
        return [Finding("broken", str(error), unreachable)]
    except TokenRefused as error:
        return [Finding("broken", str(error), f"set {TOKEN_VARIABLE} to an access token made in Label Studio")]
    return []


def _check_loopback(workspace: Workspace) -> list[Finding]:
    """Label Studio refuses to call addresses of its own machine unless told: no live answers, no webhooks."""
    label_studio = status(workspace)[0]
    needed = ("ML_BLOCK_LOCAL_IP", "SSRF_PROTECTION_ENABLED")
    remedy = f"start it with {' and '.join(f'{name}=false' for name in needed)}"
    if label_studio.state == "external":
        return [Finding("advice", "an external Label Studio may refuse to call this machine's own service", remedy)]
    if label_studio.pid is None:
        return []
    environment = psutil.Process(label_studio.pid).environ()
    blocked = [name for name in needed if environment.get(f"LABEL_STUDIO_{name}", environment.get(name)) != "false"]
    return [Finding("broken", f"Label Studio blocks loopback ({', '.join(blocked)})", remedy)] if blocked else []


def _check_schedule(workspace: Workspace) -> list[Finding]:
    """Whether the cron of each deployment is really going to start a run, and whether the runs that are due start."""
    try:
        known = _deployments(workspace)
    except httpx.HTTPError:
        return []  # that Prefect is down is told already
    served = bool(serving_process(workspace)) or bool(work_pool(workspace))
    if not known or (not served and all(one.paused for one in known)):
        return [Finding("advice", "nothing runs on a schedule", "`abnloop serve` runs retrain, collect and ingest")]
    findings = []
    for one in known:
        if one.paused:
            what = f"the deployment {one.name} is paused, so nothing starts it"
            findings.append(Finding("broken", what, "start `abnloop serve` anew"))
        elif one.next_run is None and one.age > SETTLED:
            what = f"no run of the deployment {one.name} is scheduled, although its cron is {one.cron!r}"
            remedy = f"Prefect's scheduler does not work: look at {log_of(workspace, 'prefect')}, start Prefect anew"
            findings.append(Finding("broken", what, remedy))
        if one.late:
            since = f"{one.late[0].astimezone():%Y-%m-%d %H:%M}"
            what = f"{len(one.late)} runs of the deployment {one.name} are late, the first since {since}"
            findings.append(Finding("broken", what, _remedy_for_late_runs(workspace)))
    return findings


def _remedy_for_late_runs(workspace: Workspace) -> str:
    if pool := work_pool(workspace):
        return f"nothing takes them: start a worker, `prefect worker start --pool {pool}`"
    if serving_process(workspace):
        return f"`abnloop serve` does not keep up: look at {log_of(workspace, 'runner')}, then start it anew"
    return "nothing takes them: start `abnloop serve`"


@dataclass(frozen=True)
class _Deployment:
    """A deployment as Prefect's server knows it. Dates are in UTC."""

    name: str
    cron: str
    paused: bool  # or without an active schedule
    age: float  # seconds since its schedule was made
    next_run: datetime | None
    late: list[datetime]  # when the runs were due that nothing has started for LATE seconds, oldest first


def _deployments(workspace: Workspace) -> list[_Deployment]:
    """The deployments of the workspace. Raises httpx.HTTPError where Prefect does not answer."""
    now, found = datetime.now(UTC), []
    for one in ask_prefect(workspace, "deployments/filter", {"deployments": {"tags": {"all_": [TAG]}}}):
        mine, waiting = {"id": {"any_": [one["id"]]}}, {"type": {"any_": ["SCHEDULED"]}}
        asked = {"deployments": mine, "flow_runs": {"state": waiting}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        runs = ask_prefect(workspace, "flow_runs/filter", asked)
        dates = [_date(run["expected_start_time"]) for run in runs]
        schedules = [schedule for schedule in one["schedules"] if schedule["active"]]
        found.append(
            _Deployment(
                one["name"],
                schedules[0]["schedule"].get("cron", "") if schedules else "",
                one["paused"] or not schedules,
                min(((now - _date(schedule["created"])).total_seconds() for schedule in schedules), default=0.0),
                next((date for date in dates if date > now), None),
                [date for date in dates if (now - date).total_seconds() > LATE],
            )
        )
    return sorted(found, key=lambda one: one.name)


def _date(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _check_logs(workspace: Workspace) -> list[Finding]:
    """What a service complains of again and again in its log."""
    findings = []
    for name in embedded(workspace):
        log = log_of(workspace, name)
        errors = errors_in(log)
        recent = [one for one in errors if datetime.now() - one.when < timedelta(days=1) and PASSES not in one.said]
        kind, count = Counter(one.kind for one in recent).most_common(1)[0] if recent else ("", 0)
        if count >= REPEATED:
            last = [one for one in recent if one.kind == kind][-1]
            said = f"{kind}: {last.said}" if last.said else kind
            what = (
                f"the log of {TITLES[name]} has {count} errors, the last at {last.when:%Y-%m-%d %H:%M:%S}: {said[:200]}"
            )
            findings.append(Finding("advice", what, f"look at {log}"))
    return findings


@dataclass(frozen=True)
class Logged:
    """An exception that a service has logged with its traceback."""

    kind: str  # the name of its class
    said: str
    when: datetime  # local time; of a log without dates, of its last line


def errors_in(log: Path, size: int = 2**20) -> list[Logged]:
    """The exceptions in the last `size` bytes of a log, oldest first; of a chain of them the last one."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        lines = file.read().decode(errors="replace").splitlines()
    found, when = [], datetime.fromtimestamp(log.stat().st_mtime)
    for number, line in enumerate(lines):
        if stamp := STAMP.search(line[:40]):
            with suppress(ValueError):
                when = datetime.fromisoformat(stamp[0].replace("/", "-").replace("T", " "))
        if (error := RAISED.match(line)) and not any(map(CHAINED.match, lines[number + 1 : number + 4])):
            found.append(Logged(error[1], (error[2] or "").strip(), when))
    return found


def _check_git(workspace: Workspace) -> list[Finding]:
    git, findings = Git(workspace.root), []
    latest = workspace.latest()
    changed = [] if latest and latest.is_opening else git.changed_paths()  # it writes here, as it should
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        findings.append(Finding("broken", f"the git tree is dirty ({changed[0]}{more})", "commit it, or undo it"))
    if not (git.configured("user.name") and git.configured("user.email")):
        findings.append(
            Finding(
                "advice",
                "git does not know who you are; commits are signed abnloop",
                "git config --global user.name NAME, and user.email",
            )
        )
    return findings


def _check_dvc(workspace: Workspace) -> list[Finding]:
    dvc, findings = Dvc(workspace.root, patience=5), []
    missing = dvc.missing()
    if missing:
        findings.append(Finding("broken", f"the DVC cache lacks {', '.join(missing)}", "`dvc pull` fetches it"))
    if late := read_json(workspace.unpushed):
        why = f": {late['why']}" if "why" in late else ""
        findings.append(
            Finding("advice", f"the DVC remote lacks data since {late['since']}{why}", "`dvc push` copies it")
        )
    if not dvc.remote():
        findings.append(
            Finding(
                "advice",
                "DVC has no remote: the data are on this machine alone",
                "`dvc remote add --default NAME URL`, then `dvc push`",
            )
        )
    return findings


def _check_disk(workspace: Workspace) -> list[Finding]:
    free = shutil.disk_usage(workspace.root).free / 2**30
    if free < 5:
        level: Literal["broken", "advice"] = "broken" if free < 1 else "advice"
        remedy = "make room; `dvc gc --workspace --all-tags` drops the data that no round needs"
        return [Finding(level, f"{free:.1f} GiB of disk are left", remedy)]
    return []
