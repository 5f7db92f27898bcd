"""The user's image files and what folders say about them: class, split, mask."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.file_names import is_passed_over, shown, text_of
from flows.ingest_report import Report, some
from flows.mask_files import MaskFolder, without_ending

SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
    "pool": "pool",
}
MAX_ID_BYTES = 150


@dataclass(frozen=True)
class Source:
    """One picture as the user has it. `split` is empty where we choose; `mask` is a file or None."""

    id: str
    name: str  # for messages and the report: the path below the folder of the pictures, or the cell of the CSV
    path: Path
    label: str
    split: str
    group: str
    mask: Path | None


def read_folders(images: Path, masks: MaskFolder | None, report: Report) -> list[Source]:
    """Pictures of IMAGES/<class>/..., or of IMAGES/<split>/<class>/... where all folders are named like splits.

    What is nested deeper belongs to the class all the same. Ids are the file names' stems, with as much of the path
    before them as makes them unique. Problems go to the report. Raises ValueError where no class folders are found.
    """
    root = images
    folders, files = _entries(root)
    while len(folders) == 1 and not files:  # as archives unpack: one folder around all
        inner, beside = _entries(folders[0])
        if len(inner) < 2 or beside:
            break
        root, folders, files = folders[0], inner, beside
        report.read.append(f"class folders are read from {root.relative_to(images.parent)}")
    if not folders:
        raise ValueError(f"{images} holds no class folders; it must look like {images.name}/<class>/<file>")
    if {"images", "masks"} <= {folder.name.casefold() for folder in folders}:
        raise ValueError(f"{root} holds images/ and masks/; give them as --images and --masks")
    if files:
        names = [shown(path.name) for path in files]
        report.warnings.append(f"{len(files)} files beside the class folders are not read: {some(names)}")

    splits = {folder: SPLIT_NAMES.get(folder.name.casefold(), "") for folder in folders}
    named = [folder for folder in folders if splits[folder]]
    is_layout = "train" in splits.values() and len(set(splits.values()) - {""}) > 1
    if is_layout and len(named) < len(folders):
        others = [shown(folder.name) for folder in folders if not splits[folder]]
        raise ValueError(
            f"{root} holds folders named like splits ({some([one.name for one in named])}) beside others "
            f"({some(others)}); keep either <split>/<class> or <class> folders, or name both in a CSV (--index)"
        )
    if is_layout:
        report.read.append(f"splits are read from the folders {', '.join(folder.name for folder in folders)}")
        found = [entry for folder in folders for entry in _of_split(folder, splits[folder], report)]
    else:
        found = [(path, folder.name, "") for folder in folders for path in _files_of_class(folder, report)]
        _check_nesting(root, found)

    relative = [path.relative_to(root) for path, _, _ in found]
    nested = [
        str(name)
        for (path, folder, _), name in zip(found, relative, strict=True)
        if folder and path.parent.name != folder
    ]
    if nested:
        report.read.append(
            f"{len(nested)} images lie in folders below their class, such as {shown(nested[0])}; if such a folder is "
            "a series of shots of one object, give it a group in a CSV (--index), so that no split cuts it"
        )
    labels = [_label(folder, report) for _, folder, _ in found]
    folders_of = defaultdict(set)
    for (_, folder, _), label in zip(found, labels, strict=True):
        folders_of[label].add(folder)
    for label, several in folders_of.items():
        if len(several) > 1:
            report.read.append(f"class {label} is read from {len(several)} folders, which differ in accents or spaces")
    below = [path.parts[1:] if is_layout else path.parts for path in relative]
    ids = unique_ids([(Path(*parts), label) for parts, label in zip(below, labels, strict=True)])
    return [
        Source(one, shown(str(name)), path, label, split, "", masks.of(name, label) if masks else None)
        for one, name, label, (path, _, split) in zip(ids, relative, labels, found, strict=True)
    ]


def _of_split(folder: Path, split: str, report: Report) -> Iterator[tuple[Path, str, str]]:
    """(path, class folder, split) of the pictures of one split's folder; those of the pool may lie without a class."""
    classes, direct = _entries(folder)
    if direct and split != "pool":
        report.problems.append(
            f"{len(direct)} files lie directly in {folder.name}/, such as {shown(direct[0].name)}; "
            f"put them into {folder.name}/<class>/, or remove them"
        )
    elif direct:
        yield from ((path, "", split) for path in direct)
    for one in classes:
        yield from ((path, one.name, split) for path in _files_of_class(one, report))


def _files_of_class(folder: Path, report: Report) -> list[Path]:
    files = list(_walk(folder, report, (os.path.realpath(folder.parent),)))
    label = shown(folder.name)
    if not files:
        report.problems.append(
            f"class {label} has no images ({shown(str(folder))} is empty); add some, or remove the folder"
        )
    return files


