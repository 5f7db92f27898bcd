"""`abnloop ...`: thin commands over the modules beside this one, and errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.workspace import Workspace

app = typer.Typer(
    name="abnloop",
    help="Train a classifier that shows where it looks, ask people to correct its attention, and learn from them.",
    epilog="A first look: `abnloop init DIR --images IMAGES`, then `abnloop up --workspace DIR`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()

rounds = typer.Typer(help="Open a round, collect its answers, see how the rounds went.", no_args_is_help=True)
app.add_typer(rounds, name="round")

WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="The workspace.", show_default="here")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The workspace to make; it must not exist yet.")],
    images: Annotated[Path, typer.Option(help="Class folders: IMAGES/<class>/<file>.")],
    masks: Annotated[Path | None, typer.Option(help="MASKS/<class>/<stem of the image>.png, white on black.")] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="A CSV in place of folders; columns among id, image, cls or label, split, group, mask."),
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Leave a class out; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change params.yaml; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the splits, where none are given.")] = 0,
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Where DIRECTORY starts.", show_default="here")
    ] = Path(),
) -> None:
    """Make a workspace: a clone of the project with its own data, DVC and git history.

    Splits that no CSV gives are stratified (train 0.7, val 0.15, test 0.15) and never cut a group. The same picture
    in two splits is refused. Masks of val and test become the gold set, which judges maps and trains nothing; masks
    of train and pool are known only to simulated labelers.

    Example: `abnloop init leaves --images leaf_photos --masks leaf_masks --drop mixed --set train.epochs=20`
    """
    from flows.ingest import init_workspace

    with _progress() as on_progress:
        report = init_workspace(
            _repository(),
            workspace / directory,
            images,
            masks,
            index,
            _parse_settings(settings or []),
            drop or [],
            seed,
            on_progress,
        )
    labels = sorted({label for counts in report.images.values() for label in counts})
    table = Table("class", *report.images, title=f"Images in {directory}")
    for label in labels:
        table.add_row(escape(label) or "(none)", *(str(counts.get(label, 0)) for counts in report.images.values()))
    console.print(table)
    console.print(f"gold masks (val, test): {report.gold_masks}")
    console.print(f"masks known only to the simulated labelers (train, pool): {report.simulation_masks}")
    for what, lines in {
        "left out, unreadable": [f"{one['image']}: {one['reason']}" for one in report.unreadable],
        "left out, the same picture": [f"{one['image']} is {one['same_as']}" for one in report.duplicates],
        "turned upright, saved as PNG": report.turned,
    }.items():
        if lines:
            more = f"\n  and {len(lines) - 10} more: see data/ingest.json" if lines[10:] else ""
            console.print(f"{what}: {len(lines)}\n  " + "\n  ".join(map(escape, lines[:10])) + more)
    for line in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(line)}")
    console.print(f"next: `abnloop up --workspace {escape(str(workspace / directory))}`")


@app.command()
def up(workspace: WorkspaceOption = Path()) -> None:
    """Start Label Studio, Prefect, MLflow and the project's own service, on this machine only.

    Example: `abnloop up --workspace leaves`
    """
    from flows import services
    from flows.workspace import open_workspace

    place = open_workspace(workspace)
    with _states() as on_change:
        states = services.up(place, on_change)
    _print_states(states)
    if states[0].state != "external":
        email, password = services.log_in(place)
        console.print(f"log in to Label Studio as [bold]{email}[/] with password [bold]{escape(password)}[/]")


@app.command()
def down(workspace: WorkspaceOption = Path()) -> None:
    """End the services with all their processes.

    Example: `abnloop down --workspace leaves`
    """
    from flows import services
    from flows.workspace import open_workspace

    with _states() as on_change:
        services.down(open_workspace(workspace), on_change)


@app.command()
def status(workspace: WorkspaceOption = Path()) -> None:
    """Show the services: whether they answer, and where.

    Example: `abnloop status --workspace leaves`
    """
    from flows import services
    from flows.workspace import open_workspace

    _print_states(services.status(open_workspace(workspace)))


@app.command()
def doctor(workspace: WorkspaceOption = Path()) -> None:
    """Say what is wrong and the remedy. Exit code 1 where something is broken, 0 where there is advice at most.

    Example: `abnloop doctor --workspace leaves`
    """
    from flows import services
    from flows.workspace import open_workspace

    findings = services.doctor(open_workspace(workspace))
    colours = {"broken": "red", "advice": "yellow"}
    table = Table("", "what", "remedy", show_lines=True)
    for finding in findings:
        table.add_row(f"[{colours[finding.level]}]{finding.level}[/]", escape(finding.what), escape(finding.remedy))
    console.print(table if findings else "[green]all is well[/]")
    if any(finding.level == "broken" for finding in findings):
        raise typer.Exit(1)


@rounds.command("open")
def round_open(workspace: WorkspaceOption = Path()) -> None:
    """Train, judge, choose whom to ask, and put the batch before the labelers.

    Example: `abnloop round open --workspace leaves`
    """
    place = _connected(workspace)
    from flows.rounds import open_round

    with _listening():
        opened = open_round(str(place.root))
    if not opened.new:
        console.print(f"round {opened.round} is open already; `abnloop round collect` takes its answers in")
        return
    console.print(f"{'promoted' if opened.promoted else 'refused'}: {escape(opened.why)}")
    console.print(f"round {opened.round}: {opened.tasks} tasks wait in Label Studio")


@rounds.command("collect")
def round_collect(workspace: WorkspaceOption = Path()) -> None:
    """Take in what labelers answered; close the round when its batch is complete or its deadline has passed.

    Example: `abnloop round collect --workspace leaves`
    """
    place = _connected(workspace)
    from flows.rounds import collect_round

    with _listening():
        got = collect_round(str(place.root))
    if not got.tasks:
        console.print("no round is open, there is nothing to collect; open one with `abnloop round open`")
    elif not got.closed:
        console.print(f"round {got.round}: {got.answered} of {got.tasks} tasks are answered; it stays open")
    else:
        console.print(
            f"round {got.round} is closed with {got.corrections} corrections, {got.set_aside} set aside: {got.commit}"
        )


@rounds.command("status")
def round_status(workspace: WorkspaceOption = Path()) -> None:
    """Show every round: what its model learned from, how good it is, whether it was promoted.

    Example: `abnloop round status --workspace leaves`
    """
    from flows.summary import summarise, summary_table
    from flows.workspace import open_workspace

    place = open_workspace(workspace)
    console.print(summary_table(summarise(place), f"rounds of {place.root.name}"))


@app.command()
def simulate(
    workspace: WorkspaceOption = Path(),
    seed: Annotated[int, typer.Option(help="Of their faults.")] = 0,
) -> None:
    """Let simulated labelers answer what is open, from the masks that `init` set aside for them.

    Example: `abnloop simulate --workspace leaves`
    """
    place = _connected(workspace)
    from flows.rounds import simulate_labelers

    with _listening():
        verdicts = simulate_labelers(place, seed=seed)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing was open")


@app.command()
def serve(workspace: WorkspaceOption = Path()) -> None:
    """Run the loop on its schedule: retraining on a cron, collecting every few minutes (params.yaml, flows).

    Example: `abnloop serve --workspace leaves`
    """
    place = _connected(workspace)
    from flows.serve import serve as run

    run(place)


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(help="How often to train and ask.")] = 3,
    budget: Annotated[int, typer.Option(help="Pictures that labelers are asked about, a round.")] = 30,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the services up, to look around.")] = False,
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Made anew each time.")] = Path("demo"),
) -> None:
    """Show the whole loop on handwritten digits, with simulated labelers, in a few minutes.

    Example: `abnloop demo --keep`
    """
    from flows.demo import run_demo
    from flows.summary import summary_table

    with _listening():
        summary = run_demo(_repository(), workspace, rounds, budget, keep)
    console.print(summary_table(summary, "handwritten digits with a shortcut"))
    console.print(
        f"pictures: {escape(str(workspace / 'report.html'))}, numbers: {escape(str(workspace / 'summary.json'))}"
    )
    if keep:
        from flows import services
        from flows.workspace import open_workspace

        place = open_workspace(workspace)
        _print_states(services.status(place))
        email, password = services.log_in(place)
        console.print(f"log in to Label Studio as [bold]{email}[/] with password [bold]{escape(password)}[/]")
        console.print(f"end the services with `abnloop down --workspace {escape(str(workspace))}`")


def main() -> None:
    """The `abnloop` command: what a user can mend is one line and exit code 2."""
    try:
        app()
    except (ValueError, ConnectionError, PermissionError, FileNotFoundError) as error:
        if os.environ.get("ABNLOOP_TRACEBACK") == "1":
            raise
        print(f"abnloop: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _connected(directory: Path) -> Workspace:
    """The workspace, with this process's Prefect and MLflow pointed at its servers."""
    from flows import services
    from flows.workspace import open_workspace

    place = open_workspace(directory)
    services.connect(place)
    return place


