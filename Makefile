# Everything runs from .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench lock clean

help:
	@echo "make demo    migrate a busy database, sell, spend, refund and audit credits (under a minute)"
	@echo "make test    the whole test suite on the embedded PostgreSQL (and on 15, where it is installed)"
	@echo "make check   ruff, mypy --strict and the import contracts"
	@echo "make bench   consumptions against pgbench, and growth with history (minutes; QUICK=1 for a short form)"
	@echo "make lock    pin the development dependencies anew"
	@echo "make clean   remove .venv and the embedded database"

install: $(VENV)/ready

$(VENV)/ready: requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tallystick needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	@$(BIN)/tallystick demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/ledger.py $(if $(QUICK),--quick)

lock: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --group dev \
	  --no-header --upgrade -o requirements/dev.txt pyproject.toml

clean:
	rm -rf $(VENV) .tallystick
