"""The promoted model as a service holds it: loaded once, and swapped whole when another one is promoted."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from abn.data import read_image, resize_mask
from abn.model import LoadedModel, load_model, resize_map
from flows.workspace import Workspace, read_json

FEATURE_BYTES = 256 << 20  # of the pictures asked about last; a ResNet-18 at 224 px needs 200 KB each

logger = logging.getLogger(__name__)


class Look(NamedTuple):
    """What does not depend on anybody's mask."""

    features: Tensor  # of the extractor, "1 c h w"
    shares: Tensor  # "k": the probabilities with the network's own map


class Promoted:
    """One promoted model; several threads may ask it at once.

    The extractor's features are kept for the pictures asked about last, so that another mask for one of them costs
    the perception branch alone.
    """

    def __init__(self, model: LoadedModel, version: str) -> None:
        self.network, self.classes, self.size = model
        self.version = version
        with torch.inference_mode():  # the first run is slow, and tells how large features are
            features = self.network.extract(torch.zeros(1, 3, *self.size))
        self.look = lru_cache(maxsize=max(1, FEATURE_BYTES // features.nbytes))(self._first_look)

    @torch.inference_mode()
    def answers(self, picture: Path, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        """Probabilities of the classes, twice "k": with `mask` in place of the model's own map, and with its own.

        `mask` is (height, width) uint8 0..255 at the picture's own size. Raises ValueError for a picture that cannot
        be read.
        """
        features, own = self.look(picture)
        given = resize_map(resize_mask(mask, self.size)[None].float() / 255, features.shape[-2:])
        return self.network.perceive(features, given)[0].softmax(dim=1)[0], own

    @torch.inference_mode()
    def _first_look(self, picture: Path) -> Look:
        try:
            image = read_image(picture, self.size)[None].float() / 255
        except OSError as error:
            raise ValueError(f"{picture.name} cannot be read; restore it with `dvc checkout`") from error
        features = self.network.extract(image)
        own = self.network.attend(features)[1]
        return Look(features, self.network.perceive(features, own)[0].softmax(dim=1)[0])


class Champion:
    """The workspace's promoted model, noticed by its files whenever somebody asks.

    Another model is loaded in the background while the one before it goes on answering. Whoever took the model from
    `current` keeps it to the end of a request, also when it is swapped meanwhile.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lock = Lock()
        self._loader = ThreadPoolExecutor(1, "champion")
        self._seen: object = None
        self._loading: Future[None] | None = None
        self._promoted: Promoted | None = None

    def current(self) -> Promoted:
        """The promoted model; waits for the first one to load. Raises ValueError where there is none to load."""
        loading = self._notice()
        if self._promoted is None:
            if loading is None:
                raise ValueError("no model has been promoted yet")
            loading.result()
        assert self._promoted is not None
        return self._promoted

    def version(self) -> str:
        """The version of the model that answers now, at once; empty where none is loaded."""
        self._notice()
        return self._promoted.version if self._promoted else ""

    def _notice(self) -> Future[None] | None:
        """Begin to load what was promoted since the last look; the loading that was begun last."""
        with self._lock:
            stamp = _stamp(self._workspace.champion), _stamp(self._workspace.champion_record)
            if stamp[0] and stamp != self._seen and (self._loading is None or self._loading.done()):
                self._seen = stamp
                self._loading = self._loader.submit(self._load)
            return self._loading

    def _load(self) -> None:
        try:
            self._promoted = load_promoted(self._workspace)
        except ValueError as error:
            logger.warning("%s", error)
            raise


def load_promoted(workspace: Workspace) -> Promoted:
    """The model in models/champion.pt under the version that models/champion.json names.

    Raises ValueError where one of the files is missing or damaged, or where they do not belong together: they are
    written one after the other, so this is normal for a moment.
    """
    record = read_json(workspace.champion_record)
    model = load_model(workspace.champion)
    with workspace.champion.open("rb") as file:
        content = hashlib.file_digest(file, "md5").hexdigest()
    if record.get("md5", content) != content:
        raise ValueError(f"{workspace.champion} is not the model that {workspace.champion_record.name} names yet")
    return Promoted(model, f"v{record['model_version']}" if record else "")


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is written."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino
