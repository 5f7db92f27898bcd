"""The user's mask files: which belongs to which image, and which of its pixels mark the object."""

from __future__ import annotations

import os
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image, ImageOps

LOSSY = ("JPEG", "MPO", "WEBP")  # formats in which flat colours are noisy
FEW = 32  # distinct values, up to which a mask is one of classes or instances
VOID = 255  # the index that PASCAL VOC gives to a rim that is neither object nor ground
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


class MaskFolder:
    """Files of MASKS/, found by the path of their image without suffix, however its accents are composed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: defaultdict[tuple[str, ...], list[Path]] = defaultdict(list)
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if name.casefold() not in SYSTEM and name[0] != ".")
            for name in sorted(names):
                path = Path(parent, name)
                if name.casefold() not in SYSTEM and name[0] != "." and path.is_file():
                    self.files[_key(path.relative_to(folder))].append(path)
        self.asked: dict[tuple[str, ...], str] = {}

    def of(self, image: PurePath, label: str) -> Path | None:
        """The mask of an image at this path below its folder: MASKS/<path>, MASKS/<class>/<name> or, where MASKS has
        no folders, MASKS/<name>; any suffix."""
        key = _key(image)
        for one in (key, (_fold(label), key[-1]), (key[-1],)):
            if one in self.files:
                self.asked[one] = os.fsencode(str(image)).decode("utf-8", "replace")
                return self.files[one][0]
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


def _key(path: PurePath) -> tuple[str, ...]:
    return tuple(_fold(part) for part in (*path.parent.parts, path.stem))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()


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
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return (ImageOps.exif_transpose(image) if turned else image.copy()), lossy


def marked_pixels(image: Image.Image, lossy: bool) -> tuple[np.ndarray, str]:
    """Where a mask marks the object, bool (height, width), and how it was understood.

    Marked is whatever is not transparent and: of two values the brighter one; white in a mask of many values that are
    nearly black or nearly white; of index masks (palette, classes, instances, flat colours) all but 0 or black, and
    but VOC's rim. Raises ValueError where that does not say what is meant.
    """
    if image.mode in ("P", "PA") or (image.mode in ("RGB", "RGBA", "LA") or image.has_transparency_data):
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
    seen = np.unique(colours[visible], axis=0)
    if len(seen) <= 1:  # one colour, also black: the drawing itself
        return visible, "drawn on transparency"
    if not seen.max(axis=1).min() == 0 and len(seen) > FEW:
        raise ValueError("it has many colours on transparency; save it as white on black")
    return visible & (colours.max(axis=-1) > 0), "colours on transparency, all but black"


def _of_palette(colours: np.ndarray, indexes: np.ndarray) -> tuple[np.ndarray, str]:
    black = colours.max(axis=-1) == 0
    used = np.unique(indexes)
    if not black.any() and len(used) > 1:
        raise ValueError(
            f"it has {len(used)} colours of a palette, none of them black, so that nothing says which is the ground; "
            "save it as white on black"
        )
    void = (indexes == VOID) & (len(np.unique(indexes[~black])) > 1)
    return ~black & ~void, _kind("palette", used, bool(void.any()))


def _of_colours(colours: np.ndarray, lossy: bool) -> tuple[np.ndarray, str]:
    if (colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all():
        return _of_values(colours[..., 0], lossy)
    if lossy:
        return _of_values(colours.max(axis=-1), True)
    packed = colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    used = np.unique(packed)
    if len(used) > FEW:
        return _of_values(colours.max(axis=-1), True)
    if 0 not in used:
        if len(used) == 1:
            return np.ones(packed.shape, bool), "one colour"
        raise ValueError(
            f"it has {len(used)} colours and none of them is black, so that nothing says which is the ground; "
            "save it as white on black"
        )
    void = (packed == 0xE0E0C0) & (len(used) > 2)  # VOC's colour for its rim
    return (packed > 0) & ~void, _kind("colours", used, bool(void.any()))


def _of_values(values: np.ndarray, lossy: bool) -> tuple[np.ndarray, str]:
    used, counts = np.unique(values, return_counts=True)
    lowest, highest = used[0], used[-1]
    if len(used) == 1:
        return values > 0, "one value"
    if not lossy:
        if len(used) == 2 and (lowest == 0 or (lowest > 63 and highest > 127)):
            return values == highest, "two values"
        top = 65535 if highest > 255 else 255
        rest = used[used != VOID] if top == 255 else used
        flat = len(used) <= (FEW if top == 255 else 1024) and lowest == 0
        if flat and (rest[-1] < 64 or (top == 65535 and counts[(used > 0) & (used < top)].sum() > counts[-1])):
            void = (values == VOID) & (len(rest) > 1) & (top == 255) & (rest[-1] > 0)
            return (values > 0) & ~void, _kind("indexes", used, bool(np.any(void)))
        if lowest > 0 and highest < 64:
            raise ValueError(f"it has the values {_told(used)} and no 0, so that nothing says which is the ground")
        between = counts[1:-1].sum() / values.size if len(used) <= 8 else 0
        if between >= 0.02:
            raise ValueError(f"it has the values {_told(used)}; which of them are the object? save it as 0 and 255")
    low, high = (float(highest) * part for part in (0.125, 0.875))
    bright = counts[used > low].sum()
    if highest < 16 and lossy:
        return np.zeros(values.shape, bool), "nearly black"
    if counts[(used > low) & (used < high)].sum() > 0.5 * bright:
        raise ValueError(
            f"its values, from {lowest} to {highest}, are neither two nor indexes of few classes; "
            "save it as 0 and 255, with what is the object at 255"
        )
    return values > highest / 2, "white on black, above half"


def _kind(what: str, used: np.ndarray, void: bool) -> str:
    if len(used) <= 2:
        return "two values"
    return f"{what}, all but {'0' if what == 'indexes' else 'black'}" + (" and VOC's rim" if void else "")


def _told(values: np.ndarray) -> str:
    return ", ".join(str(value) for value in values[:6]) + (", ..." if len(values) > 6 else "")
