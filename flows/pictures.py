"""The user's pictures: decoded, checked against each other and against their masks, copied."""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from abn.images import decode, orientation
from flows.ingest_report import Report, some
from flows.mask_files import Mask, marked_pixels, pack, read_mask_file
from flows.sources import Source

MAX_PIXELS = 100_000_000
DARK = 16  # the brightest value, 0..255, below which a picture shows nothing
ALIKE = 0.02  # mean difference of thumbnails, 0..1, below which two pictures are nearly the same
CORRELATED = 0.98  # and the correlation of their thumbnails from which on they are: plain scenes differ little anyway
BLOCK = 1000  # pictures compared with all others at once
FULL, EMPTY, RIM = 0.9, 0.0, 0.9  # shares of a mask's pixels, and of those at its edge, that are told

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Picture:
    """A readable picture: what identifies its content, and its size in pixels once EXIF orientation is applied."""

    source: Source
    content: str
    width: int
    height: int
    turned: bool  # by its EXIF orientation, so that it has to be saved anew
    bits: int = 8  # that its values use; 16 at most
    deep: bool = False  # grey of 16 bits
    pages: int = 1
    transparent: bool = False
    brightest: int = 255
    thumbnail: np.ndarray | None = field(default=None, repr=False, compare=False)  # (16, 16) uint8

    @property
    def rescaled(self) -> bool:
        """Whether it has to be saved anew because its 16 bits are not used up: browsers would show it black."""
        return self.deep and self.bits < 16


@contextmanager
def any_size() -> Iterator[None]:
    """Pillow's own limit is lower than ours and comes as a warning; ours is looked at before decoding."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) uint8 as 16 x 16 grey values, by which copies in another size or quality are known."""
    return np.array(Image.fromarray(pixels).convert("L").resize((16, 16), Image.Resampling.BOX))


def read_source(source: Source) -> Picture | str:
    """The picture, or the reason why it cannot be read. Raises ValueError for one that is too large."""
    try:
        if not source.path.exists():
            return "a link to nothing" if source.path.is_symlink() else "is not there"
        if not stat.S_ISREG(source.path.stat().st_mode):
            return "not a file (a pipe, a socket or a device)" if not source.path.is_dir() else "a folder"
        with Image.open(source.path) as image:
            too_large = image.width * image.height > MAX_PIXELS
            if not too_large:
                one = decode(image)
                height, width, _ = one.rgb.shape
                return Picture(
                    source=source,
                    content=one.content,
                    width=width,
                    height=height,
                    turned=one.turned,
                    bits=one.bits,
                    deep=one.deep is not None,
                    pages=one.pages,
                    transparent=one.transparent,
                    brightest=int(one.rgb.max()),
                    thumbnail=thumbnail(one.rgb),
                )
    except Exception as error:  # noqa: BLE001 - on a broken file Pillow's decoders raise nearly anything
        if isinstance(error, Image.UnidentifiedImageError):
            return "no image of a known format"
        return str(error).replace(str(source.path), source.name) or type(error).__name__
    raise ValueError(
        f"{source.name} has {image.width} x {image.height} pixels; "
        f"the limit is {MAX_PIXELS // 10**6} megapixels: shrink it, or take it out"
    )


def read_all(sources: Sequence[Source], report: Report, progress: Progress) -> list[Picture]:
    """The pictures that can be read; the others, and what may surprise about the former, go to the report."""

    def read(source: Source) -> Picture | str | ValueError:
        try:
            return read_source(source)
        except ValueError as error:
            return error

    pictures = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (source, seen) in enumerate(zip(sources, pool.map(read, sources), strict=True), start=1):
            if isinstance(seen, Picture):
                pictures.append(seen)
            elif isinstance(seen, str):
                report.unreadable.append({"image": source.name, "reason": seen})
            else:
                report.problems.append(str(seen))
            progress("reading images", done, len(sources))
    _tell(pictures, report)
    return pictures


def _tell(pictures: Sequence[Picture], report: Report) -> None:
    """What the decoder did to the pictures, for the report."""

    def names(chosen: Callable[[Picture], bool]) -> list[str]:
        return [picture.source.name for picture in pictures if chosen(picture)]

    if one := names(lambda picture: picture.transparent):
        report.read.append(f"{len(one)} images have transparent pixels, which are laid over white: {some(one)}")
    if one := names(lambda picture: picture.pages > 1):
        report.warnings.append(f"{len(one)} images have several pages, of which the first is read: {some(one)}")
    depths = Counter(picture.bits for picture in pictures if picture.deep)
    if one := names(lambda picture: picture.rescaled):
        report.read.append(f"{len(one)} images of 16 bits use 12 or 8 of them and are scaled by that: {some(one)}")
    if len(depths) > 1:
        told = ", ".join(f"{count} use {bits}" for bits, count in sorted(depths.items()))
        report.warnings.append(
            f"images of 16 bits differ in how many they use ({told}), and each is scaled by its own; where their "
            "brightness must compare, scale all alike and save them with 8 bits"
        )
    if one := names(lambda picture: picture.brightest < DARK):
        report.warnings.append(f"{len(one)} images are nearly black (no value above {DARK - 1} of 255): {some(one)}")
    if one := names(lambda picture: picture.source.path.is_symlink()):
        report.read.append(f"{len(one)} images are links, whose files are copied: {some(one)}")


