from __future__ import annotations

from pathlib import Path

import pytest
import tenacity

from flows.tracking import Tracker


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # of MLflow's own tables
def test_an_experiment_belongs_to_one_workspace(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):
        Tracker(uri, "leaves").claim("1" * 40)
    Tracker(uri, "other leaves").claim("2" * 40)
    with pytest.raises(ValueError, match="^MLflow has the experiment leaves of another workspace; give project.name"):
        Tracker(uri, "leaves").claim("2" * 40)


def test_an_mlflow_that_does_not_answer_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenacity, "stop_after_delay", lambda seconds: tenacity.stop_after_attempt(2))
    monkeypatch.setattr(tenacity, "wait_exponential_jitter", lambda **_: tenacity.wait_none())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker("http://127.0.0.1:9", "leaves")
    for call in (tracker.experiment, lambda: tracker.promote("1")):
        with pytest.raises(ConnectionError, match="MLflow does not answer: .*; look at it with `abnloop status`"):
            call()
