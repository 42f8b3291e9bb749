PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
ASSETS := .assets
WORKERS ?= 2
MUTANTS ?=
MODEL ?= $(ASSETS)/smollm2
BENCHMARKS ?= cost_model entanglement entanglement_callback filter generation object_store trust
KEPT_BENCHMARKS ?= training job

.PHONY: setup assets vllm docs demo test test-slow test-gpu test-lowest mutation lint audit bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[report,gguf,filter,view,dev]'
	touch $(STAMP)

assets: $(STAMP)
	$(BIN)/python -m scripts.assets.fetch --output $(ASSETS)

demo: assets
	$(BIN)/python -m scripts.assets.demo_data --assets $(ASSETS) --output $(ASSETS)/demo
	$(BIN)/align run configs/demo.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive align reward_models scripts
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(STAMP)
	$(BIN)/python -m scripts.docs.reference
	$(BIN)/python -m align.losses.page > docs/losses.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

audit:
	test -x .venv-audit/bin/pip-audit || ($(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit)
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

test: assets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist worksteal

test-slow: assets vllm
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray,benchmarks]'
	$(BIN)/python -m pytest
	.venv-vllm/bin/python -m pytest tests/slow/test_vllm.py

test-gpu: assets
	$(BIN)/python -m scripts.gpu_check.run --model $(MODEL)

test-lowest: .venv-lowest/.ready assets
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m 'not slow' --numprocesses $(WORKERS) --dist worksteal

.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[report,gguf,filter,view,dev]'
	touch $@

mutation: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	CI=1 OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(WORKERS) $(MUTANTS)
	$(BIN)/mutmut results

vllm:
	PYTHON=$(PYTHON) scripts/assets/setup_vllm.sh .venv-vllm

bench: assets
	@set -e; for name in $(KEPT_BENCHMARKS); do $(BIN)/python -m scripts.bench.$$name --keep studies/bench; done
	@set -e; for name in $(BENCHMARKS); do $(BIN)/python -m scripts.bench.$$name; done

clean:
	rm -rf runs build mutants *.egg-info
