from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abn.model import ABN
from benchmarks import attention
from tiny import tiny_settings


def network() -> ABN:
    torch.manual_seed(0)
    return ABN(tiny_settings().model, 3).eval()


def test_grad_cam_is_the_class_activation_map_where_a_linear_layer_follows_the_mean() -> None:
    """Selvaraju et al. show it: there the weights are those of the linear layer."""
    model, images = network(), torch.rand(4, 3, 16, 16)
    features = model.extract(images)
    own = model.attend(features)[1]
    stage = model.stage(features * (1 + own))
    weights = model.linear.weight[model(images).logits.argmax(dim=1)]
    expected = torch.einsum("bchw,bc->bhw", stage, weights).clamp(min=0)
    expected = expected / expected.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    np.testing.assert_allclose(attention.grad_cam(model, images), expected.detach().numpy(), atol=1e-4)


def test_gradient_times_input_agrees_with_finite_differences() -> None:
    model, images = network().double(), torch.rand(1, 3, 16, 16, dtype=torch.float64)
    found = attention.gradient_times_input(model, images)[0]
    answer = model(images).logits.argmax()
    slopes = []
    for row, column in ((3, 4), (9, 12)):
        moved = images.clone()
        slope = 0.0
        for channel in range(3):
            moved = images.clone()
            moved[0, channel, row, column] += 1e-5
            change = (model(moved).logits[0, answer] - model(images).logits[0, answer]).item()
            slope += abs(change / 1e-5 * images[0, channel, row, column].item())
        slopes.append(slope)
    assert found[3, 4] / found[9, 12] == pytest.approx(slopes[0] / slopes[1], rel=1e-2)
    assert found.max() == pytest.approx(1.0)


def test_a_mirrored_and_moved_picture_repeats_the_edge_where_it_moved_in() -> None:
    images = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = attention.mirrored_and_moved(images, 2)
    assert torch.equal(moved[..., 2:, 2:], images.flip(-1)[..., :-2, :-2])
    assert torch.equal(moved[..., 0, 2:], images.flip(-1)[..., 0, :-2])


def test_ranking_of_a_worked_example() -> None:
    wrong = np.array([True, False, True, False])
    found = attention.measure(np.array([0.9, 0.8, 0.7, 0.1]), wrong, budget=2)
    assert found == {"auc": pytest.approx(3 / 4), "precision": 0.5}


def test_the_benchmark_tells_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "EXPLAINED", 4)
    picture, figures = tmp_path / "side_by_side.png", tmp_path / "figures.json"
    arguments = ["--train", "60", "--epochs", "1", "--seeds", "1", "--budget", "10"]
    options = attention.parse([*arguments, "--picture", str(picture), "--json", str(figures)])
    found = attention.run(options)
    assert {"suspicion", "after verdicts", "corner reliance", "deletion"} <= set(found["scores"])
    assert all(0 <= one["auc"]["mean"] <= 1 for one in found["scores"].values())
    assert set(found["explanations"]) == set(attention.EXPLANATIONS)
    assert 0 < found["maps"]["wrong"]["share"]["mean"] <= found["maps"]["wrong"]["carriers"]["mean"] < 0.5
    assert json.dumps(found)
    with Image.open(picture) as image:
        assert image.width > 300
