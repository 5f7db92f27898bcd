"""The rounds of a workspace at a glance, from their files alone."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich import box
from rich.table import Table

from flows.versions import Git
from flows.workspace import Workspace, decision_of


def summarise(place: Workspace) -> list[dict[str, Any]]:
    """One mapping a round that has been judged. Accuracies are those of the test set; `control_accuracy` is of the
    same training without anything that people said, `corrections` counts what the round's model learned from."""
    tags = set(Git(place.root).tags("round/*"))
    rounds = []
    for round_ in place.rounds():
        state = round_.read()
        if "promoted" not in state:
            continue
        metrics, control = state["metrics"], state["control"]
        end = state.get("closed") or state.get("opened")
        rounds.append(
            {
                "round": round_.number,
                "state": state["state"],
                "corrections": state["corrections"],
                "test_accuracy": metrics["accuracy"],
                "control_accuracy": control["accuracy"],
                "test_balanced_accuracy": metrics["balanced_accuracy"],
                "control_balanced_accuracy": control["balanced_accuracy"],
                "attention_inside_mask": metrics.get("attention_inside_mask"),
                "context_reliance": metrics.get("context_reliance"),
                "promoted": state["promoted"],
                "verdict": decision_of(state),
                "gold": sum(state.get("gold", {}).values()),
                "gate": state["gate"],
                "model_version": state["model_version"],
                "mlflow_run_id": state["mlflow_runs"]["round"],
                "git_commit": Git(place.root).commit_of(round_.tag) if round_.tag in tags else "",
                "collected": state.get("collected", 0),
                "set_aside": len(state.get("set_aside", [])),
                "minutes": state.get("minutes", 0.0),
                "seconds": _seconds(state["begun"], end) if end else None,
            }
        )
    return rounds


def summary_table(rounds: list[dict[str, Any]], title: str) -> Table:
    """The rounds as people read them, in 80 columns."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("round", "correc-\ntions", "test accuracy\n(control)", "balanced\n(control)"):
        table.add_column(name, justify="right")
    for name in ("attention\nin mask", "context\nreliance", "model"):
        table.add_column(name, justify="right")
    for one in rounds:
        table.add_row(
            str(one["round"]),
            str(one["corrections"]),
            f"{one['test_accuracy']:.3f} ({one['control_accuracy']:.3f})",
            f"{one['test_balanced_accuracy']:.3f} ({one['control_balanced_accuracy']:.3f})",
            _share(one["attention_inside_mask"]),
            _share(one["context_reliance"]),
            f"v{one['model_version']}" + ("" if one["promoted"] else f" {one['verdict']}"),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
