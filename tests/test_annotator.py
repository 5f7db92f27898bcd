"""The annotator: from the masks of a few pictures to those of the rest."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abn import annotator
from abn.annotator import Annotator, annotate, mask_loss
from abn.data import DataConfig, Pictures
from abn.manifest import read_manifest, training_samples
from abn.pyramid import Pyramid
from tiny import SIZE, correct, make_workspace, square

CPU = torch.device("cpu")
STILL = DataConfig((SIZE, SIZE), flip=False, shift=1)


def pictures_of(root: Path, masks: dict[str, np.ndarray], size: tuple[int, int] = (SIZE, SIZE)) -> Pictures:
    correct(root, masks)
    return Pictures(root, training_samples(read_manifest(root)), ["dark", "light"], size)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_workspace(tmp_path / "workspace")


def test_masks_of_a_few_pictures_become_masks_of_the_rest(root: Path) -> None:
    pictures = pictures_of(root, {f"train{i:02d}": square(i) for i in range(12)})
    drawn, trust = annotate(pictures, range(12), 2, STILL, 0, CPU)
    assert set(drawn) == set(range(12, 20)), "those that nobody corrected"
    overlaps = []
    for number, mask in drawn.items():
        marked, wanted = mask[0].numpy() > 127, square(number) > 0
        overlaps.append((marked & wanted).sum() / (marked | wanted).sum())
    assert np.mean(overlaps) > 0.8
    assert set(trust.values()) == {1.0}
    assert len(pickle.dumps(drawn)) < 8 * (SIZE * SIZE + 1000), "other processes are sent no more than the masks"


def test_a_class_is_marked_from_the_first_step_on_as_much_as_it_usually_is(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no object nearly all is marked, and one mask is to tell that."""
    monkeypatch.setattr(annotator, "CYCLES", (1,))
    samples = training_samples(read_manifest(root))
    dark, light = ([i for i, sample in enumerate(samples) if sample.label == label] for label in ("dark", "light"))
    masks = {samples[i].id: square(i) for i in dark[:3]} | {samples[light[0]].id: np.full((SIZE, SIZE), 255, np.uint8)}
    drawn, _ = annotate(pictures_of(root, masks), [*dark[:3], light[0]], 2, STILL, 0, CPU)
    assert set(drawn) == set(light[1:]), "squares are not found yet"
    assert np.mean([(mask > 127).float().mean() for mask in drawn.values()]) > 0.9


def test_masks_without_any_sense_are_hardly_trusted(root: Path) -> None:
    generator, masks = np.random.default_rng(0), {}
    for number in range(12):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        top, left = generator.integers(0, SIZE - 3, 2)
        mask[top : top + 3, left : left + 3] = 255
        masks[f"train{number:02d}"] = mask
    _, trust = annotate(pictures_of(root, masks), range(12), 2, STILL, 0, CPU, most=300)
    assert max(trust.values()) < 0.5


