"""Trains the network: `python -m abn.train` reads params.yaml and data/, writes results/model.pt, its history
train.jsonl, early.npz (abn/early.py) and inferred.npz (abn/inferred.py).

The loop is explicit and resumable: each epoch draws its randomness from (seed, epoch) alone, and the checkpoint after
an epoch holds the weights and the optimizer, so that a run that was killed ends as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from abn import parallel
from abn.annotator import affordable_steps, annotate
from abn.backbones import make_parts
from abn.config import load_section
from abn.context import (
    binarised,
    in_light_of,
    in_pieces,
    is_small,
    other_pictures,
    replace_context,
    with_holes,
    with_holes_of_others,
    with_soft_rim,
    with_surroundings,
    without_objects,
)
from abn.data import (
    Batch,
    DataConfig,
    Pictures,
    augment,
    epoch_batches,
    loader,
)
from abn.early import is_early_epoch, write_early_confidence
from abn.files import replacing
from abn.inferred import write_inferred
from abn.losses import MAP_LOSSES, input_gradients
from abn.manifest import Sample, class_names, training_samples, without_loose_masks
from abn.model import ABN, ModelConfig, load_model, resize_map, save_model
from abn.pyramid import Pyramid
from abn.reliance import background_reliance
from abn.shortcut import find_shortcuts
from abn.stage import CONTROL, ROUND, Stage, printed_progress, progress

MOST = 0.9  # of a picture: if more were hidden, its label would be learned from another one's surroundings
# Times the trust in masks that people painted too wide, and in those that were learned from them, where something is
# known to mislead.
CARELESS = 0.5

LEAST_SWAPPED = 0.3  # share of the views of a class on another background, where it relies on none
FIND_FROM = 0.5  # of what has to be unlearned of a class, from which on regions that mislead are looked for


@dataclass(frozen=True)
class TrainConfig:
    start: Literal["baseline", "scratch", "champion"]
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    seed: int
    device: str
    processes: int = 1  # settings from before it say nothing of it

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "learning_rate", "processes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class CorrectionsConfig:
    recipe: Literal["context", "paper", "none"]
    map_loss: Literal["l2", "l1", "bce", "energy", "suppress", "rrr"]
    map_weight: float
    share: float
    context_rate: float
    propagate_rate: float
    holes: float
    narrow: bool = True  # settings from before it and the next say nothing of them
    reliance_limit: float = 0.5

    def __post_init__(self) -> None:
        for name in ("share", "context_rate", "propagate_rate", "holes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"corrections.{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not 0 < self.reliance_limit <= 1:
            raise ValueError(f"corrections.reliance_limit is {self.reliance_limit}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class Settings:
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    corrections: CorrectionsConfig

    @classmethod
    def load(cls, path: str | Path) -> Settings:
        return cls(
            load_section(DataConfig, path, "data"),
            load_section(ModelConfig, path, "model"),
            load_section(TrainConfig, path, "train"),
            load_section(CorrectionsConfig, path, "corrections"),
        )


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"train.device is {name!r}, which this machine lacks; set it to auto") from error
    return torch.device(name)


def train(
    root: Path,
    samples: Sequence[Sample],
    settings: Settings,
    output: Path,
    on_epoch: Callable[[dict[str, float]], None],
    say: Callable[[str], None] = lambda text: None,
    baseline: Path | None = None,
) -> None:
    """Trains on the samples of the workspace at `root` into the folder `output`; `on_epoch` gets each line of
    train.jsonl, `say` what goes on before the first. The number of steps does not depend on the masks: without any,
    this is the control.

    With `train.start: baseline` and masks, the model at the path `baseline`, of the same training without masks, is
    asked how far it relies on backgrounds (abn/reliance.py). The less it does, the fewer views are shown on another
    background, and training goes on from it; where it does wholly, or there is no such model, it begins from scratch.
    """
    config, device = settings.train, choose_device(settings.train.device)
    classes = class_names(samples)
    pictures = Pictures(root, without_loose_masks(training_samples(samples)), classes, settings.data.size)
    corrected = [index for index, sample in enumerate(pictures.samples) if sample.masks]
    if settings.corrections.recipe == "none":
        corrected = []

    rim, in_context = 0, bool(corrected) and settings.corrections.recipe == "context"
    unlearning = parallel.from_first(lambda: _unlearning(pictures, corrected, classes, settings, baseline, device, say))
    if in_context and settings.corrections.narrow:
        rim = pictures.narrow_masks()
        if rim and parallel.is_first():
            say(f"the masks that people painted are {rim} pixels too wide; that rim is taken off")
    if in_context and settings.corrections.propagate_rate:
        pyramid, most = _pyramid(settings.model), affordable_steps(settings.data.size, config.epochs * len(pictures))
        pictures.drawn, pictures.trust = parallel.from_first(
            lambda: annotate(pictures, corrected, len(classes), settings.data, config.seed, device, say, pyramid, most)
        )
        misled = unlearning.by_class >= FIND_FROM
        if misled.any():
            found = parallel.from_first(
                lambda: find_shortcuts(pictures, corrected, len(classes), config.seed, device, say)
            )
            pictures.shortcuts = {row: where for row, where in found.items() if misled[pictures.labels[row]]}
    torch.manual_seed(config.seed)
    network = _starting_network(root, settings, classes, baseline if unlearning.amount < 1 else None)
    _check_size(network, settings)
    network = network.to(device).to(memory_format=torch.channels_last)
    parallel.share_statistics(network)
    optimizer = torch.optim.SGD(
        network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    objective = Objective(
        network, settings, device, bool(corrected), rim > 0, unlearning.swapped if in_context else None
    )
    frozen = settings.corrections.recipe == "paper" and _has_champion(root, settings)
    if corrected and settings.corrections.recipe == "paper" and not frozen and parallel.is_first():
        say("corrections.recipe is paper, but nothing is frozen: this starts from scratch (train.start: champion)")
    network.extractor.requires_grad_(not frozen)
    history = History(_fingerprint(root, samples, settings, baseline), output, network, optimizer)
    if parallel.is_first():
        write_inferred(output / "inferred.npz", pictures, config.seed)
    parallel.wait()  # all have read the checkpoint before the first may remove it
    for epoch in range(history.done + 1, config.epochs + 1):
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        torch.manual_seed(config.seed * 1_000_003 + epoch)  # of what a network with dropout drops
        batches = list(
            epoch_batches(len(pictures), corrected, config.batch_size, settings.corrections.share, generator)
        )
        network.train()
        network.extractor.train(not frozen)  # the running means of its batch norms belong to its weights
        totals: dict[str, list[float]] = {}
        for step, batch in enumerate(loader(pictures, batches)):
            rate = learning_rate(config, (epoch - 1 + step / len(batches)) / config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, parts = objective(batch, generator)
            if not math.isfinite(loss.item()):
                names = _names(pictures, batch)
                raise FloatingPointError(f"loss {loss.item()} at epoch {epoch}, step {step + 1}; samples {names}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            parallel.average_gradients(network)
            optimizer.step()
            for name, value in parts.items():
                totals.setdefault(name, []).append(value)  # a batch without masks has no loss of the map
            if parallel.is_first():
                done, accuracy = (epoch - 1) * len(batches) + step + 1, totals["accuracy"]
                detail = f"epoch {epoch}/{config.epochs}, accuracy {sum(accuracy) / len(accuracy):.2f}"
                progress("", done, config.epochs * len(batches), detail)
        if is_early_epoch(epoch, config.epochs) and parallel.is_first():
            write_early_confidence(output / "early.npz", network, pictures, config.batch_size)
        if not all(bool(p.isfinite().all()) for p in network.parameters()):
            names = _names(pictures, batch)
            raise FloatingPointError(f"weights are not finite after epoch {epoch}; samples of its last step {names}")
        seconds = time.perf_counter() - began
        means = {name: sum(values) / len(values) for name, values in totals.items()}
        line = {"epoch": epoch, **means, "learning_rate": rate, "corrected": len(corrected), "seconds": seconds}
        trust = sum(pictures.trust.values()) / max(1, len(pictures) - len(corrected))
        line |= {"propagated": len(pictures.drawn), "trust": trust, "misled": len(pictures.shortcuts), "rim": rim}
        line |= {"reliance": unlearning.reliance, "unlearned": unlearning.amount}
        if parallel.is_first():
            history.add(line)
            on_epoch(line)
    if parallel.is_first():
        save_model(output / "model.pt", network, settings.model, classes, settings.data.size)
        history.close()


@dataclass(frozen=True)
class Unlearning:
    """How much of the baseline has to be unlearned, 0..1: of all classes, and of each."""

    amount: float
    by_class: Float[Tensor, "k"]
    reliance: float  # as it was measured (abn/reliance.py); 1 where it was not

    @property
    def swapped(self) -> Float[Tensor, "k"]:
        """Share of the views of each class that are shown on another background; the rest stays plain, as in use."""
        return LEAST_SWAPPED + (1 - LEAST_SWAPPED) * self.by_class


def _unlearning(
    pictures: Pictures,
    corrected: Sequence[int],
    classes: list[str],
    settings: Settings,
    baseline: Path | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Unlearning:
    """Everything where there is no baseline to go on from. Too few masks to measure by are too few to unlearn by."""
    config, everything = settings.corrections, Unlearning(1.0, torch.ones(len(classes)), 1.0)
    if not (baseline and corrected and settings.train.start == "baseline" and config.recipe == "context"):
        return everything
    loaded = load_model(baseline, device)
    if loaded.classes != classes:
        say(f"the baseline knows the classes {loaded.classes}; training begins from scratch")
        return everything
    found = background_reliance(loaded.network, pictures, corrected, len(classes), settings.train.seed, device)
    if not found:
        say("too few painted masks to tell whether the background misleads")
        return Unlearning(0.0, torch.zeros(len(classes)), 0.0)
    say(
        f"the baseline's answers follow the background by {found.mean:.2f} (p = {found.p_value:.3f} by chance); "
        f"training {'goes on from it' if found.mean < config.reliance_limit else 'begins from scratch'}"
    )
    # Of two classes that alone are misled all are by less: a class is swapped always from half of the limit on.
    by_class = (torch.from_numpy(found.by_class).float() / (config.reliance_limit / 2)).clamp(0, 1)
    return Unlearning(min(1.0, max(0.0, found.mean / config.reliance_limit)), by_class, found.mean)


class Objective:
    """The loss of a batch: both branches' cross-entropy (unweighted, as in the ABN paper), and what masks add.
    `swapped`: what part of context_rate and propagate_rate each class gets, else all."""

    def __init__(
        self,
        network: ABN,
        settings: Settings,
        device: torch.device,
        corrected: bool,
        careless: bool = False,
        swapped: Float[Tensor, "k"] | None = None,
    ) -> None:
        self.network, self.settings, self.device, self.corrected = network, settings, device, corrected
        self.swapped = None if swapped is None else swapped.to(device)
        self.care = CARELESS if careless else 1.0
        self.map_loss = MAP_LOSSES[settings.corrections.map_loss]

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss to descend, and its parts as numbers."""
        config = self.settings.corrections
        labels = batch.labels.to(self.device)
        moved = torch.cat([batch.masks, batch.shortcuts], dim=1) if batch.shortcuts.any() else batch.masks
        images, moved = augment(
            batch.images.to(self.device).float() / 255,
            moved.to(self.device).float() / 255,
            self.settings.data,
            generator,
        )
        masks, shortcuts = moved[:, :1], moved[:, 1:]  # without a channel where nothing is known to mislead
        masked = batch.has_mask.to(self.device) & (config.recipe != "none")
        taught = masked & batch.painted.to(self.device)  # a map that was called fine need not become an older model's
        if self.corrected and config.recipe == "context":
            rates = self._swap_rates(masked, batch.trust.to(self.device), labels)
            images = self._in_other_contexts(images, masks, shortcuts, rates, generator)
        gradients = config.map_loss == "rrr" and bool(taught.any())
        if gradients:
            images.requires_grad_()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            output = parallel.answer(self.network, images.contiguous(memory_format=torch.channels_last))
        attention = F.cross_entropy(output.attention_logits.float(), labels)
        perception = F.cross_entropy(output.logits.float(), labels)
        loss = attention + perception
        right = (output.logits.argmax(dim=1) == labels).float().mean()
        parts = {"attention_loss": attention.item(), "perception_loss": perception.item(), "accuracy": right.item()}
        if taught.any():
            maps = output.attention_map.float()
            if gradients:
                maps = parallel.squared_gradients(input_gradients(output.logits, images))
            maps = maps[taught]
            distances = self.map_loss(maps, resize_map(masks[taught], maps.shape[-2:]))
            distance = (distances * batch.weights.to(self.device)[taught]).mean()
            loss = loss + config.map_weight * distance
            parts["map_loss"] = distance.item()
        return loss, {"loss": loss.item(), **parts}

    def _swap_rates(self, given: Tensor, trust: Tensor, labels: Tensor) -> Tensor:
        """How often each picture is shown on another background, by who gave its mask and by its class."""
        config = self.settings.corrections
        rates = torch.where(given, config.context_rate, config.propagate_rate * trust)
        return rates if self.swapped is None else rates * self.swapped[labels]

    def _in_other_contexts(
        self, images: Tensor, masks: Tensor, shortcuts: Tensor, rates: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Corrected pictures with everything outside their mask replaced, and so those that the annotator drew a mask
        for, the more often the further it is trusted; where it is not, what misleads is replaced and all else stays.
        Careless masks, which lack half of an object or show another one, are trusted less, where that can be done.
        What misleads is not shown around a mask either."""
        config = self.settings.corrections
        marked = binarised(masks)
        misled = bool(shortcuts.any())
        misleading = binarised(shortcuts) if misled else torch.zeros_like(marked)
        share = misleading.mean(dim=(1, 2, 3))
        known = (share > 0) & (share <= MOST)
        rates = torch.where(known, self.care * rates, rates)
        keep = torch.maximum(marked, with_surroundings(marked) * (1 - misleading))
        contexts = other_pictures(without_objects(images, keep), generator)
        marked, keep = in_pieces(marked, keep, generator)
        # What is small is kept with its surroundings: were they seen to end, as a box, boxes would be learned.
        small = is_small(marked)
        alike = torch.where(small, in_light_of(images, keep - marked, contexts), contexts)
        keep = torch.where(small, with_soft_rim(marked, keep), with_holes(keep, config.holes, generator))
        if misled:
            cut = with_holes_of_others(keep, misleading, config.holes, generator)
            keep = torch.where(small, torch.maximum(marked, cut), cut)
        replaced = replace_context(images, keep, alike)
        chosen = torch.rand(len(images), generator=generator).to(self.device) < rates
        chosen &= keep.flatten(1).any(dim=1)  # where all that was marked moved out of the picture no evidence is left
        if misled:
            clear = with_holes(1 - misleading, config.holes, generator)
            clear = with_holes_of_others(clear, misleading, config.holes, generator)
            images = torch.where(known.view(-1, 1, 1, 1), replace_context(images, clear, contexts), images)
        return torch.where(chosen.view(-1, 1, 1, 1), replaced, images)


class History:
    """train.jsonl and the checkpoint beside it: what has been done, and whether it may be gone on from."""

    def __init__(self, inputs: str, output: Path, network: ABN, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer
        self.lines, self.checkpoint = output / "train.jsonl", output / "checkpoint.pt"
        self.inputs = inputs
        self.done, lines = 0, ""
        output.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.is_file():
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            if saved["inputs"] == self.inputs:
                network.load_state_dict(saved["network"])
                optimizer.load_state_dict(saved["optimizer"])
                self.done, lines = saved["epoch"], saved["lines"]
        if parallel.is_first():
            self.lines.write_text(lines)

    def add(self, line: dict[str, Any]) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        state = {
            "inputs": self.inputs,
            "epoch": line["epoch"],
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lines": self.lines.read_text(),
        }
        with replacing(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def close(self) -> None:
        self.checkpoint.unlink(missing_ok=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up over a tenth of the training, then a cosine down to zero; `progress` is 0..1."""
    if progress < 0.1:
        return config.learning_rate * max(progress, 0.002) / 0.1
    return config.learning_rate * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


def _names(pictures: Pictures, batch: Batch) -> str:
    return ", ".join(pictures.samples[i].id for i in batch.indices.tolist())


def _pyramid(config: ModelConfig) -> Pyramid | None:
    """Of the pretrained weights, if there are any. A champion's may have learned what misleads."""
    if config.weights == "none":
        return None
    return Pyramid(make_parts(config.backbone, config.weights, config.split, "light"))


def _starting_network(root: Path, settings: Settings, classes: list[str], baseline: Path | None) -> ABN:
    network = ABN(settings.model, len(classes))
    path = root / "models/start.pt" if _has_champion(root, settings) else baseline
    if path:
        loaded = load_model(path)
        if loaded.classes != classes:
            known = f"{path.name} knows the classes {loaded.classes}"
            raise ValueError(f"{known}, not {classes}; set train.start: scratch")
        try:
            network.load_state_dict(loaded.network.state_dict())
        except RuntimeError as error:
            raise ValueError(f"{path.name} has another model.backbone; set train.start: scratch") from error
    return network


def _check_size(network: ABN, settings: Settings) -> None:
    """Raises ValueError where pictures of data.size leave some layer nothing to look at."""
    height, width = settings.data.size
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, height, width))
    except RuntimeError as error:
        backbone = settings.model.backbone
        raise ValueError(f"data.size is [{height}, {width}], too small for {backbone}; take larger pictures") from error


