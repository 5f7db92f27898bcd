"""Predictions and what is measured on them."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from abn import control, control_evaluate, evaluate, predict, selection, train
from abn.data import Pictures
from abn.early import read_early_confidence
from abn.evaluate import align, measure
from abn.manifest import Sample, read_manifest
from abn.model import ABN, LoadedModel
from abn.predict import Corners, PredictConfig, predict_into
from abn.predictions import Predictions, read_predictions, write_shard
from tiny import ROWS, SIZE, correct, make_workspace, square, tiny_settings, write_params

CLASSES = ["dark", "light"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel(ABN(tiny_settings().model, 2).eval(), CLASSES, (SIZE, SIZE))


def predictions_of(root: Path, model: LoadedModel, batch_size: int = 7, seed: int = 0) -> Predictions:
    pictures = Pictures(root, read_manifest(root), CLASSES, model.size)
    return predict.predict(model, pictures, PredictConfig(batch_size, seed))


def test_every_sample_is_answered_in_the_order_of_the_manifest(root: Path, model: LoadedModel) -> None:
    found = predictions_of(root, model)
    assert found.samples.tolist() == [row.id for row in ROWS]
    assert found.maps.shape == (30, 8, 8)
    assert found.probabilities.sum(axis=1) == pytest.approx(np.ones(30))
    assert found.attention_probabilities.sum(axis=1) == pytest.approx(np.ones(30))
    pictures = Pictures(root, read_manifest(root), CLASSES, model.size)
    with torch.inference_mode():
        output = model.network(pictures[[4]].images.float() / 255)
    assert found.probabilities[4] == pytest.approx(output.logits.softmax(dim=1)[0].numpy(), abs=1e-5)
    assert found.maps[4] == pytest.approx(output.attention_map[0, 0].numpy(), abs=1e-5)


def test_the_size_of_a_batch_does_not_change_the_answers(root: Path, model: LoadedModel) -> None:
    whole, pairs = predictions_of(root, model, 30), predictions_of(root, model, 2)
    for field in fields(Predictions):
        if field.name not in ("samples", "replaced_probabilities"):  # contexts come from the same batch
            np.testing.assert_allclose(getattr(whole, field.name), getattr(pairs, field.name), atol=1e-5)


def test_gold_masks_are_those_of_validation_and_test(root: Path, model: LoadedModel) -> None:
    found = predictions_of(root, model)
    judged = [row.split in ("val", "test") for row in ROWS]
    assert found.has_gold.tolist() == judged
    assert np.isnan(found.replaced_probabilities[~found.has_gold]).all()
    assert np.isfinite(found.replaced_probabilities[found.has_gold]).all()
    assert not found.gold_maps[~found.has_gold].any()
    for row in np.flatnonzero(found.has_gold):
        assert found.gold_maps[row].mean() == pytest.approx(square(row).mean() / 255, abs=0.02)


def test_an_empty_gold_mask_judges_nothing_and_one_of_a_training_picture_is_not_looked_at(
    tmp_path: Path, model: LoadedModel
) -> None:
    root = make_workspace(tmp_path)
    masks = {"val0": np.zeros((SIZE, SIZE), np.uint8), "val1": square(21), "train00": square(0)}
    np.savez(root / "data/gold.npz", allow_pickle=False, **masks)
    found = predictions_of(root, model)
    assert found.samples[found.has_gold].tolist() == ["val1"]


def test_a_workspace_without_gold_masks_is_answered_too(tmp_path: Path, model: LoadedModel) -> None:
    root = make_workspace(tmp_path)
    (root / "data/gold.npz").unlink()
    assert not predictions_of(root, model).has_gold.any()


def test_a_sample_of_the_pool_costs_two_forward_passes(tmp_path: Path, model: LoadedModel) -> None:
    root = make_workspace(tmp_path)
    (root / "data/gold.npz").unlink()
    passes = []
    counter = model.network.register_forward_hook(lambda module, given, output: passes.append(len(given[0])))
    try:
        predictions_of(root, model)
    finally:
        counter.remove()
    assert sum(passes) == 2 * len(ROWS)


def test_other_corners_come_from_a_picture_of_another_class_and_the_rest_stays(root: Path) -> None:
    pictures = Pictures(root, read_manifest(root), CLASSES, (SIZE, SIZE))
    batch = pictures[list(range(6))]
    images, answers = batch.images.float() / 255, torch.tensor([0, 1, 0, 1, 0, 1])
    replaced = Corners(pictures, len(pictures), seed=0).replaced(images, batch.indices, answers)
    corners = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    ends = torch.tensor([0, 1, 2, 3, -4, -3, -2, -1])
    corners[ends[:, None], ends] = True
    assert torch.equal(replaced[..., ~corners], images[..., ~corners])
    for row in range(6):
        found = replaced[row][:, corners]
        donors = [i for i in range(30) if torch.equal(pictures[[i]].images[0][:, corners] / 255, found)]
        assert [pictures.samples[i].label for i in donors] != [CLASSES[answers[row]]]
        assert len(donors) == 1


def test_early_confidence_is_taken_by_sample_and_unknown_without(root: Path, model: LoadedModel) -> None:
    pictures = Pictures(root, read_manifest(root), CLASSES, model.size)
    found = predict.predict(model, pictures, PredictConfig(7, 0), early={"train03": 0.75})
    known = np.isfinite(found.early_confidence)
    assert found.samples[known].tolist() == ["train03"] and found.early_confidence[known].tolist() == [0.75]


def test_another_context_changes_the_answer_and_the_seed_repeats_it(root: Path, model: LoadedModel) -> None:
    first, again, other = (predictions_of(root, model, 30, seed).replaced_probabilities[20:28] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_contexts_come_from_pictures_whose_object_is_known(
    root: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def elsewhere(images: torch.Tensor, masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        given.append(len(images))
        return images.flip(0)

    monkeypatch.setattr(predict, "in_another_context", elsewhere)
    found = predictions_of(root, model, 30)
    assert given == [found.has_gold.sum()] and 1 < given[0] < 30


def test_shards_are_read_as_one_table_and_older_ones_go(
    root: Path, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "SHARD", 8)
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/0099.npz").write_bytes(b"of an earlier, longer manifest")
    predict_into(tmp_path / "predictions", model, root, read_manifest(root), PredictConfig(8, 0))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"{i:04d}.npz" for i in range(4)]
    found, whole = read_predictions(tmp_path / "predictions"), predictions_of(root, model, 8)
    assert found.samples.tolist() == whole.samples.tolist()
    np.testing.assert_allclose(found.maps, whole.maps, atol=1e-6)


def test_no_predictions_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no predictions; run `dvc repro predict`"):
        read_predictions(tmp_path / "predictions")


# --- measuring


def table(probabilities: list[list[float]], **columns: np.ndarray) -> Predictions:
    count, given = len(probabilities), np.array(probabilities)
    return Predictions(
        **{
            "samples": np.array([f"s{i}" for i in range(count)]),
            "probabilities": given,
            "attention_probabilities": given,
            "maps": np.zeros((count, 2, 2)),
            "embeddings": np.zeros((count, 3)),
            "corner_reliance": np.zeros(count),
            "early_confidence": np.full(count, np.nan),
            "has_gold": np.zeros(count, bool),
            "gold_maps": np.zeros((count, 2, 2)),
            "replaced_probabilities": np.full(given.shape, np.nan),
            **columns,
        }
    )


def test_accuracies_of_a_worked_example() -> None:
    """Four cats, three of them right; one dog, wrong; the last row is not asked about."""
    found = table([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.6, 0.4], [0.0, 1.0]])
    metrics = measure(found, np.array([0, 0, 0, 0, 1, 0]), np.arange(5))
    assert metrics == {
        "samples": 5,
        "accuracy": pytest.approx(3 / 5),
        "balanced_accuracy": pytest.approx((3 / 4 + 0) / 2),
        "worst_class_accuracy": 0.0,
    }


def test_metrics_of_the_gold_set_of_a_worked_example() -> None:
    left = np.array([[1.0, 0.0], [1.0, 0.0]])
    maps = np.stack([left * 0.9, np.full((2, 2), 0.2), left])
    found = table(
        [[0.9, 0.1], [0.3, 0.7], [1.0, 0.0]],
        maps=maps,
        has_gold=np.array([True, True, False]),
        gold_maps=np.stack([left, left, 0 * left]),
        replaced_probabilities=np.array([[0.4, 0.6], [0.2, 0.8], [np.nan, np.nan]]),
    )
    metrics = measure(found, np.array([0, 1, 0]), np.arange(3))
    assert metrics["gold_samples"] == 2
    assert metrics["attention_inside_mask"] == pytest.approx((1.0 + 0.5) / 2)
    assert metrics["map_iou"] == pytest.approx((1.0 + 0.0) / 2)
    assert metrics["mask_share"] == pytest.approx(0.5)
    assert metrics["context_reliance"] == pytest.approx((0.5 + 0.1) / 2)
    assert metrics["accuracy_in_own_context"] == metrics["accuracy"]
    assert metrics["accuracy_in_other_context"] == pytest.approx(0.5)


def test_a_gold_mask_that_fills_no_cell_of_the_map_says_nothing_about_where_the_map_looks() -> None:
    """Else a map that looks nowhere would agree with it best."""
    spot = np.array([[0.3, 0.0], [0.0, 0.0]])
    found = table(
        [[1.0, 0.0], [1.0, 0.0]],
        maps=np.stack([0 * spot, np.array([[0.9, 0.0], [0.0, 0.1]])]),
        has_gold=np.array([True, True]),
        gold_maps=np.stack([spot, 3 * spot]),
        replaced_probabilities=np.array([[1.0, 0.0], [1.0, 0.0]]),
    )
    metrics = measure(found, np.array([0, 0]), np.arange(2))
    assert (metrics["map_iou"], metrics["pointing_game"]) == (1.0, 1.0)
    assert not {"map_iou", "pointing_game"} & measure(found, np.array([0, 0]), np.arange(1)).keys()


def test_predictions_are_aligned_by_sample_id() -> None:
    samples = [Sample("s1", "", "b", "test"), Sample("s0", "", "a", "train"), Sample("s2", "", "", "pool")]
    labels, splits = align(samples, table([[0.5, 0.5]] * 3), ["a", "b"])
    assert labels.tolist() == [0, 1, -1]
    assert splits.tolist() == ["train", "test", "pool"]


def test_predictions_of_another_manifest_are_refused() -> None:
    with pytest.raises(ValueError, match="results/predictions know sample s0, data/manifest.csv does not; run `dvc"):
        align([Sample("other", "", "a", "train")], table([[0.5, 0.5]]), ["a", "b"])


# --- the stages in a row


def test_the_stages_run_in_a_row_with_corrections_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_workspace(tmp_path)
    correct(root, {f"train{i:02d}": square(i) for i in range(4)})
    write_params(root, epochs=2)
    monkeypatch.chdir(root)
    for stage in (train, predict, evaluate, selection, control, control_evaluate):
        stage.main()

    for results in (root / "results", root / "results/control"):
        metrics = json.loads((results / "metrics.json").read_text())
        assert set(metrics) == {"train", "val", "test"}
        assert metrics["test"]["samples"] == metrics["test"]["gold_samples"] == 4
        assert "gold_samples" not in metrics["train"]
        with (results / "plots/confusion.csv").open(newline="") as file:
            assert [row["actual"] for row in csv.DictReader(file)] == ["dark", "light"] * 2
        with (results / "plots/training.csv").open(newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
        assert not (results / "checkpoint.pt").exists()
        early = read_early_confidence(results / "early.npz")
        assert set(early) == {row.id for row in ROWS if row.split == "train"}
        assert all(0 <= value <= 1 for value in early.values())
    corrected, uncorrected = (
        [json.loads(line)["corrected"] for line in (root / folder / "train.jsonl").read_text().splitlines()]
        for folder in ("results", "results/control")
    )
    assert (corrected, uncorrected) == ([4, 4], [0, 0])
    with (root / "results/batch.csv").open(newline="") as file:
        asked = [row["sample"] for row in csv.DictReader(file)]
    assert len(asked) == 6
    assert not {f"train{i:02d}" for i in range(4)} & set(asked)


def test_a_shard_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_shard(tmp_path / name, table([[0.5, 0.5]]))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
