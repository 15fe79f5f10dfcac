# Every target makes .venv with the tested versions (constraints.txt) if it is missing.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal
CXX_FILES := $(wildcard csrc/* tests/cuda_on_host/* tests/cpu_kernels/*)

.PHONY: help
help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv/installed  ## Train a small network, prune it by seven methods, print the table, draw the curves
	$(BIN)/fishleg-ext demo

.PHONY: test
test: .venv/installed  ## Run the tests but the slow ones (under 4 minutes on 2 cores), Triton kernels interpreted where there is no GPU
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "triton and not slow"

.PHONY: test-all
test-all: .venv/installed  ## Run all tests: kernels compiled for every target, each barrier deleted in turn, memory, kills
	$(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m triton

.PHONY: gpu
gpu:  ## On a machine with a GPU: build, check, test, sanitize, bench (PYTHON=the one whose torch sees it; 9 minutes at most)
	PYTHON=$(PYTHON) bench/gpu.sh

.PHONY: bench
bench: .venv/installed  ## Time the ops on this machine, beside the usual PyTorch code
	$(BIN)/fishleg-ext bench

.PHONY: docs
docs: .venv/installed  ## Build the site of the docs into build/site
	$(BIN)/mkdocs build --strict --quiet

.PHONY: lint
lint: .venv/installed  ## Check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

.PHONY: format
format: .venv/installed  ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: clean
clean:  ## Remove .venv and everything built
	rm -rf .venv build *.egg-info fishleg_ext/*.so fishleg_ext/build_record.json demo-results gpu-results

.venv/installed: export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
.venv/installed: export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
.venv/installed: export FISHLEG_EXT_WERROR := 1
.venv/installed: export FISHLEG_EXT_CPU := 1
.venv/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch  # first: the CUDA part is built against it
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps timm  # whose torchvision does not fit every build of torch
	touch $@
