"""The Attention Branch Network: a classifier that shows where it looks, and looks where it is told.

Lineage: Fukui et al., "Attention Branch Network", CVPR 2019; an edited map at inference as in Mitsuhara et al.,
VISAPP 2021. Where paper and authors' code differ we follow the code: the map head is a 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from abn.backbones import load_tensors, make_parts
from abn.cifar import convolution
from abn.config import make_section
from abn.files import replacing


@dataclass(frozen=True)
class ModelConfig:
    backbone: str
    weights: str
    mechanism: Literal["residual", "gate"]
    split: str = "auto"  # models saved before this and the next setting say nothing of them
    attention: Literal["full", "light"] = "full"


class ABNOutput(NamedTuple):
    attention_logits: Float[Tensor, "b k"]  # the attention branch's own answer
    logits: Float[Tensor, "b k"]  # the perception branch's: the answer that counts
    attention_map: Float[Tensor, "b 1 h w"]  # M, 0..1, as used: the network's own, or the given one resized
    embedding: Float[Tensor, "b d"]  # what the last linear layer sees


class ABN(nn.Module):
    """Extractor, attention branch, perception branch.

    `residual` weighs the features g as g * (1 + M) (the paper's default), `gate` as g * M.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        parts = make_parts(config.backbone, config.weights, config.split, config.attention)
        self.mechanism = config.mechanism
        self.extractor = parts.extractor
        self.attention_stage = nn.Sequential(
            parts.attention_stage,
            nn.BatchNorm2d(parts.attention_channels),
            convolution(parts.attention_channels, classes, 1),
            nn.BatchNorm2d(classes),
            nn.ReLU(),
        )
        self.class_head = convolution(classes, classes, 1)
        self.map_head = nn.Sequential(convolution(classes, 1, 3), nn.BatchNorm2d(1), nn.Sigmoid())
        self.stage = parts.stage
        self.linear = nn.Linear(parts.channels, classes)
        self.register_buffer("mean", torch.tensor(parts.normal.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(parts.normal.std).view(3, 1, 1), persistent=False)

    def forward(
        self, images: Float[Tensor, "b 3 H W"], attention_map: Float[Tensor, "b 1 i j"] | None = None
    ) -> ABNOutput:
        """Answers for pictures in 0..1.

        A given `attention_map` (0..1, any size) takes the place of the network's own; only the perception branch
        sees it.
        """
        features = self.extract(images)
        attention_logits, own_map = self.attend(features)
        used_map = own_map if attention_map is None else resize_map(attention_map, own_map.shape[-2:])
        logits, embedding = self.perceive(features, used_map)
        return ABNOutput(attention_logits, logits, used_map, embedding)

    def extract(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return self.extractor((images - self.mean) / self.std)

    def attend(self, features: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b 1 h w"]]:
        z = self.attention_stage(features)
        return self.class_head(z).mean(dim=(2, 3)), self.map_head(z)

    def perceive(
        self, features: Float[Tensor, "b c h w"], attention_map: Float[Tensor, "b 1 h w"]
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b d"]]:
        weighed = features * (1 + attention_map) if self.mechanism == "residual" else features * attention_map
        embedding = self.stage(weighed).mean(dim=(2, 3))
        return self.linear(embedding), embedding


def resize_map(attention_map: Float[Tensor, "b 1 i j"], size: Sequence[int]) -> Float[Tensor, "b 1 h w"]:
    """A map or mask at another (height, width), 0..1, bilinear: if smaller each cell is a mean that fades into the next
    ones, so that what fills one cell alone stays under 1."""
    resized = F.interpolate(attention_map, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


class LoadedModel(NamedTuple):
    network: ABN
    classes: list[str]
    size: tuple[int, int]  # height, width of the pictures it was trained on


def save_model(path: str | Path, network: ABN, config: ModelConfig, classes: list[str], size: tuple[int, int]) -> None:
    """Writes everything that a later `load_model` needs; the file holds tensors and plain values only."""
    state = {
        "model": {**asdict(config), "weights": "none"},  # they are in the state; the file stands on its own
        "classes": list(classes),
        "size": list(size),
        "state": {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()},
    }
    # To an open file: torch writes the name of a path into the archive, and the same model must give the same bytes.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The model at `path`, in evaluation mode. Raises ValueError where the file is missing or is no model of ours."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} holds no model; run `dvc repro train`, or `dvc checkout` to restore one")
    saved = load_tensors(path)
    if not isinstance(saved, dict) or not {"model", "classes", "size", "state"} <= saved.keys():
        raise ValueError(f"{path} is not a model saved by abn.train")
    network = ABN(make_section(ModelConfig, saved["model"], "model"), len(saved["classes"]))
    network.load_state_dict(saved["state"])
    return LoadedModel(network.to(device).eval(), saved["classes"], tuple(saved["size"]))
