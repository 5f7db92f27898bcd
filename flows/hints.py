"""A webhook of Label Studio becomes an event that lets Prefect collect early. A hint only: all of them may be lost."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx

from flows.services import addresses
from flows.workspace import Workspace

EVENT = "abnloop.hint"
QUIET = 15.0  # seconds: labelers who submit one after another make one run, not one each

log = logging.getLogger(__name__)


def resource(place: Workspace) -> str:
    """What the events of a workspace are about; prefect.yaml's trigger waits for it."""
    return f"abnloop.workspace.{place.root.name}"


class Hints:
    """Takes webhooks; the first one of a burst sends one event `quiet` seconds later, the others are covered by it.

    Returns at once and never fails: without Prefect the schedule of `collect` does the work.
    """

    def __init__(self, place: Workspace, quiet: float = QUIET) -> None:
        self._place, self._quiet = place, quiet
        self._waiting = threading.Lock()  # held from the first webhook of a burst until its event is sent

    def __call__(self, payload: Mapping[str, Any]) -> None:
        if not str(payload.get("action", "")).startswith("ANNOTATION") or not self._waiting.acquire(blocking=False):
            return
        timer = threading.Timer(self._quiet, self._send)
        timer.daemon = True  # a service that ends does not wait for a hint
        timer.start()

    def _send(self) -> None:
        self._waiting.release()  # what comes from here on may be missed by the run, so it is a burst of its own
        event = {
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": EVENT,
            "resource": {"prefect.resource.id": resource(self._place)},
            "payload": {},
        }
        try:
            url = f"{addresses(self._place).prefect}/events"
            httpx.post(url, json=[event], timeout=10, trust_env=False).raise_for_status()
        except (httpx.HTTPError, OSError, ValueError) as error:
            log.warning("Prefect does not take the hint to collect, the schedule will: %s", error)
