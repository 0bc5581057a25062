# Everything starts here. Nothing has to be set up first: each target makes the environment when there is none.
#   make demo   make test   make bench   make clean

SHELL := /bin/bash
PY    := .venv/bin/python
SCENARIO ?= hello

# Big and slow-to-make things live outside the checkout: the environment, and vLLM's notes about model classes, which cost it
# 10 seconds each to find out.
VTRACE_CACHE   ?= $(HOME)/.cache/vllm-trace
VLLM_CACHE_ROOT ?= $(VTRACE_CACHE)/vllm
export VTRACE_CACHE

# Set for what is to run the package as it is installed, compiled, and not the checkout.
COMPILED := PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/.venv/compiled:$(CURDIR)"

.PHONY: help env compiled demo test browser lint bench pictures lane-0.11 clean

help:  ## this list
	@sed -nE 's/^([a-z0-9.-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST)

env:  ## the environment alone (.ci/lane says what it is)
	@.ci/lane

compiled: env  ## the package as it is installed: its hot rooms compiled, in .venv/compiled
	@.ci/compiled

demo: env  ## run a scenario on a real vLLM engine and look at it (SCENARIO=hello)
	@$(PY) -m vllm_trace run $(SCENARIO)

# duckdb and triton tell at exit what tests' tracebacks still held; it is nobody's business.
LEAKS := ^nanobind: |^ - (leaked|\.\.\. skipped)|^See https://nanobind

# What is compiled, as plain Python too: these, and what is marked as being for the checkout alone.
PLAIN := tests/mini tests/replay tests/invariants $(wildcard tests/export/test_*span*.py tests/export/test_wire.py) \
	tests/export/test_open_steps.py tests/learn/test_passages.py tests/pictures
TRACEBACKS := 2> >(grep -vE "$(LEAKS)" >&2)

# All tests with the package as it is installed, compiled, and before them those that concern what is compiled with the checkout's
# sources. pytest last: its closing line is the verdict. T= narrows it, with the checkout: make test T="tests/mini -k free"
test: export VLLM_CACHE_ROOT := $(VLLM_CACHE_ROOT)
test: lint browser $(if $(T),,compiled)  ## style and types, then all tests
ifdef T
	@.venv/bin/pytest $(T) $(TRACEBACKS)
else
	@.venv/bin/pytest -q -m "not slow" $(PLAIN) $(TRACEBACKS)
	@$(COMPILED) .venv/bin/pytest $(TRACEBACKS)
endif

browser:  # a Chromium for the tests of the report, where one can be had
	@.ci/browser

lint: env  ## style: ruff's rules and layout, types, and that every package is in the wheel
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check --diff .
	@.venv/bin/mypy --no-error-summary
	@$(PY) .ci/check_packages.py

# With VTRACE_PLAIN=1 of the sources.
bench: compiled  ## what tracing costs: on/off pairs, other tracers beside it
	@$(COMPILED) $(PY) -m bench

pictures: env browser  ## make the README's pictures anew
	@$(PY) docs/pictures.py

lane-0.11:  ## the release that the learning plan describes, with its real forward_decode and both ops (7 GB, once)
	@.ci/lane-0.11
	@.venv-0.11/bin/python -m pytest --rootdir . -p no:cacheprovider tests/seed $(T)

clean:  ## remove what make made here (the shared environment stays in VTRACE_CACHE)
	rm -rf .venv .venv-0.11 build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
