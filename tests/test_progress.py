"""What long work says of how far it is: the lines of stages, and how a log shows them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from abn.stage import printed_progress, progress
from flows.progress import SILENCE, STEPS, Lines, StageLines, in_words, listening, report_step, shown_on


def heard(lines: list[str]) -> tuple[list[tuple[str, int, int, str]], list[str]]:
    """What is reported of a stage's output, and the lines of it that a log needs."""
    told: list[tuple[str, int, int, str]] = []
    stages = StageLines()
    with listening(lambda *words: told.append(words)):
        logged = [line for line in lines if not stages(line)]
    return told, logged


def test_a_stage_is_told_by_its_step_from_its_first_line_on() -> None:
    of = len(STEPS)
    told, logged = heard(
        [
            "Running stage 'control':",
            "> python -m abn.control",
            "step 1/40, epoch 1/2, accuracy 0.25",
            "epoch 1/2  loss 1.5  accuracy 0.500  3.0 s",
            "Stage 'train' didn't change, skipping",
            "Running stage 'predict':",
            "predicted 32/64",
        ]
    )
    assert told == [
        (f"1/{of} train the baseline", 0, 1, ""),
        (f"1/{of} train the baseline", 1, 40, "epoch 1/2, accuracy 0.25"),
        (f"3/{of} train with the corrections", 1, 1, "nothing changed"),
        (f"4/{of} predict every image", 0, 1, ""),
        (f"4/{of} predict every image", 32, 64, ""),
    ]
    assert "step 1/40, epoch 1/2, accuracy 0.25" not in logged and len(logged) == 6


def test_work_within_a_stage_has_a_line_of_its_own() -> None:
    told, _ = heard(["Running stage 'train':", "learning to propagate masks: step 20/250"])
    assert told[-1] == (f"3/{len(STEPS)} train with the corrections: learning to propagate masks", 20, 250, "")


def test_stages_print_what_is_read_and_nothing_outside_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    progress("quiet", 1, 2)
    with printed_progress():
        for step in range(1, 101):
            progress("", step, 100, "epoch 1/1")
        progress("looking", 100, 100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["step 1/100, epoch 1/1", "step 100/100, epoch 1/1", "looking: step 100/100"]
    told, _ = heard(["Running stage 'train':", *lines])
    assert [(done, total) for _, done, total, _ in told[1:]] == [(1, 100), (100, 100), (100, 100)]


def test_every_stage_of_dvc_is_a_step() -> None:
    import yaml

    from tiny import PROJECT

    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    assert stages.keys() <= STEPS.keys()


def test_a_log_gets_a_line_at_the_beginning_now_and_then_and_at_the_end() -> None:
    now, lines = 0.0, list[str]()
    log = Lines(lines.append, lambda: now)
    with listening(log):
        report_step("train")
        now = 30.0  # importing torch, reading the images
        for step in range(1, 101):
            report_step("train", step, 100, detail=f"epoch {step // 50 + 1}/2")
            now += 1.0
    what = f"3/{len(STEPS)} train with the corrections"
    assert lines[:2] == [what, f"{what}, 1 of 100, epoch 1/2"]
    assert lines[2] == f"{what}, 11 of 100, about 89 s left, epoch 1/2"  # making ready does not count
    assert lines[-1] == f"{what}, 100 of 100, took 2 min, epoch 3/2"
    assert len(lines) == 2 + 99 // SILENCE + 1


def test_the_time_that_is_left_begins_anew_where_work_is_done_once_more() -> None:
    now, lines = 0.0, list[str]()
    log = Lines(lines.append, lambda: now)
    for step in [*range(1, 51), *range(1, 51)]:
        log("propagate masks", step, 50, "")
        now += 1.0
    assert lines.count("propagate masks, 50 of 50, took 49 s") == 2
    assert "propagate masks, 11 of 50, about 39 s left" in lines and not any("min left" in line for line in lines)


def test_a_step_that_a_later_round_skips_is_not_said_to_have_taken_as_long_as_before() -> None:
    now, lines = 0.0, list[str]()
    log = Lines(lines.append, lambda: now)
    for step in range(51):
        log("train the baseline", step, 50, "")
        now += 1.0
    now = 600.0
    log("train the baseline", 1, 1, "nothing changed")
    assert lines[-2:] == ["train the baseline, 50 of 50, took 50 s", "train the baseline, nothing changed"]


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b"]])
def test_bars_are_drawn_on_a_terminal(names: list[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with shown_on(console) as on_progress:
        for name in names:
            for step in (1, 2, 3):
                on_progress(f"[x] {name}", step, 3, "epoch 1/1")
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "[x] a" in drawn and "100%" in drawn and "epoch 1/1" in drawn


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (75, "75 s"), (600, "10 min"), (9000, "2.5 h")])
def test_a_duration_is_told_in_one_unit(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
