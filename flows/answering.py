"""What the champion answers about pictures that are not the workspace's own, one by one or by the folder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from abn.attention import disagreement
from abn.config import load_section
from abn.data import resize_image
from abn.images import decode
from abn.train import TrainConfig, choose_device
from flows.champion import Promoted, load_promoted
from flows.pictures import thumbnail
from flows.workspace import Workspace, write_atomically
from labeling.tasks import heatmap

# What Pillow may try: formats of photographs, none of which runs a program or reads another file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 20_000_000  # of a picture's file
MAX_PIXELS = 50_000_000  # of a picture; a small file may unpack to gigabytes
BATCH = 32  # pictures that the network sees at once
SHOWN = 512  # pixels, the longer side at which a map is drawn over its picture


@dataclass(frozen=True)
class Picture:
    """A picture that was decoded once, upright, and what is needed of it from then on."""

    name: str
    file: bytes = field(repr=False)
    suffix: str  # that its format goes by, such as .png
    sha256: str  # of what it shows: the same for the same pixels in whatever file
    shown: np.ndarray = field(repr=False)  # (H, W, 3) uint8, at most SHOWN pixels a side
    seen: torch.Tensor = field(repr=False)  # (3, h, w) uint8, as the network sees it
    thumbnail: np.ndarray = field(repr=False)  # (16, 16) uint8, grey: tells near-duplicates


class Answer(NamedTuple):
    probabilities: dict[str, float]  # 0..1 by class, the most probable first
    disagreement: float  # of the network's two branches, 0..1 (Jensen-Shannon, bits); higher: a doubtful map
    attention_map: np.ndarray  # (i, j) float32, 0..1

    @property
    def predicted(self) -> str:
        return next(iter(self.probabilities))

    @property
    def confidence(self) -> float:
        return self.probabilities[self.predicted]


class Refused(NamedTuple):
    """A picture that cannot be answered, and why."""

    name: str
    why: str


def load_champion(place: Workspace) -> Promoted:
    """The promoted model, on the device that training uses. Raises ValueError before the first promotion."""
    if not place.champion.is_file():
        raise ValueError("no model has been promoted yet; open a round with `abnloop round open`")
    champion = load_promoted(place)
    champion.network.to(choose_device(load_section(TrainConfig, place.params, "train").device))
    return champion


def read_picture(name: str, file: bytes, size: tuple[int, int]) -> Picture | Refused:
    """The picture in `file`, ready for a network that sees (height, width) `size`; or why it is refused."""
    if len(file) > MAX_BYTES:
        return Refused(name, f"{len(file) / 1e6:.1f} MB; the limit is {MAX_BYTES // 10**6} MB a picture")
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = f"the limit is {MAX_PIXELS // 10**6} megapixels"
                return Refused(name, f"{image.width} x {image.height} pixels; {limit}")
            suffix = ".jpg" if image.format in ("JPEG", "MPO") else f".{str(image.format).lower()}"
            decoded = decode(image)
            pixels = decoded.rgb
            return Picture(
                name=name,
                file=file,
                suffix=suffix,
                sha256=decoded.content,
                shown=_at_most(pixels, SHOWN),
                seen=resize_image(pixels, size),
                thumbnail=thumbnail(pixels),
            )
    except Image.UnidentifiedImageError:
        return Refused(name, f"no picture of a known format ({', '.join(FORMATS)})")
    except Exception as error:  # noqa: BLE001 - on a broken file Pillow's decoders raise nearly anything
        return Refused(name, f"cannot be decoded: {error}")


@torch.inference_mode()
def answer(champion: Promoted, pictures: Sequence[Picture]) -> list[Answer]:
    """One answer a picture; all pictures are seen by the network at once."""
    device = next(champion.network.parameters()).device
    output = champion.network(torch.stack([picture.seen for picture in pictures]).to(device).float() / 255)
    shares, second = (
        logits.float().softmax(dim=1).cpu().numpy() for logits in (output.logits, output.attention_logits)
    )
    apart, maps = disagreement(shares, second), output.attention_map[:, 0].float().cpu().numpy()
    answers = []
    for row in range(len(pictures)):
        ranked = sorted(zip(champion.classes, shares[row].tolist(), strict=True), key=lambda pair: -pair[1])
        answers.append(Answer(dict(ranked), float(apart[row]), maps[row]))
    return answers


def answer_all(champion: Promoted, files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[Picture, Answer] | Refused]:
    """Answers in the order of `files`, (name, content) each; memory does not grow with their number."""
    waiting = iter(files)
    while batch := [read_picture(name, file, champion.size) for name, file in islice(waiting, BATCH)]:
        readable = [picture for picture in batch if isinstance(picture, Picture)]
        answered = iter(answer(champion, readable) if readable else [])
        for picture in batch:
            yield (picture, next(answered)) if isinstance(picture, Picture) else picture


def as_row(one: tuple[Picture, Answer] | Refused) -> dict[str, Any]:
    """An answer in plain values; every key is always there."""
    row: dict[str, Any] = {"picture": "", "predicted": "", "confidence": None, "disagreement": None}
    row |= {"probabilities": {}, "map": "", "error": ""}
    if isinstance(one, Refused):
        return {**row, "picture": one.name, "error": one.why}
    picture, answer = one
    named = {"predicted": answer.predicted, "confidence": answer.confidence, "disagreement": answer.disagreement}
    return {**row, "picture": picture.name, **named, "probabilities": answer.probabilities}


def map_png(attention_map: np.ndarray, over: np.ndarray | None = None) -> bytes:
    """The map as a grey PNG at its own size, 0..255; or in colours, blue to red, `over` its picture (H, W, 3) uint8."""
    drawn = (attention_map * 255).round().astype(np.uint8) if over is None else heatmap(over, attention_map)
    content = io.BytesIO()
    Image.fromarray(drawn).save(content, "PNG")
    return content.getvalue()


def files_below(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and in the folders among them, however deep; hidden ones are left out.

    Raises ValueError for a path that is not there, or where there is no file at all.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; name pictures, or folders of pictures")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                found.append(file)
    if not found:
        raise ValueError(f"there are no files in {', '.join(map(str, paths))}")
    return found


def write_maps(folder: Path, pictures: Sequence[Path]) -> Callable[[Picture, Answer], Path]:
    """Draws maps over their pictures into `folder`, laid out as the `pictures` are below what they have in common."""
    common = Path(os.path.commonpath([path.resolve().parent for path in pictures]))

    def write(picture: Picture, answer: Answer) -> Path:
        below = Path(picture.name).resolve().relative_to(common)
        path = folder / below.with_name(f"{below.name}.png")
        write_atomically(path, map_png(answer.attention_map, over=picture.shown))
        return path

    return write


def _at_most(pixels: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.array(image)
