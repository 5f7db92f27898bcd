"""The service that answers strokes: its protocol, who may call it, and a real Label Studio in front of it."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from conftest import Studio
from labeling.client import LabelStudio, service_authorization, webhook_authorization
from labeling.corrections import read_corrections
from labeling.live import Answer, create_app
from labeling.liveness import Liveness, revived
from labeling.screen import labeling_screen
from labeling.tasks import Question, make_task, mask_result, verdict_results

Serve = Callable[[FastAPI], str]
HEIGHT, WIDTH = 12, 20
SECRET = "the-secret"
SERVICE = {"Authorization": service_authorization(SECRET)}
WEBHOOK = {"Authorization": webhook_authorization(SECRET)}
titles = (f"live {number}" for number in itertools.count())


class Double:
    """A model that says how much of the picture is painted, and remembers what it was asked."""

    def __init__(self, version: str = "v3") -> None:
        self.named = version
        self.asked: list[tuple[str, np.ndarray]] = []
        self.prepared: list[str] = []

    def version(self) -> str:
        return self.named

    def answer(self, sample: str, mask: np.ndarray) -> Answer:
        if not sample.startswith("sample"):
            raise ValueError(f"sample {sample} is not in the manifest")
        self.asked.append((sample, mask))
        painted = float((mask > 0).mean())
        given = [("日本語", painted), ("cat", 0.2), ("cow", 0.1), ("hen", 0.0)]
        return Answer(given, [("dog", 0.7), ("cat", 0.3)], self.named)

    def prepare(self, sample: str) -> None:
        self.prepared.append(sample)


def a_mask(left: int = 0, right: int = WIDTH) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, left:right] = 255
    return mask


def a_task(sample: str = "sample 0", tool: Any = "bitmask") -> dict[str, Any]:
    question = Question(
        sample=sample,
        image_url="/image.png",
        heatmap_url="/heatmap.png",
        width=WIDTH,
        height=HEIGHT,
        label="cat",
        predicted="dog",
        confidence=0.7,
        reason="misclassified",
        attention_map=np.full((3, 5), 0.8, np.float32),
    )
    return make_task(question, "v3", 1, tool)


def predict_body(result: list[dict[str, Any]] | None, **data: Any) -> dict[str, Any]:
    """What Label Studio sends after a stroke, or with None when a page is opened."""
    task = a_task()
    task = {"id": 5, **task, "data": {**task["data"], **data}, "annotations": [], "drafts": []}
    context = None if result is None else {"result": result}
    return {
        "tasks": [task],
        "project": "1.17",
        "label_config": "<View/>",
        "params": {"login": None, "context": context},
    }


def post(url: str, body: Any, headers: dict[str, str] = SERVICE) -> httpx.Response:
    return httpx.post(url, json=body, headers=headers, trust_env=False)


def text_of(answer: Any) -> str:
    (result,) = answer["results"][0]["result"]
    assert (result["type"], result["from_name"], result["to_name"]) == ("textarea", "live", "live_target")
    (text,) = result["value"]["text"]
    return str(text)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_a_stroke_is_answered_for_the_given_map_beside_the_unedited_one(serve: Serve, tool: Any) -> None:
    url = serve(create_app(Double(), SECRET))
    text = text_of(post(f"{url}/predict", predict_body([mask_result(a_mask(0, 10), tool)])).json())
    answers, version, clock = text.rsplit(" · ", 2)
    assert answers == "日本語 0.50 · cat 0.20 · cow 0.10 ← dog 0.70 · cat 0.30 (unedited map · 元の地図)"
    assert version == "v3"
    assert len(clock.split(" ")[0].split(":")) == 3


def test_an_empty_context_leaves_the_text_alone_and_does_nothing(serve: Serve) -> None:
    model = Double()
    strokes: list[int] = []
    url = serve(create_app(model, SECRET, on_stroke=strokes.append))
    verdict = predict_body(verdict_results("map_ok"))
    bodies: list[dict[str, Any]] = [predict_body([]), predict_body(None), verdict, {"tasks": []}, {}]
    for body in bodies:
        assert post(f"{url}/predict", body).json() == {"results": [{}]}
    several = {**predict_body(None), "tasks": predict_body(None)["tasks"] * 3}
    assert post(f"{url}/predict", several).json() == {"results": [{}, {}, {}]}
    assert model.asked == strokes == []


def test_a_page_that_is_opened_prepares_for_its_strokes(serve: Serve) -> None:
    model = Double()
    url = serve(create_app(model, SECRET))
    for body in (predict_body(None), predict_body(None, sample=7)):
        post(f"{url}/predict", body)
    wait_for(lambda: model.prepared)
    assert model.prepared == ["sample 0"] and model.asked == []


def test_several_regions_are_joined_by_their_maximum(serve: Serve) -> None:
    model = Double()
    url = serve(create_app(model, SECRET))
    regions = [mask_result(a_mask(0, 4), "bitmask"), mask_result(a_mask(2, 9), "brush"), *verdict_results("map_fixed")]
    post(f"{url}/predict", predict_body(regions))
    ((_, mask),) = model.asked
    assert np.array_equal(mask, a_mask(0, 9))


def test_what_cannot_be_answered_says_so_and_when(serve: Serve) -> None:
    url = serve(create_app(Double(), SECRET))
    stroke = mask_result(a_mask(), "bitmask")
    small = mask_result(np.full((3, 3), 255, np.uint8), "bitmask")
    damaged = {**stroke, "value": {"imageDataURL": "https://example.com/mask.png"}}
    for body, why in (
        (predict_body([small]), "the mask is for 3 x 3"),
        (predict_body([damaged]), "the bitmask is no PNG data URL"),
        (predict_body([stroke], sample="../../etc/passwd"), "not in the manifest"),
        (predict_body([stroke], sample=["a"]), "which picture of the workspace"),
        (predict_body([stroke], height=None), "which picture of the workspace"),
    ):
        text = text_of(post(f"{url}/predict", body).json())
        assert text.startswith("no answer: ") and why in text and ":" in text.rsplit(" · ", 1)[1]


def test_the_protocol_tells_the_model_version(serve: Serve) -> None:
    model = Double()
    url = serve(create_app(model, SECRET))
    for version in ("v3", "v4"):
        model.named = version
        assert httpx.get(f"{url}/health", trust_env=False).json() == {
            **{"status": "UP", "model_class": "abnloop", "model_version": version}
        }
        assert post(f"{url}/setup", {"project": "1.17", "access_token": "x"}).json() == {"model_version": version}
        assert httpx.get(f"{url}/versions", headers=SERVICE, trust_env=False).json() == {"versions": [version]}
    model.named = ""
    assert httpx.get(f"{url}/health", trust_env=False).json()["model_version"] == "no model yet"


def test_strokes_and_webhooks_are_handed_on(serve: Serve) -> None:
    hints: list[dict[str, Any]] = []
    strokes: list[int] = []
    url = serve(create_app(Double(), SECRET, hints.append, strokes.append))
    post(f"{url}/predict", predict_body([mask_result(a_mask(), "bitmask")]))
    assert strokes == [5]
    assert post(f"{url}/webhook", {"action": "TASKS_CREATED"}, WEBHOOK).status_code == 200
    wait_for(lambda: hints)  # the answer comes before the hint is handed on
    assert hints == [{"action": "TASKS_CREATED"}]


def test_nobody_without_the_secret_is_let_in(serve: Serve) -> None:
    hints: list[dict[str, Any]] = []
    model = Double()
    url = serve(create_app(model, SECRET, hints.append))
    body = predict_body([mask_result(a_mask(), "bitmask")])
    wrong = {"Authorization": service_authorization("another")}
    for path, headers in itertools.product(("predict", "setup", "webhook", "openapi.json", "nowhere"), ({}, wrong)):
        assert post(f"{url}/{path}", body, headers).status_code == 401
    assert post(f"{url}/predict", body, WEBHOOK).status_code == 401, "the webhook's key opens the webhook alone"
    assert post(f"{url}/webhook", body, SERVICE).status_code == 401
    assert model.asked == hints == []
    assert SECRET not in WEBHOOK["Authorization"]


def test_a_body_over_the_limit_is_refused_before_it_is_read(serve: Serve) -> None:
    model = Double()
    url = serve(create_app(model, SECRET, max_body=10_000))
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nAuthorization: {SERVICE['Authorization']}\r\n"
    head += "Content-Type: application/json\r\n"
    announced = f"{head}Content-Length: 1000000000000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as caller:
        caller.sendall(announced.encode())  # and not a byte of the body
        assert caller.recv(1000).startswith(b"HTTP/1.1 413")
    with socket.create_connection((host, int(port)), timeout=10) as caller:
        caller.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
        caller.sendall(chunk * 4)  # never ends
        assert caller.recv(1000).startswith(b"HTTP/1.1 413")
    stroke = [mask_result(a_mask(), "bitmask")]
    assert post(f"{url}/predict", predict_body(stroke)).status_code == 200
    assert post(f"{url}/predict", predict_body(stroke, facts="x" * 10_000)).status_code == 413
    assert len(model.asked) == 1


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that nothing may ask for, and what was asked of it."""
    asked: list[str] = []

    class Trap(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_address_in_a_request_is_ever_fetched(serve: Serve, elsewhere: tuple[str, list[str]]) -> None:
    trap, asked = elsewhere
    url = serve(create_app(Double(), SECRET))
    stroke = mask_result(a_mask(), "bitmask")
    remote = {**stroke, "value": {"imageDataURL": f"{trap}/mask.png"}}
    for body in (
        predict_body([stroke], image=f"{trap}/image.png", heatmap=f"{trap}/heat.png"),
        predict_body([remote]),
        predict_body([stroke], sample=f"{trap}/sample.png"),
        {**predict_body([stroke]), "label_config": f'<View><Image value="{trap}/x.png"/></View>'},
    ):
        assert post(f"{url}/predict", body).status_code == 200
    assert post(f"{url}/setup", {"hostname": trap, "access_token": "x"}).status_code == 200
    assert httpx.get(f"{trap}/it-works", trust_env=False).status_code == 200
    assert asked == ["/it-works"]


def test_only_masks_that_are_not_live_are_revived() -> None:
    live, verdict = mask_result(a_mask(), "bitmask"), verdict_results("map_fixed")
    dead = {name: value for name, value in live.items() if name != "dynamic"}
    assert revived([live, *verdict]) is None
    assert revived(verdict) is None
    assert revived([dead, *verdict]) == [live, *verdict]


# --- a real Label Studio in front of it ------------------------------------------------------------------------------


@pytest.fixture
def studio(label_studio: Studio) -> LabelStudio:
    return LabelStudio(label_studio.url, label_studio.token)


@pytest.fixture
def ask(label_studio: Studio) -> Callable[..., Any]:
    """The JSON that Label Studio answers to the administrator."""

    def ask(method: str, path: str, body: Any = None) -> Any:
        headers = {"Authorization": f"Token {label_studio.token}"}
        url = label_studio.url + path
        answer = httpx.request(method, url, json=body, headers=headers, trust_env=False, timeout=30).raise_for_status()
        return answer.json() if answer.content else None

    return ask


@pytest.fixture
def project(studio: LabelStudio) -> int:
    return studio.ensure_project(next(titles), labeling_screen(["cat", "dog"]), "")


def saved(mask: np.ndarray) -> list[dict[str, Any]]:
    """What the editor saves: the mask has lost its key."""
    results = [mask_result(mask, "bitmask"), *verdict_results("map_fixed")]
    return [{name: value for name, value in result.items() if name != "dynamic"} for result in results]


def is_live(results: list[dict[str, Any]]) -> bool:
    return revived(results) is None


@pytest.mark.studio
def test_label_studio_carries_a_stroke_to_the_attached_service_and_its_answer_back(
    studio: LabelStudio, project: int, ask: Callable[..., Any], serve: Serve
) -> None:
    model = Double()
    (task,) = studio.push(project, [a_task()]).values()
    studio.attach_backend(project, serve(create_app(model, SECRET)), "abnloop", SECRET)
    (backend,) = ask("GET", f"/api/ml?project={project}")
    assert (backend["readable_state"], backend["model_version"]) == ("Connected", "v3")
    assert ask("GET", f"/api/ml/{backend['id']}/versions") == {"versions": ["v3"]}

    def stroke(result: list[dict[str, Any]]) -> Any:
        return ask(
            "POST", f"/api/ml/{backend['id']}/interactive-annotating", {"task": task, "context": {"result": result}}
        )["data"]

    text = stroke([mask_result(a_mask(0, 10), "bitmask")])["result"][0]["value"]["text"][0]
    assert text.startswith("日本語 0.50 · cat 0.20 · cow 0.10 ← dog 0.70")
    ((sample, mask),) = model.asked
    assert sample == "sample 0" and np.array_equal(mask, a_mask(0, 10))
    assert stroke([]) == {}
    assert len(model.asked) == 1


@pytest.mark.studio
def test_attaching_again_renews_address_and_secret_and_a_wrong_one_is_refused(
    studio: LabelStudio, project: int, ask: Callable[..., Any], serve: Serve
) -> None:
    hints: list[dict[str, Any]] = []
    before = serve(create_app(Double(), "an older secret"))
    with pytest.raises(ValueError, match="doesn't look like a valid ML backend"):
        studio.attach_backend(project, before, "abnloop", SECRET)
    assert ask("GET", f"/api/ml?project={project}") == []
    studio.attach_backend(project, before, "abnloop", "an older secret")
    now = serve(create_app(Double(), SECRET, hints.append))
    for _ in range(2):
        studio.attach_backend(project, now, "abnloop", SECRET)
    (backend,) = ask("GET", f"/api/ml?project={project}")
    (webhook,) = ask("GET", f"/api/webhooks/?project={project}")
    assert (backend["url"], webhook["url"], webhook["headers"]) == (now, f"{now}/webhook", WEBHOOK)
    assert SECRET not in str((backend, webhook))
    (task,) = studio.push(project, [a_task()]).values()
    studio.annotate(task, verdict_results("unusable"), 1.0)
    wait_for(lambda: any(hint["action"] == "ANNOTATION_CREATED" for hint in hints))


@pytest.mark.studio
def test_a_saved_annotation_becomes_live_again_once_and_stays_one_correction(
    studio: LabelStudio, project: int, ask: Callable[..., Any], serve: Serve
) -> None:
    liveness, hints = Liveness(lambda: studio), []

    def on_hint(hint: dict[str, Any]) -> None:
        hints.append(hint["action"])  # first: what it leads to is told by another one
        liveness.on_hint(hint)

    url = serve(create_app(Double(), SECRET, on_hint))
    (task,) = studio.push(project, [a_task()]).values()
    studio.attach_backend(project, url, "abnloop", SECRET)
    studio.annotate(task, saved(a_mask(0, 7)), 60.0)
    wait_for(lambda: "ANNOTATION_UPDATED" in hints)
    (answered,) = studio.answered(project)
    (annotation,) = answered["annotations"]
    assert is_live(annotation["result"])
    ask("PATCH", f"/api/annotations/{annotation['id']}/", {"result": saved(a_mask(0, 9))})  # the labeler changes it
    wait_for(lambda: hints.count("ANNOTATION_UPDATED") == 3)
    time.sleep(0.3)  # a loop would go on
    assert [hint for hint in hints if "ANNOTATION" in hint] == ["ANNOTATION_CREATED", *["ANNOTATION_UPDATED"] * 3]
    (answered,) = studio.answered(project)
    (correction,), aside = read_corrections([answered], ["cat", "dog"])
    assert aside == [] and is_live(answered["annotations"][0]["result"])
    assert correction.mask is not None and np.array_equal(correction.mask, a_mask(0, 9))
    assert (correction.minutes, correction.labeler) == (1.0, "admin@example.com")


@pytest.mark.studio
def test_a_draft_becomes_live_again_after_the_task_was_painted(
    studio: LabelStudio, project: int, ask: Callable[..., Any], serve: Serve
) -> None:
    liveness = Liveness(lambda: studio, pauses=[0.2] * 100)
    url = serve(create_app(Double(), SECRET, liveness.on_hint, liveness.on_stroke))
    (task,) = studio.push(project, [a_task()]).values()
    draft = ask("POST", f"/api/tasks/{task}/drafts", {"result": saved(a_mask(0, 7)), "lead_time": 5})["id"]
    post(f"{url}/predict", {**predict_body([mask_result(a_mask(), "bitmask")]), "tasks": [{"id": task, **a_task()}]})
    wait_for(lambda: is_live(studio.drafts(task)[draft]))
    ask("PATCH", f"/api/drafts/{draft}/", {"result": saved(a_mask(0, 9))})  # a verdict, say: no stroke comes with it
    wait_for(lambda: is_live(studio.drafts(task)[draft]))
    stored = ask("GET", f"/api/drafts/{draft}/")
    assert stored["lead_time"] == 5 and stored["result"][0] == mask_result(a_mask(0, 9), "bitmask")
    liveness.stop()
    liveness.on_hint({"action": "ANNOTATION_UPDATED", "annotation": {"id": 10**6}})  # gone meanwhile: no failure


@pytest.mark.studio
def test_a_task_without_predictions_opens_as_usual(
    studio: LabelStudio, project: int, ask: Callable[..., Any], serve: Serve
) -> None:
    model = Double()
    studio.attach_backend(project, serve(create_app(model, SECRET)), "abnloop", SECRET)
    ask("POST", f"/api/projects/{project}/import", [{"data": a_task()["data"]}])
    (found,) = ask("GET", f"/api/tasks?project={project}&fields=all")["tasks"]
    opened = ask("GET", f"/api/tasks/{found['id']}?project={project}")
    assert opened["predictions"] == [] and model.asked == []
