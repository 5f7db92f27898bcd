"""Whether a round can begin, told before Prefect is asked: the state of the workspace in git, and params.yaml.

Importing this module costs a fraction of a second. Checks of settings import what they need.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from abn.config import load_section
from flows.versions import Git, refuse_old_round
from flows.workspace import Round, Workspace

if TYPE_CHECKING:
    from abn.model import ModelConfig

# Sections of params.yaml beside those of a training (abn.train.Settings): where the dataclass of each is.
SECTIONS = {
    "predict": "abn.predict:PredictConfig",
    "selection": "abn.selection:SelectionConfig",
    "gate": "flows.gate:GateConfig",
    "stop": "flows.stopping:StopConfig",
    "capture": "flows.inbox:CaptureConfig",
    "services": "flows.services:Services",
}
# Those whose module imports Prefect, which reads its addresses from the environment once, on import.
PREFECT_SECTIONS = {
    "project": "flows.rounds:ProjectConfig",
    "labeling": "flows.rounds:LabelingConfig",
    "flows": "flows.serve:FlowsConfig",
}

State = Literal["none", "begun", "open", "unsealed", "closed"]


def state_of(place: Workspace, round_: Round | None) -> State:
    """Where a round stands: `begun` until its tasks are pushed, `open` until it is collected, `closed` once tagged;
    `unsealed` in between, where closing it was interrupted."""
    if round_ is None:
        return "none"
    state: State = round_.read().get("state", "begun")
    if state == "closed" and round_.tag not in Git(place.root).tags(round_.tag):
        return "unsealed"
    return state


def check_workspace(place: Workspace) -> None:
    """Raises ValueError, which says what to do, where `abnloop round open` has nothing to begin or to go on with: the
    workspace is in use, an old round is checked out, a round is open, or something is not committed."""
    with place.lock("round open"):
        refuse_old_round(place.root)
        latest = place.latest()
        state = state_of(place, latest)
        if latest and state == "open":
            ours = re.compile(rf"{COMMITTED_BY_ROUNDS}|{place.relative(latest.folder)}/.*")
            if not any(ours.fullmatch(path) for path in Git(place.root).changed_paths()):
                raise ValueError(f"round {latest.number} is open already; `abnloop round collect` takes its answers in")
            return  # it was interrupted before its last commit
        check_committed(place, latest, state)


COMMITTED_BY_ROUNDS = r"dvc\.lock|results/.*|models/.*"


def check_committed(place: Workspace, latest: Round | None, state: State) -> None:
    """Raises ValueError where a new round could not be restored from git, since something is not committed, or where
    collecting the `latest` one was interrupted."""
    if latest and state == "unsealed":
        raise ValueError(f"collecting round {latest.number} was interrupted; finish it with `abnloop round collect`")
    interrupted = f"|{place.relative(latest.folder)}/.*" if latest and state == "begun" else ""
    ours = re.compile(COMMITTED_BY_ROUNDS + interrupted)
    if foreign := [path for path in Git(place.root).changed_paths() if not ours.fullmatch(path)]:
        raise ValueError(
            f"{foreign[0]} has changes that are not committed ({len(foreign)} file(s)); "
            "commit them with `git add` and `git commit`, or undo them, so that the round can be restored"
        )


def check_settings(path: Path, sections: Collection[str] = (*SECTIONS, *PREFECT_SECTIONS)) -> None:
    """Raises ValueError for the first setting of the params.yaml at `path` with which a command would fail later.

    Beside each section's own checks: a device that this machine lacks, and a network that cannot be built or does not
    work at data.size. `sections`: those to check beside a training's own, which are always checked.
    """
    from abn.train import Settings, choose_device

    settings = Settings.load(path)
    for name, where in (SECTIONS | PREFECT_SECTIONS).items():
        if name in sections:
            module, _, attribute = where.partition(":")
            load_section(getattr(importlib.import_module(module), attribute), path, name)
    choose_device(settings.train.device)
    check_network(settings.model, settings.data.size, path.parent)


def check_network(config: ModelConfig, size: tuple[int, int], folder: Path = Path()) -> None:
    """Raises ValueError where no network can be built as `config` says, its weights are not there, or images of `size`
    (height, width) are too small for it. Downloads nothing. A local file of weights starts at `folder`."""
    import torch

    from abn.backbones import make_body, torchvision_weights
    from abn.model import ABN

    plain = replace(config, weights="none")
    try:
        with torch.device("meta"):  # where nothing is computed or kept in memory
            network = ABN(plain, classes=2)
    except NotImplementedError:  # RegNet's constructor computes with tensors
        network = ABN(plain, classes=2)
    try:
        with torch.no_grad():
            network.to("meta").eval()(torch.zeros(1, 3, *size, device="meta"))
    except RuntimeError as error:
        raise ValueError(f"data.size is {list(size)}, too small for {config.backbone}; take larger pictures") from error
    name, weights = config.backbone, config.weights
    if weights == "none":
        return
    file = folder / weights
    if file.is_file() or name == "efficientnet_lite0" or name.startswith("cifar_"):
        make_body(name, str(file) if file.is_file() else weights)
    else:
        torchvision_weights(name, weights)


def main() -> None:
    """`python -m flows.preflight PARAMS`: checks every section; what is wrong is one line on stderr, exit code 2."""
    try:
        check_settings(Path(sys.argv[1]))
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
