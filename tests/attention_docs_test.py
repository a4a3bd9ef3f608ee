"""The examples of docs/attention.md run, and its recipes are what they say."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse_attention
from tests.helpers import assert_close

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "attention.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
RECIPES = re.findall(r"\n([^\n]*):\n\n```python\n([^`]*\npattern = .*?)```", TEXT, re.DOTALL)
T = 256
i, j = np.arange(T)[:, None], np.arange(T)[None, :]
WIDE = np.kron(np.random.default_rng(0).random((16, 16)) < 3 / 16, np.ones((16, 16), bool))
KEYS = {  # by the first words of a recipe
  "A sliding": (j <= i) & ((i - j < 64) | (j < 4)),
  "A dilated": (j <= i) & (i - j < 256) & ((i - j) % 4 == 0),
  "Longformer": (abs(i - j) < 32) | (i < 16) | (j < 16),
  "BigBird": (abs(i - j) < 32) | (i < 16) | (j < 16) | WIDE,
  "A prefix": (j <= i) | (j < 50),
  "Neighbours": (j <= i) & (i // 16 - j // 16 <= 2) & (abs(i % 16 - j % 16) <= 2),
}


def names(tmp_path, source):
  path = tmp_path / "example.py"
  path.write_text(source)
  return runpy.run_path(str(path))


@pytest.mark.promotes
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, tmp_path, as_a_user):
  found = names(tmp_path, EXAMPLES[number])
  if "out" in found:
    assert np.isfinite(found["out"]).all()


@pytest.mark.parametrize("words", KEYS)
def test_recipes_allow_what_they_say(words, tmp_path):
  (source,) = (source for title, source in RECIPES if title.startswith(words))
  pattern = names(tmp_path, source)["pattern"]
  np.testing.assert_array_equal(pattern.mask(T), KEYS[words])


@pytest.mark.parametrize("title,source", RECIPES, ids=[title[:12] for title, _ in RECIPES])
def test_recipes_match_the_reference(title, source, tmp_path):
  pattern = names(tmp_path, source)["pattern"]
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
