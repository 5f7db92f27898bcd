"""Everything that goes through a real Label Studio."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import psutil
import pytest
from fastapi import FastAPI, Request, Response
from PIL import Image

from conftest import Studio
from flows.people import invite
from labeling.client import LabelStudio, LabelStudioUnreachable, TokenRefused
from labeling.corrections import INSIDE, read_corrections, settle
from labeling.screen import Tool, instructions, labeling_screen
from labeling.simulator import Faults, simulate
from labeling.studio import access_token
from labeling.tasks import Question, make_task, mask_result, verdict_results

HEIGHT, WIDTH = 48, 64
STRANGE = ["leaf rust", '"it\'s"', "日本語", "<b>&amp;</b>]]>", "$image", "true", "1", "a/b%20c", "{{idx}}"]
titles = (f"project {number}" for number in itertools.count())


@pytest.fixture
def studio(label_studio: Studio) -> LabelStudio:
    return LabelStudio(label_studio.url, label_studio.token)


def new_project(studio: LabelStudio, tool: Tool = "bitmask", classes: list[str] = STRANGE) -> int:
    return studio.ensure_project(next(titles), labeling_screen(classes, tool), instructions())


def questions(amount: int, first: int = 0) -> list[Question]:
    generator = np.random.default_rng(first)
    return [
        Question(
            sample=f"sample {number}",
            image_url="/image.png",
            heatmap_url="/heatmap.png",
            width=WIDTH,
            height=HEIGHT,
            label=STRANGE[0],
            predicted=STRANGE[1],
            confidence=0.6,
            reason="low <quality>",
            attention_map=generator.random((14, 14)).astype(np.float32),
        )
        for number in range(first, first + amount)
    ]


def tasks_for(
    asked: list[Question], round_number: int = 1, tool: Tool = "bitmask", version: str = "model-1"
) -> list[dict[str, Any]]:
    return [make_task(question, version, round_number, tool) for question in asked]


def disc() -> np.ndarray:
    rows, columns = np.indices((HEIGHT, WIDTH))
    return np.where((rows - 24) ** 2 + (columns - 30) ** 2 < 200, 255, 0).astype(np.uint8)


def ask(label_studio: Studio, path: str) -> Any:
    headers = {"Authorization": f"Token {label_studio.token}"}
    return httpx.get(label_studio.url + path, headers=headers, trust_env=False).raise_for_status()


# The SDK exchanges a personal token with a call that pydantic 2 has renamed.
PERSONAL_TOKEN = pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")


@PERSONAL_TOKEN
@pytest.mark.studio
def test_both_kinds_of_token_are_taken(label_studio: Studio) -> None:
    personal = access_token(label_studio.url, label_studio.email, label_studio.password)
    assert LabelStudio(label_studio.url, label_studio.token).check() == "1.23.2"
    assert LabelStudio(label_studio.url, personal).check() == "1.23.2"


@pytest.mark.studio
def test_a_wrong_token_or_password_is_refused_at_once(label_studio: Studio) -> None:
    begin = time.monotonic()
    with pytest.raises(TokenRefused, match="personal access token"):
        LabelStudio(label_studio.url, "0" * 40).check()
    with pytest.raises(PermissionError, match="refused the log-in"):
        access_token(label_studio.url, label_studio.email, "wrong")
    assert time.monotonic() - begin < 5


@pytest.mark.studio
def test_it_listens_on_this_machine_only_and_its_pages_report_to_nobody(label_studio: Studio) -> None:
    listening = [
        end.laddr.ip for end in psutil.Process(label_studio.pid).net_connections() if end.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]
    assert "sentry.io" not in httpx.get(f"{label_studio.url}/user/login/", trust_env=False).text


@pytest.mark.studio
@pytest.mark.parametrize("tool", ["bitmask", "brush"])
@pytest.mark.parametrize("amount", [2, 1000])
def test_the_screen_is_taken_for_few_and_many_classes(studio: LabelStudio, tool: Tool, amount: int) -> None:
    classes = [*STRANGE, *(f"class {number}" for number in range(1000))][:amount]
    assert new_project(studio, tool, classes) > 0


@pytest.mark.studio
def test_a_project_is_made_once_and_its_screen_follows(studio: LabelStudio, label_studio: Studio) -> None:
    title = next(titles)
    first = studio.ensure_project(title, labeling_screen(["cat", "dog"]), "read <b>this</b>")
    second = studio.ensure_project(title, labeling_screen(["cat", "dog", "hen"]), "read <b>this</b>")
    other = studio.ensure_project(title + " more", labeling_screen(["cat", "dog"]), "")
    assert first == second != other
    project = ask(label_studio, f"/api/projects/{first}").json()
    assert project["label_config"] == labeling_screen(["cat", "dog", "hen"])
    assert project["expert_instruction"] == "read <b>this</b>"


@pytest.mark.studio
def test_a_project_belongs_to_one_workspace(studio: LabelStudio) -> None:
    title, screen = next(titles), labeling_screen(["cat", "dog"])
    first = studio.ensure_project(title, screen, "")
    assert [studio.ensure_project(title, screen, "", 1, "of workspace 1") for _ in range(2)] == [first] * 2
    with pytest.raises(ValueError, match=f"has a project {title} of another workspace; give project.name"):
        studio.ensure_project(title, screen, "", 1, "of workspace 2")


@pytest.mark.studio
def test_pushing_after_a_partial_push_makes_no_second_task(studio: LabelStudio, label_studio: Studio) -> None:
    project = new_project(studio)
    batch = tasks_for(questions(25))
    progress: list[tuple[int, int]] = []
    part = studio.push(project, batch[:10])
    whole = studio.push(project, batch, lambda done, total: progress.append((done, total)))
    again = studio.push(project, batch)
    assert whole == again
    assert len(set(whole.values())) == 25
    assert all(whole[sample] == task for sample, task in part.items())
    assert progress[-1] == (25, 25)
    assert ask(label_studio, f"/api/projects/{project}").json()["task_number"] == 25


@pytest.mark.studio
def test_the_same_sample_in_another_round_is_another_task(studio: LabelStudio) -> None:
    project = new_project(studio)
    first = studio.push(project, tasks_for(questions(2), 1))
    second = studio.push(project, tasks_for(questions(2), 2))
    assert set(first) == set(second) and not set(first.values()) & set(second.values())


@pytest.mark.studio
def test_labelers_are_shown_the_maps_of_the_newest_model(studio: LabelStudio, label_studio: Studio) -> None:
    project = new_project(studio)
    for number in (1, 2):
        pushed = studio.push(project, tasks_for(questions(1, number), number, version=f"model-{number}"))
        shown = ask(label_studio, f"/api/projects/{project}/next").json()
        assert shown["id"] in pushed.values()
        assert [prediction["model_version"] for prediction in shown["predictions"]] == [f"model-{number}"]
        studio.annotate(shown["id"], verdict_results("unusable"), 1.0)


@pytest.mark.studio
@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_masks_and_classes_come_back_exactly(studio: LabelStudio, tool: Tool) -> None:
    project = new_project(studio, tool)
    pushed = studio.push(project, tasks_for(questions(len(STRANGE) + 2), tool=tool))
    ids = list(pushed.values())
    for task, name in zip(ids, STRANGE, strict=False):
        studio.annotate(task, verdict_results("label_wrong", name), 3.0)
    grey = np.arange(HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    studio.annotate(ids[-2], [mask_result(grey, tool), *verdict_results("map_fixed")], 120.0)
    shown = studio.task(ids[-1])["predictions"][0]
    studio.annotate(ids[-1], verdict_results("map_ok"), 3.0, shown["id"])

    corrections, aside = read_corrections(studio.answered(project), STRANGE)
    said = {correction.task: correction for correction in corrections}
    assert aside == []
    assert [said[task].label for task in ids[: len(STRANGE)]] == STRANGE
    mask = said[ids[-2]].mask
    assert mask is not None and np.array_equal(mask, grey)
    assert said[ids[-2]].minutes == 2.0
    assert said[ids[-2]].labeler == "admin@example.com"
    assert said[ids[-1]].mask is not None and said[ids[-1]].model_version == "model-1"


@pytest.mark.studio
def test_answers_are_pulled_incrementally(studio: LabelStudio) -> None:
    project = new_project(studio)
    ids = list(studio.push(project, tasks_for(questions(4))).values())
    assert studio.answered(project) == [] and studio.changes(project, ids) == {}
    studio.annotate(ids[0], verdict_results("unusable"), 1.0)
    (first,) = studio.answered(project)
    assert studio.changes(project, ids) == {ids[0]: first["updated_at"]}
    studio.annotate(ids[1], verdict_results("unusable"), 1.0)
    studio.annotate(ids[2], verdict_results("unusable"), 1.0)
    seen = studio.changes(project, ids)
    assert list(seen) == ids[:3] and seen[ids[0]] == first["updated_at"]
    assert studio.changes(project, ids[1:]) == {task: seen[task] for task in ids[1:3]}
    assert [task["id"] for task in studio.answered(project, task_ids=[ids[0], ids[2], ids[3]])] == [ids[0], ids[2]]
    json.dumps(first)


@pytest.mark.studio
def test_a_changed_annotation_is_pulled_again_as_a_later_revision(studio: LabelStudio, label_studio: Studio) -> None:
    project = new_project(studio)
    (task,) = studio.push(project, tasks_for(questions(1))).values()
    studio.annotate(task, verdict_results("unusable"), 1.0)
    (before,) = studio.answered(project)
    httpx.patch(
        f"{label_studio.url}/api/annotations/{before['annotations'][0]['id']}/",
        json={"result": verdict_results("whole_image")},
        headers={"Authorization": f"Token {label_studio.token}"},
        trust_env=False,
    ).raise_for_status()
    (after,) = studio.answered(project)
    assert studio.changes(project, [task]) == {task: after["updated_at"]}
    assert after["updated_at"] > before["updated_at"]
    (correction,), _ = read_corrections([after], STRANGE)
    assert correction.verdict == "whole_image"
    assert correction.revision > before["annotations"][0]["updated_at"]


@pytest.mark.studio
def test_a_deleted_answer_leaves_its_task_unanswered(studio: LabelStudio) -> None:
    project = new_project(studio)
    ids = list(studio.push(project, tasks_for(questions(3))).values())
    for task in ids[:2]:
        studio.annotate(task, verdict_results("unusable"), 1.0)
    first, _ = studio.answered(project)
    assert [task["id"] for task in studio.unanswered(project, ids)] == ids[2:]
    studio._api.annotations.delete(first["annotations"][0]["id"])
    gone, _ = studio.unanswered(project, ids)
    assert (gone["id"], gone["annotations"], gone["data"]) == (ids[0], [], first["data"])
    studio.delete(ids[0])
    assert [task["id"] for task in studio.unanswered(project, ids)] == ids[2:], "a task that is gone is not unanswered"


@pytest.mark.studio
def test_a_skipped_task_is_pulled_and_set_aside(studio: LabelStudio, label_studio: Studio) -> None:
    project = new_project(studio)
    (task,) = studio.push(project, tasks_for(questions(1))).values()
    httpx.post(
        f"{label_studio.url}/api/tasks/{task}/annotations/",
        json={"result": [], "was_cancelled": True},
        headers={"Authorization": f"Token {label_studio.token}"},
        trust_env=False,
    ).raise_for_status()
    corrections, aside = read_corrections(studio.answered(project), STRANGE)
    assert corrections == []
    assert [item.reason for item in aside] == ["skipped by the labeler"]


@pytest.mark.studio
def test_answers_over_several_pages_are_complete(studio: LabelStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labeling.client.PAGE", 3)
    project = new_project(studio)
    for amount in (3, 7):  # a full last page, and one that is not
        ids = list(studio.push(project, tasks_for(questions(amount), amount)).values())
        for task in ids:
            studio.annotate(task, verdict_results("unusable"), 1.0)
        assert [task["id"] for task in studio.answered(project, task_ids=ids)] == sorted(ids)


@pytest.mark.studio
def test_a_folder_is_served_to_labelers(studio: LabelStudio, label_studio: Studio) -> None:
    folder = label_studio.document_root / "some images"
    folder.mkdir()
    file = folder / "käse #1.png"
    Image.new("RGB", (5, 4), (1, 2, 3)).save(file)
    address = LabelStudio.local_file_url(label_studio.document_root, file)
    project = new_project(studio)
    studio.serve_folder(project, folder)
    studio.serve_folder(project, folder)
    assert ask(label_studio, address).content == file.read_bytes()
    assert len(ask(label_studio, f"/api/storages/localfiles?project={project}").json()) == 1


@pytest.mark.studio
@pytest.mark.parametrize("tool", ["bitmask", "brush"])
def test_simulated_labelers_answer_as_people_would(studio: LabelStudio, tool: Tool) -> None:
    project = new_project(studio, tool)
    asked = questions(3)
    fine = Question(**{**vars(questions(1, 3)[0]), "attention_map": disc().astype(np.float32) / 255})
    ids = studio.push(project, tasks_for([*asked, fine], tool=tool))
    masks = {"sample 0": disc(), "sample 1": np.zeros((HEIGHT, WIDTH), np.uint8), "sample 3": disc()}
    verdicts = simulate([studio], project, ids.values(), masks, Faults(), seed=0)
    assert verdicts == {"map_fixed": 1, "whole_image": 1, "unusable": 1, "map_ok": 1}
    assert not simulate([studio], project, ids.values(), masks, Faults(), seed=0)

    corrections, aside = read_corrections(studio.answered(project), STRANGE)
    assert aside == []
    by_sample = {correction.sample: correction for correction in corrections}
    painted = by_sample["sample 0"].mask
    assert painted is not None
    inside, gold = painted >= INSIDE, disc() >= INSIDE
    assert 0.7 < (inside & gold).sum() / (inside | gold).sum() < 1
    assert by_sample["sample 3"].mask is not None and np.array_equal(by_sample["sample 3"].mask, disc())
    assert all(0 < correction.minutes < 5 for correction in corrections)


@pytest.mark.studio
def test_simulated_answers_depend_on_the_seed_and_the_sample_not_on_the_order(studio: LabelStudio) -> None:
    masks = {question.sample: disc() for question in questions(3)}
    painted: list[dict[str, str]] = []
    for seed, order in ((1, 1), (1, -1), (2, 1)):
        project = new_project(studio)
        ids = list(studio.push(project, tasks_for(questions(3))).values())[::order]
        simulate([studio], project, ids, masks, Faults(), seed)
        corrections, _ = read_corrections(studio.answered(project), STRANGE)
        painted.append({c.sample: c.mask.tobytes().hex() for c in corrections if c.mask is not None})
    assert len(painted[0]) == 3
    assert painted[0] == painted[1] != painted[2]


emails = (f"labeler{number}@example.com" for number in itertools.count())


def people(studio: LabelStudio, amount: int) -> list[LabelStudio]:
    """Labelers who were invited and have logged in."""
    invited = [invite(studio, [next(emails)]) for _ in range(amount)]
    return [LabelStudio(studio.url, access_token(studio.url, *one)) for login in invited for one in login.items()]


def next_task(labeler: LabelStudio, project: int) -> int | None:
    """What the queue gives a labeler; None where it has nothing for them."""
    answer = labeler._api._client_wrapper.httpx_client.request(f"api/projects/{project}/next", method="GET")
    return None if answer.status_code == 404 else int(answer.json()["id"])


@PERSONAL_TOKEN
@pytest.mark.studio
def test_who_is_invited_can_log_in_and_sees_the_project(studio: LabelStudio) -> None:
    project = new_project(studio)
    email = next(emails)
    (password,) = invite(studio, [email]).values()
    labeler = LabelStudio(studio.url, access_token(studio.url, email, password))
    assert labeler.who() == email
    studio.push(project, tasks_for(questions(1)))
    assert next_task(labeler, project) is not None


@pytest.mark.studio
def test_nobody_is_invited_where_one_of_them_cannot_be(studio: LabelStudio, label_studio: Studio) -> None:
    new = next(emails)
    for other, message in [
        ("a@b.c", "'a@b.c' is no email address"),
        ("nobody", "'nobody' is no email address"),
        (label_studio.email.upper(), "has an account already; leave it out"),
    ]:
        with pytest.raises(ValueError, match=message):
            invite(studio, [new, other])
    assert new not in studio.emails()
    with pytest.raises(ValueError, match=f"made no account for {new}: Please enter a password"):
        studio.invite(new, "short")


@PERSONAL_TOKEN
@pytest.mark.studio
def test_a_disputed_task_goes_to_one_more_labeler_and_to_nobody_twice(studio: LabelStudio) -> None:
    project = studio.ensure_project(next(titles), labeling_screen(STRANGE), instructions(), labelers_per_task=2)
    (task,) = studio.push(project, tasks_for(questions(1))).values()
    ann, bob, cyd = people(studio, 3)
    assert [next_task(one, project) for one in (ann, bob, cyd)] == [task, task, None], "two are at it"
    ann.annotate(task, verdict_results("unusable"), 1.0)
    bob.annotate(task, verdict_results("whole_image"), 1.0)
    assert [next_task(one, project) for one in (ann, bob, cyd)] == [None, None, None], "two have answered it"
    studio.ask_again(task, 3)
    (asked,) = studio.answered(project)
    studio.ask_again(task, 3)
    (again,) = studio.answered(project)
    assert asked["updated_at"] == again["updated_at"], "asking twice changes nothing"
    assert [next_task(one, project) for one in (ann, bob, cyd)] == [None, None, task]
    cyd.annotate(task, verdict_results("unusable"), 1.0)
    opinions, _ = read_corrections(studio.answered(project), STRANGE)
    (consensus,), disputes = settle(opinions, panel=2)
    assert (consensus.verdict, disputes) == ("unusable", [])
    assert [one.labeler for one in consensus.opinions] == [ann.who(), bob.who(), cyd.who()]


@PERSONAL_TOKEN
@pytest.mark.studio
def test_each_labeler_gets_a_batch_in_an_order_of_their_own(studio: LabelStudio) -> None:
    project = studio.ensure_project(next(titles), labeling_screen(STRANGE), instructions(), labelers_per_task=3)
    ids = list(studio.push(project, tasks_for(questions(8))).values())
    orders = []
    for labeler in people(studio, 2):
        order = []
        while (task := next_task(labeler, project)) is not None:
            order.append(task)
            labeler.annotate(task, verdict_results("unusable"), 1.0)
        orders.append(order)
    assert sorted(orders[0]) == sorted(orders[1]) == ids
    assert ids != orders[0] != orders[1] != ids


@PERSONAL_TOKEN
@pytest.mark.studio
def test_simulated_labelers_share_the_work_and_each_has_their_own_hand(studio: LabelStudio) -> None:
    project = studio.ensure_project(next(titles), labeling_screen(STRANGE), instructions(), labelers_per_task=2)
    ids = studio.push(project, tasks_for(questions(4)))
    labelers = people(studio, 3)
    masks = {question.sample: disc() for question in questions(4)}
    assert simulate(labelers, project, ids.values(), masks, Faults(), seed=0) == {"map_fixed": 8}
    opinions, aside = read_corrections(studio.answered(project), STRANGE)
    agreed, disputes = settle(opinions, panel=2)
    assert (aside, disputes, len(agreed)) == ([], [], 4)
    assert all(len(one.opinions) == 2 and 0.5 < one.weight < 1 for one in agreed)
    assert {one.labeler for one in opinions} == {one.who() for one in labelers}


@pytest.mark.studio
def test_hasty_labelers_skip_leave_drafts_and_call_maps_fine(studio: LabelStudio) -> None:
    project = new_project(studio)
    ids = studio.push(project, tasks_for(questions(14)))
    masks = {question.sample: disc() for question in questions(14)}
    faults = Faults(lazy=0.3, skips=0.2, drafts=0.2)
    first = simulate([studio], project, ids.values(), masks, faults, seed=2)
    assert set(first) == {"map_ok", "map_fixed", "skipped", "draft"} and sum(first.values()) == 14
    again = simulate([studio], project, ids.values(), masks, faults, seed=2)
    assert again == {"map_fixed": first["draft"]}, "a draft is submitted, a skip is not taken back"
    corrections, aside = read_corrections(studio.answered(project), STRANGE)
    assert len(corrections) == 14 - first["skipped"]
    assert [one.reason for one in aside] == ["skipped by the labeler"] * first["skipped"]


@pytest.mark.studio
def test_an_answer_that_gets_lost_makes_nothing_twice(studio: LabelStudio, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost_once(owner: Any, name: str) -> None:
        call, calls = getattr(owner, name), itertools.count()

        def lossy(*arguments: Any, **named: Any) -> Any:
            answer = call(*arguments, **named)
            if next(calls) == 0:
                raise httpx.ReadTimeout("the answer got lost")
            return answer

        monkeypatch.setattr(owner, name, lossy)

    project = new_project(studio)
    lost_once(studio._api.projects, "import_tasks")
    lost_once(studio._api.annotations, "create")
    ids = studio.push(project, tasks_for(questions(3)))
    studio.annotate(ids["sample 0"], verdict_results("unusable"), 1.0)
    (task,) = studio.answered(project)
    assert len(task["annotations"]) == 1
    assert len(list(studio._api.tasks.list(project=project))) == 3


class Flaky(http.server.BaseHTTPRequestHandler):
    """Fails as often as told, then answers like a Label Studio."""

    failures: ClassVar[list[int]] = []
    calls = 0

    def do_GET(self) -> None:
        type(self).calls += 1
        status = self.failures.pop(0) if self.failures else 200
        body = json.dumps({"release": "9.9", "email": "a@b.example", "id": 1}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def flaky() -> Iterator[str]:
    Flaky.failures, Flaky.calls = [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_many_tasks_are_asked_for_in_addresses_that_every_server_takes(serve: Callable[[FastAPI], str]) -> None:
    app, longest = FastAPI(), 8000  # what many a proxy takes; Label Studio itself takes 64 kB

    @app.get("/api/tasks/")
    def list_tasks(request: Request, query: str, page: int, page_size: int, response: Response) -> dict[str, Any]:
        if len(str(request.url)) > longest:
            response.status_code = 414
            return {"detail": "too long"}
        filters = {one["filter"].split(":")[-1]: one["value"] for one in json.loads(query)["filters"]["items"]}
        known = [number for number in filters["id"] if "total_annotations" in filters or number % 2]
        tasks = [{"id": number, "annotations": []} for number in known[(page - 1) * page_size : page * page_size]]
        return {"tasks": tasks, "total": len(known), "total_annotations": 0, "total_predictions": 0}

    @app.get("/api/users/")
    def list_users() -> list[dict[str, Any]]:
        return []

    studio, ids = LabelStudio(serve(app), "0" * 40, patience=0.1), list(range(100_000, 102_000))
    assert [task["id"] for task in studio.answered(1, ids)] == ids
    assert studio.answered(1, []) == [] == studio.overview(1, [])


def test_a_server_that_fails_for_a_while_is_asked_again(flaky: str) -> None:
    Flaky.failures = [503, 429, 500]
    assert LabelStudio(flaky, "0" * 40).check() == "9.9"
    assert Flaky.calls == 5


@pytest.mark.parametrize("status", [401, 403, 400, 404])
def test_a_refusal_is_not_repeated(flaky: str, status: int) -> None:
    Flaky.failures = [status]
    with pytest.raises(TokenRefused if status in (401, 403) else ValueError, match=str(status)):
        LabelStudio(flaky, "0" * 40).check()
    assert Flaky.calls == 1


def test_a_server_that_keeps_failing_is_said_to_be_unreachable(flaky: str) -> None:
    Flaky.failures = [500] * 100
    with pytest.raises(LabelStudioUnreachable, match="keeps failing"):
        LabelStudio(flaky, "0" * 40, patience=0.5).check()
    assert Flaky.calls > 1


def test_nothing_at_the_address_is_said_in_one_line() -> None:
    with pytest.raises(LabelStudioUnreachable, match="abnloop up") as caught:
        LabelStudio("http://127.0.0.1:9", "0" * 40, patience=0.1).check()
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_a_link_has_the_address_of_its_place(tmp_path: Path) -> None:
    root, cached = tmp_path / "workspace", tmp_path / "cache" / "ab12"
    for folder in (root / "images", cached.parent):
        folder.mkdir(parents=True)
    cached.touch()
    (root / "images/one.png").symlink_to(cached)
    assert LabelStudio.local_file_url(root, root / "images/one.png") == "/data/local-files/?d=images/one.png"
    for outside in (cached, root / "images/../../cache/ab12"):
        with pytest.raises(ValueError, match="is not in the subpath"):
            LabelStudio.local_file_url(root, outside)


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        LabelStudio("localhost:8080", "0" * 40)
