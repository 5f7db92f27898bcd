"""What choosing from a large pool costs: `python -m benchmarks.pool --samples 1000000`.

Writes a workspace of synthetic predictions, some of them answered, and runs the stage on it as the loop does, once a
strategy, in a process of its own: its peak of resident memory, and its seconds. No picture is written, the stage reads
none. The maps are, so that reading them would show. `--parts 10000,3000` asks instead how well the maps of 30 000
samples are doubted by neighbours in a random part of them: the signals of one cluster in eleven are louder.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from sklearn.metrics import roc_auc_score

from abn.doubt import Doubt
from abn.files import write_json
from abn.manifest import CORRECTION_COLUMNS, MANIFEST_COLUMNS
from abn.predict import SHARD
from abn.predictions import Predictions, write_shard
from abn.selection import STRATEGIES
from flows.ingest import change_settings

PROJECT = Path(__file__).parent.parent
CLASSES, MAP = 10, 8  # how many; cells along a side
LIMIT = 2000  # megabytes
DOUBTED = 30_000  # samples in all
# The kernel's own record, which a new process does not inherit as it does that of `resource`. Linux only.
STAGE = """
from abn.selection import main
main()
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--answered", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="names, separated by commas")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    parser.add_argument("--parts", help="sizes, separated by commas")
    options = parser.parse_args(arguments)
    if options.parts:
        for part in map(int, options.parts.split(",")):
            print(f"{part:6} of {DOUBTED}  ROC AUC {doubt_by(part, options.dimensions):.3f}", flush=True)
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pool(root, options.samples, options.dimensions, options.answered)
        for strategy in options.strategies.split(","):
            change_settings(root / "params.yaml", {"selection.strategy": strategy, "selection.budget": options.budget})
            figures[strategy] = choose(root)
            print("{:14} {megabytes:6.0f} MB {seconds:6.0f} s".format(strategy, **figures[strategy]), flush=True)
    if options.json:
        write_json(options.json, {"samples": options.samples, "strategies": figures})
    if too_much := [name for name, found in figures.items() if found["megabytes"] > LIMIT]:
        sys.exit(f"more than {LIMIT} MB: {', '.join(too_much)}")


def choose(root: Path) -> dict[str, float]:
    """Runs the stage in the workspace."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    stage = subprocess.run([sys.executable, "-c", STAGE], cwd=root, env=environment, check=True, stdout=subprocess.PIPE)
    return {"megabytes": int(stage.stdout) * 1024 / 1e6, "seconds": time.perf_counter() - began}


def doubt_by(part: int, dimensions: int) -> float:
    """ROC AUC of the suspicion of 5000 samples whose neighbours are in `part` of 30 000."""
    rng = np.random.default_rng(0)
    centres = _centres(dimensions, rng)
    clusters = rng.integers(len(centres), size=DOUBTED)
    table = _shard([f"{row:016x}" for row in range(DOUBTED)], centres, clusters, rng)
    order = rng.permutation(DOUBTED)
    asked = order[-5000:]
    return float(roc_auc_score(clusters[asked] % 11 == 0, Doubt(table[order[:part]]).suspicion(table[asked])))


def write_pool(root: Path, samples: int, dimensions: int, answered: int) -> None:
    """A workspace whose pool is `samples` in clusters by embedding; in some of them the answers are worse."""
    (root / "data").mkdir()
    (root / "params.yaml").write_bytes((PROJECT / "params.yaml").read_bytes())
    rng = np.random.default_rng(0)
    centres = _centres(dimensions, rng)
    with _table(root / "data/manifest.csv") as file:
        manifest = csv.writer(file)
        manifest.writerow(MANIFEST_COLUMNS)
        for number, start in enumerate(range(0, samples, SHARD)):
            count = min(SHARD, samples - start)
            names = [f"{start + row:016x}" for row in range(count)]
            clusters = rng.integers(len(centres), size=count)
            labels = clusters % CLASSES
            manifest.writerows(
                (name, f"data/images/{name}.png", str(label), "train", "")
                for name, label in zip(names, labels.tolist(), strict=True)
            )
            write_shard(root / f"results/predictions/{number:04d}.npz", _shard(names, centres, clusters, rng))
    with _table(root / "data/corrections.csv") as file:
        corrections = csv.DictWriter(file, CORRECTION_COLUMNS)
        corrections.writeheader()
        for row in rng.permutation(samples)[:answered].tolist():
            verdict = "map_fixed" if rng.random() < 0.3 else "map_ok"
            given = {"sample": f"{row:016x}", "verdict": verdict, "minutes": "0.3", "annotation": str(row)}
            corrections.writerow({**dict.fromkeys(CORRECTION_COLUMNS, ""), **given})


def _centres(dimensions: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((50 * CLASSES, dimensions)).astype(np.float32)


def _shard(names: list[str], centres: np.ndarray, clusters: np.ndarray, rng: np.random.Generator) -> Predictions:
    count, dimensions = len(names), centres.shape[1]
    logits = rng.gumbel(size=(count, CLASSES)).astype(np.float32)
    logits[np.arange(count), clusters % CLASSES] += np.where(clusters % 7 == 0, 1.0, 5.0)
    answers = np.exp(logits)
    answers /= answers.sum(axis=1, keepdims=True)
    doubtful = 0.4 * (clusters % 11 == 0)
    unsure = rng.random((2, count), dtype=np.float32)
    return Predictions(
        samples=np.array(names),
        probabilities=answers,
        embeddings=centres[clusters] + 0.5 * rng.standard_normal((count, dimensions), dtype=np.float32),
        corner_reliance=np.clip(doubtful + 0.6 * unsure[0], 0, 1).astype(np.float32),
        early_confidence=np.clip(doubtful + 0.6 * unsure[1], 0, 1).astype(np.float32),
        attention_probabilities=answers,
        maps=rng.random((count, MAP, MAP), dtype=np.float32),
        has_gold=np.zeros(count, bool),
        gold_maps=np.zeros((count, MAP, MAP), np.float32),
        replaced_probabilities=np.full((count, CLASSES), np.nan, np.float32),
    )


def _table(path: Path) -> TextIO:
    return path.open("w", newline="", encoding="utf-8")


if __name__ == "__main__":
    main()
