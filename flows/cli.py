"""`abnloop ...`: thin commands over the modules beside this one, and errors in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.ingest_report import Report
    from flows.rounds import Collected, Idle, Opened
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

labelers = typer.Typer(help="Invite labelers, see how they do.", no_args_is_help=True)
app.add_typer(labelers, name="labelers")

WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="The workspace.", show_default="here")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="The workspace to make; it must not exist yet.")],
    images: Annotated[
        Path,
        typer.Option(
            help="Class folders: IMAGES/CLASS/FILE, or all of it below train, val and test. With --index, where its "
            "files may lie."
        ),
    ],
    masks: Annotated[
        Path | None, typer.Option(help="MASKS/CLASS/NAME.png, or of another format; white on black.")
    ] = None,
    mask_pixels: Annotated[
        str | None,
        typer.Option(
            help="Masks of photographs with an EXIF orientation were drawn on their `upright` or `stored` pixels."
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="A CSV in place of folders; columns among id, image, cls or label, split (train, val, test or pool), "
            "group, mask. Paths start at its folder."
        ),
    ] = None,
    hide_masks: Annotated[
        bool,
        typer.Option(
            "--hide-masks", help="Let simulated labelers alone know the masks of val and test, too, as if you had none."
        ),
    ] = False,
    drop: Annotated[list[str] | None, typer.Option(help="Leave a class out; may be repeated.")] = None,
    skip_doubtful: Annotated[
        bool,
        typer.Option(
            "--skip-doubtful", help="Leave images out that stand in two splits or under two classes, or nearly do."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make nothing, show the report alone.")] = False,
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

    Splits that no CSV gives are stratified (train 0.7, val 0.15, test 0.15) and never cut a group; what a CSV gives
    no label goes to the pool; where it gives train and test alone, val is drawn from train. The same picture in two
    splits is refused. Masks of val and test become the gold set,
    which judges maps and trains nothing; masks of train and pool are known only to simulated labelers. Network, size
    and epochs are chosen by the images' size, and told: photographs get a pretrained network.

    Example: `abnloop init leaves --images leaf_photos --masks leaf_masks --drop mixed --set train.epochs=20`
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in training, before torch is imported: flows/versions.py
    from flows.defaults import time_training
    from flows.ingest import init_workspace
    from flows.ingest_report import Undecided
    from flows.progress import report as on_progress

    try:
        with _listening():
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
                hide_masks,
                skip_doubtful,
                mask_pixels,
                dry_run,
            )
    except Undecided as undecided:
        _show_ingest(undecided.report, directory)
        problems = undecided.report.problems
        if len(problems) > 1:
            for line in problems:
                console.print(f"[red]decide:[/] {escape(line)}", soft_wrap=True)
            raise ValueError(f"{len(problems)} things have to be decided first; each has a line above") from None
        raise
    _show_ingest(report, directory)
    for line in report.missing:
        console.print(f"[yellow]missing:[/] {escape(line)}")
    for line in report.why:
        console.print(f"[green]chosen:[/] {escape(line)}")
    chosen = [
        f"{name}={json.dumps(value, separators=(',', ':'))}".replace('"', "") for name, value in report.chosen.items()
    ]
    console.print(f"  {escape(' '.join(chosen))}", highlight=False)
    console.print("  `abnloop init --set SECTION.KEY=VALUE` sets another value, or later params.yaml, committed")
    if dry_run:
        console.print("nothing was made (--dry-run)")
        return
    console.print(f"[green]cost:[/] {time_training((workspace / directory).resolve())}")
    at = escape(str(workspace / directory))
    console.print(f"next: `abnloop up --workspace {at}`, then `abnloop round open --workspace {at}`", soft_wrap=True)


def _show_ingest(report: Report, directory: Path) -> None:
    """What `init` found in the images, masks and tables."""
    if report.images:
        labels = sorted({label for counts in report.images.values() for label in counts})
        table = Table("class", *report.images, title=f"Images in {directory}")
        for label in labels:
            table.add_row(escape(label) or "(none)", *(str(counts.get(label, 0)) for counts in report.images.values()))
        console.print(table)
    console.print(f"masks: {report.gold_masks} gold (val, test), {report.simulation_masks} for simulated labelers")
    for what, lines in {
        "left out, unreadable": [f"{one['image']}: {one['reason']}" for one in report.unreadable],
        "left out, the same picture": [f"{one['image']} is {one['same_as']}" for one in report.duplicates],
        "left out, doubtful": report.doubtful,
        "turned upright, saved as PNG": report.turned,
        "scaled to 16 bits, saved as PNG": report.rescaled,
    }.items():
        if lines:
            more = f"\n  and {len(lines) - 10} more: see data/ingest.json" if lines[10:] else ""
            console.print(f"{what}: {len(lines)}\n  " + "\n  ".join(map(escape, lines[:10])) + more)
    for line in report.read:
        console.print(f"[green]read:[/] {escape(line)}", soft_wrap=True)
    for line in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(line)}", soft_wrap=True)


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
    """Show the services: whether they answer, where, what had to be started again, and when the flows run next.

    Example: `abnloop status --workspace leaves`
    """
    from flows import services, supervisor
    from flows.doctor import upcoming
    from flows.workspace import open_workspace

    place = open_workspace(workspace)
    _print_states(services.status(place))
    server = services.serving_process(place)
    console.print(f"`abnloop serve` runs (pid {server.pid})" if server else "`abnloop serve` does not run")
    for one in supervisor.restarts(place).values():
        told = f"{one['title']} was started again {one['count']} times, last at {one['last']}; it {one['why']}"
        console.print(f"[yellow]{escape(told)}[/]", soft_wrap=True)
    for name, date in upcoming(place).items():
        console.print(f"next {name}: {f'{date.astimezone():%Y-%m-%d %H:%M}' if date else 'not scheduled'}")


@app.command()
def doctor(workspace: WorkspaceOption = Path()) -> None:
    """Say what is wrong and the remedy. Exit code 1 where something is broken, 0 where there is advice at most.

    Example: `abnloop doctor --workspace leaves`
    """
    from flows.doctor import doctor as examine
    from flows.workspace import open_workspace

    findings = examine(open_workspace(workspace))
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
    from flows.preflight import check_settings, check_workspace

    place = _connected(workspace)
    check_workspace(place)
    console.print(f"opening a round in {escape(str(place.root))}", soft_wrap=True)
    check_settings(place.params)
    from flows.rounds import open_round

    with _listening():
        state = open_round(str(place.root), return_state=True)
    result = state.result()
    _say(result)
    if getattr(result, "new", False):
        _print_links(place, str(state.state_details.flow_run_id))


@rounds.command("collect")
def round_collect(workspace: WorkspaceOption = Path()) -> None:
    """Take in what labelers answered; close the round when its batch is complete or its deadline has passed.

    Example: `abnloop round collect --workspace leaves`
    """
    place = _connected(workspace)
    from flows.rounds import collect_round

    with _listening():
        result = collect_round(str(place.root))
    _say(result)


@rounds.command("reconcile")
def round_reconcile(
    workspace: WorkspaceOption = Path(),
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended without losing anything.")] = False,
) -> None:
    """Compare Label Studio, DVC, git and MLflow. Exit code 1 where a difference is left.

    Example: `abnloop round reconcile --workspace leaves --fix`
    """
    place = _connected(workspace)
    from flows.reconcile import reconcile

    differences = reconcile(place, fix)
    table = Table("where", "what", "remedy", show_lines=True)
    for one in differences:
        left = f"{escape(one.remedy)}{' [dim](--fix does it)[/]' if one.mend else ''}"
        table.add_row(one.where, escape(one.what), "[green]mended[/]" if one.mended else left)
    console.print(table if differences else "[green]Label Studio, DVC, git and MLflow agree[/]")
    if any(not one.mended for one in differences):
        raise typer.Exit(1)


@rounds.command("status")
def round_status(
    workspace: WorkspaceOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, an object a round, for programs.")] = False,
) -> None:
    """Show every round: what its model learned from, how good it is beside the baseline, whether it was promoted, why.

    Example: `abnloop round status --workspace leaves`
    """
    from flows.summary import summarise, summary_table
    from flows.workspace import open_workspace

    place = open_workspace(workspace)
    if as_json:
        print(json.dumps(summarise(place), indent=2, ensure_ascii=False))
    else:
        console.print(summary_table(summarise(place), f"rounds of {escape(place.root.name)}"))


@labelers.command("invite")
def labelers_invite(
    emails: Annotated[list[str], typer.Argument(metavar="EMAIL...")],
    workspace: WorkspaceOption = Path(),
) -> None:
    """Make accounts in Label Studio and print each log-in, once: the passwords are kept nowhere.

    Example: `abnloop labelers invite ann@example.com bob@example.com --workspace leaves`
    """
    from flows.people import invite
    from flows.services import addresses
    from flows.workspace import open_workspace
    from labeling.client import LabelStudio

    known = addresses(open_workspace(workspace))
    passwords = invite(LabelStudio(known.label_studio, known.label_studio_token), emails)
    table = Table("email", "password", title=f"log in at {known.label_studio}")
    for email, password in passwords.items():
        table.add_row(escape(email), password)
    console.print(table)


@labelers.command("report")
def labelers_report(
    workspace: WorkspaceOption = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what each labeler did in the rounds collected so far: tasks, minutes, agreement with the others, how far
    they moved the maps that they fixed, verdicts.

    Example: `abnloop labelers report --workspace leaves`
    """
    from flows.people import labeler_report, labeler_table
    from flows.workspace import open_workspace

    report = labeler_report(open_workspace(workspace))
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        console.print(labeler_table(report))


