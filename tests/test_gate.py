"""The gate: when a loss counts as one, and that nothing but the validation set has a say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abn.manifest import Sample
from abn.model import ABN, save_model
from flows.gate import BOTH, COMPARISON_COLUMNS, Comparison, Criterion, GateConfig, Judgement, View, compare, judge
from tiny import ROWS, SIZE, Row, make_workspace, tiny_settings, write_params

CONFIG = GateConfig(
    confidence=0.9, accuracy_tolerance=0.0, worst_class_tolerance=0.0, map_tolerance=0.02, resamples=2000, seed=0
)


def compared(
    *classes: tuple[int, int, int, int],
    inside: tuple[float, float] = (0.7, 0.7),
    reliance: tuple[float, float] = (0.3, 0.3),
) -> Comparison:
    """Two models by how many pictures of each class both have right, only the champion, only the challenger, neither;
    and by what their maps measure, champion's and challenger's."""
    kinds = [(f"class{c}", kind) for c, counts in enumerate(classes) for kind in range(4) for _ in range(counts[kind])]
    samples = [Sample(f"val{i}", "", label, "val") for i, (label, _) in enumerate(kinds)]

    def view(right: tuple[int, int], model: int) -> View:
        answers = [label if kind in right else "else" for label, kind in kinds]
        of_all = np.ones(len(kinds))
        return View(answers, answers, inside[model] * of_all, reliance[model] * of_all, np.zeros((len(kinds), 2, 2)))

    return Comparison(samples, view((0, 1), 0), view((0, 2), 1))


def criterion(judgement: Judgement, name: str) -> Criterion:
    """By its name, wherever it was measured."""
    (found,) = [one for one in judgement.criteria if one.name.removesuffix(BOTH) == name]
    return found


def test_a_model_is_not_worse_than_itself() -> None:
    judgement = judge(compared((20, 0, 0, 4), (20, 0, 0, 5)), CONFIG)
    assert judgement.promoted
    assert judgement.reason == (
        "accuracy in both contexts 0.816 -> 0.816; worst class accuracy in both contexts 0.800 -> 0.800; "
        "attention inside mask 0.700 -> 0.700; context reliance 0.300 -> 0.300"
    )


@pytest.mark.parametrize(
    ("lost", "won", "promoted"),
    [(1, 0, True), (2, 0, True), (3, 0, False), (5, 3, True), (10, 3, False), (0, 3, True)],
)
def test_of_49_pictures_a_few_may_be_lost_by_chance(lost: int, won: int, promoted: bool) -> None:
    """Three lost and none won happen to two equal models once in eight times; two, once in four."""
    rest = 24 - lost - won
    classes = (20, 0, 0, 5), (rest, lost, won, 0)
    assert criterion(judge(compared(*classes), CONFIG), "accuracy").passed == promoted


@pytest.mark.parametrize(("lost", "promoted"), [(30, True), (75, False)])
def test_of_4900_pictures_one_in_a_hundred_counts(lost: int, promoted: bool) -> None:
    half = (2200, 0, 0, 200), (2500 - lost - 25, lost, 25, 0)
    assert criterion(judge(compared(*half), CONFIG), "accuracy").passed == promoted


def test_a_larger_tolerance_lets_more_be_lost() -> None:
    worse = compared((30, 8, 0, 12))
    assert not judge(worse, CONFIG).promoted
    lenient = replace(CONFIG, accuracy_tolerance=0.16, worst_class_tolerance=0.16)
    assert judge(worse, lenient).promoted


RIGHT, WRONG = ["class0"] * 20 + ["class1"] * 20, ["class1"] * 20 + ["class0"] * 20


def answering(as_they_are: list[str], elsewhere: list[str], reliance: float = 0.5) -> View:
    return View(as_they_are, elsewhere, np.full(40, 0.5), np.full(40, reliance), np.zeros((40, 2, 2)))


def judged(champion: View, challenger: View) -> Judgement:
    samples = [Sample(f"val{i}", "", label, "val") for i, label in enumerate(RIGHT)]
    return judge(Comparison(samples, champion, challenger), CONFIG)


def test_who_unlearns_the_shortcut_is_not_refused_for_being_right_less_often() -> None:
    """As they are, the pictures carry the champion's shortcut; in another context only the challenger is right."""
    mostly, often = RIGHT[:18] + WRONG[18:22] + RIGHT[22:], RIGHT[:16] + WRONG[16:24] + RIGHT[24:]
    champion, challenger = answering(RIGHT, WRONG), answering(mostly, often)
    assert judged(champion, challenger).promoted
    assert not judged(challenger, champion).promoted


