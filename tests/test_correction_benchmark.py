"""The benchmark of corrections on pictures so small that an arm takes a second."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn.losses import MAP_LOSSES
from abn.manifest import Sample
from abn.train import Settings
from benchmarks import ablation, correction
from benchmarks.correction import ARMS, Problem, Spec, parse, problem_of, run, seeds_of, settings_with, summary
from benchmarks.data import CONFOUNDS, TRANSLUCENT, Data, choose, confound, hasty, load
from benchmarks.selection import Labelers
from tiny import SIZE, picture, square

EVERYONE = np.arange(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with an index.csv: bright squares, and pictures without one, whose mask is empty."""
    folder = tmp_path / "squares"
    folder.mkdir()
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split", "mask"])
        for number in range(24):
            label = "light" if number % 2 else "none"
            mask = square(number) if label == "light" else np.zeros((SIZE, SIZE), np.uint8)
            Image.fromarray(picture(number, "light")).save(folder / f"{number}.png")
            Image.fromarray(mask).save(folder / f"m{number}.png")
            writer.writerow([f"{number}.png", label, "train" if number < 16 else "test", f"m{number}.png"])
    return folder


def squares() -> Data:
    images = np.stack([picture(number, "light") for number in range(8)])
    masks = np.stack([square(number) > 0 for number in range(8)])
    return Data(images, masks, np.arange(8) % 2, ["a", "b"])


def spec(folder: Path, **changes: Any) -> Spec:
    values = {"train": 16, "confound": "patch", "fraction": 1.0, "corrections": 4, "faults": "none", **changes}
    return Spec("squares", str(folder), (SIZE, SIZE), **values)


# --- confounds


@pytest.mark.parametrize("kind", [kind for kind in CONFOUNDS if kind not in ("none", *TRANSLUCENT)])
def test_a_confound_tells_the_class_and_does_so_outside_the_object(kind: str) -> None:
    data = squares()
    blank = Data(np.full_like(data.images, 100), data.masks & False, data.labels, data.classes)
    blank.masks[:, 6:10, 6:10] = True
    first, second = (confound(blank, kind, np.full(8, code), EVERYONE).images[0] for code in (0, 1))
    assert (first != second).any() and (first != 100).any()
    assert (first[6:10, 6:10] == 100).all() and (second[6:10, 6:10] == 100).all()
    assert (blank.images == 100).all()  # the originals stay


@pytest.mark.parametrize(("kind", "count"), [("patch", 25), ("border", 25), ("bar", 25), ("mark", 16)])
def test_a_confound_tells_many_classes_apart(kind: str, count: int) -> None:
    grey = np.full((count, 64, 64, 3), 100, np.uint8)
    data = Data(grey, np.zeros((count, 64, 64), bool), np.arange(count), [str(code) for code in range(count)])
    images = confound(data, kind, data.labels, np.arange(count)).images
    assert len({image.tobytes() for image in images}) == count


def test_stripes_on_a_bright_picture_stay_bright() -> None:
    data = squares()
    bright = Data(np.full_like(data.images, 240), data.masks, data.labels, data.classes)
    striped = confound(bright, "background", data.labels, EVERYONE).images
    assert striped.min() >= 240 and striped.max() == 255


def test_a_mask_never_holds_what_the_confound_drew() -> None:
    data = squares()
    everything = Data(data.images, data.masks | True, data.labels, data.classes)
    marked = confound(everything, "mark", data.labels, EVERYONE)
    assert np.array_equal(~marked.masks, (marked.images != data.images).any(axis=-1))
    assert not marked.masks.all() and everything.masks.all()


@pytest.mark.parametrize("kind", TRANSLUCENT)
def test_what_is_translucent_lies_over_the_object_and_leaves_its_mask(kind: str) -> None:
    data = squares()
    marked = confound(data, kind, data.labels, EVERYONE)
    assert np.array_equal(marked.masks, data.masks)
    assert (marked.images != data.images).any(axis=-1)[data.masks].any()
    blank = Data(np.full_like(data.images, 100), data.masks, data.labels, data.classes)
    first, second = (confound(blank, kind, np.full(8, code), EVERYONE).images[0] for code in (0, 1))
    assert (first != second).any()


