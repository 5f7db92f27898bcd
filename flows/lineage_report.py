"""Lineage for people: in words for the terminal and MLflow, and as a picture."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from flows.lineage import name_of


def as_json(facts: Any) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


def describe(facts: Mapping[str, Any]) -> str:
    """A model version in a few lines of Markdown."""
    gate, parent, data = facts["gate"], facts["parent"], facts["data_version"]
    lines = [
        f"Round {facts['round']}: {gate['decision']}, {gate['reason']}.",
        *([judged_in_words(gate)] if gate["gold"] else []),
        f"Learned from {learned_in_words(facts)}.",
        f"{parent_in_words(parent)}.",
        f"Code and parameters: git {facts['git_commit'][:12]}. Data: "
        + ", ".join(f"{name_of(path)} {md5[:8]}" for path, md5 in data.items())
        + ".",
        f"Every annotation: `abnloop lineage v{facts['model_version']}`, or lineage.html of the round's run.",
    ]
    return _cut("\n\n".join(lines))


def describe_history(decisions: Sequence[Mapping[str, str]]) -> str:
    """How the alias champion came to where it is, newest first, in Markdown."""
    rows = [
        f"| {one['decided']} | v{one['model_version']} (round {one['round']}) | {one['decision']} | v{one['champion']} "
        f"| {one['reason']} |"
        for one in reversed(decisions)
    ]
    head = ["| decided | version | | champion since then | why |", "| --- | --- | --- | --- | --- |"]
    now = f"The champion is v{decisions[-1]['champion']}."
    return _cut("\n".join([now, "", *head, *rows]))


def _cut(text: str) -> str:
    """As many whole lines as the registry holds; models/decisions.csv and lineage.json have everything."""
    if len(text) <= DESCRIPTION:
        return text
    return text[: text.rfind("\n", 0, DESCRIPTION)] + "\n\n…"


UNKNOWN = "(unknown)"
NAMED = 10  # labelers in a sentence
DESCRIPTION = 4900  # characters; MLflow's column is of 5000, which PostgreSQL enforces and SQLite does not


def learned_in_words(facts: Mapping[str, Any]) -> str:
    """How much came from whom, who gave most first, and how many masks that were."""
    annotations, masks = facts["annotations"], facts["masks"]
    if not annotations:
        return "nothing that anybody said"
    minutes = sum(one["minutes"] for one in annotations)
    gave = {labeler: len(group) for labeler, group in by_labeler_of(annotations).items()}
    named = [f"{labeler} ({count})" for labeler, count in list(gave.items())[:NAMED]]
    if len(gave) > NAMED:
        named.append(f"{len(gave) - NAMED} others ({sum(list(gave.values())[NAMED:])})")
    words = f"{len(annotations)} annotations, {minutes:.1f} minutes: {', '.join(named)}; masks used: {masks['used']}"
    if masks["set_aside"]:
        words += f", maps called fine and set aside beside so few painted ones: {masks['set_aside']}"
    return words


def parent_in_words(parent: Mapping[str, Any] | None) -> str:
    if parent is None:
        return "The first model"
    start = "trained on from its weights" if parent["weights"] == "champion" else "trained without its weights"
    return f"After v{parent['model_version']} (round {parent['round']}), {start}"


def judged_in_words(gate: Mapping[str, Any]) -> str:
    """By whose gold masks the verdict was given."""
    painted = {labeler: len(group) for labeler, group in by_labeler_of(gate["gold_painted"]).items()}
    given = gate["gold"]["val"] - len(gate["gold_painted"])
    named = [f"{labeler} ({count})" for labeler, count in list(painted.items())[:NAMED]]
    named += [f"{len(painted) - NAMED} others"] if len(painted) > NAMED else []
    named += [f"given at init ({given})"] if given > 0 else []
    return f"Judged by {gate['gold']['val']} gold masks of val" + (f": {', '.join(named)}." if named else ".")


def by_labeler_of(annotations: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups = defaultdict(list)
    for one in annotations:
        groups[one["labeler"] or UNKNOWN].append(one)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def as_text(facts: Mapping[str, Any]) -> list[RenderableType]:
    """For the terminal."""
    gate, version = facts["gate"], facts["data_version"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    champion = ", the champion" if facts["champion"] else ""
    for name, text in (
        ("model", f"{facts['model']} v{facts['model_version']}, round {facts['round']}{champion}"),
        ("gate", f"{gate['decision']}: {gate['reason']}"),
        *((("", judged_in_words(gate)),) if gate["gold"] else ()),
        ("parent", parent_in_words(facts["parent"])),
        ("learned from", learned_in_words(facts)),
        ("code", f"git {facts['git_commit']}"),
        *(("data" if number == 0 else "", f"{path} {md5}") for number, (path, md5) in enumerate(version.items())),
        *(
            ("parameters" if number == 0 else "", f"{section}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
            for number, (section, values) in enumerate(facts["parameters"].items())
        ),
    ):
        table.add_row(name, escape(text))
    return [table, annotations_table(facts["annotations"], facts["selected_by"])]


def annotations_table(annotations: Sequence[Mapping[str, Any]], selected_by: Sequence[Mapping[str, Any]] = ()) -> Table:
    """An annotation a line, with the reason why its sample was chosen."""
    why = {one["sample"]: f"v{one['model_version']}: {one['reason']}" for one in selected_by}
    table = Table("annotation", "sample", "labeler", "verdict", "minutes", "round", "chosen by", box=box.SIMPLE_HEAD)
    for one in annotations:
        cells = (one["id"], one["sample"], one["labeler"], one["verdict"], f"{one['minutes']:.2f}", one["round"])
        table.add_row(*(escape(str(cell)) for cell in (*cells, why.get(one["sample"], ""))))
    return table


def models_table(question: Mapping[str, str], models: Sequence[Mapping[str, Any]]) -> Table:
    """The models that learned from what was asked about."""
    ((what, value),) = question.items()
    title = f"models that learned from {what} {value}" if models else f"no model learned from {what} {value}"
    table = Table("model", "round", "", "learned from", title=title, box=box.SIMPLE_HEAD)
    for one in models:
        ids = ", ".join(str(statement["id"]) for statement in one["annotations"])
        parts = [f"annotations {ids}"] if ids else []
        parts += ["the picture"] if one["picture"] else []
        parts += [f"the weights of round {one['through']}"] if one["through"] else []
        gold = ", ".join(str(statement["id"]) for statement in one["judged_by"])
        parts += [f"nothing: judged by gold annotations {gold}"] if gold and not parts else []
        state = "champion" if one["champion"] else one["decision"]
        table.add_row(f"v{one['model_version']}", str(one["round"]), state, "; ".join(parts))
    return table


def draw(facts: Mapping[str, Any]) -> str:
    """The lineage as one HTML page with a graph; it needs no other file."""
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("lineage.html").read_text())
    return template.render(
        facts=facts,
        graph=layout(facts),
        learned=learned_in_words(facts),
        parent=parent_in_words(facts["parent"]),
        chosen={one["sample"]: one for one in facts["selected_by"]},
    )


BOX, GAP, TOP = (196, 48), (48, 16), 28  # pixels: a node's width and height, what lies between two, the titles' line
MOST = 12  # nodes of a kind; the smaller ones become one
COLUMNS = ("chosen by", "asked in", "learned from", "trained", "judged")
Node = tuple[int, str]  # its column and its title


def layout(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The graph from left to right, in COLUMNS: nodes and edges with their places in pixels."""
    annotations, gate, parent = facts["annotations"], facts["gate"], facts["parent"]
    chosen = {one["sample"]: f"v{one['model_version']}" for one in facts["selected_by"]}
    model = (3, f"v{facts['model_version']}")
    verdict = (4, gate["decision"])
    texts: dict[Node, str] = {}
    counts: Counter[Node] = Counter()
    edges: Counter[tuple[Node, Node]] = Counter()
    titles = zip(
        _few([chosen.get(one["sample"], "unknown") for one in annotations], "other models"),
        _few([f"round {one['round']}" for one in annotations], "other rounds"),
        _few([one["labeler"] or UNKNOWN for one in annotations], "other people"),
        strict=True,
    )
    for path in titles:
        nodes = list(enumerate(path))
        counts.update(nodes)
        edges.update(pairwise([*nodes, model]))
    for node in sorted(counts, key=lambda node: (len(node[1]), node[1])):
        texts[node] = f"{counts[node]} annotations"
    texts[2, "data"] = ", ".join(f"{name_of(path)} {md5[:6]}" for path, md5 in facts["data_version"].items())
    texts[2, "code and parameters"] = f"git {facts['git_commit'][:12]}"
    given = [((2, "data"), model), ((2, "code and parameters"), model), (model, verdict)]
    if parent:
        before = (2, f"v{parent['model_version']}, champion before")
        texts[before] = "weights to start from" if parent["weights"] == "champion" else "what it is weighed against"
        given += [(before, model if parent["weights"] == "champion" else verdict)]
    texts[model] = f"round {facts['round']}"
    texts[verdict] = gate["reason"]
    return _placed(texts, {**edges, **dict.fromkeys(given, 0)}, len(annotations))


