from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from abn.config import load_section, make_section, read_params
from abn.data import DataConfig
from abn.predict import PredictConfig
from abn.selection import SelectionConfig
from abn.train import CorrectionsConfig, Settings, TrainConfig
from tiny import PROJECT


@dataclass(frozen=True)
class Oven:
    degrees: float
    mode: Literal["fan", "grill"]
    size: tuple[int, int] = (40, 30)
    racks: tuple[str, ...] = ()
    note: str | None = None
    light: bool = True


GOOD: dict[str, Any] = {"degrees": 200, "mode": "fan"}


def test_a_section_becomes_a_dataclass_and_whole_numbers_become_floats() -> None:
    oven = make_section(Oven, {**GOOD, "size": [50, 40], "racks": ["top", "low"], "note": None}, "oven")
    assert oven == Oven(200.0, "fan", (50, 40), ("top", "low"), None)
    assert isinstance(oven.degrees, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degres": 1}, "oven.degres is not a setting; did you mean degrees?"),
        ({"xyz": 1}, "oven.xyz is not a setting; known: degrees, mode, size, racks, note, light"),
        ({"mode": "gril"}, "oven.mode is 'gril'; choose one of fan, grill; did you mean grill?"),
        ({"mode": None}, "oven.mode is None; choose one of fan, grill"),
        ({"degrees": "hot"}, "oven.degrees is 'hot'; it must be of type float"),
        ({"degrees": True}, "oven.degrees is True; it must be of type float"),
        ({"light": 1}, "oven.light is 1; it must be of type bool"),
        ({"size": [1, 2, 3]}, "oven.size is [1, 2, 3]; it must be a list of 2 values"),
        ({"size": 5}, "oven.size is 5; it must be a list of 2 values"),
        ({"size": [1, True]}, "oven.size is True; it must be of type int"),
        ({"size": [1, 2.5]}, "oven.size is 2.5; it must be of type int"),
        ({"racks": "top"}, "oven.racks is 'top'; it must be a list"),
        ({"note": 3}, "oven.note is 3; it must be of type str"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_setting(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        make_section(Oven, {**GOOD, **change}, "oven")
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"^oven\.mode is missing from params\.yaml$"):
        make_section(Oven, {"degrees": 200}, "oven")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
        ("oven: 3", "must be a mapping of sections"),
        ("ovn: {}", "has no section oven; did you mean ovn?"),
    ],
)
def test_a_params_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        load_section(Oven, path, "oven")
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_params_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml does not exist; run in a workspace or name one"):
        read_params(tmp_path / "params.yaml")


def test_the_params_of_the_project_fit_every_section_of_abn() -> None:
    settings = Settings.load(PROJECT / "params.yaml")
    assert settings.data.size == (32, 32)
    assert settings.model.mechanism == "residual"
    load_section(PredictConfig, PROJECT / "params.yaml", "predict")
    load_section(SelectionConfig, PROJECT / "params.yaml", "selection")


@pytest.mark.parametrize(
    ("cls", "section", "change", "message"),
    [
        (DataConfig, "data", {"size": [4, 32]}, "data.size is [4, 32]"),
        (DataConfig, "data", {"shift": 32}, "data.shift is 32; it must be from 0 to 31 pixels"),
        (DataConfig, "data", {"shift": -1}, "data.shift is -1"),
        (TrainConfig, "train", {"epochs": 0}, "train.epochs is 0; it must be above 0"),
        (TrainConfig, "train", {"learning_rate": -0.1}, "train.learning_rate is -0.1"),
        (CorrectionsConfig, "corrections", {"share": 1.5}, "corrections.share is 1.5; it must be from 0 to 1"),
        (CorrectionsConfig, "corrections", {"recipe": "contxt"}, "corrections.recipe is 'contxt'"),
        (PredictConfig, "predict", {"batch_size": 1}, "predict.batch_size is 1; it must be at least 2"),
        (SelectionConfig, "selection", {"budget": 0}, "selection.budget is 0; it must be at least 1"),
        (SelectionConfig, "selection", {"random_share": -1}, "selection.random_share is -1.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(cls: type, section: str, change: dict[str, Any], message: str) -> None:
    values = {**read_params(PROJECT / "params.yaml")[section], **change}
    with pytest.raises(ValueError) as refused:
        make_section(cls, values, section)
    assert str(refused.value).startswith(message)
