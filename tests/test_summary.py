"""The rounds at a glance: what `abnloop round status` shows, and gives to programs."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from flows.summary import summarise, summary_table
from flows.workspace import Workspace
from rounds_on_file import judged
from test_commands import Run, abnloop  # noqa: F401 - a fixture
from tiny import make_workspace

WAITS = (
    "undecided: on val as it is 1.000 -> 0.980, with swapped background 0.200 -> 0.600 on 5 gold masks (p = 0.25); "
    "8 more gold masks are needed"
)


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    root = make_workspace(tmp_path / "leaves")
    (root / ".gitignore").write_text("/data/images/\n*.npz\n*.pt\n/.abnloop/\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return Workspace(root)


def text(place: Workspace, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_table(summarise(place), "rounds of leaves"))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_program_gets_every_judged_round(abnloop: Run, place: Workspace) -> None:  # noqa: F811
    swapped = {"accuracy": 0.8, "balanced_accuracy": 0.7, "accuracy_in_other_context": 0.75}
    judged(place, 1)
    judged(place, 2, "undecided", WAITS, metrics=swapped)
    place.round(3).write({"round": 3, "state": "begun"})
    code, out, _ = abnloop("round", "status", "--json", "--workspace", str(place.root))
    first, second = json.loads(out)
    assert code == 0
    asked = ("round", "state", "corrections", "gold", "test_accuracy", "baseline_accuracy", "verdict", "reason")
    assert [first[name] for name in asked] == [1, "closed", 0, 9, 0.6, 0.6, "promoted", "the first model"]
    assert [second[name] for name in asked] == [2, "closed", 10, 9, 0.8, 0.6, "undecided", WAITS]
    assert (first["champion"], second["champion"]) == (True, False)
    assert (first["test_accuracy_swapped"], second["test_accuracy_swapped"]) == (None, 0.75)
    assert (second["gold_val"], second["gold_test"], second["val_accuracy"]) == (6, 3, 0.9)


def test_without_a_round_a_program_gets_an_empty_list(abnloop: Run, place: Workspace) -> None:  # noqa: F811
    code, out, _ = abnloop("round", "status", "--json", "--workspace", str(place.root))
    assert (code, json.loads(out)) == (0, [])
    assert "no round has been judged yet; `abnloop round open`" in "\n".join(text(place, 80))


def test_a_round_of_before_there_was_gold_is_told_by_what_it_has(place: Workspace) -> None:
    metrics = {"accuracy": 0.7, "balanced_accuracy": 0.6, "gold_samples": 4}
    judged(place, 1, "refused", "accuracy 0.9 -> 0.7", metrics=metrics)
    state = place.round(1).read()
    place.round(1).write({name: value for name, value in state.items() if name not in ("decision", "gold")})
    (only,) = summarise(place)
    assert (only["verdict"], only["gold"], only["gold_test"], only["champion"]) == ("refused", 4, 4, False)


@pytest.mark.parametrize("width", [80, 100])
def test_a_round_is_one_line_of_numbers_and_says_why(place: Workspace, width: int) -> None:
    numbers = {"accuracy": 0.977, "balanced_accuracy": 0.97, "accuracy_in_other_context": 0.95}
    for number in (1, 2):
        judged(place, number, "promoted", metrics=numbers, control=numbers, corrections=100 * number)
    judged(place, 3, "undecided", WAITS, metrics=numbers, control=numbers)
    lines = text(place, width)
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if line.endswith("undecided"))
    assert row.split() == [
        "3",
        "20",
        "9",
        "0.900",
        "0.977",
        "(0.977)",
        "0.970",
        "(0.970)",
        "0.950",
        "(0.950)",
        "undecided",
    ]
    said = " ".join(" ".join(lines).split())
    assert f"round 3 v3: undecided, {WAITS}" in said
    assert "round 2 v2, the champion: promoted, the first model" in said


def test_why_nobody_was_asked_is_told(place: Workspace) -> None:
    judged(place, 1, stopped="labelers spent 2.0 minutes")
    assert "asked nobody: labelers spent 2.0 minutes" in " ".join(text(place, 200))
