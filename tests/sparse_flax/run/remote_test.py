"""A workdir in an object store, here in memory: what goes through etils.epath."""

import contextlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from fsspec.implementations import memory

from sparse_flax import export
from sparse_flax.model import transformer
from sparse_flax.run import workdir
from sparse_flax.train import metrics
from sparse_flax.train import profile
from sparse_flax.view import grids
from tests.helpers import tiny

pytestmark = pytest.mark.promotes


class Bucket(memory.MemoryFileSystem):
  """gs://... in memory, and like a bucket it cannot append."""

  protocol = ("gs", "gcs")
  store = {}  # noqa: RUF012 - of its own
  pseudo_dirs = [""]  # noqa: RUF012

  def _open(self, path, mode="rb", **how):
    assert "a" not in mode, "object stores cannot append"
    return super()._open(path, mode=mode, **how)


@pytest.fixture
def bucket(monkeypatch):
  for protocol in Bucket.protocol:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, protocol, Bucket)
  return epath.Path("gs://bucket/run")


def test_config_data_metrics_pictures_and_exports(bucket, tmp_path):
  config = tiny.config(tmp_path / "text")
  workdir.start(bucket, config, data={"train": {"digest": "sha256:1"}})
  workdir.check(bucket, config, data={"train": {"digest": "sha256:1"}})
  assert workdir.load_config(bucket) == config

  for step in (0, 2):  # a start, and one that goes on from step 2
    with metrics.Writer(bucket, step=step) as writer:
      for n in range(step + 1, step + 4):
        writer.write(n, loss=float(n))
  records = [json.loads(x) for x in (bucket / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in records] == [1, 2, 3, 4, 5]
  assert list((bucket / "tensorboard").iterdir())

  for n in range(2):
    metrics.append_line(bucket / "evaluations.jsonl", {"n": n})
  assert len((bucket / "evaluations.jsonl").read_text().splitlines()) == 2
  grids.save_grid(bucket / "grid.png", [[np.zeros((4, 4, 3), np.uint8)]])
  assert (bucket / "grid.png").read_bytes().startswith(b"\x89PNG")

  module = transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  export.save(bucket / "out", config, params, step=3)
  tokens = jnp.zeros((1, 32), jnp.uint8)
  _, graph, loaded = export.load(bucket / "out")
  np.testing.assert_array_equal(nnx.merge(graph, loaded)(tokens), module(tokens))


def test_profiles(bucket):
  said = []
  arguments = dict(first=0, pause=contextlib.nullcontext, say=said.append)
  with profile.Profiler(bucket, range(1, 2), **arguments) as profiler:
    for step in (1, 2):
      with profiler.step(step, settle=lambda: None):
        jnp.ones(3).block_until_ready()
  (folder,) = (bucket / "profile" / "plugins" / "profile").iterdir()
  assert any(path.name.endswith(".xplane.pb") and path.read_bytes() for path in folder.iterdir())
  assert len(said) == 1 and "xprof --port=8791 gs://bucket/run/profile" in said[0]
