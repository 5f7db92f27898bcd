"""Networks cut where the Attention Branch Network needs them: extractor | last stage.

Lineage: He et al., CVPR 2016 (ResNet); the cut and the stride of the attention branch follow Fukui et al.,
CVPR 2019, and its authors' code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Parts(NamedTuple):
    """A classifier in pieces. `stage` halves the resolution, `attention_stage` is the same stage with weights of
    its own at stride 1, so that the attention map keeps the resolution of the features that it weighs."""

    extractor: nn.Module
    stage: nn.Module
    attention_stage: nn.Module
    channels: int  # of what both stages give


def make_parts(name: str, weights: str = "none") -> Parts:
    """The backbone called `name`, cut before its last stage.

    `weights` is `none`, a name that torchvision knows (`IMAGENET1K_V2`), or a local file holding a state dict of the
    whole torchvision network. Pretrained weights of the last stage go into both of its copies.
    Raises ValueError for an unknown backbone or weights that do not fit.
    """
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        if weights != "none":
            raise ValueError(f"model.weights is {weights!r}, but {name} has none; set it to none")
        return _cifar_resnet(int(match[1]))
    if name in TORCHVISION_FAMILIES:
        return TORCHVISION_FAMILIES[name](name, weights)
    known = ", ".join(["cifar_resnet<depth>", *TORCHVISION_FAMILIES])
    raise ValueError(f"model.backbone is {name!r}; known: {known}")


def load_tensors(path: str | Path) -> Any:
    """What torch.save wrote to `path`: tensors and plain values. Raises ValueError for any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a strange file the unpickler raises nearly anything
        raise ValueError(f"{path} is not a file of tensors as torch.save writes them") from error


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        return (y + self.shortcut(x)).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a shortcut, four times as wide outside as inside."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, width * 4, 1), nn.BatchNorm2d(width * 4)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + self.shortcut(x)).relu()


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _cifar_resnet(depth: int) -> Parts:
    """Three stages of 16, 32 and 64 channels at 32, 16 and 8 pixels for a 32-pixel picture.

    The authors' code takes bottlenecks from depth 44 on and n = (depth - 2) // 6 blocks a stage for both kinds of
    block, so that its "110" has 164 convolutions; we keep its convention, since its published numbers stand on it.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"model.backbone is cifar_resnet{depth}; a depth is 6n + 2: 8, 14, 20, 32, 56, 110, ...")
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 44 else Bottleneck
    blocks = (depth - 2) // 6

    def stage(inputs: int, width: int, stride: int) -> nn.Sequential:
        first = block(inputs, width, stride)
        return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(blocks - 1)))

    extractor = nn.Sequential(
        convolution(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        stage(16, 16, 1),
        stage(16 * block.expansion, 32, 2),
    )
    inputs = 32 * block.expansion
    parts = Parts(extractor, stage(inputs, 64, 2), stage(inputs, 64, 1), 64 * block.expansion)
    for module in parts[:3]:
        _initialise(module)
    return parts


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _torchvision_resnet(name: str, weights: str) -> Parts:
    """Cut after layer3: 14x14 features for a 224-pixel picture; the attention branch copies layer4 at stride 1."""
    import torchvision  # seconds to import, and the paper's own networks do without it

    if weights == "none" or Path(weights).is_file():
        network = torchvision.models.get_model(name, weights=None)
    else:
        try:
            chosen = torchvision.models.get_model_weights(name)[weights]
        except KeyError:
            known = ", ".join(torchvision.models.get_model_weights(name).__members__)
            raise ValueError(f"model.weights is {weights!r}; for {name}: none, {known}, or a local file") from None
        network = torchvision.models.get_model(name, weights=chosen)
    if Path(weights).is_file():
        try:
            network.load_state_dict(load_tensors(weights))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"model.weights {weights} does not fit {name}: {str(error).splitlines()[0]}") from error
    extractor = nn.Sequential(
        network.conv1,
        network.bn1,
        network.relu,
        network.maxpool,
        network.layer1,
        network.layer2,
        network.layer3,
    )
    attention_stage = copy.deepcopy(network.layer4)
    for layer in attention_stage.modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
    if weights == "none":
        _initialise(attention_stage)  # weights of its own from the start
    return Parts(extractor, network.layer4, attention_stage, network.fc.in_features)


TORCHVISION_FAMILIES: dict[str, Callable[[str, str], Parts]] = {
    "resnet18": _torchvision_resnet,
    "resnet34": _torchvision_resnet,
    "resnet50": _torchvision_resnet,
    "resnet101": _torchvision_resnet,
    "resnet152": _torchvision_resnet,
}
