# `make demo` and `make test` work on a fresh machine with python3 and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs

.PHONY: demo test gpu-test gpu-bench lint embedded bench-seam bench-cells bench-core bench-memory clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

# the main job on the networks in the package: matrix, grid, overlap, report
demo: $(VENV)/installed
	MITASWAP=$(BIN)/mitaswap OUT=$(RUNS)/demo REPORT=$(RUNS)/demo/report sh examples/demo.sh

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto

# on a machine with a CUDA device
gpu-test: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

# there too: kernels and whole networks against PyTorch's attention, into runs/gpu (half an hour)
gpu-bench: $(VENV)/installed
	MITASWAP=$(BIN)/mitaswap OUT=$(RUNS)/gpu sh benchmarks/gpu.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# trains the four networks of the package again (minutes on a GPU, hours on a CPU)
embedded: $(VENV)/installed
	MITASWAP=$(BIN)/mitaswap OUT=$(RUNS)/embedded sh tools/train_embedded.sh

bench-seam: $(VENV)/installed
	$(BIN)/python benchmarks/seam.py

bench-cells: $(VENV)/installed
	$(BIN)/python benchmarks/cells.py

bench-core: $(VENV)/installed
	$(BIN)/python benchmarks/core.py

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build *.egg-info
