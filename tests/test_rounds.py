"""The steps of a round one by one, on the history that test_lineage.py writes by hand: no service, no DVC."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from abn.manifest import WITHDRAWAL_COLUMNS
from flows import rounds
from flows.growing import ingest
from flows.ingest import change_settings
from flows.reconcile import reconcile
from flows.versions import Dvc, Git
from flows.withdrawals import withdraw
from flows.workspace import Workspace, write_table
from test_lineage import ANNA, BEN, history, place  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is called outside a flow logs as anything else does."""
    monkeypatch.setattr(rounds, "get_run_logger", lambda: logging.getLogger(__name__))


@pytest.mark.parametrize("command", ["round open", "round collect", "round reconcile", "ingest", "withdraw"])
def test_while_an_old_round_is_checked_out_nothing_is_written(place: Workspace, command: str) -> None:  # noqa: F811
    git = Git(place.root)
    git.tag("round/0001")
    git.checkout("round/0001")
    do: dict[str, Callable[[], object]] = {
        "round open": lambda: rounds.open_round.fn(str(place.root)),
        "round collect": lambda: rounds.collect_round.fn(str(place.root)),
        "round reconcile": lambda: reconcile(place, fix=True),
        "ingest": lambda: ingest(place),
        "withdraw": lambda: withdraw(place, {"labeler": ANNA}, "test"),
    }
    with pytest.raises(ValueError, match="an old round is checked out; `git checkout main && dvc checkout` first$"):
        do[command]()
    assert git.is_clean() and git.head() == git.commit_of("round/0001") and not place.state.exists()


@pytest.mark.parametrize("withdrawn", [False, True])
def test_what_a_training_starts_from_is_not_written_through_a_link(
    place: Workspace,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    withdrawn: bool,
) -> None:
    """DVC may link models/start.pt to the object in its cache, which is the start of an earlier round."""
    monkeypatch.setattr(Dvc, "add", lambda self, paths: [])
    write_table(place.withdrawals, WITHDRAWAL_COLUMNS, [])
    change_settings(place.params, {"train.start": "champion"})
    place.champion.write_text("the champion")
    cached = tmp_path / "cached"
    cached.write_text("an earlier start")
    place.start_model.unlink()
    place.start_model.hardlink_to(cached)
    if withdrawn:
        withdraw(place, {"labeler": BEN}, "test")
    rounds.begin.fn(place)
    assert place.start_model.read_text() == ("" if withdrawn else "the champion")
    assert cached.read_text() == "an earlier start"
