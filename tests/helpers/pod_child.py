"""The training command, with what only tests want: gloo on the loopback, and faults on demand.

NAN_STEPS=3,4,5: the loss of these steps (done before them: 2, 3, 4) is not a number; with
NAN_EVERY=100 of these in every 100.
WORKDIRS=MESH=DIR;...: one run after the other in this process, MESH as data,fsdp,tensor,sequence.
FILE_LIMIT=STEP:BYTES: from that step on no file can grow beyond so many bytes, as on a full disk.
HANG=STEP: the process sleeps after that step.
"""

import os
import resource
import sys
import time

import jax.numpy as jnp
from jax._src.lib import _jax  # gloo listens on the host's address, and no public option helps

from experiments import train as launcher
from sparse_flax import evaluate
from sparse_flax.parallel import sharding
from sparse_flax.train import metrics
from sparse_flax.train import step as step_lib
from tests.helpers import pod

_make_gloo = _jax.make_gloo_tcp_collectives
_jax.make_gloo_tcp_collectives = lambda **how: _make_gloo(**how, hostname=pod.LOOPBACK)


def poison(steps: tuple[int, ...], every: int) -> None:
  honest, nats_of = step_lib.train_step, evaluate.token_nats

  def train_step(state, tokens, key, **how):
    bad = jnp.isin((state["step"] + 1) % every, jnp.asarray(steps, jnp.int32))
    factor = jnp.where(bad, jnp.nan, jnp.float32(1))
    evaluate.token_nats = lambda logits, tokens: nats_of(logits, tokens) * factor
    try:
      return honest(state, tokens, key, **how)
    finally:
      evaluate.token_nats = nats_of

  step_lib.train_step = train_step


def after_step(number: int, act) -> None:
  add = metrics.Progress.add

  def spy(self, step, record):
    add(self, step, record)
    if step == number:
      act()

  metrics.Progress.add = spy


if steps := os.environ.get("NAN_STEPS"):
  poison(tuple(map(int, steps.split(","))), int(os.environ.get("NAN_EVERY", 10**9)))
if limit := os.environ.get("FILE_LIMIT"):
  step, size = map(int, limit.split(":"))
  after_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
if step := os.environ.get("HANG"):
  after_step(int(step), lambda: time.sleep(1_000))
if runs := os.environ.get("WORKDIRS"):
  plain = launcher.run

  def run_all(config, workdir, **how):
    for item in runs.split(";"):
      mesh, folder = item.split("=")
      config = config.copy_and_resolve_references()
      sizes = map(int, mesh.split(","))
      config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
      plain(config, folder)

  launcher.run = run_all

if __name__ == "__main__":
  sys.exit(launcher.main(sys.argv[1:]))
