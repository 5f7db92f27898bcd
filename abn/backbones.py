"""Networks cut where the Attention Branch Network needs them: extractor | last stage.

Lineage: the cut and the stride of the attention branch follow Fukui et al., CVPR 2019, and its authors' code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from abn import cifar, efficientnet_lite
from abn.cifar import Body, Normal, convolution
from abn.config import suggest
from abn.efficientnet_lite import EfficientNetLite0, packaged_weights


class Parts(NamedTuple):
    """A classifier in pieces. `stage` is all behind the cut; `attention_stage` works at stride 1, so that the
    attention map keeps the resolution of the features that it weighs."""

    extractor: nn.Module
    stage: nn.Module
    attention_stage: nn.Module
    channels: int  # of what `stage` gives
    attention_channels: int  # of what `attention_stage` gives
    normal: Normal  # of the pictures that `extractor` is given


def make_parts(name: str, weights: str = "none", split: str = "auto", attention: str = "full") -> Parts:
    """The backbone called `name`, cut before its piece `split`; `auto`: before its last stage.

    `weights` is `none`, a name that torchvision knows (`IMAGENET1K_V2`), `pretrained` for efficientnet_lite0, or a
    local file holding a state dict of the whole network. The attention stage is, if `attention` is `full`, a copy of
    the stage with weights of its own, which begin as the pretrained ones where there are any; if `light`, a depthwise
    separable 3x3 convolution.
    Raises ValueError for an unknown backbone or piece, or weights that do not fit.
    """
    body = make_body(name, weights)
    names = list(body.pieces)
    cut = body.split if split == "auto" else split
    if cut not in names[1:]:
        raise ValueError(f"model.split is {split!r}; for {name}: auto, {', '.join(names[1:])}")
    before, behind = names[: names.index(cut)], names[names.index(cut) :]
    last = [layer for piece in behind for layer in body.pieces[piece]]
    extractor = _join(layer for piece in before for layer in body.pieces[piece])
    features = next(layer.in_channels for layer in chain(*(m.modules() for m in last)) if isinstance(layer, nn.Conv2d))

    attention_stage: nn.Module
    if attention == "light":
        attention_stage, attention_channels = _light_stage(features), features
    else:
        attention_stage, attention_channels = _at_stride_1(copy.deepcopy(_join(last))), body.channels
    stage = _join([*last, *body.final])
    if weights == "none":
        _forget(attention_stage)
        for module in (extractor, stage, attention_stage):
            _initialise(module)
    elif attention == "light":
        _initialise(attention_stage)
    return Parts(extractor, stage, attention_stage, body.channels, attention_channels, body.normal)


def make_body(name: str, weights: str = "none") -> Body:
    """The backbone called `name` before it is cut; the errors of `make_parts`."""
    for known, make in BACKBONES.items():
        match = matches(known, name)
        if match and "<" in known:
            if weights != "none":
                raise ValueError(f"model.weights is {weights!r}, but {name} has none; set it to none")
            return make(*map(int, match.groups()))
        if match:
            return make(make_network(name, weights))
    raise ValueError(f"model.backbone is {name!r}{suggest(name, BACKBONES)}")


def make_network(name: str, weights: str = "none") -> Any:
    """The whole network called `name`, of torchvision or built like its own; the errors of `make_parts`."""
    make = _lite_network if name == "efficientnet_lite0" else _torchvision_network
    file = Path(weights)
    if make is _lite_network and weights == "pretrained":
        file = packaged_weights()
    if not file.is_file():
        return make(name, weights)
    network = make(name, "none")
    try:
        network.load_state_dict(load_tensors(file))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"model.weights {weights} does not fit {name}: {str(error).splitlines()[0]}") from error
    return network


def matches(known: str, name: str) -> re.Match[str] | None:
    """Whether `name` is the entry `known` of BACKBONES, which stands for numbers where it says <...>."""
    return re.fullmatch(re.sub(r"<\w+>", r"(\\d+)", known), name)


def load_tensors(path: str | Path) -> Any:
    """What torch.save wrote to `path`: tensors and plain values. Raises ValueError for any other file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a strange file the unpickler raises nearly anything
        raise ValueError(f"{path} is not a file of tensors as torch.save writes them") from error


def _join(layers: Iterable[nn.Module]) -> nn.Module:
    """A single layer stays itself: the names of saved tensors do not depend on how many there could be."""
    first, *others = layers
    return nn.Sequential(first, *others) if others else first


