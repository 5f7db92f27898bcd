from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows.processes import stop_marked
from flows.versions import HOLDER, Dvc, Git, holder_mark

STAGE = """stages:
  copy:
    cmd: {command}
    deps: [source.txt]
    outs: [made.txt]
"""


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """A repository with one commit."""
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(tmp_path)], check=True)
    (tmp_path / "first.txt").write_text("1")
    git = Git(tmp_path)
    git.commit(["first.txt"], "First")
    return git


@pytest.fixture(scope="module")
def dvc_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DVC repository whose source.txt is committed, made once: each command of DVC takes a second or more."""
    root = tmp_path_factory.mktemp("template")
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True)
    dvc = Dvc(root)
    dvc.init()
    (root / "source.txt").write_text("source")
    Git(root).commit([".dvc", ".dvcignore", *dvc.add(["source.txt"])], "Data")
    return root


@pytest.fixture
def dvc(dvc_template: Path, tmp_path: Path) -> Dvc:
    """A copy of the template."""
    return Dvc(shutil.copytree(dvc_template, tmp_path / "dvc"), patience=30)


def test_a_commit_takes_its_paths_and_nothing_else_that_is_staged(git: Git) -> None:
    for name in ("mine.txt", "staged.txt"):
        (git.root / name).write_text(name)
    subprocess.run(["git", "add", "staged.txt"], cwd=git.root, check=True)
    git.commit(["mine.txt"], "Mine")
    assert git.changed_paths() == ["staged.txt"]


def test_a_commit_of_nothing_new_makes_none(git: Git) -> None:
    assert git.commit(["first.txt"], "Again") == git.head()
    assert len(git._run("rev-list", "HEAD").split()) == 1


def test_a_file_is_known_by_the_commit_that_brought_it(git: Git) -> None:
    first = git.head()
    (git.root / "first.txt").write_text("2")
    git.commit(["first.txt"], "Changed")
    assert (git.first_with("first.txt"), git.first_with("absent.txt")) == (first, "")


def test_a_deleted_path_is_committed_as_deleted(git: Git) -> None:
    (git.root / "first.txt").unlink()
    git.commit(["first.txt"], "Gone")
    assert git.is_clean()


def test_changed_paths_are_whole_whatever_their_names(git: Git) -> None:
    (git.root / "写 真.txt").write_text("x")
    subprocess.run(["git", "mv", "first.txt", "moved.txt"], cwd=git.root, check=True)
    assert git.changed_paths() == ["first.txt", "moved.txt", "写 真.txt"]


@pytest.mark.parametrize("named", [True, False])
def test_an_author_is_made_up_only_where_none_is_configured(
    git: Git, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    home = tmp_path_factory.mktemp("home")
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    if named:
        (home / ".gitconfig").write_text("[user]\nname = Ada\nemail = ada@example.com\n[commit]\ngpgsign = true\n")
    (git.root / "b.txt").write_text("b")
    git.commit(["b.txt"], "B")
    author = git._run("log", "-1", "--format=%an <%ae>").strip()
    assert author == ("Ada <ada@example.com>" if named else "abnloop <abnloop@localhost>")
    assert not named or not (home / ".config").exists()


def test_a_tag_is_given_once_and_never_moved(git: Git) -> None:
    git.tag("round/0001")
    git.tag("round/0001")
    (git.root / "b.txt").write_text("b")
    git.commit(["b.txt"], "B")
    with pytest.raises(ValueError, match="tag round/0001 already names commit"):
        git.tag("round/0001")
    assert git.tags("round/*") == ["round/0001"]


def test_a_clone_leaves_the_tags_of_its_origin(git: Git, tmp_path_factory: pytest.TempPathFactory) -> None:
    git.tag("round/0001")
    clone = Git.clone(git.root, tmp_path_factory.mktemp("clone") / "here")
    assert clone.head() == git.head() and clone.tags() == []
    assert clone._run("remote", "get-url", "origin").strip() == str(git.root)


def test_a_clone_of_what_has_no_branch_checked_out_has_one(git: Git, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert not git.is_detached()
    git.checkout(git.head())
    assert git.is_detached()
    assert not Git.clone(git.root, tmp_path_factory.mktemp("clone") / "here").is_detached()


def test_git_fails_in_one_line_with_its_reason(git: Git) -> None:
    with pytest.raises(ValueError, match="git checkout failed in .*nowhere") as error:
        git.checkout("nowhere")
    assert "\n" not in str(error.value)


def test_a_commit_waits_for_another_git_command(git: Git) -> None:
    lock = git.root / ".git" / "index.lock"
    lock.touch()
    threading.Timer(0.8, lock.unlink).start()
    (git.root / "b.txt").write_text("b")
    git.commit(["b.txt"], "B")
    assert git.is_clean()


def test_the_lock_of_a_git_that_was_killed_goes_and_that_of_a_living_one_stays(git: Git) -> None:
    lock = git.root / ".git" / "index.lock"
    lock.touch()
    git.free_index()
    assert lock.exists()
    for away in (-3600, 3600):  # a clock that was set back since dates it into the future
        lock.touch()
        os.utime(lock, (time.time() + away, time.time() + away))
        git.free_index()
        assert not lock.exists()


def test_a_stage_runs_and_its_lines_arrive_one_by_one(dvc: Dvc) -> None:
    command = (
        """python -c "import time; print('one'); time.sleep(1.5); print('two'); open('made.txt', 'w').write('m')\""""
    )
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command=repr(command).replace("\\'", "''")))
    arrived: dict[str, float] = {}
    dvc.repro(lambda line: arrived.update({line: time.monotonic()}))
    assert arrived["two"] - arrived["one"] > 1
    assert (dvc.root / "made.txt").read_text() == "m"


