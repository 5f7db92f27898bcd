"""Pictures from class folders or a CSV become a workspace: checked, split, copied, versioned."""

from __future__ import annotations

import dataclasses
import io
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ruamel.yaml

from abn.config import suggest
from abn.manifest import CORRECTION_COLUMNS, EVALUATION, MANIFEST_COLUMNS, WITHDRAWAL_COLUMNS
from flows.defaults import PRETRAINED, Choice, choose
from flows.file_names import text_of
from flows.image_table import SPLITS, read_table
from flows.ingest_report import Report
from flows.mask_files import Mask, MaskFolder
from flows.pictures import (
    Picture,
    Progress,
    any_size,
    copy_picture,
    read_all,
    read_masks,
    without_duplicates,
    without_near_duplicates,
)
from flows.preflight import PREFECT_SECTIONS, SECTIONS, check_settings
from flows.sources import Source, check_masks, check_sources, read_folders, safe_name
from flows.splits import assign_splits, check_splits
from flows.versions import Dvc, Git, is_repository
from flows.workspace import Workspace, write_arrays, write_atomically, write_json, write_table

SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"}


def init_workspace(
    repository: str | Path,
    directory: str | Path,
    images: str | Path,
    masks: str | Path | None = None,
    index: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    drop: Iterable[str] = (),
    seed: int = 0,
    on_progress: Progress | None = None,
    hide_masks: bool = False,
    skip_doubtful: bool = False,
    mask_pixels: str | None = None,
    dry_run: bool = False,
) -> Report:
    """Make the workspace `directory`: a clone of `repository` with its own data, DVC and git history.

    images: class folders (IMAGES/<class>/<file>, or all of it below train, val and test), or what the CSV at `index`
    names; a folder that holds index.csv beside images/ needs no `index`. masks: MASKS/<class>/<stem>.png or of any
    other format, unless the CSV has a column `mask`. settings: "section.key" -> value, for params.yaml; those that are
    not given are chosen by the pictures (flows/defaults.py), and all are checked before any picture is read. drop:
    classes to leave out. skip_doubtful: leave out pictures that stand in two splits or under two classes, or nearly.
    mask_pixels: "upright" or "stored", on which pixels of photographs with an EXIF orientation masks were drawn.
    Masks of val and test become the gold set; those of train and pool are known only to simulated labelers, and with
    `hide_masks` those of val and test, too, as if the user had none.
    With `dry_run` nothing is made, and the report tells what would be. Raises ValueError for anything that does not
    fit, and then leaves nothing behind: Undecided, with everything at once, for what the user has to decide.
    """
    repository, directory, images = Path(repository), Path(directory).resolve(), Path(images)
    masks, progress = Path(masks) if masks else None, on_progress or (lambda what, done, total: None)
    _check_places(repository, directory, images, masks)
    if mask_pixels not in (None, "upright", "stored"):
        raise ValueError(f"--mask-pixels is {mask_pixels}; choose upright or stored")
    if index is None and (images / "index.csv").is_file() and (images / "images").is_dir():
        index = images / "index.csv"

    given = _given(settings or {})
    _check_settings(repository, given)
    report = Report()
    sources = _sources(images, masks, Path(index) if index else None, [text_of(name) for name in drop], report)
    with any_size():
        pictures = without_duplicates(read_all(sources, report, progress), report, skip_doubtful)
        _check_classes(sources, pictures, report)
        pictures = assign_splits(pictures, seed, report)
        pictures = without_near_duplicates(pictures, report, skip_doubtful)
        if report.doubtful:
            check_splits(pictures, report)
        stored = None if mask_pixels is None else mask_pixels == "stored"
        read = read_masks(pictures, report, progress, stored)
        _count(pictures, read, report, hide_masks)
        report.problems = list(dict.fromkeys(report.problems))
        report.decided()
        choice = _choose(pictures, given)
        report.chosen, report.why = choice.settings, choice.why
        chosen = {"project.name": safe_name(directory.name)[:40], **choice.settings, **given}
        if not dry_run:
            _build_beside(directory, repository.resolve(), pictures, read, chosen, report, progress, hide_masks)
    return report


def _check_places(repository: Path, directory: Path, images: Path, masks: Path | None) -> None:
    """Raises ValueError where a folder that is needed is not there, or one is where the workspace shall be."""
    if not is_repository(repository):
        raise ValueError(f"{repository} is not a git repository; a workspace is made from a git clone of the project")
    if (repository / "data" / "manifest.csv").exists():
        raise ValueError(f"{repository} is itself a workspace; run abnloop from the project's own clone")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory} exists already; name a new directory, or remove it")
    for folder in (images, masks):
        if folder and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    if not directory.parent.is_dir():
        raise ValueError(f"{directory.parent} does not exist; make it first")
    if "?" in str(directory):
        raise ValueError(f"{directory} holds a ?, which ends a path in the address of a database; name it without")