@app.command()
def simulate(
    workspace: WorkspaceOption = Path(),
    labelers: Annotated[int, typer.Option(help="How many, each with an account of their own.")] = 1,
    faults: Annotated[
        str, typer.Option(help="none, careful, careless (they paint badly) or hasty (they answer lazily).")
    ] = "careful",
    seed: Annotated[int, typer.Option(help="Of their faults.")] = 0,
) -> None:
    """Let simulated labelers answer what is open, from the masks that `init` set aside for them.

    Example: `abnloop simulate --labelers 2 --faults careless --workspace leaves`
    """
    from labeling.simulator import FAULTS

    if faults not in FAULTS:
        raise ValueError(f"--faults is {faults!r}; choose {', '.join(FAULTS)}")
    place = _connected(workspace)
    from flows.rounds import simulate_labelers

    with _listening():
        verdicts = simulate_labelers(place, FAULTS[faults], seed, labelers)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())) or "nothing was open")


@app.command()
def predict(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A CSV with a column for each class.")] = False,
    maps: Annotated[Path | None, typer.Option(help="A folder for the attention maps, drawn over the pictures.")] = None,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Ask the champion about pictures. Exit code 1 where one could not be answered.

    With `capture.enabled` in params.yaml, pictures that it is not sure of are kept for labelers.

    Example: `abnloop predict new_photos --maps maps --workspace leaves`
    """
    from flows.answering import Refused, answer_all, as_row, files_below, load_champion, write_maps
    from flows.inbox import capture, open_inbox
    from flows.workspace import open_workspace

    if as_json and as_csv:
        raise ValueError("--json and --csv exclude each other; choose one")
    place = open_workspace(workspace)
    champion, files, inbox = load_champion(place), files_below(paths), open_inbox(place)
    draw = write_maps(maps, files) if maps else None
    failed = False

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for one in answer_all(champion, ((str(path), path.read_bytes()) for path in files)):
            row = as_row(one)
            if isinstance(one, Refused):
                failed = True
            else:
                capture(inbox, *one, champion.version)
                row["map"] = str(draw(*one)) if draw else ""
            yield row

    show = _print_json if as_json else _print_csv if as_csv else _print_answers
    show(rows(), champion.classes)
    if failed:
        raise typer.Exit(1)


@app.command()
def ingest(workspace: WorkspaceOption = Path()) -> None:
    """Bring the pictures that were kept for labelers into the pool, as samples without a label.

    They wait while a round is not closed.

    Example: `abnloop ingest --workspace leaves`
    """
    from flows.growing import in_words, ingest
    from flows.workspace import open_workspace

    done = ingest(open_workspace(workspace))
    console.print(in_words(done))
    for name, why in list(done.left_out.items())[:10]:
        console.print(f"  left out {name[:16]}: {escape(why)}")


@app.command()
def lineage(
    model: Annotated[
        str,
        typer.Argument(help="models:/NAME@champion or /3, a version, a run id, round/0003.", show_default="champion"),
    ] = "",
    labeler: Annotated[str, typer.Option(help="Which models learned from this person (e-mail)?")] = "",
    annotation: Annotated[str, typer.Option(help="... from this annotation (id)?")] = "",
    sample: Annotated[str, typer.Option(help="... from this sample (id)?")] = "",
    image: Annotated[Path | None, typer.Option(help="... from the picture in this file, by what it shows?")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write it as an HTML page with a graph.")] = None,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Tell what a model learned from: data, code, parameters, every annotation and who gave it, and the gate's verdict.

    And back: which models learned from a person, an annotation, a sample or a picture. Works with the services down.

    Example: `abnloop lineage models:/leaves@champion --report lineage.html --workspace leaves`
    """
    from flows import lineage as facts_of
    from flows import lineage_report as told
    from flows.workspace import open_workspace, write_atomically

    place = open_workspace(workspace)
    asked = {"labeler": labeler, "annotation": annotation, "sample": sample}
    asked |= {"sample": facts_of.sample_of(place, image)} if image else {}
    questions = {what: value for what, value in asked.items() if value}
    if len(questions) + bool(model) > 1 or (questions and report):
        raise ValueError(
            "ask one thing at a time: a model (with --report), --labeler, --annotation, --sample or --image"
        )
    if questions:
        models = facts_of.models_that_learned(place, questions)
        print(told.as_json(models), end="") if as_json else console.print(told.models_table(questions, models))
        return
    round_ = facts_of.find_round(place, model)
    facts = {**facts_of.trace(place, round_), "champion": round_ == facts_of.find_round(place)}
    if report:
        write_atomically(report, told.draw(facts))
    if as_json:
        print(told.as_json(facts), end="")
    else:
        console.print(*told.as_text(facts), sep="\n")


@app.command()
def report(
    output: Annotated[
        Path | None, typer.Option(help="The HTML file to write.", show_default="report.html in the workspace")
    ] = None,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Write the story of the rounds as one HTML page: what each model looks at, how good it is, what the gate said.

    Works with the services down. The page holds all its images, so that it can be sent as it is.

    Example: `abnloop report --workspace leaves --output leaves.html`
    """
    from flows.report import render_report
    from flows.workspace import open_workspace, write_atomically

    place = open_workspace(workspace)
    path = output or place.root / "report.html"
    write_atomically(path, render_report(place))
    console.print(f"report: {escape(str(path))}", soft_wrap=True)


@app.command()
def withdraw(
    why: Annotated[str, typer.Option(help="For those who ask later.")],
    labeler: Annotated[str, typer.Option(help="Everything that was collected of this person (e-mail).")] = "",
    round_number: Annotated[str, typer.Option("--round", help="Everything that this round collected.")] = "",
    annotation: Annotated[str, typer.Option(help="One annotation (id).")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Let them in again.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Open a round at once, which trains without them, unless a batch is out.")
    ] = False,
    workspace: WorkspaceOption = Path(),
) -> None:
    """Take annotations out of the training set from now on, and tell which models learned from them.

    Nothing is erased: data/withdrawals.csv says what, when and why. Their pictures can be asked about again.

    Example: `abnloop withdraw --labeler anna@example.com --why "took shadows for symptoms" --workspace leaves`
    """
    from flows.lineage_report import models_table
    from flows.withdrawals import withdraw as take_out
    from flows.workspace import open_workspace

    asked = {"labeler": labeler, "round": round_number, "annotation": annotation}
    questions = {what: value for what, value in asked.items() if value}
    if len(questions) != 1:
        raise ValueError("name what to withdraw: one of --labeler, --round and --annotation")
    place = _connected(workspace) if retrain else open_workspace(workspace)
    taken = take_out(place, questions, why, undo)
    console.print(f"{len(taken.annotations)} annotations {'count again' if undo else 'are withdrawn'}")
    console.print(models_table(questions, taken.models))
    if retrain:
        round_open(workspace)
    else:
        console.print("the next `abnloop round open` trains " + ("with" if undo else "without") + " them")


@app.command()
def serve(
    workspace: WorkspaceOption = Path(),
    systemd: Annotated[
        bool, typer.Option("--systemd", help="Print a unit that does so from boot on, and end.")
    ] = False,
) -> None:
    """Run the loop on its schedule: retraining on a cron, collecting every few minutes (params.yaml, flows).

    Services that are down are started, and started again whenever one ends. Ctrl-C or SIGTERM ends all that was
    started, a training as well; its round goes on with the next `abnloop serve`.

    Example: `abnloop serve --workspace leaves`
    """
    from flows import supervisor
    from flows.workspace import open_workspace

    place = open_workspace(workspace)
    if systemd:
        print(supervisor.systemd_unit(place), end="")
    else:
        supervisor.serve(place)


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(help="How often to train and ask.")] = 3,
    budget: Annotated[int, typer.Option(help="Pictures that labelers are asked about, a round.")] = 30,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the services up, to look around.")] = False,
    label_yourself: Annotated[
        bool, typer.Option("--label-yourself", help="Answer the first batch in your browser; then it goes on.")
    ] = False,
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Made anew each time.")] = Path("demo"),
) -> None:
    """Show the whole loop on handwritten digits in a few minutes, with simulated labelers or with you.

    Example: `abnloop demo --keep`
    """
    from flows.demo import run_demo
    from flows.summary import summary_table

    def invite(address: str, email: str, password: str) -> None:
        console.print(f"the first batch is yours: [bold]{escape(address)}[/], then Label All Tasks", soft_wrap=True)
        console.print(f"log in as [bold]{email}[/] with password [bold]{escape(password)}[/]", soft_wrap=True)

    with _listening():
        summary = run_demo(_repository(), workspace, rounds, budget, keep, invite if label_yourself else None)
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
    except (ValueError, OSError) as error:  # of OSError: nothing answers, not allowed, not there, the disk is full
        if os.environ.get("ABNLOOP_TRACEBACK") == "1":
            raise
        print(f"abnloop: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _say(result: Opened | Collected | Idle) -> None:
    """What a flow did, in its own words; that somebody else has the workspace is an error to who asked for a round."""
    if getattr(result, "in_use", False):
        raise ValueError(str(result))
    console.print(escape(str(result)), soft_wrap=True)  # a log keeps its reason in one line


def _print_links(place: Workspace, flow_run: str) -> None:
    """Where the round that was opened is to be seen in a browser: its batch, its MLflow run, its flow run."""
    from flows import services
    from flows.rounds import tracker_of

    round_, known = place.latest(), services.addresses(place)
    assert round_ is not None
    state = round_.read()
    run = tracker_of(place).client.get_run(state["mlflow_runs"]["round"]).info
    links = {
        "label here": f"{known.label_studio}/projects/{state['project']}/data",
        "MLflow run": f"{known.mlflow}/#/experiments/{run.experiment_id}/runs/{run.run_id}",
        "flow run": f"{known.prefect.removesuffix('/api')}/runs/flow-run/{flow_run}",
    }
    for title, address in links.items():
        console.print(f"  {title}: {escape(address)}", soft_wrap=True, highlight=False)


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
    from flows.progress import listening, shown_on

    with shown_on(console) as on_progress, listening(on_progress):
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
    for folder in {state.log.parent for state in states if state.log}:  # one, or none where all run elsewhere
        console.print(f"logs: {escape(str(folder))}", soft_wrap=True)


def _print_answers(rows: Iterable[dict[str, Any]], classes: list[str]) -> None:
    table = Table("picture", "class", "confidence", "disagreement")
    for row in rows:
        if row["error"]:
            table.add_row(escape(row["picture"]), f"[red]{escape(row['error'])}[/]")
        else:
            numbers = (f"{row[name]:.2f}" for name in ("confidence", "disagreement"))
            table.add_row(escape(row["picture"]), escape(row["predicted"]), *numbers)
    console.print(table)


def _print_json(rows: Iterable[dict[str, Any]], classes: list[str]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def _print_csv(rows: Iterable[dict[str, Any]], classes: list[str]) -> None:
    import csv

    columns = ["picture", "predicted", "confidence", "disagreement", *(f"p:{name}" for name in classes), "map", "error"]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        shares = {f"p:{name}": share for name, share in row.pop("probabilities").items()}
        writer.writerow({**row, **shares})


if __name__ == "__main__":
    main()
