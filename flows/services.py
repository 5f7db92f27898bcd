"""The embedded services of a workspace: Label Studio, Prefect, MLflow and the project's own, on this machine only."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from abn.config import load_section, read_params
from flows.processes import stop_group
from flows.versions import Dvc, Git
from flows.workspace import Workspace, read_json, write_json
from labeling.studio import DEFAULT_COMMAND, prepare_data_dir, studio_command

HOST = "127.0.0.1"
EMAIL = "admin@example.com"  # Label Studio wants something that looks like an address
TITLES = {"label_studio": "Label Studio", "prefect": "Prefect", "mlflow": "MLflow", "live": "abnloop"}
HEALTH = {"label_studio": "/health", "prefect": "/api/health", "mlflow": "/health", "live": "/health"}
TOKEN_VARIABLE = "LABEL_STUDIO_API_KEY"  # the token of a Label Studio that is not ours to start
# Where the embedded servers keep what they know, in place of SQLite and files in the workspace. Some hold passwords, so
# all come from the environment alone, under the servers' own names; their other settings are not taken from there.
STORES = (
    "PREFECT_API_DATABASE_CONNECTION_URL",
    "MLFLOW_BACKEND_STORE_URI",
    "MLFLOW_ARTIFACTS_DESTINATION",
    "MLFLOW_S3_ENDPOINT_URL",
)

# Those that this process started: whoever starts a process has to wait for its end.
_children: dict[int, subprocess.Popen[bytes]] = {}

OnChange = Callable[[str, str], None]  # the title of a service, what became of it


@dataclass(frozen=True)
class Services:
    """Ports; 0: any free one, kept once chosen. Addresses; embedded: started by `abnloop up`."""

    label_studio_port: int
    prefect_port: int
    mlflow_port: int
    live_port: int
    prefect_url: str = "embedded"
    mlflow_url: str = "embedded"
    live_url: str = "embedded"

    def __post_init__(self) -> None:
        ports = [field.name for field in fields(self) if field.name.endswith("_port")]
        fixed = {name: getattr(self, name) for name in ports if getattr(self, name)}
        for name, port in fixed.items():
            if not 0 < port < 65536:
                raise ValueError(
                    f"services.{name} is {port}; a port lies between 1 and 65535, or is 0 for any free one"
                )
            twin = next(other for other in fixed if fixed[other] == port)
            if twin != name:
                raise ValueError(f"services.{twin} and services.{name} are both {port}; give one of them another port")


@dataclass(frozen=True)
class Addresses:
    """Where the services of a workspace are, as addresses that their clients take."""

    label_studio: str
    label_studio_token: str
    prefect: str  # its API
    mlflow: str  # the tracking URI
    live: str
    live_secret: str


@dataclass(frozen=True)
class State:
    """One service now. `state`: up, not answering (it runs), down, or external (not ours to start)."""

    name: str
    title: str
    state: Literal["up", "not answering", "down", "external"]
    address: str
    pid: int | None
    log: Path | None


@dataclass(frozen=True)
class Finding:
    """What doctor found: `broken` stops the loop, `advice` does not."""

    level: Literal["broken", "advice"]
    what: str
    remedy: str


def up(workspace: Workspace, on_change: OnChange | None = None, patience: float = 180.0) -> list[State]:
    """Start every service that is not up, side by side, and wait until all of them answer.

    Fine when they are up already. Raises ValueError for a port that is taken, or with the last lines of its log for a
    service that ends or does not answer within `patience` seconds; those started here are then ended again.
    """
    tell = on_change or (lambda title, what: None)
    with workspace.lock("up", "services.lock"), ExitStack() as undo:
        records = read_json(workspace.services)
        wanted = _wanted(workspace)
        missing = [name for name in wanted if not _leader(records.get(name, {}))]
        for name in missing:
            _end(records.get(name, {}))  # what a leader that died has left behind
        ports = _free_ports(load_section(Services, workspace.params, "services"), records, missing)
        began = time.monotonic()
        # Label Studio last: the copy of its database is made while the others start.
        for name in sorted(missing, key=lambda name: name == "label_studio"):
            tell(TITLES[name], "starting")
            records[name] = _start(workspace, name, ports[name])
            undo.callback(_end, records[name])
            write_json(workspace.services, records)  # at once, so that `down` finds it whatever happens here
        waiting = list(wanted)
        while waiting:
            for name in list(waiting):
                if _answers(records[name]["url"] + HEALTH[name]):
                    tell(
                        TITLES[name], f"up after {time.monotonic() - began:.1f} s" if name in missing else "up already"
                    )
                    waiting.remove(name)
                elif not _leader(records[name]):
                    raise ValueError(f"{TITLES[name]} ended while it started: {_last_words(workspace, name)}")
                elif time.monotonic() - began > patience:
                    raise ValueError(
                        f"{TITLES[name]} does not answer after {patience:.0f} s: {_last_words(workspace, name)}"
                    )
            time.sleep(0.1 if waiting else 0)
        undo.pop_all()
    return status(workspace)


def down(workspace: Workspace, on_change: OnChange | None = None) -> None:
    """End every service with all its processes; fine when there is none. Addresses are kept for the next time."""
    tell = on_change or (lambda title, what: None)
    with workspace.lock("down", "services.lock"):
        records = read_json(workspace.services)

        def end(name: str) -> None:
            tell(TITLES[name], "ended" if _end(records[name]) else "was down")

        with ThreadPoolExecutor(len(TITLES)) as pool:
            list(pool.map(end, [name for name in records if name in TITLES]))
        for record in records.values():
            record.pop("pid", None)
            record.pop("started", None)
        write_json(workspace.services, records)


def status(workspace: Workspace) -> list[State]:
    """Every service as it is now."""
    records, wanted, states = read_json(workspace.services), _wanted(workspace), []
    for name, title in TITLES.items():
        record = records.get(name, {})
        process = _leader(record)
        answers = process is not None and _answers(record["url"] + HEALTH[name])
        if name not in wanted:
            states.append(State(name, title, "external", _external_url(workspace, name), None, None))
        else:
            states.append(
                State(
                    name,
                    title,
                    "up" if answers else "not answering" if process else "down",
                    record.get("url", ""),
                    process.pid if process else None,
                    _log(workspace, name),
                )
            )
    return states


def addresses(workspace: Workspace) -> Addresses:
    """Where the services are. Raises ConnectionError where one of them does not run."""
    records, wanted = read_json(workspace.services), _wanted(workspace)
    for name in wanted:
        if not _leader(records.get(name, {})):
            raise ConnectionError(f"{TITLES[name]} is down; start it with `abnloop up`")
    url, token = label_studio_access(workspace)
    prefect, mlflow, live = (
        _external_url(workspace, name) or records[name]["url"] for name in ("prefect", "mlflow", "live")
    )
    return Addresses(url, token, prefect + "/api", mlflow, live, live_secret(workspace))


def connect(workspace: Workspace) -> None:
    """Point this process's Prefect and MLflow at the workspace's servers, before either is imported.

    Prefect's log lines go to its server, MLflow's are left out; the terminal belongs to whoever calls.
    """
    known = addresses(workspace)
    os.environ.update(
        PREFECT_API_URL=known.prefect,
        PREFECT_HOME=str(workspace.prefect),
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL="CRITICAL",
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30",  # seconds; flows/serve.py has a run without it called crashed
        MLFLOW_TRACKING_URI=known.mlflow,
        MLFLOW_LOGGING_LEVEL="ERROR",
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
    )


def disconnect() -> None:
    """Send what Prefect still holds back; at exit it would wait for minutes for a server that has ended."""
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)


def label_studio_access(workspace: Workspace) -> tuple[str, str]:
    """Label Studio's address and a token for it. Raises PermissionError where no token is known for an external one."""
    external = _external_url(workspace, "label_studio")
    if not external:
        return read_json(workspace.services).get("label_studio", {}).get("url", ""), _secrets(workspace)["token"]
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise PermissionError(
            f"no token for Label Studio at {external}; set {TOKEN_VARIABLE} to an access token of yours"
        )
    return external, token


