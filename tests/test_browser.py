"""The desk as a labeler meets it: a real Chromium, a real Label Studio, the real live service with a small network.

Screenshots go to build/screenshots, or to the folder that ABNLOOP_SCREENSHOTS names.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sklearn.datasets import load_sample_images

from abn.model import ABN, ModelConfig, save_model
from conftest import Studio, served
from flows.live_service import create_service
from flows.services import live_secret
from flows.workspace import Workspace, write_json
from labeling.client import LabelStudio
from labeling.corrections import INSIDE, Correction, read_corrections
from labeling.screen import VERDICTS, Tool, instructions, labeling_screen
from labeling.tasks import Question, as_mask, heatmap, is_mask, make_task
from tiny import PROJECT, Row, write_workspace

pytestmark = [pytest.mark.studio, pytest.mark.browser, pytest.mark.timeout(900)]

FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SHOTS = Path(os.environ.get("ABNLOOP_SCREENSHOTS") or PROJECT / "build/screenshots")
SMALL, LARGE = {"width": 1366, "height": 768}, {"width": 1920, "height": 1080}
PATIENCE = 60_000  # milliseconds; a busy machine draws slowly
CLASSES = ["dahlia", "rose", "tulip", '$image "it\'s" <b>&amp;</b>', "ひまわり"]
BRUSH, ERASER = 15, 10  # the size of each that the editor begins with
LABELER = f"ann-{secrets.token_hex(3)}@example.com"
titles = (f"desk {number} of {LABELER}" for number in itertools.count())
TINY = [f"tiny-{number}" for number in range(8)]
Point = tuple[float, float]


def photos() -> dict[str, np.ndarray]:
    """(H, W, 3) uint8, by the id of their sample."""
    temple, flower = (Image.fromarray(image) for image in load_sample_images().images)
    photo = np.asarray(flower.resize((640, 427)))
    return {
        "photo": photo,
        "wide": np.asarray(temple.resize((2400, 500))),
        "tall": np.asarray(flower.resize((300, 1200))),
        "turned": photo.transpose(1, 0, 2),
        **{name: np.asarray(flower.resize((32, 32))) for name in TINY},
    }


@dataclass
class Live:
    """The live service of a workspace, which can end and come back at the same address."""

    workspace: Workspace
    url: str = ""
    running: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        port = int(self.url.rpartition(":")[2] or 0)
        self.url = self.running.enter_context(served(create_service(self.workspace), port))

    def stop(self) -> None:
        self.running.close()


@dataclass
class Desk:
    """A labeler's browser, and what stands behind it."""

    studio: Studio
    api: LabelStudio
    live: Live
    page: Page
    sizes: dict[str, tuple[int, int]]  # sample -> height, width
    picture: str = ""  # the sample on the screen
    tool: Tool = "bitmask"
    project: int = 0
    tasks: dict[str, int] = field(default_factory=dict)

    def ask(
        self,
        samples: Sequence[str],
        tool: Tool = "bitmask",
        attention: Callable[[int, int], np.ndarray] = lambda height, width: np.zeros((8, 8), np.float32),
        classes: Sequence[str] = CLASSES,
    ) -> None:
        """A project of its own with a task a sample; the labeler begins, and is through with the instructions."""
        self.tool = tool
        self.project = self.api.ensure_project(next(titles), labeling_screen(classes, tool), instructions())
        root = self.live.workspace.root
        for folder in ("data/images", "data/heatmaps"):
            self.api.serve_folder(self.project, root / folder)
        self.api.attach_backend(self.project, self.live.url, "abnloop", live_secret(self.live.workspace))
        tasks = []
        for sample in samples:
            height, width = self.sizes[sample]
            question = Question(
                sample=sample,
                image_url=self.address(f"data/images/{sample}.png"),
                heatmap_url=self.address(f"data/heatmaps/{sample}.png"),
                width=width,
                height=height,
                label=classes[0],
                predicted=classes[1],
                confidence=0.53,
                reason="doubtful attention: the answer hangs on the picture's corners (71%)",
                attention_map=attention(height, width),
                label_confidence=0.32,
            )
            tasks.append(make_task(question, "v1", 1, tool))
        self.tasks = self.api.push(self.project, tasks)
        self.begin(samples[0])

    def address(self, path: str) -> str:
        return LabelStudio.local_file_url(self.studio.document_root, self.live.workspace.root / path)

    def begin(self, sample: str, regions: int = 1) -> None:
        """What "Label All Tasks" opens."""
        self.page.goto(f"{self.studio.url}/projects/{self.project}/data?labeling=1")
        expect(self.page.get_by_text("やること")).to_be_visible()
        self.page.keyboard.press("Escape")
        self.shown(sample, regions)

    def shown(self, sample: str, regions: int = 1) -> None:
        """Wait until the sample and its map are on the screen."""
        self.picture = sample
        number = re.compile(rf"^\s*{self.tasks[sample]}\s*(\d+ of \d+)?\s*$")
        expect(self.page.locator(".lsf-current-task__task-id")).to_have_text(number)
        expect(self.page.locator(".photo .konvajs-content")).to_be_visible()
        expect(self.page.locator(".lsf-outliner-item")).to_have_count(regions)

    def select(self) -> None:
        """Take the map and the brush; the eraser, once taken, is kept from picture to picture."""
        self.page.keyboard.press("b")
        self.page.keyboard.press("Alt+.")
        expect(self.page.locator(".lsf-tree-treenode-selected")).to_be_visible()

    def on_screen(self) -> tuple[np.ndarray, float]:
        """Where the photo's left upper corner is now, (x, y), and the pixels of the screen to one of the picture."""
        box = self.page.locator(".photo .lsf-image img").bounding_box()
        assert box is not None
        return np.array([box["x"], box["y"]]), box["width"] / self.sizes[self.picture][1]

    def stroke(self, *points: Point, size: int = BRUSH) -> np.ndarray:
        """Draw with the mouse from point to point of the picture: the pixels that it covers, (height, width) bool.

        Bitmask draws dots on whole pixels of the picture, with a radius of `size` of them and 0.4 that their soft rims
        add up to; Brush a line that is `size` pixels of the screen wide.
        """
        corner, scale = self.on_screen()
        corners = [corner + np.array(point) * scale for point in points]
        steps = np.linspace(0, 1, 13)[:, None]
        # A mouse stands on whole pixels of the screen.
        way = np.vstack([a + (b - a) * steps for a, b in itertools.pairwise(corners)]).round()
        self.page.mouse.move(*way[0])
        self.page.mouse.down()
        for x, y in way[1:]:
            self.page.mouse.move(x, y)
        self.page.mouse.up()
        way = (way - corner) / scale
        if self.tool == "bitmask":
            return covered(self.sizes[self.picture], size + 0.4, np.floor(way) + 0.5)
        return covered(self.sizes[self.picture], size / 2 / scale, way)

    def paint(self, *points: Point, size: int = BRUSH) -> np.ndarray:
        """A stroke that the network answers."""
        before = self.answer()
        while time.strftime("%H:%M:%S") in before:  # by which one answer is told from the next
            self.page.wait_for_timeout(50)
        stroke = self.stroke(*points, size=size)
        self.answered(before)
        return stroke

    def answer(self) -> str:
        return self.page.locator(".live .lsf-text-area").inner_text().strip()

    def answered(self, before: str) -> None:
        """Wait until the answer is not the one of `before`."""
        text = self.page.locator(".live .lsf-text-area")
        expect(text).not_to_have_text(re.compile(f"^\\s*{re.escape(before)}\\s*$"))

    def submit(self, following: str | None = None) -> None:
        with self.page.expect_response(lambda answer: answer.request.method == "POST" and "/annotations" in answer.url):
            self.page.keyboard.press("Control+Enter")
        if following:
            self.shown(following)
        else:
            expect(self.page.locator(".photo")).to_have_count(0)

    def collect(self) -> dict[str, Correction]:
        corrections, aside = read_corrections(self.api.answered(self.project), CLASSES)
        assert aside == []
        return {correction.sample: correction for correction in corrections}

    def saved_answer(self, sample: str) -> str:
        """What the live answer was when the sample was submitted."""
        (annotation,) = self.api.task(self.tasks[sample])["annotations"]
        (text,) = [one["value"]["text"][0] for one in annotation["result"] if one["from_name"] == "live"]
        return str(text)

    def shot(self, name: str) -> Path:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")
        return SHOTS / f"{name}.png"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the browser tests need chromium; `make test` as root installs it", pytrace=False)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=FLAGS)


