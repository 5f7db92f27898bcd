"""The versions of a workspace: git for code, parameters and small tables, DVC for pictures, masks and models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tenacity
import yaml

from flows.processes import stop_group

# Seconds that a push may take: one to a remote that hangs would hold the workspace for good. The next goes on with what
# is missing.
PUSH_LIMIT = 600.0
HOLDER = "ABNLOOP_HOLDER"  # in the environment of what this process starts: its own number, and where it works


class _Busy(Exception):
    """Another process holds the lock that the command needs."""


class Git:
    """The git repository at `root`, which must be its top folder. Failures of git are ValueErrors in one line."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def clone(cls, source: str | Path, directory: str | Path) -> Git:
        """Clone the branch that `source` has checked out; `source` becomes the remote `origin`.

        Tags stay behind, now and on every later pull: `round/0001` means a round of this workspace.
        Where `source` has no branch checked out, as in many a CI, the clone gets a branch `main`.
        """
        _git(Path.cwd(), "clone", "--quiet", "--no-tags", "--", str(source), str(directory))
        clone = cls(directory)
        if clone.is_detached():
            clone._run("checkout", "--quiet", "-b", "main")
        return clone

    def head(self) -> str:
        """The commit that is checked out, 40 hexadecimal digits."""
        return self.commit_of("HEAD")

    def is_detached(self) -> bool:
        """Whether a tag or a commit is checked out, and no branch: a commit made now would be on none."""
        return not self._run("branch", "--show-current").strip()

    def changed_paths(self) -> list[str]:
        """Paths, relative to the root, that differ from HEAD or are new and not ignored; sorted.

        Another repository inside this one, such as a workspace, does not count.
        """
        entries = iter(self._run("status", "--porcelain", "-z", "--untracked-files=all").split("\0"))
        paths = set()
        for entry in entries:
            if entry and not entry.endswith("/"):
                paths.add(entry[3:])
                if "R" in entry[:2] or "C" in entry[:2]:
                    paths.add(next(entries))  # where it was before
        return sorted(paths)

    def is_clean(self) -> bool:
        """Whether everything that git does not ignore is committed."""
        return not self.changed_paths()

    def commit(self, paths: Iterable[str | Path], message: str) -> str:
        """Commit `paths` as they are now, and nothing else that may be staged; the commit that HEAD then names.

        A deleted path is committed as deleted. Where none of them changed there is no new commit.
        """
        names = [str(path) for path in paths]
        assert names, "a commit names its paths"
        self._run("add", "--all", "--", *names)
        if self._run("status", "--porcelain", "--", *names):
            self._run(*self._identity(), "-c", "commit.gpgSign=false", "commit", "--quiet", "-m", message, "--", *names)
        return self.head()

    def restore(self, paths: Iterable[str]) -> None:
        """Make `paths` what they are in HEAD; those that it does not have are removed."""
        for path in paths:
            if self._run("ls-tree", "HEAD", "--", path):
                self._run("checkout", "--quiet", "HEAD", "--", path)
            else:
                (self.root / path).unlink(missing_ok=True)

    def tag(self, name: str) -> None:
        """Name HEAD `name`. Fine when it has that name already; a ValueError when another commit has it."""
        there = self._run("tag", "--list", "--format=%(objectname)", name).strip()
        if not there:
            self._run("-c", "tag.gpgSign=false", "tag", name)
        elif self._run("rev-parse", f"{there}^{{commit}}").strip() != self.head():
            raise ValueError(f"tag {name} already names commit {there[:10]}; remove it with `git tag -d {name}`")

    def tags(self, pattern: str = "*") -> list[str]:
        """Names of the tags that match the glob `pattern`, sorted."""
        return self._run("tag", "--list", pattern).split()

    def commit_of(self, name: str) -> str:
        """The commit that a tag or branch names, 40 hexadecimal digits."""
        return self._run("rev-parse", "--verify", f"{name}^{{commit}}").strip()

    def first_with(self, path: str) -> str:
        """The first commit that had the file at `path`, 40 hexadecimal digits; empty where none has."""
        return self._run("log", "--format=%H", "--diff-filter=A", "--", path).strip().split("\n")[-1]

    def content(self, commit: str, path: str) -> bytes | None:
        """What the file at `path` holds in `commit`; None where there is no such commit or file."""
        try:
            return self._run("show", f"{commit}:{path}").encode("utf-8", "surrogateescape")
        except ValueError:
            return None

    def checkout(self, commit: str) -> None:
        """Make the tree that of `commit`, a branch or a tag; changes that would be lost make it a ValueError."""
        self._run("checkout", "--quiet", commit, "--")

    def export(self, commit: str, paths: Sequence[str], folder: Path) -> None:
        """Write the files that `commit` has below `paths` into `folder`; a path that it lacks is a ValueError."""
        archive = folder / "export.zip"  # of a tar, Python before 3.11.4 cannot be told to take nothing but files
        self._run("archive", "--format=zip", f"--output={archive}", commit, "--", *paths)
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder)
        archive.unlink()

    def before(self, path: str) -> str:
        """The commit before the one that first had `path`."""
        first = self._run("log", "--diff-filter=A", "--format=%H", "--reverse", "--", path).split()
        if not first:
            raise ValueError(f"no commit has {path}; finish the round with `abnloop round open`")
        return self.commit_of(f"{first[0]}~")

    def free_index(self, age: float = 30.0) -> None:
        """Remove the index's lock where a git that was killed has left it, `age` seconds ago or more."""
        lock = self.root / ".git" / "index.lock"
        # A clock that was set back dates it into the future.
        if lock.is_file() and abs(time.time() - lock.stat().st_mtime) > age:
            lock.unlink(missing_ok=True)

    def configured(self, key: str) -> bool:
        """Whether git's configuration sets `key`, such as user.email."""
        return bool(self._run("config", "--get", "--default", "", key).strip())

    def _identity(self) -> list[str]:
        """Arguments that name an author where the user has not said who they are."""
        unnamed = {"user.name": "abnloop", "user.email": "abnloop@localhost"}
        return [word for key, value in unnamed.items() if not self.configured(key) for word in ("-c", f"{key}={value}")]

    def _run(self, *arguments: str) -> str:
        return _git(self.root, *arguments)


