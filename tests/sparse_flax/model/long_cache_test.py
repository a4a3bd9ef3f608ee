"""Decoding at the paper's lengths, and what its compiled loop reads of the caches."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_flax.model import transformer
from sparse_flax.sample.generate import _start
from sparse_flax.sample.generate import run_steps
from tests.helpers.models import random_tokens
from tests.helpers.models import SMALL
from tests.helpers.models import small_model
from tests.sparse_flax.model.cache_test import assert_equal_logits
from tests.sparse_flax.model.cache_test import at_once
from tests.sparse_flax.model.cache_test import CYCLES
from tests.sparse_flax.model.cache_test import decoded_logits

# The paper's lengths, strides and positions, at a small width.
LONG = {
  "image": dict(modality="image", seq_len=3_072, stride=96, position_shape=(32, 32, 3)),
  "image64": dict(modality="image", seq_len=12_288, stride=128, position_shape=(64, 64, 3)),
  "text": dict(modality="text", seq_len=12_288, stride=128, position_shape=(96, 128)),
  "audio": dict(modality="audio", seq_len=4_096, stride=64, position_shape=(64, 64)),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
QUICK = {
  ("image", "heads-and-layers", "float32", "prompt"),
  ("image", "heads-and-layers", "bfloat16", "alone"),
}


@pytest.mark.one_day_in_six(4)
@pytest.mark.parametrize(
  "modality, cycle, dtype, prompt",
  [
    pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case not in QUICK))
    for case in itertools.product(LONG, CYCLES, ["float32", "bfloat16"], ["alone", "prompt"])
  ],
)
def test_at_the_lengths_of_the_paper(modality, cycle, dtype, prompt):
  sizes = dict(width=32, num_layers=4, num_heads=4, summary_width=16, sub_blocks=2)
  model = small_model(
    attention_layers=CYCLES[cycle],
    implementation="xla",
    compute_dtype=dtype,
    **sizes,
    **LONG[modality],
  )
  T = model.seq_len
  tokens = random_tokens(batch_size=1, length=T)
  P = 3 * T // 5 + 7 if prompt == "prompt" else 0
  with jax.numpy_dtype_promotion("standard"):
    got = decoded_logits(model, tokens, P=P)
  assert_equal_logits(got, at_once(model, tokens), TOLERANCE[dtype])


# ------------------------------------------------------------------------------------ compiled loop


class Loop:
  """The compiled loop of sampling from a model of two layers.

  Attributes:
    kept: bytes of the caches.
    read: bytes of what a step takes out of the caches of the cycle's layers, by the program.
    expected: the same by the patterns' rows.
    copies: instructions of the program that make a whole cache anew.
  """

  def __init__(self, T: int, *cycle: str, sparse: bool = True):
    stride, batch = round(T**0.5), 3
    sizes = dict(seq_len=T, stride=stride, position_shape=(T // stride, stride))
    graph, params = transformer.graph_and_shapes(
      **SMALL | sizes | dict(attention_layers=cycle, num_layers=2 * len(cycle))
    )
    start = functools.partial(_start, graph, sparse=sparse)
    carry = jax.eval_shape(start, params, jax.ShapeDtypeStruct((batch, 0), jnp.uint8))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    how = dict(temperature=1.0, top_k=None, top_p=1.0, implementation="xla")
    run = functools.partial(run_steps, graph, **how)
    known, lengths = jnp.zeros((batch, 64), jnp.uint8), jnp.zeros(batch, jnp.int32)
    lowered = jax.jit(run, donate_argnums=1).lower(params, carry, keys, 0, known, lengths)
    parts = [part for cache in carry[1] for part in cache]
    arrays = [(part, x) for part in parts for x in (part.key, part.value)]
    self.kept = sum(4 * x.size for _, x in arrays)
    layers = arrays[0][1].shape[0]
    self.expected = sum(4 * x.size // x.shape[3] * part.rows.size // layers for part, x in arrays)
    self.read, self.copies = _accesses(
      lowered.compile().as_text(), {f"f32[{','.join(map(str, x.shape))}]" for _, x in arrays}
    )


def _accesses(hlo: str, caches: set[str]) -> tuple[int, list[str]]:
  """Bytes taken out of arrays whose shapes are `caches`, and what makes such an array."""
  instruction = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (\w+\[[\d,]*\])\S* ([\w-]+)\(([^)]*)\)", re.M)
  found = instruction.findall(hlo)
  shape_of = {name: shape for name, shape, _, _ in found}
  read, copies = 0, []
  for name, shape, operation, operands in found:
    # What a fusion does stands in its own computation.
    if operation in ("parameter", "get-tuple-element", "tuple", "bitcast", "fusion", "call"):
      continue
    if operation == "dynamic-update-slice":
      continue  # in place: the row alone is written
    if shape in caches:
      copies.append(f"{name} = {shape} {operation}")
    named = (re.sub(r"/\*.*?\*/", "", x).strip().lstrip("%") for x in operands.split(","))
    if any(shape_of.get(x) in caches for x in named):
      read += 4 * math.prod(map(int, shape[shape.index("[") + 1 : -1].split(",")))
  return read, copies


@pytest.mark.one_day_in_three(1)
def test_a_strided_model_reads_and_copies_no_more_than_two_square_roots():
  lengths = (1_024, 4_096, 16_384, 65_536)
  loops = [Loop(T, "strided") for T in lengths]
  for T, loop in zip(lengths, loops, strict=True):
    assert loop.read == loop.expected and not loop.copies
    ring_and_columns = 2 * 2 * 3 * 2 * 6 * 4 * (round(T**0.5) + T)  # K, V; layers, B, H, D
    assert loop.kept == ring_and_columns
  exponent = np.polyfit(np.log(lengths), np.log([loop.read for loop in loops]), 1)[0]
  assert abs(exponent - 0.5) < 0.05


@pytest.mark.parametrize("cycle", [("local", "column"), ("fixed",), ("dense",)], ids=str)
def test_other_models_read_their_rows_and_copy_nothing(cycle):
  loop = Loop(1_024, *cycle)
  assert loop.read == loop.expected and not loop.copies


def test_dense_caches_are_seen_to_be_read_whole():
  loop = Loop(1_024, "strided", sparse=False)
  assert loop.read == loop.kept // 2 == 2 * 3 * 2 * 6 * 4 * 1_024
