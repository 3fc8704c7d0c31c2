# make repro   sets everything up, then runs the pipeline
# make test    sets everything up, then runs the tests
# make lint    sets everything up, then ruff and mypy
# make same-bytes  runs the demo in two clones under other circumstances and compares every hash
# make fuzz    reads thousands of damaged PDFs and source models
# make torture kills the pipeline at random moments and compares what it makes then (an hour)
#
# make doctor  what is wrong here, and what the run will take, before any work
#
# after a run:
# make compare                 the experiments of this commit: what differs, and whether it matters
# make plots                   dvc plots show, on a page that needs no internet
# make generate PROMPT="..."   the continuations of the base and of the adapted model
# make export                  models/merged, a model like any other, and models/adapter_release

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)

export PATH := $(CURDIR)/$(BIN):$(PATH)
# generate reads the prompt from its environment: neither make nor a shell expands it
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: repro test lint same-bytes fuzz torture doctor compare plots generate export setup setup-dev clean

repro: setup
	@$(BIN)/python -m commands.mend_dvc
	dvc repro

torture: setup
	$(BIN)/python -m tests.long.torture

same-bytes: setup
	$(BIN)/python -m tests.long.same_bytes

fuzz: setup
	$(BIN)/python -m tests.long.fuzz

test: setup-dev
	OMP_NUM_THREADS=1 pytest

lint: setup-dev
	ruff check .
	ruff format --check .
	mypy

doctor: setup
	@python -m commands.doctor

compare: setup
	@python -m commands.compare

plots: setup
	@python -m commands.plots

generate: setup
	@python -m commands.generate

export: setup
	@python -m commands.export

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}; say which: make repro PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@echo "installing torch and requirements.txt into $(VENV)"
	@# a wheel at hand (PIP_FIND_LINKS) comes first; else uv picks the build: CUDA where there is a driver, CPU elsewhere
	@$(BIN)/pip install --quiet --no-index --no-deps $(TORCH) 2>/dev/null \
	  || { $(BIN)/pip install --quiet uv && $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend=auto $(TORCH); }
	@$(BIN)/pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .scratch
