"""The demo as a user starts it, and as a user stops it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.studio, pytest.mark.timeout(900)]

KEYS = {
    *("round", "corrections", "test_accuracy", "control_accuracy", "attention_inside_mask", "promoted"),
    *("model_version", "mlflow_run_id", "git_commit", "seconds"),
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "demo"
    for process in processes_of(tmp_path):
        process.kill()


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", "demo", "--workspace", str(directory), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def processes_of(directory: Path) -> list[psutil.Process]:
    """Whatever runs in, or names, a folder below `directory`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(directory) in " ".join([*process.cmdline(), process.cwd()]):
                found.append(process)
    return found


def test_a_round_of_the_demo_waits_for_a_person_tells_its_story_and_ends_its_services(directory: Path) -> None:
    process = start(directory, "--rounds", "1", "--budget", "4", "--label-yourself")
    assert process.stdout is not None
    asked = next(line for line in process.stdout if "the first batch is yours" in line)
    assert re.search(r"http://localhost:\d+/projects/\d+/data", asked)
    assert re.match(r"log in as admin@example\.com with password \S+$", process.stdout.readline())
    answer = [sys.executable, "-m", "flows.cli", "simulate", "--workspace", str(directory)]
    subprocess.run(answer, check=True, capture_output=True)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    summary = json.loads((directory / "summary.json").read_text())
    (only,) = summary["rounds"]
    assert only.keys() >= KEYS
    assert (only["round"], only["corrections"], only["promoted"]) == (1, 0, True)
    assert only["test_accuracy"] == only["control_accuracy"], "nobody has corrected anything yet"
    tag = ["git", "-C", str(directory), "rev-parse", "round/0001^{commit}"]
    assert only["git_commit"] == subprocess.run(tag, capture_output=True, text=True, check=True).stdout.strip()
    assert set(summary["services"]) == {"label_studio", "prefect", "mlflow", "live"}
    report = (directory / "report.html").read_text()
    assert report.count("data:image/png;base64,") >= 8 * 2, "eight pictures, each with its map, and gold masks"
    assert not processes_of(directory)


def test_an_interrupted_demo_leaves_no_process_behind(directory: Path) -> None:
    process = start(directory, "--rounds", "1", "--budget", "4")
    assert process.stdout is not None
    for line in process.stdout:
        if "train the baseline, " in line:
            break
    assert len(processes_of(directory)) > 4, "the services and a training"
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    deadline = time.monotonic() + 5
    while processes_of(directory) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(directory)
