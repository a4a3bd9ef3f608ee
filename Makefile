# Every target but test-gpu makes its environment by itself: nothing but make, a Python >= 3.12 and a package index is needed.

# The first of these that is a Python >= 3.12 builds the environment; `make PYTHON=...` overrides.
PYENV_ROOT ?= $(HOME)/.pyenv
CANDIDATES = $(PYTHON) python3.12 python3.13 python3.14 python3 \
  $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python $(PYENV_ROOT)/versions/3.1[3-9]*/bin/python)
NEW_ENOUGH = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))
RUN = .venv/bin/python -m
# Two cores: one worker each. Compilation, most of the time, uses one core.
WORKERS ?= 2

KERNEL_TESTS = tests/pallas_kernels
MODEL_TESTS = tests/sparse_flax

CHECKS = $(addprefix $(KERNEL_TESTS)/,patterns_test.py mosaic_gpu/programs_test.py \
  $(addprefix attention_test.py::test_,errors_say_what_is_wrong what_kernels_cannot_do_is_named \
  what_kernels_do_not_take_is_named)) \
  $(addprefix $(MODEL_TESTS)/,model/layer_patterns_test.py run/validate_test.py) \
  tests/configs tests/experiments/cli_test.py tests/repository/imports_test.py

SOAK_RESTARTS ?= 200

# With the newest JAX: GPU kernels lower for an H100, some run in the simulator, and what depends most
# on other packages' interfaces.
NEWEST_TESTS = $(addprefix $(KERNEL_TESTS)/,mosaic_gpu/programs_test.py \
  decode/cluster_test.py::test_a_step_lowers_for_a_gpu_to_one_kernel \
  decode/triton_test.py::test_a_step_lowers_for_a_gpu \
  mosaic_gpu/stream_test.py::test_huge_values_stay_finite \
  mosaic_gpu/lists_test.py::test_logits_of_hidden_pairs_may_be_anything versions_test.py) \
  $(addprefix $(MODEL_TESTS)/,recorded_test.py linen_class_test.py evaluate_test.py export_test.py \
  train/tracing_test.py train/step_test.py)

# Run when named: PART=residual, the kernels around attention alone, and
# PART=steps, gradients of whole models by them, and runs that go on with the same bits.
# What the GPU's own tests need, with whatever else that machine has: its Python, no .venv. Each part
# is meant to take less than 9 minutes on one GPU, which several processes share.
PART ?= attention lists decode commands
GPU_PYTHON = $(or $(PYTHON),python3)
GPU_WORKERS ?= auto
GPU_TESTS_attention = $(KERNEL_TESTS)/attention_test.py
# The longest tests first, so that no process ends long after the others.
GPU_TESTS_lists = $(addprefix $(KERNEL_TESTS)/,random_calls_test.py mosaic_gpu/lists_test.py \
  mosaic_gpu/stream_test.py)
GPU_TESTS_residual = $(addprefix $(KERNEL_TESTS)/residual/,product_test.py halves_test.py \
  gradients_test.py)
GPU_TESTS_steps = $(MODEL_TESTS)/model/gradients_gpu_test.py tests/experiments/resume_gpu_test.py
GPU_TESTS_decode = $(KERNEL_TESTS)/decode
GPU_TESTS_commands = tests/experiments/commands_gpu_test.py
# The type checks of the other targets need beartype, and their warnings are errors: neither is
# asked of a machine that is not ours. Float32 products stay float32; GPUs round them to TF32. The
# matmuls of the references are not tuned: that takes longer than they do. Commands run as users'.
GPU_PYTEST = XLA_PYTHON_CLIENT_PREALLOCATE=false $(GPU_PYTHON) -m pytest -q -n $(GPU_WORKERS) \
  -m "not slow" --durations=5 -W default -o addopts="--strict-markers --import-mode=importlib"
GPU_KERNELS = XLA_FLAGS="$$XLA_FLAGS --xla_gpu_autotune_level=0" \
  JAX_DEFAULT_MATMUL_PRECISION=highest $(GPU_PYTEST)

.PHONY: help quickstart docs check test test-long test-newest soak test-tpu-aot test-gpu \
  test-gpu-attention test-gpu-lists test-gpu-residual test-gpu-steps test-gpu-decode \
  test-gpu-commands bench lint
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ":.*  ## " '/^[a-z-]+:.*  ## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

quickstart: .venv  ## train the packaged CIFAR-10 sample, evaluate, draw samples and attention
	$(RUN) experiments.quickstart

