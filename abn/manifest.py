"""The manifest and what people said about it: which samples there are, and what is known of each. No torch."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

SPLITS = ("train", "val", "test", "pool")
EVALUATION = ("val", "test")  # nothing learns from their samples
GOLD_MASKS = "data/gold.npz"  # masks of evaluation samples that were given at `abnloop init`
GOLD_TABLE = "data/gold.csv"  # what labelers said of evaluation samples
DISPUTED = "disputed"  # the verdict where a labeler doubts an evaluation sample and no second one has agreed yet
MANIFEST_COLUMNS = ("id", "image", "label", "split", "group")
CORRECTION_COLUMNS = (
    *("sample", "round", "annotation", "revision", "labeler", "verdict", "label"),
    *("minutes", "model_version", "masks", "sha256", "weight", "moved"),
)
# Columns that tables from before they existed lack, and what they would have held.
LATER_COLUMNS = {"weight": "1", "moved": ""}
WITHDRAWAL_COLUMNS = ("time", "action", "annotation", "sample", "labeler", "round", "why")
MANY_MASKS = 10  # painted ones, from which on the annotator can spare some to be judged by


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture as training sees it: the manifest's row after the corrections. There may be a million of them."""

    id: str
    image: str  # relative to the workspace
    label: str  # empty: not known
    split: str
    masks: str = ""  # the file of masks that holds this sample's; empty: nobody gave one
    sha256: str = ""  # of that mask's bytes
    painted: bool = False  # a person made the mask; else it is a map of the network that a person called fine
    weight: float = 1.0  # 0..1, of the mask in the loss: how far the labelers who gave it agree; 1 where it was one


def read_manifest(root: str | Path, corrected: bool = True, gold: bool = True) -> list[Sample]:
    """The samples of data/manifest.csv, in its order, each with what people said of it: a sample to learn from with its
    correction of data/corrections.csv, a sample of val or test with its row of data/gold.csv.

    Either may bring a mask or another label; one that calls a picture unusable takes it out, and so does a class of
    an evaluation sample that is in dispute (`DISPUTED`). The manifest stays as it is, so what is withdrawn undoes
    itself. `corrected=False` leaves the corrections out, `gold=False` what was said of evaluation samples: training
    must not depend on that. Raises ValueError naming file and row.
    """
    root = Path(root)
    rows = _read_csv(root / "data/manifest.csv", MANIFEST_COLUMNS)
    corrections = read_corrections(root) if corrected else {}
    labeled = read_gold(root) if gold else {}
    samples = []
    for line, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise ValueError(f"data/manifest.csv line {line}: split is {row['split']!r}; use {', '.join(SPLITS)}")
        if not row["label"] and row["split"] != "pool":
            raise ValueError(f"data/manifest.csv line {line}: {row['id']} has no label; only the pool may lack one")
        sample = Sample(row["id"], row["image"], row["label"], row["split"])
        correction = (labeled if sample.split in EVALUATION else corrections).get(sample.id)
        if correction and correction["verdict"] in ("unusable", DISPUTED):
            continue
        if correction:
            label = correction["label"] or sample.label
            sample = replace(sample, label=label, masks=correction["masks"], sha256=correction["sha256"])
            painted = bool(sample.masks) and correction["verdict"] != "map_ok"
            sample = replace(sample, painted=painted, weight=_weight(correction))
        samples.append(sample)
    return samples


def read_corrections(root: str | Path, withdrawn: bool = False) -> dict[str, dict[str, str]]:
    """The rows of data/corrections.csv by sample id: what people said so far, as far as it counts; `withdrawn` adds
    what no longer does. Where several people answered a sample, none of their annotations may be withdrawn."""
    return _read_statements(root, "data/corrections.csv", withdrawn)


def read_gold(root: str | Path, withdrawn: bool = False) -> dict[str, dict[str, str]]:
    """The rows of data/gold.csv by sample id: what labelers said of samples of val and test, as `read_corrections`
    gives what they said of others. None in a workspace that has no such file."""
    return _read_statements(root, GOLD_TABLE, withdrawn) if (Path(root) / GOLD_TABLE).is_file() else {}


def _read_statements(root: str | Path, path: str, withdrawn: bool) -> dict[str, dict[str, str]]:
    needed = [name for name in CORRECTION_COLUMNS if name not in LATER_COLUMNS]
    rows = _read_csv(Path(root) / path, needed)
    out = set() if withdrawn else read_withdrawn(root)
    return {
        row["sample"]: {**LATER_COLUMNS, **row}
        for row in rows
        if out.isdisjoint((annotation, row["sample"]) for annotation in row["annotation"].split(" "))
    }


