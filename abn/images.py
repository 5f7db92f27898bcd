"""Decoding of images, the same for hashing, training, answering and serving."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import ExifTags, Image, ImageOps

BACKGROUND = 255  # of each of R, G and B, below transparent pixels: white, as a browser shows them
PAGED = ("TIFF", "GIF", "WEBP", "PNG")  # formats whose further pages are other images, not previews


@dataclass(frozen=True)
class Decoded:
    """An upright image as the network sees it."""

    rgb: UInt8[np.ndarray, "H W 3"]
    deep: UInt16[np.ndarray, "H W"] | None  # the values of a grey image of 16 bits, scaled to 0..65535
    bits: int  # that its values use: 8, or for a grey image of 16 bits 8, 12 or 16
    transparent: bool  # some pixels are, and were laid over BACKGROUND
    turned: bool  # by its EXIF orientation
    pages: int  # of the file; only the first one is read

    @property
    def content(self) -> str:
        """SHA-256 of what the image shows: alike for the same pixels in whatever file."""
        height, width, _ = self.rgb.shape
        mode, pixels = ("RGB", self.rgb) if self.deep is None else ("I;16", self.deep.astype("<u2"))
        digest = hashlib.sha256(f"{mode} {width} {height} ".encode())
        digest.update(pixels.tobytes())
        return digest.hexdigest()


def decode(image: Image.Image) -> Decoded:
    """The first page of an opened image: upright, alpha laid over white, 16 bits scaled by the bits that they use.

    Cameras, X-ray machines and microscopes write 12 bits into 16, so an image whose values stay below 4096 (256) is
    read as one of 12 (8) bits. Raises ValueError for 32 bits a channel, which do not say what is white, and whatever
    Pillow raises for a damaged file.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}); save it with 8 or 16")
    pages = int(getattr(image, "n_frames", 1)) if image.format in PAGED else 1
    image.seek(0)
    turned = is_turned(image)
    upright = ImageOps.exif_transpose(image) if turned else image
    if upright.mode.startswith("I;16"):
        deep, bits = _full_range(np.array(upright).astype(np.uint16))
        grey = (deep >> 8).astype(np.uint8)
        return Decoded(np.repeat(grey[..., None], 3, axis=2), deep, bits, False, turned, pages)
    rgb, transparent = _over_background(upright)
    return Decoded(rgb, None, 8, transparent, turned, pages)


def orientation(image: Image.Image) -> int:
    """EXIF's, 1..8: 1 is upright, from 5 on width and height change places. What is none counts as 1."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return int(found) if found in range(1, 9) else 1


def is_turned(image: Image.Image) -> bool:
    """Whether an EXIF orientation has to be applied."""
    return orientation(image) > 1


def read_rgb(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """The upright image in a file as RGB, 0..255."""
    with Image.open(path) as image:
        return decode(image).rgb


def upright_size(path: str | Path) -> tuple[int, int]:
    """Height and width in pixels of the upright image in a file, of which only the header is read."""
    with Image.open(path) as image:
        width, height = image.size
        lying = orientation(image) >= 5
    return (width, height) if lying else (height, width)


def _full_range(values: UInt16[np.ndarray, "H W"]) -> tuple[UInt16[np.ndarray, "H W"], int]:
    """Values of 8, 12 or 16 used bits as 0..65535, and how many they use. Scaling the result again changes nothing."""
    brightest = int(values.max(initial=0))
    if 16 <= brightest < 256:  # darker ones are black at any depth
        return values * np.uint16(257), 8
    if 256 <= brightest < 4096:
        return (values << 4) | (values >> 8), 12
    return values, 16


def _over_background(image: Image.Image) -> tuple[UInt8[np.ndarray, "H W 3"], bool]:
    """RGB of an image of 8 bits a channel, and whether any of its pixels is transparent."""
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")), False
    layers = np.array(image.convert("RGBA"))
    colours, alpha = layers[..., :3], layers[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(colours), False
    laid = (colours * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return laid.astype(np.uint8), True
