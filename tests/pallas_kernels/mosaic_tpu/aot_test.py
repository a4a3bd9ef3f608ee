"""Our kernels and training steps through the real TPU compiler, which runs without a TPU."""

import functools

import numpy as np
import pytest

from experiments.benchmark.tpu import aot
from experiments.benchmark.tpu import compiler
from experiments.benchmark.tpu import jobs
from tests.helpers.tpu_rows import check_rows

pytestmark = pytest.mark.skipif(compiler.libtpu_path() is None, reason="libtpu is missing")
FLOOR = 512 * 512 * 128 * 2 // 131_072  # bundles of one product of a block, on a v5e


@functools.cache
def rows(job: str) -> list[dict]:
  return checked(aot.compile_jobs(job))


def checked(found: list[dict]) -> list[dict]:
  assert "error" not in found[-1], found[-1]["error"]
  return found


def check_calls(chips, cases) -> set[str]:
  """Compiles calls with blocks of 128, forward and backward; the kernels in them."""
  names = [f"small:kernels/{chip}/{case}" for chip in chips for case in cases]
  found = checked(aot.compile_jobs(*names))
  check_rows(found)
  assert {row["chip"] for row in found} == set(chips)
  return {kernel["kernel"] for row in found for kernel in row["kernels"]}


@pytest.mark.one_day_in_six(1)
def test_columns_compile_for_all_chips_and_move_their_arrays_once():
  assert check_calls(compiler.CHIPS, ["column"]) == {"attention_forward", "attention_backward"}


@pytest.mark.slow
@pytest.mark.parametrize("chip", compiler.CHIPS)
def test_every_kernel_compiles(chip):
  kernels = check_calls([chip], aot.QUICK)
  assert kernels == {f"attention_{x}" for x in ("forward", "backward", "dq", "dkv")}


@pytest.mark.slow
@pytest.mark.parametrize("chip", compiler.CHIPS)
def test_every_call_compiles(chip):
  check_calls([chip], [case for case in aot.CASES if case not in aot.QUICK])


def kernel_of(found: list[dict], direction: str, kernel: str) -> dict:
  row = next(x for x in found if x["direction"] == direction)
  return next(x for x in row["kernels"] if x["kernel"] == kernel)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "dense_lanes", "local", "local_lanes"])
def test_bundles_of_a_block(case):
  found = rows(f"kernels/v5e/{case}")
  forward = kernel_of(found, "forward", "attention_forward")
  assert forward["bundles_full"] <= 1.12 * 2 * FLOOR
  assert forward["bundles_masked"] <= 1.15 * 2 * FLOOR
  backward = kernel_of(found, "forward and backward", "attention_backward")
  assert max(backward["bundles_full"], backward["bundles_masked"]) <= 1.25 * 5 * FLOOR
  mask = jobs.CASES[case].pattern.mask(8_192)
  blocks = mask.reshape(16, 512, 16, 512).any(axis=(1, 3))
  assert forward["visited"] == backward["visited"] == np.count_nonzero(blocks)


@pytest.mark.slow
def test_bundles_of_a_block_where_gradients_have_a_kernel_each():
  found = rows("kernels/v5e/long")
  for kernel, products in (("attention_dq", 3), ("attention_dkv", 4)):
    one = kernel_of(found, "forward and backward", kernel)
    assert max(one["bundles_full"], one["bundles_masked"]) <= 1.25 * products * FLOOR


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["dense", "local"])
def test_fewer_bundles_than_splash_attention(mask):
  theirs = [rows(f"splash/v5e/{mask}/{block}")[0]["kernels"] for block in (512, 1_024)]
  found = rows(f"kernels/v5e/{mask}")
  for n, kernel in enumerate(("attention_forward", "attention_backward")):
    ours = kernel_of(found, "forward and backward", kernel)["bundles_per_block"]
    assert ours < min(kernels[n]["bundles_per_block"] for kernels in theirs)


def check_step(chip: str, config: str, devices: int) -> None:
  (row,) = rows(f"step/{chip}/{config}/{devices}")
  assert row["hbm_need"] <= row["hbm"]
  assert row["num_kernels"] > 0, "attention was computed by something else"
  assert row["collectives"].keys() <= ({"all-reduce"} if devices > 1 else set())


@pytest.mark.slow
@pytest.mark.parametrize("config", aot.CONFIGS)
@pytest.mark.parametrize(
  ("chip", "devices"),
  [*((chip, 1) for chip in compiler.CHIPS), *((chip, 256) for chip in compiler.PODS)],
)
def test_every_training_step_compiles_and_fits(chip, devices, config):
  check_step(chip, config, devices)
