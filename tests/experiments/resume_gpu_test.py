"""Two runs of a recipe on a GPU, one of them stopped half-way: the same bits, without a flag.

Every process compiles for itself, so that each measures again which algorithms are the fastest.
"""

import concurrent.futures
import pathlib

import jax
import numpy as np
import pytest

from sparse_flax import train
from sparse_flax.run import checkpoint
from sparse_flax.run import workdir as workdir_lib
from tests.helpers import commands

pytestmark = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
RUNS = {"cifar10": 8, "enwik8": 2}  # config: sequences per step
STEPS, HALF = 6, 3


def arguments(name: str, batch: int, data: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  # The evaluation after HALF steps, which is compiled first, leaves a signal minutes to arrive.
  changes = {
    "data.path": data,
    "data.batch_size": batch,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.eval_every": HALF,
    "train.save_every": STEPS,
    "optim.warmup_steps": 1,
    "eval.monitor_batches": 1,
    "eval.pictures": 0,
  }
  fields = [f"--config.{field}={value}" for field, value in changes.items()]
  return [f"--config=configs/{name}.py", f"--workdir={workdir}", *fields]


def run_to_its_end(cache: pathlib.Path, args: list[str]) -> str:
  return commands.Commands(cache)("train", *args)


def run_in_two_processes(caches: tuple[pathlib.Path, pathlib.Path], args: list[str]) -> str:
  """What the second one said."""
  commands.Commands(caches[0]).train_until(f"step {HALF}/{STEPS}", *args)
  return run_to_its_end(caches[1], args)


def arrays_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """The last checkpoint of a run."""
  config = workdir_lib.load_config(workdir)
  shapes = jax.eval_shape(train.make_step(config)[0], jax.random.key(0))
  shapes = checkpoint.laid_out(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    state = checkpoints.restore(STEPS, shapes)
  leaves = jax.tree.leaves_with_path(jax.device_get(state))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(name, tmp_path):
  whole, halved = tmp_path / "whole", tmp_path / "halved"
  cache = lambda n: tmp_path / f"cache {n}"
  args = []
  for workdir in (whole, halved):  # which prepare data side by side
    data = commands.write_data(name, tmp_path / f"data of {workdir.name}", pictures=50)
    args.append(arguments(name, RUNS[name], data, workdir))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(run_to_its_end, cache(0), args[0])
    assert "RESUMING" in run_in_two_processes((cache(1), cache(2)), args[1])
    assert "blocks by mosaic_gpu, remat " in waiting.result()
  a, b = commands.losses(whole), commands.losses(halved)
  print(f"{name}: losses {a}, {b}")
  expected, got = arrays_of(whole), arrays_of(halved)
  assert expected.keys() == got.keys()
  # As bytes: a NaN equals itself, and zeros have signs.
  differ = [key for key, x in expected.items() if x.tobytes() != got[key].tobytes()]
  share = lambda key: f"{key}: {np.mean(expected[key] != got[key]):.1%} of {expected[key].shape}"
  assert not differ, "\n".join(["arrays that differ:", *map(share, differ)])
  assert a == b and list(a) == list(range(1, STEPS + 1))
