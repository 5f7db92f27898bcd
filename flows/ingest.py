"""Pictures from class folders or a CSV become a workspace: checked, split, copied, versioned."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ruamel.yaml
from PIL import ExifTags, Image, ImageOps

from abn.config import suggest
from abn.manifest import CORRECTION_COLUMNS, EVALUATION, MANIFEST_COLUMNS, WITHDRAWAL_COLUMNS
from flows.defaults import PRETRAINED, Choice, choose
from flows.preflight import PREFECT_SECTIONS, SECTIONS, check_settings
from flows.versions import Dvc, Git, is_repository
from flows.workspace import Workspace, write_arrays, write_atomically, write_json, write_table

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
SPLITS = (*SHARES, "pool")
MAX_PIXELS = 100_000_000
SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"}

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Source:
    """One picture as the user has it. `split` is empty where we choose; `mask` is a file or None."""

    id: str
    name: str  # for messages and the report: the path below the folder of the pictures
    path: Path
    label: str
    split: str
    group: str
    mask: Path | None


@dataclass(frozen=True)
class Picture:
    """A readable picture: what identifies its content, and its size in pixels once EXIF orientation is applied."""

    source: Source
    content: str
    width: int
    height: int
    turned: bool  # by its EXIF orientation, so that it has to be saved anew


@dataclass
class Report:
    """What `init` did; data/ingest.json holds the same."""

    images: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> class ("" for none) -> pictures
    gold_masks: int = 0
    simulation_masks: int = 0
    unreadable: list[dict[str, str]] = field(default_factory=list)  # image, reason
    duplicates: list[dict[str, str]] = field(default_factory=list)  # image, same_as
    turned: list[str] = field(default_factory=list)  # saved as PNG with their EXIF orientation applied
    dropped: dict[str, int] = field(default_factory=dict)  # class -> pictures
    chosen: dict[str, Any] = field(default_factory=dict)  # "section.key" -> value, as the images suggest it
    why: list[str] = field(default_factory=list)  # what they were chosen for
    missing: list[str] = field(default_factory=list)  # what cannot be done for lack of masks
    warnings: list[str] = field(default_factory=list)


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
) -> Report:
    """Make the workspace `directory`: a clone of `repository` with its own data, DVC and git history.

    images: class folders (IMAGES/<class>/<file>), or what the CSV at `index` names; a folder that holds index.csv
    beside images/ needs no `index`. masks: MASKS/<class>/<stem>.png, unless the CSV has a column `mask`.
    settings: "section.key" -> value, for params.yaml; those that are not given are chosen by the pictures
    (flows/defaults.py), and all are checked before any picture is read. drop: classes to leave out.
    Masks of val and test become the gold set; those of train and pool are known only to simulated labelers, and with
    `hide_masks` those of val and test, too, as if the user had none.
    Raises ValueError for anything that does not fit, and then leaves nothing behind.
    """
    repository, directory, images = Path(repository), Path(directory).resolve(), Path(images)
    masks, progress = Path(masks) if masks else None, on_progress or (lambda what, done, total: None)
    if not is_repository(repository):
        raise ValueError(f"{repository} is not a git repository; a workspace is made from a git clone of the project")
    if (repository / "data" / "manifest.csv").exists():
        raise ValueError(f"{repository} is itself a workspace; run abnloop from the project's own clone")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"{directory} exists already; name a new directory, or remove it")
    for folder in (images, masks):
        if folder and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
    if index is None and (images / "index.csv").is_file() and (images / "images").is_dir():
        index = images / "index.csv"

    if not directory.parent.is_dir():
        raise ValueError(f"{directory.parent} does not exist; make it first")

    given = _given(settings or {})
    _check_settings(repository, given)
    report = Report()
    sources = read_index(Path(index), images, masks) if index else _from_folders(images, masks)
    sources = _drop(sources, [_text(name) for name in drop], report)
    with _any_size():
        pictures = _without_duplicates(_read_all(sources, report, progress), report)
        _check_classes(sources, pictures)
        pictures = assign_splits(pictures, seed)
        choice = _choose(pictures, given)
        report.chosen, report.why = choice.settings, choice.why
        chosen = {"project.name": _safe(directory.name)[:40], **choice.settings, **given}
        _build_beside(directory, repository.resolve(), pictures, chosen, report, progress, hide_masks)
    return report


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


def assign_splits(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """Give a split to every picture that has none: train 0.7, val 0.15, test 0.15 of each class, a group never cut.

    The same for the same pictures and seed, in whatever order they come. Raises ValueError where given splits
    cut a group, where train, val or test end up with no picture, or a class with none in train.
    """
    units = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.source.id):
        group = picture.source.group
        units[("group", group) if group else ("alone", picture.source.id)].append(picture)

    totals = Counter(picture.source.label for picture in pictures if picture.source.split != "pool")
    wanted = {split: {label: share * count for label, count in totals.items()} for split, share in SHARES.items()}
    free = []
    for unit in units.values():
        side = _side(unit)
        for picture in unit:
            if picture.source.split in SHARES:
                wanted[picture.source.split][picture.source.label] -= 1
        labels = Counter(picture.source.label for picture in unit if not picture.source.split)
        if labels:
            free.append((unit, labels, side))

    random.Random(seed).shuffle(free)
    free.sort(key=lambda item: -item[1].total())  # large groups first: the small ones then even out
    chosen = {}
    for unit, labels, side in free:
        lacks = {
            split: sum(count * wanted[split][label] / totals[label] for label, count in labels.items())
            for split in SHARES
        }
        split = side or max(lacks, key=lambda split: lacks[split])
        for label, count in labels.items():
            wanted[split][label] -= count
        chosen.update({picture.source.id: split for picture in unit if not picture.source.split})

    done = [
        dataclasses.replace(
            picture,
            source=dataclasses.replace(picture.source, split=chosen.get(picture.source.id, picture.source.split)),
        )
        for picture in pictures
    ]
    for split in SHARES:
        if not any(picture.source.split == split for picture in done):
            raise ValueError(f"split {split} has no images ({len(done)} in all); add images, or name splits in the CSV")
    trained = {picture.source.label for picture in done if picture.source.split == "train"}
    for label in sorted({picture.source.label for picture in done} - trained - {""}):
        raise ValueError(f"class {label} has no images in split train; move some there, or leave it out with --drop")
    return done


def _side(unit: Sequence[Picture]) -> str:
    """The split that a group's given splits bind it to, or an empty text. A ValueError where they cut it.

    The pool is learned from once it is labeled, so it goes with train and with nothing else.
    """
    sides = {"train" if one.source.split == "pool" else one.source.split: one for one in unit if one.source.split}
    if len(sides) > 1:
        first, other = list(sides.values())[:2]
        raise ValueError(
            f"group {first.source.group} is cut: {first.source.name} is in {first.source.split}, "
            f"{other.source.name} in {other.source.split}; keep a group in one split"
        )
    return next(iter(sides), "")


def _from_folders(images: Path, masks: Path | None) -> list[Source]:
    """Pictures of class folders. Ids are the file names' stems, with the class before them where stems repeat."""
    folders = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{images} holds no class folders; it must look like {images.name}/<class>/<file>")
    files = []
    for folder in folders:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        if not found:
            raise ValueError(f"class {folder.name} has no images ({folder} is empty); add some, or remove the folder")
        files += [(path, _text(folder.name)) for path in found]
    ids = _ids(files)
    sources = [
        Source(one, f"{path.parent.name}/{path.name}", path, label, "", "", _mask_beside(masks, path.parent.name, path))
        for one, (path, label) in zip(ids, files, strict=True)
    ]
    return _checked(sources, masks)


