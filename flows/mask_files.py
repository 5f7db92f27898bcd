"""The user's mask files: which belongs to which image, and which of its pixels mark the object."""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps

from abn.images import is_turned
from flows.file_names import is_passed_over, shown, text_of

LOSSY = ("JPEG", "MPO", "WEBP")  # formats in which flat colours are noisy
FEW, MANY = 32, 1024  # colours, and values of 16 bits, up to which a mask is one of classes or instances
DARK = 16  # a brightest value below which nothing can be told in a lossy format
VOID, VOID_COLOUR = 255, (224, 224, 192)  # PASCAL VOC's index and RGB of a rim that is neither object nor ground


class MaskFolder:
    """Files of MASKS/, found by the path of their image without suffix, however its accents are composed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: defaultdict[tuple[str, ...], list[Path]] = defaultdict(list)
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not is_passed_over(name))
            for name in sorted(names):
                path = Path(parent, name)
                if not is_passed_over(name) and path.is_file():
                    self.files[_key(path.relative_to(folder))].append(path)
        self.asked: dict[tuple[str, ...], str] = {}
        self.marked = {stem_key: key for key in self.files if (stem_key := (*key[:-1], without_ending(key[-1]))) != key}
        self.by_ending: list[str] = []  # masks found by a name that ends like cat1_mask

    def of(self, image: PurePath, label: str) -> Path | None:
        """The mask of an image at this path below its folder: MASKS/<path>, MASKS/<class>/<name> or, where MASKS has
        no folders, MASKS/<name>; any suffix."""
        key = _key(image)
        for one in (key, (_fold(label), key[-1]), (key[-1],)):
            if one in self.files:
                self.asked[one] = shown(str(image))
                return self.files[one][0]
        for one in (key, (_fold(label), key[-1]), (key[-1],)):
            if one in self.marked:
                found = self.files[self.marked[one]][0]
                self.asked[self.marked[one]] = shown(str(image))
                self.by_ending.append(str(found.relative_to(self.folder)))
                return found
        return None

    def repeated(self) -> Iterator[tuple[str, list[Path]]]:
        """(image, masks) where several files are the mask of one image."""
        for key, name in self.asked.items():
            if len(self.files[key]) > 1:
                yield name, [path.relative_to(self.folder) for path in self.files[key]]

    def unused(self, used: Container[Path]) -> list[Path]:
        """The files, below the folder, that are no image's mask."""
        repeated = {path for key in self.asked for path in self.files[key][1:]}
        files = [path for paths in self.files.values() for path in paths]
        return sorted(path.relative_to(self.folder) for path in files if path not in used and path not in repeated)


def without_ending(stem: str) -> str:
    """A file's stem without what names it a mask: cat1 for cat1_mask, cat1-seg or cat1_mask_2."""
    return re.sub(r"(?<=.)[_\-. ](masks?|seg|segm|segmentation|gt)([_-]?\d+)?$", "", stem, flags=re.IGNORECASE)


def _key(path: PurePath) -> tuple[str, ...]:
    return tuple(_fold(part) for part in (*path.parent.parts, path.stem))


def _fold(name: str) -> str:
    return text_of(name).casefold()


@dataclass(frozen=True)
class Mask:
    """A mask that was read, its pixels kept small."""

    packed: bytes
    height: int
    width: int
    share: float  # 0..1, of the pixels that are marked
    rim: float  # 0..1, of the pixels at the edge of the image that are marked
    kind: str  # how it was understood, as the report counts it

    @property
    def pixels(self) -> np.ndarray:
        """(height, width) uint8, 255 where the object is marked and 0 elsewhere."""
        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        flat = np.unpackbits(bits, count=self.height * self.width)
        return (flat * np.uint8(255)).reshape(self.height, self.width)