@pytest.fixture(scope="module")
def live(label_studio: Studio) -> Iterator[Live]:
    """The service of a workspace with a small network that nobody has trained."""
    pictures = photos()
    rows = [Row(name, CLASSES[number % 2]) for number, name in enumerate(pictures)]
    masks = [np.zeros(picture.shape[:2], np.uint8) for picture in pictures.values()]
    root = write_workspace(label_studio.document_root / "leaves", rows, list(pictures.values()), masks)
    shutil.copyfile(PROJECT / "params.yaml", root / "params.yaml")
    place = Workspace(root)
    torch.manual_seed(21)
    config = ModelConfig("cifar_resnet8", "none", "gate")
    network = ABN(config, len(CLASSES))
    network.linear.weight.data *= 60  # every stroke shows in the answer
    save_model(place.champion, network, config, CLASSES, (32, 32))
    md5 = hashlib.md5(place.champion.read_bytes()).hexdigest()
    write_json(place.champion_record, {"round": 1, "model_version": "1", "md5": md5})
    place.services.parent.mkdir(exist_ok=True)
    write_json(place.services, {"label_studio": {"url": label_studio.url}})
    write_json(place.secrets, {"password": label_studio.password, "token": label_studio.token, "live": "a secret"})
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 5
    Image.fromarray(pictures["photo"]).save(root / "data/images/turned.png", "JPEG", exif=on_its_side)
    (root / "data/heatmaps").mkdir()
    for name, picture in pictures.items():
        Image.fromarray(heatmap(picture, blob(*picture.shape[:2]))).save(root / f"data/heatmaps/{name}.png")
    service = Live(place)
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def page(label_studio: Studio, browser: Browser) -> Iterator[Page]:
    """A labeler's page: invited, signed up and logged in as they would."""
    headers = {"Authorization": f"Token {label_studio.token}"}
    invitation = httpx.get(f"{label_studio.url}/api/invite", headers=headers, trust_env=False).json()["invite_url"]
    page = browser.new_context(viewport=SMALL, locale="en-GB").new_page()  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.set_default_navigation_timeout(PATIENCE)
    page.goto(f"{label_studio.url}{invitation}")
    page.fill("input[name=email]", LABELER)
    page.fill("input[name=password]", secrets.token_hex(8))
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/user/" not in url)
    yield page
    page.context.close()


