"""How well scores find the unreasonable maps: `python -m benchmarks.attention --confound patch --fraction 0.2`.

Trains where a confound tells some classes, without any correction, and ranks the maps of the training pictures.

A map is truly unreasonable if its picture carries the confound and one of two holds: the map is hotter on the confound
than on the object (mean over the pixels of each, the object by its gold mask), or the answer rests on the confound: it
moves by more than 0.5 (total variation) when the confound is taken out of the picture. No score knows mask or twin.

For each score: ROC AUC, and the share of unreasonable maps among as many as the budget asks about. `after verdicts`
asks about one batch of the default strategy, answers truly, and ranks the others. With `--picture FILE`: the ABN map
beside Grad-CAM and the gradient times the input on the same pictures; their deletion and insertion are printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from abn.attention import (
    Curves,
    atypicality,
    deletion_and_insertion,
    disagreement,
    entropy,
    equivariance_loss,
    gini,
)
from abn.data import Pictures
from abn.doubt import Doubt
from abn.early import read_early_confidence
from abn.files import replacing, write_json
from abn.model import ABN, LoadedModel, load_model, resize_map
from abn.predict import predict
from abn.predictions import Predictions
from abn.selection import SelectionConfig, select
from abn.train import train
from benchmarks.correction import (
    NOTHING,
    PREDICT,
    QUICK,
    Problem,
    Spec,
    problem_of,
    problem_parser,
    seeds_of,
    settings_with,
)

SHOWN = 8  # pictures of the figure
EXPLAINED = 200  # pictures whose deletion and insertion are measured


@dataclass(frozen=True)
class Trained:
    """A network that could learn the confound, and what is known of the maps of its training pictures."""

    model: LoadedModel
    predictions: Predictions
    images: Float[Tensor, "n 3 h w"]
    labels: np.ndarray
    carries: Bool[np.ndarray, "n"]  # the confound
    wrong: Bool[np.ndarray, "n"]  # the map is truly unreasonable


def train_confounded(problem: Problem, settings_changes: Mapping[str, Any], seed: int) -> Trained:
    settings = settings_with({**settings_changes, **NOTHING, "train.seed": seed})
    train(problem.root, problem.train["confounded"], settings, problem.root / "control", lambda line: None)
    model = load_model(problem.root / "control/model.pt")
    pictures, plain = (
        Pictures(problem.root, problem.train[name], problem.classes, model.size) for name in ("confounded", "plain")
    )
    found = predict(model, pictures, PREDICT, early=read_early_confidence(problem.root / "control/early.npz"))
    images, twins = (_tensor(one) for one in (pictures, plain))
    there = (images != twins).any(dim=1).numpy()
    twin_answers = predict(model, plain, PREDICT).probabilities
    maps = resize_map(torch.from_numpy(found.maps)[:, None], model.size)[:, 0].numpy()
    hotter = _mean_on(maps, there) > _mean_on(maps, problem.visible)
    rests = np.abs(found.probabilities - twin_answers).sum(axis=1) / 2 > 0.5
    carries = np.asarray(there.any(axis=(1, 2)))
    return Trained(model, found, images, problem.data.labels, carries, carries & (hotter | rests))


def _tensor(pictures: Pictures) -> Float[Tensor, "n 3 h w"]:
    return pictures[list(range(len(pictures)))].images.float() / 255


def _mean_on(maps: Float[np.ndarray, "n h w"], where: Bool[np.ndarray, "n h w"]) -> Float[np.ndarray, "n"]:
    return (maps * where).sum(axis=(1, 2)) / np.maximum(where.sum(axis=(1, 2)), 1)


# --- ranking


def scores_of(trained: Trained) -> dict[str, Float[np.ndarray, "n"]]:
    """Each score alone, higher is more suspicious, and what is shipped as `suspicion`."""
    found = trained.predictions
    explained = explain_by(trained.model.network, trained.images, found.maps, steps=8)
    doubt = Doubt(found)
    return {
        "corner reliance": found.corner_reliance,
        "early confidence": doubt.early_rank(found),
        "disagreement": disagreement(found.probabilities, found.attention_probabilities),
        "equivariance": equivariance(trained.model.network, trained.images, found.maps),
        "concentration (1 - entropy)": 1 - entropy(found.maps),
        "concentration (gini)": gini(found.maps),
        "atypicality in the class": atypicality(found.maps, found.probabilities.argmax(axis=1)),
        "deletion": explained.deletion,
        "insertion": -explained.insertion,
        "confidence": found.probabilities.max(axis=1),
        "suspicion": doubt.suspicion(found),
    }


@torch.inference_mode()
def equivariance(
    network: ABN, images: Float[Tensor, "n 3 h w"], maps: Float[np.ndarray, "n i j"]
) -> Float[np.ndarray, "n"]:
    """`equivariance_loss` of each map, its picture mirrored and moved by a cell of the map."""
    pixels = images.shape[-1] // maps.shape[-1]
    moved = [network(mirrored_and_moved(part, pixels)).attention_map[:, 0] for part in images.split(256)]
    return equivariance_loss(maps, torch.cat(moved).numpy(), shift=1)


def mirrored_and_moved(images: Float[Tensor, "b 3 h w"], pixels: int) -> Float[Tensor, "b 3 h w"]:
    """Mirrored left and right, then moved down and right; what moves in from outside repeats the edge."""
    height, width = images.shape[-2:]
    return F.pad(images.flip(-1), (pixels, 0, pixels, 0), mode="replicate")[..., :height, :width]


def after_verdicts(trained: Trained, classes: list[str], budget: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """P(unreasonable) after true verdicts on one batch of the default strategy, and which samples were not asked."""
    config = SelectionConfig("benefit", budget, 0.0, 0.1, seed)
    picks = select(trained.predictions, trained.labels, range(len(trained.labels)), classes, config)
    found = trained.predictions
    asked = np.isin(found.samples, [pick.sample for pick in picks])
    doubt = Doubt(found, found[np.flatnonzero(asked)], trained.wrong[asked].astype(float))
    return doubt.unreasonable(found, doubt.suspicion(found)), ~asked


def measure(score: np.ndarray, wrong: np.ndarray, budget: int) -> dict[str, float]:
    best = np.argsort(-score, kind="stable")[:budget]
    return {"auc": float(roc_auc_score(wrong, score)), "precision": float(wrong[best].mean())}


# --- explanations beside each other


def grad_cam(network: ABN, images: Float[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b i j"]:
    """ReLU of the last stage's channels weighted by the mean gradient of the answer's logit (Selvaraju et al., ICCV
    2017), each map divided by its maximum."""
    seen: list[Tensor] = []
    hook = network.stage.register_forward_hook(lambda module, given, output: seen.append(output))
    try:
        top = network(images).logits.max(dim=1).values.sum()
    finally:
        hook.remove()
    (gradients,) = torch.autograd.grad(top, seen[0])
    return _by_maximum((gradients.mean(dim=(2, 3), keepdim=True) * seen[0]).sum(dim=1).clamp(min=0))


def gradient_times_input(network: ABN, images: Float[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b h w"]:
    """Sum over the channels of |x d logit / dx| (Shrikumar et al., 2016), each map divided by its maximum."""
    given = images.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(network(given).logits.max(dim=1).values.sum(), given)
    return _by_maximum((gradients * images).abs().sum(dim=1))


def abn_map(network: ABN, images: Float[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b i j"]:
    with torch.inference_mode():
        return network(images).attention_map[:, 0].numpy()


def random_map(network: ABN, images: Float[Tensor, "b 3 h w"]) -> Float[np.ndarray, "b i j"]:
    """What any explanation should beat."""
    return np.random.default_rng(0).random((len(images), 8, 8)).astype(np.float32)


EXPLANATIONS: dict[str, Callable[[ABN, Tensor], np.ndarray]] = {
    "ABN": abn_map,
    "Grad-CAM": grad_cam,
    "gradient x input": gradient_times_input,
    "random": random_map,
}


def _by_maximum(maps: Float[Tensor, "b h w"]) -> Float[np.ndarray, "b h w"]:
    return (maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).detach().numpy()


def explain_by(
    network: ABN, images: Float[Tensor, "b 3 h w"], maps: Float[np.ndarray, "b i j"], steps: int = 16
) -> Curves:
    """Deletion towards, and insertion into, the blurred picture (sigma 1/8 of its shorter side)."""

    @torch.inference_mode()
    def answer(pictures: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(pictures)).logits.softmax(dim=1).numpy()

    sigma = min(images.shape[-2:]) / 8
    blurred = ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma))
    large = resize_map(torch.from_numpy(maps)[:, None].float(), images.shape[-2:])[:, 0].numpy()
    return deletion_and_insertion(answer, images.numpy(), large, blurred, steps)


def draw(path: Path, trained: Trained) -> None:
    """Pictures with the confound above, without below; the explanations side by side."""
    from matplotlib.figure import Figure

    rows = [*np.flatnonzero(trained.carries)[: SHOWN // 2], *np.flatnonzero(~trained.carries)[: SHOWN // 2]]
    images = trained.images[torch.tensor(rows)]
    names = [name for name in EXPLANATIONS if name != "random"]
    maps = {name: EXPLANATIONS[name](trained.model.network, images) for name in names}
    figure = Figure(figsize=(1.3 * (len(names) + 1), 1.35 * len(rows)), layout="tight")
    axes = figure.subplots(len(rows), len(names) + 1)
    for line, row in enumerate(rows):
        picture = images[line].permute(1, 2, 0).numpy()
        axes[line, 0].imshow(picture)
        axes[line, 0].set_ylabel(f"{trained.model.classes[trained.labels[row]]}", rotation=0, labelpad=10)
        for column, name in enumerate(names, start=1):
            large = resize_map(torch.from_numpy(maps[name][line])[None, None], picture.shape[:2])[0, 0]
            axes[line, column].imshow(picture)
            axes[line, column].imshow(large.numpy(), cmap="jet", alpha=0.6, vmin=0, vmax=1)
    for axis, name in zip(axes[0], ["picture", *names], strict=True):
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


# --- all of it


def run_seed(spec: Spec, seed: int, changes: Mapping[str, Any], budget: int, picture: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(Path(folder), spec, seed)
        trained = train_confounded(problem, {"data.size": list(spec.size), **changes}, seed)
        figures = {name: measure(score, trained.wrong, budget) for name, score in scores_of(trained).items()}
        score, rest = after_verdicts(trained, problem.classes, budget, seed)
        figures["after verdicts"] = measure(score[rest], trained.wrong[rest], budget)
        some = trained.images[torch.randperm(len(trained.images), generator=torch.Generator().manual_seed(seed))][
            :EXPLAINED
        ]
        curves = {
            name: explain_by(trained.model.network, some, make(trained.model.network, some))
            for name, make in EXPLANATIONS.items()
        }
        if picture:
            draw(picture, trained)
    explanations = {
        name: {"deletion": float(curve.deletion.mean()), "insertion": float(curve.insertion.mean())}
        for name, curve in curves.items()
    }
    share = {"wrong": {"share": float(trained.wrong.mean()), "carriers": float(trained.carries.mean())}}
    return {"scores": figures, "explanations": explanations, "maps": share}


def summary(runs: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every figure."""
    return {
        part: {
            name: {
                figure: {
                    "mean": float(np.mean([run[part][name][figure] for run in runs])),
                    "std": float(np.std([run[part][name][figure] for run in runs])),
                }
                for figure in figures
            }
            for name, figures in table.items()
        }
        for part, table in runs[0].items()
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = problem_parser("attention", __doc__, fraction=0.2, seeds=5)
    add = parser.add_argument
    add("--budget", type=int, default=30, help="maps that are asked about (30)")
    add("--picture", type=Path, help="PNG of the explanations side by side, of the last seed")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    spec, changes = problem_of(options, by_data=QUICK)
    runs = []
    for seed in seeds_of(options.seeds):
        runs.append(run_seed(spec, seed, changes, options.budget, options.picture))
        found = runs[-1]["scores"]
        words = "  ".join(f"{name} {found[name]['auc']:.3f}" for name in ("suspicion", "after verdicts"))
        print(f"seed {seed}  {words}  of {runs[-1]['maps']['wrong']['share']:.2f} unreasonable maps", flush=True)
    return summary(runs)


def main() -> None:
    options = parse()
    try:
        result = run(options)
    except ValueError as error:
        sys.exit(f"benchmarks.attention: {error}")
    for part in ("scores", "explanations"):
        columns = list(next(iter(result[part].values())))
        print(f"\n{'mean ± std':28}", *(f"{column:>15}" for column in columns))
        for name, figures in result[part].items():
            print(f"{name:28}", *(f"{figures[c]['mean']:.3f} ± {figures[c]['std']:.3f}".rjust(15) for c in columns))
    print(f"unreasonable maps: {result['maps']['wrong']['share']['mean']:.3f} of the training pictures")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
