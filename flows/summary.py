"""The rounds of a workspace at a glance, from their files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.versions import Git
from flows.workspace import Workspace, decision_of, read_json

SWAPPED = "accuracy_in_other_context"  # the metric of gold images shown on the background of others
COLOURS = {"promoted": "green", "refused": "red", "undecided": "yellow"}


def summarise(place: Workspace) -> list[dict[str, Any]]:
    """One mapping a round that has been judged, oldest first.

    Accuracies are 0..1, None where there was nothing to measure them on; `baseline_...` (and `control_...`) are of the
    same training without anything that people said. `corrections` counts what the round's model learned from; `gold`
    the masks of val and test that were known when it was judged. `verdict` is promoted, refused or undecided, `reason`
    the gate's; `champion` says whether the round's model is the champion now.
    """
    tags = set(Git(place.root).tags("round/*"))
    champion = read_json(place.champion_record)
    rounds = []
    for round_ in place.rounds():
        state = round_.read()
        if "promoted" not in state:
            continue
        test, val, baseline = state["metrics"], state.get("validation", {}), state["control"]
        gold = state.get("gold") or {"val": val.get("gold_samples", 0), "test": test.get("gold_samples", 0)}
        end = state.get("closed") or state.get("opened")
        rounds.append(
            {
                "round": round_.number,
                "state": state["state"],
                "corrections": state["corrections"],
                "gold": gold["val"] + gold["test"],
                "gold_val": gold["val"],
                "gold_test": gold["test"],
                "val_accuracy": val.get("accuracy"),
                "val_balanced_accuracy": val.get("balanced_accuracy"),
                "val_accuracy_swapped": val.get(SWAPPED),
                "test_accuracy": test["accuracy"],
                "test_balanced_accuracy": test["balanced_accuracy"],
                "test_accuracy_swapped": test.get(SWAPPED),
                "baseline_accuracy": baseline["accuracy"],
                "baseline_balanced_accuracy": baseline["balanced_accuracy"],
                "baseline_accuracy_swapped": baseline.get(SWAPPED),
                "control_accuracy": baseline["accuracy"],
                "control_balanced_accuracy": baseline["balanced_accuracy"],
                "attention_inside_mask": test.get("attention_inside_mask"),
                "context_reliance": test.get("context_reliance"),
                "verdict": decision_of(state),
                "reason": state["gate"],
                "champion": champion.get("round") == round_.number,
                "promoted": state["promoted"],
                "gate": state["gate"],
                "model_version": state["model_version"],
                "mlflow_run_id": state["mlflow_runs"]["round"],
                "git_commit": Git(place.root).commit_of(round_.tag) if round_.tag in tags else "",
                "collected": state.get("collected", 0),
                "set_aside": len(state.get("set_aside", [])),
                "stopped": state.get("stopped", ""),
                "minutes": state.get("minutes", 0.0),
                "seconds": _seconds(state["begun"], end) if end else None,
            }
        )
    return rounds


def summary_table(rounds: Sequence[Mapping[str, Any]], title: str) -> Group:
    """The rounds as people read them, in 80 columns: a table, and below it why each was promoted or not."""
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    test = ("test\n(baseline)", "balanced\n(baseline)", "swapped\n(baseline)")
    for name in ("round", "correc-\ntions", "gold", "val", *test):
        table.add_column(name, justify="right")
    table.add_column("verdict", no_wrap=True)
    for one in rounds:
        table.add_row(
            str(one["round"]),
            str(one["corrections"]),
            str(one["gold"]),
            shown(one["val_accuracy"]),
            *(
                f"{shown(one[f'test_{name}'])} ({shown(one[f'baseline_{name}'])})"
                for name in ("accuracy", "balanced_accuracy", "accuracy_swapped")
            ),
            Text(one["verdict"], COLOURS[one["verdict"]]),
        )
    if not rounds:
        return Group(table, Text("no round has been judged yet; `abnloop round open` trains the first model"))
    lines = [Text("val, test: accuracy; balanced, swapped: of test, the latter with the background swapped")]
    for one in rounds:
        champion = ", the champion" if one["champion"] else ""
        lines.append(Text.assemble((f"round {one['round']} ", "bold"), f"v{one['model_version']}{champion}: "))
        lines[-1].append(f"{one['verdict']}, {one['reason']}")
        if one["stopped"]:
            lines[-1].append(f"; asked nobody: {one['stopped']}")
    return Group(table, *lines)


def shown(value: float | None) -> str:
    """A number from 0 to 1 in three digits; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
