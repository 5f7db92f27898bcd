"""The labelers: what each annotation of theirs says, how they do, and their accounts."""

from __future__ import annotations

import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from abn.images import upright_size
from abn.manifest import Sample, mask_sha256
from flows.workspace import Round, Workspace, read_json, read_table, write_json
from labeling.client import LabelStudio
from labeling.corrections import SKIPPED, Consensus, Correction, SetAside, agreements, set_aside
from labeling.studio import access_token

ANNOTATION_COLUMNS = (
    *("sample", "task", "annotation", "revision", "labeler", "verdict", "model_version"),
    *("label", "minutes", "moved", "agreement", "set_aside"),
)


def as_asked(
    place: Workspace, tasks: Iterable[dict[str, Any]], samples: Mapping[str, Sample]
) -> tuple[list[dict[str, Any]], list[SetAside], list[str]]:
    """Label Studio's `tasks` with the sample and size that were asked about; what cannot be used of them, and a line
    for each task that says something else.

    Whoever may annotate may also edit what a task says of itself. So its sample is the one in the tasks.json of its
    round, and its size is the image's. Where another image was shown the answers are set aside. A task that no round
    asked is left out. `samples` are those of the manifest by id, with the labels on file.
    """
    rounds = [read_json(one.tasks)["tasks"] for one in place.rounds() if one.tasks.is_file()]
    asked = {task: sample for one in rounds for sample, task in one.items()}
    usable, aside, changed = list[dict[str, Any]](), list[SetAside](), list[str]()
    for task in tasks:
        name, said, told = asked.get(task["id"]), task.get("data"), task.get("meta")
        said, told = (one if isinstance(one, dict) else {} for one in (said, told))
        if name is None:
            changed.append(f"task {task['id']} was asked by no round and is left out")
            continue
        known: dict[str, Any] = {"sample": name}
        try:
            image, label = samples[name].image, samples[name].label
            known["height"], known["width"] = upright_size(place.root / image)
            wanted = LabelStudio.local_file_url(place.root, place.root / image)
            reason = "" if said.get("image") == wanted else f"it shows {str(said.get('image'))[:80]!r}"
        except (KeyError, OSError) as error:  # the image is gone, or no longer one
            reason = f"nothing is known of its sample any more: {error}"
        if reason:
            reason = f"task {task['id']} asks about {name}, but {reason}"
            changed.append(f"{reason}; its answers are set aside")
            aside += [set_aside({"data": known}, one, reason) for one in task["annotations"]]
            continue
        if wrong := [f"{key} {str(said.get(key))[:80]!r}" for key, value in known.items() if said.get(key) != value]:
            changed.append(f"task {task['id']} says {', '.join(wrong)}; it asks about {known}, and is taken so")
        if label:  # without a label on file, an answer gives it the class that the network said
            told = {**told, "label": label}
        usable.append({**task, "data": {**said, **known}, "meta": told})
    return usable, aside, changed


def annotation_rows(opinions: Sequence[Correction], aside: Sequence[SetAside]) -> list[dict[str, str]]:
    """A row of ANNOTATION_COLUMNS for every annotation, in order of their id.

    `agreement`, 0..1, is with the others who answered the sample, empty where nobody else did; `set_aside` says why
    an annotation teaches nothing, empty where it does.
    """
    rows: dict[int, dict[str, str]] = {}
    by_sample: dict[str, list[Correction]] = defaultdict(list)
    for one in opinions:
        by_sample[one.sample].append(one)
    agreement = {
        one.annotation: (row.sum() - 1) / (len(row) - 1)  # with itself it is 1
        for several in by_sample.values()
        if len(several) > 1
        for one, row in zip(several, agreements(several), strict=True)
    }
    for one in opinions:
        rows[one.annotation] = {
            **{name: str(getattr(one, name)) for name in ANNOTATION_COLUMNS[:7]},
            "label": one.label or "",
            "minutes": f"{one.minutes:.2f}",
            "moved": "" if one.moved is None else f"{one.moved:.3f}",
            "agreement": f"{agreement[one.annotation]:.3f}" if one.annotation in agreement else "",
            "set_aside": "",
        }
    for left in aside:
        row = rows.setdefault(left.annotation, dict.fromkeys(ANNOTATION_COLUMNS, ""))
        row |= {"sample": left.sample, "annotation": str(left.annotation), "labeler": left.labeler}
        row |= {"minutes": f"{left.minutes:.2f}", "set_aside": left.reason}
    return [rows[number] for number in sorted(rows)]


