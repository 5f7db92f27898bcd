"""Composes Waterbirds, birds of your own CUB-200-2011 folder before backgrounds of your own Places365 folder.

    python -m benchmarks.waterbirds --cub CUB_200_2011 --places data_large --out waterbirds-100 --correlation 1.0

OUT gets index.csv, images/ and masks/, as `abnloop init` and `benchmarks.correction --path` take them, and a column
`background` for the worst group. CUB needs its segmentations, which come as an archive of their own.

As Sagawa et al., ICLR 2020, compose it: waterbirds are seabirds and waterfowl, backgrounds of water are `ocean` and
`lake/natural`, of land `bamboo_forest` and `forest/broadleaf`, each used once. In training a share `--correlation` of
each class stands before its own kind of background (0.95 for Waterbirds-95, 1.0 for the Waterbirds-100 of Petryk et
al., CVPR 2022), in val and test half of it. A fifth of CUB's training pictures is val. Which bird gets which background
is drawn anew, so that pictures differ from those of the published archives, and figures by what the draw is worth.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Parts of the species' names. As in the published data they are looked for anywhere in a name, so that `tern` also
# makes waterbirds of Eastern Towhee, Western Meadowlark and Western Wood Pewee: with the labels mended, figures would
# not compare.
SEABIRDS = (
    *("albatross", "auklet", "cormorant", "frigatebird", "fulmar", "guillemot", "gull", "jaeger", "kittiwake"),
    *("pacific_loon", "pelican", "puffin", "tern"),
)
WATERFOWL = ("gadwall", "grebe", "mallard", "merganser")
PLACES = {"land": ("bamboo_forest", "forest/broadleaf"), "water": ("ocean", "lake/natural")}
CLASSES = {"land": "landbird", "water": "waterbird"}  # by the background that they belong to
VAL = 0.2  # of the training pictures
QUALITY = 95  # of the JPEG files


@dataclass(frozen=True)
class Bird:
    name: str  # of the file below images/, such as 001.Black_footed_Albatross/Black_Footed_Albatross_0001.jpg
    kind: str  # land or water
    split: str


def read_birds(cub: Path, generator: np.random.Generator) -> list[Bird]:
    """The birds of CUB-200-2011 in its order, some of its training pictures as val. Raises ValueError where a file is
    missing."""
    names = dict(_pairs(cub / "images.txt"))
    training = [number for number, flag in _pairs(cub / "train_test_split.txt") if flag == "1"]
    val = set(generator.permutation(training)[: round(VAL * len(training))].tolist())
    splits = {number: "val" if number in val else "train" for number in training}
    return [Bird(name, _kind(name), splits.get(number, "test")) for number, name in names.items()]


def _kind(name: str) -> str:
    species = name.split("/")[0].partition(".")[2].lower()
    return "water" if any(part in species for part in SEABIRDS + WATERFOWL) else "land"


def _pairs(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder CUB_200_2011 with --cub")
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(number, rest) for number, _, rest in (line.strip().partition(" ") for line in lines) if rest]


def choose_backgrounds(birds: Sequence[Bird], correlation: float, generator: np.random.Generator) -> list[str]:
    """The kind of background of each bird, land or water."""
    chosen = [""] * len(birds)
    for split in ("train", "val", "test"):
        own = correlation if split == "train" else 0.5
        for kind, other in (("land", "water"), ("water", "land")):
            rows = [row for row, bird in enumerate(birds) if (bird.split, bird.kind) == (split, kind)]
            shuffled = generator.permutation(len(rows)).tolist()
            for place, row in zip(shuffled, rows, strict=True):
                chosen[row] = kind if place < round(own * len(rows)) else other
    return chosen


def find_places(places: Path, kind: str, count: int, generator: np.random.Generator) -> list[Path]:
    """`count` pictures of a kind of background, shuffled. Raises ValueError where there are fewer."""
    found = []
    for name in PLACES[kind]:
        folder = places / name[0] / name
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; name Places365's folder of letters (a/, b/, ...) with --places")
        found += sorted(folder.glob("*.jpg"))
    if len(found) < count:
        names = " and ".join(PLACES[kind])
        raise ValueError(f"{places} has {len(found)} pictures of {names}, {count} are needed; add some")
    return [found[row] for row in generator.permutation(len(found))[:count].tolist()]


def compose(bird: Image.Image, segmentation: Image.Image, place: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The bird before the place, as large as the bird's picture, and its mask, 0 or 255.

    The place is scaled until it covers the picture, and its middle is taken. Where annotators disagreed about a pixel,
    as the grey of the segmentation tells, bird and place are blended; the mask holds what most of them marked.
    """
    background = ImageOps.fit(place.convert("RGB"), bird.size, Image.Resampling.LANCZOS)
    alpha = segmentation.convert("L")
    return Image.composite(bird.convert("RGB"), background, alpha), alpha.point(lambda level: 255 * (level > 127))


def write(cub: Path, places: Path, out: Path, correlation: float, seed: int) -> dict[tuple[str, str, str], int]:
    """Composes the data set at `out`; how many pictures there are by split, class and background.

    Raises ValueError for what does not fit, before anything is written.
    """
    if not 0.5 <= correlation <= 1:
        raise ValueError(f"--correlation is {correlation}; it must be from 0.5 to 1")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists already; name a new folder with --out")
    generator = np.random.default_rng(seed)
    birds = read_birds(cub, generator)
    backgrounds = choose_backgrounds(birds, correlation, generator)
    files = {kind: iter(find_places(places, kind, backgrounds.count(kind), generator)) for kind in PLACES}
    missing = [bird.name for bird in birds if not (cub / "segmentations" / _png(bird.name)).is_file()]
    if missing:
        raise ValueError(f"{cub}/segmentations lacks {_png(missing[0])}; unpack CUB's segmentations.tgz there")
    counts: dict[tuple[str, str, str], int] = {}
    rows = []
    for bird, background in zip(birds, backgrounds, strict=True):
        with (
            Image.open(cub / "images" / bird.name) as image,
            Image.open(cub / "segmentations" / _png(bird.name)) as segmentation,
            Image.open(next(files[background])) as place,
        ):
            picture, mask = compose(image, segmentation, place)
        row = {"image": f"images/{bird.name}", "mask": f"masks/{_png(bird.name)}"}
        for made, name in ((picture, row["image"]), (mask, row["mask"])):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            made.save(out / name, quality=QUALITY)
        rows.append({**row, "label": CLASSES[bird.kind], "split": bird.split, "background": background})
        group = (bird.split, CLASSES[bird.kind], background)
        counts[group] = counts.get(group, 0) + 1
    with (out / "index.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "label", "split", "mask", "background"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return counts


def _png(name: str) -> str:
    return str(Path(name).with_suffix(".png"))


def print_counts(counts: Mapping[tuple[str, str, str], int]) -> None:
    for (split, label, background), count in sorted(counts.items()):
        print(f"{split:5}  {label:9}  before {background:5}  {count:5}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.waterbirds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cub", type=Path, required=True, help="the folder CUB_200_2011, with segmentations/ in it")
    add("--places", type=Path, required=True, help="Places365's folder of letters: b/bamboo_forest, ...")
    add("--out", type=Path, required=True, help="a new folder")
    add("--correlation", type=float, default=1.0, help="of class and background in training (1.0)")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        print_counts(write(options.cub, options.places, options.out, options.correlation, options.seed))
    except ValueError as error:
        sys.exit(f"benchmarks.waterbirds: {error}")


if __name__ == "__main__":
    main()
