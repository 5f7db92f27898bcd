"""From a model to everything and everybody it learned from, and back; from git and the workspace's files alone.

What a round's model learned from is data/corrections.csv as the commit holds it at which the round trained, not what
was collected afterwards.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from abn.config import read_params
from abn.images import decode
from abn.manifest import (
    GOLD_MASKS,
    GOLD_TABLE,
    read_corrections,
    read_manifest,
    read_withdrawn,
    training_samples,
    without_loose_masks,
)
from flows.versions import Git
from flows.workspace import Round, Workspace, decision_of, read_json, read_table, write_table

DATA = (
    *("data/images", "data/manifest.csv", "data/corrections.csv", "data/withdrawals.csv"),
    *(GOLD_MASKS, GOLD_TABLE),
)
FORMS = "models:/NAME@champion, models:/NAME/3, a version such as v3, an MLflow run id, or round/0003"


def find_round(place: Workspace, model: str = "") -> Round:
    """The round that made `model`, written in one of FORMS; without a word the champion's.

    Raises ValueError for a model that this workspace does not know.
    """
    known = _judged(place)
    if not known:
        raise ValueError(f"{place.root} has no model yet; `abnloop round open` trains the first")
    name = read_params(place.params)["project"]["name"]
    named = re.fullmatch(r"models:/([^/@]+)(?:@(\w+)|/(\d+))", model)
    if named and named[1] != name:
        raise ValueError(f"{model} is not of this workspace, whose model is {name}; name another with --workspace")
    if named and named[2] not in (None, "champion"):
        raise ValueError(f"{model}: this workspace knows the alias champion alone; use {FORMS}")
    if not model or (named and named[2]):
        champion = read_json(place.champion_record)
        assert champion, "the first model is always promoted"
        return place.round(champion["round"])
    if by_round := re.fullmatch(r"round[/ ]?0*(\d+)", model):
        found = [round_ for round_ in known if round_.number == int(by_round[1])]
    elif version := named[3] if named else (re.fullmatch(r"v?(\d{1,9})", model) or [None, None])[1]:
        found = [round_ for round_, state in known.items() if state["model_version"] == version]
    else:
        found = [round_ for round_, state in known.items() if model in state["mlflow_runs"].values()]
    if not found:
        versions = ", ".join(f"v{state['model_version']}" for state in known.values())
        raise ValueError(f"no model {model} here; known: {versions}; write {FORMS}")
    return found[-1]


def trace(place: Workspace, round_: Round, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The lineage of a round's model, as `abnloop lineage --json` prints it; `state` where round.json lags behind.

    annotations: every one that the model learned from, minutes at the screen; masks: how many were `used`, and how many
    maps that were called fine were `set_aside` (abn.manifest.without_loose_masks); selected_by: for each of the samples
    the round and model version that chose it, its score and why; parent: the champion before it, and whether the
    training went on from its weights; gate: the verdict, and by which gold masks of val it was given: how many there
    were in all, and who painted which; data_version: DVC's MD5 of each part of the data.
    """
    state = state or round_.read()
    with _as_trained(place, round_, state) as files:
        corrections = sorted(read_corrections(files).values(), key=lambda row: row["sample"])
        parameters, data_version = read_params(files / "params.yaml"), _data_version(files)
        samples = training_samples(read_manifest(files))
    given, used = (sum(bool(one.masks) for one in some) for some in (samples, without_loose_masks(samples)))
    annotations = statements(place, corrections)
    verdict = state.get("verdict", {})
    return {
        "model": parameters["project"]["name"],
        "model_version": state["model_version"],
        "round": round_.number,
        "mlflow_runs": state["mlflow_runs"],
        "git_commit": commit_of_training(place, round_, state),
        "data_version": data_version,
        "parameters": parameters,
        "parent": verdict.get("parent"),
        "annotations": annotations,
        "masks": {"used": used, "set_aside": given - used},
        "selected_by": _selections(place, {(one["sample"], one["round"]) for one in annotations}),
        "gate": {
            "decision": decision_of(state),
            "promoted": state["promoted"],
            "reason": state["gate"],
            "criteria": verdict.get("criteria", []),
            "decided": verdict.get("decided"),
            "gold": verdict.get("gold", {}),
            "gold_painted": verdict.get("gold_painted", []),
            "earlier": verdict.get("earlier", []),
        },
    }


