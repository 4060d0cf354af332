# make train     make .venv, install, and train:  make train STRATEGY=pp NPROC=2 ARGS="train.steps=20"
# make test      everything not marked slow;      make test-all adds the slow ones;  make check: ruff, mypy, imports
PYTHON ?= python3
STRATEGY ?= tp
NPROC ?= 4
# the ranks of tp share every sequence: two microbatches of four sequences need a quarter of the exchanges of eight of one
ARGS ?= $(if $(filter tp,$(STRATEGY)),train.micro_batch_size=4)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-all check install

train: .venv/installed
	@$(BIN)/python -m launch.local nproc=$(NPROC) strategy=$(STRATEGY) $(ARGS)

# two files at a time, as worlds leave a core free; what measures time (make test-all) runs first, alone
test: .venv/installed
	$(BIN)/python -m pytest --clock --numprocesses=2 --dist=loadfile -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest -m "slow and alone"
	$(BIN)/python -m pytest --clock --numprocesses=2 --dist=loadfile -m "not (slow and alone)"

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	@touch $@