def live_secret(workspace: Workspace) -> str:
    """What Label Studio has to say to be answered by the live service."""
    return _secrets(workspace)["live"]


def log_in(workspace: Workspace) -> tuple[str, str]:
    """Email and password of the embedded Label Studio's administrator."""
    return EMAIL, _secrets(workspace)["password"]


def doctor(workspace: Workspace) -> list[Finding]:
    """What is wrong with the workspace, or soon will be, each with its remedy; the worst first."""
    checks: list[Callable[[Workspace], list[Finding]]]
    checks = [_check_params, _check_services, _check_token, _check_loopback, _check_git, _check_dvc, _check_disk]
    findings = []
    for check in checks:
        try:
            findings += check(workspace)
        except (ValueError, OSError) as error:
            findings.append(Finding("broken", str(error), "see the message"))
    unique = list(dict.fromkeys(findings))  # a broken params.yaml fails several checks
    return sorted(unique, key=lambda finding: finding.level != "broken")


# --- starting and ending


def _start(workspace: Workspace, name: str, port: int) -> dict[str, Any]:
    """Start one service in a session of its own; its record."""
    argv, env, url = _commands(workspace, name, port)
    log = _log(workspace, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():  # it may say why the service died that is now started again
        log.replace(log.with_suffix(".before.log"))
    with log.open("wb") as file:
        child = subprocess.Popen(
            argv,
            cwd=workspace.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    return {"port": port, "url": url, "pid": child.pid, "started": psutil.Process(child.pid).create_time()}


def _commands(workspace: Workspace, name: str, port: int) -> tuple[Sequence[str], dict[str, str], str]:
    """Command line, environment and address of one service."""
    python, listen, url = sys.executable, ["--host", HOST, "--port", str(port)], f"http://{HOST}:{port}"
    if name == "label_studio":
        executable = label_studio_executable()
        prepare_data_dir(executable, workspace.label_studio)
        secret = _secrets(workspace)
        studio = studio_command(
            executable, workspace.label_studio, port, EMAIL, secret["password"], secret["token"], workspace.root
        )
        return studio.argv, studio.env, studio.url
    ours = ("PREFECT_", "MLFLOW_", "UVICORN_")
    env = {key: value for key, value in os.environ.items() if key in STORES or not key.startswith(ours)}
    env |= {"NO_PROXY": f"localhost,{HOST}", "no_proxy": f"localhost,{HOST}", "DO_NOT_TRACK": "1"}
    if name == "prefect":
        workspace.prefect.mkdir(parents=True, exist_ok=True)
        env |= {
            "PREFECT_HOME": str(workspace.prefect),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_API_URL": f"{url}/api",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            # On disk, so that a restarted server still knows whose slots it has to free.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        return [python, "-m", "prefect", "server", "start", *listen], env, url
    if name == "mlflow":
        workspace.mlflow.mkdir(parents=True, exist_ok=True)
        env.setdefault("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{workspace.mlflow / 'mlflow.db'}")
        env.setdefault("MLFLOW_ARTIFACTS_DESTINATION", str(workspace.mlflow / "artifacts"))
        env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        # The command builds its database before its one worker starts, and health answers after that.
        return [python, "-m", "mlflow", "server", *listen, "--workers", "1"], env, url
    live_secret(workspace)  # made before two processes ask for it
    # The workspace's own modules come first, those that we run from where it has none.
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return [python, "-m", "flows.live_service", "--workspace", str(workspace.root), "--port", str(port)], env, url


def label_studio_executable() -> Path:
    """Label Studio's command in its environment beside ours. Raises FileNotFoundError where it is not installed."""
    executable = Path(sys.prefix).parent / DEFAULT_COMMAND
    if not executable.exists():
        raise FileNotFoundError(f"Label Studio is not installed at {executable}; run `make setup`")
    return executable


def _free_ports(section: Services, records: dict[str, Any], names: Sequence[str]) -> dict[str, int]:
    """A port for each of `names`: the configured one, else the one it had before, else any that is free."""
    ports = {}
    with ExitStack() as held:  # all at once, so that no two get the same
        for name in names:
            fixed = getattr(section, f"{name}_port")
            before = records.get(name, {}).get("port", 0)
            for port in [fixed] if fixed else dict.fromkeys([before, 0]):
                try:
                    ports[name] = held.enter_context(_listen(port)).getsockname()[1]
                except OSError as error:
                    if fixed:
                        raise ValueError(
                            f"port {fixed} of {TITLES[name]} is taken{_taker(fixed)}; end what uses it, "
                            f"or set services.{name}_port in params.yaml to another port, or to 0 for any free one"
                        ) from error
                else:
                    break
    return ports


def _listen(port: int) -> socket.socket:
    """Take `port`, 0 for any free one. Raises OSError where it is taken."""
    taken = socket.socket()
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what just closed is free
        taken.bind((HOST, port))
    except OSError:
        taken.close()
        raise
    return taken


def _taker(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else ""
                return f" by {name} (pid {connection.pid})" if name else ""
    return ""


def _leader(record: dict[str, Any]) -> psutil.Process | None:
    """The process that the record names, if it still runs. Another one that got its number later does not count."""
    with suppress(psutil.NoSuchProcess, KeyError):
        process = psutil.Process(record["pid"])
        # The start time is reckoned from the clock, which may have been set a little since.
        if abs(process.create_time() - record["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _end(record: dict[str, Any]) -> bool:
    """End the service that the record names with all its processes; whether there was any."""
    pid = record.get("pid")
    if not pid:
        return False
    running = _leader(record) is not None or _left_behind(pid)
    if running:
        stop_group(pid)
    child = _children.pop(pid, None)
    if child:
        child.wait()
    return running


def _left_behind(group: int) -> bool:
    """Whether processes of the group outlived its leader. No new process gets its number while they live."""
    if psutil.pid_exists(group) and group not in _children:
        return False
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.pid != group:
                return True
    return False


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, trust_env=False, follow_redirects=True).is_success
    return False


def _log(workspace: Workspace, name: str) -> Path:
    return workspace.logs / f"{name.replace('_', '-')}.log"


def _last_words(workspace: Workspace, name: str) -> str:
    """The last lines of a log in one, and where the whole log is."""
    log = _log(workspace, name)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()][-5:]
    return f"{' | '.join(said) or 'it said nothing'} (the whole log: {log})"


def _wanted(workspace: Workspace) -> list[str]:
    """The services that are ours to start."""
    return [name for name in TITLES if not _external_url(workspace, name)]


def _external_url(workspace: Workspace, name: str) -> str:
    """The address of a service that is not ours to start, or an empty text."""
    section, key = ("labeling", "url") if name == "label_studio" else ("services", f"{name}_url")
    url = str(read_params(workspace.params).get(section, {}).get(key, "embedded"))
    return "" if url == "embedded" else url.rstrip("/")


def _secrets(workspace: Workspace) -> dict[str, str]:
    """Password and token of the embedded Label Studio and the live service's secret, each made once."""
    known = read_json(workspace.secrets)
    made = {"password": secrets.token_urlsafe(12), "token": secrets.token_hex(20), "live": secrets.token_urlsafe(24)}
    if made.keys() - known.keys():
        known = made | known
        write_json(workspace.secrets, known, mode=0o600)
    return known


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
                _listen(port).close()
                findings.append(Finding("advice", f"{state.title} is down", "`abnloop up` starts it"))
            except OSError:
                findings.append(
                    Finding(
                        "broken",
                        f"port {port} of {state.title} is taken{_taker(port)}",
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
    if not _answers(label_studio.address + HEALTH["label_studio"]):  # asked once; the client would try for long
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
