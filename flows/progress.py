"""Long work says how far it is; who listens decides how it is shown (a bar, a log, nothing)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# What is being done, how much is done, of how much, and what else there is to say, such as the epoch.
Listener = Callable[[str, int, int, str], None]

SILENCE = 10.0  # seconds between two lines about the same work, where there is no terminal
# The steps of opening a round in their order, by DVC's stage or the loop's own name.
STEPS = {
    "control": "train the baseline",
    "control_evaluate": "evaluate the baseline",
    "train": "train with the corrections",
    "predict": "predict every image",
    "evaluate": "compute the metrics",
    "select": "select the batch",
    "judge": "judge the model",
    "register": "register the model",
    "ask": "send the batch to Label Studio",
}

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within this block, `report` speaks to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(what: str, done: int, total: int, detail: str = "") -> None:
    """Tells who listens that `done` of `total` of `what` is done."""
    listener = _listener.get()
    if listener:
        listener(what, done, total, detail)


def report_step(name: str, done: int = 0, total: int = 1, doing: str = "", detail: str = "") -> None:
    """`report` of one of the STEPS, by its number; `doing` tells apart the parts of a step."""
    number = list(STEPS).index(name) + 1
    report(f"{number}/{len(STEPS)} {STEPS[name]}{doing and f': {doing}'}", done, total, detail)


class StageLines:
    """Reads what `dvc repro` prints, and reports the progress of its stages.

    A stage says `DOING: step DONE/TOTAL, DETAIL`, where DOING and DETAIL may be missing, or `predicted DONE/TOTAL`.
    """

    def __init__(self) -> None:
        self.stage = ""

    def __call__(self, line: str) -> bool:
        """Whether the line tells of nothing but progress, so that no log needs it."""
        if started := re.match(r"Running stage '(\w+)'", line):
            self.stage = started[1]
            self._report()
        if skipped := re.match(r"Stage '(\w+)' (?:didn't change|is cached)", line):
            self.stage = skipped[1]
            self._report(1, 1, "", "nothing changed")
        if line.startswith("nobody has said anything yet"):
            self._report(1, 1, "", "nothing to learn from yet, the baseline is this round's model")
        if counted := re.match(r"predicted (\d+)/(\d+)", line):
            self._report(int(counted[1]), int(counted[2]), "" if self.stage == "predict" else "predict every image")
        counted = re.match(r"(?:(.+): )?step (\d+)/(\d+)(?:, (.*))?$", line)
        if counted:
            self._report(int(counted[2]), int(counted[3]), counted[1] or "", counted[4] or "")
        return counted is not None

    def _report(self, done: int = 0, total: int = 1, doing: str = "", detail: str = "") -> None:
        if self.stage in STEPS:
            report_step(self.stage, done, total, doing, detail)


@contextmanager
def shown_on(console: Console) -> Iterator[Listener]:
    """A listener that shows what is reported: bars on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield Lines(lambda line: console.print(escape(line), soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, TextColumn("[dim]{task.fields[detail]}"), console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(what: str, done: int, total: int, detail: str = "") -> None:
            if what not in tasks:
                for task in bars.tasks:  # what comes next begins when the work before it has ended
                    bars.update(task.id, completed=task.total)
                tasks[what] = bars.add_task(escape(what), detail="")
            elif done < next(task.completed for task in bars.tasks if task.id == tasks[what]):
                bars.reset(tasks[what])  # the same work once more, such as another cycle of steps
            bars.update(tasks[what], completed=done, total=total, detail=escape(detail))

        yield on_progress


class Lines:
    """Progress for a log: a line when a step begins, every `SILENCE` seconds, and when some work has ended."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write, self.clock = write, clock
        self.begun: dict[str, float] = {}  # when work was first told of
        # When some of it was first done, and how much; making ready is not part of the pace.
        self.pace: dict[str, tuple[float, int]] = {}
        self.done: dict[str, tuple[int, int]] = {}  # how much of it is done, of how much
        self.told = -SILENCE

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None:
        before = self.done.get(what, (0, total))
        if done < before[0] or before[0] >= before[1]:  # the same work once more: another cycle of steps, a later round
            self.begun.pop(what, None)
            self.pace.pop(what, None)
        self.done[what] = (done, total)
        now, first, ended = self.clock(), what not in self.begun, done >= total
        began = self.begun.setdefault(what, now)
        since, start = self.pace.setdefault(what, (now, done)) if done else (now, done)
        if not ((first and total == 1) or ended or now - self.told >= SILENCE):
            return
        self.told = now
        words = [f"{what}, {done} of {total}" if total > 1 else what]
        if ended and not first and now - began >= 1:
            words.append(f"took {in_words(now - began)}")
        elif done > start and not ended:
            words.append(f"about {in_words((now - since) / (done - start) * (total - done))} left")
        self.write(", ".join([*words, *([detail] if detail else [])]))


def in_words(seconds: float) -> str:
    """A duration as people say it: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
