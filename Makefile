# Everything runs from .venv, which any target makes when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled modules are kept: without them, each process that the tests start compiles all of them. Images of containers
# often set it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo example example-django test test-quick coverage test-lowest test-wheel check docs bench bench-peers bench-growth bench-migration hammer picture lock clean

help:
	@echo "make demo    migrate a busy database, sell, spend, refund and audit credits (under a minute)"
	@echo "make example an app that sells credits, with a double of Stripe, at http://127.0.0.1:8000"
	@echo "make example-django   the same as a Django app"
	@echo "make test    the whole test suite on the embedded PostgreSQL, then what depends on the server on the machine's own"
	@echo "make test-quick   the parts of it that need no browser, no npm and no killed server"
	@echo "make coverage   the same, with the lines that they run; fewer than the floor is a failure"
	@echo "make test-lowest   the ledger, the migration and the commands with the oldest versions that are declared"
	@echo "make test-wheel   the same with the built wheel in place of the sources"
	@echo "make docs    the documentation as a site, in .site/html, its links checked"
	@echo "make check   ruff, mypy --strict and the import contracts"
	@echo "make bench   what a consumption takes: CPU of both sides, and times against pgbench (minutes; QUICK=1 shorter)"
	@echo "make bench-peers   consumptions beside other credit ledgers, each installed by pip (7 minutes; QUICK=1 shorter)"
	@echo "make bench-growth   operations and audit on 10,000,000 ledger rows against 10,000 (5 minutes; ROWS=100000 shorter)"
	@echo "make bench-migration   what live traffic feels of a migration, ours beside others' (9 minutes; QUICK=1 shorter)"
	@echo "make hammer  clients and their server killed for a minute, then every answer checked (SECONDS=60 PROCESSES=8)"
	@echo "make lock    pin the development dependencies anew"
	@echo "make clean   remove .venv and the embedded database"

install: $(VENV)/ready

$(VENV)/ready: requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tallystick needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what the tests and tools use into $(VENV): about a minute, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The demo and the example use a third of that; where the whole is there already, they take it.
RUN := $(if $(wildcard $(VENV)/ready),$(VENV),$(VENV)/demo)

$(VENV)/demo/ready: requirements/demo.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tallystick needs Python 3.11 or later: make PYTHON=/path/to/python3.11")'
	@echo "Installing what the demo and the example use into $(VENV)/demo: half a minute, once"
	@$(PYTHON) -m venv $(VENV)/demo
	@$(VENV)/demo/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.txt
	@$(VENV)/demo/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

example: $(RUN)/ready
	@cd examples && ../$(RUN)/bin/python -m workshops

example-django: $(VENV)/ready
	@cd examples && ../$(VENV)/bin/python -m django_workshops

demo: $(RUN)/ready
	@$(RUN)/bin/tallystick demo

# The machine's own PostgreSQL beside the embedded one, where there is one: the suite runs on both.
OWN_PG := $(word 4,$(subst /, ,$(lastword $(sort $(wildcard /usr/lib/postgresql/*/bin/postgres)))))

# One server, no kills, no browser, no package of npm: what a change is tried with while it is made.
QUICK_TESTS := tests/test_*.py tests/stripe_sales tests/migrations/test_there_and_back.py tests/migrations/test_run.py tests/migrations/test_status.py

test-quick: install
	$(BIN)/python -m pytest -n auto $(QUICK_TESTS) --ignore tests/test_benchmarks.py

# Of the quick tests alone: the others add kills, browsers and hosts to lines that these run already.
coverage: install
	$(BIN)/python -m pytest -n auto $(QUICK_TESTS) --ignore tests/test_benchmarks.py --cov --cov-report term:skip-covered --cov-fail-under 80

# A test that fails beside the others runs once more, alone: a busy machine must not hide a fault, nor pass for one.
define PYTEST
	$(1) $(BIN)/python -m pytest -n auto --dist worksteal $(2) || { test $$? = 1 && echo "These failed beside the others; each runs again, alone:" && \
	  $(1) $(BIN)/python -m pytest --last-failed --last-failed-no-failures none $(2); }
endef

test: install
	@rm -f .pytest_cache/v/cache/lastfailed
	$(call PYTEST,,)
ifneq ($(OWN_PG),)
	$(call PYTEST,TALLYSTICK_TEST_PG=$(OWN_PG),-m 'not one_server')
endif

# Small enough to run beside everything else, and through every room that an old dependency could break.
SMOKE := tests/test_ledger.py tests/test_accounts.py tests/test_cli.py tests/test_config.py tests/migrations/test_there_and_back.py

test-lowest: $(VENV)/lowest/ready
	$(VENV)/lowest/bin/python -m pytest -n auto $(SMOKE)

$(VENV)/lowest/ready: requirements/lowest.txt
	@$(PYTHON) -m venv --clear $(VENV)/lowest
	@$(VENV)/lowest/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lowest.txt
	@$(VENV)/lowest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The packages of .venv, whose own .pth files Python does not read there: the sources are out of reach.
test-wheel: install
	@rm -rf dist
	@$(BIN)/python -m hatchling build >/dev/null
	@$(PYTHON) -m venv --clear $(VENV)/wheel
	@$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  "$$($(VENV)/wheel/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	@$(VENV)/wheel/bin/python -c 'import tallystick; assert "site-packages" in tallystick.__file__, tallystick.__file__'
	$(VENV)/wheel/bin/python -m pytest -n auto $(SMOKE)

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/docs.txt
	$(BIN)/python tools/site.py
	$(BIN)/zensical build --strict

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/cpu.py $(if $(QUICK),--quick)
	$(BIN)/python benchmarks/ledger.py $(if $(QUICK),--quick)

bench-peers: install
	$(BIN)/python benchmarks/peers/run.py $(if $(QUICK),--quick,--picture benchmarks/peers.svg)

bench-growth: install
	$(BIN)/python benchmarks/growth.py $(if $(ROWS),--rows $(ROWS))

bench-migration: install
	$(BIN)/python benchmarks/migration.py $(if $(QUICK),--quick)

picture: install
	$(BIN)/python tools/demo_picture.py

hammer: install
	$(BIN)/python tests/proof/hammer.py --seconds $(or $(SECONDS),60) --processes $(or $(PROCESSES),8)

lock: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) --all-extras --group dev --upgrade -o requirements/dev.txt pyproject.toml
	$(LOCK) --group docs --constraint requirements/dev.txt -o requirements/docs.txt
	$(LOCK) --all-extras --group build --constraint requirements/dev.txt -o requirements/demo.txt pyproject.toml
	$(LOCK) --all-extras --group lowest --resolution lowest-direct -o requirements/lowest.txt pyproject.toml

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header

clean:
	rm -rf $(VENV) .tallystick
