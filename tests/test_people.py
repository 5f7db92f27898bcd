"""What is kept of each annotation, what training learns from them, and how each labeler does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from abn.manifest import CORRECTION_COLUMNS, mask_sha256
from flows.people import (
    ANNOTATION_COLUMNS,
    annotation_rows,
    correction_row,
    labeler_report,
    labeler_table,
    still_standing,
)
from flows.workspace import Workspace, write_table
from labeling.corrections import SKIPPED, Correction, SetAside, settle

LEFT, WIDE = np.zeros((4, 8), np.uint8), np.zeros((4, 8), np.uint8)
LEFT[:, :3] = WIDE[:, :4] = 255
FIXED = Correction("s1", 7, 1, "2026-01-01T00:00:01Z", "ann", "map_fixed", None, 0.5, "v1", 0.2, LEFT)
WIDER = replace(FIXED, annotation=2, labeler="bob", revision="2026-01-01T00:00:09Z", minutes=1.5, moved=0.4, mask=WIDE)
UNUSABLE = replace(FIXED, annotation=3, labeler="cyd", verdict="unusable", mask=None, moved=None)


def test_every_annotation_keeps_a_row_of_its_own() -> None:
    rows = annotation_rows([FIXED, WIDER, UNUSABLE], [SetAside(9, "s2", SKIPPED, "bob", 0.1)])
    assert [tuple(row) for row in rows] == [ANNOTATION_COLUMNS] * 4
    assert [row["annotation"] for row in rows] == ["1", "2", "3", "9"]
    assert [row["agreement"] for row in rows] == ["0.375", "0.375", "0.000", ""], "0.75 with one, 0 with the other"
    assert [row["moved"] for row in rows] == ["0.200", "0.400", "", ""]
    skipped = {"sample": "s2", "annotation": "9", "labeler": "bob", "minutes": "0.10", "set_aside": SKIPPED}
    assert {name: value for name, value in rows[-1].items() if value} == skipped


def test_a_disputed_annotation_says_what_it_said_and_why_nothing_was_learned() -> None:
    _, (dispute,) = settle([FIXED, UNUSABLE], panel=2)
    aside = [SetAside(one.annotation, "s1", dispute.reason, one.labeler, one.minutes) for one in dispute.opinions]
    rows = annotation_rows([FIXED, UNUSABLE], aside)
    assert [(row["verdict"], row["labeler"], row["minutes"]) for row in rows] == [
        ("map_fixed", "ann", "0.50"),
        ("unusable", "cyd", "0.50"),
    ]
    assert {row["set_aside"] for row in rows} == {dispute.reason}


def test_training_learns_from_one_row_that_leads_to_every_annotation() -> None:
    (consensus,), _ = settle([FIXED, WIDER], panel=2)
    row = correction_row(consensus, 4, "rounds/0004/masks.npz")
    assert sorted(row) == sorted(CORRECTION_COLUMNS)
    assert (row["annotation"], row["labeler"], row["revision"]) == ("1 2", "ann bob", "2026-01-01T00:00:09Z")
    assert (row["minutes"], row["weight"], row["moved"]) == ("2.00", "0.750", "0.300")
    assert consensus.mask is not None
    assert (row["masks"], row["sha256"]) == ("rounds/0004/masks.npz", mask_sha256(consensus.mask))


@pytest.mark.parametrize(
    ("read", "stands"),
    [([1, 2], False), ([1, 2, 3], False), ([1], True), ([3], True), ([], True)],
)
def test_what_was_said_stands_until_all_of_it_is_read_anew(read: list[int], stands: bool) -> None:
    (consensus,), _ = settle([FIXED, WIDER], panel=2)
    rows = {"s1": correction_row(consensus, 1, "masks.npz")}
    changed = annotation_rows([], [SetAside(number, "s1", SKIPPED) for number in read])
    assert still_standing(rows, changed) == (rows if stands else {})


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Two collected rounds; in the second bob's annotation of the first came in changed."""
    place = Workspace(tmp_path)
    skip = SetAside(9, "s2", SKIPPED, "bob", 0.1)
    empty = SetAside(10, "s3", "empty mask", "ann", 0.2)
    fine = replace(FIXED, sample="s4", annotation=11, verdict="map_ok", moved=0.0, minutes=0.0)
    for number, rows in enumerate(
        [
            annotation_rows([FIXED, WIDER, UNUSABLE], [skip, empty]),
            annotation_rows([fine, replace(WIDER, mask=LEFT, moved=0.2)], []),
        ],
        start=1,
    ):
        write_table(place.round(number).corrections, ANNOTATION_COLUMNS, rows)
    return place


def test_the_report_adds_up_what_each_labeler_did(place: Workspace) -> None:
    ann, bob, cyd = labeler_report(place)
    assert ann == {
        "labeler": "ann",
        "tasks": 2,
        "minutes": 0.7,
        "minutes_a_task": 0.5,
        "agreement": 0.375,
        "moved": 0.2,
        "verdicts": {"map_fixed": 1, "map_ok": 1},
        "skipped": 0,
        "set_aside": 1,
    }
    assert (bob["tasks"], bob["moved"], bob["skipped"], bob["set_aside"]) == (1, 0.2, 1, 0), "the changed one counts"
    assert (cyd["agreement"], cyd["moved"], cyd["verdicts"]) == (0.0, None, {"unusable": 1})


def test_the_report_is_a_table_and_json(place: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import labelers_report

    (place.root / "data").mkdir()
    place.manifest.touch()
    labelers_report(place.root, as_json=True)
    assert json.loads(capsys.readouterr().out) == labeler_report(place)
    table = labeler_table(labeler_report(place))
    assert table.row_count == 3
    assert list(table.columns[0].cells) == ["ann", "bob", "cyd"]
    assert list(table.columns[-1].cells) == ["1 map_fixed, 1 map_ok", "1 map_fixed", "1 unusable"]


def test_before_the_first_round_nobody_did_anything(tmp_path: Path) -> None:
    assert labeler_report(Workspace(tmp_path)) == []
