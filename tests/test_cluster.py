"""PostgreSQL and S3 by configuration alone: a real PostgreSQL, and moto as the S3 server."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import compose
import psycopg2
import pytest
import yaml
from moto.server import ThreadedMotoServer

from flows import services
from flows.ingest import change_settings
from flows.services import STORES
from flows.versions import Dvc, Git
from flows.workspace import Workspace
from tiny import PROJECT

PASSWORD = secrets.token_hex(12)
BUCKET = "leaves"


def postgres_program(name: str) -> str:
    """A program of PostgreSQL's server; Debian does not put them on PATH."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default="")
    if not found:
        pytest.fail("PostgreSQL is missing; install it with `apt-get install postgresql`")
    return found


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own in a temporary folder; its address, with user and password."""
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    with tempfile.TemporaryDirectory(prefix="abnloop-postgres-") as folder:
        password, data = Path(folder) / "password", Path(folder) / "data"
        password.write_text(PASSWORD)
        if user:
            for path in (folder, password):
                shutil.chown(path, user)
        initdb = [postgres_program("initdb"), "-D", str(data), "-U", "abnloop", "--auth=scram-sha-256"]
        subprocess.run(
            [*initdb, f"--pwfile={password}", "--no-sync"], user=user, cwd="/", check=True, capture_output=True
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        serve = [postgres_program("pg_ctl"), "-D", str(data), "-w", "-t", "120", "-l", str(data / "log")]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        subprocess.run([*serve, "-o", options, "start"], user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"abnloop:{PASSWORD}@127.0.0.1:{port}"
        finally:
            stop = [*serve, "-m", "immediate", "stop"]
            subprocess.run(stop, user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server in this process with an empty bucket; its address. Credentials are in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def test_mlflow_and_prefect_keep_what_they_know_in_postgresql(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workspace(tmp_path / "leaves")
    place.state.mkdir(parents=True)
    shutil.copy(PROJECT / "params.yaml", place.params)
    ports = {f"services.{name}_port": 0 for name in ("label_studio", "prefect", "mlflow", "live")}
    elsewhere = {"labeling.url": "http://127.0.0.1:9", "services.live_url": "http://127.0.0.1:9"}
    change_settings(place.params, {**ports, **elsewhere})
    databases = {"prefect": f"postgresql+asyncpg://{postgres}", "mlflow": f"postgresql+psycopg2://{postgres}"}
    database = psycopg2.connect(f"postgresql://{postgres}/postgres")
    database.autocommit = True
    with database.cursor() as cursor:
        for name in databases:
            cursor.execute(f"CREATE DATABASE {name}")
    database.close()
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"{databases['prefect']}/prefect")
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", f"{databases['mlflow']}/mlflow")
    monkeypatch.setenv(services.TOKEN_VARIABLE, "nobody's")
    columns = ("decided", "decision", "champion", "reason", "round", "model_version")
    decision = dict.fromkeys(columns, "a hundred of these are longer than a column of MLflow's")
    try:
        states = {state.name: state.state for state in services.up(place)}
        assert states == {"label_studio": "external", "prefect": "up", "mlflow": "up", "live": "external"}
        known = services.addresses(place)
        use = "import sys\nfrom pathlib import Path\nfrom flows.tracking import Tracker\n"
        use += "from prefect.client.orchestration import get_client\ntracker = Tracker(sys.argv[1], 'leaves')\n"
        use += "tracker.log_metrics(tracker.begin_round(1, {}, {})['round'], {'accuracy': 0.5})\n"
        use += "from flows.lineage_report import describe_history\n"
        use += "tracker.client.create_registered_model('leaves')\n"
        use += f"tracker.describe_model(describe_history({[decision] * 100}))\n"
        use += "with get_client(sync_client=True) as client:\n"
        use += "    client.upsert_global_concurrency_limit_by_name('abnloop-gpu', 2)\n"
        environment = {**os.environ, "PREFECT_API_URL": known.prefect, "PREFECT_HOME": str(place.prefect)}
        subprocess.run([sys.executable, "-c", use, known.mlflow], cwd=PROJECT, env=environment, check=True)
    finally:
        services.down(place)
    assert rows(f"postgresql://{postgres}/mlflow", "SELECT name FROM experiments") >= {("leaves",)}
    assert rows(f"postgresql://{postgres}/mlflow", "SELECT key, value FROM latest_metrics") == {("accuracy", 0.5)}
    found = rows(f"postgresql://{postgres}/prefect", 'SELECT name, "limit" FROM concurrency_limit_v2')
    assert ("abnloop-gpu", 2) in found
    assert not list(place.root.rglob("*.db")), "nothing is kept in files"
    for path in place.root.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path


def rows(address: str, query: str) -> set[tuple[object, ...]]:
    database = psycopg2.connect(address)
    try:
        with database.cursor() as cursor:
            cursor.execute(query)
            return set(cursor.fetchall())
    finally:
        database.close()


def test_data_go_to_s3_and_come_back(s3: str, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(tmp_path)], check=True)
    git, dvc = Git(tmp_path), Dvc(tmp_path)
    dvc.init()
    content = os.urandom(1000)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(content)
    git.commit([".dvc", ".dvcignore", *dvc.add(["images"])], "Data")
    dvc._run("remote", "add", "--default", "store", f"s3://{BUCKET}/leaves")
    dvc._run("remote", "modify", "store", "endpointurl", s3)
    dvc.push()

    stored = boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket=BUCKET)["Contents"]
    assert {one["Key"].split("/")[0] for one in stored} == {"leaves"} and 1000 in {one["Size"] for one in stored}
    shutil.rmtree(tmp_path / ".dvc/cache")
    shutil.rmtree(tmp_path / "images")
    assert dvc.missing()
    dvc._run("pull")
    assert (tmp_path / "images/a.png").read_bytes() == content
    assert PASSWORD not in (tmp_path / ".dvc/config").read_text()


TOKEN = services.TOKEN_VARIABLE
COMPOSE = yaml.safe_load((PROJECT / "compose.yaml").read_text())


def test_no_password_stands_in_the_compose_file() -> None:
    secret = re.compile("PASSWORD|SECRET|ACCESS_KEY|API_KEY|CONNECTION_URL|STORE_URI")
    for name, service in COMPOSE["services"].items():
        for key, value in service.get("environment", {}).items():
            if secret.search(key):
                assert re.search(r"\$\{\w+:\?", str(value)), f"{name}: {key} must come from the environment"


def test_the_compose_file_names_what_the_embedded_servers_read() -> None:
    named = {key for service in COMPOSE["services"].values() for key in service.get("environment", {})}
    assert set(STORES) <= named
    studio = (PROJECT / "requirements-label-studio.in").read_text()
    assert COMPOSE["services"]["label-studio"]["image"].rpartition(":")[2] in studio
    pinned = (PROJECT / "pyproject.toml").read_text()
    assert f"prefect=={COMPOSE['services']['prefect']['image'].rpartition(':')[2].partition('-')[0]}" in pinned


def test_what_talks_to_label_studio_has_its_token() -> None:
    having = {name for name, service in COMPOSE["services"].items() if TOKEN in service.get("environment", {})}
    assert having == {"live", "loop"}  # live keeps masks live there, and hints to collect


def compose_config(**environment: str) -> subprocess.CompletedProcess[str]:
    program = Path(compose.__file__).with_name("docker-compose")  # the console script hides its exit code
    command = [str(program), "--file", str(PROJECT / "compose.yaml"), "config", "--format", "json"]
    return subprocess.run(command, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True)


def test_docker_compose_reads_the_compose_file() -> None:
    needed = set(re.findall(r"\$\{(\w+):\?", (PROJECT / "compose.yaml").read_text()))
    run = compose_config(**dict.fromkeys(needed, PASSWORD))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["services"]
    assert found.keys() == COMPOSE["services"].keys() and all("image" in one for one in found.values())
    for missing in needed:
        run = compose_config(**dict.fromkeys(needed - {missing}, PASSWORD))
        assert run.returncode != 0 and f"required variable {missing} is missing" in run.stderr
