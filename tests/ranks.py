"""What tests/test_parallel.py has one process do, and several: `torchrun --nproc-per-node 2 tests/ranks.py ROOT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from abn import parallel, predict
from abn.data import Pictures
from abn.losses import MAP_LOSSES
from abn.manifest import read_manifest, training_samples
from abn.model import ABN, LoadedModel
from abn.predict import PredictConfig, predict_into
from abn.train import Objective
from tiny import SIZE, tiny_settings

CLASSES = ["dark", "light"]
BATCH = list(range(7))  # parts of 3 and 4; the corrections are all in the first


def step(root: Path, map_loss: str) -> dict[str, Any]:
    """Loss, gradients and the batch norms' means of a batch with corrections, contexts and augmentation."""
    settings = tiny_settings(corrections={"map_loss": map_loss})
    torch.manual_seed(0)
    network = ABN(settings.model, len(CLASSES)).train()
    parallel.share_statistics(network)
    pictures = Pictures(root, training_samples(read_manifest(root)), CLASSES, (SIZE, SIZE))
    objective = Objective(network, settings, torch.device("cpu"), corrected=True)
    loss, parts = objective(pictures[BATCH], torch.Generator().manual_seed(1))
    loss.backward()
    parallel.average_gradients(network)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    means = {name: buffer for name, buffer in network.named_buffers() if "running" in name}
    return {"loss": loss.detach(), **parts, **gradients, **means}


def steps(root: Path) -> dict[str, dict[str, Any]]:
    return {name: step(root, name) for name in MAP_LOSSES}


def answer_all(root: Path, folder: Path) -> None:
    """Predictions of the workspace, in shards of eight samples."""
    torch.manual_seed(0)
    predict.SHARD = 8
    model = LoadedModel(ABN(tiny_settings().model, len(CLASSES)).eval(), CLASSES, (SIZE, SIZE))
    predict_into(folder, model, root, read_manifest(root), PredictConfig(5, 0))


def main(root: Path) -> None:
    with parallel.together():
        found = steps(root)
        torch.save(found, root / f"steps-{torch.distributed.get_rank()}.pt")
        answer_all(root, root / "results/predictions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
