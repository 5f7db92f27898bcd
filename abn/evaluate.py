"""Predictions become numbers: `python -m abn.evaluate` writes results/metrics.json and results/plots/."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

from abn.attention import context_reliance, energy_inside, iou, pointing_game
from abn.files import write_csv, write_json
from abn.manifest import Sample, class_names
from abn.predictions import Answers, Predictions, Shards, read_predictions
from abn.stage import ROUND, Stage


def measure(predictions: Predictions, labels: Int[np.ndarray, "n"], rows: Int[np.ndarray, "m"]) -> dict[str, float]:
    """The metrics of the samples at `rows`, which all have a label (an index into the classes).

    accuracy, balanced_accuracy (mean of the classes' recalls) and worst_class_accuracy are higher-is-better, 0..1.
    Of the samples with a gold mask: attention_inside_mask (higher), mask_share (what chance would give it),
    context_reliance (lower), accuracy_in_own_context and accuracy_in_other_context (higher): how accurate the same
    samples are answered as they are, and with all around their masks replaced. Of those whose mask fills at least one
    cell of the map: map_iou and pointing_game (higher).
    """
    answers, truth = predictions.probabilities[rows].argmax(axis=1), labels[rows]
    recalls = [float((answers[truth == label] == label).mean()) for label in np.unique(truth)]
    metrics = {
        "samples": len(rows),
        "accuracy": float((answers == truth).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "worst_class_accuracy": min(recalls),
    }
    gold = rows[predictions.has_gold[rows]]
    if len(gold):
        maps, masks = predictions.maps[gold], predictions.gold_maps[gold]
        replaced = predictions.replaced_probabilities[gold]
        metrics |= {
            "gold_samples": len(gold),
            "attention_inside_mask": float(energy_inside(maps, masks).mean()),
            "mask_share": float(masks.mean()),
            "context_reliance": float(context_reliance(predictions.probabilities[gold], replaced).mean()),
            "accuracy_in_own_context": float((answers == truth)[predictions.has_gold[rows]].mean()),
            "accuracy_in_other_context": float((replaced.argmax(axis=1) == labels[gold]).mean()),
        }
        seen = (masks > 0.5).any(axis=(1, 2))  # of what fills no cell of the map a blank map would be the best
        if seen.any():
            metrics["map_iou"] = float(iou(maps[seen], masks[seen]).mean())
            metrics["pointing_game"] = float(pointing_game(maps[seen], masks[seen]).mean())
    return metrics


def align(
    samples: Sequence[Sample], predictions: Answers | Shards, classes: Sequence[str]
) -> tuple[Int[np.ndarray, "n"], Shaped[np.ndarray, "n"]]:
    """Label (index, -1 unknown) and split of each row of the predictions.

    Raises ValueError where the predictions are of another manifest.
    """
    by_id = {sample.id: sample for sample in samples}
    if unknown := [name for name in predictions.samples.tolist() if name not in by_id]:
        raise ValueError(f"results/predictions know sample {unknown[0]}, data/manifest.csv does not; run `dvc repro`")
    rows = [by_id[name] for name in predictions.samples.tolist()]
    labels = np.array([classes.index(row.label) if row.label in classes else -1 for row in rows])
    return labels, np.array([row.split for row in rows])


def run(stage: Stage) -> None:
    """Evaluate in the workspace that is the current folder."""
    samples, predictions = stage.samples(), read_predictions(stage.results / "predictions")
    classes = class_names(samples)
    labels, splits = align(samples, predictions, classes)
    metrics = {
        split: measure(predictions, labels, rows)
        for split in ("train", "val", "test")
        if len(rows := np.flatnonzero((splits == split) & (labels >= 0)))
    }
    write_json(stage.results / "metrics.json", metrics)
    test = np.flatnonzero(splits == "test")
    answers = predictions.probabilities[test].argmax(axis=1)
    pairs = [(classes[a], classes[p]) for a, p in zip(labels[test], answers, strict=True)]
    write_csv(stage.results / "plots/confusion.csv", ("actual", "predicted"), pairs)
    history = [json.loads(line) for line in (stage.results / "train.jsonl").read_text().splitlines()]
    columns = ("epoch", "loss", "accuracy")
    write_csv(stage.results / "plots/training.csv", columns, [[line[name] for name in columns] for line in history])


def main() -> None:
    run(ROUND)


if __name__ == "__main__":
    main()