def test_who_is_wrong_everywhere_is_refused_however_little_it_relies_on_the_context() -> None:
    """As a network that learned nothing is: no worse in another context than one that knows only the shortcut."""
    judgement = judged(answering(RIGHT, WRONG), answering(WRONG, WRONG, reliance=0.1))
    assert not judgement.promoted
    assert judgement.reason.startswith("accuracy in both contexts 0.500 -> 0.000 (")


def test_a_class_that_is_given_up_is_seen_behind_a_better_accuracy() -> None:
    judgement = judge(compared((400, 0, 80, 20), (25, 15, 0, 10)), CONFIG)
    assert not judgement.promoted and criterion(judgement, "accuracy").passed
    assert (
        judgement.reason.startswith("worst class accuracy in both contexts 0.800 -> 0.500 (")
        and ";" not in judgement.reason
    )


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"inside": (0.7, 0.67)}, "attention inside mask 0.700 -> 0.670 (-0.030, may lose 0.02)"),
        ({"reliance": (0.3, 0.33)}, "context reliance 0.300 -> 0.330 (-0.030, may lose 0.02)"),
        ({"inside": (0.7, 0.68), "reliance": (0.3, 0.32)}, ""),
        ({"inside": (0.7, 0.9), "reliance": (0.3, 0.1)}, ""),
    ],
)
def test_maps_may_get_worse_by_the_tolerance_and_no_more(change: dict[str, tuple[float, float]], fault: str) -> None:
    judgement = judge(compared((10, 0, 10, 0), **change), CONFIG)  # however much better the answers are
    assert judgement.promoted == (not fault)
    if fault:
        assert judgement.reason == fault


def test_every_fault_is_named_and_nothing_else() -> None:
    judgement = judge(compared((10, 10, 0, 0), (20, 0, 0, 0), inside=(0.7, 0.1), reliance=(0.3, 0.3)), CONFIG)
    faults = judgement.reason.split("; ")
    assert [fault.split(" 0.")[0].split(" 1.")[0] for fault in faults] == [
        "accuracy in both contexts",
        "worst class accuracy in both contexts",
        "attention inside mask",
    ]
    assert "1.000 -> 0.750 (" in faults[0] and "at best with 90% confidence, may lose 0.0)" in faults[0]


def test_maps_are_judged_only_where_both_were_measured() -> None:
    without = compared((10, 0, 0, 0), inside=(np.nan, 0.0), reliance=(np.nan, 0.3))
    assert [one.name for one in judge(without, CONFIG).criteria] == ["accuracy", "worst_class_accuracy"]
    half = compared((10, 0, 0, 0), inside=(0.7, 0.0))
    half.champion.attention_inside_mask[5:] = np.nan
    half.challenger.attention_inside_mask[:5] = 0.8
    assert criterion(judge(half, CONFIG), "attention_inside_mask").challenger == 0.8


