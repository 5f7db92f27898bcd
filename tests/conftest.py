"""What several test files share: a real Label Studio for the session, and what pretrained weights see."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from abn import annotator, shortcut
from abn.backbones import make_parts
from abn.pyramid import Pyramid
from labeling.studio import DEFAULT_COMMAND, prepare_data_dir, studio_command

COMMAND = Path(__file__).parent.parent / DEFAULT_COMMAND


@dataclass(frozen=True)
class Studio:
    """A running Label Studio; files below `document_root` can be served."""

    url: str
    token: str
    email: str
    password: str
    document_root: Path
    pid: int


def pytest_configure() -> None:
    """Tiny networks run on one thread: threads that wait for each other on a busy machine slow them down tenfold."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A Label Studio of its own for the test session, ended with all its processes."""
    root = tmp_path_factory.mktemp("studio")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    email, password, token = "admin@example.com", secrets.token_hex(8), secrets.token_hex(20)
    prepare_data_dir(COMMAND, root / "data")
    command = studio_command(COMMAND, root / "data", port, email, password, token, root)
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            command.argv, env=command.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_healthy(f"{command.url}/health", process, root / "log")
        yield Studio(command.url, token, email, password, root, process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Label Studio ended:\n{log.read_text()[-2000:]}"
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Label Studio is not healthy after {seconds} s:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def pyramid() -> Pyramid:
    return Pyramid(make_parts("efficientnet_lite0", "pretrained", attention="light"))


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an application on a free port of this machine until the test ends; gives its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(served(app))


@contextmanager
def served(app: FastAPI, port: int = 0) -> Iterator[str]:
    """`app` at a port of this machine, 0 for any free one; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def brief_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are drawn, and what misleads is looked for, after a few steps: for tests of all else."""
    monkeypatch.setattr(annotator, "CYCLES", (20,))
    monkeypatch.setattr(shortcut, "STEPS", 20)
