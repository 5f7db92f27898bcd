"""A workspace small enough to train on in a second, for the tests of abn."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from abn.config import make_section, read_params
from abn.data import DataConfig
from abn.manifest import CORRECTION_COLUMNS, MANIFEST_COLUMNS, mask_sha256
from abn.model import ModelConfig
from abn.train import CorrectionsConfig, Settings, TrainConfig
from flows.digits import write_digits

PROJECT = Path(__file__).parent.parent
SIZE = 16  # of a picture's sides, in pixels
SHARD = "rounds/0001/masks.npz"
TINY: dict[str, dict[str, Any]] = {
    "data": {"size": [SIZE, SIZE], "shift": 1},
    "model": {"backbone": "cifar_resnet8"},
    "train": {"epochs": 3, "batch_size": 8, "device": "cpu"},
}


@dataclass(frozen=True)
class Row:
    """A row of the manifest."""

    id: str
    label: str = "light"
    split: str = "train"

    @property
    def image(self) -> str:
        return f"data/images/{self.id}.png"


ROWS = [
    *(Row(f"train{i:02d}", "light" if i % 2 else "dark") for i in range(20)),
    *(Row(f"val{i}", "light" if i % 2 else "dark", "val") for i in range(4)),
    *(Row(f"test{i}", "light" if i % 2 else "dark", "test") for i in range(4)),
    *(Row(f"pool{i}", "", "pool") for i in range(2)),
]


def tiny_settings(**changes: Mapping[str, Any]) -> Settings:
    """params.yaml of the project with TINY and then `changes` laid over, a mapping a section."""
    params = read_params(PROJECT / "params.yaml")
    chosen = {name: {**params[name], **TINY.get(name, {}), **changes.get(name, {})} for name in params}
    return Settings(
        make_section(DataConfig, chosen["data"], "data"),
        make_section(ModelConfig, chosen["model"], "model"),
        make_section(TrainConfig, chosen["train"], "train"),
        make_section(CorrectionsConfig, chosen["corrections"], "corrections"),
    )


def write_params(root: Path, epochs: int) -> None:
    """params.yaml of the project with TINY laid over, and a budget that the tiny workspace can fill."""
    params = read_params(PROJECT / "params.yaml")
    changes = {**TINY, "train": {**TINY["train"], "epochs": epochs}, "selection": {"budget": 6}}
    (root / "params.yaml").write_text(
        yaml.safe_dump({name: {**params[name], **changes.get(name, {})} for name in params})
    )


def make_workspace(root: Path, rows: Sequence[Row] = tuple(ROWS)) -> Path:
    """Pictures that show squares; see `write_workspace`."""
    pictures = [picture(number, row.label) for number, row in enumerate(rows)]
    return write_workspace(root, rows, pictures, [square(number) for number in range(len(rows))])


def write_workspace(
    root: Path, rows: Sequence[Row], pictures: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> Path:
    """Pictures, manifest, corrections without a row, the gold masks of val and test, an empty models/start.pt."""
    (root / "data/images").mkdir(parents=True)
    (root / "models").mkdir()
    (root / "models/start.pt").touch()
    for row, image in zip(rows, pictures, strict=True):
        Image.fromarray(image).save(root / row.image)
    gold = {row.id: mask for row, mask in zip(rows, masks, strict=True) if row.split in ("val", "test")}
    np.savez(root / "data/gold.npz", allow_pickle=False, **gold)
    manifest = [{**asdict(row), "image": row.image, "group": ""} for row in rows]
    write_csv(root / "data/manifest.csv", MANIFEST_COLUMNS, manifest)
    write_csv(root / "data/corrections.csv", CORRECTION_COLUMNS, [])
    return root


def write_few_digits(folder: Path, classes: Collection[str], counts: Mapping[str, int]) -> Path:
    """The digits of the demo, `counts` of each class by split, into `folder`; the path of their index."""
    with write_digits(folder).open(newline="", encoding="utf-8") as file:
        rows, seen, chosen = list(csv.DictReader(file)), Counter[tuple[str, str]](), []
    for row in rows:
        kind = (row["label"], row["split"])
        if row["label"] in classes and seen[kind] < counts[row["split"]]:
            seen[kind] += 1
            chosen.append(row)
    write_csv(folder / "few.csv", list(rows[0]), chosen)
    return folder / "few.csv"


def correct(root: Path, masks: Mapping[str, np.ndarray], verdict: str = "map_fixed") -> None:
    """Every sample of `masks` gets its mask as a correction; earlier corrections go."""
    (root / SHARD).parent.mkdir(parents=True, exist_ok=True)
    np.savez(root / SHARD, allow_pickle=False, **masks)
    rows = [correction(name, verdict, masks=SHARD, sha256=mask_sha256(mask)) for name, mask in masks.items()]
    write_csv(root / "data/corrections.csv", CORRECTION_COLUMNS, rows)


def correction(sample: str, verdict: str, **columns: str) -> dict[str, str]:
    return {**dict.fromkeys(CORRECTION_COLUMNS, ""), "sample": sample, "verdict": verdict, **columns}


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def square(number: int) -> np.ndarray:
    """The mask of picture `number`: 0 or 255, a 6x6 square at a place of its own."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    top, left = number * 3 % (SIZE - 6), number * 7 % (SIZE - 6)
    mask[top : top + 6, left : left + 6] = 255
    return mask


def picture(number: int, label: str) -> np.ndarray:
    """Noise, with the square of `square(number)` in the brightness of the class."""
    image = np.random.default_rng(number).integers(40, 160, (SIZE, SIZE, 3)).astype(np.uint8)
    image[square(number) > 0] = {"light": 250, "dark": 5}.get(label, 128)
    return image
