# Everything this project does starts here. Python 3.11+, pip and make are presumed, nothing else:
# uv lives inside .venv, so a system-managed pip or a missing ensurepip is no obstacle.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$p"; break; }; done)
UV_VERSION := 0.13.8
BIN := .venv/bin
UV := VIRTUAL_ENV= UV_PROJECT_ENVIRONMENT=.venv UV_PYTHON=$(CURDIR)/$(BIN)/python UV_PYTHON_DOWNLOADS=never \
  UV_COMPILE_BYTECODE=1 $(BIN)/uv
HOST ?= 127.0.0.1
PORT ?= 8080

.DEFAULT_GOAL := help
.PHONY: help serve test check format bench clean browser

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "headgate needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)"; exit 1; }
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/.run: $(BIN)/uv uv.lock pyproject.toml
	$(UV) sync --frozen --inexact --no-dev
	@touch $@

.venv/.dev: $(BIN)/uv uv.lock pyproject.toml
	$(UV) sync --frozen --inexact
	@touch $@ .venv/.run

serve: .venv/.run  ## start the gateway on the embedded model (PORT=8080 HOST=127.0.0.1)
	exec $(BIN)/headgate serve --demo --host $(HOST) --port $(PORT)

browser:  # Chromium for the page test, curl for the examples; skipped aloud where apt or root is missing
	@tools/install_apt.sh chromium chromium
	@tools/install_apt.sh curl curl

test: .venv/.dev browser  ## run every test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.dev  ## format, lint, types, import rules, lock file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(UV) lock --check --offline || $(UV) lock --check

format: .venv/.dev  ## rewrite the code in house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.dev  ## benchmark tables: against nginx, and the engine asked directly
	@tools/install_apt.sh nginx nginx
	@tools/install_apt.sh gcc gcc libc6-dev
	$(BIN)/python -m benchmarks.run $(ARGS)

clean:  ## remove what make made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist benchmarks/bin
