from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pool, selection


def test_every_round_adds_minutes_and_learns_from_all_masks(tmp_path: Path) -> None:
    plot, figures = tmp_path / "curves.png", tmp_path / "figures.json"
    arguments = ["--train", "60", "--epochs", "1", "--seeds", "1", "--rounds", "2", "--minutes", "1"]
    options = selection.parse(
        [*arguments, "--strategies", "benefit,random", "--plot", str(plot), "--json", str(figures)]
    )
    curves = selection.run(options)
    assert curves["benefit"][0] == curves["random"][0]  # both start from the same network
    for points in curves.values():
        assert [point["minutes"] > 0 for point in points] == [False, True, True]
        assert points[0]["pictures"] < points[1]["pictures"] < points[2]["pictures"]
        assert all(0 <= point["worst_group"] <= point["accuracy"] <= 1 for point in points)
    assert json.loads(figures.read_text()) == {"seeds": 1, "curves": curves}
    with Image.open(plot) as image:
        assert image.width > 300


def test_an_unknown_strategy_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"--strategies names 'best'; known: benefit, attention, "):
        selection.run(selection.parse(["--strategies", "benefit,best"]))


def test_what_a_large_pool_costs_is_measured_on_the_stage_itself(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    size = ["--samples", "300", "--dimensions", "8", "--answered", "20", "--budget", "10"]
    pool.main([*size, "--strategies", "benefit", "--json", str(figures)])
    measured = json.loads(figures.read_text())
    assert measured["samples"] == 300 and measured["strategies"].keys() == {"benefit"}
    assert 50 < measured["strategies"]["benefit"]["megabytes"] < pool.LIMIT
