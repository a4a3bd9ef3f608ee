"""Jobs for the worker processes of the GPU benchmarks, which import them from here."""

import os
import time

import jax
import jax.numpy as jnp

from experiments.benchmark.gpu import timing


def _timed(program, *arrays):
  """In the place of CUPTI: the result, as a time."""
  return float(program(*arrays)), [f"process {os.getpid()}"]


def total(num):
  """Measured as `num` ms."""
  timing.kernel_ms = _timed  # in the worker alone
  return jnp.sum, lambda: (jnp.ones(num),)


def twice(x):
  return 2 * x


def refused(num):
  raise ValueError(f"{num} is not supported")


def dies_compiling(num):
  os._exit(num)


def dies_measured(num):
  def ends(x):
    jax.debug.callback(lambda: os._exit(num))
    return x.sum()

  return ends, lambda: (jnp.ones(num),)


def hangs_measured(num):
  def waits(x):
    jax.debug.callback(lambda: time.sleep(600))
    return x.sum()

  return waits, lambda: (jnp.ones(num),)


def poisons(num):
  """The GPU, or so its worker thinks."""
  timing._usable = lambda: False

  def fails(x):
    raise ValueError("illegal access")

  return lambda x: jax.pure_callback(fails, x, x), lambda: (jnp.ones(num),)
