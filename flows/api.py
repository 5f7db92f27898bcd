"""The champion for other programs: POST /v1/predict and /v1/flag, a part of the project's own service."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import Base64Bytes, BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from abn.config import suggest
from flows.answering import MAX_BYTES, MAX_PIXELS, Answer, Picture, Refused, answer_all, map_png
from flows.champion import Promoted
from flows.inbox import Inbox, capture
from labeling.live import MAX_BODY

MAX_PICTURES = 32  # a request

Maps = Literal["grey", "overlay", "none"]


class Sent(BaseModel):
    image: Base64Bytes = Field(description="The file: PNG, JPEG, WebP, GIF, BMP or TIFF.")
    name: str = Field("", description="Comes back with the answer.")


class PredictRequest(BaseModel):
    images: list[Sent] = Field(min_length=1, max_length=MAX_PICTURES)

    @classmethod
    async def from_form(cls, form: FormData) -> PredictRequest:
        return cls.model_construct(images=[await _uploaded(file) for file in form.getlist("images")])


class FlagRequest(BaseModel):
    picture: Sent
    right_class: str = Field("", description="What it should have been, one of the classes, where you know it.")

    @classmethod
    async def from_form(cls, form: FormData) -> FlagRequest:
        return cls.model_construct(
            picture=await _uploaded(form.get("picture")), right_class=str(form.get("right_class") or "")
        )


class Answered(BaseModel):
    name: str
    predicted: str
    confidence: float = Field(description="The probability of `predicted`, 0..1.")
    probabilities: dict[str, float] = Field(description="By class, the most probable first.")
    disagreement: float = Field(description="Of the network's two branches, 0..1; where it is high, doubt the map.")
    attention_map: str | None = Field(
        description="A PNG in base64. `grey`: where the network looked, 0..255, at the map's own resolution. "
        "`overlay`: in colours over the picture, blue to red, at most 512 pixels a side."
    )


class Unanswered(BaseModel):
    name: str
    error: str = Field(description="Why there is no answer about this picture.")


class PredictResponse(BaseModel):
    model_version: str = Field(description="Of the registered model, such as v3.")
    classes: list[str]
    answers: list[Answered | Unanswered] = Field(description="One for each picture, in their order.")


class FlagResponse(BaseModel):
    kept: bool = Field(description="false: it was flagged before.")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"description": "Say who you are."},
    413: {"description": f"The request has more than {MAX_BODY >> 20} MB."},
    415: {"description": "Neither JSON nor a form."},
    422: {"description": "Not as described here; the answer says where."},
    503: {"description": "No model has been promoted yet."},
}
LIMITS = f"A picture may have {MAX_BYTES // 10**6} MB and {MAX_PIXELS // 10**6} megapixels, a request {MAX_PICTURES}"


def make_router(current: Callable[[], Promoted], inbox: Inbox) -> APIRouter:
    """The routes below /v1. `current` gives the champion of the moment, or a ValueError that says why there is none."""
    router = APIRouter(prefix="/v1", tags=["champion"])

    @router.post(
        "/predict",
        responses=PROBLEMS,
        openapi_extra=_body(PredictRequest, {"images": {"type": "array", "items": FILE}}),
        summary="Classes, probabilities and attention maps",
        description=f"Send pictures as JSON or as a form. {LIMITS} pictures; a picture that cannot be answered gets an "
        "`error` in its place. With `capture.enabled` those that the champion is not sure of are kept for labelers.",
    )
    async def predict(
        request: Request, maps: Annotated[Maps, Query(description="How to draw the attention map.")] = "grey"
    ) -> PredictResponse:
        asked = await _read(request, PredictRequest)
        return await run_in_threadpool(_predict, _champion(current), asked, maps, inbox)

    @router.post(
        "/flag",
        responses={**PROBLEMS, 409: {"description": "Capturing is off."}, 507: {"description": "The inbox is full."}},
        openapi_extra=_body(FlagRequest, {"picture": FILE, "right_class": {"type": "string"}}),
        summary="The champion is wrong about this picture",
        description="Keeps the picture for labelers. The right class is a hint for them, not a label.",
    )
    async def flag(request: Request) -> FlagResponse:
        if not inbox.config.enabled:
            raise HTTPException(409, "capture.enabled is false; set it to true in params.yaml and restart the services")
        asked = await _read(request, FlagRequest)
        return await run_in_threadpool(_flag, _champion(current), asked, inbox)

    return router


def _predict(champion: Promoted, asked: PredictRequest, maps: Maps, inbox: Inbox) -> PredictResponse:
    answers: list[Answered | Unanswered] = []
    for one in answer_all(champion, ((sent.name, sent.image) for sent in asked.images)):
        if isinstance(one, Refused):
            answers.append(Unanswered(name=one.name, error=one.why))
            continue
        picture, answer = one
        capture(inbox, picture, answer, champion.version)
        answers.append(
            Answered(
                name=picture.name,
                predicted=answer.predicted,
                confidence=answer.confidence,
                probabilities=answer.probabilities,
                disagreement=answer.disagreement,
                attention_map=_drawn(picture, answer, maps),
            )
        )
    return PredictResponse(model_version=champion.version, classes=champion.classes, answers=answers)


def _flag(champion: Promoted, asked: FlagRequest, inbox: Inbox) -> FlagResponse:
    classes, hint = champion.classes, asked.right_class
    if hint and hint not in classes:
        raise HTTPException(422, f"right_class {hint} is not a class{suggest(hint, classes)}")
    (one,) = answer_all(champion, [(asked.picture.name, asked.picture.image)])
    if isinstance(one, Refused):
        raise HTTPException(422, one.why)
    picture, answer = one
    why = f"flagged as wrong: the answer was {answer.predicted}" + (f", said to be {hint}" if hint else "")
    try:
        return FlagResponse(kept=inbox.keep(picture, answer, champion.version, why, flagged=True, right_class=hint))
    except ValueError as error:
        raise HTTPException(507, str(error)) from error


def _drawn(picture: Picture, answer: Answer, maps: Maps) -> str | None:
    if maps == "none":
        return None
    over = picture.shown if maps == "overlay" else None
    return base64.b64encode(map_png(answer.attention_map, over)).decode()


def _champion(current: Callable[[], Promoted]) -> Promoted:
    try:
        return current()
    except ValueError as error:
        raise HTTPException(503, str(error)) from error


# --- a request is JSON or a form ---------------------------------------------------------------------------------

Body = TypeVar("Body", PredictRequest, FlagRequest)
FILE = {"type": "string", "format": "binary"}


def _body(shape: type[BaseModel], form: dict[str, Any]) -> dict[str, Any]:
    """What the OpenAPI page says of a request's body; `form`: the fields of a form."""
    schema = shape.model_json_schema()
    inlined = _inlined(schema, schema.pop("$defs"))  # FastAPI collects the shapes of what it parses itself, no others
    shapes = {"application/json": inlined, "multipart/form-data": {"type": "object", "properties": form}}
    return {"requestBody": {"required": True, "content": {kind: {"schema": one} for kind, one in shapes.items()}}}


def _inlined(node: Any, shapes: dict[str, Any]) -> Any:
    """A JSON schema with every reference replaced by what it refers to."""
    if isinstance(node, list):
        return [_inlined(one, shapes) for one in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(shapes[node["$ref"].rpartition("/")[2]], shapes)
    return {key: _inlined(one, shapes) for key, one in node.items()}


async def _read(request: Request, shape: type[Body]) -> Body:
    """The request's body in either form. How long it may be is the service's affair (labeling/live.py)."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=MAX_PICTURES) as form:
            return await shape.from_form(form)
    if kind != "application/json":
        raise HTTPException(415, f"send application/json or multipart/form-data, not {kind or 'a body of no kind'}")
    try:
        return shape.model_validate_json(await request.body())
    except ValidationError as error:
        raise HTTPException(422, error.errors(include_url=False, include_context=False, include_input=False)) from error


async def _uploaded(file: Any) -> Sent:
    if not isinstance(file, UploadFile):
        raise HTTPException(422, "the pictures of a form must be files")
    return Sent.model_construct(image=await file.read(), name=file.filename or "")
