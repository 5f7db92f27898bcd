"""Masks to and from Label Studio: Brush RLE and Bitmask PNG, 256 grey levels kept exactly.

A mask is (height, width) uint8, 0..255. Brush RLE is a stream of bits over the picture's RGBA values,
row by row (https://github.com/thi-ng/umbrella, package rle-pack): 32 bits number of values, 5 bits word
size - 1, four times 4 bits run size - 1; then runs. A run is 1 bit (1: one value repeated, 0: that many
values follow), 2 bits that name one of the four sizes, as many bits of length - 1, and the value or
values. Only the alpha channel carries the mask. A Bitmask is a PNG data URL with the mask in alpha.

Whatever a labeler's browser or a plugin may have stored, decoding returns a mask or raises ValueError.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
from array import array
from collections.abc import Sequence

import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
HEADER_BITS = 32 + 5 + 4 * 4
WORD_SIZE = 8
RUN_SIZES = (3, 4, 8, 16)
PNG_PREFIX = "data:image/png;base64,"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"


def encode_rle(mask: np.ndarray) -> list[int]:
    """Brush RLE of `mask`, byte for byte what label_studio_sdk.converter.brush.mask2rle makes."""
    pixels = _checked_mask(mask).ravel()
    last = np.append(np.flatnonzero(pixels[1:] != pixels[:-1]), pixels.size - 1)
    values = pixels[last].astype(np.uint64)
    lengths = np.diff(last, prepend=-1) * 4  # four channels a pixel

    # The longest run is 65536 values; a longer one is several full runs and the rest, which keep its size's name.
    size = np.searchsorted([8, 16, 256], lengths)
    full = (lengths - 1) >> 16
    if full.any():
        values, size = np.repeat(values, full + 1), np.repeat(size, full + 1)
        rest = lengths - (full << 16)
        lengths = np.full(values.size, 1 << 16)
        lengths[np.cumsum(full + 1) - 1] = rest

    bits = np.array(RUN_SIZES)[size]
    code = (((4 | size).astype(np.uint64) << bits.astype(np.uint64)) | (lengths - 1).astype(np.uint64)) << np.uint64(8)
    code |= values
    width = 3 + bits + WORD_SIZE
    end = HEADER_BITS + np.cumsum(width)
    start = end - width

    # The reference always pads, by a whole byte where the stream already ends on one.
    packed = np.zeros(int(end[-1]) // 8 + 1 + 4, np.uint8)
    # A code is 14 to 27 bits: it touches at most 5 bytes, and no two codes begin in the same byte, so the
    # codes' first bytes can be joined in all at once, then their second bytes, and so on.
    window = (code << (64 - (start & 7) - width).astype(np.uint64)).astype(">u8").view(np.uint8).reshape(-1, 8)
    first = start >> 3
    for byte in range(5):
        packed[first + byte] |= window[:, byte]
    header = pixels.size * 4 << 21 | (WORD_SIZE - 1) << 16
    for index, run_size in enumerate(RUN_SIZES):
        header |= (run_size - 1) << (12 - 4 * index)
    # The header's 53 bits end inside a byte that the first run begins in.
    packed[:7] |= np.frombuffer((header << 3).to_bytes(7, "big"), np.uint8)
    return list(packed[:-4].tobytes())


def decode_rle(rle: Sequence[int], height: int, width: int) -> np.ndarray:
    """The mask in a Brush RLE, which must be that of a picture of `height` x `width` pixels.

    Raises ValueError for a stream that is truncated, claims another size, or is not such a stream.
    """
    count = _checked_size(height, width) * 4
    # A single value costs 14 bits, the last one at most 27; a longer list is no mask of this size, and eats memory.
    if not isinstance(rle, (list, tuple)) or not HEADER_BITS // 8 < len(rle) <= count * 2 + 16:
        raise ValueError(f"the RLE is no list of a length that a {width} x {height} mask can have")
    try:
        data = bytes(rle)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the RLE holds something else than whole numbers 0..255: {error}") from error

    header = int.from_bytes(data[:7], "big") >> 3
    claimed, word_size = header >> 21, (header >> 16 & 31) + 1
    sizes = [(header >> shift & 15) + 1 for shift in (12, 8, 4, 0)]
    if claimed != count:
        raise ValueError(f"the RLE claims {claimed} values, but a {width} x {height} mask has {count}")
    if word_size != WORD_SIZE:
        raise ValueError(f"the RLE has values of {word_size} bits; only 8 are a mask")

    stream = np.frombuffer(data + bytes(4), np.uint8)
    at = _run_positions(stream, len(data) * 8, sizes)
    size = np.array(sizes)[_read(stream, at, 3) & 3]
    ends = np.cumsum((_read(stream, at + 3, 16) >> (16 - size)) + 1)
    used = int(np.searchsorted(ends, count)) + 1
    if used > ends.size or ends[used - 1] != count:
        raise ValueError(f"the RLE is truncated or damaged: its runs do not add up to {count} values")
    at, size, ends = at[:used], size[:used], ends[:used]
    first = at + 3 + size  # where the values of a run begin
    # Channel 3 of pixel k is value 4k + 3, so of a run that ends before value `end`, end // 4 pixels are done.
    pixels = np.diff(ends // 4, prepend=0)
    mask = np.repeat(_read(stream, first, WORD_SIZE).astype(np.uint8), pixels)
    literal = _read(stream, at, 1) == 0
    if literal.any():
        inside = np.flatnonzero(np.repeat(literal, pixels))
        begin = np.append(0, ends[:-1])  # the first value of each run
        start = np.repeat((first - begin * WORD_SIZE)[literal], pixels[literal])
        mask[inside] = _read(stream, start + (4 * inside + 3) * WORD_SIZE, WORD_SIZE)
    return mask.reshape(height, width)


def encode_png(mask: np.ndarray) -> str:
    """`mask` as a PNG data URL: white, with the mask in alpha."""
    alpha = _checked_mask(mask)
    buffer = io.BytesIO()
    grey_alpha = np.stack([np.full_like(alpha, 255), alpha], axis=-1)
    Image.fromarray(grey_alpha, "LA").save(buffer, "PNG", compress_level=4)
    return PNG_PREFIX + base64.b64encode(buffer.getvalue()).decode()


def decode_png(url: str, height: int, width: int) -> np.ndarray:
    """The mask in the alpha of a PNG data URL, which must be of `height` x `width` pixels.

    Raises ValueError where it is no PNG, has another size (looked up before any pixel is decoded), has no
    alpha channel, or is damaged.
    """
    pixels = _checked_size(height, width)
    if not isinstance(url, str) or not url.startswith(PNG_PREFIX):
        raise ValueError(f"the bitmask is no PNG data URL: {str(url)[:40]!r}")
    # 8 bytes a pixel is the fattest PNG there is, and base64 makes 4 of 3.
    if len(url) > pixels * 11 + 100_000:
        raise ValueError(f"the bitmask's {len(url)} characters are more than a {width} x {height} PNG can need")
    try:
        data = base64.b64decode(url[len(PNG_PREFIX) :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the bitmask is not base64: {error}") from error
    if len(data) < 24 or not data.startswith(PNG_SIGNATURE) or data[12:16] != b"IHDR":
        raise ValueError("the bitmask is not a PNG")
    if not data.endswith(PNG_END):
        raise ValueError("the bitmask is a truncated PNG")
    claimed = struct.unpack(">II", data[16:24])
    if claimed != (width, height):
        raise ValueError(f"the bitmask is {claimed[0]} x {claimed[1]}, but the picture is {width} x {height}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if not image.has_transparency_data:
                raise ValueError("the PNG has no alpha channel")
            return np.array(image.convert("RGBA").getchannel("A"))
    except Exception as error:  # of a malformed file Pillow raises whatever its decoder met, AssertionError too
        raise ValueError(f"the bitmask is damaged: {error or type(error).__name__}") from error


def _run_positions(stream: np.ndarray, end: int, sizes: list[int]) -> np.ndarray:
    """Where each run begins, in bits; a run that is cut short is left out.

    Where a run begins depends on all before it, so this is a loop, kept to one look-up and one addition a run: the
    length that a repeating run would have is worked out for every bit at once. 0: a literal run.
    """
    bits = np.unpackbits(stream)
    repeated = bits << 2
    repeated[:-1] |= bits[1:] << 1
    repeated[:-2] |= bits[2:]
    data = stream.tobytes()
    table = np.array([0] * 4 + [3 + size + WORD_SIZE for size in sizes], np.uint8)
    step = table[repeated].tobytes()
    positions = array("q")
    append = positions.append
    at = HEADER_BITS
    while at < end:
        append(at)
        if length := step[at]:
            at += length
        else:
            window = int.from_bytes(data[at >> 3 : (at >> 3) + 4], "big") >> (13 - (at & 7))  # 19 bits
            size = sizes[window >> 16 & 3]
            at += 3 + size + (((window & 0xFFFF) >> (16 - size)) + 1) * WORD_SIZE
    if at > end and positions:
        positions.pop()  # the padding, or a run cut short
    return np.array(positions, np.int64)


def _read(stream: np.ndarray, at: np.ndarray, amount: int) -> np.ndarray:
    """The `amount` <= 16 bits that begin at each bit position `at`, as int64."""
    byte = at >> 3
    window = stream[byte].astype(np.int64) << 16 | stream[byte + 1].astype(np.int64) << 8 | stream[byte + 2]
    return window >> (24 - amount - (at & 7)) & ((1 << amount) - 1)


def _checked_mask(mask: np.ndarray) -> np.ndarray:
    if mask.ndim != 2 or mask.dtype != np.uint8 or mask.size == 0:
        raise ValueError(f"a mask is (height, width) uint8, not {mask.shape} {mask.dtype}")
    _checked_size(*mask.shape)
    return np.ascontiguousarray(mask)


def _checked_size(height: int, width: int) -> int:
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels is not supported; up to {MAX_PIXELS} pixels are")
    return height * width
