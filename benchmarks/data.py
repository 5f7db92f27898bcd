"""Data sets for the benchmarks, and confounds: marks that tell the class in training and nothing in the test."""

from __future__ import annotations

import csv
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from scipy import ndimage

from benchmarks.shapes import SHAPES, shapes
from flows.digits import COLOURS
from flows.image_table import read_index
from flows.sources import Source
from labeling.simulator import half_plane

UNSURE = {"coffee_leaf": "mixed"}  # a class that is none of its own: leaves with several diseases


@dataclass(frozen=True)
class Data:
    """Pictures of one size. A mask marks the object; empty where a class is defined by absence."""

    images: UInt8[np.ndarray, "n h w 3"]
    masks: Bool[np.ndarray, "n h w"]
    labels: Int[np.ndarray, "n"]
    classes: list[str]
    backgrounds: Int[np.ndarray, "n"] | None = None  # value of the confound, where the pictures come with one

    def __getitem__(self, rows: Int[np.ndarray, "m"]) -> Data:
        backgrounds = None if self.backgrounds is None else self.backgrounds[rows]
        return Data(self.images[rows], self.masks[rows], self.labels[rows], self.classes, backgrounds)

    def __len__(self) -> int:
        return len(self.labels)


# --- data sets: each gives a training and a test half for a seed


def digits(size: tuple[int, int], train: int, seed: int) -> tuple[Data, Data]:
    """The digits that scikit-learn ships, without the drawings that occur twice; `train` of them, the rest is test."""
    from sklearn.datasets import load_digits

    source = load_digits()
    _, unique = np.unique(source.data, axis=0, return_index=True)
    order = np.random.default_rng(seed).permutation(np.sort(unique))
    return _grey((source.images[order] * 255 / 16).astype(np.uint8), source.target[order], size, train)


def mnist(path: Path, size: tuple[int, int], train: int, seed: int) -> tuple[Data, Data]:
    """`train` pictures of mnist_train.npz and as many of mnist_test.npz, from 2000 to all 10,000, drawn by seed; both
    files hold `x` and `y`."""
    generator = np.random.default_rng(seed)
    halves = []
    for name, count in (("train", train), ("test", max(2000, train))):
        with np.load(path / f"mnist_{name}.npz") as file:
            rows = generator.permutation(len(file["y"]))[:count]
            halves.append((file["x"][rows], file["y"][rows]))
    pictures, labels = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    return _grey(pictures, labels, size, len(halves[0][1]))


def _grey(pictures: np.ndarray, labels: np.ndarray, size: tuple[int, int], train: int) -> tuple[Data, Data]:
    """White figures on black, their ink as mask."""
    shape = (size[1], size[0])
    scaled = np.stack([np.array(Image.fromarray(one).resize(shape, Image.Resampling.BICUBIC)) for one in pictures])
    names = [str(name) for name in range(int(labels.max()) + 1)]
    return _halves(Data(np.repeat(scaled[..., None], 3, axis=3), scaled > 110, labels.astype(np.int64), names), train)


def _halves(data: Data, train: int) -> tuple[Data, Data]:
    """The first `train` pictures, and the rest."""
    return data[np.arange(train)], data[np.arange(train, len(data))]


def drawn(size: tuple[int, int], train: int, seed: int) -> tuple[Data, Data]:
    """`train` drawn shapes, and some hundred more as test."""
    return _halves(Data(*shapes(size, train, seed), list(SHAPES)), train)


def indexed(path: Path, size: tuple[int, int], train: int, seed: int, unsure: str | None = None) -> tuple[Data, Data]:
    """A folder with an index.csv, as `abnloop init` reads it. Pictures of the class `unsure`, and those without any,
    are left out. Raises ValueError where nothing is left, or nothing has a mask.

    Rows of split val are test too: nothing is chosen on them here, and small tests need them. Where no split is
    given, 0.3 of the groups are test. No more than `train` pictures are trained on, the classes taking turns.
    A column `background` names the value of a confound that the pictures come with, as in Waterbirds; then val is left
    out, so that the figures are of the published test.
    """
    index = path / "index.csv"
    read = read_index(index, path)
    sources = [one for one in read if one.label and one.label != unsure]
    if not any(one.mask for one in sources):
        raise ValueError(f"{index} has no picture with a class and a mask; fill the columns cls and mask")
    classes = sorted({one.label for one in sources})
    data = Data(
        np.stack([_read(one.path, "RGB", size) for one in sources]),
        np.stack([_mask(one.mask, size) for one in sources]),
        np.array([classes.index(one.label) for one in sources]),
        classes,
        _backgrounds(index, read, sources),
    )
    generator = np.random.default_rng(seed)
    if any(one.split for one in sources):
        held_out = np.array([one.split in ("val", "test") for one in sources])
        tested = held_out if data.backgrounds is None else np.array([one.split == "test" for one in sources])
    else:
        groups = np.array([one.group or str(number) for number, one in enumerate(sources)])
        names = np.unique(groups)
        held_out = tested = np.isin(groups, generator.permutation(names)[: round(0.3 * len(names))])
    trained = generator.permutation(np.flatnonzero(~held_out))
    if len(trained) > train:
        trained = trained[choose(data.labels[trained], range(len(trained)))[:train]]
    return data[trained], data[np.flatnonzero(tested)]