def record(place: Workspace, round_: Round, state: Mapping[str, Any]) -> list[dict[str, str]]:
    """Put the verdict on a round's model into models/decisions.csv; all of them, oldest first. A model that was
    undecided and is judged again has a line for each verdict.

    `champion` is the version that is the champion from then on.
    """
    decision = {
        "round": str(round_.number),
        "decided": state["verdict"]["decided"],
        "model_version": state["model_version"],
        "decision": decision_of(state),
        "champion": state["model_version"] if state["promoted"] else state["verdict"]["parent"]["model_version"],
        "reason": state["gate"],
    }
    same = (decision["round"], decision["decided"])
    before = [row for row in read_table(place.decisions) if (row["round"], row["decided"]) != same]
    write_table(place.decisions, list(decision), [*before, decision])
    return [*before, decision]


def name_of(path: str) -> str:
    """A part of the data (`DATA`) in a word."""
    return "gold_table" if path == GOLD_TABLE else Path(path).stem


def models_that_learned(place: Workspace, question: Mapping[str, str]) -> list[dict[str, Any]]:
    """The models that learned from what is asked about, oldest first, each with the annotations in question.

    `question` maps one of labeler (e-mail), annotation (id), sample (id) and round (that collected it) to its value;
    with a sample also the models count that trained on its picture, corrected or not (`picture`). A model whose
    training went on from another's weights learned what that one had (`through`: that one's round). Models that learned
    nothing of it but were judged by it count, too (`judged_by`: the gold annotations in question).
    """
    champion = read_json(place.champion_record).get("round")
    found: dict[int, dict[str, Any]] = {}
    for round_, state in _judged(place).items():
        with _as_trained(place, round_, state) as files:
            given = statements(place, read_corrections(files).values())
            pictures = {sample.id for sample in training_samples(read_manifest(files))}
        asked, picture = about(given, question), question.get("sample") in pictures
        through = _went_on_from(state)
        through = through if through in found else None
        judged_by = about(state.get("verdict", {}).get("gold_painted", []), question)
        if asked or picture or through or judged_by:
            found[round_.number] = {
                "model_version": state["model_version"],
                "round": round_.number,
                "decision": decision_of(state),
                "promoted": state["promoted"],
                "champion": champion == round_.number,
                "annotations": asked,
                "picture": picture,
                "through": through,
                "judged_by": judged_by,
            }
    return list(found.values())


def _judged(place: Workspace) -> dict[Round, dict[str, Any]]:
    """What round.json says of each round that has been judged, oldest first."""
    return {round_: state for round_ in place.rounds() if "promoted" in (state := round_.read())}


def _went_on_from(state: Mapping[str, Any]) -> int | None:
    """The round from whose weights the training went on."""
    parent = state.get("verdict", {}).get("parent")
    return parent["round"] if parent and parent["weights"] == "champion" else None


def learned_withdrawn(place: Workspace, round_: Round) -> bool:
    """Whether a round's model learned from something that has been withdrawn since, itself or through the weights that
    its training went on from."""
    state, out = round_.read(), read_withdrawn(place.root)
    with _as_trained(place, round_, state) as files:
        given = statements(place, read_corrections(files).values())
    before = _went_on_from(state)
    return any((str(one["id"]), one["sample"]) in out for one in given) or (
        before is not None and learned_withdrawn(place, place.round(before))
    )


