"""Pictures of what models look at, and of what training inferred: a row a sample, the picture first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from abn.data import resize_mask
from abn.images import read_rgb
from abn.inferred import Inferred
from abn.manifest import MaskShards, Sample
from abn.predictions import Predictions
from labeling.tasks import heatmap

TILE, LINE, GAP = 128, 18, 6  # pixels: the larger side of a picture, a line of text, what lies between two pictures
RIGHT, WRONG = (30, 130, 70), (200, 50, 60)  # answers, in RGB; what misleads is as red


def gold_rows(predictions: Predictions, count: int, seed: int = 0) -> list[int]:
    """The same `count` samples of the gold set whatever the model: by id, drawn with `seed`."""
    rows = np.flatnonzero(predictions.has_gold)
    rows = rows[np.argsort(predictions.samples[rows])]
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())


def shown(root: Path, samples: Sequence[Sample], count: int, seed: int = 0) -> list[Sample]:
    """The same `count` of the samples whatever the models, those with a gold mask before others; by id."""
    shards, order = MaskShards(root), np.random.default_rng(seed).permutation(len(samples))
    by_id = sorted(samples, key=lambda sample: sample.id)
    drawn = sorted((by_id[i] for i in order), key=lambda sample: shards.gold(sample) is None)
    return sorted(drawn[:count], key=lambda sample: sample.id)


def map_tile(path: Path, attention_map: np.ndarray) -> np.ndarray:
    """The picture at `path` under its map, in the size of a tile."""
    return heatmap(tile(read_rgb(path)), attention_map)


def mask_tile(path: Path, mask: np.ndarray) -> np.ndarray:
    """The picture at `path` darkened outside the mask (h, w) uint8, in the size of a tile."""
    image = read_rgb(path)
    marked = resize_mask(mask, image.shape[:2])[0, ..., None].numpy() > 127
    return tile((image * (0.25 + 0.75 * marked)).astype(np.uint8))


def misled_tile(path: Path, misleads: np.ndarray) -> np.ndarray:
    """The picture at `path` with what misleads (h, w) uint8 in red, in the size of a tile."""
    image = tile(read_rgb(path))
    where = resize_mask(misleads, image.shape[:2])[0, ..., None].numpy() > 127
    return np.where(where, 0.4 * image + 0.6 * np.array(WRONG), image).astype(np.uint8)


def tile(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smooth = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize(size, smooth))


class Seen(NamedTuple):
    """What one model saw: its title above the column, and by sample id its attention map and its answer."""

    title: str
    maps: Mapping[str, np.ndarray]
    answers: Mapping[str, str]

    @classmethod
    def of(cls, title: str, names: Sequence[str], maps: np.ndarray, answers: Sequence[str]) -> Seen:
        """From columns: sample ids, and their maps (n, h, w) and answers in the same order."""
        return cls(title, dict(zip(names, maps, strict=True)), dict(zip(names, answers, strict=True)))


def gallery(root: Path, samples: Sequence[Sample], models: Sequence[Seen]) -> Image.Image:
    """A sample a row: the picture with its label, each model's map with its answer, and the gold mask, if any."""
    shards = MaskShards(root)
    masks = [shards.gold(sample) for sample in samples]
    masked = any(mask is not None for mask in masks)
    rows = [_titles("picture", *(model.title for model in models), *(["gold mask"] if masked else []))]
    for sample, mask in zip(samples, masks, strict=True):
        path = root / sample.image
        row = [_captioned(tile(read_rgb(path)), sample.label)]
        for model in models:
            answer = model.answers[sample.id]
            colour = RIGHT if answer == sample.label else WRONG
            row.append(_captioned(map_tile(path, model.maps[sample.id]), f"answers {answer}", colour))
        if mask is not None:
            row.append(_captioned(mask_tile(path, mask), ""))
        rows.append(row)
    return _on_white(rows)


def inferred_sheet(root: Path, samples: Mapping[str, Sample], inferred: Sequence[Inferred]) -> Image.Image:
    """A sample, by its id, a row: the picture with its label, the mask drawn for it and the trust in it, and what
    misleads, if anything was found in any of them."""
    found = any(one.misleads.any() for one in inferred)
    rows = [_titles("picture", "drawn mask", *(["misleads"] if found else []))]
    for name, mask, trust, misleads in inferred:
        path = root / samples[name].image
        drawn = f"trusted {trust:.2f}" if trust else "not trusted" if mask.any() else "none drawn"
        row = [_captioned(tile(read_rgb(path)), samples[name].label), _captioned(mask_tile(path, mask), drawn)]
        if found:
            share = (misleads > 127).mean()
            row.append(_captioned(misled_tile(path, misleads), f"{share:.1%}" if share else "nothing found"))
        rows.append(row)
    return _on_white(rows)


def _titles(*titles: str) -> list[Image.Image]:
    return [_captioned(np.full((1, TILE, 3), 255, np.uint8), title) for title in titles]


def _captioned(image: np.ndarray, text: str, colour: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """The image, as wide as a tile, with a line of text below it."""
    height, width = image.shape[:2]
    sheet = Image.new("RGB", (TILE, height + LINE), "white")
    sheet.paste(Image.fromarray(image), ((TILE - width) // 2, 0))
    font = ImageFont.load_default(12)
    ImageDraw.Draw(sheet).text((TILE // 2, height + 1), text[:22], colour, font, anchor="ma")
    return sheet


def _on_white(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    heights = [max(cell.height for cell in row) + GAP for row in rows]
    sheet = Image.new("RGB", (len(rows[0]) * (TILE + GAP), sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            sheet.paste(cell, (column * (TILE + GAP), sum(heights[:number])))
    return sheet