def refuse_old_round(root: str | Path) -> None:
    """Raises ValueError while a tag is checked out, as to look at an old round: the tables, tasks and models of that
    time must not be taken for today's."""
    if Git(root).is_detached():
        raise ValueError(f"{root}: an old round is checked out; `git checkout main && dvc checkout` first")


def is_repository(root: str | Path) -> bool:
    """Whether `root` is the top folder of a git repository."""
    return (Path(root) / ".git").exists()


class Dvc:
    """The DVC repository at `root`.

    Another process that holds DVC's lock is waited for, up to `patience` seconds. Failures are ValueErrors in one line.
    """

    def __init__(self, root: str | Path, patience: float = 60.0) -> None:
        self.root = Path(root)
        self.patience = patience
        self._cache: Path | None = None  # where it is, once asked: a call of dvc takes seconds

    def init(self) -> None:
        """Make the git repository at the root a DVC repository, one that never looks for the internet unasked."""
        self._run("init")
        (self.root / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")

    def add(self, paths: Iterable[str | Path]) -> list[str]:
        """Put `paths` under DVC; what git has to commit for it: the `.dvc` files and the `.gitignore`s beside them."""
        names = [str(path) for path in paths]
        self._run("add", *names)
        ignores = {str(Path(name).parent / ".gitignore") for name in names}  # none where git ignores it anyway
        return [f"{name}.dvc" for name in names] + sorted(one for one in ignores if (self.root / one).is_file())

    def repro(self, on_line: Callable[[str], None], targets: Sequence[str] = ()) -> None:
        """Bring the stages up to date, all of them or those that `targets` need; `on_line` gets each line they print.

        Raises ValueError with the last thing that a failing stage said, or for data missing from the cache.
        """
        self._run("repro", *targets, on_line=on_line)

    def checkout(self, targets: Sequence[str] = ()) -> None:
        """Make the files under DVC those that git's HEAD names, all of them or `targets`.

        Raises ValueError where the cache does not hold one. Outputs of stages that never ran are left alone.
        """
        self._run("checkout", *targets)

    def pull(self, targets: Sequence[str] = ()) -> None:
        """Fetch what the cache lacks from the default remote, all of it or `targets`, and check it out."""
        self._run("pull", *targets)

    def caches(self, md5: str) -> bool:
        """Whether the cache holds the content with that MD5, for a folder its list of files."""
        return self.cached(md5).is_file()

    def cached(self, md5: str) -> Path:
        """Where the cache keeps the content with that MD5, whether or not it has it."""
        if self._cache is None:
            self._cache = Path(self._run("cache", "dir").split("\n")[-1].strip())
        return self._cache / "files" / "md5" / md5[:2] / md5[2:]

    def push(self) -> None:
        """Copy what the cache holds to the default remote, where there is one. Raises ValueError where it cannot be
        reached, or does not take all of it within PUSH_LIMIT."""
        if self.remote():
            self._run("push", limit=PUSH_LIMIT)

    def remote(self) -> str:
        """The name of the default remote, or an empty text."""
        return self._run("config", "core.remote").split("\n")[-1].strip()

    def hashes(self) -> dict[str, str]:
        """What dvc.lock says of every input and output of the stages: path -> MD5 of its content."""
        path = self.root / "dvc.lock"
        stages = yaml.safe_load(path.read_text())["stages"] if path.is_file() else {}
        entries = [entry for stage in stages.values() for entry in [*stage.get("deps", []), *stage.get("outs", [])]]
        return {entry["path"]: entry["md5"] for entry in entries}

    def missing(self) -> list[str]:
        """Paths that git's HEAD names and the cache does not hold."""
        return list(json.loads(self._run("data", "status", "--json").split("\n")[-1]).get("not_in_cache", []))

    def is_current(self, stage: str) -> bool:
        """Whether `repro` would leave the stage as it is."""
        return not json.loads(self._run("status", "--json", stage).split("\n")[-1])

    def _run(self, *arguments: str, on_line: Callable[[str], None] | None = None, limit: float | None = None) -> str:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Busy),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(self.patience),
            reraise=True,
        )
        try:
            return retrying(self._try, arguments, on_line, limit)
        except _Busy as busy:
            raise ValueError(f"dvc {arguments[0]} waited {self.patience:.0f} s in vain: {busy}") from None

    def _try(self, arguments: tuple[str, ...], on_line: Callable[[str], None] | None, limit: float | None) -> str:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=self.root,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        lines, overdue = [], threading.Event()

        def end() -> None:
            overdue.set()
            stop_group(process.pid)

        timer = threading.Timer(limit or 0.0, end)
        if limit is not None:
            timer.start()
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if on_line:
                    on_line(lines[-1])
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted: the stage's own processes must end as well
                stop_group(process.pid)
                process.wait()
            process.stdout.close()
        if code != 0 and overdue.is_set():
            raise ValueError(f"dvc {arguments[0]} did not end within {limit:.0f} s")
        if code != 0:
            self._refuse(arguments[0], lines)
        return "\n".join(lines)

    def _environment(self) -> dict[str, str]:
        """The environment of DVC and its stages: this Python as `python`, the workspace's own modules before others."""
        environment = _without_git()
        environment.pop("PYTHONSAFEPATH", None)  # it would hide the modules of the working directory
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        environment["DVC_NO_ANALYTICS"] = "1"
        environment[HOLDER] = holder_mark(os.getpid(), self.root)
        # Threads of a training that wait for each other must not keep the cores busy: beside other work, such as the
        # servers, that costs a factor of ten.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        environment["PYTHONUNBUFFERED"] = "1"  # lines of a stage arrive when they are written
        return environment

    def _refuse(self, command: str, lines: list[str]) -> None:
        """Say in one line why DVC failed. Returns where it did not really fail."""
        text = "\n".join(lines)
        if "Unable to acquire lock" in text or " is busy, it is being blocked by" in text:
            raise _Busy(" ".join(text[text.find("ERROR") :].split()))
        if "Checkout failed for following targets" in text:
            failed = text.split("Checkout failed for following targets:")[1].split("Is your cache")[0].split("\n")
            never_made = {Path(path).resolve() for path in re.findall(r"No file hash info found for '(.+?)'", text)}
            absent = [name for name in failed if name and (self.root / name).resolve() not in never_made]
            if not absent:
                return
            raise ValueError(f"the DVC cache lacks {', '.join(absent)}; fetch it with `dvc pull`")
        if "missing data 'source'" in text or "missing-files" in text:
            absent = re.findall(r"missing data 'source': (.+)", text) or ["a file"]
            raise ValueError(f"the DVC cache lacks {', '.join(absent)}; fetch it with `dvc pull`")
        errors = [line for line in lines if line.startswith("ERROR: ")]
        stage = re.search(r"failed to reproduce '(.+?)': failed to run", text)
        if stage:
            said = [line for line in lines[: lines.index(errors[0])] if line.strip() and not line.startswith("> ")]
            raise ValueError(f"stage {stage[1]} failed: {said[-1].strip() if said else errors[0]}")
        last = errors[0].removeprefix("ERROR: ") if errors else " ".join(text.split()[-40:])
        raise ValueError(f"dvc {command} failed: {last}")


