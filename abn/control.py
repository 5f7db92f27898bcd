"""The control: the same training without anything that people said. `python -m abn.control` writes results/control/.

What a round gained from its labelers is its metrics against these. It depends on no correction, so it runs once, and
again only when the data or the settings change.
"""

from __future__ import annotations

from abn import evaluate, parallel, predict, train
from abn.config import load_section
from abn.stage import CONTROL


def main() -> None:
    parallel.launch("abn.control", load_section(train.TrainConfig, "params.yaml", "train").processes)
    with parallel.together():
        train.run(CONTROL)
        parallel.wait()
        predict.run(CONTROL)
        parallel.wait()
        if parallel.is_first():
            evaluate.run(CONTROL)


if __name__ == "__main__":
    main()