test: .venv lint  ## the test suite
	$(RUN) pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow"

docs: .venv  ## the documentation site, every example executed, into build/docs
	$(RUN) sphinx -q -E -W --keep-going -j $(WORKERS) -b html docs build/docs
	@echo "build/docs/index.html"

check: .venv lint  ## for every save: patterns, lowering, errors, configs, commands
	$(RUN) pytest -q -n $(WORKERS) --dist loadfile -m "not gpu and not slow" $(CHECKS)

test-long: .venv lint  ## everything that does not fit there, in full
	USERS_XLA=1 $(RUN) pytest -q -n $(WORKERS) -m "not gpu"

soak: .venv  ## a run with SOAK_RESTARTS faults, 200 by default, ends like one without
	SOAK_RESTARTS=$(SOAK_RESTARTS) $(RUN) pytest -q tests/sparse_flax/run/soak_test.py

test-newest: .venv-newest/installed  ## with the newest JAX allowed: kernels lower, and a smoke set
	.venv-newest/bin/python -m pip list --disable-pip-version-check | grep -E "^(jax|flax|numpy|optax|orbax)"
	USERS_XLA=1 .venv-newest/bin/python -m pytest -q -n $(WORKERS) -m "not gpu and not slow" $(NEWEST_TESTS)

test-tpu-aot: .venv  ## kernels and training steps through the TPU compiler; no TPU is needed
	$(RUN) pytest -q tests/pallas_kernels/mosaic_tpu/aot_test.py tests/pallas_kernels/mosaic_tpu/table_test.py

test-gpu:  ## kernels and commands on this machine's GPU, with the running interpreter
	@$(GPU_PYTHON) -c "import jax, sys; sys.exit(jax.default_backend() != 'gpu')" || \
	  { echo "JAX ($(GPU_PYTHON)) finds no GPU here" >&2; exit 1; }
	@set -e; for part in $(PART); do $(MAKE) --no-print-directory test-gpu-$$part; done

test-gpu-attention:
	$(GPU_KERNELS) $(GPU_TESTS_attention)

test-gpu-lists:
	$(GPU_KERNELS) $(GPU_TESTS_lists)

test-gpu-residual:
	$(GPU_KERNELS) $(GPU_TESTS_residual)

test-gpu-steps:  ## prints the errors of all gradients
	$(GPU_KERNELS) -rP $(GPU_TESTS_steps)

test-gpu-decode:
	$(GPU_KERNELS) $(GPU_TESTS_decode)

test-gpu-commands:
	$(GPU_PYTEST) $(GPU_TESTS_commands)

bench: .venv  ## every benchmark this machine can run, into benchmarks/*.json
	$(RUN) experiments.benchmark

lint: .venv  ## format and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyrefly check --output-format min-text

.venv: .venv/installed

# Makes the folder $(1) an environment without packages. uv, where it is installed, brings a Python
# of its own when the machine has none.
define environment
@rm -rf $(1); \
for python in $(CANDIDATES); do \
  if "$$python" -c "$(NEW_ENOUGH)" >/dev/null 2>&1; then \
    echo "making $(1) with $$("$$python" --version) ($$python)"; \
    "$$python" -m venv $(1) || exit 1; break; \
  fi; \
done; \
if [ ! -x $(1)/bin/python ] && command -v uv >/dev/null 2>&1; then \
  echo "making $(1) with uv"; uv venv --quiet --seed --python 3.12 $(1) || exit 1; \
fi; \
if [ ! -x $(1)/bin/python ]; then \
  echo "No Python >= 3.12 with venv was found (tried: $(CANDIDATES), uv)." >&2; \
  echo "Install one (https://www.python.org, pyenv install 3.12, or uv), or name it:" >&2; \
  echo "  make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
  exit 1; \
fi
endef

# The TPU compiler lies where JAX does not look for it: on a machine without a TPU it would complain.
.venv/installed: pyproject.toml constraints.txt
	$(call environment,.venv)
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt -e ".[all,docs,test]"
	case "$$(uname -sm)" in "Linux x86_64") $(RUN) pip install --quiet \
	  --disable-pip-version-check --no-deps --constraint constraints.txt --target .venv/tpu libtpu;; \
	esac
	@touch $@

# The newest releases that pyproject.toml allows, on the day when it is made.
.venv-newest/installed: pyproject.toml
	$(call environment,.venv-newest)
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[all]" \
	  beartype hypothesis pytest pytest-xdist
	@touch $@
