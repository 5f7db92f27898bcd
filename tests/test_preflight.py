"""What cannot begin is told before Prefect is asked, and settings that cannot work before any image is read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.ingest import change_settings
from flows.preflight import SECTIONS, check_settings, check_workspace
from flows.versions import Git
from flows.workspace import InUse, Workspace
from tiny import PROJECT


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace in which everything is committed."""
    root = tmp_path / "leaves"
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True)
    for name in ("params.yaml", ".gitignore"):
        shutil.copy(PROJECT / name, root)
    (root / "data").mkdir()
    (root / "data/manifest.csv").write_text("id,image,label,split,group\n")
    Git(root).commit(["."], "[data] images")
    return Workspace(root)


def refusal(place: Workspace) -> str:
    with pytest.raises(ValueError) as refused:
        check_workspace(place)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_committed_workspace_may_begin(place: Workspace) -> None:
    check_workspace(place)


def test_a_setting_that_is_not_committed_is_named(place: Workspace) -> None:
    change_settings(place.params, {"train.epochs": 3})
    assert refusal(place).startswith("params.yaml has changes that are not committed (1 file(s)); commit them")


def test_an_old_round_that_is_checked_out_is_named(place: Workspace) -> None:
    Git(place.root).tag("round/0001")
    Git(place.root).checkout("round/0001")
    assert "an old round is checked out" in refusal(place)


def test_a_round_that_is_open_is_named_with_what_to_do(place: Workspace) -> None:
    place.round(1).write({"round": 1, "state": "open"})
    check_workspace(place)  # it was interrupted before its commit, which is made up for
    Git(place.root).commit(["rounds"], "[round 1] Ask")
    assert refusal(place) == "round 1 is open already; `abnloop round collect` takes its answers in"


def test_a_round_whose_collecting_was_interrupted_is_named(place: Workspace) -> None:
    place.round(1).write({"round": 1, "state": "closed"})
    Git(place.root).commit(["rounds"], "[round 1] Learn")
    assert refusal(place) == "collecting round 1 was interrupted; finish it with `abnloop round collect`"


def test_who_holds_the_workspace_is_named(place: Workspace) -> None:
    with place.lock("round collect"), pytest.raises(InUse, match="in use by `abnloop round collect`"):
        check_workspace(place)


def test_looking_at_git_imports_nothing_heavy() -> None:
    code = "import sys, flows.cli, flows.preflight, flows.services; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert not {"torch", "prefect", "mlflow", "dvc"} & set(loaded.stdout.split())


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"model.backbone": "resnet5"}, "model.backbone is 'resnet5'; did you mean resnet50?"),
    ({"model.backbone": "cifar_resnet21"}, "model.backbone is cifar_resnet21; a depth is 6n + 2"),
    ({"model.backbone": "resnet18", "model.weights": "IMAGENET1K_V9"}, "for resnet18: none, IMAGENET1K_V1"),
    ({"model.backbone": "efficientnet_lite0", "model.weights": "absent.pt"}, "none, pretrained, or a local file"),
    ({"model.weights": "pretrained"}, "but cifar_resnet20 has none; set it to none"),
    ({"model.backbone": "vgg11", "data.size": [16, 16]}, "data.size is [16, 16], too small for vgg11"),
    ({"model.split": "layer9"}, "model.split is 'layer9'"),
    ({"train.device": "cuda:99"}, "train.device is 'cuda:99', which this machine lacks"),
    ({"train.epochs": 0}, "train.epochs is 0; it must be above 0"),
    ({"gate.confidence": 0.2}, "gate.confidence is 0.2"),
    ({"selection.strategy": "guess"}, "selection.strategy is 'guess'"),
    ({"services.prefect_port": 70000}, "services.prefect_port is 70000; a port lies between 1 and 65535"),
    ({"stop.unreasonable": 2.0}, "stop.unreasonable is 2.0; it is a share"),
    ({"labeling.labelers_per_task": 0}, "labeling.labelers_per_task is 0; it must be at least 1"),
    ({"flows.retrain_cron": "every day"}, "flows.retrain_cron is 'every day'; write minute, hour"),
]


@pytest.mark.parametrize(("settings", "reason"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    path = Path(shutil.copy(PROJECT / "params.yaml", tmp_path))
    change_settings(path, settings)
    with pytest.raises(ValueError) as refused:
        check_settings(path)
    assert reason in str(refused.value)


def test_what_the_project_ships_works(tmp_path: Path) -> None:
    check_settings(PROJECT / "params.yaml")


@pytest.mark.parametrize("backbone", ["wide_resnet101_2", "regnet_y_400mf", "convnext_tiny", "efficientnet_v2_s"])
def test_large_networks_are_checked_without_training_them(tmp_path: Path, backbone: str) -> None:
    path = Path(shutil.copy(PROJECT / "params.yaml", tmp_path))
    change_settings(path, {"model.backbone": backbone, "data.size": [512, 512]})
    check_settings(path, SECTIONS)
