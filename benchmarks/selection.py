"""What a labeler's minute is worth by strategy: `python -m benchmarks.selection --fraction 0.2 --minutes 4 --rounds 3`.

Every strategy starts from the same network, trained without corrections where a confound tells some classes. In each
round it spends a budget of minutes, and the network is trained anew with all that was said. Labelers are those of
labeling/simulator.py without their faults: a map that agrees with the object (IoU 0.6) is called fine in 6 seconds,
and becomes the mask; any other is painted in 25. Where there is no object the whole picture is the evidence, which is
said in 5 seconds, or all but the confound, which is painted. The accuracy is of the test with the confound drawn at
random, last epoch, the mean of the classes' recalls. `--confound none` asks whether a strategy costs anything where
nothing misleads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abn.attention import iou
from abn.data import Pictures
from abn.early import read_early_confidence
from abn.evaluate import measure
from abn.files import replacing, write_json
from abn.manifest import Sample
from abn.model import load_model, resize_map
from abn.predict import predict
from abn.predictions import Predictions
from abn.selection import STRATEGIES, SelectionConfig, Told, select, told_by
from abn.train import train
from benchmarks.correction import (
    NOTHING,
    PREDICT,
    QUICK,
    Problem,
    Spec,
    levels,
    problem_of,
    problem_parser,
    seeds_of,
    settings_with,
    worst_group,
)
from labeling.simulator import GOOD_ENOUGH_IOU, SECONDS

MINUTES = {verdict: seconds / 60 for verdict, seconds in SECONDS.items()}
MINUTES["all_but_map"] = MINUTES["map_fixed"]  # what is no evidence is painted


class Labelers:
    """Who know the objects. Their `verdicts`, and the `masks`, uint8 0 or 255, that come with them grow from round to
    round, by row of the training pictures; `minutes` add up."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.verdicts: dict[int, str] = {}
        self.masks: dict[int, np.ndarray] = {}
        self.minutes = 0.0

    def answer(self, rows: Sequence[int], predictions: Predictions) -> None:
        size = self.problem.visible.shape[1:]
        for row in rows:
            shown = resize_map(torch.from_numpy(predictions.maps[row])[None, None], size)[0, 0].numpy() > 0.5
            known = self.problem.evidence(row)
            self.verdicts[row] = verdict = self._verdict(row, shown, known)
            self.minutes += MINUTES[verdict]
            if (mask := shown if verdict == "map_ok" else known).any():
                self.masks[row] = levels(mask)

    def _verdict(self, row: int, shown: np.ndarray, known: np.ndarray) -> str:
        if not self.problem.data.masks[row].any():
            return "whole_image" if known.all() else "all_but_map"
        fine = iou(shown[None].astype(float), known[None].astype(float))[0] >= GOOD_ENOUGH_IOU
        return "map_ok" if fine else "map_fixed"

    def told(self) -> Told:
        verdicts = [self.verdicts.get(row) for row in range(len(self.problem.data))]
        return told_by(verdicts, MINUTES["map_fixed"], MINUTES["map_ok"])

    def samples(self, file: str) -> list[Sample]:
        """The training samples with the masks so far, which are written to `file`."""
        fine = [row for row, verdict in self.verdicts.items() if verdict == "map_ok"]
        return self.problem.with_masks(self.masks, file, fine)


class Learner:
    """A problem on disk, and trainings on it."""

    def __init__(self, root: Path, spec: Spec, seed: int, changes: Mapping[str, Any]) -> None:
        self.problem, self.seed = Problem(root, spec, seed), seed
        self.changes = {"data.size": list(spec.size), **changes, "train.seed": seed}

    def learn(self, samples: list[Sample], name: str, **changes: Any) -> tuple[Predictions, dict[str, float]]:
        """Trains; the predictions of the training pictures, and `accuracy` and `worst_group` of the test with random
        confound."""
        problem, settings = self.problem, settings_with({**self.changes, **changes})
        output = problem.root / name
        train(problem.root, samples, settings, output, lambda line: None)
        model, early = load_model(output / "model.pt"), read_early_confidence(output / "early.npz")
        asked, tested = (
            Pictures(problem.root, rows, problem.classes, model.size)
            for rows in (problem.train["confounded"], problem.test["random_confound"])
        )
        test = predict(model, tested, PREDICT)
        accuracy = measure(test, problem.test_labels, np.arange(len(tested)))["balanced_accuracy"]
        worst = worst_group(test.probabilities.argmax(axis=1), problem.test_labels, problem.test_values)
        return predict(model, asked, PREDICT, early=early), {"accuracy": accuracy, "worst_group": worst}


