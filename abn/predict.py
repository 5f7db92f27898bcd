"""Model and manifest give predictions: `python -m abn.predict` reads results/model.pt, writes results/predictions/.

One pass answers every sample, a second sees it with its corners replaced. Samples of the gold set are also shown in
another context, which tells how much the answer hangs on what lies outside the mask. No other sample costs more than
two passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from abn import parallel
from abn.attention import context_reliance
from abn.config import load_section
from abn.context import binarised, in_another_context, replace_context, with_surroundings
from abn.data import Pictures, in_order, loader, resize_mask, still_marked
from abn.early import read_early_confidence
from abn.manifest import Sample
from abn.model import LoadedModel, load_model, resize_map
from abn.predictions import Predictions, write_shard
from abn.stage import ROUND, Stage
from abn.train import TrainConfig, choose_device

SHARD = 4096  # samples a file
CORNER = 1 / 4  # of the picture's shorter side, height and width of each of the four
DONORS = 64  # pictures whose corners the others are given


@dataclass(frozen=True)
class PredictConfig:
    batch_size: int
    seed: int  # of the contexts

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"predict.batch_size is {self.batch_size}; it must be at least 2: contexts are of others")


@torch.inference_mode()
def predict(
    model: LoadedModel,
    pictures: Pictures,
    config: PredictConfig,
    on_batch: Callable[[int], None] = lambda done: None,
    early: Mapping[str, float] | None = None,
    donors: Pictures | None = None,
) -> Predictions:
    """Everything that later stages need to know of each sample, in the order of the pictures.

    `early`: confidence early in training by sample id; `donors`: where other corners come from, else the pictures.
    """
    device = next(model.network.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    corners = Corners(donors or pictures, len(pictures), config.seed)
    columns: dict[str, list[np.ndarray]] = {field.name: [] for field in fields(Predictions)}
    done = 0
    for batch in loader(pictures, in_order(len(pictures), config.batch_size)):
        images = batch.images.to(device).float() / 255
        output = model.network(images)
        maps, probabilities = output.attention_map[:, 0].float().cpu().numpy(), _softmax(output.logits)
        in_other_corners = model.network(corners.replaced(images, batch.indices, output.logits.argmax(dim=1).cpu()))
        gold, masks = _gold_masks(pictures, batch.indices.tolist())
        columns["samples"].append(np.array([pictures.samples[i].id for i in batch.indices.tolist()]))
        columns["probabilities"].append(probabilities)
        columns["attention_probabilities"].append(_softmax(output.attention_logits))
        columns["maps"].append(maps)
        columns["embeddings"].append(output.embedding.float().cpu().numpy())
        columns["corner_reliance"].append(context_reliance(probabilities, _softmax(in_other_corners.logits)))
        columns["early_confidence"].append(
            np.array([(early or {}).get(pictures.samples[i].id, np.nan) for i in batch.indices.tolist()], np.float32)
        )
        columns["has_gold"].append(gold)
        columns["gold_maps"].append(resize_map(masks, output.attention_map.shape[-2:])[:, 0].numpy())
        columns["replaced_probabilities"].append(
            _in_another_context(model, images, masks.to(device), torch.from_numpy(gold), generator)
        )
        done += len(images)
        on_batch(done)
    return Predictions(**{name: np.concatenate(parts) for name, parts in columns.items()})


class Corners:
    """Pictures with the corners of another one, if possible of another class: whatever of the answer moves with them
    hung on no object, for that is seldom there. A weak stand-in for a mask where nobody has given one."""

    def __init__(self, donors: Pictures, count: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        chosen = np.sort(random.permutation(len(donors))[:DONORS])
        self.donors = donors[chosen.tolist()]
        self.preference = torch.from_numpy(random.random((count, len(chosen))))

    def replaced(
        self, images: Float[Tensor, "b 3 h w"], indices: Int[Tensor, "b"], answers: Int[Tensor, "b"]
    ) -> Float[Tensor, "b 3 h w"]:
        """`answers` of the network to the pictures; their `indices` make the draw the same in batches of any size."""
        stranger = self.donors.labels[None] != answers[:, None]
        donor = (self.preference[indices] + stranger).argmax(dim=1)
        side = round(CORNER * min(images.shape[-2:]))
        cross = torch.ones_like(images[:, :1])
        for rows in (slice(side), slice(-side, None)):
            cross[:, :, rows, :side] = cross[:, :, rows, -side:] = 0
        return replace_context(images, cross, self.donors.images[donor].to(images.device).float() / 255)


def _in_another_context(
    model: LoadedModel, images: Tensor, masks: Tensor, gold: Tensor, generator: torch.Generator
) -> Float[np.ndarray, "b k"]:
    answers = np.full((len(images), len(model.classes)), np.nan, dtype=np.float32)
    if gold.any():
        # Contexts come from pictures whose object can be taken out: a second one would be another answer that is right.
        # A single picture has to take what there is.
        among = (gold if gold.sum() > 1 else torch.ones_like(gold)).to(images.device)
        images, marked = images[among], with_surroundings(binarised(masks[among]))
        replaced = in_another_context(images, marked, generator)
        answers[gold.numpy()] = _softmax(model.network(replaced[gold.to(images.device)[among]]).logits)
    return answers


def _gold_masks(pictures: Pictures, indices: Sequence[int]) -> tuple[np.ndarray, Float[Tensor, "b 1 h w"]]:
    """Which of the samples have a gold mask that marks something, and the masks at the pictures' size, 0..1."""
    has_gold = np.zeros(len(indices), dtype=bool)
    masks = torch.zeros(len(indices), 1, *pictures.size)
    for row, index in enumerate(indices):
        sample = pictures.samples[index]
        mask = pictures.shards.gold(sample)
        if mask is not None:
            masks[row] = resize_mask(mask, pictures.size).float() / 255
            has_gold[row] = bool(masks[row].any())
    return has_gold, still_marked(masks)


def _softmax(logits: Tensor) -> Float[np.ndarray, "b k"]:
    return logits.float().softmax(dim=1).cpu().numpy()


def predict_into(
    folder: Path,
    model: LoadedModel,
    root: Path,
    samples: Sequence[Sample],
    config: PredictConfig,
    early: Mapping[str, float] | None = None,
) -> None:
    """Predictions of all samples, shard after shard, so that memory does not grow with the manifest; of several
    processes each takes its turn."""
    if parallel.is_first():
        shutil.rmtree(folder, ignore_errors=True)
    parallel.wait()
    donors = Pictures(root, samples, model.classes, model.size)
    for start in parallel.mine(range(0, len(samples), SHARD)):
        pictures = Pictures(root, samples[start : start + SHARD], model.classes, model.size)

        def say(done: int, start: int = start) -> None:
            print(f"predicted {start + done}/{len(samples)}", flush=True)

        write_shard(folder / f"{start // SHARD:04d}.npz", predict(model, pictures, config, say, early, donors))


def run(stage: Stage) -> None:
    """Predict in the workspace that is the current folder."""
    device = choose_device(load_section(TrainConfig, "params.yaml", "train").device)
    model = load_model(stage.results / "model.pt", device)
    config = load_section(PredictConfig, "params.yaml", "predict")
    early = read_early_confidence(stage.results / "early.npz")
    predict_into(stage.results / "predictions", model, Path(), stage.samples(), config, early)


def main() -> None:
    parallel.launch("abn.predict", load_section(TrainConfig, "params.yaml", "train").processes)
    with parallel.together():
        run(ROUND)


if __name__ == "__main__":
    main()
