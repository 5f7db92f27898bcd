"""Keeps masks live: what the editor saves has lost the key that makes it ask the network about a stroke.

An annotation announces itself by a webhook. A draft does not, so a task that was painted is looked at a little later,
when the editor has saved (it waits for 5 seconds without a change).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from threading import Lock, Timer
from typing import Any

from labeling.client import LabelStudio
from labeling.tasks import is_mask

PAUSES = (7.0, 23.0, 90.0)  # seconds; more than once, because a verdict is saved without a stroke

logger = logging.getLogger(__name__)


class Liveness:
    """Writes the key back. `studio` gives the Label Studio to write to, at the time it is needed.

    It never answers its own writing: a result that has the key is left alone.
    """

    def __init__(self, studio: Callable[[], LabelStudio], pauses: Sequence[float] = PAUSES) -> None:
        self._studio, self._pauses = studio, pauses
        self._timers: dict[int, Timer] = {}
        self._lock = Lock()

    def on_hint(self, hint: Mapping[str, Any]) -> None:
        """Take the body of a webhook. What it says is not believed; Label Studio is asked for what is stored now."""
        match hint:
            case {"action": "ANNOTATION_CREATED" | "ANNOTATION_UPDATED", "annotation": {"id": int(annotation)}}:
                self._quietly(self._revive_annotation, annotation)

    def on_stroke(self, task: int) -> None:
        """Look at the drafts of `task` a little later; returns at once."""
        self._look_later(task, self._pauses)

    def stop(self) -> None:
        """Look no more."""
        with self._lock:
            for timer in self._timers.values():
                timer.cancel()
            self._timers.clear()

    def _look_later(self, task: int, pauses: Sequence[float]) -> None:
        with self._lock:
            if task in self._timers:
                self._timers.pop(task).cancel()
            if pauses:
                timer = Timer(pauses[0], self._look, [task, pauses[1:]])
                timer.daemon = True
                self._timers[task] = timer
                timer.start()

    def _look(self, task: int, pauses: Sequence[float]) -> None:
        self._quietly(self._revive_drafts, task)
        self._look_later(task, pauses)

    def _revive_annotation(self, annotation: int) -> None:
        studio = self._studio()
        if live := revived(studio.annotation_results(annotation)):
            studio.set_annotation_results(annotation, live)

    def _revive_drafts(self, task: int) -> None:
        studio = self._studio()
        for draft, results in studio.drafts(task).items():
            if live := revived(results):
                studio.set_draft_results(draft, live)

    def _quietly(self, work: Callable[[int], None], number: int) -> None:
        """A mask that is not live is a nuisance, no failure: the labeler can still paint and submit it."""
        try:
            work(number)
        except (ValueError, OSError) as error:
            logger.warning("a mask may not be live: %s", error)


def revived(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The results with every mask live; None where nothing has to change."""
    if all(result.get("dynamic") or not is_mask(result) for result in results):
        return None
    return [{**result, "dynamic": True} if is_mask(result) else dict(result) for result in results]
