from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from abn.data import read_image, resize_mask
from abn.manifest import MANIFEST_COLUMNS
from abn.model import ABN, ModelConfig, save_model
from flows import champion as champion_module
from flows.champion import Champion, Promoted, load_promoted
from flows.live_service import Answers
from flows.workspace import Workspace, write_json
from tiny import SIZE, make_workspace, square, write_csv


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace(make_workspace(tmp_path))


def promote(place: Workspace, version: int, mechanism: str = "residual", model: Path | None = None) -> Path:
    """A new model as the round promotes it: first the file, then the record that names it."""
    torch.manual_seed(version)
    config = ModelConfig("cifar_resnet8", "none", mechanism)  # type: ignore[arg-type]
    made = place.models / f"made-{version}.pt"
    save_model(made, ABN(config, 2), config, ["dark", "light"], (SIZE, SIZE))
    shutil.copyfile(model or made, place.champion)
    name(place, version, made)
    return made


def name(place: Workspace, version: int, model: Path) -> None:
    md5 = hashlib.md5(model.read_bytes()).hexdigest()
    write_json(place.champion_record, {"round": version, "model_version": str(version), "md5": md5})


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("mechanism", ["residual", "gate"])
def test_the_answer_with_a_mask_and_without_is_the_network_s(place: Workspace, mechanism: str) -> None:
    promote(place, 1, mechanism)
    promoted = load_promoted(place)
    picture, mask = place.images / "train00.png", square(3)
    given = resize_mask(mask, (SIZE, SIZE))[None].float() / 255
    image = read_image(picture, (SIZE, SIZE))[None].float() / 255
    with torch.inference_mode():
        wanted = promoted.network(image, given).logits.softmax(dim=1)[0]
        own = promoted.network(image).logits.softmax(dim=1)[0]
    for _ in range(2):  # from the picture, and from what was kept of it
        answers = promoted.answers(picture, mask)
        assert torch.equal(answers[0], wanted) and torch.equal(answers[1], own)
    assert not torch.equal(wanted, own)


