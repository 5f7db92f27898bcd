"""What `init` makes of images, masks and tables as people have them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from abn.images import decode, read_rgb
from flows import cli
from flows.image_table import read_index, read_table
from flows.ingest import init_workspace
from flows.ingest_report import Report, Undecided
from flows.mask_files import MaskFolder, marked_pixels
from flows.pictures import copy_picture, near_duplicates, read_source
from flows.sources import Source, check_masks, read_folders
from flows.versions import Git
from test_ingest import noise, save

PROJECT = Path(__file__).resolve().parent.parent
NFC, NFD = (unicodedata.normalize(form, "Mehltau-grün") for form in ("NFC", "NFD"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with nothing but its parameters."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT / "params.yaml", folder)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(folder)], check=True)
    Git(folder).commit(["params.yaml"], "Project")
    return folder


def classes(folder: Path, count: int = 8, labels: tuple[str, ...] = ("cat", "dog"), suffix: str = "png") -> Path:
    """Images of noise in class folders."""
    for number, label in enumerate(labels):
        for index in range(count):
            save(folder / label / f"{label}{index}.{suffix}", noise(100 * number + index))
    return folder


def look(project: Path, tmp_path: Path, images: Path, **options: Any) -> Report:
    """The report of a dry run."""
    report = init_workspace(project, tmp_path / "w", images, dry_run=True, **options)
    assert not (tmp_path / "w").exists()
    return report


def table(folder: Path, text: str) -> tuple[list[Source], Report]:
    """The sources of a CSV in `folder`, and what is told of it."""
    (folder / "index.csv").write_bytes(text.encode())
    report = Report()
    return read_table(folder / "index.csv", folder, None, report), report


def source(path: Path, split: str = "train", label: str = "a") -> Source:
    return Source(path.stem, path.name, path, label, split, "", None)


# --- tables


def test_headers_and_cells_are_read_whatever_their_spaces_and_case(tmp_path: Path) -> None:
    sources, report = table(tmp_path, 'Image, LABEL , Split,Group\na.png, "rust, old", TEST, g1\nb.png,scab,valid,g2\n')
    assert [(one.label, one.split, one.group) for one in sources] == [
        ("rust, old", "test", "g1"),
        ("scab", "val", "g2"),
    ]
    assert not report.problems and not report.warnings


def test_a_row_with_more_cells_than_the_header_is_refused_by_its_line(tmp_path: Path) -> None:
    _, report = table(tmp_path, "image,label\na.png,scab\nb.png,Apple, rust\nc.png,Apple, scab\n")
    (problem,) = report.problems
    assert "index.csv line 3 has 3 cells and the header 2 (2 such rows)" in problem


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_separate_cells_where_the_header_has_no_comma(tmp_path: Path, delimiter: str) -> None:
    sources, report = table(tmp_path, delimiter.join(["image", "label"]) + "\n" + delimiter.join(["a.png", "x, y"]))
    assert [one.label for one in sources] == ["x, y"]
    assert report.read[0].startswith("index.csv separates cells by")


@pytest.mark.parametrize("quoted", [(20,), (5, 9)])
def test_a_stray_quote_swallows_no_rows(tmp_path: Path, quoted: tuple[int, ...]) -> None:
    """Read leniently, a cell that begins with a quote goes on to the next quote, and the rows between are gone."""
    classes(tmp_path, 30)
    paths = [f"{label}/{label}{index}.png" for label in ("cat", "dog") for index in range(30)]
    notes = ['"macro' if number in quoted else "" for number in range(60)]
    rows = [f"{path},{path[:3]},train,{note}" for path, note in zip(paths, notes, strict=True)]
    with pytest.raises(ValueError, match=r"index.csv line \d+ is not CSV"):
        table(tmp_path, "\n".join(["image,label,split,notes", *rows]))


@pytest.mark.parametrize("value", ["nan", "NaN", "None", "NA", "<NA>"])
@pytest.mark.parametrize("column", ["label", "group", "split"])
def test_what_programs_write_for_an_empty_cell_is_refused(tmp_path: Path, column: str, value: str) -> None:
    cells = {"label": "x", "split": "train", "group": "g"} | {column: value}
    _, report = table(tmp_path, f"image,label,split,group\na.png,{','.join(cells.values())}\n")
    assert any(f"line 2: {column} is {value} (in 1 rows)" in problem for problem in report.problems)


@pytest.mark.parametrize(
    ("column", "values", "meant"),
    [("spilt", "ab", "split"), ("subset", ("train", "test"), "split"), ("labels", "xy", "")],
)
def test_a_column_that_nearly_is_a_known_one_is_refused(
    tmp_path: Path, column: str, values: tuple[str, str], meant: str
) -> None:
    _, report = table(tmp_path, f"image,label,{column}\na.png,x,{values[0]}\nb.png,y,{values[1]}\n")
    assert [f"looks like {meant}" in problem for problem in report.problems] == ([True] if meant else [])
    assert report.warnings == [f"1 columns of index.csv are not used: {column}"]


@pytest.mark.parametrize(("named", "stored"), [(NFD, NFD), (NFC, NFD), (NFD, NFC), ("LEAF", "leaf")])
def test_a_file_is_found_however_its_name_is_spelled(tmp_path: Path, named: str, stored: str) -> None:
    path = save(tmp_path / "a" / f"{stored}.png", noise(1))
    sources, _ = table(tmp_path, f"image,label\na/{named}.png,x\n")
    assert sources[0].path.samefile(path)
    sources, _ = table(tmp_path, f"image,label\na\\{named}.png,x\n")
    assert sources[0].path.samefile(path)


def test_a_table_for_the_benchmarks_raises_all_problems_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "index.csv").write_text("image,label,split\na.png,Rust,train\nb.png,rust,middle\nc.png,,val\n")
    with pytest.raises(Undecided) as error:
        read_index(tmp_path / "index.csv", tmp_path)
    told = str(error.value)
    assert "\n" not in told and told.startswith("3 things to decide")
    for part in ("line 3: split is middle", "line 4: c is in val without a label", "Rust (1 images), rust (1 images)"):
        assert part in told


# --- folders


def test_folders_named_like_splits_give_the_splits(project: Path, tmp_path: Path) -> None:
    for split, start in (("train", 0), ("valid", 8), ("test", 11)):
        for number, label in enumerate(("cat", "dog")):
            for index in range(8 if split == "train" else 3):
                save(tmp_path / "i" / split / label / f"{index}.png", noise(100 * number + start + index))
    report = look(project, tmp_path, tmp_path / "i")
    assert report.images == {
        "train": {"cat": 8, "dog": 8}, "val": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}, "pool": {},
    }  # fmt: skip
    shutil.rmtree(tmp_path / "i" / "valid")
    report = look(project, tmp_path, tmp_path / "i")
    assert report.images["test"] == {"cat": 3, "dog": 3} and report.images["val"]["cat"] in (1, 2)
    shutil.move(tmp_path / "i" / "test" / "cat", tmp_path / "i" / "cat")
    with pytest.raises(ValueError, match=r"named like splits \(test, train\) beside others \(cat\)"):
        look(project, tmp_path, tmp_path / "i")


def test_images_below_a_class_folder_belong_to_it_and_system_files_to_none(tmp_path: Path) -> None:
    images, report = classes(tmp_path / "i", 3), Report()
    save(images / "cat" / "day2" / "cat0.png", noise(50))
    save(images / "__MACOSX" / "cat" / "._cat0.png", noise(51))
    (images / "cat" / "Thumbs.db").write_bytes(b"")
    sources = read_folders(images, None, report)
    assert [one.label for one in sources] == ["cat"] * 4 + ["dog"] * 3
    assert len({one.id for one in sources}) == 7
    assert report.read[0].startswith("1 images lie in folders below their class, such as cat/day2/cat0.png")


def test_folders_of_which_either_level_could_be_the_class_are_refused(tmp_path: Path) -> None:
    for fold in ("fold1", "fold2"):
        classes(tmp_path / "i" / fold, 2)
    with pytest.raises(ValueError, match="either level could be the class"):
        read_folders(tmp_path / "i", None, Report())
    classes(tmp_path / "j" / "images", 2)
    classes(tmp_path / "j" / "masks", 2)
    with pytest.raises(ValueError, match="give them as --images and --masks"):
        read_folders(tmp_path / "j", None, Report())


def test_a_pipe_a_broken_link_and_a_loop_of_links_do_not_stop_init(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    os.mkfifo(images / "cat" / "pipe.png")
    (images / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "dog" / "around").symlink_to(images)
    (images / "dog" / "link.png").symlink_to(save(tmp_path / "elsewhere.png", noise(77)))
    report = look(project, tmp_path, images)
    assert {one["image"]: one["reason"] for one in report.unreadable} == {
        "cat/gone.png": "a link to nothing", "cat/pipe.png": "not a file (a pipe, a socket or a device)",
    }  # fmt: skip
    assert any("links to a folder around itself" in line for line in report.warnings)
    assert "1 images are links, whose files are copied: dog/link.png" in report.read


def test_names_that_are_not_utf8_reach_the_workspace(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    for number, byte in enumerate((b"\xe9", b"\xe8")):
        picture = save(tmp_path / "one.png", noise(60 + number))
        shutil.copy(os.fsencode(picture), os.fsencode(images / "cat") + b"/caf" + byte + b".png")
    init_workspace(project, tmp_path / "w", images)
    manifest = (tmp_path / "w/data/manifest.csv").read_text(encoding="utf-8")
    for name in ("cat_caf_", "cat_caf__2"):
        assert f"{name},data/images/{name}.png,cat" in manifest
        assert (tmp_path / f"w/data/images/{name}.png").is_file()


def test_a_class_folder_that_is_not_utf8_is_refused(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    os.rename(images / "dog", os.fsencode(images) + b"/\xe9")
    with pytest.raises(ValueError, match="the name of class folder .* is not UTF-8; rename it"):
        look(project, tmp_path, images)


def test_classes_that_differ_in_case_alone_are_refused(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i", labels=("Rust", "rust", "scab"))
    with pytest.raises(ValueError, match=r"classes Rust \(8 images\), rust \(8 images\) differ in upper"):
        look(project, tmp_path, images)


# --- masks: which belongs to which


@pytest.mark.parametrize("suffix", ["jpg", "PNG", "tiff", "bmp"])
def test_masks_have_any_format_and_any_spelling(tmp_path: Path, suffix: str) -> None:
    images = classes(tmp_path / "i", 2, (NFC, "b"))
    for label, name in ((NFD, NFD), ("b", "b")):
        for index in range(2):
            mask = tmp_path / "m" / label / f"{NFC if name == NFD else name}{index}.{suffix}"
            save(mask, np.full((6, 8), 255, np.uint8))
    sources = read_folders(images, MaskFolder(tmp_path / "m"), Report())
    assert all(one.mask for one in sources)


def test_masks_that_fit_no_image_or_two_or_have_a_twin_are_told(tmp_path: Path) -> None:
    images, masks, report = classes(tmp_path / "i", 3), tmp_path / "m", Report()
    save(images / "cat" / "cat0.bmp", noise(9))  # beside cat0.png
    for name in ("cat/cat0.png", "cat/cat9.png", "dog/dog0.png", "dog/dog0.bmp"):
        save(masks / name, np.full((6, 8), 255, np.uint8))
    folder = MaskFolder(masks)
    check_masks(read_folders(images, folder, report), folder, report)
    assert report.warnings == ["1 masks belong to no image: cat/cat9.png; a mask has the name of its image"]
    fits, twins = report.problems
    assert fits.startswith("mask cat/cat0.png fits 2 images, cat/cat0.bmp, cat/cat0.png")
    assert twins == "dog/dog0.bmp, dog/dog0.png are masks of one image, dog/dog0.png; keep one"


# --- masks: what they mark

OBJECT = np.zeros((24, 24), bool)
OBJECT[6:16, 8:18] = True
PART = np.zeros((24, 24), bool)
PART[9:13, 10:14] = True


def values(*pairs: tuple[np.ndarray, int], depth: type = np.uint8) -> np.ndarray:
    pixels: np.ndarray = np.zeros(OBJECT.shape, depth)
    for where, value in pairs:
        pixels[where] = value
    return pixels


def rgb(colour: tuple[int, int, int], where: np.ndarray = OBJECT) -> np.ndarray:
    return (where[..., None] * np.array(colour)).astype(np.uint8)


def with_palette(indexes: np.ndarray, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indexes, "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    palette = [0] * 768
    for index, colour in colours.items():
        palette[3 * index : 3 * index + 3] = colour
    image.putpalette(palette)
    return image


def rim() -> np.ndarray:
    around = np.zeros_like(OBJECT)
    around[4:18, 6:20] = True
    return around & ~OBJECT


@pytest.mark.parametrize(
    "stored",
    [
        values((OBJECT, 1), (PART, 2)),
        values((OBJECT, 15), (rim(), 255)),
        values((OBJECT, 38)),
        values((OBJECT, 1), (PART, 2), depth=np.uint16),
        values((OBJECT, 1000), (PART, 2000), depth=np.uint16),
        values((OBJECT, 65535), depth=np.uint16),
        np.repeat(values((OBJECT, 1))[..., None], 3, axis=2),
        rgb((0, 0, 60)),
        rgb((90, 0, 0)) + rgb((0, 30, 0), PART),
        rgb((128, 0, 0)) + rgb((224, 224, 192), rim()),
        np.dstack([np.zeros((24, 24, 3), np.uint8), OBJECT * np.uint8(255)]),
        np.dstack([np.full((24, 24, 3), 255, np.uint8), OBJECT * np.uint8(255)]),
    ],
)
def test_a_mask_marks_the_object_however_it_is_stored(stored: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(stored).save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert np.array_equal(marked_pixels(image, lossy=False)[0], OBJECT)


@pytest.mark.parametrize(
    ("indexes", "colours"),
    [
        (values((OBJECT, 1), (PART, 2)), {1: (128, 0, 0), 2: (0, 0, 20)}),
        (values((OBJECT, 15), (rim(), 255)), {15: (192, 128, 128), 255: (224, 224, 192)}),
        (values((OBJECT, 255)), {255: (255, 255, 255)}),
        (values((~OBJECT, 3)), {0: (9, 9, 9)}),
    ],
)
def test_a_mask_with_a_palette_is_read_by_its_colours(
    indexes: np.ndarray, colours: dict[int, tuple[int, int, int]]
) -> None:
    assert np.array_equal(marked_pixels(with_palette(indexes, colours), lossy=False)[0], OBJECT)


def test_indexes_in_a_format_that_does_not_keep_them_are_refused() -> None:
    with pytest.raises(ValueError, match="are nearly black in a format that does not keep them"):
        marked_pixels(Image.fromarray(values((OBJECT, 1), (PART, 2))), lossy=True)


def test_forty_instances_are_one_mask() -> None:
    stored = np.where(OBJECT, np.arange(24 * 24).reshape(24, 24) % 40 + 1, 0)
    for depth in (np.uint8, np.uint16):
        assert np.array_equal(marked_pixels(Image.fromarray(stored.astype(depth)), lossy=False)[0], OBJECT)


def test_a_jpeg_mask_is_read_in_spite_of_its_noise(tmp_path: Path) -> None:
    Image.fromarray(values((OBJECT, 255))).save(tmp_path / "mask.jpg", quality=60)
    with Image.open(tmp_path / "mask.jpg") as image:
        assert (marked_pixels(image, lossy=True)[0] == OBJECT).mean() > 0.98


@pytest.mark.parametrize(
    "stored",
    [
        values((OBJECT, 100), (PART, 200)),
        values((np.ones_like(OBJECT), 1), (OBJECT, 2), (PART, 3)),
        values((OBJECT, 255), (PART[:, ::-1] & ~OBJECT, 2), (np.eye(24, dtype=bool) & ~OBJECT & ~PART & rim(), 1)),
        values((OBJECT, 128), (PART, 255)),
        np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8),
        rgb((255, 0, 0)) + rgb((0, 255, 255), ~OBJECT),
    ],
)
def test_a_mask_that_does_not_say_what_is_the_object_is_refused(stored: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"object|ground"):
        marked_pixels(Image.fromarray(stored), lossy=False)


def masked(tmp_path: Path, masks: np.ndarray, orientation: int = 1, size: tuple[int, int] = (24, 24)) -> dict[str, Any]:
    """Folders of photographs with this EXIF orientation and all the same mask."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number, label in enumerate(("cat", "dog")):
        for index in range(8):
            save(tmp_path / "i" / label / f"{label}{index}.png", noise(100 * number + index, size), exif=exif)
            save(tmp_path / "m" / label / f"{label}{index}.png", masks)
    return {"images": tmp_path / "i", "masks": tmp_path / "m"}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (np.zeros_like(OBJECT), "16 of 16 masks mark nothing"),
        (np.ones_like(OBJECT), "16 of 16 masks mark at least 90% of their image"),
        (~OBJECT, "16 of 16 masks mark the edge of the image all around, as inverted masks do"),
    ],
)
def test_masks_that_mark_nothing_or_all_or_are_inverted_are_told(
    project: Path, tmp_path: Path, where: np.ndarray, said: str
) -> None:
    report = look(project, tmp_path, **masked(tmp_path, values((where, 255))))
    assert [line for line in report.warnings if line.startswith(said)]


