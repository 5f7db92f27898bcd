"""Many rounds in one process: memory, open files and seconds a round must not grow more than the growing data explain.

`python -m benchmarks.soak --rounds 100` trains a tiny network in each round, in which simulated labelers answer for
two pictures; it prints a line a round and writes docs/soak.md from what it saw. Interrupted, it writes what it has.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.drill import PROJECT, SETTINGS, write_pictures
from flows import services
from flows.ingest import init_workspace
from flows.versions import Git
from flows.workspace import Workspace, open_workspace

BUDGET = 2  # pictures a round
WARM = 5  # rounds in which everything is loaded
PART = 20  # rounds that are compared at either end


@dataclass(frozen=True)
class Look:
    """After a round. Of the loop's own process, and of all processes of the services: resident memory, open files."""

    round: int
    seconds: float
    loop_mib: float
    loop_files: int
    services_mib: float
    services_files: int
    disk_mib: float  # of the workspace without the services' databases and logs


def soak(place: Workspace, rounds: int) -> list[Look]:
    """Open, answer and collect `rounds` rounds; ends early when it is interrupted."""
    flows, looks = importlib.import_module("flows.rounds"), list[Look]()
    try:
        for number in range(1, rounds + 1):
            began = time.monotonic()
            opened = flows.open_round(str(place.root))
            flows.simulate_labelers(place)
            collected = flows.collect_round(str(place.root))
            assert opened.round == collected.round == number and collected.corrections == BUDGET, (opened, collected)
            looks.append(_look(place, number, time.monotonic() - began))
            print(looks[-1], flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    return looks


def _look(place: Workspace, number: int, seconds: float) -> Look:
    own, others = psutil.Process(), _processes(place)
    files = [path for path in place.root.rglob("*") if path.is_file() and ".abnloop" not in path.parts]
    return Look(
        number,
        seconds,
        own.memory_info().rss / 2**20,
        own.num_fds(),
        sum(process.memory_info().rss for process in others) / 2**20,
        sum(process.num_fds() for process in others),
        sum(path.stat().st_size for path in files) / 2**20,
    )


def _processes(place: Workspace) -> list[psutil.Process]:
    leaders = [psutil.Process(one.pid) for one in services.status(place) if one.pid]
    return [*leaders, *(below for leader in leaders for below in leader.children(recursive=True))]


def table(looks: Sequence[Look], commit: str) -> str:
    """docs/soak.md. The first rounds, in which everything is loaded, are left out of the comparison."""
    first, last = looks[WARM : WARM + PART], looks[-PART:]
    lines = [
        "# Many rounds in one process",
        "",
        f"Written by `python -m benchmarks.soak`: {len(looks)} rounds of {BUDGET} answers, commit {commit[:10]}.",
        f"Medians of rounds {first[0].round}-{first[-1].round} and {last[0].round}-{last[-1].round};",
        "what else a machine does lengthens rounds, so the shortest of them are told as well.",
        "",
        "| | then | at the end |",
        "| --- | --- | --- |",
    ]
    names = {
        "seconds": "seconds a round",
        "loop_mib": "memory of the loop, MiB",
        "loop_files": "files that the loop has open",
        "services_mib": "memory of the services, MiB",
        "services_files": "files that the services have open",
        "disk_mib": "workspace on disk, MiB",
    }
    for name, title in names.items():
        then, end = (statistics.median(getattr(look, name) for look in part) for part in (first, last))
        lines.append(f"| {title} | {then:.1f} | {end:.1f} |")
    then, end = (min(look.seconds for look in part) for part in (first, last))
    lines.append(f"| seconds of the shortest round | {then:.1f} | {end:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        counts = {"train": max(24, rounds * BUDGET + 8), "val": 8, "test": 8}
        index = write_pictures(folder / "source", counts)
        settings = {**SETTINGS, "selection.budget": BUDGET, "train.epochs": 1}
        init_workspace(PROJECT, folder / "soak", folder / "source", index=index, settings=settings)
        place = open_workspace(folder / "soak")
        try:
            services.up(place)
            services.connect(place)
            looks = soak(place, rounds)
        finally:
            services.disconnect()
            services.down(place)
    if len(looks) >= WARM + 2 * PART:
        (PROJECT / "docs" / "soak.md").write_text(table(looks, Git(PROJECT).head()))


if __name__ == "__main__":
    main()