def test_a_picture_is_read_and_extracted_once_however_many_strokes(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(place, 1)
    promoted = load_promoted(place)
    extracted: list[torch.Tensor] = []
    extract = promoted.network.extract

    def counted(images: torch.Tensor) -> torch.Tensor:
        extracted.append(images)
        return extract(images)

    monkeypatch.setattr(promoted.network, "extract", counted)
    for number in range(5):
        for picture in ("train00.png", "train01.png"):
            promoted.answers(place.images / picture, square(number))
    assert len(extracted) == 2


def test_a_picture_that_was_prepared_needs_no_look_at_the_first_stroke(place: Workspace) -> None:
    promote(place, 1)
    champion = Champion(place)
    answers = Answers(place, champion)
    for sample in ("train00", "train01", "nobody's"):
        answers.prepare(sample)
    answers.answer("train00", square(0))
    cache = champion.current().look.cache_info()
    assert (cache.misses, cache.hits) == (2, 1)


def test_no_more_features_are_kept_than_allowed(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    promote(place, 1)
    one = load_promoted(place).network.extract(torch.zeros(1, 3, SIZE, SIZE)).nbytes
    monkeypatch.setattr(champion_module, "FEATURE_BYTES", 3 * one + 1)
    promoted = load_promoted(place)
    for number in range(10):
        promoted.answers(place.images / f"train0{number}.png", square(number))
    kept = promoted.look.cache_info()
    assert (kept.currsize, kept.maxsize) == (3, 3)


def test_a_promotion_swaps_the_model_and_no_request_is_lost(place: Workspace) -> None:
    promote(place, 1)
    champion = Champion(place)
    answers = Answers(place, champion)
    versions: list[str] = []
    failed: list[BaseException] = []
    done = threading.Event()

    def labeler(sample: str) -> None:
        while not done.is_set():
            try:
                versions.append(answers.answer(sample, square(1)).version)
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

    labelers = [threading.Thread(target=labeler, args=[f"train0{number}"]) for number in range(3)]
    for thread in labelers:
        thread.start()
    for version in range(2, 5):
        wait_for(lambda: len(versions) > 10)
        promote(place, version)
        promoted = f"v{version}"
        wait_for(lambda: champion.version() == promoted)  # noqa: B023
    done.set()
    for thread in labelers:
        thread.join()
    assert failed == []
    assert set(versions) >= {"v1"} and set(versions) <= {"v1", "v2", "v3", "v4"}


def test_a_request_keeps_the_model_that_it_began_with(place: Workspace) -> None:
    promote(place, 1)
    champion = Champion(place)
    before = champion.current()
    first = before.answers(place.images / "train00.png", square(1))[0]
    promote(place, 2)
    wait_for(lambda: champion.version() == "v2")
    assert torch.equal(before.answers(place.images / "train00.png", square(1))[0], first)
    assert not torch.equal(champion.current().answers(place.images / "train00.png", square(1))[0], first)


def test_a_model_that_is_half_written_or_not_yet_named_takes_nobody_s_place(place: Workspace) -> None:
    promote(place, 1)
    champion = Champion(place)
    champion.current()
    second = promote(place, 2, model=place.models / "made-1.pt")  # named before it is there
    whole = second.read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        place.champion.write_bytes(content)
        for _ in range(10):
            assert champion.current().version == "v1"
            time.sleep(0.01)
    place.champion.write_bytes(whole)
    wait_for(lambda: champion.version() == "v2")


def test_before_the_first_promotion_the_labeler_is_told_so(place: Workspace) -> None:
    champion = Champion(place)
    assert champion.version() == ""
    with pytest.raises(ValueError, match="no model has been promoted yet"):
        champion.current()
    place.champion.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a file of tensors"):
        champion.current()
    promote(place, 1)
    wait_for(lambda: champion.version() == "v1")


def test_a_sample_is_the_manifest_s_and_never_a_path(
    place: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    promote(place, 1)
    answers = Answers(place, Champion(place))
    outside = tmp_path_factory.mktemp("outside") / "picture.png"
    shutil.copyfile(place.images / "train00.png", outside)
    for sample in (str(outside), "../outside/picture.png", "data/images/train00.png", "file://" + str(outside), ""):
        with pytest.raises(ValueError, match="is not in the manifest"):
            answers.answer(sample, square(0))
    climbing = "data/images/" + "../" * (len(place.root.parts) + 1) + str(outside.relative_to("/"))
    images = {"absolute": str(outside), "climbing": climbing}
    rows = [
        {"id": name, "image": image, "label": "light", "split": "train", "group": ""} for name, image in images.items()
    ]
    write_csv(place.manifest, MANIFEST_COLUMNS, rows)
    for sample, image in images.items():
        assert (place.root / image).is_file()
        with pytest.raises(ValueError, match="outside the workspace"):
            answers.answer(sample, square(0))


def test_pictures_that_come_later_are_known_at_once(place: Workspace) -> None:
    promote(place, 1)
    answers = Answers(place, Champion(place))
    with pytest.raises(ValueError, match="not in the manifest"):
        answers.answer("late", square(0))
    with place.manifest.open("a") as file:
        file.write("late,data/images/train00.png,,pool,\n")
    assert answers.answer("late", square(0)) == answers.answer("train00", square(0))


def test_a_picture_that_is_gone_is_said_to_be_gone(place: Workspace) -> None:
    promote(place, 1)
    (place.images / "train00.png").unlink()
    with pytest.raises(ValueError, match="^train00.png cannot be read; restore it with `dvc checkout`$"):
        Answers(place, Champion(place)).answer("train00", square(0))


def test_classes_come_most_probable_first(place: Workspace) -> None:
    promote(place, 1)
    answer = Answers(place, Champion(place)).answer("train00", np.zeros((SIZE, SIZE), np.uint8))
    for shares in (answer.given, answer.own):
        assert {name for name, _ in shares} == {"dark", "light"}
        assert shares[0][1] >= shares[1][1] and sum(share for _, share in shares) == pytest.approx(1)
    assert answer.version == "v1"


def test_a_model_of_before_records_had_a_fingerprint_is_taken(place: Workspace) -> None:
    promote(place, 7)
    write_json(place.champion_record, {"round": 7, "model_version": "7"})
    assert isinstance(load_promoted(place), Promoted) and load_promoted(place).version == "v7"