def _placed(texts: Mapping[Node, str], edges: Mapping[tuple[Node, Node], int], most: int) -> dict[str, Any]:
    """Every node and edge with its place; columns are centred. An edge is as thick as its share of `most`."""
    (width, height), (across, down) = BOX, GAP
    columns = [[node for node in texts if node[0] == column] for column in range(len(COLUMNS))]
    tallest = max(len(nodes) for nodes in columns) * (height + down) - down
    places = {}
    for column, nodes in enumerate(columns):
        top = TOP + (tallest - len(nodes) * (height + down) + down) / 2
        for number, node in enumerate(nodes):
            places[node] = (1 + column * (width + across), top + number * (height + down))
    curves = []
    for (start, end), count in edges.items():
        (x, y), (to_x, to_y) = places[start], places[end]
        x, y, to_y = x + width, y + height / 2, to_y + height / 2
        bend = (to_x - x) / 2
        curves.append(
            {
                "path": f"M{x} {y} C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}",
                "thickness": 1.5 + 10 * count / max(most, 1),
                "kind": f"column{start[0]}",
                "text": f"{start[1]} to {end[1]}" + (f": {count}" if count else ""),
            }
        )
    return {
        "width": len(COLUMNS) * (width + across) - across + 2,
        "height": TOP + tallest + 2,
        "box": BOX,
        "columns": [{"x": 1 + column * (width + across), "text": text} for column, text in enumerate(COLUMNS)],
        "nodes": [
            {"x": x, "y": y, "title": title, "text": texts[column, title], "kind": _kind(column, title)}
            for (column, title), (x, y) in places.items()
        ],
        "edges": curves,
    }


def _kind(column: int, title: str) -> str:
    """The class of a node in lineage.html: the verdict has a colour of its own."""
    return title if column == len(COLUMNS) - 1 else f"column{column}"


def _few(labels: Sequence[str], rest: str) -> list[str]:
    """The labels, those that come least often as `rest` where there are more than MOST different ones."""
    often = [label for label, _ in Counter(labels).most_common()]
    kept = often if len(often) <= MOST else often[: MOST - 1]
    return [label if label in kept else rest for label in labels]