def pack(marked: np.ndarray, kind: str) -> Mask:
    """A bool mask (height, width)."""
    height, width = marked.shape
    rim = np.concatenate([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    packed = zlib.compress(np.packbits(marked).tobytes(), 1)
    return Mask(packed, height, width, float(marked.mean()), float(rim.mean()), kind)


def read_mask_file(path: Path) -> tuple[Image.Image, bool]:
    """The decoded mask as Pillow has it, and whether its format is lossy. A mask with an EXIF orientation is turned."""
    with Image.open(path) as image:
        lossy = image.format in LOSSY and image.info.get("lossless") is None
        image.load()
        return (ImageOps.exif_transpose(image) if is_turned(image) else image.copy()), lossy


def marked_pixels(image: Image.Image, lossy: bool) -> tuple[np.ndarray, str]:
    """Where a mask marks the object, bool (height, width), and how it was understood.

    Marked is whatever is not transparent and: of two values the brighter one; white in a mask of many values that are
    nearly black or nearly white; of index masks (palette, classes, instances, flat colours) all but 0 or black, and
    but VOC's rim. Raises ValueError where that does not say what is meant.
    """
    if image.mode in ("P", "PA", "RGB", "RGBA", "LA") or image.has_transparency_data:
        colours = np.asarray(image.convert("RGBA"))
        visible = colours[..., 3] > 127
        if not visible.all():
            return _on_transparency(colours[..., :3], visible)
        if image.mode in ("P", "PA"):
            return _of_palette(colours[..., :3], np.asarray(image.getchannel(0) if image.mode == "PA" else image))
        return _of_colours(colours[..., :3], lossy)
    if image.mode in ("1", "L") or image.mode[0] in "IF":
        return _of_values(np.asarray(image), lossy)
    return _of_colours(np.asarray(image.convert("RGB")), lossy)


def _on_transparency(colours: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, str]:
    if not visible.any():
        return visible, "drawn on transparency"
    used = _few_colours(np.where(visible[..., None], colours, colours[visible][0]))
    if used is None:
        raise ValueError("it has many colours on transparency; save it as 255 for the object and 0 for the ground")
    if len(used) > 1 and 0 in used:
        return visible & (colours.max(axis=-1) > 0), "colours on transparency, all but black"
    return visible, "drawn on transparency"  # also in black


def _of_palette(colours: np.ndarray, indexes: np.ndarray) -> tuple[np.ndarray, str]:
    black = colours.max(axis=-1) == 0
    used = _counts(indexes)
    if not black.any() and len(used) > 1:
        raise ValueError(
            f"it has {len(used)} colours of a palette, none of them black, so that nothing says which is the ground; "
            "save it as white on black"
        )
    void = indexes == VOID
    if not void.any() or not (~black & ~void).any():
        return ~black, _kind("palette", len(used), False)
    if tuple(colours[void][0]) != VOID_COLOUR:
        _check_void((~black & ~void).sum(), void.sum())
    return ~black & ~void, _kind("palette", len(used), True)


def _of_colours(colours: np.ndarray, lossy: bool) -> tuple[np.ndarray, str]:
    if (colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all():
        return _of_values(colours[..., 0], lossy)
    brightest = colours.max(axis=-1)
    used = None if lossy else _few_colours(colours)
    if used is None:
        return _of_values(brightest, True)
    if 0 not in used and len(used) > 1:
        raise ValueError(
            f"it has {len(used)} colours and none of them is black, so that nothing says which is the ground; "
            "save it as white on black"
        )
    void = (colours == VOID_COLOUR).all(axis=-1) & (len(used) > 2)
    return (brightest > 0) & ~void, _kind("colours", len(used), bool(void.any()))


def _of_values(values: np.ndarray, lossy: bool) -> tuple[np.ndarray, str]:
    counts = _counts(values)
    used = list(counts)
    lowest, highest = used[0], used[-1]
    if len(used) == 1:
        return values > 0, "one value"
    if lossy and highest < DARK:
        raise ValueError(
            f"its values, from {lowest} to {highest}, are nearly black in a format that does not keep them; "
            "save it as PNG, with the object at 255"
        )
    if not lossy and len(used) == 2 and (lowest == 0 or (lowest > 63 and highest > 127)):
        return values == highest, "two values"
    if not lossy and lowest == 0 and (indexes := _of_indexes(values, counts)):
        return indexes
    if not lossy and lowest > 0 and highest < 64:
        raise ValueError(f"it has the values {_told(used)} and no 0, so that nothing says which is the ground")
    between = sum(list(counts.values())[1:-1]) / values.size if len(used) <= 8 and not lossy else 0
    if between >= 0.02:
        raise ValueError(f"it has the values {_told(used)}; which of them are the object? save it as 0 and 255")
    low, high = (float(highest) * part for part in (0.125, 0.875))
    bright = sum(count for value, count in counts.items() if value > low)
    if sum(count for value, count in counts.items() if low < value < high) > 0.5 * bright:
        raise ValueError(
            f"its values, from {lowest} to {highest}, are neither two nor indexes of few classes; "
            "save it as 0 and 255, with the object at 255"
        )
    return values > highest / 2, "white on black, above half"


def _of_indexes(values: np.ndarray, counts: dict[float, int]) -> tuple[np.ndarray, str] | None:
    """All but 0 of a mask of class or instance numbers; None for one of other values."""
    highest = max(counts)
    if highest > 255:  # 16 bits: instances, unless most of what is not 0 is as bright as it can be
        between = sum(count for value, count in counts.items() if 0 < value < highest)
        if len(counts) > MANY or between <= counts[highest]:
            return None
        return values > 0, _kind("indexes", len(counts), False)
    rest = [value for value in counts if value not in (0, VOID)]
    if not rest or max(rest) > 63:
        return None
    if VOID not in counts:
        return values > 0, _kind("indexes", len(counts), False)
    _check_void(sum(counts[value] for value in rest), counts[VOID])
    return (values > 0) & (values != VOID), _kind("indexes", len(counts), True)


def _check_void(marked: int, void: int) -> None:
    """Raises ValueError where what may be VOC's rim is so large that it may be the object itself."""
    if marked < 0.1 * void:
        raise ValueError(
            f"it has the value {VOID} in {void} pixels and other small values in {marked}, so that it may be the "
            "object, or a rim as in PASCAL VOC; save it as 0 and 255"
        )


def _counts(values: np.ndarray) -> dict[float, int]:
    """How many pixels have each value that occurs, in ascending order."""
    if values.dtype == bool or values.dtype == np.uint8 or values.dtype == np.uint16:
        counted = np.bincount(values.ravel())
        return {int(value): int(counted[value]) for value in np.flatnonzero(counted)}
    used, counted = np.unique(values, return_counts=True)
    return dict(zip(used.tolist(), counted.tolist(), strict=True))


def _few_colours(colours: np.ndarray) -> set[int] | None:
    """The colours (H, W, 3) as 0xRRGGBB, or None where they are more than FEW."""
    used = Image.fromarray(np.ascontiguousarray(colours)).getcolors(FEW)
    if used is None:
        return None
    parts = np.array([colour for _, colour in used])
    return set((parts @ np.array([65536, 256, 1])).tolist())


def _kind(what: str, values: int, void: bool) -> str:
    if values <= 2:
        return "two values"
    return f"{what}, all but {'0' if what == 'indexes' else 'black'}" + (" and VOC's rim" if void else "")


def _told(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")
