"""The flows on a schedule, as prefect.yaml names them: `abnloop serve`, or `prefect deploy` for a work pool."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger, EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runner import Runner
from prefect.utilities.templating import apply_values

from abn.config import load_section
from flows.hints import resource
from flows.slots import FlowsConfig, set_limit
from flows.supervisor import READY, TAG
from flows.workspace import Workspace, open_workspace

HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=10)  # a run that says nothing for so long is dead; on a busy machine a heart beats late
FREES_DEAD_RUNS = "abnloop: runs without a heartbeat have crashed"


def serve(place: Workspace) -> None:
    """Make the deployments of prefect.yaml and, without a work pool, run them here until interrupted.

    A round whose opening was interrupted goes on at once, rather than at the next date of its cron. With
    `flows.work_pool` the pool's workers run the flows. Raises ValueError for a pool that does not exist.
    """
    pool = load_section(FlowsConfig, place.params, "flows").work_pool
    if pool == "none":
        runner = Runner(name="abnloop")
        for one in deployments(place):
            runner.add_deployment(one)
        _go_on(place)
        print(READY, flush=True)
        with suppress(KeyboardInterrupt, TerminationSignal):
            asyncio.run(runner.start())
        return
    _deploy(place, pool)
    _go_on(place)
    print(READY, flush=True)


def _go_on(place: Workspace) -> None:
    """Start a run of `retrain` now where a round was interrupted while it opened."""
    latest = place.latest()
    if latest and latest.is_opening:
        run_deployment("open-round/retrain", timeout=0)


def _deploy(place: Workspace, pool: str) -> None:
    """Make the deployments for the workers of a pool, as `prefect deploy --all` does."""
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

    It also makes what runs need on the server, the limit of trainings at once and the automation that calls a run
    crashed when its heart stops, and drops the runs that were missed while nobody served.
    """
    place = open_workspace(workspace)
    config = load_section(FlowsConfig, place.params, "flows")
    set_limit(place)
    _free_dead_runs()
    drop_missed_runs()
    return {
        "workspace": str(place.root),
        "resource": resource(place),
        "retrain_cron": config.retrain_cron,
        "collect_cron": config.collect_cron,
    }


def drop_missed_runs() -> int:
    """Delete the scheduled runs whose time has passed, but the latest of each deployment; how many there were.

    Without this, the runs of a weekend on which the machine was off would all start at once.
    """
    now, missed = datetime.now(UTC), list[FlowRun]()
    waiting = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    with get_client(sync_client=True) as client:
        ours = {one.id for one in client.read_deployments() if TAG in one.tags}
        order = FlowRunSort.EXPECTED_START_TIME_ASC
        while page := client.read_flow_runs(flow_run_filter=waiting, sort=order, limit=200, offset=len(missed)):
            missed += [run for run in page if run.expected_start_time and run.expected_start_time < now]
            if missed[-1:] != page[-1:]:
                break  # the others are to come
        cron = [run for run in missed if run.auto_scheduled and run.deployment_id in ours]
        latest = {run.deployment_id: run.id for run in cron}
        dropped = [run.id for run in cron if run.id != latest[run.deployment_id]]
        for run_id in dropped:
            client.delete_flow_run(run_id)
    return len(dropped)


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
