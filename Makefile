# make demo   set up, then compress the paper's own example
# make test   set up, then every check: lint, types, import rules, tests
# make docs   set up, then build the site of the documentation into site/

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
WORKERS ?= 2
BENCHES ?= $(basename $(notdir $(wildcard bench/experiments/*.json)))

.PHONY: help demo test docs lint types layers tests bench-quick coverage clean

help:
	@echo "make demo         set up, then compress the paper's own example (results in runs/demo)"
	@echo "make test         set up, then lint, types, import rules and all tests"
	@echo "make docs         set up, then build the documentation as a site (open site/index.html)"
	@echo "make bench-quick  set up, then every bench in its short form; BENCHES=name for one"
	@echo "make coverage     set up .venv-coverage (6 GB), then try the networks of other packages"
	@echo "make clean        remove what was built or cached; .venv, runs and results stay"

# A missing interpreter, an old one and one without venv each get a sentence.
$(VENV)/pyvenv.cfg:
	@for python in $${PYTHON:-python3.11 python3}; do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "== Creating $(VENV) with $$python"; \
	    "$$python" -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python could not create $(VENV): install its venv module (on Debian and" \
	      "Ubuntu the package python3-venv) and run make again." >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "Pliant needs Python 3.11 or newer and found none as '$${PYTHON:-python3.11 or python3}':" \
	  "install one, or name it with: make demo PYTHON=/path/to/python3.11" >&2; \
	exit 1

# Stamps: a second run installs nothing until the requirements change. torch comes with its
# constraint in the same call, so no other build of it is fetched first.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "== Installing Pliant into $(VENV) (some minutes the first time)"
	@$(PIP) -e ".[data,onnx]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "== Installing Pliant and its development tools into $(VENV) (some minutes the first time)"
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo $(VENV)/.installed-docs

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "== Installing Pliant and what builds its site into $(VENV) (some minutes the first time)"
	@$(PIP) -e ".[docs]"
	@touch $@

demo: $(VENV)/.installed-demo
	@echo "== pliant compress"
	@$(BIN)/pliant compress

# Strict: a warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.installed-docs
	@echo "== Site: mkdocs build"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "== Open site/index.html"

# One recipe, so that the order holds under make -j too.
test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory layers
	@$(MAKE) --no-print-directory tests
	@echo "== All checks passed"

lint: $(VENV)/.installed-dev
	@echo "== Lint: ruff check"
	@$(BIN)/ruff check .
	@echo "== Format: ruff format --check"
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	@echo "== Types: mypy src"
	@$(BIN)/mypy src

layers: $(VENV)/.installed-dev
	@echo "== Import rules: lint-imports"
	@$(BIN)/lint-imports

# One thread per worker: two workers with all threads each would fight for the cores.
# worksteal: the conformance suite is one large file and must be shared out, in runs of neighbours,
# since the checks of one method stand together and share what they compressed.
tests: $(VENV)/.installed-dev
	@echo "== Tests: pytest with $(WORKERS) workers"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench-quick: $(VENV)/.installed-dev
	@for bench in $(BENCHES); do \
	  echo "== python -m bench $$bench --quick"; \
	  $(BIN)/python -m bench "$$bench" --quick || exit 1; \
	done

# Another environment, since torchvision asks for another torch than the tested one.
.venv-coverage/.installed: pyproject.toml constraints.txt bench/coverage.txt | $(VENV)/pyvenv.cfg
	@echo "== Installing other people's networks into .venv-coverage (6 GB)"
	@test -d .venv-coverage || $(BIN)/python -m venv .venv-coverage
	@grep -v '^torch==' constraints.txt > .venv-coverage/constraints.txt
	@.venv-coverage/bin/python -m pip --disable-pip-version-check install \
	  -c .venv-coverage/constraints.txt -r bench/coverage.txt \
	  -e ".[data,onnx,transformers]" torch-pruning
	@touch $@

coverage: .venv-coverage/.installed
	@OMP_NUM_THREADS=1 .venv-coverage/bin/python -m bench architectures

clean:
	@echo "== Removing build folders and caches (.venv, runs/ and bench/results/ stay)"
	@rm -rf build dist site src/*.egg-info
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