def test_a_class_that_does_not_carry_the_confound_stays_as_it_is() -> None:
    data = squares()
    marked = confound(data, "patch", data.labels, np.array([1]))
    changed = (marked.images != data.images).any(axis=(1, 2, 3))
    assert changed.tolist() == (data.labels == 1).tolist()
    assert np.array_equal(confound(data, "none", data.labels, EVERYONE).images, data.images)


# --- who is corrected, and how


def test_classes_take_turns_in_the_given_order() -> None:
    assert choose(np.array([0, 0, 0, 1, 1]), [2, 1, 0, 4, 3]) == [2, 4, 1, 3, 0]


def test_a_hasty_mask_is_larger_than_the_object_and_never_empty() -> None:
    mask = np.zeros((32, 32), dtype=bool)
    mask[12:20, 12:20] = True
    painted = np.stack([hasty(mask, np.random.default_rng(seed)) for seed in range(60)])
    areas = painted.sum(axis=(1, 2))
    assert areas.min() > 0 and np.median(areas) > 3 * mask.sum()
    covered = (painted & mask).sum(axis=(1, 2)) / mask.sum()
    assert 0 < (covered < 0.1).sum() < 10  # around something else
    assert 10 < ((covered > 0.25) & (covered < 0.75)).sum() < 30  # a third of them around half of it
    assert np.array_equal(hasty(mask, np.random.default_rng(7)), painted[7])


# --- data sets


def test_an_index_gives_its_own_split_and_empty_masks_where_nothing_is_marked(folder: Path) -> None:
    train, test = load("squares", folder.parent, (SIZE, SIZE), 1000, 0)
    assert (len(train), len(test), train.classes) == (16, 8, ["light", "none"])
    assert (train.masks.any(axis=(1, 2)) == (train.labels == 0)).all()
    assert len(load(str(folder), None, (SIZE, SIZE), 5, 0)[0]) == 5


