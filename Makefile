# setup demo test test-all simt-full asan tsan bench gpu kernel-report cuda-counts lint. One environment, .venv; stamps in it say what is done, so nothing is done twice.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := pyproject.toml setup.py build_backend.py $(shell find csrc -path csrc/simt -prune -o -name '*.cpp' -print -o -name '*.h' -print -o -name '*.cu*' -print)

# The stamp of torch holds what was asked for; when another TORCH is given, it is installed in its place.
ifneq ($(origin TORCH),file)
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/.torch
endif
endif

.PHONY: setup demo test test-all simt-full asan tsan bench gpu kernel-report cuda-counts lint clean

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

# A test runs on one thread: as many at a time as there are cores, four at most.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal --durations 15
# These run the same whichever implementation the ops choose.
SAME := simt_* cuda_* compile_only* kernel_report readme packaging masks_static masks_cli calibrate info layout long_* video_[eiptw]*

test: $(VENV)/.everything
	$(PYTEST)
	HHATTN_IMPL=reference $(PYTEST) -q $(SAME:%=--ignore-glob='*/test_%.py')
	TRITON_INTERPRET=1 $(PYTEST) -q -k triton

test-all: $(VENV)/.everything
	$(PYTEST) -m ''
	HHATTN_IMPL=reference $(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -k triton

# What `make test` leaves out of the emulator's: the slow tests, every architecture's code, and the ops' own tests on their CUDA kernels
# in other orders of warps and blocks, as on sm_80 and as on sm_90.
ON_CUDA = $(PYTEST) -q -k cuda $(OPS:%=tests/test_%.py)
simt-full: $(VENV)/.everything
	$(PYTEST) -m '' tests/test_simt_*.py tests/test_cuda_*.py tests/test_compile_only_cuda.py
	HHATTN_SIMT=80 HHATTN_SIMT_SEED=1 $(ON_CUDA)
	HHATTN_SIMT=90 HHATTN_SIMT_SEED=2 $(ON_CUDA)

# The ops' tests on a library whose every access (asan), or every order between threads (tsan), is checked. The test of memory is
# left out, since freed memory is held back; leaks are Python's and torch's own.
OPS := norm_modulate qk_norm_rope norms_backward block_sparse_attention sparse_linear_attention sparse_linear_attention_op \
  block_linear_attention block_linear_attention_state block_linear_attention_cpp
SANITIZED = $(BIN)/python setup.py -q build --build-base build/$@ --build-lib build/$@/lib
RUNTIMES = $(foreach library,$@ stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))
CHECKED = PYTHONPATH=build/$@/lib LD_PRELOAD="$(RUNTIMES)" HHATTN_TEST_THREADS=3 $(BIN)/pytest -q -p no:cacheprovider \
  -k 'not long_clip' $(OPS:%=tests/test_%.py)

asan: $(VENV)/.everything
	HHATTN_NATIVE=1 HHATTN_SANITIZE=address $(SANITIZED)
	ASAN_OPTIONS=detect_leaks=0 $(CHECKED)

tsan: $(VENV)/.everything
	HHATTN_NATIVE=1 HHATTN_SANITIZE=thread $(SANITIZED)
	TSAN_OPTIONS='exitcode=66 suppressions=tests/tsan.supp log_path=build/tsan/races' setarch -R env $(CHECKED)

bench: $(VENV)/.everything
	$(BIN)/python benchmarks/run.py

# The measured rooflines, the tests and the benchmarks on a CUDA GPU; where there is none, a line that says so.
gpu: $(VENV)/.everything
	@$(BIN)/python benchmarks/gpu.py

# docs/kernels.md: every Triton and CUDA kernel compiled for A100, H100 and B200, and what a model predicts for it. Needs nvcc, no GPU.
kernel-report: $(VENV)/.everything
	$(BIN)/python benchmarks/kernel_report.py

# tests/cuda_counts.json: what the CUDA kernels' machine code is made of, which a test holds later code against.
cuda-counts: $(VENV)/.everything
	$(BIN)/python benchmarks/cuda_counts.py

lint: $(VENV)/.everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info hhattn/_C.*