def read_withdrawn(root: str | Path) -> set[tuple[str, str]]:
    """Annotation and sample of what data/withdrawals.csv takes out of the training set.

    It only ever grows: of several lines about one annotation the last counts, and `restore` lets it count again.
    """
    path = Path(root) / "data/withdrawals.csv"
    rows = _read_csv(path, WITHDRAWAL_COLUMNS) if path.is_file() else []
    last = {(row["annotation"], row["sample"]): row["action"] for row in rows}
    return {annotation for annotation, action in last.items() if action == "withdraw"}


def _weight(correction: Mapping[str, str]) -> float:
    try:
        weight = float(correction["weight"] or 1)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1:
        raise ValueError(
            f"the weight of sample {correction['sample']} is {correction['weight']!r}; it must be from 0 to 1: "
            "restore data/corrections.csv and data/gold.csv with git"
        )
    return weight


def class_names(samples: Sequence[Sample]) -> list[str]:
    """The classes, sorted, of all that is labeled. Raises ValueError for fewer than two, or one never trained on."""
    classes = sorted({sample.label for sample in samples if sample.label})
    if len(classes) < 2:
        raise ValueError(f"data/manifest.csv has {len(classes)} class(es) {classes}; a classifier needs at least 2")
    trained = {sample.label for sample in samples if sample.split in ("train", "pool")}
    if missing := [name for name in classes if name not in trained]:
        raise ValueError(f"class {missing[0]} has no images to train on; move some of its rows to split train")
    return classes


def training_samples(samples: Sequence[Sample]) -> list[Sample]:
    """What a network may learn from: split train, and whatever of the pool has a label by now."""
    return [sample for sample in samples if sample.split == "train" or (sample.split == "pool" and sample.label)]


def without_loose_masks(samples: Sequence[Sample]) -> list[Sample]:
    """The samples, without the maps of a network that people called fine beside a few painted masks.

    A map that is fine tells where to look and not where an object ends. Fewer painted masks than `MANY_MASKS` teach
    more without such maps; beside many they are examples more (both measured, benchmarks/README.md), and where nobody
    has painted they are all that is known.
    """
    painted = sum(sample.painted for sample in samples)
    if not 0 < painted < MANY_MASKS:
        return list(samples)
    return [sample if sample.painted else replace(sample, masks="", sha256="") for sample in samples]


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; make a workspace with `abnloop init`")
    return _rows(path, columns)


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """One after the other: those of a large manifest would fill more memory than its samples."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
            raise ValueError(f"{path} has no column {missing[0]}; it needs {','.join(columns)}")
        yield from reader


class MaskShards:
    """Masks by file and sample id. Each file is opened once; a mask must be the one that the index names."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._open: dict[str, np.lib.npyio.NpzFile] = {}

    def get(self, file: str, sample: str, sha256: str = "") -> UInt8[np.ndarray, "H W"]:
        if file not in self._open:
            path = self.root / file
            if not path.is_file():
                raise ValueError(f"{path} is missing; restore it with `dvc checkout` or `dvc pull`")
            self._open[file] = np.load(path, allow_pickle=False)
        if sample not in self._open[file]:
            raise ValueError(f"{file} holds no mask of sample {sample}; restore it with `dvc checkout`")
        mask = self._open[file][sample]
        if sha256 and mask_sha256(mask) != sha256:
            raise ValueError(f"the mask of sample {sample} in {file} is not the one that was collected; `dvc checkout`")
        return mask

    def gold(self, sample: Sample) -> UInt8[np.ndarray, "H W"] | None:
        """The mask by which attention on an evaluation sample is judged: a labeler's, else the one given at
        `abnloop init`; None for a sample without one, or one that is learned from."""
        if sample.split in EVALUATION and sample.masks:
            return self.get(sample.masks, sample.id, sample.sha256)
        return self.get(GOLD_MASKS, sample.id) if self.has_gold(sample) else None

    def has_gold(self, sample: Sample) -> bool:
        """Whether `gold` gives a mask, without reading it."""
        return sample.split in EVALUATION and (bool(sample.masks) or self.holds(GOLD_MASKS, sample.id))

    def holds(self, file: str, sample: str) -> bool:
        path = self.root / file
        if file not in self._open and path.is_file():
            self._open[file] = np.load(path, allow_pickle=False)
        return file in self._open and sample in self._open[file]

    def close(self) -> None:
        """Files are opened anew when they are next asked for."""
        self._open.clear()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # an open file cannot be sent to another process


def mask_sha256(mask: UInt8[np.ndarray, "H W"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(mask).tobytes()).hexdigest()