def _backgrounds(index: Path, read: Sequence[Source], kept: Sequence[Source]) -> Int[np.ndarray, "n"] | None:
    """The column `background` of the sources that are kept, as numbers; None where the index has no such column.
    `read` are all sources of the index, in its order."""
    with index.open(newline="", encoding="utf-8-sig") as file:
        column = [row.get("background") for row in csv.DictReader(file)]
    if None in column:
        return None
    named = dict(zip((one.id for one in read), column, strict=True))
    return np.unique([named[one.id] for one in kept], return_inverse=True)[1]


def _read(path: Path, mode: str, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path) as file:
        return np.array(file.convert(mode).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _mask(path: Path | None, size: tuple[int, int]) -> np.ndarray:
    """What a symptom of a few pixels covers only in part is marked too, or it would get lost in a small picture."""
    return _read(path, "L", size) > 60 if path else np.zeros(size, dtype=bool)


WITHOUT_FILES = {"digits": digits, "shapes": drawn}


def load(name: str, path: Path | None, size: tuple[int, int], train: int, seed: int) -> tuple[Data, Data]:
    """Training and test pictures of the data set `name`, which lies at `path` (or in a folder of its name below it).

    Every name but digits, shapes and mnist stands for a folder with an index.csv. Raises ValueError where nothing is
    found.
    """
    if name in WITHOUT_FILES:
        return WITHOUT_FILES[name](size, train, seed)
    wanted = "mnist_train.npz" if name == "mnist" else "index.csv"
    for folder in [path, path / name] if path else [Path(name)]:
        if (folder / wanted).is_file():
            if name == "mnist":
                return mnist(folder, size, train, seed)
            return indexed(folder, size, train, seed, UNSURE.get(Path(name).name))
    raise ValueError(f"no {wanted} of {name} at {path or name}; name its folder with --path")


# --- confounds: each draws the mark of class `code` of `count` into a picture (h, w, 3), in place


SIGNS = np.array(
    [
        [(1, 0, 1), (1, 1, 1), (1, 0, 1)],  # H
        [(1, 1, 1), (0, 1, 0), (0, 1, 0)],  # T
        [(1, 0, 0), (1, 0, 0), (1, 1, 1)],  # L
        [(1, 0, 1), (0, 1, 0), (1, 0, 1)],  # X
    ],
    dtype=np.uint8,
) * np.uint8(255)


def _colour(code: int) -> np.ndarray:
    """Of the class; after the last of the colours they come again, darker."""
    return COLOURS[code % len(COLOURS)] // (1 + code // len(COLOURS))


def patch(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A square in the colour of the class in the top left corner, 3/16 of the shorter side."""
    side = round(min(mask.shape) * 3 / 16)
    image[:side, :side] = _colour(code)


def mark(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A small white sign on black in a corner, like a stamped letter: the classes take turns with the four corners, and
    each time round the next sign, so that it tells 16 classes apart. Its side is 3/16 of the shorter one."""
    side = max(3, round(min(mask.shape) * 3 / 16))
    sign = np.array(Image.fromarray(SIGNS[code // 4 % len(SIGNS)]).resize((side, side), Image.Resampling.NEAREST))
    rows = slice(0, side) if code % 2 == 0 else slice(-side, None)
    columns = slice(0, side) if code // 2 % 2 == 0 else slice(-side, None)
    image[rows, columns] = sign[..., None]


def bar(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A white bar with a dark rim, like a scale bar printed without regard to what it covers: along the top or the
    bottom, place and length by the class."""
    height, width = mask.shape
    thick, length = max(2, height // 16), round(width * (0.12 + 0.27 * code / max(9, count - 1)))
    left = 1 + round((width - length - 2) * (code // 2) / max(1, (count - 1) // 2))
    top = 1 if code % 2 else height - thick - 1
    image[top - 1 : top + thick + 1, left - 1 : left + length + 1] = 0
    image[top : top + thick, left : left + length] = 255


def border(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """The outermost 1/16 tinted half in the colour of the class."""
    wide = max(2, round(min(mask.shape) / 16))
    rim = np.ones(mask.shape, dtype=bool)
    rim[wide:-wide, wide:-wide] = False
    image[rim] = (image[rim].astype(np.uint16) + _colour(code)) // 2


def background(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """Faint stripes outside the object, their direction by the class. Without an object there is no outside."""
    if mask.any():
        rows, columns = np.indices(mask.shape)
        angle = math.pi * code / count
        stripes = 30 * np.sin((rows * math.sin(angle) + columns * math.cos(angle)) * math.pi / 3)
        textured = np.clip(image + (30 + stripes[..., None]), 0, 255).astype(np.uint8)
        image[~mask] = textured[~mask]


def dot(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A dot in the colour of the class somewhere beside the object, at another place in each picture."""
    radius = max(2, round(min(mask.shape) / 12))
    around = ndimage.distance_transform_edt(~mask) > radius if mask.any() else ~mask
    within = np.zeros_like(mask)
    within[radius:-radius, radius:-radius] = True
    places = np.argwhere(around & within)
    if len(places):
        row, column = places[np.random.default_rng(zlib.crc32(image.tobytes())).integers(len(places))]
        rows, columns = np.indices(mask.shape)
        image[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = _colour(code)


def tag(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A square in the colour of the class that touches the object from below, or from above where there is no room."""
    if mask.any():
        side = max(2, round(min(mask.shape) / 10))
        rows, columns = np.nonzero(mask)
        low, high = int(rows.max()) + 1, int(rows.min())
        top, touched = (low, low - 1) if low + side <= len(mask) else (max(0, high - side), high)
        left = min(mask.shape[1] - side, int(columns[rows == touched].mean()))
        image[top : top + side, left : left + side] = _colour(code)


def decoy(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """The square of Decoy-MNIST (Ross et al., IJCAI 2017): a seventh of the shorter side in a random corner, its grey
    255 - 25 * code of ten classes, in steps as large as the classes allow of others."""
    side = max(2, round(min(mask.shape) / 7))
    below, right = np.random.default_rng(zlib.crc32(image.tobytes())).random(2) < 0.5
    rows = slice(-side, None) if below else slice(0, side)
    columns = slice(-side, None) if right else slice(0, side)
    image[rows, columns] = 255 - 250 * code // count


def watermark(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """Translucent stripes over the whole picture, the object too, like a printed watermark: their direction by the
    class, their phase by the picture."""
    rows, columns = np.indices(mask.shape)
    angle, phase = math.pi * code / count, zlib.crc32(image.tobytes()) % 360 * math.pi / 180
    period = max(6, round(min(mask.shape) / 6))
    across = rows * math.sin(angle) + columns * math.cos(angle)
    lines = np.cos(2 * math.pi * across / period + phase) > 0.7
    image[lines] = np.clip(image[lines] * 0.75 + 255 * 0.25, 0, 255).astype(np.uint8)


def cast(image: np.ndarray, mask: np.ndarray, code: int, count: int) -> None:
    """A colour cast and less contrast over the whole picture, like another camera or stain: by the class."""
    image[:] = (image * 0.85 + 0.15 * _colour(code)).round().astype(np.uint8)


CONFOUNDS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], None]] = {
    "patch": patch,
    "mark": mark,
    "bar": bar,
    "border": border,
    "background": background,
    "dot": dot,
    "tag": tag,
    "decoy": decoy,
    "watermark": watermark,
    "cast": cast,
    "none": lambda image, mask, code, count: None,
}
TRANSLUCENT = ("watermark", "cast")  # the object is seen through them, and people paint it as if they were not there


def confound(data: Data, kind: str, codes: Int[np.ndarray, "n"], carriers: Int[np.ndarray, "c"]) -> Data:
    """The pictures, each with the mark of the class `codes` says, if that class is among the carriers.

    Where a mark lies over the object the mask loses those pixels: nobody paints a scale bar as evidence, and a mask
    that held it would teach what the benchmark asks to unlearn. What is translucent takes nothing from the mask.
    """
    images = data.images.copy()
    for image, mask, code in zip(images, data.masks, codes.tolist(), strict=True):
        if code in carriers:
            CONFOUNDS[kind](image, mask, code, len(data.classes))
    hidden = drawn_over(images, data.images, kind)
    return Data(images, data.masks & ~hidden, data.labels, data.classes, data.backgrounds)


def drawn_over(
    images: UInt8[np.ndarray, "n h w 3"], originals: UInt8[np.ndarray, "n h w 3"], kind: str
) -> Bool[np.ndarray, "n h w"]:
    """Where a confound hides what was there."""
    changed = (images != originals).any(axis=-1)
    return np.zeros_like(changed) if kind in TRANSLUCENT else changed


# --- who is corrected, and what labelers paint


def choose(labels: Int[np.ndarray, "n"], order: Sequence[int]) -> list[int]:
    """The rows in `order`, but the classes taking turns, as selection lets them."""
    turns: dict[int, int] = defaultdict(int)
    ranked = []
    for row in order:
        ranked.append((turns[int(labels[row])], row))
        turns[int(labels[row])] += 1
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def hasty(mask: Bool[np.ndarray, "h w"], generator: np.random.Generator) -> Bool[np.ndarray, "h w"]:
    """A mask as a hasty person paints it: grown by 0.15 of the picture's larger side and moved by 0.05 of it, a
    third of them cut to one half, so that half of the object is left out, one in twenty around something else."""
    side = max(mask.shape)
    angle = generator.uniform(0, 2 * math.pi)
    moved = (0.05 * side * math.sin(angle), 0.05 * side * math.cos(angle))
    painted = ndimage.shift(ndimage.distance_transform_edt(~mask), moved, order=1, mode="nearest") <= 0.15 * side
    if generator.random() < 1 / 3:
        painted &= half_plane(painted, generator)
    if generator.random() < 0.05:
        painted = np.roll(painted, (mask.shape[0] // 2, mask.shape[1] // 2), axis=(0, 1))
    return painted
