"""Webhooks of Label Studio become events of Prefect, few of them, and none is needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI

from flows.hints import EVENT, Hints
from flows.workspace import Workspace, write_json

QUIET = 0.3  # seconds


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace whose services all seem to run, as this process; Prefect is at an address where nobody listens."""
    place = Workspace(tmp_path / "leaves")
    place.root.mkdir()
    place.params.write_text("labeling: {url: embedded}\n")
    me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "url": "http://127.0.0.1:9"}
    write_json(place.services, dict.fromkeys(("label_studio", "prefect", "mlflow", "live"), me))
    return place


@pytest.fixture
def events(place: Workspace, serve: Callable[[FastAPI], str]) -> list[dict[str, Any]]:
    """What a server in Prefect's place receives."""
    received: list[dict[str, Any]] = []
    app = FastAPI()

    @app.post("/api/events", status_code=204)
    def events(body: list[dict[str, Any]]) -> None:
        received.extend(body)

    me = {"pid": os.getpid(), "started": psutil.Process().create_time(), "url": serve(app)}
    write_json(place.services, dict.fromkeys(("label_studio", "prefect", "mlflow", "live"), me))
    return received


def wait_for(found: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not found() and time.monotonic() < deadline:
        time.sleep(0.02)
    return found()


def test_a_burst_of_webhooks_is_one_event_after_the_quiet_time(place: Workspace, events: list[dict[str, Any]]) -> None:
    hint = Hints(place, QUIET)
    for action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED") * 5:
        hint({"action": action})
    assert events == [], "a collect that starts at once would miss the later ones"
    assert wait_for(lambda: bool(events))
    (event,) = events
    assert (event["event"], event["resource"]) == (EVENT, {"prefect.resource.id": "abnloop.workspace.leaves"})


def test_a_webhook_after_the_event_makes_another(place: Workspace, events: list[dict[str, Any]]) -> None:
    hint = Hints(place, QUIET)
    for number in (1, 2):
        hint({"action": "ANNOTATION_CREATED"})
        assert wait_for(lambda wanted=number: len(events) == wanted)  # type: ignore[misc]
    assert len({event["id"] for event in events}) == 2


def test_what_is_no_annotation_is_no_hint(place: Workspace, events: list[dict[str, Any]]) -> None:
    hint = Hints(place, 0)
    hint({"action": "TASKS_CREATED"})
    hint({})
    hint({"action": "ANNOTATION_CREATED"})
    assert wait_for(lambda: bool(events)) and len(events) == 1


def test_without_prefect_a_hint_is_lost_and_said_so(place: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    hint = Hints(place, 0)
    hint({"action": "ANNOTATION_CREATED"})
    assert wait_for(lambda: "Prefect does not take the hint to collect, the schedule will" in caplog.text)
    place.services.unlink()  # not even known where it would be
    caplog.clear()
    hint({"action": "ANNOTATION_CREATED"})
    assert wait_for(lambda: "is down; start it with" in caplog.text)
