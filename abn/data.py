"""Samples become batches of pictures, labels and masks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from abn.images import read_rgb
from abn.manifest import MANY_MASKS, MaskShards, Sample
from abn.rims import rim_width, without_rim

CACHE_BYTES = 4 << 30  # decoded pictures are kept in memory up to this much, by each process
ENOUGH = 200  # masks that tell how wide people paint


@dataclass(frozen=True)
class DataConfig:
    size: tuple[int, int]  # height, width in pixels
    flip: bool
    shift: int  # pixels

    def __post_init__(self) -> None:
        if min(self.size) < 8:
            raise ValueError(f"data.size is {list(self.size)}; height and width must be at least 8 pixels")
        if not 0 <= self.shift < min(self.size):
            raise ValueError(f"data.shift is {self.shift}; it must be from 0 to {min(self.size) - 1} pixels")


class Batch(NamedTuple):
    images: UInt8[Tensor, "b 3 h w"]
    labels: Int[Tensor, "b"]  # -1: not known
    masks: UInt8[Tensor, "b 1 h w"]  # 0..255, what is evidence; where trust is 0 at best a guess
    has_mask: Bool[Tensor, "b"]  # a person gave the mask
    painted: Bool[Tensor, "b"]  # a person made it: it is not a map of the network that a person called fine
    weights: Float[Tensor, "b"]  # 0..1, of the mask in the loss of the map: how far those who gave it agree
    trust: Float[Tensor, "b"]  # 0..1: 1 for a person's mask, less for one that the annotator drew, 0 without any
    shortcuts: UInt8[Tensor, "b 1 h w"]  # 255 where something misleads, as far as that is known
    indices: Int[Tensor, "b"]  # into the samples


def read_image(path: str | Path, size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """A picture as RGB, 0..255, resized to (height, width)."""
    return resize_image(read_rgb(path), size)


def resize_image(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[Tensor, "3 h w"]:
    """A decoded picture resized to (height, width)."""
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_mask(mask: UInt8[np.ndarray, "H W"], size: tuple[int, int]) -> UInt8[Tensor, "1 h w"]:
    """A mask resized to (height, width) with the filter that its picture gets, so that both stay together."""
    resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))[None]


def still_marked(masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Resized masks, 0..1, over a half somewhere: what became too thin for that is marked where it fills most of a
    pixel. Else a scratch that somebody painted would be no evidence at all."""
    most = masks.amax(dim=(1, 2, 3), keepdim=True)
    return torch.where((most > 0) & (most <= 0.5), masks / most.clamp(min=1e-6), masks)


class Pictures(Dataset[Batch]):
    """Samples as tensors. An item is a `Batch` of the given indices, so that a whole batch costs one call."""

    def __init__(
        self, root: str | Path, samples: Sequence[Sample], classes: Sequence[str], size: tuple[int, int]
    ) -> None:
        self.root, self.samples, self.size = Path(root), list(samples), size
        numbers = {name: number for number, name in enumerate(classes)}
        self.labels = torch.tensor([numbers.get(sample.label, -1) for sample in self.samples])
        self.shards = MaskShards(root)
        self.drawn: dict[int, Tensor] = {}  # masks of the annotator where no person gave one, and how far to trust each
        self.trust: dict[int, float] = {}
        self.shortcuts: dict[int, Tensor] = {}  # where something misleads, in pictures in which anything does
        self.cached = len(self.samples) * 3 * size[0] * size[1] <= CACHE_BYTES
        self._images: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        people = [self._mask(index) for index in indices]
        masks = [self._drawn_mask(i) if mask is None else mask for i, mask in zip(indices, people, strict=True)]
        given = torch.tensor([mask is not None for mask in people])
        trust = torch.tensor([self.trust.get(index, 0.0) for index in indices])
        samples, chosen = [self.samples[index] for index in indices], torch.tensor(indices)
        return Batch(
            torch.stack([self._image(index) for index in indices]),
            self.labels[chosen],
            torch.stack(masks),
            given,
            torch.tensor([sample.painted for sample in samples]),
            torch.tensor([sample.weight for sample in samples]),
            torch.where(given, 1.0, trust),
            torch.stack([self._shortcut(index) for index in indices]),
            chosen,
        )

    def all_but(self, indices: Sequence[int]) -> list[int]:
        """The indices of the other pictures, in order."""
        return sorted(set(range(len(self))) - set(indices))

    def _image(self, index: int) -> Tensor:
        if index in self._images:
            return self._images[index]
        path = self.root / self.samples[index].image
        try:
            image = read_image(path, self.size)
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error}); restore it with `dvc checkout`") from error
        if self.cached:
            self._images[index] = image
        return image

    def _mask(self, index: int) -> Tensor | None:
        sample = self.samples[index]
        if not sample.masks:
            return None
        if index not in self._masks:
            mask = resize_mask(self.shards.get(sample.masks, sample.id, sample.sha256), self.size)
            self._masks[index] = _bytes(still_marked(mask[None].float() / 255))[0]
        return self._masks[index]

    def narrow_masks(self) -> int:
        """Takes off the masks that people painted by how many pixels they are too wide (abn/rims.py); says how many."""
        painted = [i for i, sample in enumerate(self.samples) if sample.masks and sample.painted]
        if len(painted) < MANY_MASKS:  # few masks show a rim by chance
            return 0
        some = torch.randperm(len(painted), generator=torch.Generator().manual_seed(0))[:ENOUGH]
        seen = self[[painted[i] for i in sorted(some.tolist())]]
        width = rim_width(seen.images.float() / 255, (seen.masks > 127).float())
        for index in painted if width else []:
            mask = self._mask(index)
            assert mask is not None, "a person painted it"
            self._masks[index] = _bytes(without_rim(mask[None].float() / 255, width))[0]
        return width

    def _drawn_mask(self, index: int) -> Tensor:
        if index not in self.drawn:
            return torch.zeros((1, *self.size), dtype=torch.uint8)
        mask = self.drawn[index]  # of a large picture smaller than the picture
        if mask.shape[1:] == self.size:
            return mask
        large = F.interpolate(mask[None].float() / 255, size=self.size, mode="bilinear", align_corners=False)
        return _bytes(still_marked(large))[0]

    def _shortcut(self, index: int) -> Tensor:
        if index not in self.shortcuts:
            return torch.zeros((1, *self.size), dtype=torch.uint8)
        return F.interpolate(self.shortcuts[index][None], size=self.size)[0]


