"""MLflow: what is looked at. One parent run a round with train, evaluate and select below it; the registry."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import tenacity
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from PIL import Image

from abn.manifest import Sample

STAGES = ("train", "evaluate", "select")
CHAMPION = "champion"
OWNER = "abnloop.first_commit"  # of the workspace, by which two of the same name are told apart
MODEL_REQUIREMENTS = ("torch", "torchvision", "numpy", "pillow", "pyyaml", "jaxtyping")

log = logging.getLogger(__name__)


class Tracker:
    """The MLflow experiment and registered model called `name` on the server at `uri`."""

    def __init__(self, uri: str, name: str) -> None:
        self.name = name
        mlflow.set_tracking_uri(uri)  # the registry's functions know no other way
        # MLflow by itself asks a dead server for minutes; training must not wait for it that long.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        self.client = MlflowClient(tracking_uri=uri)
        self._logged: int | None = None  # lines of train.jsonl that MLflow has

    def experiment(self) -> str:
        """Id of the experiment, made where it is missing."""
        found = self._call(self.client.get_experiment_by_name, self.name)
        return found.experiment_id if found else self.client.create_experiment(self.name)

    def claim(self, workspace: str) -> None:
        """Marks the experiment as that of `workspace`. Raises ValueError where it is another's: rounds and models of
        both would be taken for each other."""
        experiment = self._call(self.client.get_experiment, self.experiment())
        owner = experiment.tags.get(OWNER, "")
        if owner not in ("", workspace):
            raise ValueError(
                f"MLflow has the experiment {self.name} of another workspace; give project.name in params.yaml "
                "another name, and commit it"
            )
        if not owner:
            self._call(self.client.set_experiment_tag, experiment.experiment_id, OWNER, workspace)

    def begin_round(self, number: int, tags: Mapping[str, str], params: Mapping[str, Any]) -> dict[str, str]:
        """The runs of round `number`, by `round` and stage: found where an interrupted round made them, else new."""
        experiment, title = self.experiment(), f"round {number:04d}"
        parent = self._find(experiment, f"tags.`abnloop.round` = '{number}' and tags.`abnloop.part` = 'round'")
        if parent:
            self.client.set_tag(parent.info.run_id, "abnloop.resumed", "true")
        else:
            own = {"abnloop.round": str(number), "abnloop.part": "round", **tags}
            parent = self.client.create_run(experiment, run_name=title, tags=own)
            flat = [Param(key, str(value)) for key, value in _flatten(params).items()]
            self.client.log_batch(parent.info.run_id, params=flat)
        runs = {"round": parent.info.run_id}
        for stage in STAGES:
            below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.`abnloop.part` = '{stage}'"
            run = self._find(experiment, below)
            if not run:
                links = {"mlflow.parentRunId": parent.info.run_id, "abnloop.part": stage, "abnloop.round": str(number)}
                run = self.client.create_run(experiment, run_name=f"{stage} {number:04d}", tags={**tags, **links})
                section = {key: value for key, value in params.items() if key in _sections(stage)}
                flat = [Param(key, str(value)) for key, value in _flatten(section).items()]
                self.client.log_batch(run.info.run_id, params=flat)
            runs[stage] = run.info.run_id
        return runs

    def follow(self, run: str, path: Path) -> None:
        """Log the lines of train.jsonl that are new since the last call. A server that is down only delays them."""
        lines = path.read_text().splitlines() if path.is_file() else []
        now = int(time.time() * 1000)
        try:
            if self._logged is None:  # an interrupted round goes on after the epochs it has logged
                self._logged = len(self.client.get_metric_history(run, "loss"))
            new = [json.loads(line) for line in lines[self._logged :]]
            values = [(name, value, line["epoch"]) for line in new for name, value in line.items() if name != "epoch"]
            for begin in range(0, len(values), 1000):
                metrics = [Metric(name, value, now, epoch) for name, value, epoch in values[begin : begin + 1000]]
                self.client.log_batch(run, metrics=metrics)
            self._logged = len(lines)
        except MlflowException as error:
            log.warning("MLflow does not take the training curve now, it will be logged later: %s", error)

    def log_metrics(self, run: str, metrics: Mapping[str, Any]) -> None:
        """Numbers by name; nested mappings become names such as test.accuracy."""
        now = int(time.time() * 1000)
        self._call(
            self.client.log_batch, run, metrics=[Metric(k, float(v), now, 0) for k, v in _flatten(metrics).items()]
        )

    def log_inputs(
        self,
        run: str,
        samples: Sequence[Sample],
        data: Mapping[str, str],
        context: str,
        version: ModelVersion | None = None,
    ) -> None:
        """The samples, by split, as MLflow data sets with the hashes that DVC knows them by (`data`: path -> MD5), and
        the model that was run on them."""
        inputs = []
        source = json.dumps(dict(data))
        # MLflow takes data sets of the same name and digest for one, and keeps what it was told first.
        digest = hashlib.sha256(source.encode()).hexdigest()[:32]
        for split in sorted({sample.split for sample in samples}):
            chosen = [sample for sample in samples if sample.split == split]
            profile = {"samples": len(chosen), "with_mask": sum(bool(sample.masks) for sample in chosen)}
            profile |= {f"class {name or '(none)'}": n for name, n in sorted(Counter(s.label for s in chosen).items())}
            dataset = Dataset(
                name=f"{self.name} {split}",
                digest=digest,
                source_type="dvc",
                source=source,
                profile=json.dumps(profile, ensure_ascii=False),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        models = [LoggedModelInput(str(version.source).removeprefix("models:/"))] if version else None
        self._call(self.client.log_inputs, run, inputs, models)

    def log_files(self, run: str, files: Mapping[str, Path | Image.Image | str]) -> None:
        """Artifacts by their path in the run: a file, a picture, or a text."""
        for name, content in files.items():
            if isinstance(content, Path):
                folder, _, _ = name.rpartition("/")
                self._call(self.client.log_artifact, run, str(content), folder or None)
            elif isinstance(content, str):
                self._call(self.client.log_text, run, content, name)
            else:
                self._call(self.client.log_image, run, content, name)

    def tag(self, run: str, tags: Mapping[str, Any]) -> None:
        self._call(self.client.log_batch, run, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def finish(self, run: str) -> None:
        self._call(self.client.set_terminated, run)

    def register(self, run: str, model: Path, code: Path, tags: Mapping[str, Any]) -> ModelVersion:
        """Log the model file as a pyfunc model of `run` and register it.

        Once a run: after a crash the version that is there is taken. `code` is the package abn that it needs.
        """
        found = self.client.search_model_versions(f"name = '{self.name}' and run_id = '{run}'")
        if found:
            return found[0]
        script = Path(__file__).with_name("network.py")
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        )
        with mlflow.start_run(run_id=run), warnings.catch_warnings():
            # It asks for an input example, which would fix the batch size to the example's.
            warnings.filterwarnings("ignore", message=".*input example was not provided")
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(script),
                artifacts={"model": str(model)},
                code_paths=[str(code)],
                signature=signature,
                pip_requirements=[_pinned(name) for name in MODEL_REQUIREMENTS],
            )
        with contextlib.redirect_stderr(io.StringIO()):  # where it says at length that all went well
            return mlflow.register_model(
                logged.model_uri, self.name, tags={key: str(value) for key, value in tags.items()}
            )

    def promote(self, version: str) -> None:
        """Give the version of this number the alias champion."""
        self._call(self.client.set_registered_model_alias, self.name, CHAMPION, version)

    def describe_version(self, version: ModelVersion, tags: Mapping[str, Any], text: str) -> None:
        """Tags and, in Markdown, what a reviewer reads of a version."""
        for key, value in tags.items():
            self._call(self.client.set_model_version_tag, self.name, str(version.version), key, str(value))
        self._call(self.client.update_model_version, self.name, str(version.version), text)

    def describe_model(self, text: str) -> None:
        """What a reviewer reads of the registered model, in Markdown."""
        self._call(self.client.update_registered_model, self.name, text)

    def _find(self, experiment: str, query: str) -> Run | None:
        runs = self._call(self.client.search_runs, [experiment], query, max_results=1)
        return runs[0] if runs else None

    def _call(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The network may fail for a moment, for longer it is a ConnectionError; what the server refuses is not
        repeated."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passing),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=10),
            stop=tenacity.stop_after_delay(60),
            reraise=True,
        )
        try:
            return retrying(call, *arguments, **named)
        except MlflowException as error:
            if _passing(error):
                raise ConnectionError(f"MLflow does not answer: {error}; look at it with `abnloop status`") from error
            raise


def _passing(error: BaseException) -> bool:
    return isinstance(error, MlflowException) and error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")


def _sections(stage: str) -> tuple[str, ...]:
    return {"train": ("data", "model", "train", "corrections"), "evaluate": ("predict",), "select": ("selection",)}[
        stage
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _pinned(package: str) -> str:
    from importlib.metadata import version

    return f"{package}=={version(package).split('+')[0]}"
