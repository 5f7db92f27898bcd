from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from flows import doctor as examination
from flows import services
from flows.doctor import Finding, doctor
from flows.services import Services, addresses, down, log_in, status, up
from flows.versions import Dvc, Git
from flows.workspace import Workspace, read_json, write_json

PROJECT = Path(__file__).resolve().parent.parent


def make_workspace(root: Path, **labeling: str) -> Workspace:
    """A workspace without pictures; its services take any free port."""
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True)
    shutil.copy(PROJECT / ".gitignore", root)
    workspace = Workspace(root)
    lines = (PROJECT / "params.yaml").read_text().splitlines()
    for number, line in enumerate(lines):
        key = line.strip().partition(":")[0]
        if key.endswith("_port"):
            lines[number] = f"  {key}: 0"
        if key in labeling:
            lines[number] = f"  {key}: {labeling[key]}"
    workspace.params.write_text("\n".join(lines))
    workspace.data.mkdir()
    workspace.manifest.write_text("id,image,label,split,group\n")
    workspace.state.mkdir()
    return workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    workspace = make_workspace(tmp_path)
    yield workspace
    down(workspace)


def set_port(workspace: Workspace, name: str, port: int) -> None:
    text = workspace.params.read_text()
    workspace.params.write_text(text.replace(f"{name}_port: 0", f"{name}_port: {port}"))


def group_of(leader: int) -> list[int]:
    """The running processes of a group."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except ProcessLookupError:
            pass
    return members


def listening(port: int) -> set[str]:
    return {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.laddr and connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }


@pytest.fixture
def no_label_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace with a Label Studio elsewhere, where nothing answers."""
    monkeypatch.setenv(services.TOKEN_VARIABLE, "token")
    workspace = make_workspace(tmp_path, url="http://127.0.0.1:9")
    yield workspace
    down(workspace)


def test_the_services_start_answer_and_end_together(no_label_studio: Workspace) -> None:
    workspace, told = no_label_studio, []
    states = up(workspace, lambda title, what: told.append((title, what)))
    assert [state.state for state in states] == ["external", "up", "up", "up"]
    assert ("MLflow", "starting") in told

    known = addresses(workspace)
    assert (known.label_studio, known.label_studio_token) == ("http://127.0.0.1:9", "token")
    assert httpx.get(f"{known.prefect}/health", trust_env=False).json() is True
    experiment = httpx.post(f"{known.mlflow}/api/2.0/mlflow/experiments/create", json={"name": "x"}, trust_env=False)
    assert experiment.is_success
    assert httpx.get(f"{known.live}/health", trust_env=False).json()["status"] == "UP"
    assert (workspace.mlflow / "mlflow.db").exists() and (workspace.prefect / "prefect.db").exists()
    records = read_json(workspace.services)
    assert all(listening(record["port"]) == {"127.0.0.1"} for record in records.values())

    assert [state.pid for state in up(workspace)] == [state.pid for state in states], "up twice starts nothing twice"

    # The leader of a group is lost, its worker lives on: down ends that as well.
    mlflow = records["mlflow"]["pid"]
    os.kill(mlflow, 9)
    assert len(group_of(mlflow)) >= 1
    down(workspace)
    assert [group_of(record["pid"]) for record in records.values()] == [[], [], []]
    assert [state.state for state in status(workspace)][1:] == ["down"] * 3
    kept = {name: record["url"] for name, record in read_json(workspace.services).items()}
    assert kept == {name: record["url"] for name, record in records.items()}
    with pytest.raises(ConnectionError, match="Prefect is down; start it with `abnloop up`"):
        addresses(workspace)
    down(workspace)


@pytest.mark.studio
def test_the_embedded_label_studio_starts_with_the_others(workspace: Workspace) -> None:
    from labeling.client import LabelStudio

    states = up(workspace)
    assert [state.state for state in states] == ["up"] * 4
    known = addresses(workspace)
    assert LabelStudio(known.label_studio, known.label_studio_token).check()
    assert listening(read_json(workspace.services)["label_studio"]["port"]) == {"127.0.0.1"}
    email, password = log_in(workspace)
    assert "@" in email and len(password) >= 12
    assert workspace.secrets.stat().st_mode & 0o777 == 0o600
    Git(workspace.root).commit(["params.yaml", ".gitignore", "data/manifest.csv"], "All")
    Dvc(workspace.root).init()
    Git(workspace.root).commit([".dvc", ".dvcignore"], "DVC")
    assert [finding.level for finding in doctor(workspace) if not re.search("remote|who|schedule", finding.what)] == []
    secret = read_json(workspace.secrets)
    write_json(workspace.secrets, {**secret, "token": "0" * 40}, mode=0o600)
    assert any(finding.level == "broken" and "token" in finding.remedy for finding in doctor(workspace))