def _bytes(masks: Float[Tensor, "b 1 h w"]) -> UInt8[Tensor, "b 1 h w"]:
    return (255 * masks).round().to(torch.uint8)


def loader(pictures: Pictures, batches: Sequence[Sequence[int]]) -> DataLoader[Batch]:
    """The given batches in their order; worker processes decode where the pictures do not fit into memory."""
    workers = 0 if pictures.cached else min(4, os.cpu_count() or 1)
    return DataLoader(pictures, sampler=batches, batch_size=None, num_workers=workers, worker_init_fn=_begin_worker)


def _begin_worker(worker: int) -> None:
    begun = get_worker_info()
    assert begun is not None and isinstance(begun.dataset, Pictures), "it is called in a worker of the loader"
    begun.dataset.shards.close()  # with its parent it would share the place in an open file
    # Threads do not live on in a fork, but what they want done at the exit does: Prefect's services, which run beside a
    # flow, fail there, and the DataLoader takes that for a failure of its worker.
    threading._threading_atexits.clear()  # type: ignore[attr-defined]


def in_order(count: int, batch_size: int) -> list[list[int]]:
    """Batches of `batch_size`. A last one that would be alone joins those before: to be shown in another context a
    picture needs another one."""
    batches = [list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        alone = batches.pop()
        batches[-1] += alone
    return batches


def epoch_batches(
    count: int, corrected: Sequence[int], batch_size: int, share: float, generator: torch.Generator
) -> Iterator[list[int]]:
    """The batches of an epoch over `count` samples, `share` of each batch drawn from the corrected ones.

    The number of steps is that of an epoch without corrections, so that training with and without them costs, and
    compares, the same. The drawn ones come first in a batch, none of them twice; in its own turn one may come
    once more.
    """
    size = min(batch_size, count)
    drawn = min(round(share * size), len(corrected))
    order = torch.randperm(count, generator=generator).tolist()
    steps = max(1, round(count / batch_size))
    rest = size - drawn
    for step in range(steps):
        extra = [corrected[i] for i in torch.randperm(len(corrected), generator=generator)[:drawn].tolist()]
        yield extra + order[step * rest : (step + 1) * rest]


def augment(
    images: Float[Tensor, "b 3 h w"],
    masks: Float[Tensor, "b m h w"],
    config: DataConfig,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b m h w"]]:
    """Mirrors and moves each picture at random, and its masks with it: they travel as further channels of the
    picture, so that no transform can part them. What moves in from outside repeats the edge. Whole pixels only."""
    count, _, height, width = images.shape
    both = torch.cat([images, masks], dim=1)
    if config.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        both = torch.where(mirrored.view(-1, 1, 1, 1).to(both.device), both.flip(-1), both)
    if config.shift:
        pad = config.shift
        both = F.pad(both, (pad, pad, pad, pad), mode="replicate")
        tops, lefts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(both.device)
        rows = (tops[:, None] + torch.arange(height, device=both.device))[:, None, :, None]
        columns = (lefts[:, None] + torch.arange(width, device=both.device))[:, None, None, :]
        picture = torch.arange(count, device=both.device).view(-1, 1, 1, 1)
        channel = torch.arange(both.shape[1], device=both.device).view(1, -1, 1, 1)
        both = both[picture, channel, rows, columns]
    return both[:, :3], both[:, 3:]
