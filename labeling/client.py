"""Label Studio's API, as much of it as the loop needs. The only importer of label_studio_sdk.

Every call retries with back-off where the network or the server fails for a while; a refused token or a
wrong request does not. Errors are one line:

    ConnectionError  <- LabelStudioUnreachable   nothing answers, or it keeps failing
    PermissionError  <- TokenRefused             401 or 403
    ValueError                                   the server refuses what was sent
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from html import unescape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx
import label_studio_sdk
import tenacity
from label_studio_sdk.core.api_error import ApiError

Answer = TypeVar("Answer")
# Tasks asked for at once, and sent at once: with a soft map of a large picture a task has some megabytes.
PAGE = 100
PART = 20
SERVICE_USER = "label-studio"  # as whom it calls the services that are attached to it


class LabelStudioUnreachable(ConnectionError):
    """Label Studio does not answer, or fails again and again."""


class TokenRefused(PermissionError):
    """Label Studio does not accept the token, or not for this."""


class LabelStudio:
    """One Label Studio, embedded or external.

    `token` is a personal access token or a legacy token. A call that fails for a while is repeated for up
    to `patience` seconds.
    """

    def __init__(self, url: str, token: str, patience: float = 15.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"labeling.url is {url!r}; it must begin with http:// or https://")
        self.url = url.rstrip("/")
        self._patience = patience
        # A proxy for the outer world must not see calls to this machine.
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._trust_env = not local
        http = httpx.Client(timeout=60, follow_redirects=True, trust_env=self._trust_env)
        weakref.finalize(self, http.close)
        try:
            # Untyped: what the SDK declares is the hosted edition, not what a community server takes and answers.
            self._api: Any = label_studio_sdk.LabelStudio(
                base_url=self.url, api_key=token, httpx_client=http, max_retries=0
            )
        except ApiError as error:  # an expired token is refused before any call
            raise self._explained(error) from error

    def check(self) -> str:
        """The server's version, where it answers and takes the token."""
        self._call(self._api.users.whoami)
        return str(self._call(self._api.versions.get).release)

    def who(self) -> str:
        """The email of the owner of the token."""
        return str(self._call(self._api.users.whoami).email)

    def emails(self) -> set[str]:
        """Of everybody who has an account, in lower case."""
        return {user.email.lower() for user in self._call(self._api.users.list)}

    def invite(self, email: str, password: str) -> None:
        """Make an account that can log in and sees every project, as if its owner had followed an invitation.

        Raises ValueError where there is one of that email already, or the server does not like email or password.
        """
        path = self._call(self._api.organizations.invites.get_invite_link).invite_url
        page = urljoin(self.url, path)

        # No retry: where the answer got lost, the account may be there, and the second try would be refused.
        with httpx.Client(timeout=60, trust_env=self._trust_env) as http:
            try:
                http.get(page)
                form = {"email": email, "password": password, "csrfmiddlewaretoken": http.cookies.get("csrftoken", "")}
                answer = http.post(page, data=form, headers={"Referer": page})
            except httpx.TransportError as error:
                raise self._explained(error) from error
        if answer.status_code != 302:
            refused = " ".join(re.findall(r"<li>(.*?)</li>", answer.text, re.DOTALL)) or f"({answer.status_code})"
            raise ValueError(f"Label Studio at {self.url} made no account for {email}: {unescape(refused)}")

    def ensure_project(
        self, title: str, screen: str, instructions: str, labelers_per_task: int = 1, description: str = ""
    ) -> int:
        """The id of the project called `title`: made once, its screen and instructions kept up to date.

        Raises ValueError where there is one with another description: it is somebody else's.

        A task is done when `labelers_per_task` people have answered it. Whoever asks for the next task gets one at
        random among those that are not done, so that the order of a batch leads nobody; with several labelers a task,
        first one that somebody else has already answered.
        """
        if not 3 <= len(title) <= 50:
            raise ValueError(f"the project title {title!r} must have 3 to 50 characters")
        settings = {
            "label_config": screen,
            "expert_instruction": instructions,
            "show_instruction": True,
            "show_collab_predictions": True,
            "enable_empty_annotation": False,
            "maximum_annotations": labelers_per_task,
            "sampling": "Uniform sampling",
        }
        if description:
            settings["description"] = description

        def ensure() -> int:
            for project in self._api.projects.list(search=title, ordering="id", page_size=PAGE):
                if project.title == title:
                    if description and project.description not in ("", None, description):
                        raise ValueError(
                            f"Label Studio at {self.url} has a project {title} of another workspace; "
                            "give project.name in params.yaml another name, and commit it"
                        )
                    if any(getattr(project, name) != value for name, value in settings.items()):
                        self._api.projects.update(project.id, **settings)
                    return int(project.id)
            return int(self._api.projects.create(title=title, **settings).id)

        return self._call(ensure)

    def serve_folder(self, project: int, folder: Path) -> None:
        """Let `project` show the files of `folder`, which lies below the server's document root."""
        path = str(folder.resolve())

        def serve() -> None:
            if all(storage.path != path for storage in self._api.import_storage.local.list(project=project)):
                self._api.import_storage.local.create(project=project, path=path, use_blob_urls=False)

        self._call(serve)

    @staticmethod
    def local_file_url(document_root: Path, file: Path) -> str:
        """The address at which labelers see `file`, which lies below `document_root`, or is a link there: DVC may make
        every picture one, into its cache."""
        relative = Path(os.path.abspath(file)).relative_to(os.path.abspath(document_root))  # not resolved, but no ".."
        return "/data/local-files/?d=" + quote(relative.as_posix())

    def attach_backend(self, project: int, url: str, title: str, secret: str) -> None:
        """Let the service at `url`, which knows `secret`, answer strokes and hear about annotations of `project`.

        Once a title: attaching it again renews address and secret, since the editor asks only the first service.
        """
        settings = {
            **{"project": project, "url": url, "title": title, "is_interactive": True},
            **{"auth_method": "BASIC_AUTH", "basic_auth_user": SERVICE_USER, "basic_auth_pass": secret},
        }
        # Made by Label Studio for a new service, without any authentication; a moved one keeps its old address.
        webhook = {"url": f"{url}/webhook", "headers": {"Authorization": webhook_authorization(secret)}}

        def attach() -> None:
            known = [backend for backend in self._api.ml.list(project=project) if backend.title == title]
            if known:
                self._api.ml.update(known[0].id, **settings)
            else:
                self._api.ml.create(**settings)
            ours = {webhook["url"], *(f"{backend.url}/webhook" for backend in known)}
            for hook in self._api.webhooks.list(project=str(project)):
                if hook.url in ours:
                    self._api.webhooks.update(hook.id, **webhook)

        self._call(attach)

    def push(
        self,
        project: int,
        tasks: Sequence[dict[str, Any]],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, int]:
        """Make the tasks that are not there yet; sample id -> task id of all of `tasks`.

        A task is known by its data.sample and data.round, so pushing twice, or again after a crash, makes no
        second one. `on_progress` is called with (done, all).
        """
        names = [(task["data"]["sample"], task["data"]["round"]) for task in tasks]
        assert len({sample for sample, _ in names}) == len(names), "a batch asks about a sample once"
        found: dict[str, int] = {}
        for begin in range(0, len(tasks), PART):
            found |= self._call(self._push_part, project, tasks[begin : begin + PART])
            if on_progress:
                on_progress(len(found), len(tasks))
        if tasks:
            # Label Studio shows predictions of one model version only, and by itself stays with the first.
            version = tasks[-1]["predictions"][-1]["model_version"]
            self._call(lambda: self._api.projects.update(project, model_version=version))
        return found

    def overview(self, project: int, task_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The tasks, all or these, as plain JSON without their annotations and predictions, which are large."""
        return [task for these in _among(task_ids) for task in self._list(project, these, "task_only")]

    def changes(self, project: int, task_ids: Sequence[int]) -> dict[int, str]:
        """Those of the tasks that have an annotation, a skipped one too, and when each changed last ("updated_at")."""
        return {task["id"]: task["updated_at"] for task in self.overview(project, task_ids) if _has_annotation(task)}

    def unanswered(self, project: int, task_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Those of the tasks that are there and have no annotation, such as those whose answer was deleted; as
        `answered` gives the others."""
        tasks = self.overview(project, task_ids)
        return [{**task, "annotations": []} for task in tasks if not _has_annotation(task)]

    def answered(self, project: int, task_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Tasks with at least one annotation, skipped ones too, in order of their id, as plain JSON.

        `task_ids`: only these. Each annotation has the labeler's email as "labeler".
        """
        found: dict[int, dict[str, Any]] = {}
        for these in _among(task_ids):
            # Skipping makes a cancelled annotation, which the count of annotations leaves out.
            for count in ("total_annotations", "cancelled_annotations"):
                for task in self._list(project, [_filter(count, "greater", "Number", 0), *these]):
                    found[task["id"]] = task
        emails = {user.id: user.email for user in self._call(self._api.users.list)} if found else {}
        for task in found.values():
            for annotation in task["annotations"]:
                by = annotation["completed_by"]
                annotation["labeler"] = emails.get(by, str(by))
        return [found[task_id] for task_id in sorted(found)]

    def task(self, task_id: int) -> dict[str, Any]:
        """One task with its annotations and predictions, as plain JSON."""
        return _plain(self._call(lambda: self._api.tasks.get(id=task_id)))

    def ask_again(self, task_id: int, labelers: int) -> None:
        """Put a task back into the queue until `labelers` people have answered it; nobody gets it twice."""

        def reopen() -> None:
            if self._api.tasks.get(id=task_id).overlap != labelers:
                self._api.tasks.update(id=task_id, overlap=labelers, is_labeled=False)

        self._call(reopen)

    def delete(self, task_id: int) -> None:
        """Remove a task with all that was said about it."""
        self._call(lambda: self._api.tasks.delete(id=task_id))

    def annotate(
        self,
        task_id: int,
        result: Sequence[dict[str, Any]],
        lead_time: float,
        parent_prediction: int | None = None,
        skip: bool = False,
    ) -> None:
        """Submit an annotation as the owner of the token, or skip the task; `lead_time` in seconds."""
        known: dict[str, Any] = {"was_cancelled": True} if skip else {}
        if parent_prediction is not None:
            known["parent_prediction"] = parent_prediction
        # The server refuses a second annotation of the same name, so an answer that got lost does no harm.
        name = str(uuid.uuid4())

        def submit() -> None:
            try:
                self._api.annotations.create(
                    id=task_id, result=list(result), lead_time=lead_time, unique_id=name, **known
                )
            except ApiError as error:
                if error.status_code != 409:
                    raise

        self._call(submit)

    def annotation_results(self, annotation: int) -> list[dict[str, Any]]:
        """What is stored in an annotation now."""
        results: list[dict[str, Any]] = _plain(self._call(self._api.annotations.get, annotation))["result"]
        return results

    def set_annotation_results(self, annotation: int, results: Sequence[dict[str, Any]]) -> None:
        """Replace what is stored in an annotation; its labeler and time at the screen stay, its revision does not."""
        self._call(lambda: self._api.annotations.update(annotation, result=list(results)))

    def drafts(self, task: int) -> dict[int, list[dict[str, Any]]]:
        """What labelers have begun on a task and not submitted: draft id -> results."""
        return {draft["id"]: draft["result"] for draft in self._call(self._request, "GET", f"api/tasks/{task}/drafts")}

    def set_draft_results(self, draft: int, results: Sequence[dict[str, Any]]) -> None:
        """Replace what is stored in a draft."""
        self._call(self._request, "PATCH", f"api/drafts/{draft}/", {"result": list(results)})

    def leave_draft(self, task: int, results: Sequence[dict[str, Any]], lead_time: float) -> None:
        """Save an answer without submitting it, as the editor does while one works; `lead_time` in seconds."""
        self._call(self._request, "POST", f"api/tasks/{task}/drafts", {"result": list(results), "lead_time": lead_time})

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A call that the SDK has no method for."""
        response = self._api._client_wrapper.httpx_client.request(path, method=method, json=body)
        if not response.is_success:
            raise ApiError(status_code=response.status_code, body=response.text)
        return response.json()

    def _push_part(self, project: int, tasks: Sequence[dict[str, Any]]) -> dict[str, int]:
        found = self._look_up(project, tasks)
        missing = [task for task in tasks if task["data"]["sample"] not in found]
        if missing:
            self._api.projects.import_tasks(id=project, request=missing, return_task_ids=True)
            found = self._look_up(project, tasks)
        lost = [task["data"]["sample"] for task in tasks if task["data"]["sample"] not in found]
        if lost:
            raise ValueError(f"Label Studio took {len(lost)} tasks without making them, the first for {lost[0]}")
        return found

    def _look_up(self, project: int, tasks: Sequence[dict[str, Any]]) -> dict[str, int]:
        rounds = {task["data"]["sample"]: task["data"]["round"] for task in tasks}
        query = _query([_filter("data.sample", "in_list", "String", list(rounds))])
        found: dict[str, int] = {}
        for task in self._api.tasks.list(project=project, query=query, page_size=PAGE, fields="task_only"):
            sample = task.data.get("sample")
            if sample in rounds and task.data.get("round") == rounds[sample]:
                found[sample] = min(task.id, found.get(sample, task.id))
        return found

    def _list(self, project: int, filters: list[dict[str, Any]], fields: str = "all") -> Iterable[dict[str, Any]]:
        """Tasks page by page, each page its own call."""
        page = 1
        while True:
            items = self._call(self._page, project, _query(filters), page, fields)
            yield from items
            if len(items) < PAGE:
                return
            page += 1

    def _page(self, project: int, query: str, page: int, fields: str) -> list[dict[str, Any]]:
        try:
            answer = self._api.tasks.list(project=project, query=query, page=page, page_size=PAGE, fields=fields)
        except ApiError as error:
            if error.status_code == 404 and page > 1:
                return []  # the page after the last
            raise
        return [_plain(task) for task in answer.items or []]

    def _call(self, call: Callable[..., Answer], *arguments: Any) -> Answer:
        """What `call(*arguments)` answers; repeated while the network or the server fails for a while."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passing),
            wait=tenacity.wait_exponential_jitter(multiplier=0.3, max=5, jitter=0.3),
            stop=tenacity.stop_after_delay(self._patience),
            reraise=True,
        )
        try:
            return retrying(call, *arguments)
        except (httpx.TransportError, ApiError, json.JSONDecodeError) as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        if not isinstance(error, ApiError):
            return LabelStudioUnreachable(f"Label Studio at {self.url} does not answer; start it with `abnloop up`")
        status, detail = error.status_code, _detail(error.body)
        if status in (401, 403):
            return TokenRefused(
                f"Label Studio at {self.url} refused the token ({status}); "
                "make a new personal access token under Account & Settings"
            )
        if _passing(error):
            return LabelStudioUnreachable(f"Label Studio at {self.url} keeps failing ({status}): {detail}")
        return ValueError(f"Label Studio at {self.url} refused the request ({status}): {detail}")


def service_authorization(secret: str) -> str:
    """The header with which Label Studio calls an attached service."""
    return "Basic " + base64.b64encode(f"{SERVICE_USER}:{secret}".encode()).decode()


def webhook_authorization(secret: str) -> str:
    """The header of its webhook. Everyone with an account can read it there, so it must not tell the secret."""
    return "Bearer " + hmac.new(secret.encode(), b"webhook", "sha256").hexdigest()


def _passing(error: BaseException) -> bool:
    """Is this a failure that may be over in a moment?"""
    if isinstance(error, ApiError):
        return error.status_code == 429 or (error.status_code or 0) >= 500
    return isinstance(error, httpx.TransportError)


def _detail(body: Any) -> str:
    """The server's own words, in one line."""
    if isinstance(body, dict):
        body = body.get("validation_errors") or body.get("detail") or body
    return " ".join(str(body).split())[:300]


def _plain(model: Any) -> dict[str, Any]:
    """An answer of the SDK as the JSON it was."""
    plain: dict[str, Any] = json.loads(model.json())
    return plain


def _has_annotation(task: dict[str, Any]) -> bool:
    """Also where it was skipped, which counts apart."""
    return bool(task["total_annotations"] or task["cancelled_annotations"])


def _among(task_ids: Sequence[int] | None) -> list[list[dict[str, Any]]]:
    """What limits the tasks to these, or with None to nothing; each for a request of its own, since all ids of a large
    batch are more than an address may hold."""
    if task_ids is None:
        return [[]]
    parts = [list(task_ids[begin : begin + PAGE]) for begin in range(0, len(task_ids), PAGE)]
    return [[_filter("id", "in_list", "Number", part)] for part in parts]


def _query(filters: list[dict[str, Any]]) -> str:
    return json.dumps({"filters": {"conjunction": "and", "items": filters}})


def _filter(column: str, operator: str, kind: str, value: Any) -> dict[str, Any]:
    return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}