def read_index(index: Path, images: Path, masks: Path | None = None) -> list[Source]:
    """Pictures of a CSV with columns among id, image, cls or label, split, group, mask; paths start at its folder.

    Raises ValueError, with the line where there is one, for what does not fit.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(index.read_text(encoding="utf-8-sig"), newline="")))
    except UnicodeDecodeError as error:
        raise ValueError(f"{index} is not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{index} is not a CSV file: {error}") from error
    if not rows or "image" not in rows[0]:
        raise ValueError(f"{index} needs a column image and a row for each picture")
    if "cls" in rows[0] and "label" in rows[0]:
        raise ValueError(f"{index} has both a column cls and a column label; keep one of them")

    def cell(row: dict[str, str], column: str) -> str:
        return _text(row.get(column) or "")

    def file(name: str, folder: Path | None) -> Path:
        beside = index.parent / name
        return folder / name if folder and not beside.exists() and (folder / name).exists() else beside

    files = [(file(cell(row, "image"), images), cell(row, "cls") or cell(row, "label")) for row in rows]
    ids = [cell(row, "id") for row in rows] if "id" in rows[0] else _ids(files)
    sources = []
    for number, (row, one, (path, label)) in enumerate(zip(rows, ids, files, strict=True), start=2):
        split = cell(row, "split") or ("" if label else "pool")
        if not cell(row, "image"):
            raise ValueError(f"{index} line {number} names no image")
        if split not in ("", *SPLITS):
            raise ValueError(f"{index} line {number}: split is {split}; choose one of {', '.join(SPLITS)}")
        if split != "pool" and not label:
            raise ValueError(f"{index} line {number}: {one} is in {split} without a label; only the pool may lack one")
        if "mask" in rows[0]:
            mask = file(cell(row, "mask"), masks) if cell(row, "mask") else None
        else:
            mask = _mask_beside(masks, label, path)
        sources.append(Source(one, cell(row, "image"), path, label, split, cell(row, "group"), mask))
    return _checked(sources, masks)


def _mask_beside(masks: Path | None, folder: str, image: Path) -> Path | None:
    mask = masks / folder / f"{image.stem}.png" if masks else None
    return mask if mask and mask.exists() else None


def _ids(files: Sequence[tuple[Path, str]]) -> list[str]:
    stems = [_safe(path.stem) for path, _ in files]
    if len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [_safe(f"{label}_{path.stem}") for path, label in files]


def _safe(text: str) -> str:
    """`text` as a file name: runs of anything but letters, digits, `_`, `-` and `.` become one `_`."""
    return re.sub(r"[^\w.-]+", "_", _text(text)).lstrip(".-") or "_"


def _text(text: str) -> str:
    """Without surrounding space, and composed: file systems differ in how they spell an accented letter."""
    return unicodedata.normalize("NFC", text.strip())


def _checked(sources: list[Source], masks: Path | None) -> list[Source]:
    """The sources, each with an id of its own that is safe as a file name and a label in one printable line."""
    seen: dict[str, Source] = {}
    for source in sources:
        if not source.id or source.id != _safe(source.id) or len(source.id.encode()) > 150:
            raise ValueError(f"id {source.id!r} ({source.name}) is not safe as a file name; use letters, digits, _ - .")
        other = seen.setdefault(source.id.casefold(), source)  # some file systems do not tell `A` from `a`
        if other is not source:
            raise ValueError(f"id {source.id} appears twice, for {other.name} and for {source.name}; rename one")
        if not source.label.isprintable():
            raise ValueError(f"class {source.label!r} ({source.name}) must be one line of printable text")
    if masks and not any(source.mask for source in sources):
        raise ValueError(
            f"no mask in {masks} belongs to an image; masks are {masks.name}/<class>/<stem of the image>.png"
        )
    return sources


def _drop(sources: list[Source], names: Sequence[str], report: Report) -> list[Source]:
    known = sorted({source.label for source in sources} - {""})
    for name in names:
        if name not in known:
            raise ValueError(f"--drop {name} is not a class{suggest(name, known)}")
        report.dropped[name] = sum(source.label == name for source in sources)
    return [source for source in sources if source.label not in names]


def _check_classes(sources: Sequence[Source], pictures: Sequence[Picture]) -> None:
    read = {picture.source.label for picture in pictures}
    for label in sorted({source.label for source in sources} - read - {""}):
        raise ValueError(f"class {label} has no images that can be read; mend them, or leave it out with --drop")
    if len(read - {""}) < 2:
        raise ValueError(f"{len(read - {''})} class with images; a classifier needs at least two")


def _read_all(sources: Sequence[Source], report: Report, progress: Progress) -> list[Picture]:
    pictures = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (source, seen) in enumerate(zip(sources, pool.map(read_source, sources), strict=True), start=1):
            if isinstance(seen, Picture):
                pictures.append(seen)
            else:
                report.unreadable.append({"image": source.name, "reason": seen})
            progress("reading images", done, len(sources))
    return pictures


@contextmanager
def _any_size() -> Iterator[None]:
    """Pillow's own limit is lower than ours and comes as a warning; ours is looked at before decoding."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_source(source: Source) -> Picture | str:
    """The picture, or the reason why it cannot be read. Raises ValueError for one that is too large."""
    try:
        with Image.open(source.path) as image:
            too_large = image.width * image.height > MAX_PIXELS
            if not too_large:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
                upright = ImageOps.exif_transpose(image) if turned else image
                return Picture(source, content_of(upright), upright.width, upright.height, turned)
    except Exception as error:  # noqa: BLE001 - on a broken file Pillow's decoders raise nearly anything
        return str(error).replace(str(source.path), source.name) or type(error).__name__
    raise ValueError(
        f"{source.name} has {image.width} x {image.height} pixels; "
        f"the limit is {MAX_PIXELS // 10**6} megapixels: shrink it, or take it out"
    )


