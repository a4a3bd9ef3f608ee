"""Exported weights: canonical names, the same logits in another process, and what is refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from experiments import export as launcher
from sparse_flax import export
from sparse_flax.model import transformer
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.run import workdir
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
TOKENS = np.random.RandomState(0).randint(0, 256, (2, 32)).astype(np.uint8)
LOGITS = """
import sys
import numpy as np
from flax import nnx
from sparse_flax import export
config, graph, params = export.load(sys.argv[1])
tokens = np.random.RandomState(0).randint(0, 256, (2, 32)).astype(np.uint8)
np.save(sys.argv[2], nnx.merge(graph, params)(tokens))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of 4 layers in cycles of 2, with random weights, and its logits."""
  root = tmp_path_factory.mktemp("run")
  model = dict(num_layers=4, attention_layers=("local", "fixed"))
  config = tiny.config(root / "text", model=model)
  module = transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  graph, params = nnx.split(module, nnx.Param)
  params = nnx.to_pure_dict(params)
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  params = jax.tree.unflatten(treedef, leaves)
  workdir.start(root / "run", config, data={})
  with checkpoint.Checkpoints(root / "run") as checkpoints:
    checkpoints.save({"step": jnp.int32(7), "params": params, "ema": params})
  assert launcher.main([f"--workdir={root / 'run'}", f"--out={root / 'out'}"]) == 0
  return dict(
    root=root, config=config, params=params, logits=nnx.merge(graph, params)(jnp.asarray(TOKENS))
  )


@pytest.mark.one_day_in_six(0)
def test_a_fresh_process_gets_the_same_logits(run):
  path = run["root"] / "logits.npy"
  subprocess.run([sys.executable, "-c", LOGITS, run["root"] / "out", path], check=True)
  np.testing.assert_allclose(np.load(path), run["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.one_day_in_three(0)
def test_every_weight_comes_back_with_its_bits_under_its_name(run):
  config, _, params = export.load(run["root"] / "out")
  assert config == run["config"]
  assert tiny.leaf_bytes(params) == tiny.leaf_bytes(run["params"])
  with safetensors.safe_open(run["root"] / "out" / export.MODEL, "numpy") as file:
    names = set(file.keys())
    # Layers count in the order in which they run: 2 is the second turn of the first pattern.
    query = file.get_tensor("layers.2.attention.query.kernel")
    assert file.metadata()["step"] == "7"
  expected = run["params"]["groups"][0]["attention"]["query"]["kernel"][1]
  np.testing.assert_array_equal(query, expected)
  assert {"embedding.start", "logits.kernel", "layers.3.feed_forward.down.bias"} <= names
  assert len(names) == 4 * 16 + 3 + 2 + 2


@pytest.mark.one_day_in_three(1)
def test_rounded_matrices_come_back_as_float32_and_vectors_as_they_were(run):
  folder = run["root"] / "rounded"
  argv = [f"--workdir={run['root'] / 'run'}", f"--out={folder}", "--dtype=bfloat16"]
  assert launcher.main(argv) == 0
  found = export.read(folder)
  assert found.matrices == "bfloat16" and export.read(run["root"] / "out").matrices is None
  rounded = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
  arrays, got = (export.flatten(x, cycle=2) for x in (run["params"], found.params))
  expected = {name: rounded(x) if x.ndim > 1 else x for name, x in arrays.items()}
  assert tiny.leaf_bytes(got) == tiny.leaf_bytes(expected)
  assert tiny.leaf_bytes(got) != tiny.leaf_bytes(arrays)
  with safetensors.safe_open(folder / export.MODEL, "flax") as file:
    stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
  assert stored["layers.1.attention.out.kernel"] == jnp.bfloat16
  assert stored["layers.1.attention.out.bias"] == jnp.float32


def test_other_dtypes_than_these_are_refused(run, tmp_path, capsys):
  with pytest.raises(SystemExit) as end:
    launcher.main([f"--workdir={run['root'] / 'run'}", f"--out={tmp_path}", "--dtype=float16"])
  said = capsys.readouterr().err
  assert end.value.code == 2 and "--dtype: invalid choice: 'float16'" in said
  with pytest.raises(ValueError, match="dtype='int8': must be None or one of float32, bfloat16"):
    export.save(tmp_path, run["config"], run["params"], step=7, dtype="int8")
  assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_named(run, tmp_path):
  content = bytearray((run["root"] / "out" / export.MODEL).read_bytes())
  content[-1] ^= 1
  (tmp_path / export.MODEL).write_bytes(content)
  (tmp_path / export.CONFIG).write_bytes((run["root"] / "out" / export.CONFIG).read_bytes())
  with pytest.raises(errors.DamagedError, match=r"model\.safetensors: [\w.]+: not what was exp"):
    export.load(tmp_path)
  (tmp_path / export.MODEL).write_bytes(content[:-5])
  with pytest.raises(errors.DamagedError, match="is not an exported model"):
    export.load(tmp_path)


def test_another_config_or_shape_is_refused(run, tmp_path):
  config = json.loads((run["root"] / "out" / export.CONFIG).read_text())
  config["model"]["num_layers"] = 2
  (tmp_path / export.CONFIG).write_text(json.dumps(config))
  (tmp_path / export.MODEL).write_bytes((run["root"] / "out" / export.MODEL).read_bytes())
  with pytest.raises(errors.DamagedError, match=r"config\.json: not what was exported"):
    export.load(tmp_path)
  arrays = export.flatten(run["params"], cycle=2)
  shapes = jax.eval_shape(lambda: jax.tree.map(lambda x: x[:1] if x.ndim > 1 else x, run["params"]))
  with pytest.raises(ValueError, match=r"model\.safetensors: layers\.2\.\S+ is unknown"):
    export.unflatten(arrays, shapes, cycle=2)


def test_what_is_there_is_not_overwritten(run, capsys):
  with pytest.raises(SystemExit) as end:
    launcher.main([f"--workdir={run['root'] / 'run'}", f"--out={run['root'] / 'out'}"])
  assert end.value.code == 2 and "holds a model.safetensors already" in capsys.readouterr().err
  with pytest.raises(SystemExit) as end:
    launcher.main([f"--workdir={run['root'] / 'run'}"])
  assert end.value.code == 2
