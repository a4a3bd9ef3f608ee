"""Named attention cases, their random arrays, and comparisons that print what differs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import patterns
from pallas_kernels.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of sparse_attention."""

  pattern: Pattern
  T: int = 23
  B: int = 2
  H: int = 4
  Hkv: int = 4
  Dk: int = 8
  Dv: int = 8
  dtype: str = "float32"
  segments: int = 0
  S: int | None = None
  kv_segments: int = 0
  name: str = ""

  def __str__(self):
    parts = [self.name or type(self.pattern).__name__.lower(), f"T{self.T}", self.dtype]
    parts += [f"Hkv{self.Hkv}"] if self.Hkv != self.H else []
    parts += [f"D{self.Dk}"] if self.Dk != 8 else []
    parts += [f"Dv{self.Dv}"] if self.Dv != self.Dk else []
    parts += [f"S{self.S}"] if self.S is not None else []
    parts += ["segments"] * bool(self.segments) + ["kv_segments"] * bool(self.kv_segments)
    return "-".join(parts)

  @property
  def num_keys(self) -> int:
    return self.T if self.S is None else self.S

  def arrays(self, seed: int = 0):
    """q, k, v, segment ids (or None) and the cotangents of out and lse."""
    rng = np.random.default_rng([seed, self.T])
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), self.dtype)
    q = normal(self.B, self.T, self.H, self.Dk)
    k, v = (normal(self.B, self.num_keys, self.Hkv, D) for D in (self.Dk, self.Dv))
    ids = None
    if self.segments:  # packed: equal ids lie together
      ids = np.sort(rng.integers(0, self.segments, (self.B, self.T)), axis=1)
      ids = jnp.asarray(ids, jnp.int32)
    dout = normal(self.B, self.T, self.H, self.Dv)
    dlse = jnp.asarray(rng.standard_normal((self.B, self.T, self.H)), jnp.float32)
    return q, k, v, ids, dout, dlse

  def kv_ids(self, seed: int = 0):
    """Segment ids of keys (or None): some are no query's, and some queries' are no key's."""
    if not self.kv_segments:
      return None
    rng = np.random.default_rng([seed, self.num_keys, 1])
    ids = rng.integers(1, self.kv_segments + 1, (self.B, self.num_keys))
    return jnp.asarray(np.sort(ids, axis=1), jnp.int32)


_LAYOUT = np.random.default_rng(7).random((2, 6, 6)) < 0.4

EVERY_PATTERN = {
  "dense": patterns.Dense(),
  "local": patterns.Local(7),
  "column": patterns.Column(5),
  "strided": patterns.Strided(6),
  "block": patterns.Block(5),
  "summary": patterns.Summary(5, 2, 1),
  "fixed": patterns.Fixed(6, 2, 3),
  "per_head": patterns.PerHead((patterns.Local(4), patterns.Fixed(6, 2, 2))),
  "layout": patterns.BlockLayout(_LAYOUT, block_size=4),
  "where": patterns.Where(lambda i, j: (i * j) % 3 == 0),
  "union": patterns.Local(3) | patterns.Column(4),
  "union_of_fixed": patterns.Block(4) | patterns.Summary(4, 1),
  "union_of_any": patterns.Block(4) | patterns.Column(3),
  "intersection": patterns.Local(9) & patterns.Column(2),
}


def assert_close(got, expected, *, tolerance: float, what: str) -> None:
  """Compares with a tolerance relative to the largest expected value; infinities must agree."""
  got, expected = (np.asarray(x, np.float64) for x in (got, expected))
  assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
  np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), err_msg=what)
  finite = np.isfinite(expected)
  assert np.isfinite(got[finite]).all(), f"{what}: not finite"
  size = np.abs(expected[finite]).max(initial=1e-3)
  error = np.abs(got[finite] - expected[finite]).max(initial=0.0) / size
  assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"


def assert_near(got, expected, *, cotangent, tolerance: float, what: str) -> None:
  """Compares in the Euclidean norm, relative to `expected` or, where that vanishes, `cotangent`."""
  got, expected, cotangent = (np.asarray(x, np.float64) for x in (got, expected, cotangent))
  assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
  size = max(np.linalg.norm(expected), 1e-3 * np.linalg.norm(cotangent))
  error = np.linalg.norm(got - expected) / size
  assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"


def vjp_program(attend):
  """(q, k, v, dout, dlse) -> (out, lse, dq, dk, dv) of `attend`, compiled as one program."""

  @jax.jit
  def run(q, k, v, dout, dlse):
    (out, lse), vjp = jax.vjp(attend, q, k, v)
    return out, lse, *vjp((dout, dlse))

  return run


def jitted_vjp(attend, *arrays):
  """(out, lse, dq, dk, dv) of `attend`."""
  return vjp_program(attend)(*arrays)
