# make demo: the whole job on the built-in corpus.  make setup: .venv.  make test: lint, types, tests.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu (or …/cu130) picks PyTorch's build: see README.

PYTHON ?= python3
BIN := .venv/bin
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DEMO := runs/demo

.PHONY: setup demo test lint types clean
.ONESHELL:
.SHELLFLAGS := -ec

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(INDEX) -r requirements.txt
	touch $@

demo: setup
	scripts/demo.sh $(DEMO)

# a process a core, each with one thread; the tests of a file stay together
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy .
	$(BIN)/mypy compress.py

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache
