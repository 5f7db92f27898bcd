"""Evaluates the control: `python -m abn.control_evaluate` writes results/control/metrics.json.

What a round gained from its labelers is its metrics against these. It runs again whenever there are more gold masks.
"""

from __future__ import annotations

from abn import evaluate, parallel, predict
from abn.config import load_section
from abn.stage import CONTROL
from abn.train import TrainConfig


def main() -> None:
    parallel.launch("abn.control_evaluate", load_section(TrainConfig, "params.yaml", "train").processes)
    with parallel.together():
        predict.run(CONTROL)
        parallel.wait()
        if parallel.is_first():
            evaluate.run(CONTROL)


if __name__ == "__main__":
    main()