def holder_mark(pid: int, root: Path) -> str:
    """What tells the processes that `pid` started in the workspace at `root` from all others."""
    return f"{pid} {root.resolve()}"


def _without_git() -> dict[str, str]:
    """The environment less what would point git elsewhere, as it does inside a git hook."""
    return {key: value for key, value in os.environ.items() if not re.match(r"GIT_(DIR|WORK_TREE|INDEX_FILE)$", key)}


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(_Busy),
    wait=tenacity.wait_exponential_jitter(multiplier=0.1, max=2),
    stop=tenacity.stop_after_delay(15),
    retry_error_callback=lambda state: _give_up(state),
)
def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        check=False,
        cwd=root,
        env=_without_git() | {"GIT_TERMINAL_PROMPT": "0", "GIT_EDITOR": "true", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        if "index.lock" in said:
            raise _Busy(said)
        raise ValueError(f"git {_verb(arguments)} failed in {root}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _verb(arguments: Sequence[str]) -> str:
    """The git command among `arguments`, past its `-c key=value` options."""
    return next(word for index, word in enumerate(arguments) if word != "-c" and arguments[index - 1] != "-c")


def _give_up(state: tenacity.RetryCallState) -> str:
    assert state.outcome is not None
    raise ValueError(f"git waited in vain: {state.outcome.exception()}")
