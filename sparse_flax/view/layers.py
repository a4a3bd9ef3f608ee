"""Pictures of where the heads of a model's layers attend to predict some places of one input."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from flax import nnx
from jaxtyping import Float32
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax.model import levels
from sparse_flax.model import order as order_lib
from sparse_flax.view import draw as draw_lib
from sparse_flax.view import maps


def weights(
  graphdef: nnx.GraphDef,
  params: dict,
  tokens: UInt8[np.ndarray, "T"],
  places: Integer[np.ndarray, "P"],
  layout: maps.Layout,
) -> Float32[np.ndarray, "L P H C T"]:
  """The weights with which every layer and head attends, for the C tokens of each place.

  Args:
    graphdef: of a SparseTransformer.
    params: its weights.
    tokens: the input.
    places: pixels of a picture, bytes of a text, samples of a sound.
    layout: of the model.
  """
  run = _program(graphdef, tuple(layout.slots(places).tolist()))
  found = np.asarray(run(params, jnp.asarray(tokens[None])))[:, 0]  # [L, H, P C, T]
  found = np.asarray(layout.in_rows(found))
  shape = *found.shape[:2], len(places), layout.channels, found.shape[-1]
  return found.reshape(shape).swapaxes(1, 2)


@functools.lru_cache(maxsize=4)
def _program(graphdef: nnx.GraphDef, rows: tuple[int, ...]) -> Callable:
  """Jitted, once for who looks at the same places again and again."""
  run = lambda params, tokens: nnx.merge(graphdef, params).attention_weights(tokens, np.array(rows))
  return jax.jit(run)


def draw(
  model,
  layer: int,
  tokens: UInt8[np.ndarray, "T"],
  places: Integer[np.ndarray, "P"],
  weights: Float32[np.ndarray, "P H C T"],
) -> matplotlib.figure.Figure:
  """One layer's heads, as `draw_image`, `draw_text` or `draw_audio` shows them.

  Args:
    model: `config.model`.
    layer: its number, from 0.
    tokens: the input.
    places: as for `weights`.
    weights: those of the layer.
  """
  names = row_name(model, layer) + " / ".join(pattern_names(model, layer))
  labels = dict(
    title=f"layer {layer}, {names}: where its heads attend\n(shade: root of the weight)",
    heads=head_names(model, layer),
  )
  at, weights = [int(place) for place in places], weights[:, : len(labels["heads"])]
  if model.modality == "image":
    order = order_lib.Order.of(model)
    return draw_lib.draw_image(
      order.drawn(tokens).reshape(model.position_shape), at, weights, **labels
    )
  by_modality = dict(text=draw_lib.draw_text, audio=draw_lib.draw_audio)
  return by_modality[model.modality](tokens, at, weights[:, :, 0], **labels)


def level_of(model, layer: int) -> tuple[levels.Spec, int]:
  """The level that a layer belongs to, and its number in the cycle of the level's patterns.

  Layers count in the order in which they run: those before an inner level, its own, those behind.
  """
  found = levels.specs_of(**model)
  first, last = 0, sum(level.depth for level in found)
  for level in found:
    begin, end = first + level.num_layers, last - level.num_layers_after
    if layer < begin or end <= layer:
      number = layer - first if layer < begin else layer - end
      return level, number % len(level.patterns)
    first, last = begin, end
  raise ValueError(f"{layer=}: must be a number from 0 to {num_layers(model) - 1}")


def num_layers(model) -> int:
  """Of all levels."""
  return sum(level.depth for level in levels.specs_of(**model))


def most_heads(model) -> int:
  """Heads of a layer of the level that has most."""
  return max(level.num_heads for level in levels.specs_of(**model))


def pattern_names(model, layer: int) -> tuple[str, ...]:
  """Of the patterns of a layer, one per group of neighbouring heads."""
  level, number = level_of(model, layer)
  entry = level.attention_layers[number]
  return (entry,) if isinstance(entry, str) else tuple(entry)


def head_names(model, layer: int) -> list[str]:
  """Number and pattern of each head of a layer."""
  names, num_heads = pattern_names(model, layer), level_of(model, layer)[0].num_heads
  per_name = num_heads // len(names)
  return [f"head {h}, {names[h // per_name]}" for h in range(num_heads)]


def row_name(model, layer: int) -> str:
  """ "" of the outermost level, and else what a row of the layer's level is."""
  level = level_of(model, layer)[0]
  return f"groups of {level.factor}, " if level.name else ""
