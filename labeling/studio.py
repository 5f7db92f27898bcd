"""The embedded Label Studio: how to start one, in an environment of its own and on this machine only.

Label Studio cannot share an environment with Prefect, so it is a command line in an environment beside
the project's. Its first start takes half a minute, because it builds its database by some hundred
migrations; `prepare_template` does that once an installation, and every new data directory gets a copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

DATABASE = "label_studio.sqlite3"
DEFAULT_COMMAND = Path(".venv-label-studio/bin/label-studio")

# No telemetry, no look at the package index for a newer version, and no log line to the vendor.
QUIET = {
    "LABEL_STUDIO_LATEST_VERSION_CHECK": "false",
    "LABEL_STUDIO_COLLECT_ANALYTICS": "false",
    "LABEL_STUDIO_SENTRY_DSN": "",
    "LABEL_STUDIO_FRONTEND_SENTRY_DSN": "",
    "LABEL_STUDIO_DEBUG": "false",
    "LABEL_STUDIO_DJANGO_DB": "sqlite",
}


@dataclass(frozen=True)
class StudioCommand:
    """What starts one Label Studio: run it in its own session, so that the whole group can be ended."""

    argv: tuple[str, ...]
    env: dict[str, str]
    url: str


def studio_command(
    command: Path, data_dir: Path, port: int, email: str, password: str, token: str, document_root: Path
) -> StudioCommand:
    """The command line and environment of a Label Studio that listens on 127.0.0.1:`port`.

    `command` is the `label-studio` executable, `data_dir` holds its database, `token` (40 hexadecimal
    digits) becomes the administrator's legacy token on the first start, and files under
    `document_root` can be served to labelers. Passwords travel in the environment, not in the argument list,
    which every user of the machine can read.
    """
    url = f"http://localhost:{port}"
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data_dir),
        "LABEL_STUDIO_DATABASE_NAME": str(data_dir / DATABASE),
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_USERNAME": email,
        "LABEL_STUDIO_PASSWORD": password,
        "LABEL_STUDIO_USER_TOKEN": token,
        # Read when the organisation is made, which is the first start.
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(document_root),
        # The project's own service answers strokes and webhooks on this machine's loopback.
        "LABEL_STUDIO_ML_BLOCK_LOCAL_IP": "false",
        "LABEL_STUDIO_SSRF_PROTECTION_ENABLED": "false",
        "NO_PROXY": "localhost,127.0.0.1",
        "no_proxy": "localhost,127.0.0.1",
    }
    argv = (str(command), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port))
    return StudioCommand(argv, {**_clean_environment(), **settings}, url)


def installed_version(command: Path) -> str:
    """The version of the Label Studio whose executable is `command`, such as 1.23.2."""
    ask = "import importlib.metadata; print(importlib.metadata.version('label-studio'))"
    python = command.resolve().parent / "python"
    if not command.exists() or not python.exists():
        raise FileNotFoundError(f"{command} is not an installed Label Studio; run `make setup`")
    run = subprocess.run([python, "-c", ask], check=False, capture_output=True, text=True, env=_clean_environment())
    if run.returncode != 0:
        raise FileNotFoundError(f"{command} lies in an environment without Label Studio; run `make setup`")
    return run.stdout.strip()


def template_path(command: Path) -> Path:
    """Where the migrated empty database of this Label Studio is kept: in its environment, by its version."""
    return command.resolve().parent.parent / f"empty-{installed_version(command)}.sqlite3"


def prepare_template(command: Path, template: Path) -> None:
    """Make the migrated empty database `template`, unless it is there. Takes about half a minute."""
    if template.exists():
        return
    with tempfile.TemporaryDirectory(dir=template.parent) as folder:
        # `version` migrates before it prints, and makes neither user nor organisation.
        env = {**_clean_environment(), "LABEL_STUDIO_BASE_DATA_DIR": folder}
        run = subprocess.run([command, "version"], check=False, capture_output=True, text=True, env=env)
        database = Path(folder) / DATABASE
        if run.returncode != 0 or not database.exists():
            lines = (run.stderr or run.stdout).strip().splitlines()
            raise ValueError(f"{command} could not make a database: {lines[-1] if lines else 'it said nothing'}")
        os.replace(database, template)


def prepare_data_dir(command: Path, data_dir: Path) -> None:
    """Make `data_dir` ready for a fast first start; an existing database is left as it is."""
    if (data_dir / DATABASE).exists():
        return
    template = template_path(command)
    prepare_template(command, template)
    data_dir.mkdir(parents=True, exist_ok=True)
    # Copied under another name first: a copy cut short must not pass for a database.
    part = data_dir / f"{DATABASE}.part"
    shutil.copyfile(template, part)
    os.replace(part, data_dir / DATABASE)


def access_token(url: str, email: str, password: str) -> str:
    """A personal access token for whoever logs in with `email` and `password`.

    Raises PermissionError where the log-in is refused and ConnectionError where nothing answers.
    """
    login = f"{url}/user/login/"
    try:
        with httpx.Client(base_url=url, follow_redirects=False, timeout=30) as http:
            http.get("/user/login/")
            form = {"email": email, "password": password, "csrfmiddlewaretoken": http.cookies["csrftoken"]}
            answer = http.post("/user/login/", data=form, headers={"Referer": login})
            if answer.status_code != 302:
                raise PermissionError(f"Label Studio at {url} refused the log-in of {email}; check the password")
            headers = {"Referer": login, "X-CSRFToken": http.cookies["csrftoken"]}
            return str(http.post("/api/token/", headers=headers).raise_for_status().json()["token"])
    except httpx.TransportError as error:
        raise ConnectionError(f"Label Studio at {url} does not answer; start it with `abnloop up`") from error


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m labeling.studio`: prepare the template database, as `make setup` does."""
    parser = argparse.ArgumentParser(description="Prepare the empty database of the embedded Label Studio.")
    parser.add_argument("--command", type=Path, default=DEFAULT_COMMAND, help="the label-studio executable")
    command = parser.parse_args(argv).command
    template = template_path(command)
    prepare_template(command, template)
    print(f"{template} is ready")


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would lead Label Studio to other code or settings."""
    strange = ("LABEL_STUDIO_", "HEARTEX_", "DJANGO_", "PYTHON", "VIRTUAL_ENV")
    return {**{name: value for name, value in os.environ.items() if not name.startswith(strange)}, **QUIET}


if __name__ == "__main__":
    main()
