"""The published methods on worked examples, Decoy-MNIST on a made-up MNIST, Waterbirds on made-up folders."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from abn.model import ABN
from abn.train import Settings
from benchmarks import methods, public, waterbirds
from benchmarks.correction import Problem, groups_of, parse, problem_of, settings_with, worst_group
from benchmarks.data import Data, confound, indexed
from benchmarks.methods import Batch, Examples, PlainCnn, PlainMlp, answers, dfr, erm, fit, jtt
from tiny import PROJECT, tiny_settings

SIZE = (28, 28)


def settings(**train: Any) -> Settings:
    chosen = {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, **train}
    return tiny_settings(data={"size": list(SIZE), "flip": False, "shift": 0}, train=chosen)


def examples(count: int = 48, has_mask: bool = True) -> Examples:
    """Two classes: a bright bar, lying or standing, in the middle, and a corner whose grey is the class."""
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 3, *SIZE, dtype=torch.uint8)
    masks = torch.zeros(count, 1, *SIZE, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        place = (slice(13, 15), slice(6, 22)) if label else (slice(6, 22), slice(13, 15))
        images[row, :, *place], masks[row, 0, *place] = 200 + row % 48, 255
        images[row, :, :4, :4] = 80 + 120 * label
    given = torch.full((count,), has_mask)
    return Examples(images, labels, masks, given, given.float(), labels)


def batch_of(shown: Examples) -> Batch:
    return Batch(
        shown.images.float() / 255, shown.labels, shown.masks.float() / 255, shown.has_mask, shown.trust, shown.groups
    )


def network(kind: type[nn.Module] = PlainCnn) -> nn.Module:
    torch.manual_seed(0)
    return kind(2)


def attention_network() -> ABN:
    torch.manual_seed(0)
    return ABN(settings().model, 2)


# --- methods


@pytest.mark.parametrize("make", [network, lambda: network(PlainMlp), attention_network])
def test_a_network_learns_what_it_is_shown_and_the_same_again(make: methods.Make) -> None:
    shown, first, second = examples(), make(), make()
    for trained in (first, second):
        fit(trained, shown, settings(), erm)
    assert not first.training and (answers(first, shown.images) == shown.labels.numpy()).mean() == 1
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_attention_branch_network_descends_both_branches() -> None:
    model, batch = attention_network().eval(), batch_of(examples())
    output = model(batch.images)
    both = nn.functional.cross_entropy(output.logits, batch.labels)
    both = both + nn.functional.cross_entropy(output.attention_logits, batch.labels)
    assert erm(model, batch).item() == pytest.approx(both.item(), rel=1e-5)


def test_rrr_is_the_squared_gradient_outside_of_the_masks_of_a_linear_network() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3 * 28 * 28, generator=torch.Generator().manual_seed(0)) / 100)

        def forward(self, images: torch.Tensor) -> methods.PlainOutput:
            flat = images.flatten(1)
            return methods.PlainOutput(flat @ self.weight.T, None, flat)

    model, shown = Linear(), examples(4)
    shown = replace(shown, has_mask=torch.tensor([True, True, True, False]))
    with_penalty, without = methods.rrr(2.0)(model, batch_of(shown)), erm(model, batch_of(shown))
    # d sum_k log p_k / dx = sum_k w_k - K sum_k p_k w_k
    chances = model(batch_of(shown).images).logits.softmax(dim=1)
    slopes = (model.weight.sum(dim=0) - 2 * chances @ model.weight).view(4, 3, *SIZE)
    outside = (slopes.square().sum(dim=1, keepdim=True) * (1 - batch_of(shown).masks)).sum(dim=(1, 2, 3))
    assert (with_penalty - without).item() == pytest.approx(2 * outside[:3].sum().item() / 4, rel=1e-4)


def test_rrr_and_caipi_turn_a_network_away_from_the_corner() -> None:
    """Nothing but the corner is shown, and it is marked as no evidence: how far the answers hang on it all the same."""
    shown = examples()
    images, masks = shown.images.clone(), torch.full_like(shown.masks, 255)
    images[:, :, 4:], images[..., 4:], masks[..., :4, :4] = 0, 0, 0
    corners = replace(shown, images=images, masks=masks)

    def reliance(objective: methods.Objective) -> float:
        model = network()
        fit(model, corners, settings(epochs=10), objective)
        with torch.no_grad():
            chances = model(images.float() / 255).logits.softmax(dim=1)[:, 1]
        return (chances[corners.labels == 1].mean() - chances[corners.labels == 0].mean()).item()

    assert reliance(erm) > 0.9 and reliance(methods.rrr(100.0)) < 0.4 and reliance(methods.caipi) < 0.75


def test_counterexamples_keep_what_is_masked_and_the_label() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: torch.Tensor) -> methods.PlainOutput:
            seen.append(images)
            return methods.PlainOutput(images.new_zeros(len(images), 2), None, images)

    shown = replace(examples(4), has_mask=torch.tensor([True, False, True, False]))
    methods.caipi(Spy(), batch_of(shown))
    (images,) = seen
    given, inside = batch_of(shown), batch_of(shown).masks[[0, 2]] > 0
    assert torch.equal(images[:4], given.images) and len(images) == 6
    assert torch.equal(images[4:] * inside, given.images[[0, 2]] * inside)
    assert (images[4:] * ~inside).std() > 0.2 and torch.equal(images[4:, 0], images[4:, 2])


@pytest.mark.parametrize(("make", "weight"), [(network, 3.0), (attention_network, 10.0)])
def test_the_energy_loss_draws_the_map_into_the_masks(make: methods.Make, weight: float) -> None:
    shown = examples()

    def outside(objective: methods.Objective) -> float:
        model = make()
        fit(model, shown, settings(epochs=6), objective)
        batch = batch_of(shown)
        maps = methods._map_of(model(batch.images), batch.labels).detach()
        masks = methods.resize_map(batch.masks, maps.shape[-2:])
        return methods.energy_map_loss(maps, masks).mean().item()

    assert outside(methods.energy(weight)) < 0.95 * outside(erm)


def test_a_background_is_swapped_as_often_as_its_mask_is_trusted() -> None:
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: torch.Tensor) -> methods.PlainOutput:
            seen.append(images)
            return methods.PlainOutput(images.new_zeros(len(images), 2), None, images)

    shown = replace(examples(600), trust=torch.arange(600) % 3 / 2)  # 0, 0.5 and 1
    batch = batch_of(shown)
    torch.manual_seed(0)
    methods.background_swap(Spy(), batch)
    inside = batch.masks > 0
    assert torch.equal(seen[0] * inside, batch.images * inside)
    moved = (seen[0] != batch.images).flatten(1).any(dim=1).float()
    shares = [moved[shown.trust == trust].mean().item() for trust in (0, 0.5, 1)]
    # Half of the pictures get a background of their own class, whose corner looks the same.
    assert shares[0] == 0 and 0.15 < shares[1] < 0.35 and 0.4 < shares[2] < 0.6


def test_group_dro_raises_the_weight_of_the_worst_group() -> None:
    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> methods.PlainOutput:
            logits = torch.tensor([[4.0, 0.0]]).expand(len(images), 2)  # the second class is always wrong
            return methods.PlainOutput(logits, None, images)

    batch, objective = batch_of(examples(8)), methods.group_dro(3)  # the third group has no picture
    losses = [objective(Fixed(), batch).item() for _ in range(200)]
    even = (np.log1p(np.exp(-4)) + np.log1p(np.exp(4))) / 3
    assert losses[0] == pytest.approx(even, rel=0.05) and losses[0] < losses[50] < losses[-1]
    assert losses[-1] > 0.98 * np.log1p(np.exp(4))


def test_just_train_twice_shows_the_misclassified_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[int, list[int]]] = []
    monkeypatch.setattr(
        methods, "fit", lambda model, shown, given, objective, pool=(): fits.append((given.train.epochs, list(pool)))
    )
    shown = examples(6)
    monkeypatch.setattr(methods, "answers", lambda model, images: np.array([0, 1, 0, 0, 0, 1]))  # row 3 is wrong
    jtt(network, shown, settings(epochs=10))
    (first, everything), (second, pool) = fits
    assert (first, everything, second) == (2, [], 10)
    assert np.bincount(pool).tolist() == [1, 1, 1, methods.UPWEIGHT, 1, 1]


def test_a_pool_costs_no_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def count(model: nn.Module, batch: Batch) -> torch.Tensor:
        sizes.append(len(batch.labels))
        return erm(model, batch)

    fit(network(), examples(), settings(epochs=2), count, [0] * 500)
    assert sizes == [16] * 6


def test_dfr_changes_the_last_layer_alone_and_forgets_the_corner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "VIEWS", 400)
    shown, model = examples(), network()
    swapped = shown.images.clone()
    swapped[:, :, :4, :4] = (80 + 120 * (1 - shown.labels)).view(-1, 1, 1, 1).to(torch.uint8)
    fit(model, shown, settings(), erm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dfr(model, replace(shown, has_mask=torch.arange(48) < 20), seed=0)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"linear.weight", "linear.bias"}
    assert (answers(model, swapped) == shown.labels.numpy()).mean() == 1


def test_a_last_layer_answers_as_the_logistic_regression_does() -> None:
    generator = np.random.default_rng(0)
    labels = np.array([0, 2, 3] * 40)
    embeddings = generator.normal(size=(120, 128)) + 3 * np.eye(128)[labels]
    model = PlainCnn(4)
    methods.refit_last_layer(model, embeddings, labels)
    found = model.linear(torch.from_numpy(embeddings).float()).argmax(dim=1).numpy()
    assert (found == labels).mean() > 0.98  # the class without an example is never answered


def test_a_loss_that_is_not_finite_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FloatingPointError, match="loss inf at epoch 1, step 1"):
        fit(network(), examples(), settings(), lambda model, batch: erm(model, batch) * torch.inf)


# --- worst group


def test_the_worst_group_is_of_class_and_value_and_small_groups_are_left_out() -> None:
    labels = np.array([0] * 12 + [1] * 12)
    values = np.array([0] * 6 + [1] * 6 + [0] * 3 + [1] * 9)
    answers = labels.copy()
    answers[6:8] = 1  # two of the six pictures of class 0 with value 1
    answers[12:15] = 0  # all three of class 1 with value 0
    assert worst_group(answers, labels, values) == pytest.approx(4 / 6)
    assert np.isnan(worst_group(answers[12:15], labels[12:15], values[12:15]))
    assert groups_of(labels, values)[1] == 4 and len(set(groups_of(labels, values)[0])) == 4


# --- Decoy-MNIST


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        labels = np.arange(60) % 10
        digits = np.zeros((60, *SIZE), np.uint8)
        for row, label in enumerate(labels):
            digits[row, 8:20, 6 + label : 10 + label] = generator.integers(150, 255, (12, 4))
        np.savez(tmp_path / f"mnist_{name}.npz", x=digits, y=labels)
    return tmp_path


def test_the_square_is_that_of_decoy_mnist() -> None:
    count = 400
    images = np.random.default_rng(0).integers(1, 10, (count, *SIZE, 3)).astype(np.uint8)
    digits = Data(images, np.zeros((count, *SIZE), bool), np.arange(count) % 10, [str(digit) for digit in range(10)])
    shown = confound(digits, "decoy", digits.labels, np.arange(10)).images
    changed = (shown != images).any(axis=-1)
    assert (changed.sum(axis=(1, 2)) == 16).all()
    corners = [changed[:, r, c] for r in (slice(4), slice(-4, None)) for c in (slice(4), slice(-4, None))]
    shares = [corner.all(axis=(1, 2)).mean() for corner in corners]
    assert sum(shares) == 1 and all(0.18 < share < 0.32 for share in shares)
    greys = [np.unique(shown[row][changed[row]]).tolist() for row in range(count)]
    assert greys == [[255 - 25 * (row % 10)] for row in range(count)]


def test_every_arm_trains_and_a_second_run_trains_nothing(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abn.train.annotate", lambda *problem: ({}, {}))
    monkeypatch.setattr("abn.train.find_shortcuts", lambda *problem: {})
    monkeypatch.setattr(public, "annotate", lambda *problem: ({}, {}))
    monkeypatch.setattr(methods, "VIEWS", 60)
    arguments = ["--path", str(mnist), "--train", "60", "--epochs", "1", "--keep", str(tmp_path / "keep")]
    arms = [arm for arm in public.ARMS if not arm.startswith("abn:") or arm in public.BY_SETTINGS]
    options = public.parse([*arguments, "--arms", ",".join([*arms, "abn:caipi"]), "--json", str(tmp_path / "all.json")])
    result = json.loads(json.dumps(public.run(options), allow_nan=False))
    assert json.loads((tmp_path / "all.json").read_text()) == result and list(result["arms"])[:-1] == arms
    for figures in result["arms"].values():
        assert all(0 <= figures[name] <= 1 for name in ("accuracy", "clean")) and figures["seconds"] > 0
    monkeypatch.setattr(public, "DecoyMnist", None)
    assert json.loads(json.dumps(public.run(options))) == result


def test_the_masks_of_an_arm_are_the_ink_or_all_but_the_square(mnist: Path, tmp_path: Path) -> None:
    decoy = public.DecoyMnist(tmp_path / "problem", str(mnist), 60, 0)
    ink, square = (decoy.examples(public.BY_METHOD[name]) for name in ("rrr", "rrr-square"))
    assert (square.masks == 0).sum(dim=(1, 2, 3)).tolist() == [16] * 60 and ink.has_mask.all()
    assert not ((ink.masks > 0) & (square.masks == 0)).any() and 0.01 < (ink.masks > 0).float().mean() < 0.1
    assert not decoy.examples(public.BY_METHOD["jtt"]).has_mask.any()
    clean = decoy.examples(public.BY_METHOD["upper"]).images
    assert ((clean != ink.images).any(dim=1) == (square.masks == 0)[:, 0]).all()
    assert decoy.tests["plain"].shape == (60, 3, *SIZE)


def test_masks_that_nobody_gave_are_propagated_from_those_that_somebody_did(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a confound's square in the propagated masks, from one mask of each class."""
    monkeypatch.setattr("abn.annotator.CYCLES", (60,))
    decoy = public.DecoyMnist(tmp_path / "problem", str(mnist), 60, 0)
    shown = decoy.examples(replace(public.BY_METHOD["swap-10%"], share=0.2))
    assert shown.has_mask.sum() == 12 and (shown.trust[shown.has_mask] == 1).all()
    assert np.bincount(shown.labels[shown.has_mask]).min() == 1
    others = ~shown.has_mask & (shown.trust > 0)
    ink = torch.from_numpy(decoy.masks["ink"])[:, None]
    drawn = shown.masks > 127
    overlap = (drawn & ink).sum(dim=(1, 2, 3)) / (drawn | ink).sum(dim=(1, 2, 3))
    assert others.sum() > 40 and overlap[others].mean() > 0.6
    assert torch.equal(drawn[shown.has_mask], ink[shown.has_mask])


