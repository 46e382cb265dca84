# Everything installs into .venv; nothing else on the machine is touched (but for `make system-packages`).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

.PHONY: help setup quickstart test test-again test-all sanitize check format docs chaos benchmarks system-packages clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: .venv/ready  ## install the project and its tools into .venv

# torch comes first and pinned: an open range can pull another build of several GB. With an NVIDIA driver the kernels' compiler comes along.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed; set PYTHON=python3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(PIP) install -q --upgrade pip
	$(PIP) install -q -c constraints.txt torch
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt -e '.[dev]'
	if command -v nvidia-smi >/dev/null; then $(PIP) install -q -c constraints.txt -e '.[kernels]'; fi
	touch $@

quickstart: setup  ## text -> tokenizer -> shards -> training on two processes -> resume -> report -> sample -> Hugging Face export
	$(BIN)/mamba-pretrain quickstart

test: setup  ## the tests, but for slow ones
	$(PYTEST) -m 'not slow'

test-again: setup  ## the tests that failed last time, one after another
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --last-failed --last-failed-no-failures none

test-all: setup  ## every test this machine can run
	$(PYTEST)

sanitize: setup  ## a few cases of the CUDA kernels under compute-sanitizer, on a GPU
	PYTHON=$(abspath $(BIN))/python tests/ops/sanitize.sh

check: setup  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## apply lint fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation, failing on a broken link
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

chaos: setup  ## twenty random faults on a local Slurm cluster during one training
	$(BIN)/python -m launch.chaos

benchmarks: setup  ## check every benchmark against its bar
	for script in benchmarks/[a-z]*.py; do grep -q -- --check $$script && { $(BIN)/python $$script --check || exit 1; }; done

# What some tests and the local Slurm cluster use; needs root and apt.
system-packages:  ## Debian packages for the Slurm, terminal and browser tests
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	  slurm-wlm munge shellcheck pdsh openssh-server openssh-client tmux chromium iproute2

clean:  ## remove what was built, not what was trained
	rm -rf .venv build dist *.egg-info site .pytest_cache .ruff_cache .mypy_cache
