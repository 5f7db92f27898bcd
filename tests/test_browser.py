"""The desk as a labeler meets it: a real Chromium, a real Label Studio, the real live service with a small network.

Screenshots go to build/screenshots, or to the folder that ABNLOOP_SCREENSHOTS names.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

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
from labeling.screen import Tool, instructions, labeling_screen
from labeling.tasks import Question, heatmap, make_task
from tiny import PROJECT, Row, write_workspace

pytestmark = [pytest.mark.studio, pytest.mark.browser, pytest.mark.timeout(900)]

FLAGS = ["--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SHOTS = Path(os.environ.get("ABNLOOP_SCREENSHOTS") or PROJECT / "build/screenshots")
SMALL, LARGE = {"width": 1366, "height": 768}, {"width": 1920, "height": 1080}
PATIENCE = 120_000  # milliseconds; a busy machine draws slowly
CLASSES = ["leaf rust", '"it\'s" <b>&amp;</b>', "日本語 クラス", "$image"]
RADIUS = {"bitmask": 15.0, "brush": 7.5}  # of a new brush, in pixels of the picture
LABELER = f"ann-{secrets.token_hex(3)}@example.com"
titles = (f"desk {number} of {LABELER}" for number in itertools.count())
Point = tuple[float, float]


def photos() -> dict[str, np.ndarray]:
    """(H, W, 3) uint8, by the id of their sample."""
    temple, flower = (Image.fromarray(image) for image in load_sample_images().images)
    sizes = {"photo": (640, 427), "wide": (2400, 500), "tall": (300, 1200), "tiny": (32, 32)}
    pictures = {name: np.asarray(flower.resize(size)) for name, size in sizes.items()}
    return {
        **pictures,
        "wide": np.asarray(temple.resize(sizes["wide"])),
        "turned": pictures["photo"].transpose(1, 0, 2),
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
                confidence=0.62,
                reason="its answer rests on what lies outside its map",
                attention_map=attention(height, width),
                label_confidence=0.31,
            )
            tasks.append(make_task(question, "v1", 1, tool))
        self.tasks = self.api.push(self.project, tasks)
        self.begin(samples[0])

    def address(self, path: str) -> str:
        return LabelStudio.local_file_url(self.studio.document_root, self.live.workspace.root / path)

    def begin(self, sample: str) -> None:
        """What "Label All Tasks" opens."""
        self.page.goto(f"{self.studio.url}/projects/{self.project}/data?labeling=1")
        expect(self.page.get_by_text("やること")).to_be_visible()
        self.page.keyboard.press("Escape")
        self.shown(sample)

    def shown(self, sample: str) -> None:
        """Wait until the sample and its map are on the screen."""
        self.picture = sample
        number = re.compile(rf"^\s*{self.tasks[sample]}\s*(\d+ of \d+)?\s*$")
        expect(self.page.locator(".lsf-current-task__task-id")).to_have_text(number)
        expect(self.page.locator(".photo .konvajs-content")).to_be_visible()
        expect(self.page.locator(".lsf-outliner-item").first).to_be_visible()

    def select(self) -> None:
        self.page.keyboard.press("Alt+.")
        expect(self.page.locator(".lsf-tree-treenode-selected")).to_be_visible()

    def on_screen(self, point: Point) -> Point:
        """Where a point of the picture (x, y), in its pixels, is on the screen now; zoomed or not."""
        box = self.page.locator(".photo .lsf-image img").bounding_box()
        assert box is not None
        height, width = self.sizes[self.picture]
        return box["x"] + point[0] * box["width"] / width, box["y"] + point[1] * box["height"] / height

    def stroke(self, *points: Point) -> None:
        """Draw with the mouse from point to point of the picture."""
        self.page.mouse.move(*self.on_screen(points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.on_screen(point), steps=12)
        self.page.mouse.up()

    def answer(self) -> str:
        return self.page.locator(".live .lsf-text-area").inner_text().strip()

    def new_answer(self, before: str) -> str:
        """The text once it differs from `before`."""
        expect(self.page.locator(".live .lsf-text-area")).not_to_have_text(re.compile(f"^\\s*{re.escape(before)}\\s*$"))
        return self.answer()

    def submit(self, following: str | None = None) -> None:
        self.page.keyboard.press("Control+Enter")
        if following:
            self.shown(following)
        else:
            expect(self.page.locator(".photo")).to_have_count(0)

    def collect(self) -> dict[str, Correction]:
        corrections, aside = read_corrections(self.api.answered(self.project), CLASSES)
        assert aside == []
        return {correction.sample: correction for correction in corrections}

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
    torch.manual_seed(0)
    config = ModelConfig("cifar_resnet8", "none", "residual")
    save_model(place.champion, ABN(config, len(CLASSES)), config, CLASSES, (32, 32))
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
    sizes = {name: picture.shape[:2] for name, picture in photos().items()}
    return Desk(label_studio, LabelStudio(label_studio.url, label_studio.token), live, page, sizes)


def blob(height: int, width: int) -> np.ndarray:
    """A map that is hot in the middle: (14, 14) float32 0..1."""
    rows, columns = np.indices((14, 14)) - 6.5
    return np.exp(-(rows**2 + columns**2) / 20).astype(np.float32)


def line(size: tuple[int, int], radius: float, *points: Point) -> np.ndarray:
    """Which pixels of a picture of `size` a round brush touches on its way: (height, width) bool."""
    rows, columns = np.indices(size)
    touched = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
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
    desk.ask(["photo", "tiny"], tool)
    desk.select()
    assert desk.answer() == ""
    snake, cut = [(150.0, 300.0), (250.0, 100.0), (400.0, 120.0)], [(330.0, 40.0), (330.0, 200.0)]
    desk.stroke(*snake)
    began = time.monotonic()
    painted = desk.new_answer("")
    print(f"{tool}: the answer came {time.monotonic() - began:.2f} s after the mouse was up")
    assert "(unedited map · 元の地図) · v1 · " in painted
    desk.page.keyboard.press("e")
    desk.stroke(*cut)
    erased = desk.new_answer(painted)
    desk.page.keyboard.press("2")
    desk.shot(f"painted-{tool}")
    assert desk.answer() == erased, "a verdict asks the network nothing"
    desk.submit("tiny")
    correction = desk.collect()["photo"]
    wanted = line((427, 640), RADIUS[tool], *snake) & ~line((427, 640), RADIUS[tool], *cut)
    assert overlap(correction.mask, wanted) >= 0.97
    assert (correction.verdict, correction.labeler, correction.model_version) == ("map_fixed", LABELER, "v1")


def test_what_is_missing_is_asked_for_and_a_fine_map_is_one_key(desk: Desk) -> None:
    desk.ask(["photo"], attention=blob)
    desk.page.keyboard.press("Control+Enter")
    expect(desk.page.get_by_text("Give a verdict")).to_be_visible()
    desk.page.keyboard.press("Enter")
    assert desk.collect() == {}
    desk.page.keyboard.press("2")
    hint = desk.page.get_by_text("Paint first")
    expect(hint).to_be_visible()
    desk.select()
    expect(hint).to_be_hidden()
    desk.page.keyboard.press("1")
    desk.submit()
    correction = desk.collect()["photo"]
    assert correction.verdict == "map_ok"
    assert correction.mask is not None and 0 < (correction.mask >= INSIDE).mean() < 0.5


def test_a_wrong_class_is_chosen_by_key_whatever_its_name(desk: Desk) -> None:
    desk.ask(["photo", "wide", "tiny"])
    for sample, number, following in (("photo", 2, "wide"), ("wide", 3, "tiny"), ("tiny", 4, None)):
        desk.page.keyboard.press("5")
        expect(desk.page.locator(".classes")).to_be_visible()
        desk.page.keyboard.press(f"Alt+{number}")
        desk.shot(f"class-{sample}")
        desk.submit(following)
    labels = {sample: correction.label for sample, correction in desk.collect().items()}
    assert labels == {"photo": CLASSES[1], "wide": CLASSES[2], "tiny": CLASSES[3]}


def test_all_but_what_is_red_can_be_the_evidence(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    mark = [(60.0, 60.0), (100.0, 60.0)]
    desk.stroke(*mark)
    desk.page.keyboard.press("4")
    desk.submit()
    correction = desk.collect()["photo"]
    assert correction.verdict == "all_but_map"
    assert overlap(correction.mask, ~line((427, 640), RADIUS["bitmask"], *mark)) >= 0.97


def test_undo_brings_the_earlier_answer_back(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    desk.stroke((200, 200), (300, 200))
    first = desk.new_answer("")
    desk.stroke((500, 300), (600, 300))
    second = desk.new_answer(first)
    desk.page.keyboard.press("Control+z")
    assert without_time(desk.new_answer(second)) == without_time(first)


def without_time(answer: str) -> str:
    return answer.rsplit(" · ", 1)[0]


@pytest.mark.parametrize("sample", ["wide", "tall", "turned"])
def test_paint_lands_where_the_mouse_was_on_any_picture(desk: Desk, sample: str) -> None:
    """Wider than the screen, higher than it, and turned by its EXIF orientation alone."""
    desk.ask([sample])
    desk.select()
    height, width = desk.sizes[sample]
    path = [(0.3 * width, 0.4 * height), (0.6 * width, 0.7 * height)]
    desk.stroke(*path)
    desk.new_answer("")
    desk.page.keyboard.press("2")
    desk.shot(f"painted-{sample}")
    desk.submit()
    assert overlap(desk.collect()[sample].mask, line((height, width), RADIUS["bitmask"], *path)) >= 0.97


def test_paint_lands_where_the_mouse_was_when_zoomed_in(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    before = desk.on_screen((0, 0))
    desk.page.mouse.move(*desk.on_screen((300, 200)))
    desk.page.keyboard.down("Control")
    for _ in range(3):
        desk.page.mouse.wheel(0, -100)
    desk.page.keyboard.up("Control")
    desk.page.wait_for_function("document.querySelector('.photo .lsf-image img').getBoundingClientRect().width > 1000")
    assert desk.on_screen((0, 0)) != before
    path = [(260.0, 180.0), (340.0, 220.0)]
    desk.stroke(*path)
    desk.new_answer("")
    desk.page.keyboard.press("2")
    desk.shot("painted-zoomed")
    desk.submit()
    assert overlap(desk.collect()["photo"].mask, line((427, 640), RADIUS["bitmask"], *path)) >= 0.97


def test_several_regions_are_one_mask(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    first, second = [(100.0, 100.0), (200.0, 100.0)], [(400.0, 300.0), (500.0, 300.0)]
    desk.stroke(*first)
    answer = desk.new_answer("")
    desk.page.keyboard.press("u")  # selects nothing: the next stroke is a region of its own
    desk.stroke(*second)
    expect(desk.page.locator(".lsf-outliner-item")).to_have_count(2)
    assert desk.answer() == answer, "which the network is not asked about"
    desk.page.keyboard.press("2")
    desk.submit()
    both = line((427, 640), RADIUS["bitmask"], *first) | line((427, 640), RADIUS["bitmask"], *second)
    assert overlap(desk.collect()["photo"].mask, both) >= 0.97


def test_a_dead_service_leaves_an_old_answer_and_a_restarted_one_goes_on(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    desk.stroke((100, 100), (200, 100))
    old = desk.new_answer("")
    desk.live.stop()
    desk.stroke((100, 200), (200, 200))
    desk.page.wait_for_timeout(2000)
    assert desk.answer() == old, "its time tells how old"
    desk.live.start()
    desk.stroke((100, 300), (200, 300))
    desk.new_answer(old)
    desk.page.keyboard.press("2")
    desk.submit()
    paths = ([(100.0, y), (200.0, y)] for y in (100.0, 200.0, 300.0))
    wanted = np.any([line((427, 640), RADIUS["bitmask"], *path) for path in paths], axis=0)
    assert overlap(desk.collect()["photo"].mask, wanted) >= 0.97


def test_a_saved_annotation_is_live_again_when_it_is_opened(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.select()
    desk.stroke((100, 100), (200, 100))
    before = desk.new_answer("")
    desk.page.keyboard.press("2")
    desk.submit()
    desk.page.goto(f"{desk.studio.url}/projects/{desk.project}/data?task={desk.tasks['photo']}")
    desk.shown("photo")
    desk.select()
    desk.stroke((400, 300), (500, 300))
    desk.new_answer(before)


def test_a_task_without_a_prediction_is_answered_all_the_same(desk: Desk) -> None:
    desk.ask(["photo"])
    desk.api._api.predictions.delete(desk.api.task(desk.tasks["photo"])["predictions"][0]["id"])
    desk.page.goto(f"{desk.studio.url}/projects/{desk.project}/data?labeling=1")
    desk.page.keyboard.press("Escape")
    expect(desk.page.locator(".photo .konvajs-content")).to_be_visible()
    desk.page.keyboard.press("3")
    desk.submit()
    assert desk.collect()["photo"].verdict == "whole_image"


@pytest.mark.parametrize("theme", ["Light", "Dark"])
@pytest.mark.parametrize("window", [SMALL, LARGE], ids=["small", "large"])
def test_nothing_is_cut_off_and_nothing_jumps(desk: Desk, window: dict[str, int], theme: str) -> None:
    desk.page.set_viewport_size(window)  # type: ignore[arg-type]
    desk.ask(["photo", "tiny"], attention=blob)
    switch = desk.page.locator("button[class*=themeToggle]")
    while switch.inner_text().strip() != theme:
        switch.click()
    photo, side = desk.page.locator(".photo .lsf-image img"), desk.page.locator(".side")
    for hidden in (".lsf-auto-accept", ".lsf-dynamic-preannotations"):
        assert not desk.page.locator(hidden).first.is_visible()
    place = photo.bounding_box()
    assert place is not None and place["width"] > 0.6 * window["width"]
    corner = {"x": place["x"] + 2, "y": place["y"] + 2, "width": 40, "height": 40}
    unselected = desk.page.screenshot(clip=corner)  # type: ignore[arg-type]
    desk.select()
    assert desk.page.screenshot(clip=corner) == unselected, "a selected map does not darken the photo"  # type: ignore[arg-type]
    desk.stroke((100, 100), (200, 100))
    desk.new_answer("")
    for key in "123456":
        desk.page.keyboard.press(key)
        assert photo.bounding_box() == place
        inside = side.bounding_box()
        assert inside is not None and inside["y"] + inside["height"] <= window["height"] - 50
    desk.page.keyboard.press("2")
    desk.page.mouse.move(10, 10)
    desk.shot(f"desk-{window['width']}-{theme.lower()}")