def statements(place: Workspace, rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The single annotations behind rows of data/corrections.csv: several people may have answered a sample, and then
    the table of the round that collected them says what each gave, as it was then."""
    given = {
        (round_.number, one["annotation"], one["sample"]): one
        for round_ in place.rounds()
        for one in read_table(round_.corrections)
    }
    found = []
    for row in rows:
        for number, labeler in zip(row["annotation"].split(" "), row["labeler"].split(" "), strict=True):
            single = {**row, **given.get((int(row["round"]), number, row["sample"]), {})}
            found.append(
                {
                    "id": int(number),
                    "revision": single["revision"],
                    "labeler": labeler,
                    "sample": row["sample"],
                    "minutes": float(single["minutes"]),
                    "round": int(row["round"]),
                    "verdict": single["verdict"],
                }
            )
    return found


def about(given: Iterable[dict[str, Any]], question: Mapping[str, str]) -> list[dict[str, Any]]:
    """Those of the statements that a question, as `models_that_learned` takes it, is about."""
    ((what, value),) = question.items()
    return [one for one in given if str(one["id" if what == "annotation" else what]) == value]


def sample_of(place: Workspace, image: Path) -> str:
    """The id of the sample that shows the same picture as the file `image`: the same bytes, or the same pixels.

    Raises ValueError where the file is no picture, or no sample shows it.
    """
    if not image.is_file():
        raise ValueError(f"{image} is not a file")
    samples, content = read_manifest(place.root, corrected=False), image.read_bytes()
    paths = {sample.id: place.root / sample.image for sample in samples}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing; restore it with `dvc checkout data/images`")
    for name, path in paths.items():
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return name
    try:
        size, shown = _look(image)
    except OSError as error:
        raise ValueError(f"{image} is not a picture: {error}") from error
    for name, path in paths.items():
        with Image.open(path) as other:
            same_size = other.size == size
        if same_size and _look(path)[1] == shown:
            return name
    raise ValueError(f"no picture of {place.root} shows the same as {image}")


def commit_of_training(place: Workspace, round_: Round, state: Mapping[str, Any]) -> str:
    """The commit that a round's model was trained at: its code, parameters and tables."""
    return state.get("git_commit") or Git(place.root).before(place.relative(round_.state))


@contextmanager
def _as_trained(place: Workspace, round_: Round, state: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with params.yaml and data/'s tables as they were when the round's model was trained."""
    with tempfile.TemporaryDirectory() as folder:
        Git(place.root).export(commit_of_training(place, round_, state), ["params.yaml", "data"], Path(folder))
        yield Path(folder)


def _data_version(files: Path) -> dict[str, str]:
    """DVC's MD5 of each part of the data: a file under git is hashed as DVC does, of others there is a .dvc file."""
    version = {}
    for path in DATA:
        pointer = files / f"{path}.dvc"
        if pointer.is_file():
            version[path] = yaml.safe_load(pointer.read_text())["outs"][0]["md5"]
        elif (files / path).is_file():
            version[path] = hashlib.md5((files / path).read_bytes(), usedforsecurity=False).hexdigest()
    return version


def _selections(place: Workspace, asked: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """Who chose each of these (sample, round of its annotation): the last round until then that asked about it."""
    chosen: dict[str, dict[int, dict[str, Any]]] = {}
    for round_ in place.rounds():
        version = round_.read().get("model_version")
        for pick in read_table(round_.batch):
            chosen.setdefault(pick["sample"], {})[round_.number] = {
                "sample": pick["sample"],
                "round": round_.number,
                "model_version": version,
                "score": float(pick["score"]),
                "reason": pick["reason"],
            }
    selections = []
    for sample, number in sorted(asked):
        until = [one for one in chosen.get(sample, {}) if one <= number]
        selections += [chosen[sample][max(until)]] if until else []
    return selections


def _look(path: Path) -> tuple[tuple[int, int], str]:
    """Size (width, height) and content of the upright picture."""
    with Image.open(path) as image:
        decoded = decode(image)
    height, width, _ = decoded.rgb.shape
    return (width, height), decoded.content
