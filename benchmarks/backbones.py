"""What drawing a map costs: `python -m benchmarks.backbones --backbones cifar_resnet20,resnet50 --size 64 64`.

For each backbone the network without an attention branch (`plain`), with the full one and with the light one; figures
are ratios to plain within one run, on one thread. Arms take turns and the fastest turn counts, in seconds of this
process alone, so that other work on the machine weighs little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from abn.files import write_json
from abn.model import ABN, ModelConfig

DEFAULT = "cifar_resnet20,resnet18,resnet50,mobilenet_v3_large,efficientnet_b0,convnext_tiny"
CLASSES = 10


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=DEFAULT, help="names, separated by commas")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    print(f"{'as ratios to plain':24}{'parameters':>20}{'training step':>20}{'answering':>20}")
    print(f"{'':24}" + f"{'full':>10}{'light':>10}" * 3)
    for backbone in options.backbones.split(","):
        rows[backbone] = compare(backbone, tuple(options.size), options.batch, options.turns)
        print(f"{backbone:24}" + "".join(f"{value:10.2f}" for value in rows[backbone].values()), flush=True)
    if options.json:
        settings = {"size": list(options.size), "batch": options.batch, "turns": options.turns, "classes": CLASSES}
        write_json(options.json, {"settings": settings, "backbones": rows})


def compare(backbone: str, size: tuple[int, int], batch: int, turns: int) -> dict[str, float]:
    """Ratios to the network without an attention branch: parameters, a training step, answering."""
    images, labels = torch.rand(batch, 3, *size), torch.arange(batch) % CLASSES
    full, light = _network(backbone, "full"), _network(backbone, "light")
    plain = [full.extractor, full.stage, full.linear]

    def alone(network: ABN) -> list[Tensor]:
        features = network.extract(images)
        return [network.linear(network.stage(features).mean(dim=(2, 3)))]

    def both(network: ABN) -> list[Tensor]:
        output = network(images)
        return [output.attention_logits, output.logits]

    def step(network: ABN, answer: Callable[[ABN], list[Tensor]]) -> None:
        network.train().zero_grad(set_to_none=True)
        torch.stack([F.cross_entropy(logits, labels) for logits in answer(network)]).sum().backward()

    @torch.no_grad()
    def infer(network: ABN, answer: Callable[[ABN], list[Tensor]]) -> None:
        answer(network.eval())

    arms = {"plain": (full, alone), "full": (full, both), "light": (light, both)}
    figures: dict[str, Mapping[str, float]] = {
        "parameters": {"plain": sum(map(_count, plain)), "full": _count(full), "light": _count(light)},
        "step": fastest({arm: partial(step, *chosen) for arm, chosen in arms.items()}, turns),
        "answer": fastest({arm: partial(infer, *chosen) for arm, chosen in arms.items()}, turns),
    }
    return {
        f"{figure}_{arm}": values[arm] / values["plain"]
        for figure, values in figures.items()
        for arm in ("full", "light")
    }


def fastest(arms: Mapping[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Seconds of this process in the fastest of some turns, after one that does not count."""
    seconds = dict.fromkeys(arms, float("inf"))
    for turn in range(turns + 1):
        for arm, work in arms.items():
            began = time.process_time()
            work()
            if turn:
                seconds[arm] = min(seconds[arm], time.process_time() - began)
    return seconds


def _network(backbone: str, attention: Literal["full", "light"]) -> ABN:
    torch.manual_seed(0)
    return ABN(ModelConfig(backbone, "none", "residual", attention=attention), CLASSES)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