def _sources(images: Path, masks: Path | None, index: Path | None, drop: Sequence[str], report: Report) -> list[Source]:
    """The picture files, by folders or the table, without dropped classes."""
    folder = MaskFolder(masks) if masks else None
    sources = read_table(index, images, folder, report) if index else read_folders(images, folder, report)
    if folder:
        check_masks(sources, folder, report)
    sources = _drop(sources, drop, report)
    check_sources(sources, report)
    return sources


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user gave, with what they imply."""
    given = dict(settings)
    weights = given.get("model.weights")
    if weights == "pretrained":
        given.setdefault("model.backbone", "efficientnet_lite0")
    elif isinstance(weights, str) and Path(weights).is_file():
        given["model.weights"] = str(Path(weights).resolve())  # a workspace is another folder
    return given


def _check_settings(repository: Path, given: Mapping[str, Any]) -> None:
    """Raises ValueError where params.yaml with the `given` settings would be refused later, by whatever command."""
    content = Git(repository).content("HEAD", "params.yaml")
    if content is None:
        raise ValueError(f"{repository} has no params.yaml in its last commit; a workspace is made from the project")
    # Which network it will be, unless one is given, the pictures say: what fits one of them passes here.
    networks = [{}] if "model.backbone" in given else [{}, {**PRETRAINED, "data.size": [128, 128]}]
    refusals = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        for network in networks:
            path.write_bytes(content)
            change_settings(path, {**network, **given})
            try:
                check_settings(path, SECTIONS)
            except ValueError as error:
                refusals.append(error)
        if len(refusals) == len(networks):
            raise refusals[0]
        if any(name.partition(".")[0] in PREFECT_SECTIONS for name in given):
            # In a process of its own: this one may yet have to tell Prefect where its server is.
            command = [sys.executable, "-m", "flows.preflight", str(path)]
            home = Path(__file__).resolve().parent.parent
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(done.stderr.strip().split("\n")[-1])


def _choose(pictures: Sequence[Picture], given: Mapping[str, Any]) -> Choice:
    height, width = (int(np.median([getattr(one, side) for one in pictures])) for side in ("height", "width"))
    learned = sum(picture.source.split == "train" for picture in pictures)
    return choose(height, width, learned, given)


def _drop(sources: list[Source], names: Sequence[str], report: Report) -> list[Source]:
    known = sorted({source.label for source in sources} - {""})
    for name in names:
        if name not in known:
            raise ValueError(f"--drop {name} is not a class{suggest(name, known)}")
        report.dropped[name] = sum(source.label == name for source in sources)
    return [source for source in sources if source.label not in names]


def _check_classes(sources: Sequence[Source], pictures: Sequence[Picture], report: Report) -> None:
    read = {picture.source.label for picture in pictures}
    doubtful = set(report.doubtful)
    for label in sorted({source.label for source in sources if source.name not in doubtful} - read - {""}):
        report.problems.append(f"class {label} has no images that can be read; mend them, or leave it out with --drop")
    if len(read - {""}) < 2 and not report.problems:  # it may follow from what has to be decided
        report.problems.append(f"{len(read - {''})} class with images; a classifier needs at least two")


def _count(pictures: Sequence[Picture], masks: Mapping[str, Mask], report: Report, hide_masks: bool) -> None:
    """What the workspace holds, and what that lacks, for the report."""
    report.gold_masks = len(_judged(pictures, masks, hide_masks))
    report.simulation_masks = len(masks) - report.gold_masks
    for split in SPLITS:
        labels = Counter(picture.source.label for picture in pictures if picture.source.split == split)
        report.images[split] = dict(sorted(labels.items()))
    report.turned = [picture.source.name for picture in pictures if picture.turned]
    report.rescaled = [picture.source.name for picture in pictures if picture.rescaled]
    unseen = [
        picture.source.name
        for picture in pictures
        if not (picture.turned or picture.rescaled) and picture.source.path.suffix.lower() not in SHOWN_BY_BROWSERS
    ]
    if unseen:
        report.warnings.append(f"{len(unseen)} images have a format that browsers do not show, such as {unseen[0]}")
    report.warnings += _unjudged(report.images)
    report.missing = _missing(report.gold_masks, report.simulation_masks)


def _judged(pictures: Sequence[Picture], masks: Mapping[str, Mask], hide_masks: bool) -> list[str]:
    """Ids of the pictures whose masks are gold."""
    return [
        picture.source.id
        for picture in pictures
        if picture.source.id in masks and picture.source.split in EVALUATION and not hide_masks
    ]


def _build_beside(
    directory: Path,
    repository: Path,
    pictures: Sequence[Picture],
    masks: Mapping[str, Mask],
    settings: Mapping[str, Any],
    report: Report,
    progress: Progress,
    hide_masks: bool,
) -> None:
    """Build the workspace under another name beside `directory`, and rename it once it is whole."""
    if not Git(repository).is_clean():
        report.warnings.append("the project has uncommitted changes; the workspace holds its last commit")
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        _build(Workspace(building), repository, pictures, masks, settings, report, progress, hide_masks)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(
    workspace: Workspace,
    repository: Path,
    pictures: Sequence[Picture],
    masks: Mapping[str, Mask],
    settings: Mapping[str, Any],
    report: Report,
    progress: Progress,
    hide_masks: bool,
) -> None:
    """Fill the new folder `workspace` and make its first commit."""
    progress("cloning the project", 0, 1)
    git, dvc = Git.clone(repository, workspace.root), Dvc(workspace.root)
    change_settings(workspace.params, settings)
    check_settings(workspace.params, SECTIONS)
    workspace.images.mkdir(parents=True)
    workspace.models.mkdir(exist_ok=True)
    workspace.state.mkdir()

    files = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        copied = pool.map(lambda picture: copy_picture(picture, workspace.images), pictures)
        for done, (picture, file) in enumerate(zip(pictures, copied, strict=True), start=1):
            files[picture.source.id] = workspace.relative(file)
            progress("copying images", done, len(pictures))
    rows = [
        (one.id, files[one.id], one.label, one.split, one.group) for one in (picture.source for picture in pictures)
    ]
    write_table(workspace.manifest, MANIFEST_COLUMNS, (dict(zip(MANIFEST_COLUMNS, row, strict=True)) for row in rows))
    for table in (workspace.corrections, workspace.gold_table):
        write_table(table, CORRECTION_COLUMNS, [])
    write_table(workspace.withdrawals, WITHDRAWAL_COLUMNS, [])
    judged = set(_judged(pictures, masks, hide_masks))
    write_arrays(workspace.gold, ((one, mask.pixels) for one, mask in masks.items() if one in judged))
    if len(masks) > len(judged):
        write_arrays(workspace.simulation, ((one, mask.pixels) for one, mask in masks.items() if one not in judged))
    workspace.start_model.touch()
    write_json(workspace.ingest_report, dataclasses.asdict(report))

    progress("versioning the data", 0, 1)
    if not (workspace.root / ".dvc").exists():
        dvc.init()
    data = [workspace.relative(path) for path in (workspace.images, workspace.gold, workspace.start_model)]
    tables = [workspace.params, workspace.manifest, workspace.corrections, workspace.gold_table, workspace.withdrawals]
    git.commit(
        [".dvc", ".dvcignore", *dvc.add(data), *map(workspace.relative, [*tables, workspace.ingest_report])],
        f"[data] {len(pictures)} images in {len({picture.source.label for picture in pictures} - {''})} classes",
    )


def _unjudged(images: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A warning for each class that val or test lacks: no metric tells whether it is still known."""
    return [
        f"class {label} has no images in {split}, so that nothing tells whether a model still knows it; add images, "
        "name splits in a CSV (--index), or leave it out with --drop"
        for split in ("val", "test")
        for label in sorted(images["train"])
        if not images[split].get(label)
    ]


