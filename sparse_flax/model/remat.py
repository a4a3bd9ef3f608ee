"""What the forward pass keeps for the backward pass, which computes all else again."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend.core import Jaxpr

from pallas_kernels import api
from pallas_kernels import hardware
from pallas_kernels import residual

REMATS = ("auto", "full", "attention", "block", "hidden", "dots", "none")
# Of a device's memory, at most, by what "auto" keeps. Weights, gradients, moments and averages, the
# logits, and what a block needs while it runs, have the rest (docs/notes/residual.md).
SHARE = 0.6
_SCOPE = "remat_as_"
# Kept in any case: computed again, a list may differ in a near tie from that of the saved result.
_ALWAYS = ("attention_blocks",)


class Widths(NamedTuple):
  """Columns of a block's arrays: the stream, q and k each, v, between the last two products."""

  E: int
  Q: int
  V: int
  F: int

  def kept(self, level: str) -> int:
    """Columns that a level keeps of a block: of its input, attention, q k v and h, u and f(u)."""
    parts = (self.E, self.V, 2 * self.Q + self.V + self.E, 2 * self.F)
    return sum(parts[: ("full", "attention", "block", "hidden").index(level) + 1])


def most_that_fits(widths: Widths, column_bytes: int) -> str:
  """The level that keeps most, within `SHARE` of a device's memory; "full" where that is unknown.

  Args:
    widths: of a block.
    column_bytes: what one column of all blocks takes on a device.
  """
  memory = hardware.memory() or 0
  fits = lambda level: widths.kept(level) * column_bytes <= SHARE * memory
  return next(filter(fits, ("hidden", "block", "attention")), "full")


def rematerialised(run_block: Callable, level: str, *, one_by_one: bool) -> Callable:
  """`run_block`, with the backward pass told what to compute again.

  Args:
    run_block: (residual stream, weights, bits) -> residual stream.
    level: what the forward pass keeps, one of REMATS but "auto".
    one_by_one: whether there are several blocks in the body of a scan, or no scan, so that a
      compiler would compute all again at once, and need memory for all.
  """

  def named(*args):
    with jax.named_scope(f"{_SCOPE}{level}"):
      return run_block(*args)

  if level == "none":
    return named
  policies = jax.checkpoint_policies
  if level == "dots":
    policy = policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable,  # products with weights, not scores of attention
      policies.save_only_these_names("attention_out", "attention_lse", *_ALWAYS),
    )
  else:
    policy = policies.save_only_these_names(*residual.KEPT[level], *_ALWAYS)
  # scan already keeps the compiler from merging the two computations; barriers keep an order.
  return jax.checkpoint(named, prevent_cse=one_by_one, policy=policy)


def level_in(program: Jaxpr) -> str:
  """What a traced program keeps, `jax.jit(f).trace(...).jaxpr`."""
  return ", ".join(api.scopes_in(program, _SCOPE))
