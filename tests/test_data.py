from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn import data
from abn.data import (
    Pictures,
    augment,
    epoch_batches,
    in_order,
    loader,
    read_image,
)
from abn.manifest import (
    CORRECTION_COLUMNS,
    LATER_COLUMNS,
    MANIFEST_COLUMNS,
    MaskShards,
    Sample,
    class_names,
    mask_sha256,
    read_corrections,
    read_manifest,
    training_samples,
)
from tiny import ROWS, SHARD, SIZE, correct, correction, make_workspace, picture, square, tiny_settings, write_csv


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_workspace(tmp_path)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def say(root: Path, *rows: dict[str, str]) -> None:
    write_csv(root / "data/corrections.csv", CORRECTION_COLUMNS, rows)


def by_id(root: Path, **options: bool) -> dict[str, Sample]:
    return {sample.id: sample for sample in read_manifest(root, **options)}


# --- the manifest, and what people said


def test_the_manifest_keeps_its_order(root: Path) -> None:
    assert [sample.id for sample in read_manifest(root)] == [row.id for row in ROWS]


def test_a_correction_brings_its_mask(root: Path) -> None:
    correct(root, {"train03": square(3)})
    sample = by_id(root)["train03"]
    assert (sample.masks, sample.sha256) == (SHARD, mask_sha256(square(3)))
    assert by_id(root)["train04"].masks == ""


def test_a_correction_brings_another_label(root: Path) -> None:
    say(root, correction("train03", "label_wrong", label="dark"), correction("pool0", "map_ok", label="light"))
    assert by_id(root)["train03"].label == "dark"
    assert by_id(root)["pool0"].label == "light"


def test_an_unusable_picture_is_left_out(root: Path) -> None:
    say(root, correction("train03", "unusable"))
    assert "train03" not in by_id(root)
    assert len(by_id(root)) == len(ROWS) - 1


def test_without_corrections_the_manifest_is_as_it_was(root: Path) -> None:
    before = read_manifest(root)
    say(root, correction("train03", "unusable"), correction("train05", "label_wrong", label="dark"))
    assert read_manifest(root, corrected=False) == before


def test_a_withdrawn_correction_undoes_itself(root: Path) -> None:
    before = read_manifest(root)
    correct(root, {"train03": square(3)})
    say(root)
    assert read_manifest(root) == before


def test_the_pool_is_learned_from_once_it_has_a_label(root: Path) -> None:
    assert {sample.split for sample in training_samples(read_manifest(root))} == {"train"}
    say(root, correction("pool1", "label_wrong", label="light"))
    assert "pool1" in [sample.id for sample in training_samples(read_manifest(root))]


def test_a_mask_weighs_as_much_as_its_labelers_agree(root: Path) -> None:
    say(root, correction("train03", "map_fixed", weight="0.25"), correction("train04", "map_fixed"))
    assert [by_id(root)[name].weight for name in ("train03", "train04", "train05")] == [0.25, 1, 1]


@pytest.mark.parametrize("weight", ["1.5", "-0.1", "nan", "much"])
def test_a_weight_out_of_range_is_refused(root: Path, weight: str) -> None:
    say(root, correction("train03", "map_fixed", weight=weight))
    with pytest.raises(ValueError, match=f"weight of sample train03 is '{weight}'; it must be from 0 to 1"):
        read_manifest(root)


def test_a_table_from_before_there_were_weights_is_read(root: Path) -> None:
    old = [name for name in CORRECTION_COLUMNS if name not in LATER_COLUMNS]
    row = correction("train03", "map_fixed")
    write_csv(root / "data/corrections.csv", old, [{name: row[name] for name in old}])
    assert by_id(root)["train03"].weight == 1
    assert read_corrections(root)["train03"]["moved"] == ""


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("manifest.csv", MANIFEST_COLUMNS),
        ("corrections.csv", tuple(name for name in CORRECTION_COLUMNS if name not in LATER_COLUMNS)),
    ],
)
def test_a_missing_column_is_named(root: Path, file: str, columns: tuple[str, ...]) -> None:
    for missing in columns:
        (root / "data" / file).write_text(",".join(name for name in columns if name != missing) + "\n")
        with pytest.raises(ValueError, match=f"{file} has no column {missing}; it needs {','.join(columns)}$"):
            read_manifest(root)


