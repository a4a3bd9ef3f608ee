"""Weights for other programs: `model.safetensors` and `config.json`, in one canonical naming.

    embedding.tokens.embedding              [256, E]
    embedding.positions.N.embedding         [rows, E]
    embedding.start                         [1, 1, E]
    layers.N.attention_norm.scale, .bias    [E]
    layers.N.attention.query.kernel, .bias  [E, H Dk], [H Dk]; also key, and value and out with Dv
    layers.N.attention.gate.kernel, .bias   [E, 3 H], [3 H]; key_places, value_places [H, b] (nsa)
    layers.N.attention.index.query.kernel   [E, HI DI]; also key and mix (indexer)
    layers.N.attention.taps                 [taps, H, Dk] (moba, with key_conv)
    layers.N.feed_forward_norm.scale, .bias [E]
    layers.N.feed_forward.up.kernel, .bias  [E, F], [F]; down back
    final_norm.scale, .bias                 [E]
    logits.kernel                           [E, 256]

N of a layer counts them in the order in which they run, whatever the cycle of patterns. Of a model
with inner levels they are `before.N` and `after.N`, those inside `inner.layers.N`, or
`inner.before.N` and so on, and there are

    inner.shorten.norm.scale, .bias         [E]
    inner.shorten.pool.kernel, .bias        [k E, E'], [E']
    inner.shorten.positions                 [groups, E']
    inner.lengthen.norm.scale, .bias        [E']
    inner.lengthen.spread.kernel, .bias     [E', k E], [k E]

A kernel is applied as x @ kernel. The file's metadata hold a digest of every array, which `load`
checks, and as `matrices` the dtype that arrays of two axes and more were rounded to, if they were.

Beside the two files of a model of images there may be `held_out.webp`: images that it was not
trained on, in a grid without gaps, for those who do not have its data.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from sparse_flax import extras

extras.need("train", of=__name__)

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
import safetensors.flax
from etils import epath
from flax import nnx

from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax import run
from sparse_flax.data import samples
from sparse_flax.model import levels

MODEL, CONFIG, HELD_OUT = "model.safetensors", "config.json", "held_out.webp"
DTYPES = ("float32", "bfloat16")


class Exported(NamedTuple):
  """What an export holds.

  Attributes:
    config: of the run.
    graphdef: of the model, for nnx.merge(graphdef, params).
    params: the weights.
    step: of the checkpoint they are from.
    averaged: whether they are the averaged weights; else those of the last update.
    matrices: what those with two axes and more were rounded to: "bfloat16", or None.
  """

  config: ml_collections.ConfigDict
  graphdef: nnx.GraphDef
  params: dict
  step: int
  averaged: bool
  matrices: str | None


def save(
  folder: epath.PathLike,
  config: ml_collections.ConfigDict,
  params: dict,
  *,
  step: int,
  averaged: bool = True,
  dtype: str | None = None,
) -> list[epath.Path]:
  """Writes the two files, each whole or not at all; returns their paths.

  Args:
    folder: made if it is not there.
    config: of the run.
    params: its weights, as checkpoint.restore_params returns them; float32 or bfloat16.
    step: of the checkpoint they are from.
    averaged: whether they are the averaged ones, of a run that keeps them.
    dtype: "bfloat16" rounds all arrays of two axes and more, which halves the file; "float32"
      writes all as float32; None writes them as they are.

  Raises:
    ValueError: `dtype` is another; or the folder holds an exported model already, or cannot be
      written.
  """
  if dtype not in (None, *DTYPES):
    raise ValueError(f"{dtype=}: must be None or one of {', '.join(DTYPES)}")
  folder = epath.Path(folder)
  for name in (MODEL, CONFIG):
    if (folder / name).exists():
      raise ValueError(f"{folder}: holds a {name} already; choose another folder")
  arrays = flatten(params, cycle=cycles_of(config.model))
  rounds = dtype == "bfloat16"
  if dtype is not None:
    is_cast = lambda x: not rounds or x.ndim > 1
    arrays = {name: jnp.asarray(x, dtype if is_cast(x) else None) for name, x in arrays.items()}
  text = run.to_json(config.to_dict())
  metadata = dict(
    format="flax",
    step=str(step),
    averaged=json.dumps(averaged and config.train.ema_decay > 0),
    config=run.config_digest(text),
    digests=json.dumps(run.digest.digests(arrays)),
    **(dict(matrices=dtype) if rounds else {}),
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
      (CONFIG, text.encode()),
      (MODEL, safetensors.flax.save(arrays, metadata=metadata)),
    ):
      run.files.write(folder / name, content)
  except OSError as error:
    raise ValueError(f"{folder}: cannot be written: {error.strerror or error}") from error
  return [folder / MODEL, folder / CONFIG]


def load(folder: epath.PathLike) -> tuple[ml_collections.ConfigDict, nnx.GraphDef, dict]:
  """The config, the model's graph and the weights, for nnx.merge(graph, weights).

  Weights that were rounded for the file are of the config's `param_dtype` again.

  Raises:
    ValueError: a file is missing, or is not that of an exported model.
    run.DamagedError: a weight is not what was exported; the message names it.
  """
  return read(folder)[:3]


def read(folder: epath.PathLike, *, data_path: str | None = None) -> Exported:
  """As `load`, with all else that one has to know of the weights.

  Args:
    folder: of the export.
    data_path: where the data of the config are on this machine.

  Raises:
    ValueError, run.DamagedError: as `load`.
  """
  config = run.load_config(folder, data_path=data_path)
  path = epath.Path(folder) / MODEL
  if not path.exists():
    raise ValueError(f"{path}: is missing")
  content = path.read_bytes()
  try:
    arrays = {name: _array(**entry) for name, entry in safetensors.deserialize(content)}
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    saved, config_digest = json.loads(metadata["digests"]), metadata["config"]
    # Earlier versions exported nothing but averaged weights, and did not say so.
    step, averaged = int(metadata["step"]), bool(json.loads(metadata.get("averaged", "true")))
    matrices = metadata.get("matrices")
  except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
    raise run.DamagedError(f"{path}: is not an exported model: {error}") from error
  if config_digest != run.config_digest((epath.Path(folder) / CONFIG).read_text()):
    raise run.DamagedError(f"{epath.Path(folder) / CONFIG}: not what was exported")
  computed = run.digest.digests(arrays)
  if bad := sorted(x for x in computed.keys() | saved.keys() if computed.get(x) != saved.get(x)):
    raise run.DamagedError(f"{path}: {', '.join(bad[:3])}: not what was exported")
  graphdef, shapes = model_lib.graph_and_shapes(**config.model)
  params = unflatten(arrays, shapes, cycle=cycles_of(config.model))
  if matrices is not None:
    # Averages in float32 of weights in bfloat16 stay what they are.
    widen = lambda x, shape: jnp.asarray(x, jnp.promote_types(x.dtype, shape.dtype))
    params = jax.tree.map(widen, params, shapes)
  return Exported(config, graphdef, params, step, averaged, matrices)


def held_out(folder: epath.PathLike, config: ml_collections.ConfigDict) -> data.Dataset | None:
  """The images that lie beside the weights, as a test split; None where there are none.

  Args:
    folder: of the export.
    config: of its model.

  Raises:
    ValueError: the file is no grid of images of the model's size.
  """
  path = epath.Path(folder) / HELD_OUT
  if config.model.modality != "image" or not path.exists():
    return None
  rows, columns, _ = config.model.position_shape
  images = samples.images_of_grid(path, (rows, columns))
  remark = f"{len(images):,} images of {HELD_OUT}, beside the weights"
  return data.of_arrays(images, split="test", modality="image", remark=remark)


def _array(*, dtype: str, shape: list[int], data: bytearray) -> jax.Array:
  # safetensors' own readers for numpy and flax know no bfloat16.
  kinds = {"F32": jnp.float32, "BF16": jnp.bfloat16}
  if dtype not in kinds:
    raise ValueError(f"an array is {dtype}, must be one of {', '.join(kinds)}")
  return jnp.asarray(np.frombuffer(data, kinds[dtype]).reshape(shape))


def cycles_of(model: ml_collections.ConfigDict) -> tuple[int, ...]:
  """The length of the cycle of patterns of each level, for `flatten`."""
  return tuple(len(level.patterns) for level in levels.specs_of(**dict(model.items())))


def flatten(params: dict, *, cycle: int | tuple[int, ...]) -> dict[str, jax.Array]:
  """{canonical name: array} of weights whose layers are stacked in groups of one cycle.

  `cycle` is its length, or those of each level.
  """
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = run.digest.name_of(path).replace("/", ".")
    if stacked := _stacked(name, cycle):
      for n, layer in enumerate(leaf):
        arrays[stacked(n)] = layer
    else:
      arrays[name] = leaf
  return arrays


def _stacked(name: str, cycle: int | tuple[int, ...]) -> Callable[[int], str] | None:
  """The name of the n-th array of a stack, where `name` is one."""
  match = re.fullmatch(r"((?:inner\.)*)(groups|before|after)\.(\d+)\.(.*)", name)
  if match is None:
    return None
  level, stack, first, suffix = match.groups()
  size = cycle if isinstance(cycle, int) else cycle[level.count("inner.")]
  stack = "layers" if stack == "groups" else stack
  return lambda n: f"{level}{stack}.{n * size + int(first)}.{suffix}"


def unflatten(arrays: dict[str, jax.Array], shapes: dict, *, cycle: int | tuple[int, ...]) -> dict:
  """The inverse of `flatten`, for a model of these shapes.

  Raises:
    ValueError: an array is missing, unknown or of another shape.
  """
  wanted = jax.eval_shape(functools.partial(flatten, cycle=cycle), shapes)
  if odd := sorted(wanted.keys() ^ arrays.keys()):
    there = "unknown" if odd[0] in arrays else "missing"
    raise ValueError(f"{MODEL}: {odd[0]} is {there}")
  if odd := [name for name in wanted if wanted[name].shape != arrays[name].shape]:
    raise ValueError(
      f"{MODEL}: {odd[0]} is {arrays[odd[0]].shape}, must be {wanted[odd[0]].shape} as in {CONFIG}"
    )

  def of(path, leaf):
    name = run.digest.name_of(path).replace("/", ".")
    if stacked := _stacked(name, cycle):
      return jnp.stack([arrays[stacked(n)] for n in range(leaf.shape[0])])
    return arrays[name]

  return jax.tree.map_with_path(of, shapes)
