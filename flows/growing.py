"""The pool grows while the champion is in use: pictures of the inbox become samples without a label."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from prefect import flow, get_run_logger
from prefect.states import Completed

from abn.images import decode
from abn.manifest import MANIFEST_COLUMNS
from flows.inbox import Inbox, Kept, nearest, open_inbox
from flows.pictures import copy_picture, read_source, thumbnail
from flows.rounds import Idle, held, patience_of, state_of
from flows.sources import Source
from flows.versions import Dvc, Git
from flows.workspace import InUse, Workspace, open_workspace, read_table, write_table

CAPTURED_COLUMNS = ("sample", "captured", "why", "predicted", "confidence", "model_version", "right_class")


@dataclass(frozen=True)
class Ingested:
    """What `ingest` did."""

    added: int
    left_out: dict[str, str]  # hash of the picture -> reason
    waiting: int  # pictures that stay in the inbox until `round` is closed
    round: int
    commit: str


@flow(name="ingest")
def ingest_flow(workspace: str = ".") -> Ingested | Idle:
    """`ingest` on a schedule, after the run of `collect` that has the same cron."""
    done: Ingested | Idle
    try:
        done = ingest(open_workspace(workspace), patience_of("ingest"))
        said = in_words(done)
    except InUse as in_use:
        done, said = Idle(str(in_use), in_use=True), str(in_use)
    get_run_logger().info(said)
    return Completed(message=said, data=done)  # type: ignore[return-value]  # Prefect takes out the data


def ingest(place: Workspace, patience: float = 0.0) -> Ingested:
    """Bring the inbox into the pool: samples without a label, in one commit of git and DVC.

    A round that is not closed yet stands on the data that it was trained on, and its tag must restore them; so the
    pictures wait until then. What shows the same as a sample on file, or nearly, is left out: it could be test data,
    from which nothing may learn. Killed anywhere, the next call begins anew. Raises ValueError where the manifest has
    changes of somebody else's, and InUse where another process still holds the workspace after `patience` seconds.
    """
    with held(place, "ingest", patience):
        inbox = open_inbox(place)
        kept, latest = inbox.pictures(), place.latest()
        if latest and state_of(place, latest) != "closed":
            return Ingested(0, {}, len(kept), latest.number, "")
        git, begun = Git(place.root), place.state / "ingesting"
        ours = [place.relative(place.manifest), place.relative(place.captured), f"{place.relative(place.images)}.dvc"]
        if begun.exists():
            git.restore(ours)
            begun.unlink()  # once: what is changed after that is somebody's
        if foreign := sorted(set(ours) & set(git.changed_paths())):
            raise ValueError(f"{foreign[0]} has changes that are not committed; commit them or undo them first")
        if not kept:
            return Ingested(0, {}, 0, 0, "")
        begun.touch()
        added, left_out = _take_in(place, inbox, kept)
        commit = git.commit(ours, f"[data] {added} captured pictures join the pool") if added else ""
        inbox.remove([one.sha256 for one in kept])
        begun.unlink()
        return Ingested(added, left_out, 0, 0, commit)


def in_words(done: Ingested) -> str:
    """What became of the inbox, in one line."""
    if done.round:
        return f"round {done.round} is not closed yet; {done.waiting} captured pictures wait until it is"
    if not done.added and not done.left_out:
        return "the inbox is empty, there is nothing to take in"
    return f"{done.added} captured pictures joined the pool, {len(done.left_out)} were left out"


def _take_in(place: Workspace, inbox: Inbox, kept: list[Kept]) -> tuple[int, dict[str, str]]:
    """Copy the pictures, then tell DVC, the manifest and captured.csv; how many, and which not and why."""
    rows, captured = read_table(place.manifest), read_table(place.captured)
    prints = inbox.on_file([row["image"] for row in rows], lambda image: _print(place.root / image))
    samples, hashes = [row["id"] for row in rows], [sha256 for sha256, _ in prints]
    thumbnails, left_out, before = [small for _, small in prints], {}, len(rows)
    with tempfile.TemporaryDirectory(dir=place.state) as folder:
        for one in kept:
            twin, apart = nearest(one.thumbnail, thumbnails)
            if one.sha256 in hashes or apart < inbox.config.near_duplicate:
                twin = hashes.index(one.sha256) if one.sha256 in hashes else twin
                left_out[one.sha256] = f"looks like sample {samples[twin]}"
                continue
            name = f"captured_{one.sha256[:16]}"
            path = Path(folder) / f"{name}{one.suffix}"
            path.write_bytes(inbox.file(one.sha256))
            picture = read_source(Source(name, one.name, path, "", "pool", "", None))
            if isinstance(picture, str):
                left_out[one.sha256] = picture
                continue
            image = place.relative(copy_picture(picture, place.images))
            values = (name, image, "", "pool", "")
            rows.append(dict(zip(MANIFEST_COLUMNS, values, strict=True)))
            told = (name, one.kept, one.why, one.predicted, f"{one.confidence:.4f}", one.model_version, one.right_class)
            captured.append(dict(zip(CAPTURED_COLUMNS, told, strict=True)))
            samples.append(name)
            hashes.append(one.sha256)
            thumbnails.append(one.thumbnail)
    if len(rows) > before:
        Dvc(place.root).add([place.relative(place.images)])
        write_table(place.captured, CAPTURED_COLUMNS, captured)
        write_table(place.manifest, MANIFEST_COLUMNS, rows)
    return len(rows) - before, left_out


def _print(path: Path) -> tuple[str, np.ndarray]:
    """Hash and thumbnail of one of the workspace's own pictures."""
    with Image.open(path) as image:
        decoded = decode(image)
    return decoded.content, thumbnail(decoded.rgb)
