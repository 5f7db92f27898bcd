"""The process of the project's own service: `python -m flows.live_service --workspace DIR --port N`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import uvicorn

from flows.workspace import Workspace, open_workspace
from labeling.live import Predictor, create_app


def load_predictor(workspace: Workspace) -> Predictor:
    """What the champion answers with a mask in place of its own map; a promotion is noticed by the model's file.

    A sample that is not known, or no champion yet, is a ValueError that the labeler gets to see.
    """
    loaded: dict[int, Predictor] = {}

    def answer(sample: str, mask: np.ndarray | None) -> list[tuple[str, float]]:
        if not workspace.champion.is_file():
            raise ValueError("no model has been promoted yet")
        changed = workspace.champion.stat().st_mtime_ns
        if changed not in loaded:
            predictor = _predictor(workspace)
            loaded.clear()
            loaded[changed] = predictor
        return loaded[changed](sample, mask)

    return answer


def _predictor(workspace: Workspace) -> Predictor:
    import torch

    from abn.data import read_image, resize_mask
    from abn.manifest import read_manifest
    from abn.model import load_model

    model = load_model(workspace.champion)
    images = {sample.id: workspace.root / sample.image for sample in read_manifest(workspace.root)}

    @torch.inference_mode()
    def answer(sample: str, mask: np.ndarray | None) -> list[tuple[str, float]]:
        if sample not in images:
            raise ValueError(f"sample {sample} is not in the manifest")
        image = read_image(images[sample], model.size)[None].float() / 255
        given = None if mask is None else resize_mask(mask, model.size)[None].float() / 255
        shares = model.network(image, given).logits.softmax(dim=1)[0].tolist()
        return sorted(zip(model.classes, shares, strict=True), key=lambda pair: -pair[1])

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