def _missing(gold: int, simulation: int) -> list[str]:
    """What cannot be done for lack of masks, and what takes its place."""
    missing = []
    if not gold:
        missing.append("no gold masks (val, test): the gate needs some that labelers paint, and batches ask for them")
    if not simulation:
        missing.append("no masks of train: `abnloop simulate` cannot answer; people do, in Label Studio")
    return missing


def change_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Set "section.key" -> value in the params file at `path`, keeping its comments.

    Raises ValueError for a setting that the file does not have, or a value of another type than it has there.
    """
    yaml = ruamel.yaml.YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(float, _float_for_every_reader)
    params = yaml.load(path)
    known = [f"{section}.{key}" for section, values in params.items() for key in values]
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{name} is not a setting{suggest(name, known)}")
        section, _, key = name.partition(".")
        present = params[section][key]
        # A number is one to YAML: `0` may stand for a float. Which it has to be the section's dataclass knows.
        if _kind(value) is not _kind(present) and not {_kind(value), _kind(present)} <= {int, float}:
            raise ValueError(f"{name} is {value!r}; it must be of type {_kind(present).__name__}, as {present} is")
        if isinstance(value, list):
            value = ruamel.yaml.CommentedSeq(value)
            value.fa.set_flow_style()
        params[section][key] = value
    if settings:
        content = io.StringIO()
        yaml.dump(params, content)
        # A new file, by whose inode git knows that it changed: DVC rewrites git's index in a way that hides a change
        # that keeps the size and falls into the second of the checkout.
        write_atomically(path, content.getvalue())


def _kind(value: Any) -> type:
    """The YAML type of a value; ruamel's own classes derive from them."""
    return next(kind for kind in (bool, int, float, str, list, dict, object) if isinstance(value, kind))


def _float_for_every_reader(representer: Any, value: float) -> Any:
    """1e-05 as 1.0e-05: YAML 1.1, which PyYAML reads, takes the former for a text."""
    text = repr(value)
    return representer.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))
