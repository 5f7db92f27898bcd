"""The inbox: pictures that people asked the champion about and that labelers should see. One SQLite file."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from abn.config import load_section
from flows.answering import Answer, Picture
from flows.workspace import Workspace

log = logging.getLogger(__name__)

TABLES = """
CREATE TABLE IF NOT EXISTS pictures (
    sha256 TEXT PRIMARY KEY, name TEXT, suffix TEXT, kept TEXT, why TEXT, flagged INTEGER, right_class TEXT,
    predicted TEXT, confidence REAL, model_version TEXT, thumbnail BLOB, bytes INTEGER, file BLOB
);
CREATE TABLE IF NOT EXISTS on_file (image TEXT PRIMARY KEY, sha256 TEXT, thumbnail BLOB);
"""


@dataclass(frozen=True)
class CaptureConfig:
    enabled: bool
    confidence: float  # 0..1; a less sure answer is kept
    disagreement: float  # 0..1; so is one whose branches are further apart
    random_share: float  # 0..1 of the rest
    near_duplicate: float  # 0..1; pictures closer than this are one
    megabytes: float

    def __post_init__(self) -> None:
        for name in ("confidence", "disagreement", "random_share", "near_duplicate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"capture.{name} is {getattr(self, name)}; it must be from 0 to 1")
        if self.megabytes <= 0:
            raise ValueError(f"capture.megabytes is {self.megabytes}; it must be above 0")


class Kept(NamedTuple):
    """A picture in the inbox."""

    sha256: str
    name: str
    suffix: str
    kept: str  # when, in UTC
    why: str
    flagged: bool
    right_class: str  # according to whoever flagged it; a hint, not a label
    predicted: str
    confidence: float
    model_version: str
    thumbnail: np.ndarray  # (16, 16) uint8


def open_inbox(place: Workspace) -> Inbox:
    return Inbox(place.inbox, load_section(CaptureConfig, place.params, "capture"))


def why_keep(picture: Picture, answer: Answer, config: CaptureConfig) -> str:
    """Why the picture is worth a labeler's look, in words for them; empty where it is not.

    The random share is decided by the picture's hash: evenly, and alike however often the picture comes.
    """
    if answer.confidence < config.confidence:
        return f"low confidence ({answer.confidence:.0%})"
    if answer.disagreement > config.disagreement:
        return f"doubtful attention: the two branches answer differently (divergence {answer.disagreement:.2f})"
    if int(picture.sha256[:8], 16) / 2**32 < config.random_share:
        return "picked at random"
    return ""


def capture(inbox: Inbox, picture: Picture, answer: Answer, model_version: str) -> None:
    """Keep the picture where it is worth it. Whatever happens to the inbox, the answer is given."""
    if not inbox.config.enabled or not (why := why_keep(picture, answer, inbox.config)):
        return
    try:
        inbox.keep(picture, answer, model_version, why)
    except (sqlite3.Error, OSError, ValueError) as error:
        log.warning("%s was not kept for labelers: %s", picture.name, error)


class Inbox:
    """The pictures kept at `path`; several processes may use it at once."""

    def __init__(self, path: Path, config: CaptureConfig) -> None:
        self.path, self.config = path, config

    def keep(
        self,
        picture: Picture,
        answer: Answer,
        model_version: str,
        why: str,
        flagged: bool = False,
        right_class: str = "",
    ) -> bool:
        """Put the picture in; False where it, or one that looks like it, is there already.

        A flagged picture goes in however much it looks like another. Beyond the limit the oldest that nobody flagged
        go first; a ValueError where the rest alone is too much.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._open() as database:
            known = database.execute("SELECT flagged FROM pictures WHERE sha256 = ?", [picture.sha256]).fetchone()
            if known and not (flagged and not known[0]):
                return False
            thumbnails = [_thumbnail(values) for (values,) in database.execute("SELECT thumbnail FROM pictures")]
            if not flagged and nearest(picture.thumbnail, thumbnails)[1] < self.config.near_duplicate:
                return False
            values = [picture.sha256, picture.name, picture.suffix, now, why, flagged, right_class, answer.predicted]
            values += [answer.confidence, model_version, picture.thumbnail.tobytes(), len(picture.file), picture.file]
            database.execute(f"REPLACE INTO pictures VALUES ({', '.join('?' * len(values))})", values)
            self._make_room(database)
            kept = database.execute("SELECT 1 FROM pictures WHERE sha256 = ?", [picture.sha256]).fetchone()
            return kept is not None

    def pictures(self) -> list[Kept]:
        """Everything in the inbox without its files, flagged ones first, then the oldest."""
        columns = ", ".join(Kept._fields)
        with self._open() as database:
            rows = database.execute(f"SELECT {columns} FROM pictures ORDER BY flagged DESC, kept, sha256").fetchall()
        return [Kept._make([*row[:-1], _thumbnail(row[-1])]) for row in rows]

    def file(self, sha256: str) -> bytes:
        with self._open() as database:
            return bytes(database.execute("SELECT file FROM pictures WHERE sha256 = ?", [sha256]).fetchone()[0])

    def remove(self, hashes: list[str]) -> None:
        with self._open() as database:
            database.executemany("DELETE FROM pictures WHERE sha256 = ?", [[one] for one in hashes])

    def on_file(
        self, images: Sequence[str], read: Callable[[str], tuple[str, np.ndarray]]
    ) -> list[tuple[str, np.ndarray]]:
        """Hash and thumbnail of each of the workspace's own `images`; `read` is asked once for each, ever."""
        with self._open() as database:
            rows = database.execute("SELECT image, sha256, thumbnail FROM on_file").fetchall()
        known = {image: (sha256, _thumbnail(values)) for image, sha256, values in rows}
        with ThreadPoolExecutor() as pool:
            new = [image for image in images if image not in known]
            read_now = dict(zip(new, pool.map(read, new), strict=True))
        with self._open() as database:
            database.executemany(
                "REPLACE INTO on_file VALUES (?, ?, ?)",
                [(image, sha256, values.tobytes()) for image, (sha256, values) in read_now.items()],
            )
        return [(known | read_now)[image] for image in images]

    def _make_room(self, database: sqlite3.Connection) -> None:
        while True:
            (total,) = database.execute("SELECT sum(bytes) FROM pictures").fetchone()
            if (total or 0) <= self.config.megabytes * 1e6:
                return
            oldest = "SELECT sha256 FROM pictures WHERE NOT flagged ORDER BY kept, rowid LIMIT 1"
            if not database.execute(f"DELETE FROM pictures WHERE sha256 = ({oldest})").rowcount:
                raise ValueError(
                    f"the inbox is full of flagged pictures ({self.config.megabytes:g} MB); "
                    "take them in with `abnloop ingest`, or raise capture.megabytes"
                )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it happens, or nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=30, isolation_level=None)) as database, database:
            database.execute("PRAGMA auto_vacuum = FULL")  # what is removed gives its room back
            database.executescript(TABLES)
            database.execute("BEGIN IMMEDIATE")
            yield database


def nearest(thumbnail: np.ndarray, others: Sequence[np.ndarray]) -> tuple[int, float]:
    """Which of `others` is most alike, and the mean difference of grey values to it, 0..1; (-1, 1) without any."""
    if not len(others):
        return -1, 1.0
    table = np.stack(others).reshape(len(others), -1).astype(np.int16)
    apart = np.abs(table - thumbnail.reshape(-1)).mean(axis=1) / 255
    return int(apart.argmin()), float(apart.min())


def _thumbnail(values: bytes) -> np.ndarray:
    return np.frombuffer(values, np.uint8).reshape(16, 16)
