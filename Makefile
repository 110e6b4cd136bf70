# `make` lists the targets. Each sets up .venv by itself; all it needs is Python 3.11 or newer.

PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test check nightly soak format build lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(READY) ## merge four detector-like processes and unmerge them again, in under a minute
	$(BIN)/python bench/demo.py

test: $(READY) ## run all tests; GPUKSM_REQUIRE=uffd,root,... turns skips into failures
	$(BIN)/python -m pytest -n auto --maxschedchunk 2

check: $(READY) ## ruff, mypy --strict and the architecture test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

nightly: $(READY) ## mechanisms taken out, every fault at every point, kills, a long model: about two hours
	$(BIN)/python -m tests.campaign.removals
	$(BIN)/python -m tests.campaign.faults --runs 3
	$(BIN)/python -m tests.campaign.kills guard --kills 1000
	$(BIN)/python -m tests.campaign.kills keeper --kills 300
	$(BIN)/python -m tests.campaign.kills both --kills 300
	$(BIN)/python -m tests.campaign.kills scanner --kills 1000
	$(BIN)/python -m tests.model --steps 200000 --workers 2

soak: $(READY) ## model, kills, faults and real programs in turn, for HOURS=8
	$(BIN)/python -m tests.campaign.soak --hours $(or $(HOURS),8)

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: $(READY) ## build the wheel and the source archive into dist/
	$(BIN)/python -m hatchling build

lock: $(READY) ## pin all dependencies anew, with hashes, in requirements.lock
	$(BIN)/python -m piptools compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --no-annotate \
		--extra dev --output-file requirements.lock pyproject.toml

clean: ## remove .venv and everything that was built
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/victims/bin
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
