"""What the command line makes of bad input: one line with the value and the remedy, exit code 2, nothing changed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows.cli import console, main

PROJECT = Path(__file__).resolve().parent.parent
IN_A_WORKSPACE = [
    *("up", "down", "doctor", "round open", "round collect", "round reconcile", "round status", "simulate", "serve"),
    *("lineage", "withdraw --round 1 --why test", "labelers invite a@b.example", "labelers report"),
]


Run = Callable[..., tuple[int, str, str]]  # words of the command -> exit code, standard output, standard error
Refuse = Callable[..., str]


@pytest.fixture
def abnloop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in this process."""
    monkeypatch.setattr(console, "width", 200)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["abnloop", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        seen = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, seen.out, seen.err

    return run


@pytest.fixture
def refusal(abnloop: Run) -> Refuse:
    """What the command says on its one line; everything below `watch` must stay as it is."""

    def run(*words: str, watch: Path) -> str:
        before = files(watch)
        code, _, error = abnloop(*words)
        assert code == 2, error
        assert error.startswith("abnloop: ") and error.count("\n") == 1, error
        assert files(watch) == before
        return error.removeprefix("abnloop: ").rstrip("\n")

    return run


def files(folder: Path) -> dict[str, str]:
    """Folders and files with their content; locks hold nothing."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith("lock") and path.name != ".abnloop"]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in paths
    }


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A workspace whose services are down."""
    root = tmp_path / "w"
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    for name in ("params.yaml", ".gitignore"):
        shutil.copy(PROJECT / name, root)
    (root / "data").mkdir()
    (root / "data/manifest.csv").write_text("id,image,label,split,group\n")
    return root


def change(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("command", IN_A_WORKSPACE)
def test_a_folder_that_is_no_workspace_is_named(refusal: Refuse, tmp_path: Path, command: str) -> None:
    said = refusal(*command.split(), "--workspace", str(tmp_path), watch=tmp_path)
    assert said.startswith(f"{tmp_path} is not a workspace") and "make one with `abnloop init`" in said


@pytest.mark.parametrize(
    "command", ["round open", "round collect", "round reconcile", "labelers invite a@b.example", "simulate"]
)
def test_services_that_are_down_are_named_with_the_remedy(refusal: Refuse, workspace: Path, command: str) -> None:
    said = refusal(*command.split(), "--workspace", str(workspace), watch=workspace)
    assert said == "Label Studio is down; start it with `abnloop up`"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("mlflow_port:", "mlflow_prt:", "services.mlflow_prt is not a setting; did you mean mlflow_port?"),
        ("mlflow_port: 5000", "mlflow_port: many", "services.mlflow_port is 'many'; it must be of type int"),
        ("services:", "servces:", "has no section services; did you mean servces?"),
        ("labeling:  ", "labeling: [", "is not valid YAML"),
    ],
)
def test_params_that_cannot_be_read_start_no_service(
    refusal: Refuse, workspace: Path, old: str, new: str, reason: str
) -> None:
    change(workspace, old, new)
    assert reason in refusal("up", "--workspace", str(workspace), watch=workspace)


def test_a_workspace_without_params_is_refused(refusal: Refuse, workspace: Path) -> None:
    (workspace / "params.yaml").unlink()
    for command in ("up", "round open"):
        assert "params.yaml does not exist" in refusal(*command.split(), "--workspace", str(workspace), watch=workspace)


def test_a_damaged_round_is_named_with_the_remedy(refusal: Refuse, workspace: Path) -> None:
    state = workspace / "rounds/0001/round.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"round": 1,')
    said = refusal("round", "status", "--workspace", str(workspace), watch=workspace)
    assert f"{state} is not valid JSON" in said and "restore it with git" in said


def test_no_rounds_are_an_empty_table(abnloop: Run, workspace: Path) -> None:
    code, out, _ = abnloop("round", "status", "--workspace", str(workspace))
    assert code == 0 and "rounds of w" in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("lineage v1 --labeler anna", "ask one thing at a time"),
        ("lineage --sample a --report a.html", "ask one thing at a time"),
        ("lineage", "has no model yet; `abnloop round open` trains the first"),
        ("withdraw --why test", "name what to withdraw: one of --labeler, --round and --annotation"),
        ("withdraw --why test --round 1 --labeler anna", "name what to withdraw"),
    ],
)
def test_a_question_that_has_no_answer_is_refused(refusal: Refuse, workspace: Path, words: str, reason: str) -> None:
    assert reason in refusal(*words.split(), "--workspace", str(workspace), watch=workspace)


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:4], "big")
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        for number in range(8):
            picture(tmp_path / "images" / label / f"{number}.png")
    return tmp_path


def empty_class(folder: Path) -> None:
    (folder / "images/bird").mkdir()


def mask_of_another_size(folder: Path) -> None:
    picture(folder / "masks/cat/0.png", (8, 9))


@pytest.mark.parametrize(
    ("spoil", "options", "reason"),
    [
        (empty_class, [], "class bird has no images"),
        (mask_of_another_size, ["--masks", "masks"], "mask"),
        (None, ["--set", "train.epoch=3"], "train.epoch is not a setting; did you mean train.epochs?"),
        (None, ["--set", "train.epochs=[3"], "--set train.epochs=[3: [3 is not YAML"),
        (None, ["--drop", "dgo"], "--drop dgo is not a class; did you mean dog?"),
        (None, ["--index", "absent.csv"], "absent.csv"),
        (None, ["--masks", "absent"], "absent is not a folder"),
    ],
)
def test_init_refuses_and_leaves_nothing_behind(
    refusal: Refuse, pictures: Path, spoil: Callable[[Path], None] | None, options: list[str], reason: str
) -> None:
    if spoil:
        spoil(pictures)
    paths: Mapping[str, str] = {name: str(pictures / name) for name in ("masks", "absent", "absent.csv")}
    given = [paths.get(word, word) for word in options]
    said = refusal("init", str(pictures / "w"), "--images", str(pictures / "images"), *given, watch=pictures)
    assert reason in said


def test_simulated_labelers_have_no_other_faults_than_those_named(refusal: Refuse, workspace: Path) -> None:
    said = refusal("simulate", "--faults", "drunk", "--workspace", str(workspace), watch=workspace)
    assert said == "--faults is 'drunk'; choose none, careful, careless, hasty"


def test_the_demo_refuses_a_folder_that_is_not_its_own(refusal: Refuse, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    said = refusal("demo", "--workspace", str(tmp_path), watch=tmp_path)
    assert said == f"{tmp_path} exists and is no workspace; name another with --workspace"


def test_the_demo_refuses_no_rounds(refusal: Refuse, tmp_path: Path) -> None:
    assert refusal("demo", "--rounds", "0", "--workspace", str(tmp_path / "demo"), watch=tmp_path) == (
        "--rounds is 0; it must be at least 1"
    )


@pytest.mark.parametrize("words", [["rond"], ["round", "opne"], ["up", "--workspce", "here"], ["init"]])
def test_a_mistyped_command_is_refused_with_its_usage(abnloop: Run, words: list[str]) -> None:
    code, _, error = abnloop(*words)
    assert code == 2 and "Usage:" in error


@pytest.mark.parametrize(
    "command",
    [
        *("round open", "round collect", "round reconcile", "round status", "labelers invite", "labelers report"),
        *("simulate", "serve", "demo", "lineage", "withdraw"),
    ],
)
def test_help_teaches_with_an_example(abnloop: Run, command: str) -> None:
    code, out, _ = abnloop(*command.split(), "--help")
    assert code == 0 and f"Example: abnloop {command}" in out
