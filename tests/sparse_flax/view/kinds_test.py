"""Heads whose attention is planted get the name of what was planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax.view import averages as averages_lib
from sparse_flax.view import kinds
from sparse_flax.view import maps as maps_lib

LAYOUT = maps_lib.Layout("image", 192, 8, 8, 3)
TEXT = maps_lib.Layout("text", 64, 8, 8)
PLACES = np.array([20, 30, 36, 45, 63])
NUM = 6


def planted(name, tokens, rows, layout):
  """Attention [B, Q, T] of one head: slot j holds token j - 1; of texts, slots make the blocks."""
  slots = np.arange(layout.seq_len)
  tokens_at = slots - 1 if layout.modality == "image" else slots
  y, x = np.divmod(tokens_at // layout.channels, layout.columns)
  own_y, own_x = np.divmod(rows[:, None] // layout.channels, layout.columns)
  seen = (slots > 0) & (slots <= rows[:, None])
  match name:
    case "rows":
      chosen = (y == own_y) & seen
    case "columns":
      chosen = (y < own_y) & (x == own_x) & seen
    case "positional memory":
      chosen = (slots == 8) | (slots == 12)
    case "start":
      chosen = slots == 0
    case "everywhere":
      chosen = seen
    case "data-dependent":  # one slot among the first 24, which the first byte chooses
      chosen = tokens[:, :1, None].astype(jnp.int32) % 24 + 1 == slots[None, None]
  chosen = jnp.broadcast_to(chosen, (len(tokens), len(rows), layout.seq_len)).astype(jnp.float32)
  return chosen / jnp.maximum(chosen.sum(axis=-1, keepdims=True), 1.0)


class Planted(nnx.Module):
  """Has the attention of its layers, tuples of names of heads, and nothing else of a model."""

  def __init__(self, layers, layout):
    self.layers, self.layout = layers, layout

  def attention_weights(self, tokens, rows, *, reduce):
    heads = lambda names: [planted(name, tokens, rows, self.layout) for name in names]
    results = [reduce(jnp.stack(heads(names), axis=1)) for names in self.layers]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def inputs_for(layout):
  inputs = np.random.default_rng(0).integers(0, 256, (NUM, layout.seq_len)).astype(np.uint8)
  inputs[:, 0] = 4 * np.arange(NUM)  # other places for each
  return inputs


def averages_of(model, inputs, layout):
  graphdef, params = nnx.split(model, nnx.Param)
  return averages_lib.average(graphdef, nnx.to_pure_dict(params), inputs, PLACES, layout)


def told(*layers, layout=LAYOUT, inputs=None):
  inputs = inputs_for(layout) if inputs is None else inputs
  averages = averages_of(Planted(layers, layout), inputs, layout)
  return kinds.kinds_of(averages, [[f"head {h}" for h in range(len(x))] for x in layers])


NAMES = ("rows", "columns", "positional memory", "data-dependent")


@pytest.mark.parametrize("layout", [LAYOUT, TEXT], ids=["image", "text"])
def test_planted_heads_get_their_names(layout):
  found = told(NAMES, NAMES[::-1], layout=layout)
  assert [[head["kind"] for head in layer["heads"]] for layer in found] == [
    list(NAMES),
    list(NAMES[::-1]),
  ]
  rows, columns, memory, data = found[0]["heads"]
  assert (rows["recent"], columns["above"], memory["change"], data["change"]) == (1, 1, 0, 1)
  assert found[0]["kind"] == " and ".join(NAMES) and found[1]["layer"] == 1


def test_what_was_planted_by_mistake_gets_another_name():
  # The same for all inputs: nothing depends on the data.
  same = np.repeat(inputs_for(LAYOUT)[:1], NUM, axis=0)
  assert told(("data-dependent",), inputs=same)[0]["kind"] == "positional memory"
  # Attention of a picture of half the width: its columns are none of this one's.
  other = maps_lib.Layout("image", 192, 16, 4, 3)
  averages = averages_of(Planted((("columns",),), other), inputs_for(LAYOUT), LAYOUT)
  (layer,) = kinds.kinds_of(averages, [["head 0"]])
  assert layer["kind"] != "columns" and layer["heads"][0]["above"] < 0.8


def test_the_start_and_what_is_spread_evenly_are_the_same_places_for_every_input():
  (layer,) = told(("start", "everywhere"))
  start, everywhere = layer["heads"]
  assert (start["kind"], start["start"]) == ("positional memory", 1.0)
  assert (everywhere["kind"], everywhere["start"]) == ("positional memory", 0.0)
  assert layer["kind"] == "positional memory"  # once


@pytest.mark.parametrize(
  "above, recent, change, kind",
  [
    (0.5, 0.5, 1.0, "columns"),
    (0.49, 0.5, 1.0, "rows"),
    (0.49, 0.49, 0.5, "data-dependent"),
    (0.49, 0.49, 0.49, "mixed"),
    (0.0, 0.0, 0.25, "positional memory"),
  ],
)
def test_the_rule(above, recent, change, kind):
  assert kinds.kind_of(above=above, recent=recent, change=change) == kind
  assert set(kinds.RULE) == {*NAMES, "mixed"}


@pytest.mark.parametrize("column", [0, 4])
def test_shares_of_the_patterns_of_images(column):
  # What columns and local attention of a row, 24 bytes, read for a pixel from the byte before on.
  weights = np.zeros((2, 2, 3, 192), np.float32)
  place = 8 * 4 + column
  slots = 3 * place + np.arange(3)
  for channel, slot in enumerate(slots):
    weights[:, 0, channel, slot - 24 * np.arange(1, 4)] = 1 / 3
    weights[:, 1, channel, slot - np.arange(24)] = 1 / 24
  sums = averages_lib._sums(jnp.asarray(weights), np.array([place]), LAYOUT)
  above, recent = np.asarray(sums["above"]) / 2, np.asarray(sums["recent"]) / 2
  # Red is read from the column to the left: in the first one, from the end of the row above.
  np.testing.assert_allclose(above[0], 1, rtol=1e-6)
  np.testing.assert_allclose(recent[1], 1, rtol=1e-6)  # the pixel above counts
  assert recent[0] < 0.5 and above[1] < 0.5


def test_one_input_tells_no_kind():
  with pytest.raises(ValueError, match="num_inputs=1: must be at least 2"):
    told(("rows",), inputs=inputs_for(LAYOUT)[:1])


def test_the_table_has_a_line_for_each_head():
  layers = told(("rows", "data-dependent"), ("start", "rows"))
  head, row, *others, rule = kinds.table(layers).split("\n")
  assert head.split() == ["layer", "head", "kind", "above", "last", "row", "start", "changes"]
  words = [" ".join(line.split()) for line in (row, *others)]
  assert words[0] == "0 rows and data-dependent head 0 rows 0 % 100 % 0 % 0 %"
  assert len(words) == 4 and words[1].startswith("head 1 data-dependent ")
  assert rule == (
    "columns: above >= 50 %; else rows: last row >= 50 %; else data-dependent: changes >= 50 %; "
    "else positional memory: changes <= 25 %; else mixed"
  )
