"""Splits of the pictures, where the user gave none: stratified by class, no group cut."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from flows.ingest_report import Report
from flows.pictures import Picture

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def assign_splits(pictures: Sequence[Picture], seed: int, report: Report) -> list[Picture]:
    """Give a split to every picture that has none: train 0.7, val 0.15, test 0.15 of each class, a group never cut.

    Where train and test are given for all pictures, and val for none, val is drawn from train alone. The same for the
    same pictures and seed, in whatever order they come. Problems where given splits cut a group, where train, val or
    test end up with no picture, or a class with none in train.
    """
    units = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: picture.source.id):
        group = picture.source.group
        units[("group", group) if group else ("alone", picture.source.id)].append(picture)
    sides = {key: _side(unit, report) for key, unit in units.items()}

    shares = SHARES
    given = {picture.source.id: picture.source.split for picture in pictures}
    if set(given.values()) - {"pool"} == {"train", "test"}:
        report.read.append("val is drawn from train, since the given splits are train and test alone")
        shares = {split: SHARES[split] / (SHARES["train"] + SHARES["val"]) for split in ("train", "val")}
        given = {one: "" if split == "train" else split for one, split in given.items()}
        pool = {key for key, unit in units.items() if any(one.source.split == "pool" for one in unit)}
        sides = {key: side if side != "train" or key in pool else "" for key, side in sides.items()}

    totals = Counter(one.source.label for one in pictures if given[one.source.id] in ("", *shares))
    wanted = {split: {label: share * count for label, count in totals.items()} for split, share in shares.items()}
    free = []
    for key, unit in units.items():
        for picture in unit:
            if given[picture.source.id] in shares:
                wanted[given[picture.source.id]][picture.source.label] -= 1
        labels = Counter(picture.source.label for picture in unit if not given[picture.source.id])
        if labels:
            free.append((unit, labels, sides[key]))

    random.Random(seed).shuffle(free)
    free.sort(key=lambda item: -item[1].total())  # large groups first: the small ones then even out
    chosen = {}
    for unit, labels, side in free:
        lacks = {
            split: sum(count * wanted[split][label] / totals[label] for label, count in labels.items())
            for split in shares
        }
        split = side or max(lacks, key=lambda split: lacks[split])
        for label, count in labels.items():
            if split in wanted:
                wanted[split][label] -= count
        chosen.update({one.source.id: split for one in unit if not given[one.source.id]})

    done = [
        dataclasses.replace(
            picture,
            source=dataclasses.replace(picture.source, split=chosen.get(picture.source.id, picture.source.split)),
        )
        for picture in pictures
    ]
    check_splits(done, report)
    return done


def check_splits(pictures: Sequence[Picture], report: Report) -> None:
    """Problems where train, val or test has no picture, or a class has none in train."""
    for split in SHARES:
        if not any(picture.source.split == split for picture in pictures):
            report.problems.append(
                f"split {split} has no images ({len(pictures)} in all); add images, or name splits in the CSV"
            )
    trained = {picture.source.label for picture in pictures if picture.source.split == "train"}
    for label in sorted({picture.source.label for picture in pictures} - trained - {""}):
        report.problems.append(
            f"class {label} has no images in split train; move some there, or leave it out with --drop"
        )


def _side(unit: Sequence[Picture], report: Report) -> str:
    """The split that a group's given splits bind it to, or an empty text; a problem where they cut it.

    The pool is learned from once it is labeled, so it goes with train and with nothing else.
    """
    sides = {"train" if one.source.split == "pool" else one.source.split: one for one in unit if one.source.split}
    if len(sides) > 1:
        first, other = list(sides.values())[:2]
        report.problems.append(
            f"group {first.source.group} is cut: {first.source.name} is in {first.source.split}, "
            f"{other.source.name} in {other.source.split}; keep a group in one split"
        )
    return next(iter(sides), "")
