"""The report of a workspace: one page, from its files and DVC's cache, with the services down."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from abn.manifest import class_names, read_manifest
from abn.predictions import Predictions, write_shard
from flows.report import chart, chosen_images, columns_of, prediction_files, render_report, seen_in_round
from flows.summary import summarise
from flows.versions import Dvc
from flows.workspace import Workspace
from rounds_on_file import judged
from tiny import make_workspace


def write_predictions(folder: Path, names: list[str], right: bool) -> None:
    """Predictions of two classes, with maps that look to the left or, where they are right, to the right."""
    count = len(names)
    maps = np.zeros((count, 4, 4), np.float32)
    maps[:, :, 2:] = right
    probabilities = np.tile(np.array([0.9, 0.1] if right else [0.2, 0.8], np.float32), (count, 1))
    ones, none = np.ones(count, np.float32), np.full((count, 2), np.nan, np.float32)
    for part, rows in enumerate(np.array_split(np.arange(count), 2)):
        table = Predictions(
            samples=np.array(names), probabilities=probabilities, embeddings=probabilities, corner_reliance=ones,
            early_confidence=ones, attention_probabilities=probabilities, maps=maps, has_gold=ones > 2,
            gold_maps=np.zeros_like(maps), replaced_probabilities=none,
        )  # fmt: skip
        write_shard(folder / f"{part:04d}.npz", table[rows])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Two rounds: the first one's predictions are in DVC's cache alone, the second one's in the workspace, too."""
    root = make_workspace(tmp_path_factory.mktemp("report") / "leaves")
    (root / ".gitignore").write_text("/data/images/\n*.npz\n*.pt\n/.abnloop/\n/answers/\n/results/predictions/\n")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    workspace, dvc = Workspace(root), Dvc(root)
    dvc.init()
    command = "python -c \"import shutil; shutil.copytree('answers', 'results/predictions')\""
    stage = {"cmd": command, "deps": ["answers"], "outs": ["results/predictions"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"predict": stage}}))
    names = [sample.id for sample in read_manifest(root)]
    for number in (1, 2):
        write_predictions(root / "answers", names, right=number == 2)
        dvc.repro(lambda line: None)
        changes = {"state": "open"} if number == 2 else {}
        judged(workspace, number, "promoted" if number == 1 else "refused", f"<b>reason {number}</b>", **changes)
    shutil.rmtree(root / "answers")
    return workspace


def test_every_round_shows_what_its_own_model_saw(place: Workspace) -> None:
    samples = read_manifest(place.root)
    images, classes = chosen_images(place, samples), class_names(samples)
    first, second = (seen_in_round(place, number, images, classes) for number in (1, 2))
    assert first and second
    assert set(first.maps) == {one.id for one in images} == {one.id for one in samples if one.split == "test"}
    assert all(one.sum() == 0 for one in first.maps.values())
    assert all(one.sum() == 8 for one in second.maps.values())
    assert set(first.answers.values()) == {classes[1]} and set(second.answers.values()) == {classes[0]}
    assert prediction_files(place, 1)[0].is_relative_to(place.root / ".dvc/cache")


def test_the_page_holds_the_whole_story_by_itself(place: Workspace) -> None:
    page = render_report(place)
    assert page.count("data:image/png;base64,") == 4 * (1 + 1 + 2), "four images, each with its mask and two maps"
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "&lt;b&gt;reason 2&lt;/b&gt;" in page and "<b>reason" not in page
    for words in ("Rounds of leaves", "promoted", "refused", "round 2", "10 corrections", "baseline 0.600"):
        assert words in page, words
    assert "not at hand" not in page


def test_a_title_and_a_story_may_be_given(place: Workspace) -> None:
    page = render_report(place, "Digits", "Every digit carried a patch.")
    assert "<h1>Digits</h1>" in page and "Every digit carried a patch." in page


def test_predictions_that_are_gone_are_told_in_words(place: Workspace, tmp_path: Path) -> None:
    copy = Workspace(shutil.copytree(place.root, tmp_path / "copy", symlinks=True))
    shutil.rmtree(copy.root / ".dvc/cache")
    page = render_report(copy)
    assert page.count("data:image/png;base64,") == 4 * (1 + 1 + 1) and page.count("not at hand") == 4
    assert "The predictions of round 1 are not on this machine" in page


def test_a_workspace_without_a_judged_round_has_no_report(tmp_path: Path) -> None:
    root = make_workspace(tmp_path / "leaves")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    with pytest.raises(ValueError, match="has no judged round; `abnloop round open` trains"):
        render_report(Workspace(root))


def test_of_many_rounds_the_first_the_champions_and_the_last_are_shown() -> None:
    rounds = [{"round": number, "champion": number == 8} for number in range(1, 21)]
    shown = [one["round"] for one in columns_of(rounds)]
    assert shown[0] == 1 and shown[-1] == 20 and 8 in shown and len(shown) == 5
    assert [one["round"] for one in columns_of(rounds[:5])] == [1, 2, 3, 4, 5]


def test_the_chart_draws_higher_accuracy_higher_and_leaves_out_what_was_not_measured(place: Workspace) -> None:
    drawn = chart(summarise(place))
    lines = {line["name"]: line["points"] for line in drawn["lines"]}
    assert set(lines) == {"test", "baseline"}, "no gold mask, no accuracy with swapped background"
    assert lines["test"][0]["x"] < lines["test"][1]["x"] and lines["test"][0]["y"] > lines["test"][1]["y"]
    assert len(chart(summarise(place)[:1])["lines"][0]["points"]) == 1
