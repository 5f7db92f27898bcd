from __future__ import annotations

import csv
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.digits import COLOURS, PATCH, SIDE, TRAIN, VAL, write_digits


@dataclass(frozen=True)
class Digits:
    folder: Path
    index: Path
    rows: list[dict[str, str]]
    pictures: np.ndarray  # (n, h, w, 3) uint8
    masks: np.ndarray  # (n, h, w) uint8


def read(folder: Path, seed: int = 0) -> Digits:
    index = write_digits(folder, seed)
    with index.open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = np.stack([np.array(Image.open(folder / row["image"])) for row in rows])
    masks = np.stack([np.array(Image.open(folder / row["mask"])) for row in rows])
    return Digits(folder, index, rows, pictures, masks)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return read(tmp_path_factory.mktemp("digits"))


def told(digits: Digits) -> np.ndarray:
    """The class that each patch's colour tells."""
    patches = digits.pictures[:, :PATCH, :PATCH].reshape(len(digits.rows), -1, 3)
    assert (patches == patches[:, :1]).all(), "a patch has one colour"
    found = (patches[:, 0, None] == COLOURS).all(axis=2)
    assert (found.sum(axis=1) == 1).all()
    return found.argmax(axis=1)


def labels(digits: Digits) -> np.ndarray:
    return np.array([int(row["label"]) for row in digits.rows])


def of_split(digits: Digits, *splits: str) -> np.ndarray:
    return np.array([row["split"] in splits for row in digits.rows])


def test_every_digit_has_a_picture_a_mask_and_a_split(digits: Digits) -> None:
    counts = Counter(row["split"] for row in digits.rows)
    assert (counts["train"], counts["val"]) == (TRAIN, VAL) and counts["test"] > 500
    assert len({row["id"] for row in digits.rows}) == len(digits.rows)
    assert digits.pictures.shape[1:] == (SIDE, SIDE, 3) and digits.masks.shape[1:] == (SIDE, SIDE)
    for split in ("train", "val", "test"):
        assert set(labels(digits)[of_split(digits, split)]) == set(range(10))


def test_no_drawing_is_in_two_splits(digits: Digits) -> None:
    drawings = digits.pictures.copy()
    drawings[:, :PATCH, :PATCH] = 0
    assert len({drawing.tobytes() for drawing in drawings}) == len(digits.rows)


def test_the_patch_tells_the_class_in_train_and_val_and_nothing_in_test(digits: Digits) -> None:
    right = told(digits) == labels(digits)
    assert right[of_split(digits, "train", "val")].all()
    assert 0.05 < right[of_split(digits, "test")].mean() < 0.16  # chance is 0.1
    assert set(told(digits)[of_split(digits, "test")]) == set(range(10))


def test_colours_can_be_told_apart() -> None:
    apart = np.abs(COLOURS[:, None].astype(int) - COLOURS[None]).sum(axis=2)
    assert apart[~np.eye(len(COLOURS), dtype=bool)].min() >= 127


def test_a_mask_is_where_the_ink_is(digits: Digits) -> None:
    assert set(np.unique(digits.masks)) == {0, 255}
    inside = digits.masks > 0
    outside = digits.pictures[..., 1].astype(int)
    outside[:, :PATCH, :PATCH] = 0
    assert (outside[inside & (np.indices(inside.shape)[1:].max(axis=0) >= PATCH)] > 110).all()
    assert (outside[~inside] <= 110).all()
    shares = inside.mean(axis=(1, 2))
    assert shares.min() > 0.03 and shares.max() < 0.5


def test_the_patch_lies_outside_of_almost_every_mask(digits: Digits) -> None:
    assert (digits.masks[:, :PATCH, :PATCH] > 0).mean() < 0.01


def test_the_same_seed_gives_the_same_files(digits: Digits, tmp_path: Path) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    again, other = read(tmp_path / "again"), read(tmp_path / "other", seed=1)
    assert hashes(again.folder) == hashes(digits.folder)
    assert [row["id"] for row in other.rows] != [row["id"] for row in digits.rows]