def test_a_taken_port_is_named_with_the_remedy_and_nothing_starts(no_label_studio: Workspace) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        set_port(no_label_studio, "mlflow", port)
        with pytest.raises(ValueError, match=f"port {port} of MLflow is taken.*services.mlflow_port"):
            up(no_label_studio)
        assert read_json(no_label_studio.services) == {}
        found = [finding for finding in doctor(no_label_studio) if "is taken" in finding.what]
        assert [finding.level for finding in found] == ["broken"]


def test_a_service_that_dies_says_why_and_takes_the_others_down(
    no_label_studio: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = services._commands

    def broken(workspace: Workspace, name: str, port: int) -> tuple[Sequence[str], dict[str, str], str]:
        argv, env, url = commands(workspace, name, port)
        if name == "live":
            argv = [sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"]
        return argv, env, url

    monkeypatch.setattr(services, "_commands", broken)
    with pytest.raises(ValueError, match=r"abnloop ended while it started: out of luck \(the whole log: .*live\.log\)"):
        up(no_label_studio)
    records = read_json(no_label_studio.services)
    assert len(records) == 3 and all(group_of(record["pid"]) == [] for record in records.values())


def test_a_number_that_was_given_again_is_never_killed(no_label_studio: Workspace) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        record = {"port": 1, "url": "http://127.0.0.1:1", "pid": other.pid, "started": time.time() - 1000}
        write_json(no_label_studio.services, {"prefect": record})
        assert status(no_label_studio)[1].state == "down"
        down(no_label_studio)
        assert other.poll() is None
        other.kill()


def test_free_ports_differ_and_stay(no_label_studio: Workspace) -> None:
    section, names = Services(0, 0, 0, 0), list(services.TITLES)
    ports = services._free_ports(section, {}, names)
    assert len(set(ports.values())) == 4
    records = {name: {"port": port} for name, port in ports.items()}
    assert services._free_ports(section, records, names) == ports


def test_ports_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"services\.mlflow_port is 70000"):
        Services(0, 0, 70000, 0)
    with pytest.raises(ValueError, match=r"services\.prefect_port and services\.live_port are both 4200"):
        Services(8080, 4200, 5000, 4200)


def test_servers_take_their_stores_from_the_environment_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*services.STORES, "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "http://elsewhere")
    _, environment, _ = services._commands(make_workspace(tmp_path), "mlflow", 1)
    assert {environment[name] for name in services.STORES} == {"http://elsewhere"}
    assert environment["MLFLOW_S3_ENDPOINT_URL"] == "http://elsewhere"
    assert not {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"} & environment.keys()


def test_an_external_label_studio_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(services.TOKEN_VARIABLE, raising=False)
    workspace = make_workspace(tmp_path, url="https://labels.example.com/")
    with pytest.raises(PermissionError, match=r"https://labels\.example\.com; set LABEL_STUDIO_API_KEY"):
        services.label_studio_access(workspace)


def test_doctor_names_what_is_wrong_and_each_remedy(no_label_studio: Workspace) -> None:
    workspace = no_label_studio
    Dvc(workspace.root).init()
    workspace.gold.write_bytes(b"masks")
    names = Dvc(workspace.root).add(["data/gold.npz"])
    Git(workspace.root).commit([".dvc", ".dvcignore", *names, "params.yaml", ".gitignore"], "All but the manifest")
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    findings = doctor(workspace)
    by_what = {finding.what: finding for finding in findings}
    assert by_what["the DVC cache lacks data/gold.npz"].remedy == "`dvc pull` fetches it"
    assert by_what["the git tree is dirty (data/manifest.csv)"].level == "broken"
    assert by_what["DVC has no remote: the data are on this machine alone"].level == "advice"
    assert by_what["Prefect is down"] == Finding("advice", "Prefect is down", "`abnloop up` starts it")
    assert any("127.0.0.1:9" in finding.what and finding.level == "broken" for finding in findings)
    assert [finding.level for finding in findings] == sorted((f.level for f in findings), reverse=True)


def test_doctor_sees_a_schedule_that_fires_nothing_and_what_prefect_complains_of(
    no_label_studio: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, commands = no_label_studio, services._commands

    def without_scheduler(workspace: Workspace, name: str, port: int) -> tuple[Sequence[str], dict[str, str], str]:
        argv, env, url = commands(workspace, name, port)
        return argv, {**env, "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false"}, url

    monkeypatch.setattr(services, "_commands", without_scheduler)
    monkeypatch.setattr(examination, "SETTLED", 0.0)
    up(workspace)
    assert any(finding.what == "nothing runs on a schedule" for finding in examination._check_schedule(workspace))
    shutil.copy(PROJECT / "prefect.yaml", workspace.root)
    deploy = "import sys\nfrom flows import services\nfrom flows.workspace import Workspace\n"
    deploy += "place = Workspace(sys.argv[1])\nservices.connect(place)\nfrom flows.serve import deployments\n"
    deploy += "for one in deployments(place): one.apply()\n"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    subprocess.run([sys.executable, "-c", deploy, str(workspace.root)], cwd=PROJECT, env=clean, check=True)
    findings = {finding.what: finding for finding in examination._check_schedule(workspace)}
    for name, cron in (("retrain", "2 2 * * *"), ("collect", "*/5 * * * *"), ("ingest", "*/5 * * * *")):
        silent = findings[f"no run of the deployment {name} is scheduled, although its cron is {cron!r}"]
        assert silent.level == "broken" and "prefect.log" in silent.remedy
    assert set(examination.upcoming(workspace).values()) == {None}

    # A run that is due, and nobody serves.
    (known,) = services.ask_prefect(workspace, "deployments/filter", {"deployments": {"name": {"any_": ["collect"]}}})
    missed = [datetime.now(UTC) - timedelta(days=days) for days in (3, 2, 1)]
    for date in missed:
        due = {"type": "SCHEDULED", "state_details": {"scheduled_time": date.isoformat()}}
        services.ask_prefect(workspace, f"deployments/{known['id']}/create_flow_run", {"state": due})
    (late,) = [one for one in examination._check_schedule(workspace) if "late" in one.what]
    assert late.what.startswith(f"3 runs of the deployment collect are late, the first since {missed[0]:%Y-%m}")
    assert late.remedy == "nothing takes them: start `abnloop serve`"

    # Of the runs of a cron that were missed the latest is made up for.
    database = sqlite3.connect(workspace.prefect / "prefect.db", timeout=60)
    with closing(database), database:
        database.execute("UPDATE flow_run SET auto_scheduled = 1")
    drop = deploy.partition("from flows.serve")[0] + "from flows.serve import drop_missed_runs\n"
    command = [sys.executable, "-c", drop + "print(drop_missed_runs())", str(workspace.root)]
    done = subprocess.run(command, cwd=PROJECT, env=clean, check=True, capture_output=True, text=True)
    assert done.stdout == "2\n"
    (kept,) = services.ask_prefect(workspace, "flow_runs/filter", {})
    assert datetime.fromisoformat(kept["expected_start_time"].replace("Z", "+00:00")) == missed[2]

    assert examination._check_logs(workspace) == []
    database = sqlite3.connect(workspace.prefect / "prefect.db", timeout=60)
    with closing(database):
        database.execute("ALTER TABLE flow_run RENAME TO gone")
    deadline = time.monotonic() + 60
    while not (complaints := examination._check_logs(workspace)) and time.monotonic() < deadline:
        time.sleep(1)
    (complaint,) = complaints
    assert re.match(
        r"the log of Prefect has \d+ errors, the last at 20.*OperationalError.*no such table: flow_run", complaint.what
    )
    assert complaint.level == "advice" and "prefect.log" in complaint.remedy


def test_errors_of_a_log_are_counted_once_a_chain_and_dated(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(
        "2026-03-01 10:00:00.123 | ERROR   | prefect.server - it failed\n"
        "Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n'
        "sqlite3.OperationalError: locked\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n"
        "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) locked\n"
        "[2026-03-01 11:00:00,000] [ERROR] next\n"
        "    raise ValueError: not at the beginning\n"
        "TimeoutError\n"
    )
    found = [(one.kind, one.said, str(one.when)) for one in examination.errors_in(log)]
    assert found == [
        ("OperationalError", "(sqlite3.OperationalError) locked", "2026-03-01 10:00:00"),
        ("TimeoutError", "", "2026-03-01 11:00:00"),
    ]
    assert examination.errors_in(tmp_path / "none.log") == []


def test_a_lock_that_passes_is_no_complaint(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    log = services.log_of(workspace, "prefect")
    log.parent.mkdir(parents=True)
    log.write_text("sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked\n" * 5)
    assert examination._check_logs(workspace) == []
    log.write_text("sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement\n" * 5)
    (complaint,) = examination._check_logs(workspace)
    assert "has 5 errors" in complaint.what and "InvalidRequestError: Can't evaluate bulk" in complaint.what


def test_the_remedy_for_a_full_disk_costs_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = make_workspace(tmp_path)
    git, dvc = Git(workspace.root), Dvc(workspace.root)
    dvc.init()
    hashes = []
    for number in (1, 2, 3):
        workspace.gold.write_bytes(bytes([number]))
        git.commit([".dvc", ".dvcignore", *dvc.add(["data/gold.npz"])], f"Masks {number}")
        hashes.append(hashlib.md5(bytes([number]), usedforsecurity=False).hexdigest())
        if number != 2:
            git.tag(f"round/{number:04d}")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 2**30))
    (finding,) = examination._check_disk(workspace)
    assert (finding.level, finding.what) == ("advice", "2.0 GiB of disk are left")
    command = finding.remedy.split("`")[1].removeprefix("dvc ").split()
    dvc._run(*command, "--force")
    assert [dvc.caches(one) for one in hashes] == [True, False, True]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=PROJECT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run("status", "--workspace", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"abnloop: {tmp_path} is not a workspace") and done.stderr.count("\n") == 1
    assert "Traceback" in run("status", "--workspace", str(tmp_path), ABNLOOP_TRACEBACK="1").stderr


def test_services_that_all_run_elsewhere_are_shown_too(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    make_workspace(tmp_path, url=nowhere, prefect_url=nowhere, mlflow_url=nowhere, live_url=nowhere)
    done = run("status", "--workspace", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("external") == 4 and "logs:" not in done.stdout


def test_what_the_system_refuses_is_one_line_too(tmp_path: Path) -> None:
    done = run("init", str(tmp_path / "w"), "--images", str(tmp_path), "--index", str(tmp_path))
    assert (done.returncode, done.stderr) == (2, f"abnloop: [Errno 21] Is a directory: '{tmp_path}'\n")


def test_a_round_that_opens_may_write_where_it_writes(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path)
    assert any("dirty" in finding.what for finding in examination._check_git(workspace))
    workspace.round(1).write({"round": 1, "state": "begun"})
    assert not any("dirty" in finding.what for finding in examination._check_git(workspace))
    workspace.round(1).write({"round": 1, "state": "open"})
    assert any("dirty" in finding.what for finding in examination._check_git(workspace))


def test_a_service_that_is_started_again_keeps_what_it_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace(tmp_path)
    for word in ("first", "second", "third"):
        command = [sys.executable, "-c", f"print('{word}')"]
        monkeypatch.setattr(services, "_commands", lambda *_, command=command: (command, dict(os.environ), ""))
        services._children[services._start(workspace, "mlflow", 1)["pid"]].wait()
    said = {path.name: path.read_text().strip() for path in workspace.logs.iterdir()}
    assert said == {"mlflow.log": "third", "mlflow.before.log": "second"}


def test_a_setting_without_a_value_is_one_line(tmp_path: Path) -> None:
    done = run("init", str(tmp_path / "w"), "--images", str(tmp_path), "--set", "train.epochs")
    assert (done.returncode, done.stderr) == (
        2,
        "abnloop: --set train.epochs must be SECTION.KEY=VALUE, such as train.epochs=20\n",
    )


@pytest.mark.parametrize("command", ["init", "up", "down", "status", "doctor"])
def test_help_teaches_with_an_example(command: str) -> None:
    done = run(command, "--help", COLUMNS="200")
    assert done.returncode == 0 and f"Example: abnloop {command}" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    heavy = ["dvc", "httpx", "mlflow", "numpy", "prefect", "torch"]
    code = f"import sys, flows.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
