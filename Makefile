# Every target but test-gpu makes .venv by itself: nothing but make, a Python >= 3.12 and a package index is needed.

# The first of these that is a Python >= 3.12 builds the environment; `make PYTHON=...` overrides.
PYENV_ROOT ?= $(HOME)/.pyenv
CANDIDATES = $(PYTHON) python3.12 python3.13 python3.14 python3 \
  $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python $(PYENV_ROOT)/versions/3.1[3-9]*/bin/python)
NEW_ENOUGH = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))
RUN = .venv/bin/python -m
# Two cores: one worker each. Compilation, most of the time, uses one core.
WORKERS ?= 2

CHECKS = $(addprefix tests/,patterns_test.py layer_patterns_test.py mosaic_gpu_lowering_test.py \
  validate_test.py configs_test.py cli_test.py imports_test.py \
  $(addprefix attention_test.py::test_,errors_say_what_is_wrong what_kernels_cannot_do_is_named \
  what_kernels_do_not_take_is_named))

SOAK_RESTARTS ?= 200

# What the GPU's own tests need, with whatever else that machine has: its Python, no .venv.
GPU_PYTHON = $(or $(PYTHON),python3)
GPU_TESTS = $(wildcard tests/attention_test.py tests/attention_patterns_test.py \
  tests/decode_cluster_test.py tests/decoding_test.py tests/mosaic_gpu_*_test.py)
# The type checks of the other targets need beartype, and their warnings are errors: neither is
# asked of a machine that is not ours. Float32 products stay float32; GPUs round them to TF32. The
# matmuls of the references are not tuned: that takes longer than they do.
GPU_PYTEST = -q -m "not slow" -W default \
  -o addopts="--strict-markers --import-mode=importlib"

.PHONY: quickstart check test test-long soak test-tpu-aot test-gpu bench lint
.DELETE_ON_ERROR:

quickstart: .venv  ## train the packaged CIFAR-10 sample, evaluate, draw samples and attention
	$(RUN) experiments.quickstart

test: .venv lint  ## the test suite
	$(RUN) pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow"

check: .venv lint  ## for every save: patterns, lowering, errors, configs, commands
	$(RUN) pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow" $(CHECKS)

test-long: .venv lint  ## everything that does not fit there, in full
	$(RUN) pytest -q -n $(WORKERS) -m "not gpu"

soak: .venv  ## a run with SOAK_RESTARTS faults, 200 by default, ends like one without
	SOAK_RESTARTS=$(SOAK_RESTARTS) $(RUN) pytest -q tests/soak_test.py

test-tpu-aot: .venv  ## kernels and training steps through the TPU compiler; no TPU is needed
	$(RUN) pytest -q tests/tpu_aot_test.py

test-gpu:  ## the attention suites on this machine's GPU, with the running interpreter
	@$(GPU_PYTHON) -c "import jax, sys; sys.exit(jax.default_backend() != 'gpu')" || \
	  { echo "JAX ($(GPU_PYTHON)) finds no GPU here" >&2; exit 1; }
	XLA_FLAGS="$$XLA_FLAGS --xla_gpu_autotune_level=0" JAX_DEFAULT_MATMUL_PRECISION=highest \
	  $(GPU_PYTHON) -m pytest $(GPU_PYTEST) $(GPU_TESTS)

bench: .venv  ## every benchmark this machine can run, into benchmarks/*.json
	$(RUN) experiments.benchmark

lint: .venv
	$(RUN) ruff check .
	$(RUN) ruff format --check .

.venv: .venv/installed

# uv, where it is installed, brings a Python of its own when the machine has none.
# The TPU compiler lies where JAX does not look for it: on a machine without a TPU it would complain.
.venv/installed: setup.py constraints.txt
	@rm -rf .venv; \
	for python in $(CANDIDATES); do \
	  if "$$python" -c "$(NEW_ENOUGH)" >/dev/null 2>&1; then \
	    echo "making .venv with $$("$$python" --version) ($$python)"; \
	    "$$python" -m venv .venv || exit 1; break; \
	  fi; \
	done; \
	if [ ! -x .venv/bin/python ] && command -v uv >/dev/null 2>&1; then \
	  echo "making .venv with uv"; uv venv --quiet --seed --python 3.12 .venv || exit 1; \
	fi; \
	if [ ! -x .venv/bin/python ]; then \
	  echo "No Python >= 3.12 with venv was found (tried: $(CANDIDATES), uv)." >&2; \
	  echo "Install one (https://www.python.org, pyenv install 3.12, or uv), or name it:" >&2; \
	  echo "  make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt -e ".[test]"
	case "$$(uname -sm)" in "Linux x86_64") $(RUN) pip install --quiet \
	  --disable-pip-version-check --no-deps --constraint constraints.txt --target .venv/tpu libtpu;; \
	esac
	@touch $@