def test_masks_of_turned_square_photographs_need_a_word(project: Path, tmp_path: Path) -> None:
    given = masked(tmp_path, values((OBJECT, 255)), orientation=3)
    with pytest.raises(ValueError, match="say --mask-pixels upright or --mask-pixels stored"):
        look(project, tmp_path, **given)
    for said, expected in (("upright", OBJECT), ("stored", OBJECT[::-1, ::-1])):
        init_workspace(project, tmp_path / said, mask_pixels=said, **given)
        with np.load(tmp_path / said / "data/gold.npz") as gold:
            assert all(np.array_equal(gold[name] > 0, expected) for name in gold.files)


def test_the_size_of_other_masks_tells_on_which_pixels_they_were_drawn(project: Path, tmp_path: Path) -> None:
    lying = values((OBJECT, 255))[:20]
    given = masked(tmp_path, lying, orientation=6, size=(20, 24))  # stored 20 x 24, upright 24 x 20
    init_workspace(project, tmp_path / "w", **given)
    with np.load(tmp_path / "w/data/gold.npz") as gold:
        assert all(np.array_equal(gold[name], np.rot90(lying, -1)) for name in gold.files)


# --- images


def test_hidden_colours_do_not_reach_network_hash_or_copy(tmp_path: Path) -> None:
    shapes = [np.dstack([noise(seed, (24, 24)), OBJECT * np.uint8(255)]) for seed in (1, 2)]
    shapes[1][OBJECT] = shapes[0][OBJECT]
    one, other = (save(tmp_path / f"{number}.png", pixels) for number, pixels in enumerate(shapes))
    assert np.array_equal(read_rgb(one), read_rgb(other))
    assert (read_rgb(one)[~OBJECT] == 255).all() and np.array_equal(read_rgb(one)[OBJECT], shapes[0][OBJECT][:, :3])
    seen = [read_source(source(path)) for path in (one, other)]
    assert not isinstance(seen[0], str) and not isinstance(seen[1], str)
    assert seen[0].content == seen[1].content and seen[0].transparent


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_opaque_images_of_8_bits_decode_as_pillow_converts_them(mode: str) -> None:
    image = Image.fromarray(noise(3, (9, 11))).convert(mode)
    assert np.array_equal(decode(image).rgb, np.asarray(image.convert("RGB")))
    pixels = b"RGB 11 9 " + image.convert("RGB").tobytes()
    assert decode(image).content == hashlib.sha256(pixels).hexdigest(), "workspaces know their pictures by it"
    assert decode(image.convert("RGB").convert("RGBA")).content == decode(image.convert("RGB")).content


