"""The paper's networks for pictures of about 32 pixels, in pieces.

Lineage: He et al., CVPR 2016 (ResNet); Zagoruyko and Komodakis, BMVC 2016 (Wide ResNet); Xie et al., CVPR 2017
(ResNeXt); Huang et al., CVPR 2017 (DenseNet-BC); each as in the code of Fukui et al., CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Normal(NamedTuple):
    """What is taken from pictures in 0..1, and what they are divided by then: per channel, as the weights expect."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normal((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Body(NamedTuple):
    """A classifier without its linear layer, in named pieces that run one after the other."""

    pieces: dict[str, list[nn.Module]]
    final: list[nn.Module]  # behind the last piece, before the mean; the attention branch has its own norm there
    split: str  # the piece before which the network is cut unless another is asked for
    channels: int  # of what is pooled
    normal: Normal = IMAGENET


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


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
    """1x1, 3x3, 1x1 around a shortcut, four times as wide outside as inside; ResNeXt has its own inside and groups."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, inside: int | None = None, groups: int = 1) -> None:
        super().__init__()
        inside = inside or width
        self.conv1, self.bn1 = convolution(inputs, inside, 1), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = convolution(inside, inside, 3, stride, groups), nn.BatchNorm2d(inside)
        self.conv3, self.bn3 = convolution(inside, width * 4, 1), nn.BatchNorm2d(width * 4)
        self.shortcut = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + self.shortcut(x)).relu()


class PreactivatedBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU; where the width changes the shortcut is a 1x1
    convolution of what is already activated."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), convolution(width, width, 3)
        self.shortcut = None if inputs == width else convolution(inputs, width, 1, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.bn1(x).relu()
        around = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        y = self.conv2(self.bn2(y).relu())
        return around + y


class DenseLayer(nn.Module):
    """Adds `growth` channels to those that came in: a 1x1 convolution to four times as many, then 3x3."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), convolution(4 * growth, growth, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        y = self.conv1(self.bn1(x).relu())
        y = self.conv2(self.bn2(y).relu())
        return torch.cat((x, y), dim=1)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _stage(
    block: Callable[[int, int, int], nn.Module], blocks: int, inputs: int, width: int, expansion: int, stride: int
) -> nn.Sequential:
    first = block(inputs, width, stride)
    return nn.Sequential(first, *(block(width * expansion, width, 1) for _ in range(blocks - 1)))


def _stem(channels: int) -> list[nn.Module]:
    return [convolution(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]


def resnet(depth: int) -> Body:
    """Three stages of 16, 32 and 64 channels at 32, 16 and 8 pixels for a 32-pixel picture.

    The authors' code takes bottlenecks from depth 44 on and n = (depth - 2) // 6 blocks a stage for both kinds of
    block, so that its "110" has 164 convolutions; we keep its convention, since its published numbers stand on it.
    `resnet_9n` counts the other way.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"model.backbone is cifar_resnet{depth}; a depth is 6n + 2: 8, 14, 20, 32, 56, 110, ...")
    return _resnet(BasicBlock if depth < 44 else Bottleneck, (depth - 2) // 6)


def resnet_9n(depth: int) -> Body:
    """As many layers as the name says: n = (depth - 2) / 9 bottlenecks a stage, as in the authors' lecture notebook.

    A bottleneck has three convolutions; with the first one and the linear layer that makes 9n + 2.
    """
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"model.backbone is cifar_resnet{depth}_9n; a depth is 9n + 2: 11, 20, 29, 56, 110, ...")
    return _resnet(Bottleneck, (depth - 2) // 9)


def _resnet(block: type[BasicBlock] | type[Bottleneck], blocks: int) -> Body:
    expansion = block.expansion
    pieces: dict[str, list[nn.Module]] = {
        "stem": _stem(16),
        "layer1": [_stage(block, blocks, 16, 16, expansion, 1)],
        "layer2": [_stage(block, blocks, 16 * expansion, 32, expansion, 2)],
        "layer3": [_stage(block, blocks, 32 * expansion, 64, expansion, 2)],
    }
    return Body(pieces, [], "layer3", 64 * expansion)


def wide_resnet(depth: int, widen: int) -> Body:
    """Three stages of 16, 32 and 64 times `widen` channels, n = (depth - 4) / 6 blocks each."""
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        name = f"cifar_wrn{depth}_{widen}"
        raise ValueError(f"model.backbone is {name}; a depth is 6n + 4: 10, 16, 22, 28, 40, ..., a width at least 1")
    blocks, width = (depth - 4) // 6, 16 * widen
    pieces: dict[str, list[nn.Module]] = {
        "stem": [convolution(3, 16, 3)],
        "block1": [_stage(PreactivatedBlock, blocks, 16, width, 1, 1)],
        "block2": [_stage(PreactivatedBlock, blocks, width, 2 * width, 1, 2)],
        "block3": [_stage(PreactivatedBlock, blocks, 2 * width, 4 * width, 1, 2)],
    }
    return Body(pieces, [nn.BatchNorm2d(4 * width), nn.ReLU()], "block3", 4 * width)


def resnext(depth: int, groups: int, width: int) -> Body:
    """Three stages of 256, 512 and 1024 channels, n = (depth - 2) / 9 bottlenecks each, whose 3x3 convolution has
    `groups` groups of `width`, 2 * `width` and 4 * `width` channels.

    The authors define a batch norm after the attention branch's stage and do not call it here; we do, as elsewhere.
    """
    if depth < 11 or (depth - 2) % 9 or groups < 1 or width < 1:
        name = f"cifar_resnext{depth}_{groups}x{width}d"
        raise ValueError(f"model.backbone is {name}; a depth is 9n + 2: 11, 20, 29, ..., groups and width at least 1")

    def block(inputs: int, outside: int, stride: int) -> Bottleneck:
        return Bottleneck(inputs, outside, stride, inside=groups * width * outside // 64, groups=groups)

    blocks = (depth - 2) // 9
    pieces: dict[str, list[nn.Module]] = {
        "stem": _stem(64),
        "stage1": [_stage(block, blocks, 64, 64, 4, 1)],
        "stage2": [_stage(block, blocks, 256, 128, 4, 2)],
        "stage3": [_stage(block, blocks, 512, 256, 4, 2)],
    }
    return Body(pieces, [], "stage3", 1024)


def densenet(depth: int, growth: int) -> Body:
    """DenseNet-BC: three blocks of n = (depth - 4) / 6 layers; a transition halves channels and resolution.

    The authors cut behind the second transition, so that the map has 8x8 cells for a 32-pixel picture;
    `model.split: trans2` cuts before it, for 16x16.
    """
    if depth < 10 or (depth - 4) % 6 or growth < 1:
        name = f"cifar_densenet{depth}_{growth}"
        raise ValueError(f"model.backbone is {name}; a depth is 6n + 4: 10, 16, 40, 100, ..., a growth at least 1")
    channels, layers = 2 * growth, (depth - 4) // 6
    pieces: dict[str, list[nn.Module]] = {"stem": [convolution(3, channels, 3)]}
    for number in (1, 2, 3):
        pieces[f"dense{number}"] = [DenseLayer(channels + i * growth, growth) for i in range(layers)]
        channels += layers * growth
        if number < 3:
            halved = [nn.BatchNorm2d(channels), nn.ReLU(), convolution(channels, channels // 2, 1), nn.AvgPool2d(2)]
            pieces[f"trans{number}"] = [nn.Sequential(*halved)]
            channels //= 2
    return Body(pieces, [nn.BatchNorm2d(channels), nn.ReLU()], "dense3", channels)