def test_a_missing_or_empty_file_is_one_line(root: Path) -> None:
    (root / "data/corrections.csv").write_text("")
    with pytest.raises(ValueError, match=r"corrections\.csv has no column sample"):
        read_manifest(root)
    (root / "data/manifest.csv").unlink()
    with pytest.raises(ValueError, match=r"manifest\.csv does not exist; make a workspace with `abnloop init`"):
        read_manifest(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "training"}, "line 3: split is 'training'; use train, val, test, pool"),
        ({"split": ""}, "line 3: split is ''; use"),
        ({"label": ""}, "line 3: b has no label; only the pool may lack one"),
    ],
)
def test_a_bad_row_is_named_by_its_line(root: Path, change: dict[str, str], message: str) -> None:
    good = {"id": "a", "image": "a.png", "label": "x", "split": "train", "group": ""}
    write_csv(root / "data/manifest.csv", MANIFEST_COLUMNS, [good, {**good, "id": "b", **change}])
    with pytest.raises(ValueError) as refused:
        read_manifest(root)
    assert message in str(refused.value)


def test_classes_are_sorted_and_one_alone_is_refused() -> None:
    samples = [Sample("1", "", "b", "train"), Sample("2", "", "a", "train"), Sample("3", "", "", "pool")]
    assert class_names(samples) == ["a", "b"]
    with pytest.raises(ValueError, match=r"has 1 class\(es\) \['b'\]; a classifier needs at least 2"):
        class_names(samples[:1])


def test_a_class_without_training_images_is_refused() -> None:
    samples = [Sample("1", "", "a", "train"), Sample("2", "", "b", "train"), Sample("3", "", "c", "test")]
    with pytest.raises(ValueError, match="class c has no images to train on"):
        class_names(samples)


# --- pictures and masks


def test_pictures_and_masks_arrive_as_they_are_at_their_own_size(root: Path) -> None:
    correct(root, {"train03": square(3)})
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (SIZE, SIZE))
    batch = pictures[[3, 2, 28]]
    assert torch.equal(batch.images[0], torch.from_numpy(picture(3, "light")).permute(2, 0, 1))
    assert batch.labels.tolist() == [1, 0, -1]
    assert batch.has_mask.tolist() == [True, False, False]
    assert torch.equal(batch.masks[0, 0], torch.from_numpy(square(3)))
    assert batch.indices.tolist() == [3, 2, 28]


def test_the_loader_keeps_the_order_of_its_batches(root: Path) -> None:
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (8, 12))
    batches = list(loader(pictures, in_order(len(pictures), 7)))
    assert [batch.images.shape for batch in batches] == [*[(7, 3, 8, 12)] * 4, (2, 3, 8, 12)]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(30))


def test_workers_can_be_sent_the_pictures_where_they_are_not_forked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    correct(root, {"train03": square(3)})
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (8, 12))
    expected = pictures[[3]]  # opens the masks
    batches = loader(pictures, [[3]])
    assert batches.num_workers > 0
    sent, _ = pickle.loads(pickle.dumps((batches.dataset, batches.worker_init_fn)))
    assert sent.samples == pictures.samples
    assert torch.equal(sent[[3]].masks, expected.masks)


@pytest.mark.parametrize(
    ("count", "size", "batches"), [(7, 3, [3, 4]), (3, 2, [3]), (6, 3, [3, 3]), (1, 4, [1]), (0, 4, [])]
)
def test_no_picture_is_alone_in_a_batch(count: int, size: int, batches: list[int]) -> None:
    rows = in_order(count, size)
    assert [len(batch) for batch in rows] == batches
    assert [row for batch in rows for row in batch] == list(range(count))


