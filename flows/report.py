"""The story of a workspace as one HTML page with its images inside: what each round's model looks at, and what the gate
made of it. From the files of the workspace and DVC's cache alone, so it works with the services down."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from PIL import Image

from abn.images import read_rgb
from abn.manifest import MaskShards, Sample, class_names, read_manifest
from flows.gallery import Seen, map_tile, mask_tile, tile
from flows.summary import summarise
from flows.versions import Dvc, Git
from flows.workspace import Workspace

IMAGES = 8  # of the test set, shown under each round's attention
COLUMNS = 5  # rounds whose attention is shown, at most
PREDICTIONS = "results/predictions"
WIDTH, HEIGHT, MARGIN = 720, 290, 50  # of the chart, in the units of its drawing
# The lines of the chart: title, key of a round's summary, class in report.html.
LINES = (
    ("test accuracy", "test_accuracy", "test"),
    ("with swapped background", "test_accuracy_swapped", "swapped"),
    ("baseline, test accuracy", "baseline_accuracy", "baseline"),
)


@dataclass(frozen=True)
class Column:
    """One round in the table of attention maps; `seen` is None where its predictions are not at hand."""

    round: Mapping[str, Any]
    seen: Seen | None


def render_report(place: Workspace, title: str = "", story: str = "") -> str:
    """The page. `title` and `story` introduce it, in place of the workspace's name and a general text.

    Raises ValueError where no round has been judged.
    """
    rounds = summarise(place)
    if not rounds:
        raise ValueError(f"{place.root} has no judged round; `abnloop round open` trains and judges the first model")
    samples = read_manifest(place.root)
    images = chosen_images(place, samples)
    columns = [
        Column(one, seen_in_round(place, one["round"], images, class_names(samples))) for one in columns_of(rounds)
    ]
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text())
    return template.render(
        title=title or f"Rounds of {place.root.name}",
        story=story,
        rounds=rounds,
        champion=next((one for one in rounds if one["champion"]), None),
        chart=chart(rounds),
        columns=columns,
        lines=list(_lines(place, images, columns)),
        masked=any(MaskShards(place.root).has_gold(image) for image in images),
    )


def columns_of(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rounds whose attention is shown: the first, the champion's, the last, and others evenly between them."""
    if len(rounds) <= COLUMNS:
        return list(rounds)
    evenly = {round(i * (len(rounds) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)}
    champion = {i for i, one in enumerate(rounds) if one["champion"]}
    if not champion <= evenly:  # it takes the place of its neighbour, the first and the last stay
        inner = sorted(evenly - {0, len(rounds) - 1}, key=lambda i: abs(i - min(champion)))
        evenly = evenly - set(inner[:1]) | champion
    return [rounds[i] for i in sorted(evenly)]


def chosen_images(place: Workspace, samples: Sequence[Sample]) -> list[Sample]:
    """Up to `IMAGES` samples of the test set, evenly over the classes, those with a gold mask before others; the same
    whatever the models answer."""
    shards = MaskShards(place.root)
    test = sorted((one for one in samples if one.split == "test"), key=lambda one: (one.label, one.id))
    gold = [one for one in test if shards.has_gold(one)]
    among = (
        gold if len(gold) >= IMAGES else gold + _evenly([one for one in test if one not in gold], IMAGES - len(gold))
    )
    return sorted(_evenly(among, IMAGES), key=lambda one: (one.label, one.id))


def _evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    steps = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    return [samples[i] for i in steps]


def seen_in_round(place: Workspace, number: int, images: Sequence[Sample], classes: Sequence[str]) -> Seen | None:
    """What the model of round `number` saw in the `images`; None where neither the workspace nor DVC's cache has its
    predictions of all of them."""
    wanted = {one.id for one in images}
    maps, answers = dict[str, np.ndarray](), dict[str, str]()
    for shard in prediction_files(place, number):
        with np.load(shard, allow_pickle=False) as stored:
            rows = [row for row, name in enumerate(stored["samples"].tolist()) if name in wanted]
            if not rows:
                continue
            names, probabilities = stored["samples"][rows].tolist(), stored["probabilities"][rows]
            maps |= zip(names, stored["maps"][rows], strict=True)
            answers |= zip(names, (classes[best] for best in probabilities.argmax(axis=1)), strict=True)
    return Seen(f"round {number}", maps, answers) if maps.keys() == wanted else None


def prediction_files(place: Workspace, number: int) -> list[Path]:
    """The shards of the predictions of round `number`: the workspace's own where they are of that round, else those in
    DVC's cache; none where it lacks them."""
    git, dvc, tag = Git(place.root), Dvc(place.root), place.round(number).tag
    here = dvc.hashes().get(PREDICTIONS, "")
    lock = git.content(tag, "dvc.lock") if tag in git.tags(tag) else (place.root / "dvc.lock").read_bytes()
    md5 = _hash_in(lock, PREDICTIONS)
    if md5 and md5 == here and place.predictions.is_dir():
        return sorted(place.predictions.glob("*.npz"))
    listing = dvc.cached(md5) if md5 else None
    if listing is None or not listing.is_file():
        return []
    shards = [dvc.cached(one["md5"]) for one in json.loads(listing.read_text())]
    return shards if all(shard.is_file() for shard in shards) else []


def _hash_in(lock: bytes | None, path: str) -> str:
    """The MD5 of the output `path` in a dvc.lock; empty where it is not there."""
    stages = yaml.safe_load(lock)["stages"] if lock else {}
    outputs = {one["path"]: one["md5"] for stage in stages.values() for one in stage.get("outs", [])}
    return outputs.get(path, "")


def _lines(place: Workspace, images: Sequence[Sample], columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """The rows of the table of attention maps."""
    shards = MaskShards(place.root)
    for one in images:
        path = place.root / one.image
        mask = shards.gold(one)
        looks = [
            (_data_uri(map_tile(path, column.seen.maps[one.id])), column.seen.answers[one.id]) if column.seen else None
            for column in columns
        ]
        yield {
            "name": one.id,
            "label": one.label,
            "image": _data_uri(tile(read_rgb(path))),
            "mask": None if mask is None else _data_uri(mask_tile(path, mask)),
            "looks": looks,
        }


def chart(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies over the rounds as points of an SVG drawing of WIDTH x HEIGHT."""
    across, down = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def x(index: int) -> float:
        return round(MARGIN + across * (index / (len(rounds) - 1) if len(rounds) > 1 else 0.5), 1)

    def y(value: float) -> float:
        return round(MARGIN / 2 + down * (1 - value), 1)

    lines = []
    for title, key, name in LINES:
        points = [
            {"x": x(index), "y": y(one[key]), "text": f"round {one['round']}: {title} {one[key]:.3f}"}
            for index, one in enumerate(rounds)
            if one[key] is not None
        ]
        if points:
            lines.append({"title": title, "name": name, "points": points})
    every = max(1, len(rounds) // 10)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": MARGIN,
        "right": WIDTH - MARGIN,
        "lines": lines,
        "levels": [{"y": y(level), "text": f"{level:.2f}"} for level in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "ticks": [
            {"x": x(index), "y": y(0) + 18, "round": one["round"], "corrections": one["corrections"]}
            for index, one in enumerate(rounds)
            if index % every == 0 or index == len(rounds) - 1
        ],
    }


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
