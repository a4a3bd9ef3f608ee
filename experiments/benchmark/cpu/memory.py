"""The published memory table of dense attention, and what XLA needs for dense and strided.

First the eight cells of the authors' announcement (64 layers, 4 heads, batch 1) beside the formula
behind them: stored 4 H N n^2 bytes, recomputed 4 H n^2. Then the compiled, not run, gradient of a
model of width 64 with 4 heads in float32: dense with `reference`, strided with `xla`.
"""

import pathlib

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmark import report
from sparse_flax import evaluate
from sparse_flax.model import transformer

HEADS, LAYERS = 4, 64
# What, n, GB stored as published, GB recomputed as published.
PUBLISHED = (
  ("text", 1_024, 1.0, 0.016),
  ("CIFAR-10 image", 3_072, 9.6, 0.151),
  ("ImageNet-64 image", 12_288, 154.0, 2.4),
  ("2 s of 12 kHz audio", 24_000, 590.0, 9.2),
)
STRIDE = {1_024: 32, 3_072: 96}
DEPTHS = (4, 16, 64)
CASES = (("dense", "reference"), ("strided", "xla"))


def stored_bytes(n: int, *, num_layers: int = LAYERS) -> int:
  """One float32 n x n matrix of attention weights per head and layer."""
  return 4 * HEADS * num_layers * n**2


def recomputed_bytes(n: int) -> int:
  """The matrices of one layer: those of the others are computed again when they are needed."""
  return stored_bytes(n, num_layers=1)


def compiled_bytes(pattern: str, implementation: str, *, n: int, depth: int, remat: str) -> int:
  """Peak memory of the compiled gradient: arguments + outputs + temporaries - aliases."""
  build = lambda: transformer.SparseTransformer(
    modality="text",
    seq_len=n,
    width=64,
    num_layers=depth,
    num_heads=HEADS,
    attention_layers=(pattern,),
    stride=STRIDE[n],
    position_shape=(n // STRIDE[n], STRIDE[n]),
    remat=remat,
    compute_dtype="float32",
    implementation=implementation,
    rngs=nnx.Rngs(0),
  )
  graphdef, params = nnx.split(nnx.eval_shape(build), nnx.Param)

  def loss(params, tokens):
    return evaluate.token_nats(nnx.merge(graphdef, params)(tokens), tokens).mean()

  tokens = jax.ShapeDtypeStruct((1, n), jnp.uint8)
  return report.num_bytes(jax.jit(jax.grad(loss)).lower(params, tokens).compile())


def run(out: pathlib.Path) -> None:
  """Prints both tables and writes memory_<backend>.json."""
  print(__doc__, flush=True)
  published = []
  for what, n, stored, recomputed in PUBLISHED:
    for kind, size, seen in (
      ("stored", stored_bytes(n), stored),
      ("recomputed", recomputed_bytes(n), recomputed),
    ):
      cell = dict(input=what, seq_len=n, how=kind, formula_bytes=size, published_gb=seen)
      published.append(cell)
  table = [
    (c["input"], f"{c['seq_len']:,}", c["how"], f"{c['formula_bytes']:,}",
     f"{c['formula_bytes'] / 1e9:.3f} GB", f"{c['published_gb']} GB")
    for c in published
  ]  # fmt: skip
  report.print_table(("input", "n", "weights", "formula, bytes", "formula", "published"), table)

  print("\nXLA's memory_analysis(), gradient of a model with 4 heads, batch 1 (MB)")
  rows, table = [], []
  for n in STRIDE:
    for pattern, implementation in CASES:
      for remat in ("none", "full"):
        sizes = [
          compiled_bytes(pattern, implementation, n=n, depth=depth, remat=remat) for depth in DEPTHS
        ]
        for depth, size in zip(DEPTHS, sizes, strict=True):
          case = dict(pattern=pattern, implementation=implementation, remat=remat)
          rows.append(dict(seq_len=n, depth=depth, **case, bytes=size))
        figures = [f"{size / 1e6:,.1f}" for size in sizes]
        table.append((f"{pattern}, {implementation}", f"{n:,}", remat, *figures))
  header = ("attention", "n", "remat", *(f"{depth} layers" for depth in DEPTHS))
  report.print_table(header, table)
  report.write(out / f"memory_{jax.default_backend()}.json", rows, published=published)
