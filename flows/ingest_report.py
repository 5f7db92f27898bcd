"""What `init` found in the user's images, masks and tables, and made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 3  # names in a line about many files


@dataclass
class Report:
    """What `init` did; data/ingest.json holds the same."""

    images: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> class ("" for none) -> pictures
    gold_masks: int = 0
    simulation_masks: int = 0
    unreadable: list[dict[str, str]] = field(default_factory=list)  # image, reason
    duplicates: list[dict[str, str]] = field(default_factory=list)  # image, same_as
    doubtful: list[str] = field(default_factory=list)  # images left out with --skip-doubtful
    turned: list[str] = field(default_factory=list)  # saved as PNG with their EXIF orientation applied
    rescaled: list[str] = field(default_factory=list)  # saved as PNG of 16 bits, of which their values used fewer
    dropped: dict[str, int] = field(default_factory=dict)  # class -> pictures
    chosen: dict[str, Any] = field(default_factory=dict)  # "section.key" -> value, as the images suggest it
    why: list[str] = field(default_factory=list)  # what they were chosen for
    missing: list[str] = field(default_factory=list)  # what cannot be done for lack of masks
    read: list[str] = field(default_factory=list)  # how folders, tables, images and masks were understood
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what the user has to decide; a workspace has none

    def decided(self) -> None:
        """Raises Undecided where there are problems."""
        if self.problems:
            raise Undecided(self)


class Undecided(ValueError):
    """All that has to be decided before a workspace can be made, in one line; `report` has a line for each."""

    def __init__(self, report: Report) -> None:
        self.report = report
        problems = report.problems
        told = problems[0] if len(problems) == 1 else f"{len(problems)} things to decide: {' | '.join(problems)}"
        super().__init__(told)


def some(names: Sequence[str]) -> str:
    """A few of many names, for a line of the report."""
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