def without_duplicates(pictures: Sequence[Picture], report: Report, skip: bool = False) -> list[Picture]:
    """One picture for each content. Problems where the same content stands in two splits or under two classes; with
    `skip` all pictures of such a content are left out."""
    alike: defaultdict[str, list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=_rank):
        alike[picture.content].append(picture)
    kept = []
    for same in alike.values():
        first, *others = (picture.source for picture in same)
        problems = []
        for other in others:
            if other.split not in ("", first.split):
                problems.append(
                    f"{first.name} ({first.split}) and {other.name} ({other.split}) are the same picture in two "
                    "splits; keep one, or leave out all such with --skip-doubtful"
                )
            elif other.label != first.label:
                problems.append(
                    f"{first.name} ({first.label or 'no class'}) and {other.name} ({other.label or 'no class'}) are "
                    "the same picture under two classes; keep the right one, or leave out all such with "
                    "--skip-doubtful"
                )
        if problems and skip:
            report.doubtful += [picture.source.name for picture in same]
            continue
        report.problems += problems
        kept.append(same[0])
        report.duplicates += [{"image": other.name, "same_as": first.name} for other in others]
    return sorted(kept, key=lambda picture: picture.source.id)


def _rank(picture: Picture) -> tuple[bool, bool, str]:
    """Of the same pictures the first one is kept: one with a given split, with a mask."""
    return not picture.source.split, picture.source.mask is None, picture.source.id


def without_near_duplicates(pictures: Sequence[Picture], report: Report, skip: bool) -> list[Picture]:
    """The pictures, of which those that nearly repeat one of another split or class are told, or with `skip` left out.

    Pool and train go together: the pool is learned from, too.
    """
    pairs = near_duplicates(pictures)
    for what, key in (("splits", _side), ("classes", lambda picture: picture.source.label)):
        across = [(one, other) for one, other in pairs if key(pictures[one]) != key(pictures[other])]
        if not across or skip:
            continue
        told = [f"{_named(pictures[one])} and {_named(pictures[other])}" for one, other in across]
        report.warnings.append(
            f"{len(across)} pairs of images look the same and stand in two {what}: {some(told)}; keep one of each "
            "pair, give both one group in a CSV (--index), or leave all out with --skip-doubtful"
        )
    if not skip:
        return list(pictures)
    doubtful = {index for pair in pairs for index in pair}
    report.doubtful += [pictures[index].source.name for index in sorted(doubtful)]
    return [picture for index, picture in enumerate(pictures) if index not in doubtful]


def _side(picture: Picture) -> str:
    return "train" if picture.source.split == "pool" else picture.source.split


def _named(picture: Picture) -> str:
    source = picture.source
    return f"{source.name} ({', '.join(filter(None, (source.label, source.split)))})"


def near_duplicates(pictures: Sequence[Picture]) -> list[tuple[int, int]]:
    """Pairs of indexes, each picture with the one of another split or class whose thumbnail is most like its own,
    where both are nearly the same. Of pictures without any label only the split counts."""
    if not pictures:
        return []
    table = np.stack([picture.thumbnail for picture in pictures if picture.thumbnail is not None])
    assert len(table) == len(pictures)
    values = table.reshape(len(pictures), -1).astype(np.float32)
    normed = values - values.mean(axis=1, keepdims=True)
    normed /= np.maximum(np.linalg.norm(normed, axis=1, keepdims=True), 1e-6)
    labels = np.unique([picture.source.label for picture in pictures], return_inverse=True)[1]
    blank = np.array([not picture.source.label for picture in pictures])
    sides = np.unique([_side(picture) for picture in pictures], return_inverse=True)[1]
    pairs = set()
    for start in range(0, len(pictures), BLOCK):
        block = slice(start, start + BLOCK)
        alike = normed[block] @ normed.T
        other = (labels[block, None] != labels) & ~blank[block, None] & ~blank
        other |= sides[block, None] != sides
        alike[~other] = -1
        best = alike.argmax(axis=1)
        for row in np.flatnonzero(alike[np.arange(len(best)), best] >= CORRELATED):
            one, two = start + int(row), int(best[row])
            if np.abs(values[one] - values[two]).mean() < ALIKE * 255:
                pairs.add((min(one, two), max(one, two)))
    return sorted(pairs)