def test_a_stage_is_current_until_what_it_stands_on_changes(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="cp source.txt made.txt"))
    assert not dvc.is_current("copy")
    dvc.repro(lambda line: None)
    assert dvc.is_current("copy")
    (dvc.root / "source.txt").write_text("another")
    assert not dvc.is_current("copy")


def test_a_failing_stage_is_named_with_its_last_word(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="echo budget is 500 && exit 2"))
    with pytest.raises(ValueError, match="^stage copy failed: budget is 500$"):
        dvc.repro(lambda line: None)


def test_an_interrupted_stage_leaves_no_process(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="echo started $$; exec sleep 987"))
    started: list[int] = []

    def interrupt(line: str) -> None:
        if line.startswith("started"):
            started.append(int(line.split()[1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc.repro(interrupt)
    assert not psutil.pid_exists(started[0]) or psutil.Process(started[0]).status() == psutil.STATUS_ZOMBIE


REPRO = "import sys; from flows.versions import Dvc; Dvc(sys.argv[1]).repro(lambda line: print(line, flush=True))"


def test_what_a_killed_process_left_running_can_be_found_and_ended(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="echo started $$; exec sleep 987"))
    with subprocess.Popen([sys.executable, "-c", REPRO, str(dvc.root)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        stage = psutil.Process(next(int(line.split()[1]) for line in holder.stdout if line.startswith("started")))
        holder.kill()
    assert stage.is_running(), "it does not know that nobody listens"
    assert stop_marked(HOLDER, holder_mark(os.getpid(), dvc.root)) == 0
    assert stop_marked(HOLDER, holder_mark(holder.pid, dvc.root)) == 1
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE


def test_data_missing_from_the_cache_is_named_with_the_remedy(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="cp source.txt made.txt"))
    (dvc.root / "source.txt").unlink()
    for cached in (dvc.root / ".dvc" / "cache").rglob("*"):
        if cached.is_file():
            cached.chmod(0o600)
            cached.unlink()
    with pytest.raises(ValueError, match=r"the DVC cache lacks source\.txt; .*dvc pull"):
        dvc.checkout()
    with pytest.raises(ValueError, match=r"the DVC cache lacks source\.txt; .*dvc pull"):
        dvc.repro(lambda line: None)
    assert dvc.missing() == ["source.txt"]


def test_checkout_restores_and_leaves_stages_that_never_ran(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="cp source.txt made.txt"))
    (dvc.root / "source.txt").unlink()
    dvc.checkout()
    assert (dvc.root / "source.txt").read_text() == "source"
    assert not (dvc.root / "made.txt").exists() and dvc.missing() == []


def test_dvc_waits_for_another_dvc_command(dvc: Dvc) -> None:
    (dvc.root / "dvc.yaml").write_text(STAGE.format(command="echo running; sleep 4; cp source.txt made.txt"))
    running = threading.Event()
    other = threading.Thread(target=dvc.repro, args=(lambda line: running.set() if line == "running" else None,))
    other.start()
    assert running.wait(20)
    with pytest.raises(ValueError, match="waited 0 s in vain.*is busy"):
        Dvc(dvc.root, patience=0).add(["source.txt"])
    dvc.add(["source.txt"])
    other.join()
    assert (dvc.root / "made.txt").exists()


def test_push_reaches_the_remote_where_there_is_one(dvc: Dvc, tmp_path_factory: pytest.TempPathFactory) -> None:
    dvc.push()
    remote = tmp_path_factory.mktemp("remote")
    with (dvc.root / ".dvc" / "config").open("a") as config:
        config.write(f"    remote = here\n['remote \"here\"']\n    url = {remote}\n")
    dvc.push()
    assert any(path.is_file() for path in remote.rglob("*"))


def test_a_push_to_a_remote_that_hangs_is_ended(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.versions.PUSH_LIMIT", 5.0)
    with socket.create_server(("127.0.0.1", 0)) as silent, (dvc.root / ".dvc" / "config").open("a") as config:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config.write(f"    remote = here\n['remote \"here\"']\n    url = {url}\n")
        config.flush()
        with pytest.raises(ValueError, match="^dvc push did not end within 5 s$"):
            dvc.push()
    assert stop_marked(HOLDER, holder_mark(os.getpid(), dvc.root)) == 0, "no process of it is left"
