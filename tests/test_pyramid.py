"""The pyramid: what an extractor sees at each of its resolutions."""

from __future__ import annotations

import pytest
import torch

from abn.backbones import make_parts
from abn.model import ABN, ModelConfig
from abn.pyramid import Pyramid


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", "vgg11", "densenet121", "convnext_tiny"])
def test_it_goes_from_fine_to_coarse_and_ends_with_what_the_network_goes_on_from(name: str) -> None:
    network = ABN(ModelConfig(name, "none", "residual"), 3).eval()
    parts = make_parts(name)
    parts.extractor.load_state_dict(network.extractor.state_dict())
    pyramid = Pyramid(parts)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    features = pyramid(images)
    assert torch.equal(features[-1], network.extract(images))
    assert [(found.shape[1], 64 / found.shape[2]) for found in features] == pyramid.steps
    strides = [stride for _, stride in pyramid.steps]
    assert strides == sorted(set(strides)) and strides[0] <= 4 and strides[-1] == 16
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())


@pytest.mark.parametrize("name", ["efficientnet_lite0", "densenet121", "vgg11"])
def test_it_sees_long_pictures(name: str) -> None:
    pyramid = Pyramid(make_parts(name))
    images = torch.rand(2, 3, 8, 64, generator=torch.Generator().manual_seed(0))
    found = pyramid(images)
    assert [(features.shape[2], features.shape[3]) for features in found] == [
        (max(1, round(8 / step)), round(64 / step)) for _, step in pyramid.steps
    ]


def test_an_extractor_of_one_piece_has_one_step() -> None:
    parts = make_parts("resnet18", split="layer2")._replace(extractor=torch.nn.Conv2d(3, 5, 3, 2, 1))
    assert Pyramid(parts).steps == [(5, 2)]
