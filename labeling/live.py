"""The network's answer while a map is painted: Label Studio's ML-backend protocol around a predictor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
from fastapi import BackgroundTasks, FastAPI

from labeling.tasks import read_mask

# Sample id and the mask in place of the network's own map (None: its own) -> classes, most probable first.
Predictor = Callable[[str, np.ndarray | None], list[tuple[str, float]]]

NAME = "abnloop"
SHOWN_CLASSES = 3


def create_app(predictor: Predictor, on_hint: Callable[[dict[str, Any]], None] | None = None) -> FastAPI:
    """The service that answers strokes through `predictor` and hands webhooks to `on_hint`.

    A mask is (height, width) uint8 0..255 at the picture's own size. Predicting has no side effects: Label
    Studio also asks on page load and on submit. A webhook is a hint only, and may come twice or never.
    """
    app = FastAPI(title=NAME)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "UP", "model_class": NAME}

    @app.post("/setup")
    def setup() -> dict[str, str]:
        return {"model_version": NAME}

    @app.get("/versions")
    def versions() -> dict[str, list[str]]:
        return {"versions": [NAME]}

    @app.post("/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        text = _answer(body, predictor)
        return {"results": [{"result": [_text_result(text)]} if text else {}]}

    @app.post("/webhook")
    def webhook(body: dict[str, Any], background: BackgroundTasks) -> dict[str, str]:
        # Label Studio waits one second and sends no second time, so answer first.
        if on_hint is not None:
            background.add_task(on_hint, body)
        return {"status": "ok"}

    return app


def _answer(body: Mapping[str, Any], predictor: Predictor) -> str | None:
    """The text for the labeler; None without a mask, which leaves the text that is there."""
    tasks, params = body.get("tasks") or [], body.get("params") or {}
    painted = (params.get("context") or {}).get("result") or []
    if not tasks or not painted:
        return None
    data = tasks[0]["data"]
    # The time tells a stale text from a fresh one: a dead service leaves no other trace on the screen.
    now = datetime.now().strftime("%H:%M:%S")
    try:
        mask = read_mask(painted, data["height"], data["width"])
        if mask is None:
            return None
        answer = predictor(data["sample"], mask)
    except (ValueError, KeyError) as error:
        return f"no answer: {error} · {now}"
    return " · ".join([*(f"{name} {share:.2f}" for name, share in answer[:SHOWN_CLASSES]), now])


def _text_result(text: str) -> dict[str, Any]:
    value = {"text": [text]}
    return {"id": "live1", "type": "textarea", "from_name": "live", "to_name": "live_target", "value": value}
