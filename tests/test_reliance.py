"""Background reliance: how far answers follow what people left out of their masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from abn.data import Pictures
from abn.manifest import read_manifest, training_samples
from abn.model import ABN, ABNOutput
from abn.reliance import Reliance, background_reliance
from tiny import SIZE, Row, correct, square, tiny_settings, write_workspace

CLASSES = ["dark", "light", "middle"]
ROWS = [Row(f"train{i:02d}", CLASSES[i % 3]) for i in range(30)]
LIGHT = {"dark": 10, "middle": 120, "light": 240}
CPU = torch.device("cpu")


class Answering(ABN):
    """Answers by what `told` reads off the pictures (b, 3, h, w): logits (b, k)."""

    def __init__(self, told: Callable[[Tensor], Tensor]) -> None:
        super().__init__(tiny_settings().model, len(CLASSES))
        self.told = told

    def forward(self, images: Tensor, attention_map: Tensor | None = None) -> ABNOutput:
        logits = self.told(images)
        return ABNOutput(logits, logits, torch.ones(len(images), 1, 2, 2), logits)


def nearest(shades: Tensor) -> Tensor:
    """Logits of the class whose light is nearest to each of the shades, 0..1."""
    return -1000 * (shades[:, None] - torch.tensor([LIGHT[name] for name in CLASSES]) / 255) ** 2


def of_the_corner(images: Tensor) -> Tensor:
    return nearest(images[:, 0, -1, -1])


def of_the_object(images: Tensor) -> Tensor:
    """The object alone is green."""
    green = (images[:, 1] - images[:, 2]).amax(dim=(1, 2))
    return nearest(green)


def of_noise(seed: int) -> Callable[[Tensor], Tensor]:
    """By three rows of the picture, in a way that knows nothing of classes."""
    weights = torch.randn(3 * SIZE, 3, generator=torch.Generator().manual_seed(seed))
    return lambda images: 5 * images[:, 0, 7:10].flatten(1) @ weights


def pictures_of(root: Path, known: int = 30, mask: Callable[[int], np.ndarray] = square) -> Pictures:
    """Squares, green by the class, on noise; in the last corner the light of the class."""
    images = []
    for number, row in enumerate(ROWS):
        image = np.repeat(np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 1)), 3, axis=2).astype(np.uint8)
        image[square(number) > 0] = (0, LIGHT[row.label], 0)
        image[-1:, -1:] = LIGHT[row.label]
        images.append(image)
    write_workspace(root, ROWS, images, [square(number) for number in range(len(ROWS))])
    correct(root, {ROWS[i].id: mask(i) for i in range(known)})
    return Pictures(root, training_samples(read_manifest(root)), CLASSES, (SIZE, SIZE))


def relied(pictures: Pictures, told: Callable[[Tensor], Tensor], seed: int = 0, known: int = 30) -> Reliance | None:
    return background_reliance(Answering(told), pictures, range(known), len(CLASSES), seed, CPU)


def test_answers_that_go_with_the_background_rely_on_it_wholly_and_those_by_the_object_not_at_all(
    tmp_path: Path,
) -> None:
    pictures = pictures_of(tmp_path / "w")
    corner, by_object = relied(pictures, of_the_corner), relied(pictures, of_the_object)
    assert corner and corner.mean > 0.95 and corner.by_class.min() > 0.95 and corner.p_value == 0.001
    assert by_object and abs(by_object.mean) < 0.02 and np.abs(by_object.by_class).max() < 0.02


def test_a_class_that_alone_carries_what_misleads_is_named(tmp_path: Path) -> None:
    def only_light(images: Tensor) -> Tensor:
        stamped = (of_the_corner(images).argmax(dim=1) == 1)[:, None]
        return torch.where(stamped, of_the_corner(images), of_the_object(images))

    found = relied(pictures_of(tmp_path / "w"), only_light)
    assert found and found.by_class[1] > 0.8
    assert found.by_class[[0, 2]].max() < 0.2 and 0.25 < found.mean < 0.4


def test_what_tells_nothing_is_taken_for_a_sign_as_often_as_the_p_value_says(tmp_path: Path) -> None:
    pictures, values = pictures_of(tmp_path / "w"), []
    for seed in range(100):
        found = relied(pictures, of_noise(seed), seed)
        assert found
        values.append(found.p_value)
    assert 0 <= np.mean(np.array(values) <= 0.05) <= 0.12
    assert 0.3 < np.mean(values) < 0.7


@pytest.mark.parametrize("known", [0, 1])
def test_masks_of_one_class_or_none_tell_nothing(tmp_path: Path, known: int) -> None:
    assert relied(pictures_of(tmp_path / "w", max(known, 1)), of_the_corner, known=known) is None


def test_pictures_marked_whole_and_maps_that_were_called_fine_are_no_objects(tmp_path: Path) -> None:
    whole = pictures_of(tmp_path / "whole", mask=lambda number: np.full((SIZE, SIZE), 255, np.uint8))
    assert relied(whole, of_the_corner) is None
    root = tmp_path / "fine"
    pictures_of(root)
    correct(root, {row.id: square(i) for i, row in enumerate(ROWS)}, "map_ok")
    fine = Pictures(root, training_samples(read_manifest(root)), CLASSES, (SIZE, SIZE))
    assert relied(fine, of_the_corner) is None


def test_the_same_seed_measures_the_same(tmp_path: Path) -> None:
    pictures = pictures_of(tmp_path / "w")
    first, second = relied(pictures, of_the_corner), relied(pictures, of_the_corner)
    assert first and second and first.mean == second.mean and first.p_value == second.p_value
    assert np.array_equal(first.by_class, second.by_class)
