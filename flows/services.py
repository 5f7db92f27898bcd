"""The embedded services of a workspace: Label Studio, Prefect, MLflow and the project's own, on this machine only."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from abn.config import load_section, read_params
from flows.processes import running_process, stop_group
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


def up(
    workspace: Workspace,
    on_change: OnChange | None = None,
    patience: float = 180.0,
    only: Sequence[str] | None = None,
    served: bool = False,
) -> list[State]:
    """Start every service that is not up, all of them or `only` those, side by side, and wait until they answer.

    Fine when they are up already. `served`: by `abnloop serve`, with which those started here end. Raises ValueError
    for a port that is taken, or with the last lines of its log for a service that ends or does not answer within
    `patience` seconds; those started here are then ended again.
    """
    tell = on_change or (lambda title, what: None)
    with workspace.lock("up", "services.lock"), ExitStack() as undo:
        records = read_json(workspace.services)
        wanted = [name for name in embedded(workspace) if only is None or name in only]
        missing = [name for name in wanted if not running_process(records.get(name, {}))]
        for name in missing:
            end(records.get(name, {}))  # what a leader that died has left behind
        ports = _free_ports(load_section(Services, workspace.params, "services"), records, missing)
        began = time.monotonic()
        # Label Studio last: the copy of its database is made while the others start.
        for name in sorted(missing, key=lambda name: name == "label_studio"):
            tell(TITLES[name], "starting")
            records[name] = {**_start(workspace, name, ports[name]), "served": served}
            undo.callback(end, records[name])
            write_json(workspace.services, records)  # at once, so that `down` finds it whatever happens here
        waiting = list(wanted)
        while waiting:
            for name in list(waiting):
                if answers(records[name]["url"] + HEALTH[name]):
                    tell(
                        TITLES[name], f"up after {time.monotonic() - began:.1f} s" if name in missing else "up already"
                    )
                    waiting.remove(name)
                elif not running_process(records[name]):
                    raise ValueError(f"{TITLES[name]} ended while it started: {tail_log(log_of(workspace, name))}")
                elif time.monotonic() - began > patience:
                    raise ValueError(
                        f"{TITLES[name]} does not answer after {patience:.0f} s: {tail_log(log_of(workspace, name))}"
                    )
            time.sleep(0.1 if waiting else 0)
        undo.pop_all()
    return status(workspace)


def down(workspace: Workspace, on_change: OnChange | None = None, served_only: bool = False) -> None:
    """End every service with all its processes; fine when there is none. Addresses are kept for the next time.

    `served_only`: those that `abnloop serve` has started. Raises ValueError while that runs in another process, which
    would start them again.
    """
    tell = on_change or (lambda title, what: None)
    server = serving_process(workspace)
    if server and server.pid != os.getpid():
        raise ValueError(f"`abnloop serve` (pid {server.pid}) keeps the services up; end it first: kill {server.pid}")
    with workspace.lock("down", "services.lock"):
        records = read_json(workspace.services)
        ending = [name for name in records if name in TITLES and (records[name].get("served") or not served_only)]

        def end_one(name: str) -> None:
            tell(TITLES[name], "ended" if end(records[name]) else "was down")

        with ThreadPoolExecutor(len(TITLES)) as pool:
            list(pool.map(end_one, ending))
        for name in ending:
            for key in ("pid", "started", "served"):
                records[name].pop(key, None)
        write_json(workspace.services, records)


def status(workspace: Workspace) -> list[State]:
    """Every service as it is now."""
    records, wanted, states = read_json(workspace.services), embedded(workspace), []
    for name, title in TITLES.items():
        record = records.get(name, {})
        process = running_process(record)
        well = process is not None and answers(record["url"] + HEALTH[name])
        if name not in wanted:
            states.append(State(name, title, "external", _external_url(workspace, name), None, None))
        else:
            states.append(
                State(
                    name,
                    title,
                    "up" if well else "not answering" if process else "down",
                    record.get("url", ""),
                    process.pid if process else None,
                    log_of(workspace, name),
                )
            )
    return states


def embedded(workspace: Workspace) -> list[str]:
    """The services that are ours to start."""
    return [name for name in TITLES if not _external_url(workspace, name)]


def serving_process(workspace: Workspace) -> psutil.Process | None:
    """The process of `abnloop serve` in this workspace, if it runs."""
    return running_process(read_json(workspace.serving))


def address_of(workspace: Workspace, name: str) -> str:
    """Where a service is, whether or not it runs; empty where that is not known yet."""
    return _external_url(workspace, name) or str(read_json(workspace.services).get(name, {}).get("url", ""))


def addresses(workspace: Workspace) -> Addresses:
    """Where the services are. Raises ConnectionError where one of them does not run."""
    records, wanted = read_json(workspace.services), embedded(workspace)
    for name in wanted:
        if not running_process(records.get(name, {})):
            raise ConnectionError(f"{TITLES[name]} is down; start it with `abnloop up`")
    url, token = label_studio_access(workspace)
    prefect, mlflow, live = (
        _external_url(workspace, name) or records[name]["url"] for name in ("prefect", "mlflow", "live")
    )
    return Addresses(url, token, prefect + "/api", mlflow, live, live_secret(workspace))


def ask_prefect(workspace: Workspace, path: str, body: Mapping[str, Any]) -> Any:
    """What Prefect's API answers to a POST. Raises httpx.HTTPError where it does not, or refuses.

    For what does not import Prefect, which takes seconds.
    """
    url = f"{address_of(workspace, 'prefect')}/api/{path}"
    answer = httpx.post(url, json=body, timeout=10, trust_env=False)
    answer.raise_for_status()
    return answer.json()


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


# --- starting and ending


def _start(workspace: Workspace, name: str, port: int) -> dict[str, Any]:
    """Start one service in a session of its own; its record."""
    argv, env, url = _commands(workspace, name, port)
    return {"port": port, "url": url, **launch(argv, env, workspace.root, log_of(workspace, name))}


def launch(argv: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> dict[str, Any]:
    """Start a process in a session of its own, its output in `log`; a record with its `pid` and when it `started`.

    What the log held is kept beside it, as NAME.before.log: it may say why the process ended that is started again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".before.log"))
    with log.open("wb") as file:
        child = subprocess.Popen(
            argv,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _children[child.pid] = child
    return {"pid": child.pid, "started": psutil.Process(child.pid).create_time()}


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
            "PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S",  # doctor tells when it complained last
            # Runs of 90 days ago are deleted: there are hundreds a day.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
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
                    ports[name] = held.enter_context(listen(port)).getsockname()[1]
                except OSError as error:
                    if fixed:
                        raise ValueError(
                            f"port {fixed} of {TITLES[name]} is taken{taker(fixed)}; end what uses it, "
                            f"or set services.{name}_port in params.yaml to another port, or to 0 for any free one"
                        ) from error
                else:
                    break
    return ports


def listen(port: int) -> socket.socket:
    """Take `port`, 0 for any free one. Raises OSError where it is taken."""
    taken = socket.socket()
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what just closed is free
        taken.bind((HOST, port))
    except OSError:
        taken.close()
        raise
    return taken


def taker(port: int) -> str:
    """Who listens on `port`, as far as this user may know."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else ""
                return f" by {name} (pid {connection.pid})" if name else ""
    return ""


def end(record: Mapping[str, Any], grace: float = 10.0) -> bool:
    """End the service that the record names with all its processes, by force after `grace` seconds; whether there was
    any."""
    pid = record.get("pid")
    if not pid:
        return False
    running = running_process(record) is not None or _left_behind(pid)
    if running:
        stop_group(pid, grace)
    child = _children.pop(pid, None)
    if child:
        child.wait()
    return running


def how_it_ended(record: Mapping[str, Any]) -> str:
    """Why the process of a record is gone, as far as whoever has started it can know."""
    child = _children.get(record.get("pid", 0))
    code = child.poll() if child else None
    if code is None:
        return "ended"
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"


def _left_behind(group: int) -> bool:
    """Whether processes of the group outlived its leader. No new process gets its number while they live."""
    if psutil.pid_exists(group) and group not in _children:
        return False
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.pid != group:
                return True
    return False


def answers(url: str) -> bool:
    """Whether a service answers at its health address within 5 seconds."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, trust_env=False, follow_redirects=True).is_success
    return False


def log_of(workspace: Workspace, name: str) -> Path:
    """The log of a service."""
    return workspace.logs / f"{name.replace('_', '-')}.log"


def tail_log(log: Path) -> str:
    """The last lines of a log in one, and where the whole log is."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()][-5:]
    return f"{' | '.join(said) or 'it said nothing'} (the whole log: {log})"


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
