"""Where everything of a workspace lies, its rounds, and the lock that keeps it to one writer."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import socket
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from abn.files import replacing
from abn.manifest import GOLD_MASKS, GOLD_TABLE


@dataclass(frozen=True)
class Round:
    """The files of one round: `rounds/<number in four digits>/`."""

    number: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tag(self) -> str:
        """The git tag of the finished round, such as round/0001."""
        return f"round/{self.name}"

    @property
    def batch(self) -> Path:
        return self.folder / "batch.csv"

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks.json"

    @property
    def heatmaps(self) -> Path:
        """Attention over the picture, as labelers see it; git and DVC do not keep what can be drawn again."""
        return self.folder / "heatmaps"

    @property
    def annotations(self) -> Path:
        return self.folder / "annotations.jsonl"

    @property
    def corrections(self) -> Path:
        """Every annotation of the round with what it says; of the workspace's table each row is one sample."""
        return self.folder / "corrections.csv"

    @property
    def masks(self) -> Path:
        return self.folder / "masks.npz"

    @property
    def comparison(self) -> Path:
        """Champion and challenger on each validation picture: what the gate's verdict stands on."""
        return self.folder / "comparison.csv"

    @property
    def comparison_gallery(self) -> Path:
        """Both models' maps of the same pictures; MLflow keeps it, git does not."""
        return self.folder / "comparison.png"

    @property
    def state(self) -> Path:
        return self.folder / "round.json"

    def read(self) -> dict[str, Any]:
        """What round.json says; empty before it is first written."""
        return read_json(self.state)

    def write(self, state: dict[str, Any]) -> None:
        write_json(self.state, state)

    @property
    def is_opening(self) -> bool:
        """Whether its tasks are not pushed yet."""
        return self.read().get("state", "begun") == "begun"


def decision_of(state: Mapping[str, Any]) -> str:
    """What the gate decided on the model of a round, by its round.json: promoted, refused or undecided."""
    return state.get("decision") or ("promoted" if state["promoted"] else "refused")  # rounds of before knew two


class InUse(ValueError):
    """Another process holds the workspace; says which."""


