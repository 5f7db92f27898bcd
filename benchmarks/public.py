"""Decoy-MNIST beside what others publish: `python -m benchmarks.public --path FOLDER --arms cnn:rrr,abn:ours-1%`.

Decoy-MNIST (Ross et al., IJCAI 2017): 60,000 digits of 28x28, each with a 4x4 square in a random corner, whose grey is
255 - 25 x digit in training and that of a random digit in the test. FOLDER holds mnist_train.npz and mnist_test.npz,
each with `x`, uint8 (n, 28, 28), and `y`.

An arm is NETWORK:METHOD. `mlp` is the network of Ross et al., `cnn` a LeNet, `abn` the attention branch network. As
published, no picture is moved or mirrored in training. Two kinds of masks are given:

- the ink of the digit, which is what labelers are asked for: it says where the evidence is and nothing else;
- all but the square (methods named -square), as Ross et al. and Schramowski et al. mark it: it says what misleads, and
  so more than a labeler who does not know the confound could say.

What is called `ours-1%` has ink masks of 1 % of the pictures and the project's default settings. `swap-1%` is what a
network without an attention branch can have of that: as many masks, propagated to the other pictures, and background
replacement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import nn

from abn.annotator import annotate
from abn.data import Pictures
from abn.files import write_json
from abn.manifest import Sample
from abn.model import ABN, load_model
from abn.train import Settings, train
from benchmarks.correction import (
    ARMS as SETTINGS,
)
from benchmarks.correction import (
    NOTHING,
    SMALL_NETWORK,
    Problem,
    Spec,
    print_table,
    seeds_of,
    settings_with,
    summary,
    worst_group,
)
from benchmarks.data import choose, confound, load
from benchmarks.methods import (
    Examples,
    Objective,
    PlainCnn,
    PlainMlp,
    answers,
    background_swap,
    caipi,
    dfr,
    energy,
    erm,
    fit,
    group_dro,
    jtt,
    rrr,
)

SIZE = (28, 28)
DIGITS = 10
# lambda_1 = 1000 of Ross et al., on pixels of 0..255, for pictures in 0..1.
RRR_WEIGHT = 1000 / 255**2
EPOCHS = {"mlp": 5, "cnn": 3, "abn": 2}
LEARNING_RATES = {"mlp": 0.05, "cnn": 0.02}  # without batch norms that of params.yaml is too high
FIGURES = ("accuracy", "worst_group", "clean")


@dataclass(frozen=True)
class Method:
    """How a network is trained on pictures in memory."""

    masks: str = ""  # ink, square or none
    objective: Callable[[], Objective] = lambda: erm
    plain: bool = False  # trained without the square
    share: float = 1.0  # of the pictures have such a mask; where that is less than 1 the others get pseudo-masks


# Trained by abn.train: what is changed in params.yaml, and the share of the pictures with a mask of the ink.
BY_SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "abn:baseline": (NOTHING, 0),
    "abn:paper": (SETTINGS["paper"], 1),
    "abn:energy": (SETTINGS["energy"], 1),
    "abn:ours-0.1%": ({}, 0.001),
    "abn:ours-1%": ({}, 0.01),
    "abn:ours-10%": ({}, 0.1),
}
# Trained by benchmarks/methods.py; jtt and dfr are more than one training.
BY_METHOD = {
    "baseline": Method(),
    "upper": Method(plain=True),
    "rrr-square": Method("square", lambda: rrr(RRR_WEIGHT)),
    "rrr": Method("ink", lambda: rrr(RRR_WEIGHT)),
    "energy": Method("ink", energy),
    "caipi-square": Method("square", lambda: caipi),
    "caipi": Method("ink", lambda: caipi),
    "jtt": Method(),
    "group-dro": Method(objective=lambda: group_dro(DIGITS)),
    "dfr": Method("ink"),
    "swap-0.1%": Method("ink", lambda: background_swap, share=0.001),
    "swap-1%": Method("ink", lambda: background_swap, share=0.01),
    "swap-10%": Method("ink", lambda: background_swap, share=0.1),
}
_EACH = [f"{network}:{name}" for network in EPOCHS for name in BY_METHOD]
ARMS = tuple(arm for arm in dict.fromkeys([*_EACH, *BY_SETTINGS]) if arm != "mlp:energy")  # an MLP has no map
DEFAULT_ARMS = tuple(arm for arm in ARMS if not arm.startswith("abn:") or arm in BY_SETTINGS)
# Figures of others: what it is, accuracy, accuracy of the worst class, source. Their groups are classes.
PUBLISHED: tuple[tuple[str, float, float | None, str], ...] = (
    ("MLP, without masks", 0.555, None, "Ross et al., 2017: log of the cross-validation in their code, lambda 1e-4"),
    ("MLP, RRR, all squares", 0.960, None, "the same, lambda 1000, the best there"),
    ("MLP, without masks", 0.637, 0.224, "Ghitu et al., TMLR 2025: results in their code"),
    ("MLP, RRR, all squares", 0.923, 0.854, "the same"),
    ("MLP, R4, all squares", 0.970, 0.948, "the same; the best there"),
)


class InMemory(Pictures):
    """Pictures that need no files: masks are given of the rows `corrected`."""

    def __init__(
        self,
        images: UInt8[torch.Tensor, "n 3 h w"],
        labels: Int[np.ndarray, "n"],
        masks: UInt8[torch.Tensor, "n 1 h w"],
        corrected: Sequence[int],
    ) -> None:
        known = set(corrected)
        samples = [
            Sample(str(row), "", str(label), "train", masks="given" if row in known else "", painted=True)
            for row, label in enumerate(labels.tolist())
        ]
        super().__init__("", samples, [str(digit) for digit in range(DIGITS)], SIZE)
        self.images, self.masks = images, masks

    def _image(self, index: int) -> torch.Tensor:
        return self.images[index]

    def _mask(self, index: int) -> torch.Tensor | None:
        return self.masks[index] if self.samples[index].masks else None


class DecoyMnist:
    """The problem of one seed, and the arms on it. What abn.train needs as files is written below `root`, once."""

    def __init__(self, root: Path, path: str, pictures: int, seed: int) -> None:
        self.root, self.seed = root, seed
        self.spec = Spec("mnist", path, SIZE, pictures, "decoy", 1.0, pictures, "none")
        train, test = load("mnist", Path(path) if path else None, SIZE, pictures, seed)
        every = np.arange(DIGITS)
        self.values = np.random.default_rng([seed, 4]).integers(DIGITS, size=len(test))
        decoyed = confound(train, "decoy", train.labels, every)
        self.labels, self.test_labels = train.labels, test.labels
        self.images = {"decoy": _tensor(decoyed.images), "plain": _tensor(train.images)}
        self.masks = {"ink": decoyed.masks, "square": (decoyed.images == train.images).all(axis=-1)}
        shown = confound(test, "decoy", self.values, every)
        self.tests = {"decoy": _tensor(shown.images), "plain": _tensor(test.images)}

    @cached_property
    def files(self) -> Problem:
        return Problem(self.root, self.spec, self.seed)

    def examples(self, method: Method) -> Examples:
        """Pictures and masks; those that nobody gave are propagated from those that somebody did."""
        images = self.images["plain" if method.plain else "decoy"]
        masks = self.masks[method.masks] if method.masks else np.zeros((len(images), *SIZE), dtype=bool)
        order = np.random.default_rng([self.seed, 5]).permutation(len(images)).tolist()
        rows = choose(self.labels, order)[: max(1, round(method.share * len(images)))]
        corrected = sorted(row for row in rows if masks[row].any())
        pictures = InMemory(images, self.labels, _mask_tensor(masks), corrected)
        if method.share < 1:
            settings = _settings("cnn:baseline", self.seed, None).data
            pictures.drawn, pictures.trust = annotate(
                pictures, corrected, DIGITS, settings, self.seed, torch.device("cpu")
            )
        return Examples.of(pictures, self.labels)

    def run(self, arm: str, settings: Settings) -> dict[str, float]:
        """Trains and tests one arm: `accuracy` and `worst_group` with the square of a random digit, accuracy `clean`,
        without one, and `seconds` of the training."""
        began = time.perf_counter()
        network = self._by_settings(arm, settings) if arm in BY_SETTINGS else self._by_method(arm, settings)
        seconds = time.perf_counter() - began
        given = {name: answers(network, images) for name, images in self.tests.items()}
        return {
            "accuracy": float((given["decoy"] == self.test_labels).mean()),
            "worst_group": worst_group(given["decoy"], self.test_labels, self.values),
            "clean": float((given["plain"] == self.test_labels).mean()),
            "seconds": seconds,
        }

    def _by_settings(self, arm: str, settings: Settings) -> nn.Module:
        problem, share = self.files, BY_SETTINGS[arm][1]
        samples = problem.train["confounded"]
        if share:
            rows = problem.chosen[: max(1, round(share * len(samples)))]
            samples = problem.corrected(rows, f"{share}.npz")
        output = problem.root / arm.replace(":", "-")
        baseline = None
        if share and settings.train.start != "scratch":
            baseline = problem.root / "abn-baseline/model.pt"
            if not baseline.is_file():  # its figures were kept, its weights were not
                self._by_settings("abn:baseline", _settings("abn:baseline", self.seed, settings.train.epochs))
        if settings.train.start == "champion":
            assert baseline, "a champion has masks to go on with"
            shutil.copyfile(baseline, problem.root / "models/start.pt")
        train(problem.root, samples, settings, output, lambda line: None, baseline=baseline)
        return load_model(output / "model.pt").network

    def _by_method(self, arm: str, settings: Settings) -> nn.Module:
        network, _, name = arm.partition(":")
        method = BY_METHOD[name]
        examples = self.examples(method)

        def make() -> nn.Module:
            torch.manual_seed(self.seed)
            plain = {"mlp": PlainMlp, "cnn": PlainCnn}.get(network)
            return plain(DIGITS) if plain else ABN(settings.model, DIGITS)

        if name == "jtt":
            return jtt(make, examples, settings)
        trained = make()
        fit(trained, examples, settings, method.objective())
        if name == "dfr":
            dfr(trained, examples, self.seed)
        return trained


def _mask_tensor(masks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(masks)[:, None].to(torch.uint8) * 255


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _settings(arm: str, seed: int, epochs: int | None) -> Settings:
    changes = BY_SETTINGS[arm][0] if arm in BY_SETTINGS else NOTHING
    network = arm.partition(":")[0]
    base = {"data.size": list(SIZE), "data.flip": False, "data.shift": 0, **SMALL_NETWORK}
    if network in LEARNING_RATES:
        base["train.learning_rate"] = LEARNING_RATES[network]
    return settings_with({**base, **changes, "train.seed": seed, "train.epochs": epochs or EPOCHS[network]})


def run_seed(
    path: str, pictures: int, seed: int, arms: Sequence[str], epochs: int | None, keep: Path | None
) -> dict[str, dict[str, float]]:
    """The figures of each arm for one seed. Only what `keep` does not hold already is trained; an arm whose loss was
    not finite has NaN."""
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        decoy: DecoyMnist | None = None
        for arm in arms:
            settings = _settings(arm, seed, epochs)
            kept = keep / f"{_digest(pictures, seed, arm, settings)}.json" if keep else None
            if kept and kept.is_file():
                figures[arm] = json.loads(kept.read_text())
            else:
                decoy = decoy or DecoyMnist(Path(folder), path, pictures, seed)
                try:
                    figures[arm] = decoy.run(arm, settings)
                except FloatingPointError as error:  # a loss that does not suit the network; the other arms go on
                    print(f"seed {seed}  {arm:18}  no figures: {error}", flush=True)
                    figures[arm] = dict.fromkeys((*FIGURES, "seconds"), float("nan"))
                if kept:
                    write_json(kept, figures[arm])
            words = "  ".join(f"{name} {figures[arm][name]:.3f}" for name in FIGURES)
            print(f"seed {seed}  {arm:18}  {words}  {figures[arm]['seconds']:.0f} s", flush=True)
    return figures


def _digest(pictures: int, seed: int, arm: str, settings: Settings) -> str:
    """Of a training, by all that it depends on but the code."""
    values = asdict(settings)
    if arm not in BY_SETTINGS:
        values["corrections"] = {}
    text = json.dumps([pictures, seed, arm, values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.public", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--path", default="", help="the folder of mnist_train.npz and mnist_test.npz")
    add("--train", type=int, default=60_000, help="training pictures (60000, all of them)")
    add("--epochs", type=int, help=f"of each training ({', '.join(f'{n} of {name}' for name, n in EPOCHS.items())})")
    add("--arms", default=",".join(DEFAULT_ARMS), help=f"of {', '.join(ARMS)}".replace("%", "%%"))
    add("--seeds", default="1", help="5: 0 to 4; 100-102; 3,7 (1)")
    add("--json", type=Path, help="file for the figures")
    add("--keep", type=Path, help="folder for the figures of single trainings")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The figures as a mapping, as they also go to the file `--json`. Raises ValueError for an unknown arm, too few
    pictures, or where MNIST is not found."""
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms names {unknown[0]!r}; known: {', '.join(ARMS)}")
    if options.train < DIGITS:
        raise ValueError(f"--train is {options.train}; take at least {DIGITS} pictures")
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    runs, seeds = [], seeds_of(options.seeds)
    for number, seed in enumerate(seeds, start=1):
        runs.append(run_seed(options.path, options.train, seed, arms, options.epochs, options.keep))
        result = {"train": options.train, "seeds": seeds[:number], "arms": summary(runs)}
        if options.json:
            write_json(options.json, result)
    return result


def print_published(rows: Sequence[tuple[str, float, float | None, str]] = PUBLISHED) -> None:
    """What others publish, to be read beside the table: other networks, and other splits of the same pictures."""
    print("\npublished by others (theirs, not run here): accuracy, worst class")
    for what, accuracy, worst, source in rows:
        print(f"{what:24}  {accuracy:.3f}  {'    -' if worst is None else f'{worst:.3f}'}  {source}")


def main() -> None:
    options = parse()
    try:
        result = run(options)
    except ValueError as error:
        sys.exit(f"benchmarks.public: {error}")
    columns: Mapping[str, Mapping[str, Any]] = result["arms"]
    print_table(f"{result['train']} pictures, mean of {len(result['seeds'])} seeds", FIGURES, columns)
    print_published()


if __name__ == "__main__":
    main()