def test_the_same_seed_draws_the_same_and_leaves_other_randomness_alone(root: Path) -> None:
    pictures = pictures_of(root, {f"train{i:02d}": square(i) for i in range(4)})
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    (first, trust), (second, again) = (annotate(pictures, range(4), 2, STILL, 0, CPU, most=60) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert trust == again and first.keys() == second.keys()
    assert all(torch.equal(first[number], second[number]) for number in first)


def test_every_correction_judges_once_those_who_did_not_learn_from_it() -> None:
    folds = annotator._folds(list(range(10)))
    assert sorted(row for _, judged in folds for row in judged) == list(range(10))
    assert all(sorted(taught + judged) == list(range(10)) for taught, judged in folds)
    assert {len(judged) for _, judged in folds} == {3, 4}
    assert annotator._folds([4, 7]) == [([4, 7], [4, 7])], "of so few none can be spared"


@pytest.mark.parametrize("most", [0, 30, 10_000])
def test_drawing_takes_no_more_steps_than_it_may_but_a_few(
    root: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(annotator, "_train", lambda learner, steps, *shown: taken.append(steps))
    monkeypatch.setattr(annotator, "CYCLES", (8, 20))
    monkeypatch.setattr(annotator, "FEWEST", 2)
    pictures = pictures_of(root, {f"train{i:02d}": square(i) for i in range(12)})
    annotate(pictures, range(12), 2, STILL, 0, CPU, most=most)
    assert taken == {0: [2] * 3, 30: [8] * 3, 10_000: [8] * 3 + [20] * 3}[most]


def test_steps_that_can_be_afforded_are_counted_in_pixels() -> None:
    """Batches of eight; of pictures of twice the size a step of the annotator is a quarter of the work."""
    assert annotator.affordable_steps((64, 64), 800) == 100
    assert annotator.affordable_steps((128, 64), 800) == 400
    assert annotator.affordable_steps((16, 16), 1) == 1


def test_nothing_found_is_no_mask(root: Path) -> None:
    empty = {f"train{i:02d}": np.zeros((SIZE, SIZE), np.uint8) for i in range(4)}
    drawn, _ = annotate(pictures_of(root, empty), range(4), 2, STILL, 0, CPU, most=100)
    assert not drawn


def test_large_pictures_are_annotated_small_and_used_large(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotator, "CYCLES", (3,))
    pictures = pictures_of(root, {f"train{i:02d}": np.full((SIZE, SIZE), 255, np.uint8) for i in range(4)}, (160, 80))
    pictures.drawn, pictures.trust = annotate(pictures, range(4), 2, DataConfig((160, 80), True, 2), 0, CPU)
    assert {tuple(mask.shape) for mask in pictures.drawn.values()} == {(1, 64, 32)}
    batch = pictures[[0, min(pictures.drawn)]]
    assert batch.masks.shape == (2, 1, 160, 80)
    assert batch.trust.tolist() == [1.0, pytest.approx(pictures.trust[min(pictures.drawn)])]


@pytest.mark.parametrize(("shift", "moved"), [(0, 0), (1, 1), (2, 2), (40, 16)])
def test_pictures_annotated_small_are_moved_as_little(
    root: Path, monkeypatch: pytest.MonkeyPatch, shift: int, moved: int
) -> None:
    shifts: set[int] = set()
    augment = annotator.augment

    def watched(images: torch.Tensor, masks: torch.Tensor, config: DataConfig, generator: torch.Generator) -> Any:
        shifts.add(config.shift)
        return augment(images, masks, config, generator)

    monkeypatch.setattr(annotator, "augment", watched)
    monkeypatch.setattr(annotator, "CYCLES", (1,))
    annotate(pictures_of(root, {"train00": square(0)}, (160, 80)), [0], 2, DataConfig((160, 80), True, shift), 0, CPU)
    assert shifts == {moved}


@pytest.mark.parametrize("size", [(8, 8), (17, 31), (64, 128)])
def test_any_size_comes_back_at_its_size(size: tuple[int, int], pyramid: Pyramid) -> None:
    for seen in (None, pyramid):
        logits = Annotator(3, seen)(torch.rand(2, 3, *size), torch.tensor([0, 2]))
        assert logits.shape == (2, 1, *size)


def test_what_pretrained_weights_see_is_used_and_stays_as_it_is(root: Path, pyramid: Pyramid) -> None:
    pictures = pictures_of(root, {f"train{i:02d}": square(i) for i in range(12)})
    before = copy.deepcopy(pyramid.state_dict())
    drawn, trust = annotate(pictures, range(12), 2, STILL, 0, CPU, pyramid=pyramid)
    assert set(trust.values()) == {1.0} and set(drawn) == set(range(12, 20))
    assert all(torch.equal(value, before[name]) for name, value in pyramid.state_dict().items())
    learner, images, labels = Annotator(2, pyramid), torch.rand(1, 3, 32, 32), torch.tensor([1])
    assert torch.equal(learner(images, labels, learner.features(images)), learner(images, labels))
    learner(images, labels).sum().backward()
    weights = [weight for join in learner.join for weight in join.parameters()]
    assert len(weights) == 3 * len(pyramid.steps) and all(weight.grad is not None for weight in weights)


def test_a_mask_that_is_another_one_in_the_mirror_is_not_trusted() -> None:
    """Of a picture that is marked nearly whole that tells nothing: it is trusted as the others are on average."""

    def mask(*columns: int) -> torch.Tensor:
        drawn = torch.zeros(1, 10, 10, dtype=torch.uint8)
        drawn[..., list(columns)] = 200
        return drawn

    found = {3: mask(0, 1), 5: mask(0, 1), 8: mask(4, 5), 9: mask(*range(9)), 11: mask()}
    mirrored = {3: mask(0, 1), 5: mask(7, 8), 8: mask(4, 5), 9: mask(*range(1, 10)), 11: mask()}
    means, sure = annotator._twice(found, mirrored)
    assert sure == {3: 1.0, 5: 0.0, 8: 1.0, 9: 0.5, 11: 0.0}
    assert means[5][0, 0].tolist() == [100, 100, 0, 0, 0, 0, 0, 100, 100, 0]
    assert torch.equal(means[3], found[3]) and means.keys() == found.keys()


@pytest.mark.parametrize(("flip", "trusted"), [(True, {0.0}), (False, {1.0})])
def test_pictures_are_drawn_in_the_mirror_where_they_may_be_mirrored(
    root: Path, pyramid: Pyramid, monkeypatch: pytest.MonkeyPatch, flip: bool, trusted: set[float]
) -> None:
    """What always marks the left side is found out there."""
    left = torch.full((1, SIZE, SIZE), -9.0)
    left[..., [0, 1, 2, 3, 7, 8]] = 9

    def forward(self: Annotator, images: torch.Tensor, labels: torch.Tensor, *features: object) -> torch.Tensor:
        return left.expand(len(images), -1, -1, -1) + 0 * self.usual(labels)[:, :, None, None]

    monkeypatch.setattr(Annotator, "forward", forward)
    monkeypatch.setattr(annotator, "CYCLES", (1,))
    masks = {f"train{i:02d}": (left[0].numpy() > 0).astype(np.uint8) * 255 for i in range(12)}
    config = DataConfig((SIZE, SIZE), flip, 0)
    _, trust = annotate(pictures_of(root, masks), range(12), 2, config, 0, CPU, pyramid=pyramid)
    assert set(trust.values()) == trusted


def test_the_loss_of_a_worked_example() -> None:
    masks = torch.tensor([[[[1.0, 0.0]]]])
    assert mask_loss(torch.tensor([[[[50.0, -50.0]]]]), masks).item() == pytest.approx(0, abs=1e-6)
    undecided = mask_loss(torch.zeros(1, 1, 1, 2), masks).item()
    assert undecided == pytest.approx(np.log(2) + 1 - (2 * 0.5 + 1) / (2 + 1))


def test_what_more_steps_make_worse_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = pictures_of(root, {f"train{i:02d}": square(i) for i in range(4)})

    def drawn(reached: dict[int, float]) -> tuple[dict[int, torch.Tensor], float]:
        trusts = iter(reached.values())
        monkeypatch.setattr(annotator, "CYCLES", tuple(reached))
        monkeypatch.setattr(annotator, "_trust", lambda *_: next(trusts))
        masks, trust = annotate(pictures, range(4), 2, STILL, 0, CPU)
        (value,) = set(trust.values())
        return masks, value

    (first, trust), (kept, still) = drawn({20: 0.5}), drawn({20: 0.5, 30: 0.4})
    assert trust == still == 0.5 and first.keys() == kept.keys() != set()
    assert all(torch.equal(first[number], kept[number]) for number in first)
    better, more = drawn({20: 0.5, 30: 0.6})
    assert more == 0.6 and any(not torch.equal(first[number], better[number]) for number in first)
