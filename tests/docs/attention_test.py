"""The examples of docs/attention.md run, and its recipes are what they say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from pallas_kernels import sparse_attention
from sparse_flax.view import masks
from tests.helpers import recipes
from tests.helpers.arrays import assert_close

EXAMPLES = re.findall(r"```python\n(.*?)```", recipes.MANUAL.read_text(), re.DOTALL)
PATTERNS = {title: code for title, code in recipes.RECIPES.items() if "\npattern = " in code}
T = 256
i, j = np.arange(T)[:, None], np.arange(T)[None, :]
WIDE = np.kron(np.random.default_rng(0).random((16, 16)) < 3 / 16, np.ones((16, 16), bool))
KEYS = {  # by the first words of a recipe
  "A sliding": (j <= i) & ((i - j < 64) | (j < 4)),
  "A dilated": (j <= i) & (i - j < 64) & ((i - j) % 4 == 0),
  "Longformer": (abs(i - j) < 32) | (i < 16) | (j < 16),
  "BigBird": (abs(i - j) < 32) | (i < 16) | (j < 16) | WIDE,
  "A prefix": (j <= i) | (j < 50),
  "Neighbours": (j <= i) & (i // 16 - j // 16 <= 2) & (abs(i % 16 - j % 16) <= 2),
}


@pytest.mark.smoke(daily=5)
@pytest.mark.promotes
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, as_a_user):
  found = recipes.run(EXAMPLES[number])
  if "out" in found:
    assert np.isfinite(found["out"]).all()


@pytest.mark.parametrize("words", KEYS)
def test_recipes_allow_what_they_say(words):
  (source,) = (source for title, source in PATTERNS.items() if title.startswith(words))
  pattern = recipes.run(source)["pattern"]
  np.testing.assert_array_equal(pattern.mask(T), KEYS[words])


@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize("title", PATTERNS, ids=lambda title: title[:12])
def test_recipes_match_the_reference(title):
  pattern = recipes.run(PATTERNS[title])["pattern"]
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, 2, 8)), jnp.float32) for _ in range(3))

  def gradients(implementation):
    def loss(q, k, v):
      out = sparse_attention(q, k, v, pattern=pattern, implementation=implementation)
      return jnp.square(out).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

  for a, b in zip(
    *(jax.tree.leaves(gradients(name)) for name in ("xla", "reference")), strict=True
  ):
    assert_close(a, b, tolerance=1e-5, what=title)


def test_chosen_blocks_keep_the_order_of_time():
  """What comes after a token changes no bit of its output, and every token has keys."""
  (source,) = (source for title, source in recipes.RECIPES.items() if "chooses" in title)
  named = recipes.run(source)
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, 2, 16)), jnp.float32) for _ in range(3))
  attend = jax.jit(
    lambda q, k, v: sparse_attention(
      q, k, v, block_mask=named["route"](q, k), block_size=32, return_lse=True
    )
  )
  out, lse = attend(q, k, v)
  assert np.isfinite(lse).all()
  for u in range(1, T, 9):
    other = [x.at[:, u].set(rng.standard_normal(x.shape[2:]) * 5) for x in (q, k, v)]
    changed, _ = attend(*other)
    np.testing.assert_array_equal(changed[:, :u], out[:, :u], err_msg=str(u))
    assert (np.asarray(changed[:, u]) != np.asarray(out[:, u])).all()


@pytest.mark.promotes
def test_the_picture_shows_all_recipes(as_a_user):
  named = recipes.panels()
  names = {name.partition(", head")[0] for name, _ in named}
  without = [title for title in recipes.RECIPES if recipes.name(title) not in names]
  assert [title.partition(",")[0] for title in without] == ["Scores of any kind", "Learned slopes"]
  figure = masks.draw_tiles(named, tile=recipes.TILE)
  shown = {axes.get_title().replace("\n", " "): axes.get_images()[0] for axes in figure.axes}
  assert list(shown) == [name for name, _ in named] and len(named) == 10
  for words, keys in KEYS.items():
    (image,) = (image for name, image in shown.items() if name.startswith(words))
    blue, orange = ((image.get_array() == colour).all(-1) for colour in (masks.FIRST, masks.SECOND))
    np.testing.assert_array_equal(blue | orange, keys[: recipes.T, : recipes.T], err_msg=words)


@pytest.mark.promotes
def test_the_picture_in_the_manual_is_of_its_recipes(tmp_path, as_a_user):
  (words,) = re.findall(r"`python -m tests.helpers.recipes (\S*)`", recipes.MANUAL.read_text())
  old, new = recipes.MANUAL.parent.parent / words, tmp_path / "new.png"
  recipes.draw(new)
  a, b = (np.asarray(PIL.Image.open(path).convert("RGB"), float) for path in (old, new))
  # Other versions of matplotlib may draw letters otherwise.
  remedy = f"run python -m tests.helpers.recipes {words}"
  assert a.shape == b.shape and abs(a - b).mean() < 0.5, remedy
  assert new.stat().st_size < 200_000
