"""What training inferred for pictures that nobody corrected, written down and drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abn.data import Pictures
from abn.inferred import SHOWN, read_inferred, write_inferred
from abn.manifest import read_manifest, training_samples
from flows.gallery import GAP, LINE, TILE, inferred_sheet
from tiny import SIZE, Row, picture, square, write_workspace

ROWS = [Row(f"train{i:02d}", ["dark", "light"][i % 2]) for i in range(12)]
MASK = torch.zeros(1, 8, 8, dtype=torch.uint8)
MASK[0, 2:6, 2:6] = 200
CORNER = torch.zeros(1, 4, 4, dtype=torch.uint8)
CORNER[0, 0, 0] = 255


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    images = [picture(number, row.label) for number, row in enumerate(ROWS)]
    root = write_workspace(tmp_path / "w", ROWS, images, [square(number) for number in range(len(ROWS))])
    return Pictures(root, training_samples(read_manifest(root)), ["dark", "light"], (SIZE, SIZE))


def test_what_was_inferred_of_a_picture_is_read_as_it_was(pictures: Pictures, tmp_path: Path) -> None:
    pictures.drawn, pictures.trust = {3: MASK, 5: MASK // 2}, {3: 0.75, 5: 0.0}
    pictures.samples[8] = replace(pictures.samples[8], masks="corrections/0.npz")  # somebody corrected it
    pictures.shortcuts = {5: CORNER, 7: CORNER, 8: CORNER}
    write_inferred(tmp_path / "inferred.npz", pictures, 0)
    third, fifth, seventh = read_inferred(tmp_path / "inferred.npz")
    assert [one.sample for one in (third, fifth, seventh)] == ["train03", "train05", "train07"]
    assert [one.trust for one in (third, fifth, seventh)] == [0.75, 0.0, 0.0]
    assert np.array_equal(third.mask, MASK[0]) and np.array_equal(fifth.mask, MASK[0] // 2) and not seventh.mask.any()
    assert not third.misleads.any() and np.array_equal(fifth.misleads, CORNER[0]) and fifth.misleads.dtype == np.uint8


def test_nothing_inferred_is_an_empty_list_and_many_are_a_few(pictures: Pictures, tmp_path: Path) -> None:
    write_inferred(tmp_path / "inferred.npz", pictures, 0)
    assert read_inferred(tmp_path / "inferred.npz") == []
    pictures.drawn = dict.fromkeys(range(12), MASK)
    shown = []
    for seed in (0, 0, 1):
        write_inferred(tmp_path / "inferred.npz", pictures, seed)
        shown.append([one.sample for one in read_inferred(tmp_path / "inferred.npz")])
    assert shown[0] == shown[1] != shown[2] and all(len(names) == SHOWN and names == sorted(names) for names in shown)


def test_the_sheet_darkens_what_is_no_evidence_and_reddens_what_misleads(pictures: Pictures, tmp_path: Path) -> None:
    pictures.drawn, pictures.trust, pictures.shortcuts = {3: MASK}, {3: 0.75}, {3: CORNER}
    for sample in pictures.samples:
        Image.new("RGB", (SIZE, SIZE), (100, 100, 100)).save(pictures.root / sample.image)
    write_inferred(tmp_path / "inferred.npz", pictures, 0)
    by_id = {sample.id: sample for sample in pictures.samples}
    sheet = inferred_sheet(pictures.root, by_id, read_inferred(tmp_path / "inferred.npz"))
    assert sheet.size == (3 * (TILE + GAP), 1 + LINE + GAP + TILE + LINE + GAP)
    picture, drawn, misled = (np.array(sheet)[1 + LINE + GAP :][:TILE, (TILE + GAP) * i :][:, :TILE] for i in range(3))
    assert (picture == 100).all()
    assert (drawn[TILE // 2, TILE // 2] == 100).all() and (drawn[:16, :16] == 25).all()
    assert (misled[8, 8] == (160, 70, 76)).all() and (misled[TILE // 2 :] == 100).all()
