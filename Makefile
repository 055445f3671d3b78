# manyview. `make` prints the targets; every one of them sets up what it needs first.
PY := .venv/bin/python
DATASET ?= fashion-mnist
OUT ?= shards/$(DATASET)
# make variable -> flag of tools/shards.py, passed on only where it is set
SHARD_FLAGS = $(if $(SOURCE),--source "$(SOURCE)") $(if $(FORMAT),--format $(FORMAT)) $(if $(SIZE),--size $(SIZE)) \
              $(if $(LABELS),--labels "$(LABELS)") $(if $(HOLDOUT),--holdout $(HOLDOUT)) $(if $(ENCODING),--encoding $(ENCODING)) $(if $(JOBS),--jobs $(JOBS)) \
              $(if $(filter-out 0,$(DOWNLOAD)),--download) $(if $(EXECUTOR),--executor $(EXECUTOR))

.DEFAULT_GOAL := help
.PHONY: help setup demo shards test test-fast test-quiet paper-smoke check format bench clean

help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv and install what is missing (nothing to do: under 3 s)
	@bash tools/setup.sh

demo: setup ## shards -> training -> evaluation -> report on Fashion-MNIST, 5 minutes on 2 cores [SOURCE=dir]
	@bash tools/demo.sh "$(SOURCE)"

shards: setup ## convert images: DATASET= [SOURCE= LABELS=table HOLDOUT=25% FORMAT=webdataset|ffcv SIZE= ENCODING= JOBS= OUT= EXECUTOR=local|ray DOWNLOAD=1]
	@$(PY) tools/shards.py write --dataset $(DATASET) --out "$(OUT)" $(SHARD_FLAGS)

test: setup check ## lint, types and every test (10 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not quiet"

test-fast: setup ## the tests that take seconds each (3 minutes on 2 cores)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not quiet"

test-quiet: setup ## the tests that measure time: on a machine with nothing else to do
	@$(PY) -m pytest -m quiet

paper-smoke: setup ## the paper's claims cut down to minutes on digits; fails where learning no longer does what it did
	@rm -rf runs/paper-smoke && $(PY) tools/shards.py write --dataset digits --out shards/digits
	@$(PY) tools/sweep.py study/paper-smoke.yaml --out runs/paper-smoke/paper-smoke.csv --folder runs --jobs 2
	@$(PY) tools/report.py study/paper-smoke.yaml --out runs/paper-smoke/paper.md --check

check: setup ## ruff and mypy
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

format: setup ## let ruff rewrite
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

bench: setup ## every benchmark that runs on this machine, into results/
	@bash tools/bench.sh

clean: ## remove runs and caches, keep shards and .venv
	rm -rf runs cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