def test_a_mask_too_thin_for_the_network_s_size_still_marks_something(root: Path) -> None:
    scratch, nothing = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    scratch[:, 30] = 255  # an eighth of a cell
    correct(root, {"train03": scratch, "train04": nothing})
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (8, 8))
    marked = pictures[[3, 4]].masks[:, 0] > 127
    assert marked[0].any(dim=0).nonzero().flatten().tolist() == [3] and marked[0].any(dim=1).all()
    assert not marked[1].any()


def test_worker_processes_read_masks_that_their_parent_has_begun_to_read(root: Path) -> None:
    correct(root, {f"train{i:02d}": square(i) for i in range(20)})
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (SIZE, SIZE))
    assert not (pictures[[0]].masks == 0).all()
    pictures.cached = False
    batches = list(loader(pictures, [[i] for i in range(20)] * 4))
    assert all(torch.equal(batch.masks[0, 0], torch.from_numpy(square(i % 20))) for i, batch in enumerate(batches))


def test_worker_processes_end_well_beside_the_services_of_a_flow(root: Path) -> None:
    from prefect._internal.concurrency.services import QueueService

    class Service(QueueService[int]):
        """As those that send a flow's logs and events, but without a server to send to."""

        async def _handle(self, item: int) -> None: ...

    Service.instance()
    pictures = Pictures(root, read_manifest(root), ["dark", "light"], (SIZE, SIZE))
    pictures.cached = False
    for _ in range(10):  # a worker's end is not always seen before it is no longer looked for
        assert len(list(loader(pictures, [[i] for i in range(20)]))) == 20


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_picture_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"picture.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.fromarray(np.full((10, 10, 3), 255, np.uint8)).convert(mode).save(path)
    image = read_image(path, (10, 10))
    assert image.shape == (3, 10, 10)
    assert image.min() == 255


def test_a_picture_of_16_bits_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png", (8, 8)).unique().tolist() == [128]


def test_a_missing_picture_is_named(root: Path) -> None:
    (root / "data/images/train03.png").unlink()
    with pytest.raises(ValueError, match=r"train03\.png cannot be read .*restore it with `dvc checkout`"):
        Pictures(root, read_manifest(root), ["dark", "light"], (SIZE, SIZE))[[3]]


