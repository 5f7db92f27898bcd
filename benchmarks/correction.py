"""What corrections are worth: `python -m benchmarks.correction --data digits --confound patch --corrections 30`.

Trains on pictures whose confound tells the class, with masks of a few of them, and tests where it tells nothing.
Every arm is a set of settings of abn's own training, or a published method (methods.py). Every figure is of the last
epoch. `--keep DIR` keeps the figures of each single training, so that the same one is never run twice and a killed
benchmark goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Int
from PIL import Image

from abn.config import make_section, read_params
from abn.data import DataConfig, Pictures
from abn.evaluate import measure
from abn.files import write_json
from abn.manifest import GOLD_MASKS, Sample, mask_sha256
from abn.model import ABN, LoadedModel, ModelConfig, load_model
from abn.predict import PredictConfig, predict
from abn.train import CorrectionsConfig, Settings, TrainConfig, train
from benchmarks.data import CONFOUNDS, Data, choose, confound, drawn_over, hasty, load
from benchmarks.methods import Examples, caipi, dfr, fit, group_dro, jtt
from flows import defaults
from flows.workspace import copy_atomically

PROJECT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Spec:
    """One problem: the data, what misleads, and who says what."""

    data: str
    path: str
    size: tuple[int, int]  # height, width in pixels
    train: int  # at most so many training pictures
    confound: str
    fraction: float  # of the classes carry the confound in training
    corrections: int
    faults: str  # of the masks: none or hasty


# What an arm changes in params.yaml. An empty mapping is what the project ships. Where masks teach nothing of the other
# pictures, those that have one are shown often.
OFTEN = {"corrections.share": 0.25, "train.start": "scratch"}
MAP_ALONE = {**OFTEN, "corrections.context_rate": 0.0, "corrections.propagate_rate": 0.0}
NOTHING = {"corrections.recipe": "none"}
ARMS: dict[str, dict[str, Any]] = {
    "control": NOTHING,
    "baseline-long": NOTHING,  # the control with twice the epochs: as many as where `default` goes on from it
    "paper": {**OFTEN, "corrections.recipe": "paper", "corrections.map_loss": "l2", "train.start": "champion"},
    "l2": {**MAP_ALONE, "corrections.map_loss": "l2"},
    "l1": {**MAP_ALONE, "corrections.map_loss": "l1"},
    "bce": {**MAP_ALONE, "corrections.map_loss": "bce"},
    "energy": {**MAP_ALONE, "corrections.map_loss": "energy"},
    "suppress-outside": {**MAP_ALONE, "corrections.map_loss": "suppress"},
    "rrr": {**MAP_ALONE, "corrections.map_loss": "rrr"},
    "context": {**OFTEN, "corrections.map_weight": 0.0, "corrections.propagate_rate": 0.0},
    "default": {},
    "anew": {"train.start": "scratch"},  # the default, from scratch on swapped backgrounds whatever the baseline does
    "jtt": NOTHING,  # this and the next three are published methods of benchmarks/methods.py
    "group-dro": NOTHING,
    "caipi": {},
    "dfr": {},
    "upper": NOTHING,  # and trained without the confound
    "upper_random": NOTHING,  # and trained with the confound at random: it has seen what it is tested on
}
NEEDED = ("control", "upper")  # every `recovered` hangs on them
METHODS = ("jtt", "group-dro", "caipi", "dfr")
FIGURES = ("random_confound", "clean", "swapped", "worst_class", "worst_group", "inside_mask")
SMALLEST_GROUP = 5  # test pictures; of fewer one alone is 0.2 or more of the accuracy, and they are left out
COLUMNS = (*FIGURES, "recovered")
# What each data set is trained with where the command says nothing: height and width, at most so many training
# pictures, and changes to params.yaml. Digits are learned from scratch; photographs are too few for that.
SMALL_NETWORK: dict[str, Any] = {"model.backbone": "cifar_resnet8"}
PRETRAINED: dict[str, Any] = {**defaults.PRETRAINED, "train.epochs": 8}  # as `abnloop init` has them
Defaults = tuple[tuple[int, int], int, dict[str, Any]]
BY_DATA: dict[str, Defaults] = {
    "digits": ((32, 32), 1000, {**SMALL_NETWORK, "data.flip": False}),
    "mnist": ((32, 32), 1000, {**SMALL_NETWORK, "data.flip": False}),
    "shapes": ((64, 64), 1000, PRETRAINED),
    "coffee_leaf": ((64, 128), 1000, PRETRAINED),
    "magnetic_tile": ((224, 224), 300, {**PRETRAINED, "train.learning_rate": 0.01, "train.epochs": 15}),
}
OTHER_DATA = ((64, 64), 1000, PRETRAINED)
SMALL = 64  # pixels; of smaller pictures of other data the pretrained network's map would have hardly a cell
# For benchmarks that train many times.
QUICK = {**BY_DATA, "digits": ((16, 16), 1000, {**BY_DATA["digits"][2], "train.epochs": 20})}
PREDICT = PredictConfig(batch_size=256, seed=0)


def settings_with(changes: Mapping[str, Any]) -> Settings:
    """params.yaml with `section.key` values laid over. Raises ValueError for a setting that does not exist."""
    params = read_params(PROJECT / "params.yaml")
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if section not in params:
            raise ValueError(f"{name} is not a setting; sections: {', '.join(params)}")
        params[section][key] = value
    return Settings(
        make_section(DataConfig, params["data"], "data"),
        make_section(ModelConfig, params["model"], "model"),
        make_section(TrainConfig, params["train"], "train"),
        make_section(CorrectionsConfig, params["corrections"], "corrections"),
    )


class Problem:
    """A `Spec` and a seed as files that abn trains on, below `root`."""

    def __init__(self, root: Path, spec: Spec, seed: int, kept_control: Path | None = None) -> None:
        """`kept_control` is where the weights of the control lie, or go once it has been trained."""
        self.root, self.kept_control = root, kept_control
        generator = np.random.default_rng([seed, 1])
        self.data, test = load(spec.data, Path(spec.path) if spec.path else None, spec.size, spec.train, seed)
        count = len(self.data.classes)
        self.classes = self.data.classes
        carriers = generator.permutation(count)[: max(1, round(spec.fraction * count))]
        codes = generator.integers(count, size=len(test))
        (root / "images").mkdir(parents=True)
        (root / "data").mkdir()
        (root / "models").mkdir()
        confounded = confound(self.data, spec.confound, self.data.labels, carriers)
        self.train = {"confounded": self._write("confounded", confounded), "plain": self._write("plain", self.data)}
        self.visible = confounded.masks
        self.drawn_over = drawn_over(confounded.images, self.data.images, spec.confound)
        tests = {"random_confound": confound(test, spec.confound, codes, carriers), "clean": test}
        self.test = {name: self._write(name, data, "test") for name, data in tests.items()}
        self.test_labels = test.labels
        # A class whose confound is not drawn has -1 in place of its value.
        values = np.where(np.isin(codes, carriers), codes, -1)
        self.test_values = values if test.backgrounds is None else test.backgrounds
        self.values = self.data.labels if self.data.backgrounds is None else self.data.backgrounds
        gold = {f"{name}{row:05d}": levels(mask) for name in tests for row, mask in enumerate(tests[name].masks)}
        np.savez(root / GOLD_MASKS, allow_pickle=False, **gold)
        self.spec, self.seed, self.carriers = spec, seed, carriers
        self.order = generator.permutation(len(self.data)).tolist()
        self.chosen = choose(self.data.labels, self.order)[: spec.corrections]

    def _write(self, name: str, data: Data, split: str = "train") -> list[Sample]:
        samples = []
        for row, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            sample = Sample(f"{name}{row:05d}", f"images/{name}{row:05d}.png", data.classes[label], split)
            Image.fromarray(image).save(self.root / sample.image, compress_level=1)
            samples.append(sample)
        return samples

    def at_random(self) -> list[Sample]:
        """The training samples with the confound at random; the other arms do without, so they are drawn when asked."""
        codes = np.random.default_rng([self.seed, 3]).integers(len(self.classes), size=len(self.data))
        return self._write("random", confound(self.data, self.spec.confound, codes, self.carriers))

    def evidence(self, row: int) -> np.ndarray:
        """What somebody who knows marks in a training picture, (height, width) bool: what is to be seen of the object,
        nothing where the confound hides it, and where there is no object all but the confound."""
        return self.visible[row] if self.data.masks[row].any() else ~self.drawn_over[row]

    def corrected(self, rows: Sequence[int], name: str) -> list[Sample]:
        """The confounded training samples, those at `rows` with a mask where there is anything to mark. The masks go
        into the file `name`."""
        masks = {}
        for row in rows:
            mask = self.evidence(row)
            if not mask.any():
                continue
            if self.spec.faults == "hasty" and self.data.masks[row].any():
                mask = hasty(mask, np.random.default_rng([row, 2]))
            masks[row] = levels(mask)
        return self.with_masks(masks, name)

    def with_masks(self, masks: Mapping[int, np.ndarray], name: str, confirmed: Collection[int] = ()) -> list[Sample]:
        """The confounded training samples, those with a row in `masks`, (height, width) uint8, with that; all but the
        `confirmed` were painted. The masks go into the file `name`."""
        samples = list(self.train["confounded"])
        for row, mask in masks.items():
            painted = row not in confirmed
            samples[row] = replace(samples[row], masks=name, sha256=mask_sha256(mask), painted=painted)
        named = {samples[row].id: mask for row, mask in masks.items()}
        np.savez(self.root / name, allow_pickle=False, **named)
        return samples

    def misclassified(self, model: LoadedModel) -> list[int]:
        """As many rows as there are corrections: those that the model gets wrong, topped up by those chosen anyway."""
        answers = predict(model, Pictures(self.root, self.train["confounded"], self.classes, model.size), PREDICT)
        wrong = np.flatnonzero(answers.probabilities.argmax(axis=1) != self.data.labels).tolist()
        known = set(wrong)
        first = [row for row in self.order if row in known]
        return (first + [row for row in self.chosen if row not in known])[: len(self.chosen)]

    def run(self, arm: str, settings: Settings) -> dict[str, float]:
        """Trains and tests one arm; its figures, and `seconds` of the training."""
        samples = self.train["confounded"]
        if arm == "upper":
            samples = self.train["plain"]
        elif arm == "upper_random":
            samples = self.at_random()
        elif arm == "paper":
            shutil.copyfile(self._control(settings), self.root / "models/start.pt")
            samples = self.corrected(self.misclassified(load_model(self.root / "models/start.pt")), "paper.npz")
        elif settings.corrections.recipe != "none":
            samples = self.corrected(self.chosen, f"{arm}.npz")
        goes_on = settings.corrections.recipe == "context" and settings.train.start == "baseline"
        goes_on = goes_on and arm not in METHODS
        baseline = self._control(settings) if goes_on else None
        began = time.perf_counter()
        if arm in METHODS:
            model = self._by_method(arm, samples, settings)
        else:
            train(self.root, samples, settings, self.root / arm, lambda line: None, baseline=baseline)
            model = load_model(self.root / arm / "model.pt")
            if arm == "control" and self.kept_control:
                copy_atomically(self.root / arm / "model.pt", self.kept_control)
        seconds = time.perf_counter() - began
        figures = {}
        for name, tested in self.test.items():
            predictions = predict(model, Pictures(self.root, tested, self.classes, model.size), PREDICT)
            figures[name] = measure(predictions, self.test_labels, np.arange(len(tested)))
            if name == "random_confound":
                answers = predictions.probabilities.argmax(axis=1)
        found = figures["random_confound"]
        return {
            "random_confound": found["balanced_accuracy"],
            "clean": figures["clean"]["balanced_accuracy"],
            "swapped": figures["clean"].get("accuracy_in_other_context", float("nan")),
            "worst_class": found["worst_class_accuracy"],
            "worst_group": worst_group(answers, self.test_labels, self.test_values),
            "inside_mask": found["attention_inside_mask"],
            "mask_share": found["mask_share"],
            "seconds": seconds,
        }

    def _control(self, settings: Settings) -> Path:
        """The weights of the control with otherwise these settings; where only its figures were kept it is trained."""
        if self.kept_control and self.kept_control.is_file():
            return self.kept_control
        if not (self.root / "control/model.pt").is_file():
            plain = replace(settings, corrections=replace(settings.corrections, recipe="none"))
            self.run("control", replace(plain, train=replace(settings.train, start="scratch")))
        return self.root / "control/model.pt"

    def _by_method(self, arm: str, samples: list[Sample], settings: Settings) -> LoadedModel:
        """An attention branch network trained by a method of benchmarks/methods.py."""
        groups, count = groups_of(self.data.labels, self.values)
        examples = Examples.of(Pictures(self.root, samples, self.classes, settings.data.size), groups)

        def make() -> ABN:
            torch.manual_seed(settings.train.seed)
            return ABN(settings.model, len(self.classes))

        if arm == "dfr":
            model = load_model(self._control(settings))
            dfr(model.network, examples, settings.train.seed)
            return model
        if arm == "jtt":
            network = jtt(make, examples, settings)
        else:
            network = make()
            fit(network, examples, settings, caipi if arm == "caipi" else group_dro(count))
        assert isinstance(network, ABN)
        return LoadedModel(network.cpu(), self.classes, settings.data.size)


def groups_of(labels: Int[np.ndarray, "n"], values: Int[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], int]:
    """The group of each picture, class x value of the confound, counted from 0, and how many groups there are."""
    found, groups = np.unique(np.stack([labels, values]), axis=1, return_inverse=True)
    return groups, found.shape[1]


def worst_group(answers: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], values: Int[np.ndarray, "n"]) -> float:
    """The lowest accuracy of a group, class x value of the confound, 0..1, as Sagawa et al., ICLR 2020. Groups of fewer
    than `SMALLEST_GROUP` pictures are left out; NaN where none is left."""
    groups, count = groups_of(labels, values)
    accuracies = [float((answers == labels)[groups == one].mean()) for one in range(count)]
    sizes = np.bincount(groups, minlength=count)
    return min((a for a, size in zip(accuracies, sizes, strict=True) if size >= SMALLEST_GROUP), default=float("nan"))


def levels(mask: np.ndarray) -> np.ndarray:
    """A mask as it is written: uint8, 0 or 255."""
    return np.where(mask, 255, 0).astype(np.uint8)


def run_seed(
    spec: Spec, seed: int, arms: Sequence[str], changes: Mapping[str, Any], keep: Path | None
) -> dict[str, dict[str, float]]:
    """The figures of each arm for one seed, each with `recovered`; control and upper always run, the others hang on
    them. Only what `keep` does not hold already is trained. An arm whose loss was not finite has NaN."""
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem: Problem | None = None
        for arm in ["control", "upper", *(arm for arm in arms if arm not in NEEDED)]:
            if arm == "upper" and spec.confound == "none":  # the same pictures
                figures[arm] = dict(figures["control"])
                continue
            settings = settings_with({"data.size": list(spec.size), **changes, **ARMS[arm], "train.seed": seed})
            if arm == "baseline-long":
                settings = replace(settings, train=replace(settings.train, epochs=2 * settings.train.epochs))
            kept = keep / f"{_name(spec, seed, arm, settings)}.json" if keep else None
            if kept and kept.is_file():
                figures[arm] = {**dict.fromkeys(FIGURES, float("nan")), **json.loads(kept.read_text())}
            else:
                problem = problem or Problem(Path(folder), spec, seed, _kept_control(spec, seed, changes, keep))
                try:
                    figures[arm] = problem.run(arm, settings)
                except FloatingPointError as error:  # a loss that does not suit the data; the other arms go on
                    print(f"seed {seed}  {arm:10}  no figures: {error}", flush=True)
                    figures[arm] = dict.fromkeys((*FIGURES, "mask_share", "seconds"), float("nan"))
                if kept:
                    write_json(kept, figures[arm])
            print(f"seed {seed}  {arm:10}  {in_words(figures[arm])}", flush=True)
    low, high = (figures[arm]["random_confound"] for arm in NEEDED)
    for found in figures.values():
        # Where the confound costs nothing there is nothing to recover.
        found["recovered"] = (found["random_confound"] - low) / (high - low) if high - low > 0.02 else float("nan")
    return figures


def _kept_control(spec: Spec, seed: int, changes: Mapping[str, Any], keep: Path | None) -> Path | None:
    """Where `keep` has the weights of the control."""
    settings = settings_with({"data.size": list(spec.size), **changes, **ARMS["control"], "train.seed": seed})
    return keep / f"{_name(spec, seed, 'control', settings)}.pt" if keep else None


def _name(spec: Spec, seed: int, arm: str, settings: Settings) -> str:
    """Of a training, by all that it depends on but the code: control and the uppers do not hang on the corrections."""
    problem = asdict(spec)
    values = asdict(settings)
    if values["corrections"]["recipe"] == "none":
        del problem["corrections"], problem["faults"], values["train"]["start"]
        values["corrections"] = {}
    if arm.startswith("upper"):
        values[arm] = True
    which = arm if arm in METHODS else arm == "paper"
    digest = hashlib.sha256(json.dumps([problem, seed, values, which], sort_keys=True).encode())
    return digest.hexdigest()[:20]


def in_words(figures: Mapping[str, float]) -> str:
    """Of one training, in a line."""
    return "  ".join(f"{name} {figures[name]:.3f}" for name in FIGURES) + f"  {figures['seconds']:.0f} s"


def print_table(corner: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """What `summary` gives, a row of means and deviations each."""
    wide = max(map(len, [corner, *rows]))
    print(f"\n{corner:{wide}}", *columns, sep="  ")
    for name, figures in rows.items():
        cells = [f"{_cell(figures[column])} ±{_cell(figures['std'][column])}".rjust(len(column)) for column in columns]
        print(f"{name:{wide}}", *cells, sep="  ")


def _cell(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean over the seeds of each arm's figures, their standard deviations under `std`."""
    arms: dict[str, dict[str, Any]] = {}
    for arm in runs[0]:
        columns = {name: np.array([run[arm][name] for run in runs]) for name in runs[0][arm]}
        arms[arm] = {name: _finite(values.mean()) for name, values in columns.items()}
        arms[arm]["std"] = {name: _finite(values.std()) for name, values in columns.items() if name != "seconds"}
    return arms


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None