def test_groups_are_never_parted(folder: Path) -> None:
    with (folder / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["split"], row["group"] = "", str(number // 4)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pictures = [picture(number, "light") for number in range(24)]
    for seed in range(3):
        train, test = load("squares", folder, (SIZE, SIZE), 1000, seed)
        assert (len(train), len(test)) == (16, 8)
        tested = [number for number in range(24) if (test.images == pictures[number]).all(axis=(1, 2, 3)).any()]
        groups = {number // 4 for number in tested}
        assert len(tested) == 8 and len(groups) == 2


def test_an_index_is_read_as_init_reads_it(folder: Path) -> None:
    """With a byte order mark, a class of any name, and a split that the first row lacks."""
    lines = (folder / "index.csv").read_text().splitlines()
    lines[1] = lines[1].replace(",train,", ",,")
    (folder / "index.csv").write_text("\n".join(lines).replace(",none,", ",mixed,"), encoding="utf-8-sig")
    train, test = load("squares", folder, (SIZE, SIZE), 1000, 0)
    assert (len(train), len(test), train.classes) == (16, 8, ["light", "mixed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na.png,x\n", "has no picture with a class and a mask; fill the columns cls and mask"),
        ("image,label,mask\n", "needs a column image and a row for each picture"),
    ],
)
def test_an_index_that_lacks_something_is_one_line(folder: Path, text: str, message: str) -> None:
    (folder / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load("squares", folder, (SIZE, SIZE), 1000, 0)


def test_a_data_set_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index.csv of coffee_leaf at .*; name its folder with --path"):
        load("coffee_leaf", tmp_path, (SIZE, SIZE), 10, 0)


def test_digits_are_split_by_seed() -> None:
    first, again, other = (load("digits", None, (32, 32), 100, seed) for seed in (0, 0, 1))
    assert np.array_equal(first[0].images, again[0].images) and not np.array_equal(first[0].images, other[0].images)
    assert first[0].images.shape == (100, 32, 32, 3) and len(first[1]) > 1000
    assert 0.05 < first[0].masks.mean() < 0.6


def test_shapes_are_drawn_anew_for_each_seed_and_each_lies_under_its_mask() -> None:
    (train, test), again, other = (load("shapes", None, (48, 64), 12, seed) for seed in (0, 0, 1))
    assert np.array_equal(train.images, again[0].images) and not np.array_equal(train.images, other[0].images)
    assert train.images.shape == (12, 48, 64, 3) and len(test) > 100 and len(train.classes) == 6
    assert np.bincount(train.labels).tolist() == [2] * 6
    for image, mask in zip(test.images.astype(int), test.masks, strict=True):
        assert 0.005 < mask.mean() < 0.25
        assert np.abs(image[mask].mean(axis=0) - image[~mask].mean(axis=0)).mean() > 15  # a colour of its own


def test_a_data_set_is_trained_as_it_was_measured_and_the_command_comes_first() -> None:
    spec, changes = problem_of(parse(["--data", "/anywhere/coffee_leaf"]))
    assert (spec.size, changes["model.weights"], changes["train.epochs"]) == ((64, 128), "pretrained", 8)
    options = parse(["--data", "coffee_leaf", "--size", "32", "48", "--epochs", "2", "--set", "model.weights=none"])
    spec, changes = problem_of(options)
    assert (spec.size, changes["model.weights"], changes["train.epochs"]) == ((32, 48), "none", 2)
    assert problem_of(parse(["--data", "/some/folder"]))[1]["model.weights"] == "pretrained"
    assert problem_of(parse(["--data", "/some/folder", "--size", "32", "32"]))[1]["model.backbone"] == "cifar_resnet8"
    assert problem_of(parse([]))[1] == {"model.backbone": "cifar_resnet8", "data.flip": False}


# --- arms


def test_every_arm_is_made_of_settings_that_exist() -> None:
    for changes in ARMS.values():
        settings_with(changes)
    alone = [changes for changes in ARMS.values() if changes.items() >= correction.MAP_ALONE.items()]
    assert sorted(changes["corrections.map_loss"] for changes in alone) == sorted(MAP_LOSSES)
    assert ARMS["default"] == {}
    with pytest.raises(ValueError, match="nothing.share is not a setting"):
        settings_with({"nothing.share": 1})


def test_corrected_samples_carry_their_masks_and_absence_is_all_but_the_confound(folder: Path, tmp_path: Path) -> None:
    problem = Problem(tmp_path / "problem", spec(folder), 0)
    samples = problem.corrected(problem.chosen, "masks.npz")
    named = [row for row, sample in enumerate(samples) if sample.masks]
    assert sorted(problem.chosen) == named and len(named) == 4
    with np.load(problem.root / "masks.npz") as masks:
        for row in named:
            mask = masks[samples[row].id] > 0
            expected = problem.visible[row] if samples[row].label == "light" else ~problem.drawn_over[row]
            assert 0 < problem.drawn_over[row].mean() < 0.1
            assert np.array_equal(mask, expected)
    nothing_is_hot: Any = SimpleNamespace(maps=np.zeros((16, 4, 4), np.float32))
    labelers = Labelers(problem)
    labelers.answer(named, nothing_is_hot)
    with np.load(problem.root / "masks.npz") as masks:
        assert all(np.array_equal(labelers.masks[row], masks[samples[row].id]) for row in named)


def test_no_map_is_fine_where_there_is_no_object(folder: Path, tmp_path: Path) -> None:
    all_is_hot: Any = SimpleNamespace(maps=np.ones((16, 4, 4), np.float32))
    for kind, verdict in (("patch", "all_but_map"), ("none", "whole_image")):
        problem = Problem(tmp_path / kind, spec(folder, confound=kind), 0)
        bare = np.flatnonzero(~problem.data.masks.any(axis=(1, 2))).tolist()
        labelers = Labelers(problem)
        labelers.answer(bare, all_is_hot)
        assert set(labelers.verdicts.values()) == {verdict}
        assert all(labelers.samples("masks.npz")[row].painted for row in bare)
        says = labelers.told().verdicts[bare]
        assert (says == 1).all() if kind == "patch" else np.isnan(says).all()


def test_a_run_writes_every_arm_and_a_second_one_trains_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "2"]
    arms = ["upper_random", "l2", "baseline-long", "default", *correction.METHODS]
    arguments += ["--corrections", "4", "--arms", ",".join(arms), "--keep", str(tmp_path / "keep")]
    monkeypatch.setattr(correction, "SMALLEST_GROUP", 1)
    monkeypatch.setattr("benchmarks.methods.VIEWS", 20)
    result = json.loads(json.dumps(run(parse(arguments)), allow_nan=False))
    assert set(result["arms"]) == {"control", "upper", *arms}
    wanted = {*correction.COLUMNS, "std", "seconds"}
    assert all(wanted <= set(figures) for figures in result["arms"].values())
    assert all(0 <= figures["random_confound"] <= 1 for figures in result["arms"].values())
    assert all(0 <= figures["worst_group"] <= figures["worst_class"] for figures in result["arms"].values())
    assert len(list((tmp_path / "keep").glob("*.json"))) == 2 * (2 + len(arms))  # a file for each arm and seed
    monkeypatch.setattr(correction, "train", None)
    monkeypatch.setattr(correction, "fit", None)
    assert json.loads(json.dumps(run(parse(arguments)))) == result


def test_the_control_is_trained_once_for_all_numbers_of_corrections(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(root: Path, samples: Sequence[Sample], settings: Settings, output: Path, *rest: Any, **more: Any) -> None:
        trained.append(output.name)
        correct(root, samples, settings, output, *rest, **more)

    correct = correction.train
    monkeypatch.setattr(correction, "train", train)
    for count in (3, 4):
        arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "1"]
        run(parse([*arguments, "--arms", "default", "--corrections", str(count), "--keep", str(tmp_path / "keep")]))
    assert trained == ["control", "upper", "default", "default"]


def test_a_figure_that_was_not_kept_is_none_and_the_others_stay(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction, "SMALLEST_GROUP", 1)
    arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "1"]
    arguments += ["--arms", "control", "--keep", str(tmp_path / "keep")]
    before = run(parse(arguments))["arms"]
    assert all(0 <= figures["worst_group"] <= 1 for figures in before.values())
    for kept in (tmp_path / "keep").glob("*.json"):
        figures = json.loads(kept.read_text())
        del figures["worst_group"]
        kept.write_text(json.dumps(figures))
    after = run(parse(arguments))["arms"]
    assert all(figures["worst_group"] is None for figures in after.values())
    assert [figures["clean"] for figures in after.values()] == [figures["clean"] for figures in before.values()]


def test_the_groups_are_class_and_value_and_a_class_without_the_confound_is_one(folder: Path, tmp_path: Path) -> None:
    problem = Problem(tmp_path / "problem", spec(folder, fraction=0.5), 0)
    (carrier,) = problem.carriers.tolist()
    assert set(problem.test_values[problem.test_values != -1]) <= {carrier}
    plain, shown = (
        np.stack([np.asarray(Image.open(problem.root / sample.image)) for sample in problem.test[name]])
        for name in ("clean", "random_confound")
    )
    assert ((shown != plain).any(axis=(1, 2, 3)) == (problem.test_values == carrier)).all()


def test_dfr_changes_nothing_but_the_control_s_last_layer(folder: Path, tmp_path: Path) -> None:
    problem = Problem(tmp_path / "problem", spec(folder), 0)
    small = {"data.size": [SIZE, SIZE], "model.backbone": "cifar_resnet8", "train.epochs": 1, "train.batch_size": 8}
    samples, settings = problem.corrected(problem.chosen, "dfr.npz"), settings_with(small)
    after = problem._by_method("dfr", samples, settings).network.state_dict()
    before = correction.load_model(problem.root / "control/model.pt").network.state_dict()
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed == {"linear.weight", "linear.bias"}


def test_an_arm_that_is_not_finite_has_no_figures_and_the_others_go_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "1"]
    arguments += ["--corrections", "4", "--arms", "l2,context", "--set", "corrections.map_weight=.inf"]
    result = run(parse([*arguments, "--json", str(tmp_path / "figures.json")]))
    assert json.loads((tmp_path / "figures.json").read_text())["arms"] == result["arms"]
    assert "l2          no figures: loss inf at epoch 1, step 1; samples " in capsys.readouterr().out
    assert result["arms"]["l2"]["clean"] is None and result["arms"]["l2"]["recovered"] is None
    assert 0 <= result["arms"]["context"]["clean"] <= 1  # whose map loss weighs nothing


