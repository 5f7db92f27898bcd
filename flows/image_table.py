"""A CSV of images: which file, class, split, group and mask."""

from __future__ import annotations

import csv
import difflib
import io
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from flows.file_names import shown, text_of
from flows.ingest_report import Report, some
from flows.mask_files import MaskFolder
from flows.sources import SPLIT_NAMES, Source, check_masks, check_sources, unique_ids

COLUMNS = ("id", "image", "label", "split", "group", "mask")
LABEL = ("cls", "class")  # other names of the column label
# How programs write a cell without a value. "none" in small letters is a class of its own in many data sets.
NO_VALUE = ("nan", "NaN", "NAN", "None", "NA", "N/A", "n/a", "NULL", "null", "NaT", "<NA>", "#N/A")
SPLITS = ("train", "val", "test", "pool")


def read_index(index: Path, images: Path, masks: Path | None = None) -> list[Source]:
    """Pictures of a CSV with columns among id, image, cls or label, split, group, mask; paths start at its folder, or
    else at `images`.

    Raises ValueError, with the line where there is one, for what does not fit.
    """
    report = Report()
    folder = MaskFolder(masks) if masks else None
    sources = read_table(index, images, folder, report)
    check_sources(sources, report)
    if folder:
        check_masks(sources, folder, report)
    report.decided()
    return sources


def read_table(index: Path, images: Path, masks: MaskFolder | None, report: Report) -> list[Source]:
    """As `read_index`, with problems and what is worth telling in the report. Raises ValueError for a file that is no
    such table at all."""
    rows, columns = _rows(index, report)
    files = _Files(index.parent, images)
    mask_files = _Files(index.parent, masks.folder if masks else None)
    at: list[tuple[int, dict[str, str], Path, str]] = []
    missing: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for line, row in rows:
        for column in ("image", "label", "split", "group", "mask"):
            if row[column] in NO_VALUE:
                missing[column, row[column]].append(line)
        if not row["image"]:
            report.problems.append(f"{index} line {line} names no image")
        else:
            at.append((line, row, files.find(row["image"]), row["label"]))
    for (column, value), lines in missing.items():
        report.problems.append(
            f"{index} line {lines[0]}: {column} is {value} (in {len(lines)} rows), as programs write an empty cell; "
            f"empty it where the {column} is not known, or rename it"
        )
    names = [(PurePosixPath(row["image"].replace("\\", "/")), label) for _, row, _, label in at]
    ids = (
        [row["id"] for _, row, _, _ in at] if "id" in columns else unique_ids([(Path(n), label) for n, label in names])
    )
    sources = []
    for one, (line, row, path, label) in zip(ids, at, strict=True):
        split = SPLIT_NAMES.get(row["split"].casefold(), row["split"]) or ("" if label else "pool")
        if split not in ("", *SPLITS) and split not in NO_VALUE:
            report.problems.append(f"{index} line {line}: split is {split}; choose one of {', '.join(SPLITS)}")
        if split != "pool" and not label:
            report.problems.append(
                f"{index} line {line}: {one} is in {split} without a label; only the pool may lack one"
            )
        mask = None
        if "mask" in columns:
            mask = mask_files.find(row["mask"]) if row["mask"] else None
        elif masks:
            mask = masks.of(_below(path, images), label)
        sources.append(Source(one, text_of(row["image"]), path, label, split, row["group"], mask))
    for what, found in (("images", files), ("masks", mask_files)):
        if found.otherwise:
            report.read.append(
                f"{len(found.otherwise)} {what} are spelled otherwise in {index.name} than on the disk (accents, "
                f"upper case or backslashes): {some(found.otherwise)}"
            )
    return sources


def _below(path: Path, images: Path) -> Path:
    return path.relative_to(images) if path.is_relative_to(images) else Path(path.parent.name, path.name)


