"""Rounds as their files tell of them, for tests that need no service and no training."""

from __future__ import annotations

from typing import Any

from flows.versions import Git
from flows.workspace import Workspace, write_json


def judged(
    place: Workspace, number: int, decision: str = "promoted", reason: str = "the first model", **changes: Any
) -> None:
    """round.json of a round that has been judged, closed and tagged, with `changes`; the champion where promoted."""
    test = {"samples": 40, "accuracy": 0.5 + number / 10, "balanced_accuracy": 0.45 + number / 10}
    state: dict[str, Any] = {
        "round": number,
        "state": "closed",
        "begun": "2026-03-01T10:00:00+00:00",
        "closed": "2026-03-01T11:00:00+00:00",
        "corrections": 10 * (number - 1),
        "metrics": test,
        "validation": {"accuracy": 0.9, "balanced_accuracy": 0.8},
        "control": {"accuracy": 0.6, "balanced_accuracy": 0.55},
        "decision": decision,
        "promoted": decision == "promoted",
        "gate": reason,
        "gold": {"val": 6, "test": 3},
        "model_version": str(number),
        "mlflow_runs": {"round": f"{number:032x}"},
    }
    state |= changes
    place.round(number).write(state)
    if state["promoted"]:
        write_json(place.champion_record, {"round": number, "model_version": str(number)})
    git = Git(place.root)
    git.commit(["."], f"[round {number}] Learn")
    if state["state"] == "closed":
        git.tag(place.round(number).tag)
