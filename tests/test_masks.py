"""Masks keep every grey level both ways, agree with Label Studio's own converter, and refuse damage."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from label_studio_sdk.converter import brush
from PIL import Image

from benchmarks.masks import compare, random_mask, soft_mask
from labeling.masks import PNG_PREFIX, PNG_SIGNATURE, decode_png, decode_rle, encode_png, encode_rle


def literal_rle(values: np.ndarray, sizes: tuple[int, int, int, int] = (3, 4, 8, 16)) -> list[int]:
    """RGBA values in the browser's manner, which writes single values as literal runs."""
    bits = f"{values.size:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    for begin in range(0, values.size, 8):
        part = values[begin : begin + 8]
        index = begin // 8 % 4  # all four sizes
        if part.size == 8 and (part == part[0]).all():
            bits += f"1{index:02b}{7:0{sizes[index]}b}{part[0]:08b}"
        else:
            bits += f"0{index:02b}{part.size - 1:0{sizes[index]}b}" + "".join(f"{value:08b}" for value in part)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def test_rle_is_byte_identical_with_the_sdk_and_readable_by_it() -> None:
    """ABNLOOP_FUZZ=10000 compares that many masks."""
    rng = np.random.default_rng(0)
    for _ in range(int(os.environ.get("ABNLOOP_FUZZ", "200"))):
        compare(random_mask(rng))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 16383, 16384, 16385, 32768, 32769, 49153])
def test_rle_agrees_at_every_boundary_of_a_run_length(length: int) -> None:
    for before, after in ((0, 0), (1, 0), (3, 1)):
        mask = np.array([[9] * before + [200] * length + [7] * after], np.uint8)
        rle = encode_rle(mask)
        assert rle == brush.mask2rle(mask)
        assert np.array_equal(decode_rle(rle, 1, before + length + after), mask)


def test_literal_runs_as_a_browser_writes_them_are_read() -> None:
    rng = np.random.default_rng(1)
    for seed in range(60):
        mask = random_mask(rng)
        colours = np.tile(np.array([255, 45, 85, 0], np.uint8), (*mask.shape, 1))
        colours[..., 3] = mask
        sizes = ((3, 4, 8, 16), (3, 3, 7, 12), (16, 9, 5, 3))[seed % 3]
        rle = literal_rle(colours.ravel(), sizes)
        assert np.array_equal(brush.decode_rle(rle), colours.ravel())
        assert np.array_equal(decode_rle(rle, *mask.shape), mask)


def test_png_keeps_every_grey_level() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    url = encode_png(levels)
    assert np.array_equal(decode_png(url, 8, 32), levels)
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix(PNG_PREFIX)))) as image:
        assert np.array_equal(np.array(image.getchannel("A")), levels)


def test_a_png_from_a_browser_canvas_is_read_from_its_alpha() -> None:
    mask = soft_mask(50)[:30]
    rgba = np.dstack([np.full_like(mask, 255), np.zeros_like(mask), np.zeros_like(mask), mask])
    assert np.array_equal(decode_png(as_url(png(Image.fromarray(rgba))), 30, 50), mask)


def test_a_truncated_rle_is_refused_at_every_length() -> None:
    rle = encode_rle(soft_mask(20))
    for length in range(len(rle) - 2):
        with pytest.raises(ValueError):
            decode_rle(rle[:length], 20, 20)


def test_a_truncated_literal_rle_is_refused_at_every_length() -> None:
    rle = literal_rle(np.random.default_rng(0).integers(0, 256, 10 * 10 * 4))
    for length in range(len(rle) - 1):
        with pytest.raises(ValueError):
            decode_rle(rle[:length], 10, 10)


def test_a_damaged_rle_is_a_value_error_or_a_mask_of_the_right_size() -> None:
    rng = np.random.default_rng(2)
    sound = encode_rle(soft_mask(24))
    refused = 0
    for _ in range(1000):
        rle = list(sound)
        for at in rng.integers(0, len(rle), rng.integers(1, 5)):
            rle[at] = int(rng.integers(0, 256))
        try:
            assert decode_rle(rle, 24, 24).shape == (24, 24)
        except ValueError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "rle",
    [
        [],
        [0] * 6,
        [255] * 100,
        [0, 0, 1, 144] + [300] * 50,
        [0, 0, 1, 144] + ["a"] * 50,
        [0, 0, 1, 144] + [1.5] * 50,
        [0] * 10_000_000,
        "not a list",
        None,
        {"0": 1},
    ],
    ids=lambda rle: str(rle)[:30],
)
def test_what_is_no_rle_is_refused(rle: object) -> None:
    with pytest.raises(ValueError):
        decode_rle(rle, 10, 10)  # type: ignore[arg-type]