def correction_row(one: Consensus, round_number: int, shard: str) -> dict[str, str]:
    """The row of data/corrections.csv for what the labelers of a sample agree on, its mask in the file `shard`.

    Several annotations and labelers are separated by spaces, in the same order; minutes are theirs together.
    """
    moved = [opinion.moved for opinion in one.opinions if opinion.moved is not None]
    return {
        "sample": one.sample,
        "round": str(round_number),
        "annotation": " ".join(str(opinion.annotation) for opinion in one.opinions),
        "revision": max(opinion.revision for opinion in one.opinions),
        "labeler": " ".join(opinion.labeler for opinion in one.opinions),
        "verdict": one.verdict,
        "label": one.label or "",
        "minutes": f"{sum(opinion.minutes for opinion in one.opinions):.2f}",
        "model_version": one.opinions[-1].model_version,
        "masks": "" if one.mask is None else shard,
        "sha256": "" if one.mask is None else mask_sha256(one.mask),
        "weight": f"{one.weight:.3f}",
        "moved": f"{fmean(moved):.3f}" if moved else "",
    }


def still_standing(
    rows: Mapping[str, dict[str, str]], annotations: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """`rows` of data/corrections.csv by sample, without those whose annotations have all been read anew: what they
    said before they were changed, skipped or disputed no longer counts."""
    read = {row["annotation"] for row in annotations}
    return {sample: row for sample, row in rows.items() if not set(row["annotation"].split(" ")) <= read}


def latest_annotations(rounds: Iterable[Round]) -> dict[str, dict[str, str]]:
    """The rows of the rounds' own tables by id of the annotation; of one that was changed the last."""
    return {row["annotation"]: row for round_ in rounds for row in read_table(round_.corrections)}


def labeler_report(place: Workspace) -> list[dict[str, Any]]:
    """A mapping for each labeler, in order of their email, from the files of the collected rounds alone.

    `tasks` counts answers, `minutes` adds up their time at the screen and `minutes_a_task` is its median where it is
    known; `agreement`, 0..1, is the mean over the answers that others gave too, `moved`, 0..1, the mean distance of
    the maps that they fixed from those that they were shown (None: there is nothing to take the mean of);
    `verdicts` counts each, `skipped` and `set_aside` what nothing was learned from.
    """
    by_labeler: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in latest_annotations(place.rounds()).values():
        by_labeler[row["labeler"]].append(row)
    return [_report(labeler, by_labeler[labeler]) for labeler in sorted(by_labeler)]


def _report(labeler: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    minutes = [float(row["minutes"]) for row in rows if row["verdict"]]
    agreements = [float(row["agreement"]) for row in rows if row["agreement"]]
    moved = [float(row["moved"]) for row in rows if row["moved"] and row["verdict"] == "map_fixed"]
    known = [one for one in minutes if one > 0]
    skipped = sum(row["set_aside"] == SKIPPED for row in rows)
    return {
        "labeler": labeler,
        "tasks": len(minutes),
        "minutes": round(sum(float(row["minutes"]) for row in rows), 2),
        "minutes_a_task": round(median(known), 2) if known else None,
        "agreement": round(fmean(agreements), 3) if agreements else None,
        "moved": round(fmean(moved), 3) if moved else None,
        "verdicts": dict(sorted(Counter(row["verdict"] for row in rows if row["verdict"]).items())),
        "skipped": skipped,
        "set_aside": sum(bool(row["set_aside"]) for row in rows) - skipped,
    }


def labeler_table(report: Sequence[Mapping[str, Any]]) -> Table:
    """The report as people read it."""
    table = Table(title="labelers", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("labeler")
    columns = ("tasks", "minutes", "minutes_a_task", "agreement", "moved", "skipped", "set_aside")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("verdicts")
    for one in report:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in one["verdicts"].items())
        numbers = ["-" if one[name] is None else str(one[name]) for name in columns]
        table.add_row(escape(one["labeler"]), *numbers, verdicts)
    return table


def invite(studio: LabelStudio, emails: Sequence[str]) -> dict[str, str]:
    """Accounts for new labelers: email -> password, which is kept nowhere.

    Raises ValueError, before anybody is invited, for what is no email or has an account.
    """
    known = studio.emails()
    for email in emails:
        # Its log-in form refuses an address that ends in a single letter, although one can sign up with it.
        if not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s.]{2,}", email):
            raise ValueError(f"{email!r} is no email address, such as ann@example.com")
        if email.lower() in known:
            raise ValueError(f"{email} has an account already; leave it out")
    passwords = {email: secrets.token_urlsafe(12) for email in emails}
    for email, password in passwords.items():
        studio.invite(email, password)
    return passwords


def simulated_labelers(place: Workspace, studio: LabelStudio, count: int) -> list[LabelStudio]:
    """The accounts of `count` simulated labelers: the workspace's own, and others that are made once."""
    if count < 1:
        raise ValueError(f"--labelers is {count}; it must be at least 1")
    emails = [f"simulated-{number}@example.com" for number in range(2, count + 1)]
    tokens = read_json(place.simulated_labelers)
    for email in emails:
        if email not in tokens:
            password = invite(studio, [email])[email]
            tokens[email] = access_token(studio.url, email, password)
            write_json(place.simulated_labelers, tokens, mode=0o600)
    return [studio, *(LabelStudio(studio.url, tokens[email]) for email in emails)]
