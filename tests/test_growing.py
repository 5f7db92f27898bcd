"""Pictures of the inbox become samples without a label, once each, and never while a round stands on the data."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from abn.images import Decoded, decode
from abn.manifest import class_names, read_manifest, training_samples
from flows import growing
from flows.answering import Answer, Picture, read_picture
from flows.growing import Ingested, in_words, ingest
from flows.inbox import Inbox, open_inbox
from flows.ingest import init_workspace
from flows.versions import Dvc, Git
from flows.workspace import Workspace, open_workspace, read_table
from tiny import PROJECT, SIZE, picture

LABELS = {"light": range(0, 10), "dark": range(10, 20)}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of twenty pictures, made from a project with nothing but its parameters."""
    folder = tmp_path_factory.mktemp("growing")
    project = folder / "project"
    project.mkdir()
    for name in ("params.yaml", ".gitignore"):
        shutil.copy(PROJECT / name, project)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(project)], check=True)
    Git(project).commit(["params.yaml", ".gitignore"], "Project")
    for label, numbers in LABELS.items():
        (folder / "images" / label).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(picture(number, label)).save(folder / "images" / label / f"{number}.png")
    init_workspace(project, folder / "leaves", folder / "images")
    return folder / "leaves"


@pytest.fixture
def place(original: Path, tmp_path: Path) -> Workspace:
    """A copy of that workspace to change."""
    return open_workspace(shutil.copytree(original, tmp_path / "leaves"))


def put(inbox: Inbox, number: int, file: bytes = b"", **options: Any) -> str:
    """Picture `number` into the inbox; its hash."""
    if not file:
        content = io.BytesIO()
        Image.fromarray(picture(number, "light")).save(content, "PNG")
        file = content.getvalue()
    read = read_picture(f"{number}.png", file, (SIZE, SIZE))
    assert isinstance(read, Picture)
    answer = Answer({"light": 0.55, "dark": 0.45}, 0.2, np.zeros((4, 4), np.float32))
    assert inbox.keep(read, answer, "v3", "low confidence (55%)", **options)
    return read.sha256


def state(place: Workspace) -> tuple[str, list[str], list[dict[str, str]]]:
    return Git(place.root).head(), Git(place.root).changed_paths(), read_table(place.manifest)


def test_captured_pictures_join_the_pool_without_a_label(place: Workspace) -> None:
    inbox, before = open_inbox(place), read_manifest(place.root)
    lying, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(np.rot90(picture(102, "light")).copy()).save(lying, "PNG", exif=exif)
    hashes = [put(inbox, 101), put(inbox, 102, lying.getvalue(), flagged=True, right_class="dark")]
    done = ingest(place)
    assert (done.added, done.left_out, done.waiting, done.commit) == (2, {}, 0, Git(place.root).head())
    assert in_words(done) == "2 captured pictures joined the pool, 0 were left out"

    samples = read_manifest(place.root)
    new = samples[len(before) :]
    assert samples[: len(before)] == before
    assert {one.id for one in new} == {f"captured_{sha256[:16]}" for sha256 in hashes}
    assert {(one.label, one.split) for one in new} == {("", "pool")}
    assert class_names(samples) == ["dark", "light"] and not {*training_samples(samples)} & {*new}
    for one in new:
        with Image.open(place.root / one.image) as image:
            assert not image.getexif()
            shown = np.array(image)
        assert any(np.array_equal(shown, picture(number, "light")) for number in (101, 102))

    told = {row["sample"]: row for row in read_table(place.captured)}
    flagged = told[f"captured_{hashes[1][:16]}"]
    assert (flagged["why"], flagged["predicted"], flagged["model_version"]) == ("low confidence (55%)", "light", "v3")
    assert flagged["right_class"] == "dark" and float(flagged["confidence"]) == 0.55
    assert inbox.pictures() == [] and Git(place.root).is_clean() and Dvc(place.root).missing() == []
    assert ingest(place) == Ingested(0, {}, 0, 0, "")


