"""Labelers who answer through the real API from known masks, with human faults."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from labeling.client import LabelStudio
from labeling.corrections import INSIDE
from labeling.screen import Tool
from labeling.tasks import mask_result, read_mask, verdict_results

# A map that agrees this well with the object would not be repainted by a person.
GOOD_ENOUGH_IOU = 0.6
# Seconds at the screen, the median of each verdict; single answers vary by about a half.
SECONDS = {"map_ok": 6.0, "map_fixed": 25.0, "whole_image": 5.0, "unusable": 5.0}


@dataclass(frozen=True)
class Faults:
    """How simulated labelers differ from the known mask; lengths as shares of the picture's larger side.

    What they paint. `grow`: the outline lies this much too far out; `dilate`: up to this much more, out or in;
    `shift`: the whole mask is moved by up to this much each way; `wobble`: standard deviation of an unsteady outline;
    `miss`: share of the masks that cover half of the object only; `wrong`: share that cover another place of the
    same shape.

    How they work. `lazy`: share of the answers that call the map fine without a look; `skips`: share of the tasks
    that they skip; `drafts`: share that they leave half done and submit when they come next; `slow`: how many times
    the usual seconds they take.
    """

    grow: float = 0.0
    dilate: float = 0.02
    shift: float = 0.02
    wobble: float = 0.01
    miss: float = 0.0
    wrong: float = 0.0
    lazy: float = 0.0
    skips: float = 0.0
    drafts: float = 0.0
    slow: float = 1.0


# By name, for a command line.
FAULTS = {
    "none": Faults(dilate=0, shift=0, wobble=0),
    "careful": Faults(),
    "careless": Faults(grow=0.15, shift=0.05, miss=1 / 3, wrong=0.05),
    "hasty": Faults(lazy=0.3, skips=0.1, drafts=0.1, slow=0.5),
}


def simulate(
    labelers: Sequence[LabelStudio],
    project: int,
    task_ids: Iterable[int],
    masks: Mapping[str, np.ndarray],
    faults: Faults,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Counter[str]:
    """Answer the tasks that are not done; how often each verdict was given, `skipped` and `draft` among them.

    Each of `labelers` is the Label Studio of an account of its own. They take turns, everyone in an order of their
    own, and answer what the others left to answer. `masks`: sample id -> (height, width) uint8, 0 or 255: map_ok
    where the shown map agrees with it, else map_fixed with a faulty copy of it; whole_image where it is empty,
    unusable where there is none. What a labeler says of a sample depends on `seed`, their place in `labelers` and
    its id alone. `on_progress` is called with (done, all).
    """
    tasks = list(task_ids)
    names = [labeler.who() for labeler in labelers]
    orders = [np.random.default_rng([seed, number]).permutation(tasks).tolist() for number in range(len(labelers))]
    said: Counter[str] = Counter()
    for turn, chosen in enumerate(zip(*orders, strict=True), start=1):
        for number, task_id in enumerate(chosen):
            task = labelers[number].task(task_id)
            if task["project"] != project:
                raise ValueError(f"task {task_id} is of project {task['project']}, not {project}")
            answered = [annotation["completed_by"]["email"] for annotation in task["annotations"]]
            if not task["is_labeled"] and names[number] not in answered:
                said[_answer(labelers[number], task, masks.get(task["data"]["sample"]), faults, seed, number)] += 1
        if on_progress:
            on_progress(turn, len(tasks))
    return said


def human_mask(mask: np.ndarray, faults: Faults, generator: np.random.Generator) -> np.ndarray:
    """`mask` (height, width) uint8 as a person would paint it; never empty where `mask` is not."""
    inside = mask >= INSIDE
    if inside.all() or not inside.any():
        return mask.copy()  # no outline to get wrong
    side = max(mask.shape)
    # Distance to the outline, positive inside: adding to it dilates, subtracting erodes, noise wobbles.
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    distance = distance + (faults.grow + generator.uniform(-faults.dilate, faults.dilate)) * side
    noise = ndimage.gaussian_filter(generator.standard_normal(mask.shape), max(side / 16, 1))
    distance += noise / max(noise.std(), 1e-9) * faults.wobble * side
    moved = generator.uniform(-faults.shift, faults.shift, 2) * side
    painted = ndimage.shift(distance, moved, order=1, mode="nearest") > 0
    if generator.random() < faults.miss:
        painted &= half_plane(painted, generator)
    if generator.random() < faults.wrong:
        painted = np.roll(painted, [length // 2 for length in painted.shape], axis=(0, 1))
    return np.where(painted if painted.any() else inside, 255, 0).astype(np.uint8)


def _answer(
    studio: LabelStudio, task: Mapping[str, Any], gold: np.ndarray | None, faults: Faults, seed: int, labeler: int
) -> str:
    data = task["data"]
    generator = _generator(seed, data["sample"], labeler)
    habit = _generator(seed, f"{data['sample']} habit", labeler).random()  # one of them at most
    lazy, skips, drafts = np.cumsum([faults.lazy, faults.skips, faults.drafts])
    painted: list[dict[str, Any]]
    prediction = (task["predictions"] or [None])[-1]
    shown = prediction["result"] if prediction else []
    if gold is not None and gold.shape != (data["height"], data["width"]):
        raise ValueError(
            f"the known mask of {data['sample']} is {gold.shape[1]} x {gold.shape[0]}, "
            f"but its picture is {data['width']} x {data['height']}"
        )
    if gold is None:
        verdict, painted = "unusable", []
    elif not gold.any():
        verdict, painted = "whole_image", []
    elif habit < lazy or _agrees(read_mask(shown, *gold.shape), gold):
        verdict, painted = "map_ok", shown
    else:
        tool: Tool = "brush" if shown and shown[0]["type"] == "brushlabels" else "bitmask"
        painted = [{**mask_result(human_mask(gold, faults, generator), tool), "origin": "prediction-changed"}]
        verdict = "map_fixed"
    seconds = round(SECONDS[verdict] * faults.slow * float(generator.lognormal(0, 0.5)), 1)
    parent = prediction["id"] if prediction else None
    result = [*painted, *verdict_results(verdict)]
    if lazy <= habit < skips:
        studio.annotate(task["id"], [], seconds, parent, skip=True)
        return "skipped"
    if skips <= habit < drafts and not task["drafts"]:
        studio.leave_draft(task["id"], result, seconds)
        return "draft"
    studio.annotate(task["id"], result, seconds, parent)
    return verdict


def _agrees(shown: np.ndarray | None, gold: np.ndarray) -> bool:
    if shown is None:
        return False
    shown, gold = shown >= INSIDE, gold >= INSIDE
    return bool((shown & gold).sum() >= GOOD_ENOUGH_IOU * (shown | gold).sum())


def half_plane(painted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One side of a line in a random direction that halves what is painted."""
    angle = generator.uniform(0, 2 * np.pi)
    rows, columns = np.indices(painted.shape)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    return along <= np.median(along[painted]) if painted.any() else np.ones_like(painted)


def _generator(seed: int, sample: str, labeler: int) -> np.random.Generator:
    name = hashlib.sha256(sample.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(name[:8], "big"), labeler])