class Workspace:
    """A git clone of the project with its own data, models and rounds; `root` is its folder.

    Nothing is read or made here, so a workspace that is still being built has its paths too;
    `open_workspace` is for those that must exist.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def manifest(self) -> Path:
        return self.data / "manifest.csv"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def gold(self) -> Path:
        """Masks of evaluation samples that were given at `abnloop init`."""
        return self.root / GOLD_MASKS

    @property
    def gold_table(self) -> Path:
        """What labelers said of evaluation samples."""
        return self.root / GOLD_TABLE

    @property
    def corrections(self) -> Path:
        return self.data / "corrections.csv"

    @property
    def captured(self) -> Path:
        """Where the samples that came in through the inbox are from, and why they were kept."""
        return self.data / "captured.csv"

    @property
    def withdrawals(self) -> Path:
        """What was withdrawn from the training set, and what was let in again; it only grows."""
        return self.data / "withdrawals.csv"

    @property
    def ingest_report(self) -> Path:
        return self.data / "ingest.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def start_model(self) -> Path:
        return self.models / "start.pt"

    @property
    def champion(self) -> Path:
        return self.models / "champion.pt"

    @property
    def champion_record(self) -> Path:
        """Which round and version the champion is of, and its metrics."""
        return self.models / "champion.json"

    @property
    def decisions(self) -> Path:
        """Every promotion and refusal, oldest first: the history of the champion."""
        return self.models / "decisions.csv"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def model(self) -> Path:
        return self.results / "model.pt"

    @property
    def train_log(self) -> Path:
        return self.results / "train.jsonl"

    @property
    def inferred(self) -> Path:
        """What training inferred for pictures that nobody corrected, of a few of them."""
        return self.results / "inferred.npz"

    @property
    def control_log(self) -> Path:
        return self.results / "control" / "train.jsonl"

    @property
    def predictions(self) -> Path:
        return self.results / "predictions"

    @property
    def metrics(self) -> Path:
        return self.results / "metrics.json"

    @property
    def plots(self) -> Path:
        return self.results / "plots"

    @property
    def batch(self) -> Path:
        return self.results / "batch.csv"

    @property
    def gold_questions(self) -> Path:
        """Which evaluation samples to ask about next, in their order."""
        return self.results / "gold.csv"

    @property
    def control_metrics(self) -> Path:
        """Of the same training without anything that people said."""
        return self.results / "control" / "metrics.json"

    @property
    def state(self) -> Path:
        """What belongs to this machine alone; git does not know it."""
        return self.root / ".abnloop"

    @property
    def simulation(self) -> Path:
        """Masks that only simulated labelers know."""
        return self.state / "simulation.npz"

    @property
    def inbox(self) -> Path:
        """Pictures that the service or `abnloop predict` kept for labelers (flows/inbox.py)."""
        return self.state / "inbox.db"

    @property
    def simulated_labelers(self) -> Path:
        """The access tokens of their accounts."""
        return self.state / "simulated_labelers.json"

    @property
    def secrets(self) -> Path:
        return self.state / "secrets.json"

    @property
    def services(self) -> Path:
        return self.state / "services.json"

    @property
    def serving(self) -> Path:
        """There while `abnloop serve` runs: its process, and which services it had to start again."""
        return self.state / "serve.json"

    @property
    def slot(self) -> Path:
        """There while a training runs: the lease of its slot (flows/slots.py)."""
        return self.state / "slot.json"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def label_studio(self) -> Path:
        return self.state / "label-studio"

    @property
    def prefect(self) -> Path:
        return self.state / "prefect"

    @property
    def mlflow(self) -> Path:
        return self.state / "mlflow"

    @property
    def unpushed(self) -> Path:
        """There while the DVC remote lacks something: since when, and why the last attempt failed."""
        return self.state / "unpushed.json"

    def relative(self, path: Path) -> str:
        """`path` as git, DVC and the manifest write it: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    def round(self, number: int) -> Round:
        """Round `number`, counted from 1, whether or not it exists yet."""
        assert number >= 1, "rounds count from 1"
        return Round(number, self.root / "rounds" / f"{number:04d}")

    def rounds(self) -> list[Round]:
        """The rounds that exist, oldest first."""
        folder = self.root / "rounds"
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        return [self.round(number) for number in sorted(int(name) for name in names if name.isdigit())]

    def latest(self) -> Round | None:
        """The newest round, or None before the first."""
        rounds = self.rounds()
        return rounds[-1] if rounds else None

    @contextmanager
    def lock(self, command: str, name: str = "lock", frees: bool = False, patience: float = 0.0) -> Iterator[str]:
        """Hold the workspace for `command`; one process at a time.

        `name` tells apart what is held: "lock" the rounds, "services.lock" the services, which a round may start,
        "serve.lock" the schedule. Raises InUse where another process still holds it after `patience` seconds, or at
        once where that opens a round, which takes hours. The kernel releases the lock when the holder ends, however it
        ends; only one that was killed leaves its signature behind. The next holder gets it (else an empty text), and
        leaves it for the one after unless it `frees` what the killed one held.
        """
        self.state.mkdir(exist_ok=True)
        deadline = time.monotonic() + patience
        with (self.state / name).open("a+") as file:
            while not _locked(file):
                file.seek(0)
                holder = file.read().strip()
                if time.monotonic() < deadline and not holder.startswith("`abnloop round open`"):
                    time.sleep(0.2)
                    continue
                holder = holder or "another process"  # it may be between taking the lock and signing it
                raise InUse(f"{self.root} is in use by {holder}; wait until it ends, or end that process")
            file.seek(0)
            left_behind = file.read().strip()
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"`abnloop {command}` (pid {os.getpid()} on {socket.gethostname()}, since {since})")
            file.flush()
            try:
                yield left_behind
            finally:
                file.truncate(0)
                file.write("" if frees else left_behind)


def _locked(file: IO[str]) -> bool:
    """Lock `file` for this process, unless another one has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_workspace(root: str | Path) -> Workspace:
    """The workspace at `root`. Raises ValueError where there is none."""
    workspace = Workspace(root)
    if not workspace.manifest.is_file():
        raise ValueError(
            f"{workspace.root} is not a workspace (it has no data/manifest.csv); "
            "make one with `abnloop init`, or name one with --workspace"
        )
    return workspace


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Replace the file at `path` whole: after a crash it holds the old content or the new, never a part.

    `mode` are its permissions, less the process's umask. Its folder is made where it is missing.
    """
    with replacing(path) as temporary:
        # With its permissions from the first byte on: a secret is never readable by others, however briefly.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


def copy_atomically(source: Path, path: Path) -> None:
    """Replace the file at `path` by a copy of `source`, whole or not at all.

    Where `path` is a link, as DVC may make one into its cache, the file behind it stays as it is.
    """
    with replacing(path) as temporary:
        shutil.copyfile(source, temporary)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in the JSON file at `path`; empty where there is no file. Raises ValueError where it is damaged."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it with git, or remove it") from error
    assert isinstance(content, dict)
    return content


def write_json(path: Path, content: dict[str, Any], mode: int = 0o644) -> None:
    """`content` as a JSON file at `path`, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", mode)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The mappings in the file at `path`, one a line; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:  # str.splitlines would also split at U+2028 and others, within a text
        return [json.loads(line) for line in file]


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV file at `path`; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Rows as a CSV file at `path`, whole or not at all."""
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, content.getvalue())


def write_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Named arrays as an .npz file that `np.load` reads; the same arrays make the same bytes.

    Unlike `np.savez_compressed` it takes any name, also `file`, and needs one array at a time in memory.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays:
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that a repeated write is identical
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    write_atomically(path, content.getvalue())