@contextmanager
def _listening() -> Iterator[None]:
    """Bars for whatever reports progress."""
    from flows.progress import listening

    with _progress() as on_progress, listening(on_progress):
        yield


def _repository() -> Path:
    """The clone of the project that this code runs from."""
    return Path(__file__).resolve().parent.parent


def _parse_settings(texts: list[str]) -> dict[str, Any]:
    """`section.key=value` texts as a mapping; values are YAML."""
    import ruamel.yaml

    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text} must be SECTION.KEY=VALUE, such as train.epochs=20")
        try:
            settings[name.strip()] = ruamel.yaml.YAML(typ="safe").load(value)
        except ruamel.yaml.error.YAMLError as error:
            raise ValueError(f"--set {text}: {value} is not YAML") from error
    return settings


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is done, one after another."""
    from rich.progress import Progress

    if not console.is_terminal:  # a log, where a bar would leave nothing behind
        yield lambda what, done, total: console.print(f"{what} {done}/{total}") if done in (1, total) else None
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield on_progress


@contextmanager
def _states() -> Iterator[Callable[[str, str], None]]:
    """A line for each service, with what became of it last."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as lines:
        tasks: dict[str, Any] = {}

        def on_change(title: str, what: str) -> None:
            if title not in tasks:
                tasks[title] = lines.add_task(title, total=1)
            lines.update(tasks[title], description=f"{title}: {what}", completed=0 if what == "starting" else 1)

        yield on_change


def _print_states(states: list[Any]) -> None:
    colours = {"up": "green", "external": "green", "not answering": "red", "down": "yellow"}
    table = Table("service", "state", "address", "pid", "log")
    for state in states:
        colour, pid, log = colours[state.state], str(state.pid or ""), state.log.name if state.log else ""
        table.add_row(state.title, f"[{colour}]{state.state}[/]", state.address, pid, log)
    console.print(table)
    console.print(f"logs: {escape(str(states[-1].log.parent))}", soft_wrap=True)


if __name__ == "__main__":
    main()