def _rows(index: Path, report: Report) -> tuple[list[tuple[int, dict[str, str]]], set[str]]:
    """(line, cells by column) of each row, and the columns that the table has. A missing column is empty."""
    try:
        text = index.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{index} is not UTF-8 text; save it as CSV in UTF-8") from error
    delimiter = _delimiter(text)
    if delimiter != ",":
        report.read.append(f"{index.name} separates cells by {'a tab' if delimiter == chr(9) else delimiter}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    body: list[list[str]] = []
    odd: dict[int, int] = {}  # line -> its cells, where they are not as many as the header's
    try:
        header = next(reader, [])
        columns = _columns(index, header, report)
        line = reader.line_num + 1
        for cells in reader:
            body.append(cells)
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    odd[line] = len(cells)
                row = dict.fromkeys(COLUMNS, "")
                row |= {name: cell.strip() for name, cell in zip(columns, cells, strict=False) if name in row}
                for name in ("id", "label", "split", "group"):
                    row[name] = text_of(row[name])  # paths stay as they are, for file systems tell their spellings
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{index} line {reader.line_num} is not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{index} needs a column image and a row for each picture")
    if odd:
        line, count = next(iter(odd.items()))
        report.problems.append(
            f"{index} line {line} has {count} cells and the header {len(header)} ({len(odd)} such rows); put a cell "
            f'that holds {delimiter!r} into "double quotes", and give every row all cells'
        )
        rows = [(line, row) for line, row in rows if line not in odd]
    _check_unused(index, columns, body, report)
    return rows, set(columns)


def _delimiter(text: str) -> str:
    """A comma, unless the header has none, but semicolons or tabs."""
    header = text.partition("\n")[0]
    return next((one for one in (",", ";", "\t") if one in header), ",")


def _columns(index: Path, header: Sequence[str], report: Report) -> list[str]:
    """The header's names as COLUMNS spell them, others as they are. Raises ValueError without images."""
    columns = []
    for name in map(text_of, header):
        known = name.casefold()
        known = "label" if known in LABEL else known
        columns.append(known if known in COLUMNS else name)
    if "image" not in columns:
        close = difflib.get_close_matches("image", [name.casefold() for name in columns], n=1, cutoff=0.6)
        hint = f"; rename {close[0]}" if close else ""
        raise ValueError(f"{index} needs a column image and a row for each picture{hint}")
    for name in COLUMNS:
        if columns.count(name) > 1:
            both = [text_of(one) for one, column in zip(header, columns, strict=True) if column == name]
            raise ValueError(f"{index} has both a column {both[0]} and a column {both[1]}; keep one of them")
    return columns


def _check_unused(index: Path, columns: Sequence[str], rows: Sequence[Sequence[str]], report: Report) -> None:
    """Tells the columns that are not used; one that is nearly a known one, or holds splits, is a problem."""
    unused = [name for name in columns if name not in COLUMNS]
    for name in unused:
        number = columns.index(name)
        values = {row[number].strip().casefold() for row in rows if len(row) > number} - {""}
        near = difflib.get_close_matches(name.casefold(), ("label", *LABEL, "split", "group", "mask"), 1, cutoff=0.75)
        meant = "label" if near and near[0] in LABEL else near[0] if near else ""
        if len(values) > 1 and values <= set(SPLIT_NAMES):
            meant = "split"
        if meant and meant not in columns:
            report.problems.append(
                f"{index} line 1: column {name} is not known, and looks like {meant}; rename it to {meant}, or "
                "remove it"
            )
    if unused:
        report.warnings.append(
            f"{len(unused)} columns of {index.name} are not used: {', '.join(name or '(no name)' for name in unused)}"
        )


class _Files:
    """Finds the files that a table names, below `first` or else below `second`."""

    def __init__(self, first: Path, second: Path | None) -> None:
        self.folders = [first, *([second] if second else [])]
        self.otherwise: list[str] = []  # names that are spelled in another way on the disk
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path:
        """The file of that name: as it stands, or the one that differs in accents' composition, case or slashes."""
        for folder in self.folders:
            if (folder / name).exists():
                return folder / name
        for folder in self.folders:
            if path := self._spelled(folder, name.replace("\\", "/")):
                self.otherwise.append(shown(name))
                return path
        return self.folders[0] / name

    def _spelled(self, folder: Path, name: str) -> Path | None:
        path = Path("/") if name.startswith("/") else folder
        for part in PurePosixPath(name.lstrip("/")).parts:
            if part == ".." or (path / part).exists():
                path /= part
                continue
            if path not in self._listed:
                self._listed[path] = self._list(path)
            known = self._listed[path]
            composed = unicodedata.normalize("NFC", part)
            found = known.get(composed) or known.get(composed.casefold())
            if found is None:
                return None
            path = found
        return path

    @staticmethod
    def _list(folder: Path) -> dict[str, Path]:
        """Files by composed name, and by its small letters where no other file shares them."""
        if not folder.is_dir():
            return {}
        known, folded = {}, defaultdict(list)
        for path in folder.iterdir():
            name = unicodedata.normalize("NFC", path.name)
            known[name] = path
            folded[name.casefold()].append(path)
        return {name: paths[0] for name, paths in folded.items() if len(paths) == 1} | known