def test_an_rle_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="claims 1600 values, but a 10 x 20 mask has 800"):
        decode_rle(encode_rle(np.zeros((20, 20), np.uint8)), 20, 10)


def test_a_huge_claimed_size_is_refused_before_anything_is_made() -> None:
    rle = encode_rle(np.zeros((20, 20), np.uint8))
    rle[:4] = [255, 255, 255, 255]
    with pytest.raises(ValueError, match="claims 4294967295 values"):
        decode_rle(rle, 20, 20)
    with pytest.raises(ValueError, match="not supported"):
        decode_rle(rle, 100_000, 100_000)


@pytest.mark.parametrize("length", ["1", "65536"])
def test_no_stream_needs_more_memory_than_its_picture(length: str) -> None:
    """Runs as short as they may be, and the longest stream that is not refused at once."""
    height = width = 64
    size = int(length).bit_length() - 1 or 1
    sizes = (size - 1) << 12 | (size - 1) << 8 | (size - 1) << 4 | (size - 1)
    header = (height * width * 4 << 21 | 7 << 16 | sizes).to_bytes(7, "big")
    header = (int.from_bytes(header, "big") << 3).to_bytes(7, "big")
    for filling in (0b10000000, 0b00000000, 0b11111111):
        rle = list(header) + [filling] * (height * width * 8)
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            decode_rle(rle, height, width)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500 * height * width


def test_a_png_that_unfolds_beside_its_pixels_needs_no_memory_for_it() -> None:
    pixels = zlib.compress(bytes(50_000_000), 9)
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 20, 8, 6, 0, 0, 0))
    for name, data in ((b"IDAT", pixels), (b"zTXt", b"k\0\0" + pixels), (b"iCCP", b"k\0\0" + pixels)):
        bomb = PNG_SIGNATURE + ihdr + chunk(name, data) + chunk(b"IDAT", zlib.compress(bytes(20 * 81)))
        tracemalloc.start()
        with contextlib.suppress(ValueError):
            decode_png(as_url(bomb + chunk(b"IEND", b"")), 20, 20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20_000_000


def test_a_png_of_another_size_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="60000 x 60000, but the picture is 30 x 20"):
        decode_png(as_url(bomb), 20, 30)


def test_a_damaged_png_is_a_value_error() -> None:
    rng = np.random.default_rng(3)
    sound = base64.b64decode(encode_png(soft_mask(20)).removeprefix(PNG_PREFIX))
    for length in range(0, len(sound), 3):
        with pytest.raises(ValueError):
            decode_png(as_url(sound[:length]), 20, 20)
    for _ in range(500):
        data = bytearray(sound)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            data[at] = rng.integers(0, 256)
        try:
            assert decode_png(as_url(bytes(data)), 20, 20).shape == (20, 20)
        except ValueError:
            pass


def test_a_png_whose_chunks_do_not_fit_each_other_is_a_value_error() -> None:
    """With a right checksum each: Pillow then fails wherever it happens to, with an AssertionError too."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rng = np.random.default_rng(4)
    pixels = zlib.compress(bytes(20 * 21 * 4))
    refused = 0
    for _ in range(2000):
        depth, colour = rng.choice([1, 2, 4, 8, 16]), rng.choice([0, 2, 3, 4, 6])
        header = struct.pack(">IIBBBBB", 20, 20, depth, colour, 0, 0, int(rng.integers(0, 2)))
        extra = [(kind, rng.bytes(int(rng.integers(0, 12)))) for kind in (b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP")]
        chosen = [chunk(*one) for one in extra if rng.random() < 0.4]
        data = PNG_SIGNATURE + chunk(b"IHDR", header) + b"".join(chosen) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        try:
            assert decode_png(as_url(data), 20, 20).shape == (20, 20)
        except ValueError:
            refused += 1
    assert 500 < refused < 2000


def test_what_is_no_png_is_refused() -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (20, 20)).save(jpeg, "JPEG")
    opaque = png(Image.new("RGB", (20, 20)))
    for url in (None, 3, "", "data:image/png;base64,", PNG_PREFIX + "%%%", "http://a/b.png", as_url(jpeg.getvalue())):
        with pytest.raises(ValueError):
            decode_png(url, 20, 20)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no alpha channel"):
        decode_png(as_url(opaque), 20, 20)
    with pytest.raises(ValueError, match="more than"):
        decode_png(PNG_PREFIX + "A" * 1_000_000, 20, 20)


@pytest.mark.parametrize("mask", [np.zeros((0, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((4, 4), np.float32)])
def test_what_is_no_mask_is_refused(mask: np.ndarray) -> None:
    for encode in (encode_rle, encode_png):
        with pytest.raises(ValueError, match="a mask is"):
            encode(mask)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_url(data: bytes) -> str:
    return PNG_PREFIX + base64.b64encode(data).decode()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
