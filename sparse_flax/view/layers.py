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
  names = " / ".join(pattern_names(model, layer))
  labels = dict(
    title=f"layer {layer}, {names}: where its heads attend\n(shade: root of the weight)",
    heads=head_names(model, layer),
  )
  at = [int(place) for place in places]
  if model.modality == "image":
    return draw_lib.draw_image(tokens.reshape(model.position_shape), at, weights, **labels)
  by_modality = dict(text=draw_lib.draw_text, audio=draw_lib.draw_audio)
  return by_modality[model.modality](tokens, at, weights[:, :, 0], **labels)


def pattern_names(model, layer: int) -> tuple[str, ...]:
  """Of the patterns of a layer, one per group of neighbouring heads."""
  entry = model.attention_layers[layer % len(model.attention_layers)]
  return (entry,) if isinstance(entry, str) else tuple(entry)


def head_names(model, layer: int) -> list[str]:
  """Number and pattern of each head of a layer."""
  names = pattern_names(model, layer)
  per_name = model.num_heads // len(names)
  return [f"head {h}, {names[h // per_name]}" for h in range(model.num_heads)]
