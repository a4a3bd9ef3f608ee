"""All sums over rows that are left when a half of a block is differentiated, by two kernels.

Gradients of weights of a narrow stream are bound by memory: their products of all rows are one
kernel, which leaves parts of them (outer.py); these, and what the kernels before have left in
parts, are added by another one (totals.py). Where the stream is wider cuBLAS is at its peak, but
for gradients of few columns: they fill the device only if the rows are cut, which its first choice
does not do, and XLA reads the factors again for sums of their columns.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float32

from pallas_kernels.residual import outer
from pallas_kernels.residual import totals
from pallas_kernels.residual import xla
from pallas_kernels.residual.outer import Cut
from pallas_kernels.residual.outer import Product

WIDEST, WIDEST_OF_BOTH = 256, 512  # of streams, and of both factors, whose gradients are made here
CUTS = Cut(), Cut(height=128)  # the second fits all widths that are multiples of 128


class Sums(NamedTuple):
  """Attributes:
  weights: A^T B for each B of each product.
  biases: sums of the columns of each B.
  totals: of arrays that came in parts.
  """

  weights: list[Float32[Array, "_ _"]]
  biases: list[Float32[Array, " _"]]
  totals: list[Float32[Array, "..."]]


def over_rows(
  E: int,
  products: Sequence[Product],
  parts: Sequence[Float32[Array, "_ ..."]],
  *,
  biases: bool = False,
) -> Sums:
  """All sums of a half of a block, in float32.

  Args:
    E: width of the stream.
    products: the gradients of weights.
    parts: what is to be summed over its first axis.
    biases: whether the columns of B are summed.
  """
  ours = [E <= WIDEST or widest(product) <= WIDEST_OF_BOTH for product in products]
  if not any(ours):
    return by_xla(products, parts, biases=biases)
  here = list(itertools.compress(products, ours))
  made = by_kernels(here, parts, cut_of(here), biases=biases)
  others = [product for product, is_ours in zip(products, ours, strict=True) if not is_ours]
  left = by_xla(others, [], biases=biases)

  def in_order(made: list, left: list) -> list:
    results = {True: iter(made), False: iter(left)}
    owners = [is_ours for (_, bs), is_ours in zip(products, ours, strict=True) for _ in bs]
    return [next(results[is_ours]) for is_ours in owners]

  of_biases = in_order(made.biases, left.biases) if biases else []
  return Sums(in_order(made.weights, left.weights), of_biases, made.totals)


def widest(product: Product) -> int:
  """Columns of the widest factor."""
  return max(x.shape[1] for x in (product.a, *product.b))


def cut_of(products: Sequence[Product]) -> Cut:
  """How the products of a half of a block are cut."""
  return next(cut for cut in CUTS if outer.misfit(products, cut) is None)


def by_xla(
  products: Sequence[Product],
  parts: Sequence[Float32[Array, "_ ..."]],
  *,
  biases: bool = False,
) -> Sums:
  """`over_rows` by XLA: a product for each weight, and a sum for each of all else."""
  pairs = [(a, b) for a, bs in products for b in bs]
  return Sums(
    [xla.outer(a, b) for a, b in pairs],
    [xla.column_sums(b) for _, b in pairs] if biases else [],
    [x.sum(axis=0) for x in parts],
  )


def by_kernels(
  products: Sequence[Product],
  parts: Sequence[Float32[Array, "_ ..."]],
  cut: Cut,
  *,
  biases: bool = False,
) -> Sums:
  """`over_rows` by the kernels for Hopper."""
  of_weights, of_biases = outer.parts(products, cut, sums=biases)
  # What has most parts takes longest, so it comes first.
  groups = parts, of_biases, of_weights
  results = iter(totals.totals([x for group in groups for x in group]))
  others, joint, weights = (list(itertools.islice(results, len(group))) for group in groups)
  ends = itertools.accumulate(b.shape[1] for _, bs in products for b in bs)
  return Sums(weights, [b for x in joint for b in jnp.split(x, list(ends)[:-1])], others)
