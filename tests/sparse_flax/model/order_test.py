"""The order of an image's bytes: a permutation, inverted wherever an image is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import cifar10
from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax.model import order as order_lib
from sparse_flax.view import maps
from tests.helpers.models import small_model

SHAPE = (4, 6, 3)
PATCHES = order_lib.Order("patches", SHAPE, 2)
IMAGE = dict(
  modality="image", seq_len=72, position_shape=SHAPE, attention_layers=("dense",), num_layers=1
)


def test_patches_follow_each_other_and_the_inverse_undoes_it():
  image = np.arange(72, dtype=np.uint8).reshape(SHAPE)
  read = PATCHES.read(image.reshape(-1))
  np.testing.assert_array_equal(read[:12], image[:2, :2].reshape(-1))
  np.testing.assert_array_equal(read[12:24], image[:2, 2:4].reshape(-1))
  np.testing.assert_array_equal(read[36:48], image[2:, :2].reshape(-1))
  np.testing.assert_array_equal(PATCHES.drawn(read), image.reshape(-1))
  np.testing.assert_array_equal(PATCHES.places[PATCHES.tokens_at], np.arange(72))
  np.testing.assert_array_equal(PATCHES.tokens_at[PATCHES.places], np.arange(72))
  assert PATCHES.places[-1] == 71  # else a picture's slots would not be those of its rows
  plain = order_lib.Order("raster", SHAPE)
  assert plain.read(image) is image and plain.drawn(image) is image


def test_slots_have_the_positions_of_their_bytes():
  model, plain = small_model(**IMAGE, order="patches"), small_model(**IMAGE)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 72)), jnp.uint8)
  raster = jnp.asarray(PATCHES.drawn(np.asarray(tokens)))
  # A slot holds the byte before it, with that byte's position: moved in the same way.
  ordered, in_rows = model.embedding(tokens)[0, 1:], plain.embedding(raster)[0, 1:]
  np.testing.assert_array_equal(ordered, in_rows[PATCHES.places[:-1]])
  step = model.embedding.decode_step(tokens[:, 30], jnp.asarray(31))
  np.testing.assert_allclose(step[0], ordered[30], atol=1e-6)


def test_the_likelihood_of_an_image_is_that_of_its_permuted_bytes():
  """A model of patches scores what a loop over the permuted bytes does."""
  model = small_model(**IMAGE, order="patches")
  images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)
  config = cifar10.get_config("quick").copy_and_resolve_references()
  with config.unlocked():
    config.model.update(IMAGE | dict(order="patches"))
  images_of = data.of_arrays(images, split="test", modality="image")
  dataset = evaluate.checked(images_of, config)
  assert dataset.identity == images_of.identity and images_of.places is None
  ((tokens, scored),) = data.eval_batches(dataset, seq_len=72, min_context=0, batch_size=2)
  assert scored.all()
  logits = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))
  probabilities = jax.nn.softmax(logits, axis=-1)
  nats = evaluate.token_nats(logits, jnp.asarray(tokens)).sum(axis=1)
  for image, of_model, total in zip(
    images.reshape(2, -1), np.asarray(probabilities), nats, strict=True
  ):
    wanted = -sum(np.log(of_model[t, image[place]]) for t, place in enumerate(PATCHES.places))
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_training_reads_the_same_images_in_the_other_order_and_mirrors_first():
  images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE)).astype(np.uint8)
  plain = data.of_arrays(images, split="train", modality="image")
  options = dict(seq_len=72, batch_size=6, seed=0, mirror=True)
  batch = data.make_batches(plain, **options)(0)
  np.testing.assert_array_equal(
    data.make_batches(plain.read_at(PATCHES.places), **options)(0), PATCHES.read(batch)
  )


def test_maps_of_attention_are_on_the_bytes_that_are_seen():
  layout = maps.Layout("image", 72, *SHAPE, order=PATCHES)
  pixel = np.array([8])  # row 1, column 2
  np.testing.assert_array_equal(PATCHES.places[layout.slots(pixel)], [24, 25, 26])
  model = small_model(**IMAGE, order="patches", init_scheme="code")
  weights = model.attention_weights(jnp.zeros((1, 72), jnp.uint8), layout.slots(pixel))
  shown = np.asarray(maps.of_pixels(layout.in_rows(weights[0, 0]), layout))[:, 0]
  # The patch before, of columns 0 and 1, is seen whole; rows 2 and 3 come later.
  assert (shown[:, :2, :2] > 0).all() and not shown[:, 2:].any()
  assert (shown[:, 0, 2:4] > 0).all() and not shown[:, :2, 4:].any()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(order="snake"), "order='snake': must be one of"),
    (dict(order="patches", patch=4), "patch=4: must divide 4 rows and 6 columns"),
    (dict(order="patches", rope="axes", num_heads=1), "rope='axes': must be 'none' or 'tokens'"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mistake_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(lambda: small_model(**IMAGE | change))


def test_texts_have_no_patches():
  with pytest.raises(ValueError, match="order='patches': must be 'raster'"):
    nnx.eval_shape(lambda: small_model(order="patches"))
