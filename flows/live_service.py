"""The process of the project's own service: `python -m flows.live_service --workspace DIR --port N`."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI

from abn.manifest import read_manifest
from flows.api import make_router
from flows.champion import Champion
from flows.hints import Hints
from flows.inbox import open_inbox
from flows.services import label_studio_access, live_secret
from flows.workspace import Workspace, open_workspace
from labeling.client import LabelStudio
from labeling.live import Answer, create_app
from labeling.liveness import Liveness


class Answers:
    """What the champion answers to a labeler; the `Predictor` of the service."""

    def __init__(self, workspace: Workspace, champion: Champion) -> None:
        self._workspace, self._champion = workspace, champion
        self._pictures: dict[str, Path] = {}
        self._read = 0  # when the manifest was changed that they are from

    def version(self) -> str:
        return self._champion.version()

    def answer(self, sample: str, mask: np.ndarray) -> Answer:
        promoted = self._champion.current()
        given, own = (
            sorted(zip(promoted.classes, shares.tolist(), strict=True), key=lambda pair: -pair[1])
            for shares in promoted.answers(self._picture(sample), mask)
        )
        return Answer(given, own, promoted.version)

    def prepare(self, sample: str) -> None:
        with suppress(ValueError):
            self._champion.current().look(self._picture(sample))

    def _picture(self, sample: str) -> Path:
        """The file of a sample. The manifest alone says where it is, and only below the workspace."""
        changed = self._workspace.manifest.stat().st_mtime_ns
        if changed != self._read:
            root = self._workspace.root
            self._pictures = {known.id: root / known.image for known in read_manifest(root, corrected=False)}
            self._read = changed
        if sample not in self._pictures:
            raise ValueError(f"sample {sample} is not in the manifest")
        picture = self._pictures[sample]
        # Links stay allowed: DVC may make every picture one, into its cache.
        if not Path(os.path.normpath(picture)).is_relative_to(self._workspace.root):
            raise ValueError(f"the picture of sample {sample} lies outside the workspace; mend data/manifest.csv")
        return picture


def create_service(workspace: Workspace) -> FastAPI:
    """The service of a workspace: its champion answers strokes and programs, masks stay live, a webhook collects."""
    champion = Champion(workspace)
    champion.version()  # begins to load
    liveness, hints = Liveness(lambda: LabelStudio(*label_studio_access(workspace))), Hints(workspace)

    def on_hint(payload: dict[str, Any]) -> None:
        hints(payload)
        liveness.on_hint(payload)

    app = create_app(Answers(workspace, champion), live_secret(workspace), on_hint, liveness.on_stroke)
    app.include_router(make_router(champion.current, open_inbox(workspace)))
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers Label Studio: health, predictions, webhooks.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 for every network")
    arguments = parser.parse_args()
    # Requests come side by side, and beside a training: threads that wait for each other would slow them tenfold.
    torch.set_num_threads(1)
    app = create_service(open_workspace(arguments.workspace))
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
