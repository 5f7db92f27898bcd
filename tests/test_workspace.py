from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.workspace import (
    InUse,
    Workspace,
    copy_atomically,
    open_workspace,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
)

HOLDER = """
import sys, time
from flows.workspace import Workspace
with Workspace(sys.argv[1]).lock("round open"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_holder_is_told_who_holds_the_workspace(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(InUse) as error, Workspace(tmp_path).lock("round collect"):
        pass
    message = str(error.value)
    assert "round open" in message and f"pid {holder.pid}" in message and "since" in message and "\n" not in message


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Workspace(tmp_path).lock("withdraw") as left_behind:
        assert "round open" in left_behind
    with Workspace(tmp_path).lock("round collect", frees=True) as left_behind:
        assert "round open" in left_behind and f"pid {holder.pid}" in left_behind, "who frees nothing tells the next"
        assert "round collect" in (Workspace(tmp_path).state / "lock").read_text()
    assert (Workspace(tmp_path).state / "lock").read_text() == ""


def test_a_released_lock_can_be_taken_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for command in ("up", "down"):
        with workspace.lock(command) as left_behind:
            assert left_behind == "", "who ended by itself leaves nothing behind"
            assert command in (workspace.state / "lock").read_text()
    assert (workspace.state / "lock").read_text() == ""


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "round.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["round.json"]


@pytest.mark.parametrize("kind", ["hard link", "link"])
def test_a_copy_takes_the_place_of_a_link_and_leaves_what_was_behind_it(tmp_path: Path, kind: str) -> None:
    cached, champion, challenger = (tmp_path / name for name in ("cached", "champion.pt", "model.pt"))
    cached.write_text("the champion before")
    champion.hardlink_to(cached) if kind == "hard link" else champion.symlink_to(cached)
    challenger.write_text("the challenger")
    copy_atomically(challenger, champion)
    assert champion.read_text() == "the challenger" and not champion.is_symlink()
    assert cached.read_text() == "the champion before"


def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "secrets.json", {"password": "x"}, mode=0o600)
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_json_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "round.json").write_text("{")
    with pytest.raises(ValueError, match=r"round\.json is not valid JSON"):
        read_json(tmp_path / "round.json")


def test_a_line_of_json_may_hold_whatever_else_ends_a_line_of_text(tmp_path: Path) -> None:
    lines = [{"text": "one\u2028two\u0085three\x0bfour\r\nfive"}, {"text": "六"}]
    path = tmp_path / "annotations.jsonl"
    write_atomically(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines))
    assert read_json_lines(path) == lines
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_rounds_come_in_order_and_other_folders_do_not_count(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.rounds() == [] and workspace.latest() is None
    for name in ("0010", "0002", "notes"):
        (tmp_path / "rounds" / name).mkdir(parents=True)
    assert [one.number for one in workspace.rounds()] == [2, 10]
    latest = workspace.latest()
    assert latest is not None and latest.tag == "round/0010"


def test_a_round_reads_what_it_wrote(tmp_path: Path) -> None:
    first = Workspace(tmp_path).round(1)
    assert first.read() == {}
    first.write({"state": "open", "名前": "ラウンド"})
    assert first.read() == {"state": "open", "名前": "ラウンド"}


def test_a_folder_without_a_manifest_is_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a workspace.*abnloop init"):
        open_workspace(tmp_path)
