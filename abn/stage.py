"""Where a stage of dvc.yaml reads and writes. Stages run in the root of a workspace."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from abn.manifest import Sample, read_manifest


class Stage(NamedTuple):
    """The folder of the results, and whether what people said counts."""

    results: Path
    corrected: bool

    def samples(self, gold: bool = True) -> list[Sample]:
        """`gold=False`: without what labelers said of evaluation samples, on which training must not depend."""
        return read_manifest(Path(), corrected=self.corrected, gold=gold)


ROUND = Stage(Path("results"), corrected=True)
CONTROL = Stage(Path("results/control"), corrected=False)
