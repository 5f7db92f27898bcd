"""The control: the same training without anything that people said. `python -m abn.control` writes results/control/.

What a round gained from its labelers is its metrics against these. It depends on no correction, so it runs once, and
again only when the data or the settings change.
"""

from __future__ import annotations

from abn import evaluate, predict, train
from abn.stage import CONTROL


def main() -> None:
    train.run(CONTROL)
    predict.run(CONTROL)
    evaluate.run(CONTROL)


if __name__ == "__main__":
    main()
