"""The main job on handwritten digits: a network that learned a shortcut, and labelers who talk it out of it."""

from __future__ import annotations

import base64
import io
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from abn.manifest import read_manifest
from abn.predictions import read_predictions
from flows import services
from flows.digits import TRAIN, write_digits
from flows.gallery import map_tile, mask_tile, read_rgb, tile
from flows.ingest import init_workspace
from flows.progress import report
from flows.summary import summarise
from flows.workspace import Workspace, open_workspace, write_atomically, write_json

SETTINGS = {
    "data.flip": False,
    "model.backbone": "cifar_resnet8",
    "train.epochs": 15,
    "services.label_studio_port": 0,
    "services.prefect_port": 0,
    "services.mlflow_port": 0,
    "services.live_port": 0,
}
PICTURES = 8  # in the report
POLL_SECONDS = 10  # between two looks at what a person has answered
SUMMARY_KEYS = (
    *("round", "corrections", "test_accuracy", "control_accuracy", "attention_inside_mask", "context_reliance"),
    *("promoted", "gate", "model_version", "mlflow_run_id", "git_commit", "seconds"),
)


@dataclass
class Look:
    """What one round's model sees in the pictures of the report: sample id -> attention map, answer."""

    round: int
    maps: dict[str, np.ndarray]
    answers: dict[str, str]


def run_demo(
    repository: Path,
    directory: Path,
    rounds: int,
    budget: int,
    keep: bool,
    invite: Callable[[str, str, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Make the workspace `directory` anew and run the loop in it; its summary, a mapping a round.

    With `invite` a person answers the first batch: it is told address, email and password, and the demo goes on once
    all is answered. Leaves no process behind, however it ends, unless `keep`.
    """
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}; it must be at least 1")
    if budget < 1 or rounds * budget > TRAIN:
        raise ValueError(f"--budget is {budget} for {rounds} round(s); {TRAIN} pictures can be asked about in all")
    clear(directory)
    with tempfile.TemporaryDirectory() as folder:
        index = write_digits(Path(folder))
        settings = {**SETTINGS, "selection.budget": budget}
        init_workspace(
            repository, directory, Path(folder), index=index, settings=settings, on_progress=report, hide_masks=True
        )
    place = open_workspace(directory)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        services.up(place, lambda title, what: report(f"services: {title} {what}", 1, 1))
        services.connect(place)
        looks = [_round(place, number, invite if number == 1 else None) for number in range(1, rounds + 1)]
        summary = summarise(place)
        known = services.addresses(place)
        links = {"label_studio": known.label_studio, "prefect": known.prefect.removesuffix("/api")}
        links |= {"mlflow": known.mlflow, "live": known.live}
        chosen = [{key: one[key] for key in SUMMARY_KEYS} for one in summary]
        write_json(place.root / "summary.json", {"rounds": chosen, "services": links})
        write_atomically(place.root / "report.html", render_report(place, summary, looks))
        return summary
    finally:
        services.disconnect()
        if not keep:
            services.down(place)


def clear(directory: Path) -> None:
    """Remove the workspace of an earlier demo, and end what it left running. Nothing else is ever removed."""
    if not directory.exists():
        return
    if not (directory / "data/manifest.csv").is_file() or not (directory / ".abnloop").is_dir():
        raise ValueError(f"{directory} exists and is no workspace; name another with --workspace")
    services.down(open_workspace(directory))
    shutil.rmtree(directory)


def _round(place: Workspace, number: int, invite: Callable[[str, str, str], None] | None) -> Look:
    from flows.rounds import Collected, Opened, collect_round, open_round, simulate_labelers

    opened = open_round(str(place.root))
    assert isinstance(opened, Opened) and opened.round == number
    look = _look(place, number)
    if invite is None:
        simulate_labelers(place)
    else:
        project = place.round(number).read()["project"]
        invite(f"{services.addresses(place).label_studio}/projects/{project}/data", *services.log_in(place))
    while True:
        collected = collect_round(str(place.root))
        assert isinstance(collected, Collected)
        if collected.closed:
            return look
        assert invite is not None, "simulated labelers answer everything"
        report("your answers", collected.answered, collected.tasks)
        time.sleep(POLL_SECONDS)


def _look(place: Workspace, number: int) -> Look:
    predictions = read_predictions(place.predictions)
    samples = {sample.id: sample for sample in read_manifest(place.root)}
    classes = sorted({sample.label for sample in samples.values()})
    test = [row for row, name in enumerate(predictions.samples.tolist()) if samples[name].split == "test"]
    rows = test[:: max(1, len(test) // PICTURES)][:PICTURES]
    names = {row: str(predictions.samples[row]) for row in rows}
    return Look(
        number,
        {names[row]: predictions.maps[row] for row in rows},
        {names[row]: classes[int(predictions.probabilities[row].argmax())] for row in rows},
    )


def render_report(place: Workspace, summary: list[dict[str, Any]], looks: list[Look]) -> str:
    """The story as one HTML file, pictures inside: the same pictures' attention in each round, and the mask."""
    samples = {sample.id: sample for sample in read_manifest(place.root)}
    with np.load(place.simulation, allow_pickle=False) as known:  # what labelers would paint
        masks = {name: known[name] for name in looks[0].maps}
    lines = []
    for name in looks[0].maps:
        path = place.root / samples[name].image
        lines.append(
            {
                "name": name,
                "label": samples[name].label,
                "picture": _data_uri(tile(read_rgb(path))),
                "mask": _data_uri(mask_tile(path, masks[name])),
                "looks": [(_data_uri(map_tile(path, look.maps[name])), look.answers[name]) for look in looks],
            }
        )
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("report.html").read_text())
    return template.render(rounds=summary, lines=lines, numbers=[look.round for look in looks])


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