def test_ours_has_the_share_of_masks_that_its_name_says(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(root: Path, samples: list[Any], *rest: Any, baseline: Path | None) -> None:
        raise Asked(sum(bool(sample.masks) for sample in samples))

    monkeypatch.setattr(public, "train", ask)
    decoy = public.DecoyMnist(tmp_path / "problem", str(mnist), 60, 0)
    (decoy.files.root / "abn-baseline").mkdir()
    (decoy.files.root / "abn-baseline/model.pt").touch()
    for arm, masks in (("abn:baseline", 0), ("abn:ours-0.1%", 1), ("abn:ours-10%", 6), ("abn:energy", 60)):
        with pytest.raises(Asked, match=f"^{masks}$"):
            decoy.run(arm, public._settings(arm, 0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "cnn:magic"], "--arms names 'cnn:magic'; known: mlp:baseline"),
        (["--train", "9"], "--train is 9; take at least 10 pictures"),
        ([], r"no mnist_train.npz of mnist at .*; name its folder with --path"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        public.run(public.parse(["--path", str(tmp_path), *arguments]))


def test_published_figures_are_told_apart_from_ours(capsys: pytest.CaptureFixture[str]) -> None:
    public.print_published()
    lines = capsys.readouterr().out.splitlines()
    assert "theirs, not run here" in lines[1] and len(lines) == 2 + len(public.PUBLISHED)
    assert all(source in line for line, (*_, source) in zip(lines[2:], public.PUBLISHED, strict=True))


# --- Waterbirds


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """CUB with four species of ten birds, two of them on the water, and Places with enough of each background."""
    cub, places = tmp_path / "CUB_200_2011", tmp_path / "data_large"
    species = ("001.Laysan_Albatross", "002.Song_Sparrow", "003.Mallard", "004.House_Wren")
    names = [f"{one}/{one[4:]}_{number:04d}.jpg" for one in species for number in range(10)]
    for number, name in enumerate(names):
        for folder in ("images", "segmentations"):
            (cub / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30 + number % 3), (200, number, 10)).save(cub / "images" / name, quality=95)
        mask = Image.new("L", (40, 30 + number % 3))
        mask.paste(255, (10, 8, 22, 20))
        mask.save(cub / "segmentations" / name.replace(".jpg", ".png"))
    (cub / "images.txt").write_text("".join(f"{number} {name}\n" for number, name in enumerate(names, start=1)))
    flags = "".join(f"{number} {int(number % 2 or number % 10 > 6)}\n" for number in range(1, 41))
    (cub / "train_test_split.txt").write_text(flags)
    for kind, blue in (("land", 0), ("water", 255)):
        for name in waterbirds.PLACES[kind]:
            (places / name[0] / name).mkdir(parents=True)
            for number in range(20):
                place = Image.new("RGB", (50, 60), (0, 100 + number, blue))
                place.save(places / name[0] / name / f"{number}.jpg", quality=95)
    return cub, places


def compose(folders: tuple[Path, Path], out: Path, correlation: float = 1.0) -> dict[tuple[str, str, str], int]:
    return waterbirds.write(*folders, out, correlation, seed=0)


def test_birds_stand_before_backgrounds_as_often_as_wanted(folders: tuple[Path, Path], tmp_path: Path) -> None:
    counts = compose(folders, tmp_path / "all")
    train = {group[1:]: count for group, count in counts.items() if group[0] == "train"}
    assert set(train) == {("landbird", "land"), ("waterbird", "water")}  # the other two groups are empty
    for split in ("val", "test"):
        for label in ("landbird", "waterbird"):
            half = [counts.get((split, label, kind), 0) for kind in ("land", "water")]
            assert abs(half[0] - half[1]) <= 1
    part = compose(folders, tmp_path / "part", 0.75)
    own, other = part["train", "landbird", "land"], part["train", "landbird", "water"]
    assert own == round(0.75 * (own + other)) and other > 0
    assert sum(counts.values()) == sum(part.values()) == 40


def test_what_is_composed_is_read_as_any_index_with_its_backgrounds_as_groups(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    counts = compose(folders, tmp_path / "waterbirds")
    train, test = indexed(tmp_path / "waterbirds", (30, 40), 1000, 0)
    assert train.classes == ["landbird", "waterbird"] and train.backgrounds is not None and test.backgrounds is not None
    assert (train.backgrounds == train.labels).all() and set(test.backgrounds.tolist()) == {0, 1}
    assert len(test) == sum(count for group, count in counts.items() if group[0] == "test")  # val is left out
    assert len(train) == sum(count for group, count in counts.items() if group[0] == "train")
    for image, mask, background in zip(test.images, test.masks, test.backgrounds, strict=True):
        assert 0.08 < mask.mean() < 0.16
        assert image[mask][:, 0].mean() > 120  # the bird is red, no place is
        assert (image[~mask][:, 2].mean() > 128) == bool(background)  # water is blue
    (tmp_path / "problem").mkdir()
    options = parse(["--data", str(tmp_path / "waterbirds"), "--confound", "none", "--size", "30", "40"])
    problem = Problem(tmp_path / "problem", problem_of(options)[0], 0)
    assert groups_of(problem.test_labels, problem.test_values)[1] == 4
    assert problem.values.tolist() == problem.data.labels.tolist()


def test_a_bird_is_blended_into_a_place_that_covers_the_picture() -> None:
    bird, place = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (4, 9), "blue")
    segmentation = Image.new("L", (20, 10))
    segmentation.paste(255, (0, 0, 10, 10))
    segmentation.paste(51, (10, 0, 12, 10))  # one annotator of five
    picture, mask = waterbirds.compose(bird, segmentation, place)
    assert picture.size == mask.size == (20, 10)
    assert [picture.getpixel((x, 5)) for x in (5, 11, 15)] == [(255, 0, 0), (51, 0, 204), (0, 0, 255)]
    assert [mask.getpixel((x, 5)) for x in (5, 11, 15)] == [255, 0, 0]


def test_species_count_as_waterbirds_as_in_the_published_data() -> None:
    names = ("044.Frigatebird", "087.Mallard", "141.Artic_Tern", "103.Sayornis", "021.Eastern_Towhee")
    kinds = [waterbirds._kind(f"{name}/x.jpg") for name in names]
    assert kinds == ["water", "water", "water", "land", "water"]


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda cub, places: (cub / "images.txt").unlink(), r"images.txt does not exist; name the folder CUB_200_2011"),
        (
            lambda cub, places: (cub / "segmentations/003.Mallard/Mallard_0000.png").unlink(),
            r"lacks 003.Mallard/Mallard_0000.png; unpack CUB's segmentations.tgz",
        ),
        (
            lambda cub, places: (places / "o/ocean").rename(places / "o/sea"),
            r"o/ocean does not exist; name Places365's folder",
        ),
        (
            lambda cub, places: (
                [file.unlink() for file in (places / "l/lake/natural").iterdir()]
                + [(places / f"o/ocean/{number}.jpg").unlink() for number in range(5)]
            ),
            r"has 15 pictures of ocean and lake/natural, \d+ are needed",
        ),
    ],
)
def test_a_folder_that_lacks_something_is_one_line_and_nothing_is_written(
    folders: tuple[Path, Path], tmp_path: Path, breaks: Any, message: str
) -> None:
    breaks(*folders)
    with pytest.raises(ValueError, match=message):
        compose(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_correlation_that_is_none_and_a_folder_that_is_there_are_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--correlation is 1\.2; it must be from 0\.5 to 1"):
        compose(folders, tmp_path / "out", 1.2)
    with pytest.raises(ValueError, match="exists already; name a new folder with --out"):
        compose(folders, folders[0])


def test_the_recipe_of_waterbirds_is_made_of_settings_that_exist() -> None:
    recipe = PROJECT / "recipes/waterbirds.yaml"
    options = parse(["--data", "waterbirds-100", "--recipe", str(recipe), "--confound", "none", "--train", "4795"])
    spec, changes = problem_of(options)
    found = settings_with({"data.size": list(spec.size), **changes})
    assert (spec.size, spec.train, found.model.backbone, found.train.batch_size) == ((224, 224), 4795, "resnet50", 96)
    written = yaml.safe_load(recipe.read_text())
    assert {f"{section}.{key}" for section, values in written.items() for key in values} == {*changes, "data.size"}
    assert isinstance(options, argparse.Namespace) and problem_of(parse(["--size", "32", "32"]))[0].size == (32, 32)
