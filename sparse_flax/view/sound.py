"""Sounds as curves over time."""

import numpy as np
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Integer
from jaxtyping import UInt8

from sparse_flax import data

RATE = data.SAMPLE_RATE  # tokens a second


def seconds(place: int | Integer[np.ndarray, "*P"]) -> float | Float[np.ndarray, "*P"]:
  """When the token at a place begins."""
  return place / RATE


def waveform(
  tokens: UInt8[np.ndarray, "T"],
) -> tuple[Float[np.ndarray, "T"], Float32[np.ndarray, "T"]]:
  """(seconds, pressure) of mu-law codes."""
  return seconds(np.arange(len(tokens))), data.mu_law_decode(tokens)
