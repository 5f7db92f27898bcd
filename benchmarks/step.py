"""What corrections cost a training step: `python -m benchmarks.step --json FILE`.

For each network the settings of params.yaml: on a batch without any mask, and on batches with masks of people on a
quarter of the pictures and, on all others, drawn ones that are half trusted and a corner that misleads; once of half of
each picture and once of a spot, which is shown with its surroundings. Figures are ratios to the same step with
`corrections.recipe: none`, within one run. Arms take turns and the median turn counts, in seconds of this process
alone, on one thread: other work weighs little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from abn.data import Pictures
from abn.files import write_json
from abn.manifest import Sample, mask_sha256
from abn.model import ABN
from abn.train import Objective, Settings

PROJECT = Path(__file__).parent.parent
NETWORKS = {"cifar_resnet8": (32, 32), "cifar_resnet20": (32, 32), "resnet18": (64, 64)}
TARGETS = {"without_masks": 1.15, "with_masks": 1.60, "with_small_masks": 1.60}
CLASSES = [str(number) for number in range(10)]
Step = Callable[[], dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, separated by commas")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels, instead of each one's own"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    for name in options.networks.split(","):
        size = tuple(options.size or NETWORKS.get(name, (64, 64)))
        rows[name] = {"size": list(size), **ratios(steps(name, size, options.batch), options.turns)}
        figures = "  ".join(f"{arm} {rows[name][arm]:.2f} (at most {target:.2f})" for arm, target in TARGETS.items())
        print(f"{name:16} {size[0]}x{size[1]}  {figures}", flush=True)
    if options.json:
        settings = {"batch": options.batch, "turns": options.turns, "targets": TARGETS}
        write_json(options.json, {"settings": settings, "networks": rows})


def steps(backbone: str, size: tuple[int, int], count: int) -> dict[str, Step]:
    """A training step of each arm on a batch of `count`; each has a network of its own and gives the parts of its
    loss."""
    shipped = Settings.load(PROJECT / "params.yaml")
    settings = replace(shipped, data=replace(shipped.data, size=size), model=replace(shipped.model, backbone=backbone))
    nothing = replace(settings, corrections=replace(settings.corrections, recipe="none"))
    unmarked = np.zeros(size, dtype=np.uint8)
    half, spot = unmarked.copy(), unmarked.copy()
    half[:, : size[1] // 2] = 255
    spot[: max(1, size[0] // 10), : max(1, size[1] // 10)] = 255
    return {
        "none": _step(nothing, count, unmarked),
        "without_masks": _step(settings, count, unmarked),
        "with_masks": _step(settings, count, half),
        "with_small_masks": _step(settings, count, spot),
    }


def ratios(steps: dict[str, Step], turns: int) -> dict[str, float]:
    """The median seconds of each arm as ratio to those of `none`, after a turn that does not count."""
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for _ in range(turns + 1):
        for arm, step in steps.items():
            began = time.process_time()
            step()
            seconds[arm].append(time.process_time() - began)
    medians = {arm: statistics.median(values[1:]) for arm, values in seconds.items()}
    return {arm: medians[arm] / medians["none"] for arm in TARGETS}


def _step(settings: Settings, count: int, mask: UInt8[np.ndarray, "H W"]) -> Step:
    painted = count // 4 if mask.any() else 0
    with tempfile.TemporaryDirectory() as folder:
        pictures = _pictures(Path(folder), mask, count, painted)
        if painted:
            drawn = torch.from_numpy(mask)[None]
            rest = range(painted, count)
            corner = torch.zeros_like(drawn)
            corner[:, : len(mask) // 5, : len(mask) // 5] = 255
            pictures.drawn, pictures.trust = dict.fromkeys(rest, drawn), dict.fromkeys(rest, 0.5)
            pictures.shortcuts = dict.fromkeys(rest, corner)
        batch = pictures[list(range(count))]
    torch.manual_seed(0)
    network = ABN(settings.model, len(CLASSES)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, settings.train.momentum)
    objective = Objective(network, settings, torch.device("cpu"), corrected=settings.corrections.recipe != "none")
    generator = torch.Generator().manual_seed(0)

    def step() -> dict[str, float]:
        loss, parts = objective(batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return parts

    return step


def _pictures(root: Path, mask: UInt8[np.ndarray, "H W"], count: int, painted: int) -> Pictures:
    """Noise; the first `painted` with the mask."""
    generator, size = np.random.default_rng(0), mask.shape
    samples = []
    for row in range(count):
        sample = Sample(f"{row:03d}", f"{row:03d}.png", CLASSES[row % len(CLASSES)], "train")
        Image.fromarray(generator.integers(256, size=(*size, 3), dtype=np.uint8)).save(root / sample.image)
        if row < painted:
            sample = replace(sample, masks="masks.npz", sha256=mask_sha256(mask), painted=True)
        samples.append(sample)
    np.savez(root / "masks.npz", allow_pickle=False, **{sample.id: mask for sample in samples[:painted]})
    return Pictures(root, samples, CLASSES, size)


if __name__ == "__main__":
    main()