def run_seed(
    spec: Spec, seed: int, strategies: Sequence[str], minutes: float, rounds: int, changes: Mapping[str, Any]
) -> dict[str, list[dict[str, float]]]:
    """Of each strategy a point a round: minutes and pictures spent so far, and the accuracy after learning from it, on
    average and of the worst group (`benchmarks.correction.worst_group`)."""
    curves: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(Path(folder), spec, seed, changes)
        start = learner.learn(learner.problem.train["confounded"], "control", **NOTHING)
        for strategy in strategies:
            labelers, (predictions, figures) = Labelers(learner.problem), start
            curves[strategy] = [{"minutes": 0.0, "pictures": 0, **figures}]
            for number in range(rounds):
                told = labelers.told()
                left = np.flatnonzero(~told.answered).tolist()
                if not left:  # nobody can be asked any more: the curve ends
                    curves[strategy].append(curves[strategy][-1])
                    continue
                config = SelectionConfig(strategy, len(left), minutes, 0.1, seed * 100 + number)  # type: ignore[arg-type]
                picks = select(predictions, learner.problem.data.labels, left, learner.problem.classes, config, told)
                asked = {pick.sample for pick in picks}
                labelers.answer([row for row in left if str(predictions.samples[row]) in asked], predictions)
                predictions, figures = learner.learn(labelers.samples(f"{strategy}.npz"), f"{strategy}{number}")
                point = {"minutes": labelers.minutes, "pictures": len(labelers.masks), **figures}
                curves[strategy].append(point)
                words = f"{point['minutes']:.1f} min  {point['pictures']} pictures  accuracy {point['accuracy']:.3f}"
                words += f"  worst group {point['worst_group']:.3f}"
                print(f"seed {seed}  {strategy:14} {words}", flush=True)
    return curves


def summary(runs: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, list[dict[str, float]]]:
    """Mean over the seeds of each point, the standard deviation of its accuracy as `std`."""
    return {
        strategy: [
            {name: float(np.mean([run[strategy][i][name] for run in runs])) for name in point}
            | {"std": float(np.std([run[strategy][i]["accuracy"] for run in runs]))}
            for i, point in enumerate(points)
        ]
        for strategy, points in runs[0].items()
    }


def draw(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    for strategy, points in curves.items():
        columns = {name: np.array([point[name] for point in points]) for name in ("minutes", "accuracy", "std")}
        error = 1 - columns["accuracy"]
        axes.errorbar(columns["minutes"], error, columns["std"], label=strategy, marker="o", capsize=3)
    axes.set_yscale("log")  # else the first round's leap hides all that follows
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("minutes of labelers")
    axes.set_ylabel("error, random confound")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = problem_parser("selection", __doc__, fraction=0.2, seeds=3)
    add = parser.add_argument
    add("--minutes", type=float, default=2.0, help="of labelers a round, by what each picture is expected to take (2)")
    add("--rounds", type=int, default=3)
    add("--strategies", default=",".join(STRATEGIES), help="of " + ", ".join(STRATEGIES))
    add("--plot", type=Path, help="PNG of the error against minutes")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Raises ValueError for an unknown strategy or data set."""
    strategies = options.strategies.split(",")
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        raise ValueError(f"--strategies names {unknown[0]!r}; known: {', '.join(STRATEGIES)}")
    spec, changes = problem_of(options, by_data=QUICK)
    runs = []
    for seed in seeds_of(options.seeds):
        runs.append(run_seed(spec, seed, strategies, options.minutes, options.rounds, changes))
        curves = summary(runs)
        if options.plot:
            draw(options.plot, curves)
        if options.json:
            write_json(options.json, {"seeds": len(runs), "curves": curves})
    return curves


def main() -> None:
    try:
        curves = run(parse())
    except ValueError as error:
        sys.exit(f"benchmarks.selection: {error}")
    for strategy, points in curves.items():
        cells = [
            f"{point['minutes']:5.1f} min {point['accuracy']:.3f} ± {point['std']:.3f} worst {point['worst_group']:.3f}"
            for point in points
        ]
        print(f"{strategy:14}", *cells, sep="  ")


if __name__ == "__main__":
    main()
