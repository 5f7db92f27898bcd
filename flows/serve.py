"""The flows on a schedule, as prefect.yaml names them: `abnloop serve`, or `prefect deploy` for a work pool."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import prefect
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.utilities.templating import apply_values

from abn.config import load_section
from flows.hints import resource
from flows.rounds import GPU
from flows.workspace import Workspace, open_workspace

HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=10)  # a run that says nothing for so long is dead; on a busy machine a heart beats late
FREES_DEAD_RUNS = "abnloop: runs without a heartbeat have crashed"


@dataclass(frozen=True)
class FlowsConfig:
    retrain_cron: str
    collect_cron: str  # of taking in captured pictures, too
    work_pool: str
    gpu_concurrency: int

    def __post_init__(self) -> None:
        for name in ("retrain_cron", "collect_cron"):
            try:
                CronSchedule(cron=getattr(self, name))
            except ValueError:
                value, order = getattr(self, name), "minute, hour, day, month, weekday"
                raise ValueError(f"flows.{name} is {value!r}; write {order}, such as '0 2 * * *'") from None
        if self.gpu_concurrency < 1:
            raise ValueError(f"flows.gpu_concurrency is {self.gpu_concurrency}; it must be at least 1")


def serve(place: Workspace) -> None:
    """Make the deployments of prefect.yaml and, without a work pool, run them here until interrupted.

    With `flows.work_pool` the pool's workers run them. Raises ValueError for a pool that does not exist.
    """
    pool = load_section(FlowsConfig, place.params, "flows").work_pool
    if pool == "none":
        prefect.serve(*deployments(place))
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            raise ValueError(
                f"flows.work_pool is {pool}, which does not exist; "
                f"make it with `prefect work-pool create --type process {pool}`"
            ) from None
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    known = {**os.environ, "PREFECT_DEFAULT_WORK_POOL_NAME": pool}  # of several deployments, --pool is ignored
    done = subprocess.run(command, cwd=place.root, env=known, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"prefect deploy failed: {' '.join((done.stderr or done.stdout).split()[-40:])}")


def deployments(place: Workspace) -> list[RunnerDeployment]:
    """What prefect.yaml names, its placeholders filled in, ready to be served by this process."""
    known = prepare(place.root)
    named = yaml.safe_load((place.root / "prefect.yaml").read_text())["deployments"]
    return [_deployment(apply_values(one, known)) for one in named]


def prepare(workspace: str | Path = ".") -> dict[str, Any]:
    """The build step of prefect.yaml: what its placeholders mean.

    It also makes what runs need on the server: the limit of trainings at once, whose slots are leases that a dead run
    loses after a minute, and the automation that calls a run crashed when its heart stops.
    """
    place = open_workspace(workspace)
    config = load_section(FlowsConfig, place.params, "flows")
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPU, config.gpu_concurrency)
    _free_dead_runs()
    return {
        "workspace": str(place.root),
        "resource": resource(place),
        "retrain_cron": config.retrain_cron,
        "collect_cron": config.collect_cron,
    }


def _deployment(spec: dict[str, Any]) -> RunnerDeployment:
    path, _, name = spec.pop("entrypoint").partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    schedule = {key: value for one in spec.pop("schedules") for key, value in one.items()}
    triggers = [DeploymentEventTrigger(**one) for one in spec.pop("triggers", [])]
    made: RunnerDeployment = flow.to_deployment(**spec, **schedule, triggers=triggers)
    return made


def _free_dead_runs() -> None:
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    wanted = AutomationCore(
        name=FREES_DEAD_RUNS,
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ends},
            for_each={"prefect.resource.id"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                name=None, state=StateType.CRASHED, message=f"no heartbeat for {SILENCE.seconds} seconds", force=False
            )
        ],
    )
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(FREES_DEAD_RUNS):
            client.create_automation(wanted)
