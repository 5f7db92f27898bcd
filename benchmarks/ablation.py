"""What each ingredient of the default adds: `python -m benchmarks.ablation --data digits --confound border`.

Trains on the problems of benchmarks/correction.py as the project ships, and without one ingredient at a time. Those of
careless masks show with `--faults hasty`, those of small objects on photographs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from abn.files import write_json
from benchmarks.correction import (
    FIGURES,
    Problem,
    Spec,
    add_masks,
    in_words,
    print_table,
    problem_of,
    problem_parser,
    seeds_of,
    settings_with,
    summary,
)

# What is left out, as settings, or as what stands in abn/train.py in its place.
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "map loss": {"corrections.map_weight": 0.0},
    "masks for the other pictures": {"corrections.propagate_rate": 0.0},
    "holes": {"corrections.holes": 0.0},
    "narrowing": {"corrections.narrow": False},
    "baseline": {"train.start": "scratch"},
}
CODE: dict[str, dict[str, Any]] = {
    "what misleads": {"find_shortcuts": lambda *problem: {}},
    "holes of others": {"with_holes_of_others": lambda masks, *others: masks},
    "pretrained annotator": {"_pyramid": lambda config: None},
    "surroundings": {"with_surroundings": lambda masks: masks},
    "light": {"in_light_of": lambda images, places, contexts: contexts},
    "pieces": {"in_pieces": lambda marked, keep, generator: (marked, keep)},
    "doubt": {"CARELESS": 1.0},
}
INGREDIENTS = (*SETTINGS, *CODE)


def run_seed(spec: Spec, seed: int, without: Sequence[str], changes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of a training for each ingredient that is left out."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(Path(folder), spec, seed)
        for name in without:
            settings = settings_with(
                {"data.size": list(spec.size), **changes, **SETTINGS.get(name, {}), "train.seed": seed}
            )
            with ExitStack() as replaced:
                for attribute, value in CODE.get(name, {}).items():
                    replaced.enter_context(patch(f"abn.train.{attribute}", value))
                figures[name] = problem.run(name.replace(" ", "-"), settings)
            print(f"seed {seed}  without {name:28}  {in_words(figures[name])}", flush=True)
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = problem_parser("ablation", __doc__, fraction=1.0, seeds=2)
    add_masks(parser)
    parser.add_argument("--without", default=",".join(INGREDIENTS), help="of " + ", ".join(INGREDIENTS))
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Mean and deviation of the figures by what was left out. Raises ValueError for an unknown ingredient."""
    without = options.without.split(",")
    if unknown := [name for name in without if name not in INGREDIENTS]:
        raise ValueError(f"--without names {unknown[0]!r}; known: {', '.join(INGREDIENTS)}")
    spec, changes = problem_of(options, options.corrections, options.faults)
    seeds, runs = seeds_of(options.seeds), []
    for number, seed in enumerate(seeds, start=1):
        runs.append(run_seed(spec, seed, without, changes))
        found = summary(runs)
        if options.json:
            settings = {**asdict(spec), "seeds": seeds[:number], "changes": changes}
            write_json(options.json, {"settings": settings, "without": found})
    return found


def main() -> None:
    try:
        found = run(parse())
    except ValueError as error:
        sys.exit(f"benchmarks.ablation: {error}")
    print_table("without", FIGURES, found)


if __name__ == "__main__":
    main()
