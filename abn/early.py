"""How sure the network was of each label early in its training: what is learned first is often a shortcut.

The easiest samples are those where the shortcut works (after Nam et al., Learning from failure, NeurIPS 2020). At the
end of a training this can no longer be seen, everything is sure by then; so train writes it down as it passes by.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from abn.data import Pictures, in_order, loader
from abn.files import replacing

EARLY = 0.1  # of the training


def is_early_epoch(epoch: int, epochs: int) -> bool:
    """Whether this epoch, counted from 1, is the one after which confidence is written down."""
    return epoch == max(1, round(EARLY * epochs))


@torch.inference_mode()
def write_early_confidence(path: Path, network: nn.Module, pictures: Pictures, batch_size: int) -> None:
    """The perception branch's probability of the label, 0..1, of each of the pictures, which all have one. The
    network is left in evaluation mode."""
    network.eval()
    device, confidence = next(network.parameters()).device, []
    for batch in loader(pictures, in_order(len(pictures), batch_size)):
        answers = network(batch.images.to(device).float() / 255).logits.float().softmax(dim=1).cpu()
        confidence.append(answers.gather(1, batch.labels[:, None])[:, 0].numpy())
    samples = np.array([sample.id for sample in pictures.samples])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, samples=samples, confidence=np.concatenate(confidence))


def read_early_confidence(path: Path) -> dict[str, float]:
    """By sample id."""
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(file["samples"].tolist(), file["confidence"].tolist(), strict=True))
