"""How long a labeler waits for the answer to a stroke: python -m benchmarks.live

Starts the real service on this machine's loopback with a workspace of random pictures and a network with random
weights, paints as Label Studio would send it, and prints how long /predict took, in milliseconds. Beside it the
processor time that the service spent on a stroke, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import csv
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from abn.manifest import MANIFEST_COLUMNS
from abn.model import ABN, ModelConfig, save_model
from flows.services import live_secret
from flows.workspace import Workspace, write_json
from labeling.client import service_authorization
from labeling.screen import Tool
from labeling.tasks import Question, make_task, mask_result

SIDE = 224  # pixels, of pictures and of the network's input
CLASSES = [f"class {number}" for number in range(10)]
TARGET = 150.0  # milliseconds, 95th percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--mechanism", default="residual", choices=["residual", "gate"])
    parser.add_argument("--seconds", type=float, default=30.0, help="how long strokes are sent, for each tool")
    parser.add_argument("--rate", type=float, default=5.0, help="strokes a second")
    parser.add_argument("--pictures", type=int, default=10)
    chosen = parser.parse_args()
    strokes = round(chosen.rate * chosen.seconds)
    with tempfile.TemporaryDirectory() as folder:
        place = make_workspace(Path(folder), chosen.pictures, ModelConfig(chosen.backbone, "none", chosen.mechanism))
        with (
            service(place) as (process, url, headers),
            httpx.Client(base_url=url, headers=headers, trust_env=False) as labeler,
        ):

            def once_each() -> list[float]:
                return [ask(labeler, a_stroke(number, "bitmask")) for number in range(chosen.pictures)]

            first = measured("picture not asked about before", process, once_each)
            again = measured("asked about before", process, once_each)
            print(f"  not asked before / asked before: {first / again:.1f}")
            for tool in ("bitmask", "brush"):
                bodies = [a_stroke(number % chosen.pictures, tool, number) for number in range(strokes)]
                measured(f"{chosen.rate:g} a second, {tool}", process, partial(at_rate, labeler, bodies, chosen.rate))
        load = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    print(f"target: 95th percentile under {TARGET:.0f} ms. {psutil.cpu_count()} cores, load over 1, 5, 15 min: {load}")


def make_workspace(root: Path, pictures: int, config: ModelConfig) -> Workspace:
    """A workspace that holds what the service reads: pictures, manifest, champion."""
    place = Workspace(root)
    for folder in (place.images, place.models, place.state):
        folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    with place.manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(MANIFEST_COLUMNS)
        for number in range(pictures):
            path = place.images / f"{number}.jpg"
            Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)).save(path)
            writer.writerow([f"sample {number}", place.relative(path), CLASSES[0], "train", ""])
    torch.manual_seed(0)
    save_model(place.champion, ABN(config, len(CLASSES)), config, CLASSES, (SIDE, SIDE))
    write_json(place.champion_record, {"model_version": "1"})
    return place


@contextmanager
def service(place: Workspace) -> Iterator[tuple[psutil.Process, str, dict[str, str]]]:
    """The service as `abnloop up` starts it, ready to answer: its process, its address, the headers that it wants."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    secret = live_secret(place)
    command = [sys.executable, "-m", "flows.live_service", "--workspace", str(place.root), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        while not loaded(url):
            assert process.poll() is None, "the service ended while it started"
            time.sleep(0.1)
        yield psutil.Process(process.pid), url, {"Authorization": service_authorization(secret)}
    finally:
        process.terminate()
        process.wait()


def loaded(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/health", trust_env=False, timeout=10).json()["model_version"] == "v1")
    except httpx.TransportError:
        return False


def a_stroke(number: int, tool: Tool, seed: int = 0) -> bytes:
    """The body of /predict for a soft map with a disc painted into it and one erased from it.

    Label Studio sends the task along with its prediction, which holds a mask as large as the one that is asked about.
    """
    chance = np.random.default_rng([number, seed])
    rows, columns = np.indices((SIDE, SIDE))
    question = Question(
        sample=f"sample {number}",
        image_url="/image",
        heatmap_url="/heatmap",
        width=SIDE,
        height=SIDE,
        label=CLASSES[0],
        predicted=CLASSES[1],
        confidence=0.5,
        reason="benchmark",
        attention_map=chance.random((14, 14)).astype(np.float32),
    )
    task = make_task(question, "v1", 1, tool)
    mask = chance.integers(0, 60, (SIDE, SIDE)).astype(np.uint8)
    for value in (255, 0):
        row, column, radius = chance.integers(20, 200), chance.integers(20, 200), chance.integers(10, 60)
        mask[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = value
    body = {
        "tasks": [{**task, "annotations": [], "drafts": []}],  # without an id: no Label Studio holds drafts of it
        **{"project": "1.1", "label_config": "", "params": {"context": {"result": [mask_result(mask, tool)]}}},
    }
    return json.dumps(body).encode()


def ask(labeler: httpx.Client, body: bytes) -> float:
    """Milliseconds until the answer is there."""
    began = time.perf_counter()
    answer = labeler.post("/predict", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    took = (time.perf_counter() - began) * 1000
    assert "class" in answer.json()["results"][0]["result"][0]["value"]["text"][0], answer.text
    return took


def at_rate(labeler: httpx.Client, bodies: Sequence[bytes], rate: float) -> list[float]:
    """Strokes at a steady rate, whether or not the one before is answered, as several labelers make them."""
    with ThreadPoolExecutor(len(bodies)) as painters:
        answers, began = [], time.perf_counter()
        for number, body in enumerate(bodies):
            time.sleep(max(0.0, began + number / rate - time.perf_counter()))
            answers.append(painters.submit(ask, labeler, body))
        return [answer.result() for answer in answers]


def measured(what: str, process: psutil.Process, paint: Callable[[], list[float]]) -> float:
    """Paint, say how long the answers took; their median."""
    before = spent_by(process)
    took = paint()
    each = (spent_by(process) - before) / len(took)
    median, late = np.percentile(took, [50, 95])
    print(
        f"{what}: {len(took)} strokes, median {median:.0f} ms, 95th percentile {late:.0f} ms, "
        f"processor {each:.0f} ms a stroke",
        flush=True,
    )
    return float(median)


def spent_by(process: psutil.Process) -> float:
    """Milliseconds of processor time since the process began."""
    times = process.cpu_times()
    return float(times.user + times.system) * 1000


if __name__ == "__main__":
    main()
