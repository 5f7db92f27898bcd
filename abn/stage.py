"""What the command lines of the stages share: where results go, and whether corrections count."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from abn.data import Sample, read_manifest


class Stage(NamedTuple):
    """A stage runs in the root of a workspace. The control is the same stage without anything that people said."""

    results: Path
    control: bool

    def samples(self) -> list[Sample]:
        return read_manifest(Path(), corrected=not self.control)


def parse_stage(description: str) -> Stage:
    parser = argparse.ArgumentParser(description=f"{description} Runs in the root of a workspace.")
    parser.add_argument(
        "--control", action="store_true", help="ignore every correction; results go to results/control/"
    )
    control = parser.parse_args().control
    return Stage(Path("results/control" if control else "results"), control)
