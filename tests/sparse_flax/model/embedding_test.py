"""Which table rows meet in which slot, and the shift by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax.model import embedding
from tests.helpers.models import nnx_mode  # noqa: F401

WIDTH = 4


def make_embedding(position_shape, dtype=jnp.float32):
  normal = nnx.initializers.normal(1.0)
  return embedding.Embedding(
    width=WIDTH,
    position_shape=position_shape,
    dtype=dtype,
    token_init=normal,
    position_init=normal,
    rngs=nnx.Rngs(0),
  )


def table(embed):
  return np.asarray(embed.embedding[...])


@pytest.mark.parametrize(
  "shape, digits",
  [
    ((4, 4, 3), lambda i: (i // 12, i // 3 % 4, i % 3)),  # CIFAR-10: i // 96, i // 3 % 32, i % 3
    ((5, 8), lambda i: (i // 8, i % 8)),  # text of stride 8
  ],
  ids=["image", "text"],
)
def test_slot_t_holds_byte_and_position_of_t_minus_1(shape, digits, nnx_mode):  # noqa: F811
  model = make_embedding(shape)
  T = int(np.prod(shape))
  tokens = np.random.default_rng(0).integers(0, 256, (2, T))
  got = np.asarray(model(jnp.asarray(tokens)))
  for t in range(1, T):
    rows = [table(p)[digit] for p, digit in zip(model.positions, digits(t - 1), strict=True)]
    np.testing.assert_allclose(got[:, t], table(model.tokens)[tokens[:, t - 1]] + sum(rows), 1e-6)
  np.testing.assert_array_equal(got[:, 0], np.tile(np.asarray(model.start)[0], (2, 1)))


def test_bytes_of_any_integer_type_embed_alike():
  model = make_embedding((2, 3))
  tokens = np.array([[0, 127, 128, 254, 255, 7]])
  expected = model(jnp.asarray(tokens, jnp.int32))
  np.testing.assert_array_equal(model(jnp.asarray(tokens, jnp.uint8)), expected)


def test_a_decode_step_gives_one_slot():
  model = make_embedding((3, 4))
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
  slots = model(tokens)
  for step in range(12):
    got = model.decode_step(tokens[:, step - 1], jnp.asarray(step))
    np.testing.assert_allclose(got, slots[:, step], rtol=1e-6)


def test_sums_are_taken_before_rounding_to_the_compute_dtype():
  tokens = jnp.zeros((1, 4), jnp.int32)
  exact = make_embedding((2, 2))(tokens)
  rounded = make_embedding((2, 2), dtype=jnp.bfloat16)(tokens)
  np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


def test_a_sequence_longer_than_the_tables_is_refused():
  with pytest.raises(ValueError, match=r"T=7 tokens .* position_shape=\(2, 3\)"):
    make_embedding((2, 3))(jnp.zeros((1, 7), jnp.int32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_tables_are_the_sums_over_their_rows(dtype):
  """In float32 also where the stream is not, and against sums in float64 one by one."""
  T, dtype = 12, jnp.dtype(dtype)
  model = make_embedding((3, 4), dtype)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 5, (64, T))  # each row of the table 150 times
  weights = jnp.asarray(rng.normal(size=(64, T, WIDTH)), dtype)
  graphdef, params = nnx.split(model, nnx.Param)
  loss = lambda params: (nnx.merge(graphdef, params)(jnp.asarray(tokens)) * weights).sum()
  grads = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
  exact, total = np.asarray(weights, np.float64), jax.tree.map(np.zeros_like, grads)
  for b, t in np.ndindex(64, T):
    if t == 0:
      total["start"][0, 0] += exact[b, t]
      continue
    rows = (
      (total["tokens"], tokens[b, t - 1]),
      *zip(total["positions"].values(), ((t - 1) // 4, (t - 1) % 4), strict=True),
    )
    for sums, row in rows:
      sums["embedding"][row] += exact[b, t]
  for (path, grad), (_, sums) in zip(
    jax.tree.leaves_with_path(grads), jax.tree.leaves_with_path(total), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert grad.dtype == jnp.float32, name
    np.testing.assert_allclose(grad, sums, atol=2e-5, err_msg=name)


def test_no_gradient_is_scattered():
  model = make_embedding((3, 4), jnp.bfloat16)
  graphdef, params = nnx.split(model, nnx.Param)
  tokens = jnp.zeros((2, 12), jnp.uint8)
  loss = lambda params: nnx.merge(graphdef, params)(tokens).sum().astype(jnp.float32)
  text = jax.jit(jax.grad(loss)).lower(params).as_text()
  assert "scatter" not in text and text.count("dot_general") == 3
