"""What checks the shapes and types in abn's signatures while tests run (pyproject.toml, --jaxtyping-packages)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it
