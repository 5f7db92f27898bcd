"""Where a stage of dvc.yaml reads and writes, and how it says how far it is. Stages run in the root of a workspace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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

PAUSE = 1.0  # seconds between two lines about the same work

_print: ContextVar[Callable[[str, int, int, str], None] | None] = ContextVar("_print", default=None)


def progress(doing: str, done: int, total: int, detail: str = "") -> None:
    """Says how many steps of some work of this stage are `done`. Nothing is said outside of `printed_progress`."""
    if say := _print.get():
        say(doing, done, total, detail)


@contextmanager
def printed_progress() -> Iterator[None]:
    """Within this block `progress` prints `DOING: step DONE/TOTAL, DETAIL`: the first and the last step of some work,
    and of others one now and then. An empty DOING or DETAIL is left out."""
    told: dict[str, float] = {}

    def say(doing: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if doing not in told or done >= total or now - told[doing] >= PAUSE:
            told[doing] = now
            print(f"{doing and f'{doing}: '}step {done}/{total}{detail and f', {detail}'}", flush=True)

    token = _print.set(say)
    try:
        yield
    finally:
        _print.reset(token)
