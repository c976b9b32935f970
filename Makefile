# setup demo test test-all bench gpu lint. One environment, .venv; stamps in it say what is done, so nothing is done twice.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := pyproject.toml setup.py build_backend.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# The stamp of torch holds what was asked for; when another TORCH is given, it is installed in its place.
ifneq ($(origin TORCH),file)
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/.torch
endif
endif

.PHONY: setup demo test test-all bench gpu lint clean

setup: $(VENV)/.everything

# torch first, so that building hhattn finds it and downloads none.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(wildcard $@),--force-reinstall) "$(TORCH)"
	@echo '$(TORCH)' > $@

# What the demo needs, and no more.
$(VENV)/.video: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[video]'
	@touch $@

# What the tests, linters and benchmarks need; includes the above, so that `make setup demo` installs once.
$(VENV)/.everything: $(VENV)/.torch $(NATIVE)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[video,diffusers,test,bench,dev]'
	@touch $(VENV)/.video $@

# A minute of 720x1280 video from the bundled model.
demo: $(VENV)/.video
	@mkdir -p out
	$(BIN)/hhattn generate -o out/demo.mp4

test: $(VENV)/.everything
	$(BIN)/pytest
	HHATTN_IMPL=reference $(BIN)/pytest -q

test-all: $(VENV)/.everything
	$(BIN)/pytest -m ''
	HHATTN_IMPL=reference $(BIN)/pytest

bench: $(VENV)/.everything
	$(BIN)/python benchmarks/run.py

# The same tests and benchmarks on a CUDA GPU.
gpu: $(VENV)/.everything
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit( \
	  f'make gpu: no CUDA GPU here (torch {torch.__version__}, built for CUDA {torch.version.cuda}); nothing was run. ' \
	  'On a GPU machine: make gpu TORCH=torch')"
	$(BIN)/pytest -m gpu
	$(BIN)/python benchmarks/run.py --device cuda

lint: $(VENV)/.everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info hhattn/_C.*