def test_the_bootstrap_is_that_of_drawing_pictures() -> None:
    """Against the plain one: draw the pictures of each class with replacement, count again, 20000 times."""
    both = compared((12, 6, 3, 4), (20, 2, 5, 1))
    truth = np.array([sample.label for sample in both.samples])
    right = np.array([np.array(view.answers) == truth for view in (both.champion, both.challenger)])
    generator = np.random.default_rng(1)
    hits = []
    for label in ("class0", "class1"):
        rows = np.flatnonzero(truth == label)
        hits.append(right[:, generator.choice(rows, (20000, len(rows)))].mean(axis=2))
    share = np.array([25, 28]) / 53
    gains = {
        "accuracy": np.tensordot(share, np.array(hits), 1),
        "worst_class_accuracy": np.minimum(*hits),
    }
    judgement = judge(both, replace(CONFIG, resamples=20000))
    for name, (champion, challenger) in gains.items():
        assert criterion(judgement, name).gain == pytest.approx(np.quantile(challenger - champion, 0.9), abs=0.021)


def test_the_same_numbers_give_the_same_verdict() -> None:
    both = compared((12, 6, 3, 4), (20, 2, 5, 1))
    assert judge(both, CONFIG) == judge(both, CONFIG)


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        *((name, value, "from 0 to 1") for name in ("accuracy_tolerance", "map_tolerance") for value in (-0.01, 1.01)),
        ("worst_class_tolerance", 2.0, "from 0 to 1"),
        ("confidence", 1.0, "from 0.5 to below 1"),
        ("resamples", 10, "at least 100"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(name: str, value: float, range_: str) -> None:
    with pytest.raises(ValueError, match=rf"gate\.{name} is {value}; it must be {range_}"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]


# --- on pictures


def write_model(path: Path, seed: int, classes: list[str]) -> Path:
    torch.manual_seed(seed)
    settings = tiny_settings()
    save_model(path, ABN(settings.model, len(classes)), settings.model, classes, (SIZE, SIZE))
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that never learned anything."""
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "a.pt", 1, ["dark", "light"]), write_model(folder / "b.pt", 2, ["dark", "light"])


def compare_in(root: Path, rows: list[Row], pair: tuple[Path, Path]) -> Comparison:
    make_workspace(root, rows)
    write_params(root, epochs=1)
    return compare(root, *pair)


def test_test_data_play_no_part(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Other test pictures under other labels, or none at all: the same comparison, to the last digit."""
    rows = list(ROWS)
    known = compare_in(tmp_path / "as it is", rows, pair)
    assert [sample.split for sample in known.samples] == ["val"] * 4
    turned = [replace(row, label="dark") if row.split == "test" else row for row in rows]
    make_workspace(tmp_path / "turned", turned)
    write_params(tmp_path / "turned", epochs=1)
    for row in rows:
        if row.split == "test":
            Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "turned" / row.image)
    without = [row for row in rows if row.split != "test"]
    for other in (compare(tmp_path / "turned", *pair), compare_in(tmp_path / "without", without, pair)):
        assert other.rows() == known.rows()
        assert judge(other, CONFIG) == judge(known, CONFIG)


def test_a_comparison_has_a_row_a_picture(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    both = compare_in(tmp_path / "w", list(ROWS), pair)
    rows = both.rows()
    assert [row["sample"] for row in rows] == ["val0", "val1", "val2", "val3"]
    assert all(set(row) == set(COMPARISON_COLUMNS) for row in rows)
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in COMPARISON_COLUMNS[6:])
    assert not np.array_equal(both.champion.maps, both.challenger.maps)


def test_both_models_are_shown_the_same_contexts(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    rows = compare_in(tmp_path / "w", list(ROWS), (pair[0], pair[0])).rows()
    assert all(row["champion_context_reliance"] == row["challenger_context_reliance"] != "" for row in rows)


def test_a_champion_that_does_not_know_a_class_is_wrong_on_it(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    other = write_model(tmp_path / "old.pt", 3, ["bright", "grey"])
    both = compare_in(tmp_path / "w", list(ROWS), (other, pair[1]))
    assert set(both.champion.answers) <= {"bright", "grey"}
    assert criterion(judge(both, CONFIG), "accuracy").champion == 0
