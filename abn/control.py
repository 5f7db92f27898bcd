"""Trains the control, the same training without anything that people said: `python -m abn.control` writes
results/control/.

It depends on no correction and on no gold mask, so it trains once, and again only when the data or the settings change.
"""

from __future__ import annotations

from abn import parallel, train
from abn.config import load_section
from abn.stage import CONTROL


def main() -> None:
    parallel.launch("abn.control", load_section(train.TrainConfig, "params.yaml", "train").processes)
    with parallel.together():
        train.run(CONTROL)


if __name__ == "__main__":
    main()