@pytest.fixture
def desk(label_studio: Studio, live: Live, page: Page) -> Desk:
    page.set_viewport_size(SMALL)  # type: ignore[arg-type]
    page.evaluate("localStorage.clear()")  # where the editor keeps its switches
    sizes = {name: picture.shape[:2] for name, picture in photos().items()}
    return Desk(label_studio, LabelStudio(label_studio.url, label_studio.token), live, page, sizes)


def blob(height: int, width: int) -> np.ndarray:
    """A map that is hot in the middle: (14, 14) float32 0..1."""
    rows, columns = np.indices((14, 14)) - 6.5
    return np.exp(-(rows**2 + columns**2) / 20).astype(np.float32)


def covered(size: tuple[int, int], radius: float, way: np.ndarray) -> np.ndarray:
    """Which pixels of a picture of `size` have their centre under a round brush on its way: (height, width) bool."""
    rows, columns = np.indices(size) + 0.5
    touched = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in itertools.pairwise(way):
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9)
        along = (((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / length).clip(0, 1)
        touched |= (columns - x0 - along * (x1 - x0)) ** 2 + (rows - y0 - along * (y1 - y0)) ** 2 <= radius**2
    return touched


def overlap(mask: np.ndarray | None, wanted: np.ndarray) -> float:
    """Intersection over union."""
    assert mask is not None
    painted = mask >= INSIDE
    return float((painted & wanted).sum() / (painted | wanted).sum())


@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_an_invited_labeler_paints_erases_reads_the_answer_and_submits(desk: Desk, tool: Tool) -> None:
    desk.ask(["photo", "tiny-0"], tool)
    desk.select()
    assert desk.answer() == ""
    painted = desk.paint((150, 300), (250, 100), (400, 120))
    first = desk.answer()
    assert "(unedited map · 元の地図) · v1 · " in first
    desk.page.keyboard.press("e")
    desk.paint((330, 40), (330, 200), size=ERASER)
    second = desk.answer()
    desk.page.keyboard.press("Control+z")
    desk.answered(second)
    assert without_time(desk.answer()) == without_time(first) != without_time(second)
    erased = desk.paint((200, 40), (200, 400), size=ERASER)
    third = desk.answer()
    desk.page.keyboard.press("2")
    desk.shot(f"painted-{tool}")
    desk.submit("tiny-0")
    assert desk.answer() == "", "the answer was the other picture's"
    correction = desk.collect()["photo"]
    assert overlap(correction.mask, painted & ~erased) >= 0.97
    assert (correction.verdict, correction.labeler, correction.model_version) == ("map_fixed", LABELER, "v1")
    assert desk.saved_answer("photo") == third, "neither a verdict nor submitting asks the network"


def without_time(answer: str) -> str:
    return answer.rsplit(" · ", 1)[0]


def test_a_verdict_is_one_key_and_what_is_missing_is_asked_for(desk: Desk) -> None:
    desk.ask(TINY, attention=blob)
    hint = desk.page.get_by_text("Paint first")
    refused(desk, "Give a verdict")
    desk.page.keyboard.press("2")
    expect(hint).to_be_visible()
    desk.select()
    expect(hint).to_be_hidden()
    desk.page.keyboard.press("5")
    refused(desk, "Choose the right class")
    for number, verdict in enumerate(VERDICTS, start=1):
        desk.page.keyboard.press(str(number))
        if verdict == "label_wrong":
            desk.page.keyboard.press("Alt+3")
        desk.submit(TINY[number])
    for number, following in ((4, TINY[7]), (5, None)):
        desk.page.keyboard.press("5")
        desk.page.keyboard.press(f"Alt+{number}")
        expect(desk.page.locator(".classes .ant-radio-checked")).to_have_count(1)
        desk.submit(following)
    said = desk.collect()
    assert [said[sample].verdict for sample in TINY] == [*VERDICTS, "label_wrong", "label_wrong"]
    assert [said[TINY[number]].label for number in (4, 6, 7)] == CLASSES[2:]
    shown = as_mask(blob(32, 32), 32, 32) >= INSIDE
    for number, mask in enumerate((shown, shown, np.ones_like(shown), ~shown)):
        assert overlap(said[TINY[number]].mask, mask) == 1


def refused(desk: Desk, why: str) -> None:
    """What is on the screen cannot be submitted."""
    desk.page.keyboard.press("Control+Enter")
    expect(desk.page.get_by_text(why)).to_be_visible()
    # The dialog zooms in: a click that begins on its button before that has ended can end beside it.
    desk.page.locator(".ant-modal-confirm:not([class*=zoom-])").get_by_role("button", name="OK").click()
    expect(desk.page.get_by_text(why)).to_be_hidden()
    assert desk.collect() == {}


def test_paint_lands_where_the_mouse_was_on_any_picture(desk: Desk) -> None:
    """Wider than the screen, higher than it, turned by its EXIF orientation alone, and zoomed in."""
    samples = ["wide", "tall", "turned", "photo"]
    desk.ask([*samples, "tiny-0"])
    painted = {}
    for sample, following in itertools.pairwise([*samples, "tiny-0"]):
        desk.select()
        if sample == "photo":
            zoom(desk)
        height, width = desk.sizes[sample]
        painted[sample] = desk.paint((0.4 * width, 0.4 * height), (0.6 * width, 0.6 * height))
        desk.page.keyboard.press("2")
        desk.shot(f"painted-{sample}")
        desk.submit(following)
    corrections = desk.collect()
    for sample in samples:
        assert overlap(corrections[sample].mask, painted[sample]) >= 0.97, sample


def zoom(desk: Desk) -> None:
    corner, scale = desk.on_screen()
    desk.page.mouse.move(*corner + np.array([300, 200]) * scale)
    desk.page.keyboard.down("Control")
    for _ in range(3):
        desk.page.mouse.wheel(0, -100)
    desk.page.keyboard.up("Control")
    wider = "width => document.querySelector('.photo .lsf-image img').getBoundingClientRect().width > width"
    desk.page.wait_for_function(wider, arg=640 * scale * 1.2)


def test_several_regions_are_one_mask(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    first = desk.paint((100, 100), (200, 100))
    answer = desk.answer()
    desk.page.keyboard.press("u")  # selects nothing: the next stroke is a region of its own
    second = desk.stroke((400, 300), (500, 300))
    expect(desk.page.locator(".lsf-outliner-item")).to_have_count(2)
    desk.page.keyboard.press("2")
    desk.submit()
    assert desk.saved_answer("photo") == answer, "the network is asked about the first region only"
    assert overlap(desk.collect()["photo"].mask, first | second) >= 0.97


def test_a_dead_service_leaves_an_old_answer_and_a_restarted_one_goes_on(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    first = desk.paint((100, 100), (200, 100))
    old = desk.answer()
    desk.live.stop()
    with desk.page.expect_response("**/interactive-annotating"):
        second = desk.stroke((100, 200), (200, 200))
    assert desk.answer() == old, "its time tells how old"
    desk.live.start()
    third = desk.paint((100, 300), (200, 300))
    desk.page.keyboard.press("2")
    desk.submit()
    assert overlap(desk.collect()["photo"].mask, first | second | third) >= 0.97


def test_a_resumed_draft_and_a_saved_annotation_are_live_again(desk: Desk) -> None:
    desk.ask(["photo"])
    task = desk.tasks["photo"]
    desk.select()
    first = desk.paint((100, 100), (200, 100))
    eventually(lambda: live_again(desk.api.drafts(task).values()))
    desk.begin("photo")
    desk.select()
    second = desk.paint((400, 100), (500, 100))
    answer = desk.answer()
    desk.page.keyboard.press("2")
    desk.submit()
    eventually(lambda: live_again(annotation["result"] for annotation in desk.api.task(task)["annotations"]))
    desk.page.goto(f"{desk.studio.url}/projects/{desk.project}/data?task={task}")
    desk.shown("photo")
    assert desk.answer() == answer, "opening a page asks the network nothing"
    desk.select()
    third = desk.paint((400, 300), (500, 300))
    desk.page.keyboard.press("Control+Enter")
    eventually(lambda: overlap(desk.collect()["photo"].mask, first | second | third) >= 0.97)


def live_again(saved: Iterable[Sequence[dict[str, Any]]]) -> bool:
    masks = [result for results in saved for result in results if is_mask(result)]
    return bool(masks) and all(mask.get("dynamic") for mask in masks)


def eventually(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_task_without_a_prediction_is_answered_all_the_same(desk: Desk) -> None:
    desk.ask(["tiny-0"])
    desk.api._api.predictions.delete(desk.api.task(desk.tasks["tiny-0"])["predictions"][0]["id"])
    desk.begin("tiny-0", regions=0)
    desk.page.keyboard.press("3")
    desk.submit()
    assert desk.collect()["tiny-0"].verdict == "whole_image"


def test_auto_accept_can_be_switched_off_and_the_map_that_it_deleted_comes_back(desk: Desk) -> None:
    auto_annotation, auto_accept = (
        desk.page.locator(".lsf-dynamic-preannotations"),
        desk.page.locator(".lsf-auto-accept"),
    )
    regions = desk.page.locator(".lsf-outliner-item")
    desk.ask(["photo"])
    expect(auto_annotation).to_be_hidden()
    desk.page.evaluate("localStorage.setItem('autoAcceptSuggestions', true)")
    desk.begin("photo")
    desk.select()
    desk.stroke((100, 100), (200, 100))
    expect(regions).to_have_count(0)
    auto_annotation.get_by_role("checkbox").click(force=True)
    expect(auto_accept).to_be_visible()
    desk.shot("auto-accept")
    auto_accept.get_by_role("checkbox").click(force=True)
    expect(auto_accept).to_be_hidden()
    expect(desk.page.locator("input:focus")).to_have_count(0)  # a switch that is vanishing still takes the keys
    desk.page.keyboard.press("Control+z")
    expect(regions).to_have_count(1)
    desk.select()
    painted = desk.paint((100, 200), (200, 200))
    desk.page.keyboard.press("2")
    desk.submit()
    assert overlap(desk.collect()["photo"].mask, painted) >= 0.97


def test_a_right_class_is_found_among_a_thousand(desk: Desk) -> None:
    desk.ask(["tiny-0", "tiny-1"], classes=[*(f"species {number:03}" for number in range(1000)), *CLASSES])
    desk.page.keyboard.press("5")
    refused(desk, "Choose the right class")
    desk.page.locator(".classes .ant-select").click()
    desk.page.get_by_placeholder("Search").fill('"it')
    found = CLASSES[3].replace("$", "＄")
    expect(desk.page.locator(".ant-select-tree-title")).to_have_text([found])
    desk.page.keyboard.press("ArrowDown")
    desk.page.keyboard.press("Enter")
    expect(desk.page.locator(".classes .ant-select-selection-item")).to_have_text(found)
    desk.shot("thousand-classes")
    desk.page.keyboard.press("Escape")
    expect(desk.page.get_by_placeholder("Search")).to_be_hidden()
    desk.submit("tiny-1")
    assert desk.collect()["tiny-0"].label == CLASSES[3]


@pytest.mark.parametrize("window", [SMALL, LARGE], ids=["small", "large"])
def test_nothing_is_cut_off_and_nothing_jumps(desk: Desk, window: dict[str, int]) -> None:
    desk.page.set_viewport_size(window)  # type: ignore[arg-type]
    desk.ask(["photo", "tiny-0"], attention=blob)
    for theme in ("Dark", "Light"):
        switch = desk.page.locator("button[class*=themeToggle]")
        while switch.inner_text().strip() != theme:
            switch.click()
        photo, side = desk.page.locator(".photo .lsf-image img"), desk.page.locator(".side")
        place, frame = photo.bounding_box(), desk.page.locator(".photo .konvajs-content").bounding_box()
        assert place is not None and place["width"] > 0.6 * window["width"]
        assert place == pytest.approx(frame, abs=1), "the whole photo is to be seen"
        corner = {"x": place["x"] + 2, "y": place["y"] + 2, "width": 40, "height": 40}
        unselected = colours(desk.page.screenshot(clip=corner))  # type: ignore[arg-type]
        desk.select()
        selected = colours(desk.page.screenshot(clip=corner))  # type: ignore[arg-type]
        assert np.abs(selected - unselected).max() <= 2, "a selected map does not darken the photo"
        desk.paint((195, 250), (205, 165), (255, 115), (330, 105), (395, 130), (425, 200), (420, 260))
        for key in "123456":
            desk.page.keyboard.press(key)
            assert photo.bounding_box() == place
            for part in (side, desk.page.locator(".photo .lsf-tool__controls").last):
                inside = part.bounding_box()
                assert inside is not None and inside["y"] + inside["height"] <= window["height"] - 50
        desk.page.keyboard.press("2")
        desk.page.mouse.move(10, 10)
        desk.shot(f"desk-{window['width']}-{theme.lower()}")
        desk.page.keyboard.press("Control+z")


def colours(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