def content_of(image: Image.Image) -> str:
    """What the picture shows, as the SHA-256 of its decoded pixels: as RGB, which is what the network reads. Raises
    ValueError for one of 32 bits a channel: it does not say what is white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}); save it with 8 or 16")
    deep = image.mode.startswith("I")  # 16 bits: RGB would clip them, and different pictures look the same
    pixels = image if deep else image.convert("RGB")
    digest = hashlib.sha256(f"{pixels.mode} {pixels.width} {pixels.height} ".encode())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def _without_duplicates(pictures: Sequence[Picture], report: Report) -> list[Picture]:
    """One picture for each content. A ValueError where the same content stands in two splits or under two classes."""
    kept: dict[str, Picture] = {}
    for picture in sorted(pictures, key=lambda picture: (not picture.source.split, picture.source.id)):
        first = kept.setdefault(picture.content, picture)
        if first is picture:
            continue
        one, other = first.source, picture.source
        if other.split not in ("", one.split):
            raise ValueError(
                f"{one.name} ({one.split}) and {other.name} ({other.split}) are the same picture in two splits; "
                "keep one"
            )
        if one.label != other.label:
            raise ValueError(
                f"{one.name} ({one.label or 'no class'}) and {other.name} ({other.label or 'no class'}) are the same "
                "picture under two classes; keep the right one"
            )
        report.duplicates.append({"image": other.name, "same_as": one.name})
    return sorted(kept.values(), key=lambda picture: picture.source.id)


def _build_beside(
    directory: Path,
    repository: Path,
    pictures: Sequence[Picture],
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
        _build(Workspace(building), repository, pictures, settings, report, progress, hide_masks)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(
    workspace: Workspace,
    repository: Path,
    pictures: Sequence[Picture],
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
    masked = [picture for picture in pictures if picture.source.mask]
    judged = [picture for picture in masked if picture.source.split in EVALUATION and not hide_masks]
    learned = [picture for picture in masked if picture.source.split not in EVALUATION or hide_masks]
    write_arrays(workspace.gold, _read_masks(judged, "reading the masks of the gold set", progress))
    if learned:
        write_arrays(workspace.simulation, _read_masks(learned, "reading the masks for simulated labelers", progress))
    workspace.start_model.touch()

    report.gold_masks, report.simulation_masks = len(judged), len(learned)
    for split in SPLITS:
        labels = Counter(picture.source.label for picture in pictures if picture.source.split == split)
        report.images[split] = dict(sorted(labels.items()))
    report.turned = [picture.source.name for picture in pictures if picture.turned]
    unseen = [name for name, file in files.items() if Path(file).suffix not in SHOWN_BY_BROWSERS]
    if unseen:
        report.warnings.append(
            f"{len(unseen)} images have a format that browsers do not show, such as {files[unseen[0]]}"
        )
    report.warnings += _unjudged(report.images)
    report.missing = _missing(len(judged), len(learned))
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


def copy_picture(picture: Picture, folder: Path) -> Path:
    """The picture in `folder` under its id: byte for byte, or as PNG where its EXIF orientation has to be applied."""
    path, name = picture.source.path, picture.source.id
    if not picture.turned:
        return Path(shutil.copyfile(path, folder / f"{name}{path.suffix.lower()}"))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        in_png = upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (upright if in_png else upright.convert("RGB")).save(folder / f"{name}.png")
    return folder / f"{name}.png"


def _read_masks(pictures: Sequence[Picture], what: str, progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """(sample id, mask) for each picture in turn."""
    for done, picture in enumerate(pictures, start=1):
        yield picture.source.id, read_mask(picture)
        progress(what, done, len(pictures))


def read_mask(picture: Picture) -> np.ndarray:
    """The picture's mask, uint8 (height, width), 255 where something is painted and 0 elsewhere.

    Painted: white or brighter than mid-grey; in a mask of the values 0 and 1, or with a palette, whatever is not 0 or
    black. Transparent pixels are not painted. Raises ValueError for a mask that is unreadable or of another size.
    """
    source = picture.source
    assert source.mask is not None
    try:
        with Image.open(source.mask) as image:
            if (image.width, image.height) != (picture.width, picture.height):
                size = f"{image.width} x {image.height}"
            else:
                return np.where(_painted(image), np.uint8(255), np.uint8(0))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the mask of {source.name} cannot be read: {error}; mend it, or take it out") from error
    raise ValueError(
        f"the mask of {source.name} has {size} pixels, the image {picture.width} x {picture.height}; "
        "a mask has the size of its upright image"
    )


def _painted(image: Image.Image) -> np.ndarray:
    if image.mode in ("1", "L") or image.mode[0] in "IF":
        values = np.asarray(image)
        middle = 0 if values.max() <= 1 else 127 if values.max() <= 255 else 32767
        return values > middle
    colours = np.asarray(image.convert("RGBA"))
    return (colours[..., :3].max(axis=-1) > (0 if image.mode in ("P", "PA") else 127)) & (colours[..., 3] > 127)


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