def test_the_uppers_learn_from_pictures_whose_confound_tells_nothing(folder: Path, tmp_path: Path) -> None:
    problem = Problem(tmp_path / "problem", spec(folder), 0)
    trained = {**problem.train, "random": problem.at_random()}
    labels = np.array([sample.label for sample in trained["plain"]])
    shown = {
        name: np.stack([np.asarray(Image.open(problem.root / sample.image)) for sample in samples])
        for name, samples in trained.items()
    }
    assert all([sample.label for sample in samples] == labels.tolist() for samples in trained.values())
    drawn = {name: np.where(images != shown["plain"], images, 0) for name, images in shown.items()}
    for label in problem.classes:
        patches = {name: {patch.tobytes() for patch in images[labels == label]} for name, images in drawn.items()}
        assert (len(patches["confounded"]), len(patches["random"])) == (1, 2)


def test_the_paper_goes_on_from_the_control_with_its_extractor_frozen(folder: Path, tmp_path: Path) -> None:
    problem = Problem(tmp_path / "problem", spec(folder), 0)
    small = {"data.size": [SIZE, SIZE], "model.backbone": "cifar_resnet8", "train.epochs": 1, "train.batch_size": 8}
    problem.run("paper", settings_with({**small, **ARMS["paper"]}))
    before, after = (
        correction.load_model(problem.root / arm / "model.pt").network.state_dict() for arm in ("control", "paper")
    )
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert not any(name.startswith("extractor.") for name in changed)
    assert {"linear.weight", "map_head.0.weight"} <= changed


