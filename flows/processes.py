"""Processes that lead a session of their own: everything below them ends with them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil


def running_process(record: Mapping[str, Any]) -> psutil.Process | None:
    """The process that a record names by `pid` and `started`, if it still runs.

    Another one that got its number later does not count.
    """
    with suppress(psutil.NoSuchProcess, KeyError):
        process = psutil.Process(record["pid"])
        # The start time is reckoned from the clock, which may have been set a little since.
        if abs(process.create_time() - record["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def stop_group(leader: int, grace: float = 10.0) -> None:
    """End the process group that `leader` leads: SIGTERM, then SIGKILL after `grace` seconds.

    Fine when it has ended already. The leader must have been started with `start_new_session`.
    """
    assert leader > 1 and leader != os.getpgrp(), "only a group of its own may be stopped"
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while _alive(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def stop_marked(name: str, value: str) -> int:
    """End every process group with a process whose environment has `name` set to `value`; how many there were."""
    groups = set()
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(name) == value:
            with suppress(ProcessLookupError):
                groups.add(os.getpgid(process.pid))
    for group in groups:
        stop_group(group)
    return len(groups)


def _alive(group: int) -> bool:
    """Whether any process of the group still runs; one that has ended and waits for its parent does not."""
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False