def _has_champion(root: Path, settings: Settings) -> bool:
    """Whether training goes on from a model; models/start.pt is empty before the first promotion."""
    start = root / "models/start.pt"
    return settings.train.start == "champion" and start.is_file() and start.stat().st_size > 0


def _fingerprint(root: Path, samples: Sequence[Sample], settings: Settings, baseline: Path | None) -> str:
    """Of all that a training depends on: a checkpoint of other inputs is not gone on from."""
    inputs = {"settings": asdict(settings), "samples": [asdict(sample) for sample in samples]}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for start in (root / "models/start.pt", baseline):
        digest.update(start.read_bytes() if start and start.is_file() else b"")
    return digest.hexdigest()


def run(stage: Stage) -> None:
    """Train in the workspace that is the current folder."""
    settings, samples = Settings.load("params.yaml"), stage.samples(gold=False)
    if not stage.corrected:  # a champion has learned from what people said
        settings = replace(settings, train=replace(settings.train, start="scratch"))
    if stage == ROUND and samples == CONTROL.samples(gold=False):
        if parallel.is_first():
            print("nobody has said anything yet: the control is this round's model", flush=True)
            for name in ("model.pt", "train.jsonl", "early.npz", "inferred.npz"):
                shutil.copyfile(CONTROL.results / name, ROUND.results / name)
        return

    def say(text: str) -> None:
        print(text, flush=True)

    def say_epoch(line: dict[str, float]) -> None:
        say(
            f"epoch {line['epoch']}/{settings.train.epochs}  loss {line['loss']:.4f}  accuracy {line['accuracy']:.3f}"
            f"  {line['seconds']:.1f} s"
        )

    baseline = CONTROL.results / "model.pt"
    known = stage.corrected and baseline.is_file()
    with printed_progress():
        train(Path(), samples, settings, stage.results, say_epoch, say, baseline if known else None)


def main() -> None:
    parallel.launch("abn.train", load_section(TrainConfig, "params.yaml", "train").processes)
    with parallel.together():
        run(ROUND)


if __name__ == "__main__":
    main()
