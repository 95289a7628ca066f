# The front door. `make` alone says what there is.
SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
IMAGES ?= gateway
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export TF_CPP_MIN_LOG_LEVEL ?= 2
# oneDNN's operations corrupt TensorFlow 2.21's heap now and then (docs/design.md, "oneDNN is off").
export TF_ENABLE_ONEDNN_OPTS ?= 0

.DEFAULT_GOAL := help
.PHONY: help env demo test images lint format protos bench test-backends test-chaos test-mutants constraints clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ntm-serving needs Python 3.11 or later; name one with make PYTHON=..., this is $$($(PYTHON) --version)"; exit 1; }
	@echo "making the environment in $(VENV) (about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

env: $(READY) ## the virtual environment that everything below uses

demo: $(READY) ## the main job: train, export, serve, step, show (SEED=0)
	@$(BIN)/python examples/demo.py --seed $(SEED)

test: $(READY) ## the tests, the files of them in parallel (four at most: each process holds a TensorFlow)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-backends: ## the layer on TensorFlow, JAX and PyTorch, in an environment of its own
	PYTHON=$(PYTHON) scripts/test_backends.sh

images: $(READY) ## execute the Dockerfile without a container engine, run what comes out (IMAGES="gateway trainer ...")
	PATH=$(CURDIR)/$(BIN):$$PATH scripts/build_images.sh $(IMAGES)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python tests/deploy/check_image.py $(IMAGES)

test-chaos: $(READY) ## real processes under a schedule of faults, a minute of it (CHAOS="--minutes 10 --sessions 200")
	$(BIN)/python tests/chaos/run.py $(CHAOS)

test-mutants: $(READY) ## break each rule of exactly-once on purpose: a test has to notice
	$(BIN)/python tests/mutants/run.py

bench: $(READY) ## what the gateway costs, beside what it is made of (some ten minutes, on a quiet machine)
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/report.py

lint: $(READY) ## ruff, mypy, import-linter, and the generated code against its protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	PYTHON=$(BIN)/python scripts/check_protos.sh

format: $(READY) ## sort imports and lay the code out
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(READY) ## regenerate the code beside the protos
	PYTHON=$(BIN)/python scripts/generate_protos.sh

constraints: ## renew constraints.txt from the newest versions that fit
	rm -rf $(VENV)-fresh && $(PYTHON) -m venv $(VENV)-fresh
	$(VENV)-fresh/bin/pip install --quiet --editable '.[dev]'
	scripts/renew_constraints.sh $(VENV)-fresh > constraints.new
	mv constraints.new constraints.txt && rm -rf $(VENV)-fresh

clean: ## what the commands above left here (not the models and runs)
	rm -rf $(VENV) $(VENV)-backends .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
