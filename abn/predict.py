"""Model and manifest give predictions: `python -m abn.predict` reads results/model.pt, writes results/predictions/.

One pass answers every sample; a second sees each picture mirrored (does its map mirror too?); samples of the gold set
are also shown in another context, which tells how much the answer hangs on what lies outside the mask.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from abn.attention import equivariance_loss
from abn.config import load_section
from abn.context import binarised, other_pictures, replace_context
from abn.data import Pictures, in_order, loader, resize_mask
from abn.manifest import Sample
from abn.model import LoadedModel, load_model, resize_map
from abn.predictions import Predictions, write_shard
from abn.stage import ROUND, Stage
from abn.train import TrainConfig, choose_device

SHARD = 4096  # samples a file


@dataclass(frozen=True)
class PredictConfig:
    batch_size: int
    seed: int  # of the contexts


GOLD = "data/gold.npz"


@torch.inference_mode()
def predict(
    model: LoadedModel,
    pictures: Pictures,
    config: PredictConfig,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Everything that later stages need to know of each sample, in the order of the pictures."""
    device = next(model.network.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Predictions)}
    done = 0
    for batch in loader(pictures, in_order(len(pictures), config.batch_size)):
        images = batch.images.to(device).float() / 255
        output = model.network(images)
        mirrored = model.network(images.flip(-1))
        maps = output.attention_map[:, 0].float().cpu().numpy()
        gold, masks = _gold_masks(pictures, batch.indices.tolist())
        columns["samples"].append(np.array([pictures.samples[i].id for i in batch.indices.tolist()]))
        columns["probabilities"].append(_softmax(output.logits))
        columns["attention_probabilities"].append(_softmax(output.attention_logits))
        columns["maps"].append(maps)
        columns["embeddings"].append(output.embedding.float().cpu().numpy())
        columns["equivariance"].append(equivariance_loss(maps, mirrored.attention_map[:, 0].float().cpu().numpy()))
        columns["has_gold"].append(gold)
        columns["gold_maps"].append(resize_map(masks, output.attention_map.shape[-2:])[:, 0].numpy())
        columns["replaced_probabilities"].append(
            _in_another_context(model, images, masks.to(device), torch.from_numpy(gold), generator)
        )
        done += len(images)
        on_batch(done)
    return Predictions(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _in_another_context(
    model: LoadedModel, images: Tensor, masks: Tensor, gold: Tensor, generator: torch.Generator
) -> Float[np.ndarray, "b k"]:
    answers = np.full((len(images), len(model.classes)), np.nan, dtype=np.float32)
    if gold.any():
        replaced = replace_context(images, binarised(masks), other_pictures(images, generator))
        answers[gold.numpy()] = _softmax(model.network(replaced[gold.to(images.device)]).logits)
    return answers


def _gold_masks(pictures: Pictures, indices: Sequence[int]) -> tuple[np.ndarray, Float[Tensor, "b 1 h w"]]:
    """Which of the samples have a gold mask that marks something, and the masks at the pictures' size, 0..1."""
    has_gold = np.zeros(len(indices), dtype=bool)
    masks = torch.zeros(len(indices), 1, *pictures.size)
    for row, index in enumerate(indices):
        sample = pictures.samples[index]
        if sample.split in ("val", "test") and pictures.shards.holds(GOLD, sample.id):
            masks[row] = resize_mask(pictures.shards.get(GOLD, sample.id), pictures.size).float() / 255
            has_gold[row] = bool((masks[row] > 0.5).any())
    return has_gold, masks


def _softmax(logits: Tensor) -> Float[np.ndarray, "b k"]:
    return logits.float().softmax(dim=1).cpu().numpy()


def predict_into(
    folder: Path, model: LoadedModel, root: Path, samples: Sequence[Sample], config: PredictConfig
) -> None:
    """Predictions of all samples, shard after shard, so that memory does not grow with the manifest."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, start in enumerate(range(0, len(samples), SHARD)):
        pictures = Pictures(root, samples[start : start + SHARD], model.classes, model.size)

        def say(done: int, start: int = start) -> None:
            print(f"predicted {start + done}/{len(samples)}", flush=True)

        write_shard(folder / f"{number:04d}.npz", predict(model, pictures, config, say))


def run(stage: Stage) -> None:
    """Predict in the workspace that is the current folder."""
    device = choose_device(load_section(TrainConfig, "params.yaml", "train").device)
    model = load_model(stage.results / "model.pt", device)
    config = load_section(PredictConfig, "params.yaml", "predict")
    predict_into(stage.results / "predictions", model, Path(), stage.samples(), config)


def main() -> None:
    run(ROUND)


if __name__ == "__main__":
    main()
