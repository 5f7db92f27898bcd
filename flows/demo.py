"""The main job on handwritten digits: a network that learned a shortcut, and labelers who talk it out of it."""

from __future__ import annotations

import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import services
from flows.digits import TRAIN, write_digits
from flows.ingest import init_workspace
from flows.progress import report
from flows.report import render_report
from flows.summary import summarise
from flows.workspace import Workspace, open_workspace, write_atomically, write_json

SETTINGS = {
    "data.flip": False,
    "model.backbone": "cifar_resnet8",
    "train.epochs": 12,
    "services.label_studio_port": 0,
    "services.prefect_port": 0,
    "services.mlflow_port": 0,
    "services.live_port": 0,
}
TITLE = "From right for the wrong reason to right for the right one"
STORY = (
    "Every training image carries a patch whose colour tells its class. In the test set colours are random: a network "
    "that learned the patch instead of the digit fails there. Labelers corrected its attention map on a few images, in "
    "Label Studio; the network of each round learned from all corrections before it."
)
POLL_SECONDS = 10  # between two looks at what a person has answered
SUMMARY_KEYS = (
    *("round", "corrections", "gold", "test_accuracy", "baseline_accuracy", "control_accuracy"),
    *("attention_inside_mask", "context_reliance", "verdict", "reason", "champion", "promoted", "gate"),
    *("model_version", "mlflow_run_id", "git_commit", "seconds"),
)


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
        for number in range(1, rounds + 1):
            _round(place, number, invite if number == 1 else None)
        summary = summarise(place)
        known = services.addresses(place)
        links = {"label_studio": known.label_studio, "prefect": known.prefect.removesuffix("/api")}
        links |= {"mlflow": known.mlflow, "live": known.live}
        chosen = [{key: one[key] for key in SUMMARY_KEYS} for one in summary]
        write_json(place.root / "summary.json", {"rounds": chosen, "services": links})
        write_atomically(place.root / "report.html", render_report(place, TITLE, STORY))
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


def _round(place: Workspace, number: int, invite: Callable[[str, str, str], None] | None) -> None:
    from flows.rounds import Collected, Opened, collect_round, open_round, simulate_labelers

    opened = open_round(str(place.root))
    assert isinstance(opened, Opened) and opened.round == number
    if invite is None:
        simulate_labelers(place)
    else:
        project = place.round(number).read()["project"]
        invite(f"{services.addresses(place).label_studio}/projects/{project}/data", *services.log_in(place))
    while True:
        collected = collect_round(str(place.root))
        assert isinstance(collected, Collected)
        if collected.closed:
            return
        assert invite is not None, "simulated labelers answer everything"
        report("your answers", collected.answered, collected.tasks)
        time.sleep(POLL_SECONDS)