def test_a_picture_on_file_is_left_out_and_so_is_one_that_looks_like_it(place: Workspace) -> None:
    """It may be test data, from which nothing may learn."""
    inbox, before = open_inbox(place), state(place)
    same = put(inbox, 3)
    brighter, file = picture(4, "light").astype(int) + 1, io.BytesIO()
    Image.fromarray(brighter.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    alike = put(inbox, 4, file.getvalue(), flagged=True)
    done = ingest(place)
    assert (done.added, done.left_out) == (0, {same: "looks like sample 3", alike: "looks like sample 4"})
    assert state(place) == before and inbox.pictures() == []


def test_a_picture_that_comes_again_is_not_added_again(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = open_inbox(place)
    sha256, read = put(inbox, 101), list[Image.Image]()
    ingest(place)
    put(inbox, 101)

    def note(image: Image.Image) -> Decoded:
        read.append(image)
        return decode(image)

    monkeypatch.setattr(growing, "decode", note)
    done = ingest(place)
    assert (done.added, list(done.left_out)) == (0, [sha256])
    assert len(read) == 1, "of the samples on file only the new one is read"


def test_pictures_wait_until_a_round_is_closed(place: Workspace) -> None:
    """Its tag must restore the data that it was trained on."""
    inbox, round_ = open_inbox(place), place.round(1)
    put(inbox, 101)
    for said in ("begun", "open", "closed"):  # closed, but not tagged yet
        round_.write({"round": 1, "state": said})
        before = state(place)
        done = ingest(place)
        assert (done.added, done.waiting) == (0, 1) and state(place) == before
        assert in_words(done) == "round 1 is not closed yet; 1 captured pictures wait until it is"
    Git(place.root).tag(round_.tag)
    assert ingest(place).added == 1
    assert "rounds/0001/round.json" in Git(place.root).changed_paths(), "nothing else is committed"


def test_somebody_elses_changes_are_not_committed(place: Workspace) -> None:
    put(open_inbox(place), 101)
    place.manifest.write_text(place.manifest.read_text() + "mine,data/images/mine.png,light,train,\n")
    before = state(place)
    with pytest.raises(ValueError, match=r"data/manifest\.csv has changes that are not committed"):
        ingest(place)
    assert state(place) == before and len(open_inbox(place).pictures()) == 1


class Killed(BaseException):
    pass


def test_killed_anywhere_it_ends_with_the_same(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, before = open_inbox(place), len(read_manifest(place.root))
    names = {f"captured_{put(inbox, number)[:16]}" for number in (101, 102)}

    def die(*arguments: Any, **named: Any) -> None:
        raise Killed

    for thing, step in ((Dvc, "add"), (Git, "commit"), (Inbox, "remove")):
        with monkeypatch.context() as patch:
            patch.setattr(thing, step, die)
            with pytest.raises(Killed):
                ingest(place)
    done = ingest(place)
    assert {sample.id for sample in read_manifest(place.root)[before:]} == names
    assert {row["sample"] for row in read_table(place.captured)} == names
    assert len(done.left_out) == 2, "they were committed, and are only forgotten now"
    assert Git(place.root).is_clean() and inbox.pictures() == []


def test_what_was_changed_after_an_interruption_was_undone_is_somebodys(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = open_inbox(place)
    sha256 = put(inbox, 101)

    def die(*arguments: Any, **named: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Dvc, "add", die)
        with pytest.raises(Killed):
            ingest(place)
    inbox.remove([sha256])
    assert ingest(place).added == 0 and Git(place.root).is_clean()
    mine = place.manifest.read_text() + "mine,data/images/mine.png,light,train,\n"
    place.manifest.write_text(mine)
    with pytest.raises(ValueError, match=r"data/manifest\.csv has changes that are not committed"):
        ingest(place)
    assert place.manifest.read_text() == mine
