"""The limit of trainings at once, a global concurrency limit of Prefect, and the slot of it that a training holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.schedules import CronSchedule

from abn.config import load_section
from flows.workspace import Workspace, read_json, write_json

GPU = "abnloop-gpu"  # the name of the limit
LEASE = 60.0  # seconds after which the slot of a run that died is free again
RENEWAL = 10.0  # seconds between renewals of a lease
TAKEN = 423  # the status code of Prefect where every slot is held


@dataclass(frozen=True)
class FlowsConfig:
    """Section `flows` of params.yaml: the crons, where the flows run, how many trainings run at once."""

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


def set_limit(place: Workspace) -> None:
    """Tell Prefect's server how many trainings `flows.gpu_concurrency` allows at once."""
    config = load_section(FlowsConfig, place.params, "flows")
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPU, config.gpu_concurrency)


@contextmanager
def training_slot(place: Workspace) -> Iterator[None]:
    """Hold one of the slots that `flows.gpu_concurrency` allows; wait for as long as all of them are taken.

    The slot is a lease of `LEASE` seconds that this process renews, so a run that dies loses it. Prefect's own
    `concurrency` stops renewing for good after a few failures in a row, as when the server restarts; this one goes on,
    because the training does.
    """
    set_limit(place)
    logger, ended = get_run_logger(), threading.Event()
    with get_client(sync_client=True) as client:
        _release(client, read_json(place.slot).get("lease"))  # of a run that was killed here; the workspace is ours
        lease = _take(client)
        if lease is None:
            logger.info("waits for one of the training slots (flows.gpu_concurrency); all of them are taken")
        while lease is None:
            time.sleep(2)
            lease = _take(client)

    write_json(place.slot, {"lease": str(lease)})

    def renew() -> None:
        nonlocal lease
        with get_client(sync_client=True) as client:
            while not ended.wait(RENEWAL):
                try:
                    if lease is None:
                        lease = _take(client)
                    else:
                        client.renew_concurrency_lease(lease, LEASE)
                except httpx.HTTPStatusError as error:
                    if error.response.status_code == httpx.codes.GONE:  # it ran out while the server was away
                        lease = None
                except httpx.HTTPError:
                    pass  # the next renewal tells whether it is still ours

    thread = threading.Thread(target=renew, name="training-slot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(RENEWAL)
        with get_client(sync_client=True) as client:
            _release(client, lease)
        place.slot.unlink(missing_ok=True)


def _release(client: SyncPrefectClient, lease: UUID | str | None) -> None:
    """Give a slot back, if any; the server frees it by itself where it is away or has done so already."""
    if lease is not None:
        with suppress(httpx.HTTPError):
            client.release_concurrency_slots_with_lease(UUID(str(lease)))


def _take(client: SyncPrefectClient) -> UUID | None:
    """Take a slot; its lease, or None where all are taken."""
    try:
        answer = client.increment_concurrency_slots_with_lease([GPU], 1, "concurrency", LEASE)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == TAKEN:
            return None
        raise
    return UUID(answer.json()["lease_id"])
