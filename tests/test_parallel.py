"""Two processes do what one does: torchrun and gloo on this machine's processor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from abn.losses import MAP_LOSSES
from abn.manifest import read_manifest
from abn.model import load_model
from abn.train import Settings, train
from flows.ingest import change_settings
from ranks import answer_all, steps
from tiny import PROJECT, correct, make_workspace, square, write_params

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def workspace(folder: Path, epochs: int = 1) -> Path:
    root = make_workspace(folder)
    correct(root, {f"train{i:02d}": square(i) for i in range(3)})
    write_params(root, epochs)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace on which two processes have done what tests/ranks.py says."""
    root = workspace(tmp_path_factory.mktemp("two") / "workspace")
    subprocess.run([*TORCHRUN, str(PROJECT / "tests/ranks.py"), str(root)], env=ENVIRONMENT, check=True, timeout=240)
    return root


def test_a_step_of_two_processes_is_that_of_one(two: Path) -> None:
    alone = steps(two)
    first, second = (torch.load(two / f"steps-{rank}.pt") for rank in (0, 1))
    assert alone.keys() == first.keys() == second.keys() == MAP_LOSSES.keys()
    for name, wanted in alone.items():
        assert wanted["map_loss"] > 0, "the second process has no correction in its part"
        for what, value in wanted.items():
            assert torch.equal(torch.as_tensor(first[name][what]), torch.as_tensor(second[name][what])), what
            torch.testing.assert_close(first[name][what], value, rtol=1e-4, atol=1e-5)


def test_predictions_of_two_processes_are_the_same_bytes(two: Path, tmp_path: Path) -> None:
    answer_all(two, tmp_path / "alone")
    found = {path.name: path.read_bytes() for path in (two / "results/predictions").iterdir()}
    assert len(found) == 4
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "results/train.jsonl").read_text().splitlines()]


def test_the_stage_trains_in_as_many_processes_as_are_set(tmp_path: Path) -> None:
    """As `dvc repro` calls it; rounding grows from step to step."""
    root = workspace(tmp_path / "workspace", epochs=2)
    train(root, read_manifest(root), Settings.load(root / "params.yaml"), tmp_path / "alone", lambda line: None)
    alone = [json.loads(line) for line in (tmp_path / "alone/train.jsonl").read_text().splitlines()]
    change_settings(root / "params.yaml", {"train.processes": 2})
    stage = [sys.executable, "-m", "abn.train"]
    done = subprocess.run(stage, cwd=root, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=240)
    said = ["learning ", "the masks", "epoch 1/2", "epoch 2/2"]
    steps = [line.split(",")[0] for line in done.stdout.splitlines() if re.search(r"\bstep \d+/", line)]
    lines = [line[:9] for line in done.stdout.splitlines() if not re.search(r"\bstep \d+/", line)]
    assert lines == said, "the first process alone speaks"
    assert steps and len(steps) == len(set(steps)), "and says every step once at most"
    for line, wanted in zip(lines_of(root), alone, strict=True):
        assert line.pop("seconds") > 0 and wanted.pop("seconds") > 0
        assert line == pytest.approx(wanted, rel=1e-3)
    weights, wanted = (
        load_model(folder / "model.pt").network.state_dict() for folder in (root / "results", tmp_path / "alone")
    )
    torch.testing.assert_close(weights, wanted, rtol=1e-2, atol=1e-3)
    assert (root / "results/early.npz").is_file() and not (root / "results/checkpoint.pt").exists()


def test_processes_end_with_the_torchrun_that_is_killed_and_one_process_can_go_on(tmp_path: Path) -> None:
    root = workspace(tmp_path / "workspace", epochs=12)
    change_settings(root / "params.yaml", {"train.processes": 2, "corrections.recipe": "none"})
    stage = [sys.executable, "-m", "abn.train"]
    with subprocess.Popen(stage, cwd=root, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("epoch 1/12") for line in process.stdout)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    epochs: list[float] = []
    settings = Settings.load(root / "params.yaml")
    train(root, read_manifest(root), settings, root / "results", lambda line: epochs.append(line["epoch"]))
    assert epochs[0] > 1
    assert [line["epoch"] for line in lines_of(root)] == list(range(1, 13))
