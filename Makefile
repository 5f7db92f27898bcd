# Needs git, Python >= 3.11 and a package registry. Everything is installed inside this folder: uv (unless it is on
# PATH) into .tools, the project into .venv, and Label Studio, which cannot share an environment with Prefect, into
# .venv-label-studio. A second `make setup` does nothing until a lock or pyproject.toml changes.

PYTHON ?= python3
UV := $(or $(shell command -v uv),.tools/bin/uv)
STUDIO := .venv-label-studio

# The versions that a lock already names are kept: it changes only as far as what it is made of does.
compile = $(UV) pip compile --quiet --universal --generate-hashes --python-version 3.11 \
	--custom-compile-command "make lock" $(UPGRADE) $(1) --output-file $(2)
PROJECT := --group dev --extra cluster --extra pretrained pyproject.toml

.PHONY: help setup demo test check lock clean system
.DELETE_ON_ERROR:

help:
	@echo "make setup           install everything"
	@echo "make demo            the whole loop on handwritten digits; ARGS=... goes to abnloop demo"
	@echo "make test            all tests; ARGS=... goes to pytest"
	@echo "make check           style, types, and the locks in step with what they are made of"
	@echo "make lock            bring the locks in step; UPGRADE=--upgrade takes the newest versions"
	@echo "make clean           remove what is installed; demo/ and every workspace stay"

setup: .venv/installed $(STUDIO)/installed

demo: setup
	.venv/bin/abnloop demo $(ARGS)

# Two files at a time: a test runs on one thread, and many wait for services.
test: setup system
	OMP_WAIT_POLICY=PASSIVE .venv/bin/pytest -q -n 2 --dist loadfile --durations=25 $(ARGS)

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	cp requirements.lock .venv/
	cp requirements-label-studio.lock $(STUDIO)/
	$(call compile,$(PROJECT),.venv/requirements.lock)
	$(call compile,requirements-label-studio.in,$(STUDIO)/requirements-label-studio.lock)
	@$(call in_step,requirements.lock,.venv)
	@$(call in_step,requirements-label-studio.lock,$(STUDIO))

# What the tests need of the system, a PostgreSQL server's program and a browser. Only root may install it.
system:
	@$(call need,postgresql,ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null)
	@$(call need,chromium fonts-noto-cjk,command -v chromium >/dev/null)

need = { $(2); } || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	&& apt-get install -qq --no-install-recommends $(1) >/dev/null; } \
	|| { echo "the tests need $(1); install it, such as with: sudo apt-get install $(1)"; exit 1; }

# Comments and hashes may differ: uv words its comments, and a registry gains files of a version it already has.
in_step = diff -I '^ *\#' -I '^ *--hash=' $(1) $(2)/$(1) || { echo "$(1) is out of step; run make lock"; exit 1; }

lock: $(UV)
	$(call compile,$(PROJECT),requirements.lock)
	$(call compile,requirements-label-studio.in,requirements-label-studio.lock)

clean:
	rm -rf .tools .venv $(STUDIO) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find abn labeling flows tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Compiled here, once: where Python may not write its bytecode, each start would compile torch anew, for seconds.
.venv/installed: requirements.lock pyproject.toml | $(UV)
	test -x .venv/bin/python || $(UV) venv --quiet --python '>=3.11' .venv
	$(UV) pip sync --compile-bytecode --require-hashes --python .venv requirements.lock
	$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
	touch $@

$(STUDIO)/installed: requirements-label-studio.lock .venv/installed | $(UV)
	test -x $(STUDIO)/bin/python || $(UV) venv --quiet --python .venv/bin/python $(STUDIO)
	$(UV) pip sync --compile-bytecode --require-hashes --python $(STUDIO) requirements-label-studio.lock
	.venv/bin/python -m labeling.studio
	touch $@

# Some systems have a Python whose venv lacks pip; pip itself can then fill the folder.
.tools/bin/uv:
	$(PYTHON) -m venv .tools && .tools/bin/python -m pip install --quiet uv==0.13.9 \
		|| $(PYTHON) -m pip install --quiet --target .tools uv==0.13.9
