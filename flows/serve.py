"""The flows on a schedule: `abnloop serve`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import prefect
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from abn.config import load_section
from flows.rounds import GPU, collect_round, open_round
from flows.workspace import Workspace


@dataclass(frozen=True)
class FlowsConfig:
    retrain_cron: str
    collect_minutes: float
    work_pool: str
    gpu_concurrency: int

    def __post_init__(self) -> None:
        if self.collect_minutes <= 0:
            raise ValueError(f"flows.collect_minutes is {self.collect_minutes}; it must be above 0")
        if self.gpu_concurrency < 1:
            raise ValueError(f"flows.gpu_concurrency is {self.gpu_concurrency}; it must be at least 1")


def serve(place: Workspace) -> None:
    """Make the deployments `retrain` and `collect` and, without a work pool, run them here until interrupted.

    With `flows.work_pool` the pool's workers run them. Raises ValueError for a pool that does not exist.
    """
    config = load_section(FlowsConfig, place.params, "flows")
    with get_client(sync_client=True) as client:
        if config.work_pool != "none":
            try:
                client.read_work_pool(config.work_pool)
            except ObjectNotFound:
                raise ValueError(
                    f"flows.work_pool is {config.work_pool}, which does not exist; "
                    f"make it with `prefect work-pool create --type process {config.work_pool}`"
                ) from None
        client.upsert_global_concurrency_limit_by_name(GPU, config.gpu_concurrency)
    parameters, tags = {"workspace": str(place.root)}, ["abnloop"]
    every = timedelta(minutes=config.collect_minutes)
    if config.work_pool == "none":
        prefect.serve(
            # Typed as a coroutine too, for callers inside an event loop.
            open_round.to_deployment("retrain", cron=config.retrain_cron, parameters=parameters, tags=tags),  # type: ignore[arg-type]
            collect_round.to_deployment("collect", interval=every, parameters=parameters, tags=tags),  # type: ignore[arg-type]
        )
        return
    source = str(Path(__file__).resolve().parent.parent)
    for name, entrypoint, schedule in (
        ("retrain", "open_round", {"cron": config.retrain_cron}),
        ("collect", "collect_round", {"interval": every}),
    ):
        flow: Any = prefect.Flow.from_source(source=source, entrypoint=f"flows/rounds.py:{entrypoint}")
        flow.deploy(
            name,
            work_pool_name=config.work_pool,
            parameters=parameters,
            tags=tags,
            print_next_steps=False,
            **schedule,
        )
