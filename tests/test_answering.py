"""The champion answers about pictures by the command and by the service, and what is doubtful is kept for labelers."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from abn.model import ABN, ModelConfig, save_model
from flows import answering, api
from flows.answering import Answer, Picture, Refused, answer_all, load_champion, read_picture
from flows.api import make_router
from flows.champion import Champion, Promoted
from flows.inbox import CaptureConfig, Inbox, why_keep
from flows.workspace import Workspace, write_json
from labeling.tasks import heatmap
from test_commands import Refuse, Run, abnloop, refusal  # noqa: F401 - fixtures
from tiny import SIZE, make_workspace, picture, write_params

CLASSES = ["dark", "light"]
OFF = CaptureConfig(False, 0.6, 0.1, 0.01, 0.02, 500)
EVERYTHING = CaptureConfig(True, 1.0, 1.0, 0.0, 0.02, 500)


def champion_file(path: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = ModelConfig("cifar_resnet8", "none", "residual")
    save_model(path, ABN(config, len(CLASSES)), config, CLASSES, (SIZE, SIZE))


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """A workspace with a champion."""
    workspace = Workspace(make_workspace(tmp_path / "leaves"))
    write_params(workspace.root, epochs=1)
    champion_file(workspace.champion)
    write_json(workspace.champion_record, {"model_version": "3"})
    return workspace


def png(number: int, **options: Any) -> bytes:
    """A file that shows picture `number`."""
    file = io.BytesIO()
    Image.fromarray(picture(number, "light")).save(file, "PNG", **options)
    return file.getvalue()


def ask(url: str, *files: bytes, **options: Any) -> httpx.Response:
    body = {"images": [{"image": base64.b64encode(file).decode(), "name": f"{n}.png"} for n, file in enumerate(files)]}
    return httpx.post(f"{url}/v1/predict", json=body, params=options, trust_env=False, timeout=60)


def answered(champion: Promoted, file: bytes) -> tuple[Picture, Answer]:
    (one,) = answer_all(champion, [("a.png", file)])
    assert not isinstance(one, Refused)
    return one


Serve = Callable[[FastAPI], str]


@pytest.fixture
def service(place: Workspace, serve: Serve) -> Callable[[CaptureConfig], tuple[str, Inbox]]:
    """The service of the workspace with an inbox of its own."""

    def start(config: CaptureConfig = OFF) -> tuple[str, Inbox]:
        inbox, app = Inbox(place.inbox, config), FastAPI(title="abnloop")
        app.include_router(make_router(Champion(place).current, inbox))
        return serve(app), inbox

    return start


# --- answers


def test_an_answer_is_the_networks_own(place: Workspace) -> None:
    champion = load_champion(place)
    given, answer = answered(champion, png(1))
    images = torch.from_numpy(picture(1, "light")).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        output = champion.network(images)
    assert answer.probabilities == pytest.approx(dict(zip(CLASSES, output.logits.softmax(1)[0].tolist(), strict=True)))
    assert answer.confidence == max(answer.probabilities.values()) == answer.probabilities[answer.predicted]
    assert np.allclose(answer.attention_map, output.attention_map[0, 0].numpy(), atol=1e-6)
    assert given.name == "a.png" and np.array_equal(given.shown, picture(1, "light"))


def test_answers_come_in_order_whatever_the_batches(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [(f"{number}.png", png(number) if number % 3 else b"broken") for number in range(9)]
    champion = load_champion(place)
    at_once = list(answer_all(champion, files))
    monkeypatch.setattr(answering, "BATCH", 2)
    by_two = list(answer_all(champion, files))
    assert [type(one) is Refused for one in at_once] == [number % 3 == 0 for number in range(9)]
    for one, two in zip(at_once, by_two, strict=True):
        if isinstance(one, Refused) or isinstance(two, Refused):
            assert one == two
        else:
            assert one[0].name == two[0].name
            assert one[1].probabilities == pytest.approx(two[1].probabilities, abs=1e-5)


def test_a_picture_is_turned_upright_before_the_network_sees_it() -> None:
    tall = np.zeros((20, 10, 3), np.uint8)
    tall[:10] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(np.rot90(tall).copy()).save(file, "PNG", exif=exif)
    upright = read_picture("a.png", file.getvalue(), (20, 10))
    assert isinstance(upright, Picture)
    assert np.array_equal(upright.shown, tall) and np.array_equal(upright.seen.permute(1, 2, 0).numpy(), tall)


def test_what_cannot_be_answered_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(file: bytes) -> str:
        refused = read_picture("a", file, (16, 16))
        assert isinstance(refused, Refused)
        return refused.why

    assert (
        why(b"")
        == why(b"%!PS-Adobe-3.0 EPSF-3.0")
        == ("no picture of a known format (PNG, JPEG, WEBP, GIF, BMP, TIFF)")
    )
    assert why(png(1)[:200]).startswith("cannot be decoded: ")
    monkeypatch.setattr(answering, "MAX_PIXELS", 100)
    assert why(png(1)).startswith("16 x 16 pixels; the limit is")
    monkeypatch.setattr(answering, "MAX_BYTES", 10)
    assert "the limit is" in why(png(1)) and "MB a picture" in why(png(1))


# --- the command


def test_the_command_answers_a_folder_as_a_table_json_and_csv(place: Workspace, abnloop: Run, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "new"
    (folder / "below").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(1))
    (folder / "below/b.png").write_bytes(png(2))
    (folder / ".hidden").write_text("not a picture")
    words = ("predict", str(folder), "--workspace", str(place.root))

    code, table, _ = abnloop(*words)
    assert code == 0 and "a.png" in table and "b.png" in table

    code, lines, _ = abnloop(*words, "--json", "--maps", str(tmp_path / "maps"))
    first, second = map(json.loads, lines.splitlines())
    assert code == 0 and [first["picture"], second["picture"]] == [f"{folder}/a.png", f"{folder}/below/b.png"]
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert first["confidence"] == first["probabilities"][first["predicted"]] and first["error"] == ""
    assert second["map"] == str(tmp_path / "maps/below/b.png.png")
    with Image.open(second["map"]) as drawn:
        assert drawn.size == (SIZE, SIZE)

    (folder / "c.png").write_text("broken")
    code, text, _ = abnloop(*words, "--csv")
    rows = list(csv.DictReader(text.splitlines()))
    assert code == 1 and rows[2]["error"].startswith("no picture of a known format")
    assert float(rows[0]["p:light"]) == pytest.approx(first["probabilities"]["light"])


def test_the_command_refuses_what_it_cannot_do(place: Workspace, refusal: Refuse, tmp_path: Path) -> None:  # noqa: F811
    words = ("--workspace", str(place.root))
    assert refusal("predict", "gone", *words, watch=tmp_path) == (
        "gone does not exist; name pictures, or folders of pictures"
    )
    (tmp_path / "empty").mkdir()
    assert "there are no files in" in refusal("predict", str(tmp_path / "empty"), *words, watch=tmp_path)
    assert "exclude each other" in refusal("predict", str(tmp_path), "--json", "--csv", *words, watch=tmp_path)
    place.champion.unlink()
    assert refusal("predict", str(place.images), *words, watch=tmp_path) == (
        "no model has been promoted yet; open a round with `abnloop round open`"
    )


# --- the service


def test_the_service_answers_json_and_forms_alike(service: Any) -> None:
    url, _ = service()
    said = ask(url, png(1), png(2), maps="overlay").json()
    form = httpx.post(
        f"{url}/v1/predict",
        params={"maps": "overlay"},
        files=[("images", ("0.png", png(1))), ("images", ("1.png", png(2)))],
        trust_env=False,
    ).json()
    assert said == form
    assert (said["model_version"], said["classes"], [one["name"] for one in said["answers"]]) == (
        "v3",
        CLASSES,
        ["0.png", "1.png"],
    )


def test_the_service_and_the_command_say_the_same(service: Any, place: Workspace) -> None:
    url, _ = service()
    (one,) = ask(url, png(1)).json()["answers"]
    _, answer = answered(load_champion(place), png(1))
    assert one["probabilities"] == pytest.approx(answer.probabilities)
    assert one["disagreement"] == pytest.approx(answer.disagreement)


@pytest.mark.parametrize("maps", ["grey", "overlay", "none"])
def test_an_attention_map_comes_as_png(service: Any, place: Workspace, maps: str) -> None:
    url, _ = service()
    (one,) = ask(url, png(1), maps=maps).json()["answers"]
    _, answer = answered(load_champion(place), png(1))
    if maps == "none":
        assert one["attention_map"] is None
        return
    with Image.open(io.BytesIO(base64.b64decode(one["attention_map"]))) as drawn:
        pixels = np.array(drawn)
    own = (answer.attention_map * 255).round().astype(np.uint8)
    expected = own if maps == "grey" else heatmap(picture(1, "light"), answer.attention_map)
    assert pixels.shape == expected.shape and np.abs(pixels.astype(int) - expected).max() <= 1


def test_a_bad_picture_does_not_spoil_the_others(service: Any) -> None:
    url, _ = service()
    good, bad = ask(url, png(1), b"no picture").json()["answers"]
    assert good["predicted"] in CLASSES
    assert bad == {"name": "1.png", "error": "no picture of a known format (PNG, JPEG, WEBP, GIF, BMP, TIFF)"}


def test_the_service_follows_a_promotion(service: Any, place: Workspace) -> None:
    url, _ = service()
    before = ask(url, png(1)).json()["answers"][0]["probabilities"]
    champion_file(place.champion, seed=1)
    write_json(place.champion_record, {"model_version": "4"})
    while (said := ask(url, png(1)).json())["model_version"] != "v4":  # the old one answers until the new one is loaded
        assert said["model_version"] == "v3"
    assert said["answers"][0]["probabilities"] != pytest.approx(before)


def test_requests_beyond_the_limits_are_refused(service: Any) -> None:
    url, _ = service()
    assert ask(url).status_code == 422
    too_many = ask(url, *[png(1)] * (api.MAX_PICTURES + 1))
    assert too_many.status_code == 422 and "at most 32 items" in too_many.text
    files = [("images", ("a.png", png(1)))] * (api.MAX_PICTURES + 1)
    assert httpx.post(f"{url}/v1/predict", files=files, trust_env=False).status_code == 400

    post = partial(httpx.post, f"{url}/v1/predict", trust_env=False)
    assert post(content=b"a=b").status_code == 415
    broken = post(json={"images": [{"image": 5}]})
    assert broken.status_code == 422 and broken.json()["detail"][0]["loc"] == ["images", 0, "image"]


def test_without_a_champion_the_service_says_so(service: Any, place: Workspace) -> None:
    place.champion.unlink()
    url, _ = service()
    said = ask(url, png(1))
    assert (said.status_code, said.json()["detail"]) == (503, "no model has been promoted yet")


def test_openapi_describes_both_ways_to_send_pictures(service: Any) -> None:
    url, _ = service()
    page = httpx.get(f"{url}/openapi.json", trust_env=False).json()
    predict, flag = (page["paths"][path]["post"] for path in ("/v1/predict", "/v1/flag"))
    for operation, field in ((predict, "images"), (flag, "picture")):
        content = operation["requestBody"]["content"]
        assert field in content["application/json"]["schema"]["properties"]
        assert field in content["multipart/form-data"]["schema"]["properties"]
        assert {"401", "413", "415", "422", "503"} <= set(operation["responses"])
    assert "20 MB and 50 megapixels" in predict["description"]
    named = set(_references(page))
    assert named <= {f"#/components/schemas/{name}" for name in page["components"]["schemas"]}
    assert httpx.get(f"{url}/docs", trust_env=False).status_code == 200


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [value for key, one in node.items() for value in ([one] if key == "$ref" else _references(one))]
    return [value for one in node for value in _references(one)] if isinstance(node, list) else []


# --- what is kept


def a_picture(number: int) -> Picture:
    read = read_picture(f"{number}.png", png(number), (SIZE, SIZE))
    assert isinstance(read, Picture)
    return read


def an_answer(confidence: float = 0.9, disagreement: float = 0.0) -> Answer:
    return Answer({"light": confidence, "dark": 1 - confidence}, disagreement, np.zeros((4, 4), np.float32))


def test_what_is_kept_is_unsure_doubtful_or_random() -> None:
    config = CaptureConfig(True, 0.6, 0.1, 0.25, 0.02, 500)
    pictures = [a_picture(number) for number in range(200)]
    assert why_keep(pictures[0], an_answer(0.55), config) == "low confidence (55%)"
    assert "the two branches answer differently (divergence 0.20)" in why_keep(pictures[0], an_answer(0.9, 0.2), config)
    random = [why_keep(one, an_answer(), config) for one in pictures]
    assert set(random) == {"", "picked at random"} and 30 <= random.count("picked at random") <= 70
    assert random == [why_keep(one, an_answer(), config) for one in pictures], "the same picture, the same decision"


def test_a_picture_is_kept_once_and_so_is_one_that_looks_like_it(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "inbox.db", EVERYTHING)
    first, file = a_picture(1), io.BytesIO()
    lighter = picture(1, "light").astype(int)
    lighter[::2] += 1
    Image.fromarray(lighter.clip(0, 255).astype(np.uint8)).save(file, "WEBP", quality=95)
    again = read_picture("other.webp", file.getvalue(), (SIZE, SIZE))
    assert isinstance(again, Picture) and again.sha256 != first.sha256
    assert inbox.keep(first, an_answer(), "v1", "why")
    assert not inbox.keep(first, an_answer(), "v1", "why")
    assert not inbox.keep(again, an_answer(), "v1", "why")
    assert inbox.keep(a_picture(2), an_answer(), "v1", "why")
    assert [one.name for one in inbox.pictures()] == ["1.png", "2.png"]
    assert inbox.keep(again, an_answer(), "v1", "flagged", flagged=True), "a person said so"
    assert inbox.pictures()[0].name == "other.webp"
    assert inbox.file(first.sha256) == first.file


def test_the_oldest_that_nobody_flagged_goes_first(tmp_path: Path) -> None:
    size = sum(len(png(number)) for number in range(3)) / 1e6
    inbox = Inbox(tmp_path / "inbox.db", CaptureConfig(True, 1, 1, 0, 0.02, size + 1e-4))
    assert inbox.keep(a_picture(0), an_answer(), "v1", "why", flagged=True)
    for number in (1, 2, 3):
        assert inbox.keep(a_picture(number), an_answer(), "v1", "why")
    assert [one.name for one in inbox.pictures()] == ["0.png", "2.png", "3.png"]
    for number in (2, 3):
        assert inbox.keep(a_picture(number), an_answer(), "v1", "why", flagged=True)
    assert not inbox.keep(a_picture(4), an_answer(), "v1", "why"), "there is no room beside what is flagged"
    with pytest.raises(ValueError, match="the inbox is full of flagged pictures"):
        inbox.keep(a_picture(4), an_answer(), "v1", "why", flagged=True)
    assert [one.name for one in inbox.pictures()] == ["0.png", "2.png", "3.png"]


def test_the_service_keeps_pictures_only_where_capturing_is_on(service: Any, place: Workspace) -> None:
    url, _ = service(OFF)
    ask(url, png(1))
    assert not place.inbox.exists()
    assert httpx.post(f"{url}/v1/flag", files={"picture": png(1)}, trust_env=False).status_code == 409


def test_a_full_disk_does_not_keep_the_service_from_answering(
    service: Any, place: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    url, _ = service(EVERYTHING)
    place.inbox.mkdir(parents=True)  # nothing can be written there
    assert ask(url, png(1)).json()["answers"][0]["predicted"] in CLASSES
    assert "0.png was not kept for labelers" in caplog.text


def test_a_flagged_picture_is_kept_with_its_hint(service: Any) -> None:
    url, inbox = service(CaptureConfig(True, 0.0, 1.0, 0.0, 0.02, 500))
    ask(url, png(1))
    assert inbox.pictures() == []
    post = partial(httpx.post, f"{url}/v1/flag", trust_env=False)
    form = post(files={"picture": ("a.png", png(1))}, data={"right_class": "dark"})
    assert form.json() == {"kept": True}
    sent = {"picture": {"image": base64.b64encode(png(1)).decode()}}
    assert post(json=sent).json() == {"kept": False}
    (kept,) = inbox.pictures()
    assert (kept.name, kept.flagged, kept.right_class, kept.model_version) == ("a.png", 1, "dark", "v3")
    assert kept.why.startswith("flagged as wrong: the answer was ") and kept.why.endswith(", said to be dark")

    wrong = post(files={"picture": png(2)}, data={"right_class": "lihgt"})
    assert (wrong.status_code, wrong.json()["detail"]) == (422, "right_class lihgt is not a class; did you mean light?")
    assert post(files={"picture": b"broken"}).status_code == 422


@pytest.mark.parametrize("setting", ["confidence", "disagreement", "random_share", "near_duplicate"])
def test_a_share_beyond_one_is_refused(setting: str) -> None:
    values = {"confidence": 0.6, "disagreement": 0.1, "random_share": 0.01, "near_duplicate": 0.02}
    with pytest.raises(ValueError, match=rf"capture\.{setting} is 1\.5; it must be from 0 to 1"):
        CaptureConfig(enabled=True, megabytes=500, **{**values, setting: 1.5})
