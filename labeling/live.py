"""The network's answer while a map is painted: Label Studio's ML-backend protocol around a predictor.

Nothing in a request is an address that would be fetched: a picture is named by its sample, a mask comes as pixels.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from fastapi import BackgroundTasks, FastAPI, HTTPException
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from labeling.client import service_authorization, webhook_authorization
from labeling.tasks import read_mask

NAME = "abnloop"
SHOWN_CLASSES = 3
# Label Studio sends a task's annotations, drafts and predictions along, each with a mask of a megabyte or more.
MAX_BODY = 64 << 20
Shares = Sequence[tuple[str, float]]  # classes and their probabilities 0..1, most probable first

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What the model `version` says of a picture: with the `given` map, and with its `own`."""

    given: Shares
    own: Shares
    version: str


class Predictor(Protocol):
    """The network, as far as a labeler meets it. Called from several threads at once."""

    def version(self) -> str:
        """The model that answers now, at once; empty where there is none."""

    def answer(self, sample: str, mask: np.ndarray) -> Answer:
        """The answers for a sample whose map is replaced by `mask`, (height, width) uint8 0..255 at the picture's size.

        Raises ValueError, whose text the labeler gets to see, for a sample that it does not know.
        """

    def prepare(self, sample: str) -> None:
        """Get ready: the labeler has just opened this sample. Never fails; whoever does not prepare answers later."""


class _Task(BaseModel):
    id: int | None = None
    data: dict[str, Any] = {}


class _Context(BaseModel):
    result: list[dict[str, Any]] | None = None


class _Params(BaseModel):
    context: _Context | None = None


class _Asked(BaseModel):
    """The body of /predict, as much of it as is looked at."""

    tasks: list[_Task] = []
    params: _Params | None = None

    @property
    def painted(self) -> list[dict[str, Any]]:
        """What is on the picture after a stroke; empty when a page is opened and when it is submitted."""
        return (self.params and self.params.context and self.params.context.result) or []


def create_app(
    predictor: Predictor,
    secret: str,
    on_hint: Callable[[dict[str, Any]], None] | None = None,
    on_stroke: Callable[[int], None] | None = None,
    max_body: int = MAX_BODY,
) -> FastAPI:
    """The service that answers strokes through `predictor`, for a Label Studio that was attached with `secret`.

    `on_hint` gets the body of every webhook, in the background: a hint only, it may come twice or never. `on_stroke`
    gets the id of a task that is being painted, and must return at once. Predicting itself changes nothing that anybody
    could see: Label Studio also asks on page load and on submit. Bodies of more than `max_body` bytes are refused.
    """
    app = FastAPI(title=NAME)
    app.add_middleware(Guard, secret=secret, max_body=max_body)

    def version() -> str:
        return predictor.version() or "no model yet"

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": NAME, "model_version": version()}

    @app.post("/setup")
    def setup() -> dict[str, str]:
        return {"model_version": version()}

    @app.get("/versions")
    def versions() -> dict[str, list[str]]:
        return {"versions": [version()]}

    @app.post("/predict")
    def predict(asked: _Asked, background: BackgroundTasks) -> dict[str, Any]:
        if not asked.painted or not asked.tasks:
            match asked.tasks:
                case [_Task(data={"sample": str(sample)})]:  # a page was opened; the first stroke will not wait
                    background.add_task(predictor.prepare, sample)
            return {"results": [{} for _ in asked.tasks] or [{}]}  # this leaves the text on the screen as it is
        task = asked.tasks[0]
        text = _answer(task.data, asked.painted, predictor)
        if text is None:
            return {"results": [{}]}
        if on_stroke is not None and task.id is not None:
            on_stroke(task.id)
        return {"results": [{"result": [_text_result(text)]}]}

    @app.post("/webhook")
    def webhook(body: dict[str, Any], background: BackgroundTasks) -> dict[str, str]:
        # Label Studio waits one second and sends no second time, so answer first.
        if on_hint is not None:
            background.add_task(on_hint, body)
        return {"status": "ok"}

    return app


class Guard:
    """Lets callers in who know the secret, and bodies up to `max_body` bytes; both before a body is read.

    /health is open to everybody. The webhook has a key of its own, because Label Studio shows its headers to everyone
    who has an account there; the backend's password it shows to nobody.
    """

    def __init__(self, app: ASGIApp, secret: str, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self.service, self.webhook = service_authorization(secret), webhook_authorization(secret)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        wanted = self.webhook if path == "/webhook" else self.service
        known = secrets.compare_digest(headers.get("authorization", "").encode(), wanted.encode())
        length = headers.get("content-length", "0")
        if path != "/health" and not known:
            await _refusal(401, "who calls is not the Label Studio that this service is attached to")(
                scope, receive, send
            )
        elif not length.isdecimal() or int(length) > self.max_body:
            await _refusal(413, self._too_long)(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """`receive` for a body that may say nothing of its length, or lie."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body:
                raise HTTPException(413, self._too_long, {"Connection": "close"})
            return message

        return counted

    @property
    def _too_long(self) -> str:
        return f"the body has more than {self.max_body} bytes"


def _refusal(status: int, why: str) -> JSONResponse:
    headers = {"Connection": "close"}  # the rest of the body is not worth reading
    if status == 401:
        headers["WWW-Authenticate"] = f'Basic realm="{NAME}"'
    return JSONResponse({"detail": why}, status, headers)


def _answer(data: Mapping[str, Any], painted: Sequence[Mapping[str, Any]], predictor: Predictor) -> str | None:
    """The text for the labeler; None without a mask, which leaves the text that is there."""
    # The time tells a stale text from a fresh one: a dead service leaves no other trace on the screen.
    now = datetime.now().astimezone().strftime("%H:%M:%S %Z")
    try:
        sample, height, width = _picture(data)
        mask = read_mask(painted, height, width)
        if mask is None:
            return None
        answer = predictor.answer(sample, mask)
    except ValueError as error:
        logger.warning("no answer for task data %.200r: %s", data.get("sample"), error)
        return f"no answer: {error} · {now}"
    return f"{_top(answer.given)} ← {_top(answer.own)} (unedited map · 元の地図) · {answer.version} · {now}"


def _picture(data: Mapping[str, Any]) -> tuple[str, int, int]:
    """Sample, height and width of the task's picture."""
    match data:
        case {"sample": str(sample), "height": int(height), "width": int(width)}:
            return sample, height, width
    raise ValueError("this task does not say which picture of the workspace it shows; abnloop's own tasks do")


def _top(shares: Shares) -> str:
    return " · ".join(f"{name} {share:.2f}" for name, share in shares[:SHOWN_CLASSES])


def _text_result(text: str) -> dict[str, Any]:
    value = {"text": [text]}
    return {"id": "live1", "type": "textarea", "from_name": "live", "to_name": "live_target", "value": value}