@pytest.mark.parametrize(("bits", "suffix"), [(12, "png"), (12, "tiff"), (8, "png")])
def test_sixteen_bits_are_scaled_by_those_that_they_use_and_saved_so(tmp_path: Path, bits: int, suffix: str) -> None:
    grey = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray((grey << (bits - 8)).astype(np.uint16)).save(path)
    picture = read_source(source(path))
    assert not isinstance(picture, str) and picture.bits == bits
    (tmp_path / "copy").mkdir()
    copy = copy_picture(picture, tmp_path / "copy")
    for file in (path, copy):
        assert np.array_equal(read_rgb(file)[..., 0], grey)
    again = read_source(source(copy))
    assert not isinstance(again, str) and (again.content, again.bits) == (picture.content, 16)


def test_pages_and_nearly_black_images_are_told(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    pages = [Image.fromarray(noise(seed)) for seed in (201, 202)]
    pages[0].save(images / "cat" / "two.tiff", save_all=True, append_images=pages[1:])
    save(images / "dog" / "dark.png", noise(203) // 32)
    told = look(project, tmp_path, images).warnings
    assert "1 images have several pages, of which the first is read: cat/two.tiff" in told
    assert "1 images are nearly black (no value above 15 of 255): dog/dark.png" in told
    assert np.array_equal(read_rgb(images / "cat" / "two.tiff"), noise(201))


def test_a_photograph_saved_again_in_another_split_is_told_or_left_out(project: Path, tmp_path: Path) -> None:
    smooth = [
        Image.fromarray(noise(seed, (5, 5))).resize((40, 40), Image.Resampling.BICUBIC) for seed in range(300, 318)
    ]
    lines = ["image,label,split"]
    for number, image in enumerate(smooth):
        image.save(tmp_path / f"{number}.png")
        split = ("train", "val", "test")[number // 2 % 3]
        lines.append(f"{number}.png,{'ab'[number % 2]},{split}")
    smooth[0].resize((30, 30)).save(tmp_path / "again.jpg", quality=70)  # of train, in class a
    lines.append("again.jpg,b,test")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    given = {"images": tmp_path, "index": tmp_path / "index.csv"}
    splits, labels = look(project, tmp_path, **given).warnings
    assert splits.startswith("1 pairs of images look the same and stand in two splits: 0.png (a, train) and again.jpg")
    assert labels.startswith("1 pairs of images look the same and stand in two classes: 0.png (a, train)")
    report = look(project, tmp_path, **given, skip_doubtful=True)
    assert sorted(report.doubtful) == ["0.png", "again.jpg"]
    assert sum(sum(counts.values()) for counts in report.images.values()) == 17


def test_pictures_of_one_split_and_class_are_no_doubtful_pair(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.png", noise(1)) for number in range(2)]
    seen = [read_source(source(path)) for path in paths]
    assert near_duplicates([one for one in seen if not isinstance(one, str)]) == []


def test_everything_that_has_to_be_decided_is_told_at_once(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i", labels=("cat", "dog", "Dog"))
    shutil.copy(images / "cat" / "cat0.png", images / "dog" / "same0.png")
    shutil.copy(images / "cat" / "cat1.png", images / "dog" / "same1.png")
    save(tmp_path / "m" / "cat" / "cat2.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(Undecided) as error:
        look(project, tmp_path, images, masks=tmp_path / "m")
    problems = error.value.report.problems
    assert len(problems) == 4 and len(set(problems)) == 4
    for part in ("differ in upper", "cat/cat0.png (cat) and dog/same0.png", "cat/cat1.png (cat)", "has 3 x 3 pixels"):
        assert part in str(error.value)


def test_doubtful_pictures_can_be_left_out(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    shutil.copy(images / "cat" / "cat0.png", images / "dog" / "same.png")
    report = look(project, tmp_path, images, skip_doubtful=True)
    assert sorted(report.doubtful) == ["cat/cat0.png", "dog/same.png"]
    assert sum(sum(counts.values()) for counts in report.images.values()) == 15


def test_masks_may_end_like_masks_and_are_refused_among_the_images(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    for name in ("cat/cat0_mask.png", "dog/dog1-seg.png"):
        save(tmp_path / "m" / name, np.full((6, 8), 255, np.uint8))
    report = look(project, tmp_path, images, masks=tmp_path / "m")
    assert report.gold_masks + report.simulation_masks == 2
    assert "2 masks have the name of their image and an ending: cat/cat0_mask.png, dog/dog1-seg.png" in report.read
    save(images / "cat" / "cat0_mask.png", noise(400))
    with pytest.raises(ValueError, match="1 images look like masks of images beside them: cat/cat0_mask.png"):
        look(project, tmp_path, images)


def test_of_the_same_pictures_the_one_with_a_mask_is_kept(project: Path, tmp_path: Path) -> None:
    images = classes(tmp_path / "i")
    shutil.copy(images / "cat" / "cat0.png", images / "cat" / "z.png")
    save(tmp_path / "m" / "cat" / "z.png", np.full((6, 8), 255, np.uint8))
    report = look(project, tmp_path, images, masks=tmp_path / "m")
    assert report.duplicates == [{"image": "cat/cat0.png", "same_as": "cat/z.png"}]
    assert report.gold_masks + report.simulation_masks == 1


def test_the_command_shows_the_report_alone_and_a_line_for_each_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = classes(tmp_path / "i")
    command = ["init", str(tmp_path / "w"), "--images", str(images), "--dry-run"]
    monkeypatch.setattr(cli.console, "_width", 200)
    for name in ("same", "twin"):
        number = "01"[name == "twin"]
        shutil.copy(images / "cat" / f"cat{number}.png", images / "dog" / f"{name}.png")
    with pytest.raises(ValueError, match="2 things have to be decided first"):
        cli.app(command, standalone_mode=False)
    assert capsys.readouterr().out.count("decide:") == 2
    cli.app([*command, "--skip-doubtful"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "left out, doubtful: 4" in told and "nothing was made (--dry-run)" in told and "cost:" not in told
    assert not (tmp_path / "w").exists()