def seeds_of(text: str) -> list[int]:
    """`5` is 0 to 4, `100-102` is 100, 101 and 102, `3,7` is itself (`3,` is 3 alone). Raises ValueError for none."""
    first, dash, last = text.partition("-")
    if "," in text:
        seeds = [int(part) for part in text.split(",") if part]
    else:
        seeds = list(range(int(first), int(last) + 1)) if dash else list(range(int(text)))
    if not seeds:
        raise ValueError(f"--seeds {text!r} names no seed; 5 is 0 to 4, 3, is 3 alone")
    return seeds


def problem_parser(name: str, description: str | None, fraction: float, seeds: int) -> argparse.ArgumentParser:
    """The options that name a problem; `problem_of` reads them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    add = parser.add_argument
    add("--data", default="digits", help=f"{', '.join(BY_DATA)}, or a folder with an index.csv")
    add("--path", default="", help="where it lies: its folder, or the folder above")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels that the network sees")
    add("--train", type=int, help="at most so many training pictures")
    add("--epochs", type=int, help="of each training; this and the two before are by the data set")
    add("--recipe", type=Path, help="a file of recipes/, in place of the settings by the data set")
    add("--confound", choices=list(CONFOUNDS), default="patch")
    add("--fraction", type=float, default=fraction, help=f"of the classes carry the confound in training ({fraction})")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="in params.yaml; an arm's come after")
    add("--seeds", default=str(seeds), help=f"5: 0 to 4; 100-102; 3,7 ({seeds})")
    add("--json", type=Path, help="file for the figures")
    return parser


def add_masks(parser: argparse.ArgumentParser) -> None:
    """The options that say which masks people give."""
    parser.add_argument("--corrections", type=int, default=30, help="pictures that get a mask (30)")
    parser.add_argument("--faults", choices=["none", "hasty"], default="none", help="of the masks")


def problem_of(
    options: argparse.Namespace,
    corrections: int = 0,
    faults: str = "none",
    by_data: Mapping[str, Defaults] = BY_DATA,
) -> tuple[Spec, dict[str, Any]]:
    """The problem, and the changes to params.yaml that it is trained with. Raises ValueError for a fraction that is
    none."""
    if not 0 < options.fraction <= 1:
        raise ValueError(f"--fraction is {options.fraction}; it must be above 0 and at most 1")
    name = Path(options.data).name
    size, train, changes = by_data.get(name, OTHER_DATA)
    if options.recipe:
        sections = read_params(options.recipe).items()
        changes = {f"{section}.{key}": value for section, values in sections for key, value in values.items()}
        size = changes.pop("data.size", size)
    size = tuple(options.size or size)
    if not options.recipe and name not in by_data and max(size) < SMALL:
        changes = SMALL_NETWORK
    changes = {"data.flip": True, **changes}
    if options.epochs:
        changes["train.epochs"] = options.epochs
    for assignment in options.set:
        name, _, value = assignment.partition("=")
        changes[name] = yaml.safe_load(value)
    spec = Spec(
        options.data,
        options.path,
        size,
        options.train or train,
        options.confound,
        options.fraction,
        corrections,
        faults,
    )
    return spec, changes


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = problem_parser("correction", __doc__, fraction=1.0, seeds=5)
    add_masks(parser)
    add = parser.add_argument
    add("--arms", default="paper,l2,context,default", help=f"of {', '.join(ARMS)}")
    add("--keep", type=Path, help="folder for the figures of single trainings")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The figures as a mapping, as they also go to the file `--json`; those of an arm whose loss was not finite are
    None. Raises ValueError for an unknown arm, setting or data set."""
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"--arms names {unknown[0]!r}; known: {', '.join(ARMS)}")
    spec, changes = problem_of(options, options.corrections, options.faults)
    seeds = seeds_of(options.seeds)
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    runs = []
    for number, seed in enumerate(seeds, start=1):
        runs.append(run_seed(spec, seed, arms, changes, options.keep))
        settings = {**asdict(spec), "seeds": seeds[:number], "changes": changes}
        result = {"settings": settings, "arms": summary(runs)}
        if options.json:  # after each seed, so that what is stopped has told what it knew
            write_json(options.json, result)
    return result


def main() -> None:
    options = parse()
    try:
        result = run(options)
    except ValueError as error:
        sys.exit(f"benchmarks.correction: {error}")
    print_table(f"mean of {len(result['settings']['seeds'])} seeds", COLUMNS, result["arms"])
    print(f"attention inside the mask would be {_cell(result['arms']['control']['mask_share'])} by chance")


if __name__ == "__main__":
    main()