def _check_nesting(root: Path, found: Sequence[tuple[Path, str, str]]) -> None:
    """Raises ValueError where two levels of folders could be the classes."""
    above = defaultdict(set)
    for path, folder, _ in found:
        below = path.relative_to(root / folder).parts
        if len(below) == 1:
            return
        above[below[0].casefold()].add(folder)
    for name, parents in sorted(above.items()):
        if len(parents) > 1:
            first, other = sorted(parents)[:2]
            raise ValueError(
                f"{root} holds {first}/{name} and {other}/{name} and no images above them, so that either level "
                "could be the class; make it IMAGES/<class>/, or name the classes in a CSV (--index)"
            )


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in `folder`, by name, without hidden ones and those of operating systems."""
    folders: list[Path] = []
    files: list[Path] = []
    for path in sorted(folder.iterdir()):
        if not is_passed_over(path.name):
            (folders if path.is_dir() else files).append(path)
    return folders, files


def _walk(folder: Path, report: Report, above: tuple[str, ...]) -> Iterator[Path]:
    """Every file below `folder`. A link to a folder around itself is not followed."""
    real = os.path.realpath(folder)
    if real in above:
        report.warnings.append(f"{shown(str(folder))} links to a folder around itself and is not read")
        return
    folders, files = _entries(folder)
    yield from files
    for one in folders:
        yield from _walk(one, report, (*above, real))


def _label(folder: str, report: Report) -> str:
    label = text_of(shown(folder))
    if shown(folder) != folder:
        problem = f"the name of class folder {label} is not UTF-8; rename it"
        if problem not in report.problems:
            report.problems.append(problem)
    return label


def check_sources(sources: Sequence[Source], report: Report) -> None:
    """Problems for ids that are unsafe or appear twice, for class names that are unprintable or nearly alike, and for
    masks among the images."""
    _check_masks_among(sources, report)
    seen: dict[str, Source] = {}
    for source in sources:
        if not source.id or source.id != safe_name(source.id) or len(source.id.encode()) > MAX_ID_BYTES:
            report.problems.append(
                f"id {source.id!r} ({source.name}) is not safe as a file name; use letters, digits, _ - ."
            )
        other = seen.setdefault(source.id.casefold(), source)  # some file systems do not tell `A` from `a`
        if other is not source:
            report.problems.append(f"id {source.id} appears twice, for {other.name} and for {source.name}; rename one")
    counts: defaultdict[str, list[Source]] = defaultdict(list)
    for source in sources:
        counts[source.label].append(source)
    alike = defaultdict(list)
    for label in sorted(counts):
        if not label.isprintable():
            report.problems.append(f"class {label!r} ({counts[label][0].name}) must be one line of printable text")
        alike[re.sub(r"[\s_-]+", " ", label).casefold()].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            told = ", ".join(f"{label} ({len(counts[label])} images)" for label in labels)
            report.problems.append(
                f"classes {told} differ in upper and lower case or in spaces only; give them one name, "
                "or names that differ"
            )


def _check_masks_among(sources: Sequence[Source], report: Report) -> None:
    known = {(source.path.parent, source.path.stem) for source in sources}
    masks = [
        source.name
        for source in sources
        if (stem := without_ending(source.path.stem)) != source.path.stem and (source.path.parent, stem) in known
    ]
    if masks:
        report.problems.append(
            f"{len(masks)} images look like masks of images beside them: {some(masks)}; move masks to another folder "
            "(--masks), or rename what is none"
        )


def check_masks(sources: Sequence[Source], masks: MaskFolder, report: Report) -> None:
    """Problems for masks that fit no picture or several, and a warning for those that are not used."""
    used: defaultdict[Path, list[str]] = defaultdict(list)
    for source in sources:
        if source.mask and (source.mask.is_relative_to(masks.folder) or not masks.asked):
            used[source.mask].append(source.name)
    if not used:
        report.problems.append(
            f"no mask in {masks.folder} belongs to an image; masks are {masks.folder.name}/<class>/<stem of the image>"
            ".png"
        )
        return
    for mask, names in used.items():
        if len(names) > 1 and masks.asked:  # a table may give one mask to several images
            report.problems.append(
                f"mask {shown(str(mask.relative_to(masks.folder)))} fits {len(names)} images, {some(names)}; "
                "name masks like their images with all folders, or in a CSV (--index)"
            )
    for name, files in masks.repeated():
        report.problems.append(f"{some([shown(str(file)) for file in files])} are masks of one image, {name}; keep one")
    if masks.by_ending:
        report.read.append(
            f"{len(masks.by_ending)} masks have the name of their image and an ending: {some(masks.by_ending)}"
        )
    if unused := masks.unused(used):
        report.warnings.append(
            f"{len(unused)} masks belong to no image: {some([shown(str(path)) for path in unused])}; "
            "a mask has the name of its image"
        )
    for label in sorted({source.label for source in sources} - {source.label for source in sources if source.mask}):
        if label:
            report.warnings.append(f"class {label} has no masks, though others have")


def unique_ids(files: Sequence[tuple[Path, str]]) -> list[str]:
    """An id for each (path, class): stems, with class, folders and suffix added only as far as they are needed."""
    choices = (
        lambda path, label: path.stem,
        lambda path, label: f"{label}_{path.stem}",
        lambda path, label: "_".join(path.with_suffix("").parts),
        lambda path, label: "_".join(path.parts).replace(".", "_"),
    )
    ids: list[str] = []
    for choose in choices:
        ids = [safe_name(shown(choose(path, label))) for path, label in files]
        if len({one.casefold() for one in ids}) == len(ids):
            return ids
    return _numbered([safe_name(shown(f"{label}_{path.stem}")) for path, label in files])


def _numbered(ids: Sequence[str]) -> list[str]:
    """The ids, those that repeat with a number after them."""
    taken, numbered = set[str](), []
    for one in ids:
        name, number = one, 1
        while name.casefold() in taken:
            number += 1
            name = f"{one}_{number}"
        taken.add(name.casefold())
        numbered.append(name)
    return numbered


def safe_name(text: str) -> str:
    """`text` as a file name: runs of anything but letters, digits, `_`, `-` and `.` become one `_`."""
    return re.sub(r"[^\w.-]+", "_", text_of(text)).lstrip(".-") or "_"