def _light_stage(channels: int) -> nn.Sequential:
    """A 3x3 convolution in two steps, in space and across channels (Howard et al., MobileNets, 2017)."""
    return nn.Sequential(
        convolution(channels, channels, 3, groups=channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        convolution(channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _at_stride_1(stage: nn.Module) -> nn.Module:
    """The stage, changed so that what it gives has the height and width of what it is given."""
    for parent in list(stage.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
                layer.stride = (1, 1)
                if layer.kernel_size == (2, 2):  # ConvNeXt halves with cells that do not overlap
                    setattr(parent, name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), layer))
            elif isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
                setattr(parent, name, nn.Identity())
    return stage


def _forget(module: nn.Module) -> None:
    """Weights of its own from the start."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            layer.reset_parameters()


def _initialise(module: nn.Module) -> None:
    """He et al., ICCV 2015, by what goes out: what the paper's networks and nearly all of torchvision's begin with."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _lite_network(name: str, weights: str) -> Any:
    if weights != "none":
        raise ValueError(f"model.weights is {weights!r}; for {name}: none, pretrained, or a local file")
    return EfficientNetLite0()


def _torchvision_network(name: str, weights: str) -> Any:
    import torchvision  # seconds to import, and the paper's own networks do without it

    return torchvision.models.get_model(name, weights=torchvision_weights(name, weights))


def torchvision_weights(name: str, weights: str) -> Any:
    """The entry `weights` of torchvision's network `name`; None for `none`. Raises ValueError where there is none."""
    import torchvision

    if weights == "none":
        return None
    try:
        return torchvision.models.get_model_weights(name)[weights]
    except KeyError:
        known = ", ".join(torchvision.models.get_model_weights(name).__members__)
        raise ValueError(f"model.weights is {weights!r}; for {name}: none, {known}, or a local file") from None


# Torchvision's networks, and one that is built like them, without their linear layers. All are cut before the last
# piece that halves the resolution, so that the map has 14x14 cells for a 224-pixel picture.


def _resnet(network: Any) -> Body:
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    layers = {f"layer{i}": [getattr(network, f"layer{i}")] for i in (1, 2, 3, 4)}
    return Body({"stem": stem, **layers}, [], "layer4", network.fc.in_features)


def _regnet(network: Any) -> Body:
    blocks = {name: [block] for name, block in network.trunk_output.named_children()}
    return Body({"stem": [network.stem], **blocks}, [], "block4", network.fc.in_features)


def _densenet(network: Any) -> Body:
    layers = dict(network.features.named_children())
    stem = [layers.pop(name) for name in ("conv0", "norm0", "relu0", "pool0")]
    final = [layers.pop("norm5"), nn.ReLU()]
    pieces = {"stem": stem, **{name: [layer] for name, layer in layers.items()}}
    return Body(pieces, final, "transition3", network.classifier.in_features)


def _vgg(network: Any) -> Body:
    """Five blocks, each up to its pooling. The three linear layers give way to the mean and one, for any input size."""
    pieces: dict[str, list[nn.Module]] = {}
    block: list[nn.Module] = []
    for layer in network.features:
        block.append(layer)
        if isinstance(layer, nn.MaxPool2d):
            pieces[f"block{len(pieces) + 1}"], block = block, []
    return Body(pieces, [], "block5", 512)


def _mobilenet(network: Any) -> Body:
    features = _numbered(network.features)
    return Body(features, [], "features.13" if len(features) == 17 else "features.9", network.classifier[0].in_features)


def _efficientnet(network: Any) -> Body:
    return Body(_numbered(network.features), [], "features.6", network.classifier[-1].in_features)


def _efficientnet_lite(network: Any) -> Body:
    return _efficientnet(network)._replace(normal=efficientnet_lite.NORMAL)


def _convnext(network: Any) -> Body:
    """A norm of each place over its channels undoes what the map says, since g * (1 + M) only scales a place. So the
    norm that begins the last downsampling goes before the cut, and no cut before it; the last norm sees the mean."""
    *before, downsampling, blocks = network.features
    norm, halving = downsampling
    pieces = {"stem": [*before, norm], "features.6": [halving], "features.7": [blocks]}
    final = [nn.AdaptiveAvgPool2d(1), network.classifier[0]]
    return Body(pieces, final, "features.6", network.classifier[-1].in_features)


def _numbered(features: nn.Sequential) -> dict[str, list[nn.Module]]:
    return {f"features.{i}": [layer] for i, layer in enumerate(features)}


_REGNET_SIZES = ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
BACKBONES: dict[str, Callable[..., Body]] = {
    "cifar_resnet<depth>": cifar.resnet,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), _resnet),
    "cifar_resnet<depth>_9n": cifar.resnet_9n,
    "cifar_wrn<depth>_<widen>": cifar.wide_resnet,
    **dict.fromkeys(("wide_resnet50_2", "wide_resnet101_2"), _resnet),
    "cifar_resnext<depth>_<groups>x<width>d": cifar.resnext,
    **dict.fromkeys(("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"), _resnet),
    "cifar_densenet<depth>_<growth>": cifar.densenet,
    **dict.fromkeys(("densenet121", "densenet161", "densenet169", "densenet201"), _densenet),
    **dict.fromkeys([f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")], _vgg),
    **dict.fromkeys(("mobilenet_v3_small", "mobilenet_v3_large"), _mobilenet),
    **dict.fromkeys([f"efficientnet_b{i}" for i in range(8)], _efficientnet),
    "efficientnet_lite0": _efficientnet_lite,
    **dict.fromkeys([f"efficientnet_v2_{size}" for size in "sml"], _efficientnet),
    **dict.fromkeys([f"regnet_{kind}_{size}" for kind in "xy" for size in _REGNET_SIZES], _regnet),
    "regnet_y_128gf": _regnet,
    **dict.fromkeys([f"convnext_{size}" for size in ("tiny", "small", "base", "large")], _convnext),
}
