"""The process of the project's own service: `python -m flows.live_service --workspace DIR --port N`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import uvicorn

from flows.workspace import Workspace, open_workspace
from labeling.live import Predictor, create_app


def load_predictor(workspace: Workspace) -> Predictor:
    """What answers for the workspace; without a champion, nothing is known of any sample."""

    def answer(sample: str, mask: np.ndarray | None) -> list[tuple[str, float]]:
        return []

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers Label Studio: health, predictions, webhooks.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    app = create_app(load_predictor(open_workspace(arguments.workspace)))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