def test_a_broken_picture_is_named(root: Path) -> None:
    (root / "data/images/train03.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"train03\.png cannot be read"):
        Pictures(root, read_manifest(root), ["dark", "light"], (SIZE, SIZE))[[3]]


@pytest.mark.parametrize(
    ("file", "sample", "sha256", "message"),
    [
        ("rounds/0009/masks.npz", "train03", "", "is missing; restore it with `dvc checkout` or `dvc pull`"),
        (SHARD, "train04", "", "holds no mask of sample train04; restore it with `dvc checkout`"),
        (SHARD, "train03", "0" * 64, "the mask of sample train03 in rounds/0001/masks.npz is not the one that was"),
    ],
)
def test_a_mask_that_is_not_the_collected_one_is_refused(
    root: Path, file: str, sample: str, sha256: str, message: str
) -> None:
    correct(root, {"train03": square(3)})
    with pytest.raises(ValueError) as refused:
        MaskShards(root).get(file, sample, sha256)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


# --- augmentation


def test_a_mask_stays_on_its_pixel_through_every_mirror_and_shift() -> None:
    config = tiny_settings(data={"flip": True, "shift": 3}).data
    count, height, width = 400, 11, 14
    rng = np.random.default_rng(0)
    images = torch.rand(count, 3, height, width, generator=generator()) * 0.5
    masks = torch.zeros(count, 1, height, width)
    for i in range(count):  # a red marker, corners and edges included
        y, x = rng.integers(height), rng.integers(width)
        images[i, :, y, x] = torch.tensor([1.0, 0.0, 0.0])
        masks[i, 0, y, x] = 1
    moved, moved_masks = augment(images, masks, config, generator(1))
    assert torch.equal(moved[:, :1] == 1, moved_masks == 1)
    marked = moved_masks.flatten(1).sum(dim=1)
    assert (marked == 1).sum() > count / 2  # at an edge a marker may leave the picture, or be repeated
    assert not torch.equal(moved_masks, masks)


def test_augmentation_uses_both_mirrors_and_every_shift() -> None:
    config = tiny_settings(data={"flip": True, "shift": 2}).data
    image = torch.zeros(1, 3, 15, 15)
    image[:, :, 7, 5] = 1  # mirrored it lies at column 9
    moved, _ = augment(image.expand(1000, -1, -1, -1), torch.zeros(1000, 1, 15, 15), config, generator())
    places = {tuple(place[1:]) for place in moved[:, 0].nonzero().tolist()}
    assert places == {(y, x) for y in range(5, 10) for x in [*range(3, 8), *range(7, 12)]}


def test_no_flip_and_no_shift_leave_everything_alone() -> None:
    config = tiny_settings(data={"flip": False, "shift": 0}).data
    images, masks = torch.rand(5, 3, 9, 9, generator=generator()), torch.rand(5, 1, 9, 9, generator=generator())
    moved, moved_masks = augment(images, masks, config, generator())
    assert torch.equal(moved, images)
    assert torch.equal(moved_masks, masks)


def test_augmentation_is_the_same_for_the_same_seed() -> None:
    config = tiny_settings(data={"flip": True, "shift": 2}).data
    images, masks = torch.rand(9, 3, 9, 9, generator=generator()), torch.rand(9, 1, 9, 9, generator=generator())
    first, second, other = (augment(images, masks, config, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# --- batches


def batches(count: int, corrected: list[int], size: int = 10, share: float = 0.25, seed: int = 0) -> list[list[int]]:
    return list(epoch_batches(count, corrected, size, share, generator(seed)))


@pytest.mark.parametrize("count", [3, 10, 11, 19, 95, 104, 106])
def test_corrections_change_neither_the_number_of_steps_nor_their_cost(count: int) -> None:
    without, some = batches(count, []), batches(count, [0, 1, 2])
    assert len(without) == len(some) == max(1, round(count / 10))
    assert sum(map(len, some)) <= sum(map(len, without)) + len(some)


def test_the_share_of_corrected_samples_is_honoured() -> None:
    corrected = list(range(30))
    for batch in batches(100, corrected, size=20, share=0.25):
        assert set(batch[:5]) <= set(corrected)
        assert len(set(batch[:5])) == 5
        assert len(batch) == 20


def test_fewer_corrections_than_the_share_are_each_drawn_once() -> None:
    for batch in batches(100, [7, 8], size=20, share=0.5):
        assert sorted(batch[:2]) == [7, 8]
        assert len(batch) == 20


def test_a_data_set_smaller_than_a_batch_honours_the_share_too() -> None:
    for seed in range(20):
        (batch,) = batches(20, list(range(10)), size=64, share=0.25, seed=seed)
        assert len(batch) == 20
        assert set(batch[:5]) <= set(range(10))
        assert len(set(batch[5:])) == 15  # the rest of the epoch shows nothing twice


def test_an_epoch_without_corrections_shows_nothing_twice() -> None:
    shown = [index for batch in batches(100, [], size=10) for index in batch]
    assert sorted(shown) == list(range(100))
    assert shown != list(range(100))


def test_batches_are_the_same_for_the_same_seed() -> None:
    arguments: dict[str, Any] = {"count": 50, "corrected": [1, 2, 3], "size": 8}
    assert batches(**arguments, seed=1) == batches(**arguments, seed=1)
    assert batches(**arguments, seed=1) != batches(**arguments, seed=2)


def test_the_columns_are_those_that_a_reader_of_csv_sees(root: Path) -> None:
    with (root / "data/corrections.csv").open(newline="") as file:
        assert tuple(next(csv.reader(file))) == CORRECTION_COLUMNS
