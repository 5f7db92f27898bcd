"""Corrections leave the training set, and may come back; nothing is erased."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from abn.manifest import WITHDRAWAL_COLUMNS, read_corrections, read_gold, read_withdrawn
from flows.lineage import about, models_that_learned, statements
from flows.versions import Git, refuse_old_round
from flows.workspace import Workspace, read_table, write_table


class Withdrawn(NamedTuple):
    annotations: list[dict[str, Any]]  # as `flows.lineage.statements` gives them
    models: list[dict[str, Any]]  # that learned from them, as `models_that_learned` tells


def withdraw(place: Workspace, question: Mapping[str, str], why: str, undo: bool = False) -> Withdrawn:
    """Take annotations out of the training set from now on, or with `undo` let them in again.

    `question` maps one of labeler (e-mail), round (that collected them) and annotation (id) to its value. Each gets a
    line in data/withdrawals.csv, committed; data/corrections.csv keeps them, and rounds that learned from them stay as
    they are. Their samples can be asked about again. Raises ValueError where nothing fits, while a round is being
    opened, or while an old one is checked out.
    """
    ((what, value),) = question.items()
    if not why.strip():
        raise ValueError("--why is empty; say in a sentence why, for those who ask later")
    refuse_old_round(place.root)
    with place.lock("withdraw"):
        latest = place.latest()
        if latest and latest.is_opening:
            raise ValueError(f"opening round {latest.number} was interrupted; finish it with `abnloop round open`")
        out, known = read_withdrawn(place.root), read_corrections(place.root, withdrawn=True)
        given = statements(place, [*known.values(), *read_gold(place.root, withdrawn=True).values()])
        chosen = [one for one in about(given, question) if ((str(one["id"]), one["sample"]) in out) == undo]
        if not chosen:
            raise ValueError(f"no annotation {'was withdrawn' if undo else 'counts'} of {what} {value}")
        said = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "action": "restore" if undo else "withdraw",
            "why": " ".join(why.split()),
        }
        lines = [
            {**said, "annotation": str(one["id"]), **{name: str(one[name]) for name in ("sample", "labeler", "round")}}
            for one in chosen
        ]
        write_table(place.withdrawals, WITHDRAWAL_COLUMNS, [*read_table(place.withdrawals), *lines])
        verb = "Restore" if undo else "Withdraw"
        message = f"[data] {verb} {len(chosen)} annotations of {what} {value}\n\n{said['why']}"
        Git(place.root).commit([place.relative(place.withdrawals)], message)
        return Withdrawn(chosen, models_that_learned(place, question))
