# make repro       install everything, then run the pipeline
# make test        install everything, then run the tests
# make lint        ruff and mypy
# make doctor      check the machine and the settings, and estimate time, memory and disk, before a run
#
# After a run:
# make compare                 a table of the experiments of this commit: settings, perplexity, significance
# make plots                   DVC's plots on one page that works offline
# make generate PROMPT="..."   text after a prompt, by the base model and by the adapted model
# make export                  models/merged (a plain model) and models/adapter_release (adapter and model card)
#
# Long tests:
# make same-bytes  runs the demo in two clones under different conditions and compares every hash
# make fuzz        reads thousands of damaged PDFs and source models
# make torture     kills the pipeline at random moments and compares the final hashes (one hour)
#
# make lock        requirements.lock, after a change of requirements.txt

PYTHON ?= python3
VENV := .venv
UV := uv==0.13.9
BIN := $(VENV)/bin
HAS_GPU := $(wildcard /proc/driver/nvidia/version)
# torch, and the packages that only its CUDA build needs
NOT_LOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt)

export PATH := $(CURDIR)/$(BIN):$(PATH)
# generate reads the prompt from its environment: neither make nor a shell expands it
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: repro test lint doctor compare plots generate export same-bytes fuzz torture lock setup setup-dev clean

repro: setup
	@python -m commands.mend_dvc
	dvc repro

# three processes, because some tests only wait; one on a GPU, because some tests measure its memory
# the processes of the tests share compiled modules, also where PYTHONDONTWRITEBYTECODE is set
test: export PYTHONDONTWRITEBYTECODE =
test: setup-dev
	OMP_NUM_THREADS=1 pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
	$(if $(HAS_GPU),pytest -m gpu)

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


same-bytes: setup
	python -m tests.long.same_bytes

fuzz: setup
	python -m tests.long.fuzz

torture: setup
	python -m tests.long.torture

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# The build of torch depends on the machine, so torch and the CUDA libraries that it needs are not in requirements.lock.
# 1. a wheel on this disk (PIP_FIND_LINKS)  2. PyTorch's index: CUDA with a driver, else CPU  3. the configured index
$(VENV)/.installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and f"error: $(PYTHON) is Python {v[0]}.{v[1]}; this project needs 3.11, 3.12 or 3.13. Choose one: make repro PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and requirements.lock into $(VENV)"
	@pip install --quiet --no-index --no-deps $(TORCH) 2>/dev/null \
	  || { pip install --quiet $(UV) && uv pip install --quiet --python $(BIN)/python --torch-backend=auto $(TORCH) 2>$(VENV)/torch.log; } \
	  || { echo "PyTorch's index cannot be used here ($(VENV)/torch.log): torch comes from the configured package index, about 3 GB with CUDA" \
	       && pip install --quiet $(TORCH); }
	@pip install --quiet --no-deps --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "installing requirements-dev.txt into $(VENV)"
	@pip install --quiet -r requirements-dev.txt
	@touch $@

lock: setup
	pip install --quiet $(UV)
	uv pip compile requirements.txt --output-file requirements.lock --universal --python-version 3.11 --fork-strategy fewest \
	  --generate-hashes --no-annotate --no-header --no-emit-index-url --no-emit-find-links --quiet \
	  $(foreach name,$(NOT_LOCKED),--no-emit-package $(name))

clean:
	rm -rf $(VENV) .scratch