def read_masks(
    pictures: Sequence[Picture], report: Report, progress: Progress, stored: bool | None = None
) -> dict[str, Mask]:
    """The mask of each picture that has one, by id; what does not fit becomes a problem.

    A mask belongs to the upright picture. One of a turned picture may have been drawn on the pixels as they are
    stored: its size tells, or that of the others does, or `stored`.
    """
    masked = [picture for picture in pictures if picture.source.mask]
    masks, unsure, convention = {}, [], Counter[bool]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (picture, read) in enumerate(zip(masked, pool.map(_read_mask, masked), strict=True), start=1):
            progress("reading masks", done, len(masked))
            if isinstance(read, str):
                report.problems.append(read)
                continue
            marked, kind = read
            size = (picture.height, picture.width)
            if picture.turned:
                if marked.shape == size and (_orientation(picture) < 5 or size[0] == size[1]):
                    unsure.append((picture, marked, kind))
                    continue
                if marked.shape in (size, size[::-1]):
                    convention[marked.shape != size] += 1
                if marked.shape == size[::-1]:
                    marked = _upright(marked, picture)
            if marked.shape != size:
                report.problems.append(
                    f"the mask of {picture.source.name} has {marked.shape[1]} x {marked.shape[0]} pixels, the image "
                    f"{picture.width} x {picture.height}; a mask has the size of its upright image"
                )
                continue
            masks[picture.source.id] = pack(marked, kind)
    if stored is None and len(convention) == 1:
        stored = next(iter(convention))
    if unsure and stored is None:
        names = [picture.source.name for picture, _, _ in unsure]
        report.problems.append(
            f"{len(unsure)} images with masks are turned by their EXIF orientation, and nothing tells whether the "
            f"masks were drawn on the upright image or on the stored pixels: {some(names)}; say --mask-pixels upright "
            "or --mask-pixels stored"
        )
    for picture, marked, kind in unsure:
        masks[picture.source.id] = pack(_upright(marked, picture) if stored else marked, kind)
    if stored or convention[True]:
        report.read.append("masks of turned images were drawn on the stored pixels and are turned with them")
    masks = {picture.source.id: masks[picture.source.id] for picture in masked if picture.source.id in masks}
    _tell_masks(masks, {picture.source.id: picture.source.name for picture in masked}, report)
    return masks


def _tell_masks(masks: dict[str, Mask], names: dict[str, str], report: Report) -> None:
    """How the masks were understood, and which of them mark hardly anything, or nearly all, for the report."""
    kinds = Counter(mask.kind for mask in masks.values())
    if kinds:
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        report.read.append(f"masks: {told}")
    shares = np.array([mask.share for mask in masks.values()])
    if empty := [names[one] for one, mask in masks.items() if mask.share <= EMPTY]:
        report.warnings.append(f"{len(empty)} of {len(masks)} masks mark nothing: {some(empty)}")
    if full := [names[one] for one, mask in masks.items() if mask.share >= FULL]:
        report.warnings.append(
            f"{len(full)} of {len(masks)} masks mark at least {FULL:.0%} of their image: {some(full)}"
        )
    inverted = [names[one] for one, mask in masks.items() if mask.rim >= RIM and mask.share < 1]
    if len(inverted) > len(masks) / 2:
        report.warnings.append(
            f"{len(inverted)} of {len(masks)} masks mark the edge of the image all around, as inverted masks do (on "
            f"average {shares.mean():.0%} is marked): {some(inverted)}; a mask is white where the object is"
        )


def _read_mask(picture: Picture) -> tuple[np.ndarray, str] | str:
    """(where the object is marked, how that was understood), or why it cannot be told."""
    source = picture.source
    assert source.mask is not None
    if not source.mask.is_file():
        return f"the mask of {source.name} is not there; mend its name, or take it out"
    try:
        with Image.open(source.mask) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"the mask of {source.name} has more than {MAX_PIXELS // 10**6} megapixels"
        return marked_pixels(*read_mask_file(source.mask))
    except Exception as error:  # noqa: BLE001 - on a broken file Pillow's decoders raise nearly anything
        why = str(error).replace(str(source.mask), "its file") or type(error).__name__
        return f"the mask of {source.name} cannot be read: {why}; mend it, or take it out"


def _orientation(picture: Picture) -> int:
    with Image.open(picture.source.path) as image:
        return orientation(image)


def _upright(marked: np.ndarray, picture: Picture) -> np.ndarray:
    """A mask drawn on the stored pixels, turned as its picture was."""
    stored = Image.fromarray(marked.astype(np.uint8) * np.uint8(255))
    stored.getexif()[ExifTags.Base.Orientation] = _orientation(picture)
    return np.asarray(ImageOps.exif_transpose(stored)) > 127


def copy_picture(picture: Picture, folder: Path) -> Path:
    """The picture in `folder` under its id: byte for byte, or as PNG where its EXIF orientation has to be applied or
    its 16 bits are scaled."""
    path, name = picture.source.path, picture.source.id
    if not (picture.rescaled or picture.turned):
        return Path(shutil.copyfile(path, folder / f"{name}{path.suffix.lower()}"))
    with Image.open(path) as image:
        deep = decode(image).deep
        upright = ImageOps.exif_transpose(image) if deep is None else Image.fromarray(deep)
        in_png = upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (upright if in_png else upright.convert("RGB")).save(folder / f"{name}.png")
    return folder / f"{name}.png"
