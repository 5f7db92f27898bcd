"""Shortcuts: what lies outside of the masks of people, and yet tells the class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from abn.data import Pictures
from abn.manifest import read_manifest, training_samples
from abn.shortcut import _chosen, find_shortcuts
from tiny import Row, correct, write_workspace

SIDE, STAMP, COUNT = 64, 12, 60  # pixels; pictures
KNOWN, REST = range(20), range(20, COUNT)  # those that somebody corrected, and the others
RED, BLUE = (230, 20, 20), (20, 20, 230)
CPU = torch.device("cpu")
CLASSES = ["dark", "light"]
ROWS = [Row(f"train{i:02d}", CLASSES[i % 2]) for i in range(COUNT)]


def square(number: int) -> np.ndarray:
    """The mask of what is to be seen in picture `number`, below the stamp."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    top, left = 20 + number * 7 % 20, number * 11 % 40
    mask[top : top + 24, left : left + 24] = 255
    return mask


def workspace(root: Path, stamps: dict[str, tuple[int, int, int]]) -> Path:
    """Squares in the brightness of the class on noise, each picture with a stamp in the colour of its class."""
    pictures = []
    for number, row in enumerate(ROWS):
        image = np.random.default_rng(number).integers(40, 160, (SIDE, SIDE, 3)).astype(np.uint8)
        image[square(number) > 0] = {"light": 220, "dark": 10}[row.label]
        if row.label in stamps:
            image[:STAMP, :STAMP] = stamps[row.label]
        pictures.append(image)
    return write_workspace(root, ROWS, pictures, [square(number) for number in range(COUNT)])


def pictures_of(
    root: Path,
    known: range = KNOWN,
    size: tuple[int, int] = (SIDE, SIDE),
    evidence: Callable[[int], np.ndarray] = square,
) -> Pictures:
    correct(root, {ROWS[i].id: evidence(i) for i in known})
    return Pictures(root, training_samples(read_manifest(root)), CLASSES, size)


def shares(found: dict[int, Tensor], evidence: Callable[[int], np.ndarray] = square) -> tuple[float, float]:
    """How much of the stamps and of the evidence is hidden in the pictures that nobody corrected, on average."""
    nothing = torch.zeros(1, SIDE // 2, SIDE // 2)
    hidden = {i: np.kron(found.get(i, nothing)[0].numpy() > 0, np.ones((2, 2), bool)) for i in REST}
    return (
        float(np.mean([where[:STAMP, :STAMP].mean() for where in hidden.values()])),
        float(np.mean([where[evidence(i) > 0].mean() for i, where in hidden.items()])),
    )


def test_a_stamp_that_tells_the_class_is_found_and_the_evidence_is_not(tmp_path: Path) -> None:
    found = find_shortcuts(pictures_of(workspace(tmp_path / "w", {"dark": RED, "light": BLUE})), KNOWN, 2, 0, CPU)
    assert set(found) == set(range(COUNT)), "in the corrected ones it lies around what was marked"
    assert {(mask.shape, mask.dtype) for mask in found.values()} == {((1, 32, 32), torch.uint8)}
    stamps, squares = shares(found)
    assert stamps > 0.95 and squares < 0.05


@pytest.mark.parametrize("stamps", [{}, {"dark": RED, "light": RED}])
def test_what_tells_nothing_is_left_alone(tmp_path: Path, stamps: dict[str, tuple[int, int, int]]) -> None:
    hidden = shares(find_shortcuts(pictures_of(workspace(tmp_path / "w", stamps)), KNOWN, 2, 0, CPU))
    assert hidden[0] < 0.3 and hidden[1] < 0.05


def test_thin_evidence_is_known_as_such(tmp_path: Path) -> None:
    """A line of a pixel, which fills none of the places that are looked at, in the colour of the class, on pictures
    that get brighter to one side or another."""
    pictures, lines = [], []
    for number in range(COUNT):
        random = np.random.default_rng(number)
        angle, (top, left) = random.uniform(0, 2 * np.pi), random.integers(8, 30, 2)
        rows, columns = np.indices((SIDE, SIDE))
        shade = 110 + rows * np.sin(angle) + columns * np.cos(angle) + random.normal(0, 4, (SIDE, SIDE))
        image = np.repeat(shade.clip(0, 255)[..., None], 3, axis=2).astype(np.uint8)
        line = np.zeros((SIDE, SIDE), np.uint8)
        line[top, left : left + 25] = 255
        image[line > 0] = (RED, BLUE)[number % 2]
        pictures.append(image)
        lines.append(line)
    root = write_workspace(tmp_path / "w", ROWS, pictures, lines)
    found = find_shortcuts(pictures_of(root, evidence=lines.__getitem__), KNOWN, 2, 0, CPU)
    assert shares(found, lines.__getitem__)[1] < 0.05


def test_a_class_that_alone_was_corrected_is_not_hidden_for_that(tmp_path: Path) -> None:
    """Nor where of the other there are too few to tell it by."""
    root = workspace(tmp_path / "w", {})
    dark = range(0, 20, 2)
    for known in (list(dark), [*dark, 1]):
        pictures = pictures_of(root, range(20))
        found = find_shortcuts(pictures, known, 2, 0, CPU)
        hidden = sum(mask.float().mean().item() / 255 for mask in found.values())
        assert hidden / (COUNT - len(known)) < 0.1, known


def test_of_the_larger_class_no_more_than_three_times_as_many_are_learned_from() -> None:
    labels = torch.tensor([0] * 40 + [1] * 4 + [2] * 2)
    chosen = labels[_chosen(labels, torch.Generator().manual_seed(0))]
    assert chosen.bincount().tolist() == [12, 4], "of the third there are too few"


def test_a_map_that_was_called_fine_does_not_say_what_misleads(tmp_path: Path) -> None:
    root = workspace(tmp_path / "w", {"dark": RED, "light": BLUE})
    correct(root, {ROWS[i].id: square(i) for i in KNOWN}, "map_ok")
    pictures = Pictures(root, training_samples(read_manifest(root)), CLASSES, (SIDE, SIDE))
    assert find_shortcuts(pictures, KNOWN, 2, 0, CPU) == {}


def test_the_same_seed_finds_the_same_and_leaves_other_randomness_alone(tmp_path: Path) -> None:
    pictures = pictures_of(workspace(tmp_path / "w", {"dark": RED, "light": BLUE}))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = (find_shortcuts(pictures, KNOWN, 2, 0, CPU) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert first.keys() == second.keys() and all(torch.equal(first[i], second[i]) for i in first)


def test_large_pictures_are_searched_small_and_hidden_large(tmp_path: Path) -> None:
    root = workspace(tmp_path / "w", {"dark": RED, "light": BLUE})
    pictures = pictures_of(root, KNOWN, (256, 256))
    pictures.shortcuts = find_shortcuts(pictures, KNOWN, 2, 0, CPU)
    assert {tuple(mask.shape) for mask in pictures.shortcuts.values()} == {(1, 32, 32)}
    batch = pictures[[0, 30]]
    assert batch.shortcuts.shape == (2, 1, 256, 256) and set(batch.shortcuts[1].unique().tolist()) == {0, 255}
    assert (batch.shortcuts[:, 0, : 4 * STAMP, : 4 * STAMP] > 0).float().mean() > 0.95