@pytest.fixture
def quickly_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """No masks are drawn, and a corner misleads in every picture; both without learning it."""
    corner = torch.zeros(1, 8, 8, dtype=torch.uint8)
    corner[:, :2, :2] = 255
    monkeypatch.setattr("abn.train.annotate", lambda *problem: ({}, {}))
    monkeypatch.setattr("abn.train.find_shortcuts", lambda pictures, *rest: dict.fromkeys(range(len(pictures)), corner))


@pytest.mark.usefixtures("quickly_found")
def test_an_ablation_trains_as_shipped_and_without_each_ingredient(folder: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "1"]
    arguments += ["--corrections", "12", "--without", "nothing,map loss,what misleads", "--set", "train.start=scratch"]
    found = ablation.run(ablation.parse([*arguments, "--json", str(tmp_path / "figures.json")]))
    assert list(found) == ["nothing", "map loss", "what misleads"]
    assert json.loads((tmp_path / "figures.json").read_text())["without"] == found
    for settings in ablation.SETTINGS.values():
        settings_with(settings)
    with pytest.raises(ValueError, match="--without names 'magic'; known: nothing, map loss"):
        ablation.run(ablation.parse(["--without", "magic"]))


@pytest.mark.usefixtures("quickly_found")
@pytest.mark.parametrize("name", [name for name in ablation.CODE if name != "doubt"])
def test_what_an_ablation_leaves_out_is_asked_for_in_training(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(*arguments: Any) -> None:
        raise Asked

    monkeypatch.setitem(ablation.CODE, name, dict.fromkeys(ablation.CODE[name], ask))
    arguments = ["--data", str(folder), "--size", str(SIZE), str(SIZE), "--epochs", "1", "--seeds", "1"]
    arguments += ["--corrections", "12", "--without", name, "--set", "train.start=scratch"]
    with pytest.raises(Asked):
        ablation.run(ablation.parse(arguments))


def test_a_fraction_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--fraction is 1\.5; it must be above 0 and at most 1"):
        problem_of(parse(["--fraction", "1.5"]))


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="--arms names 'magic'; known: control, baseline-long, paper"):
        run(parse(["--arms", "magic"]))


def test_seeds_are_counted_ranged_or_listed() -> None:
    assert seeds_of("3") == [0, 1, 2]
    assert seeds_of("100-102") == [100, 101, 102]
    assert seeds_of("7,") == [7]
    for text in ("0", "3-1", ","):
        with pytest.raises(ValueError, match=f"--seeds '{text}' names no seed"):
            seeds_of(text)


def test_means_and_deviations_are_over_the_seeds() -> None:
    runs = [{"control": {"clean": value, "seconds": 1.0}} for value in (0.2, 0.6)]
    assert summary(runs)["control"]["clean"] == pytest.approx(0.4)
    assert summary(runs)["control"]["std"] == {"clean": pytest.approx(0.2)}
