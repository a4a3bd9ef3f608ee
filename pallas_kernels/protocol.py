"""What `sparse_attention` asks of a backend: the functions of `xla`, `mosaic_gpu`, `mosaic_tpu`.

A backend is a module. It gets the `Plan` of a call, which is static, and its `Arrays`, which may be
traced; it keeps nothing between calls.
"""

from typing import Any
from typing import Protocol
from typing import runtime_checkable

from jaxtyping import Array
from jaxtyping import Float

from pallas_kernels.lowering.plan import Arrays
from pallas_kernels.lowering.plan import Plan


@runtime_checkable
class Backend(Protocol):
  """How a backend computes attention, and its gradients.

  A residual is the log-sum-exp in whatever form the backward pass wants it; with
  `plan.return_mass`, which backends may refuse, the natural one and the mass; of a backend with a
  function `mass_of` (plan, arrays, natural lse) the mass is that one's result. Queries without keys
  have results of zeros and a natural log-sum-exp of -inf, and no gradient.
  """

  def unsupported(self, plan: Plan) -> str | None:
    """Why this backend cannot compute a call, and what it can; None where it can."""

  def takes_lists(self, plan: Plan) -> bool:
    """Whether it reads lists of blocks as they are: else a block mask is made of them."""

  def planned(self, plan: Plan) -> Plan:
    """The plan of a call that is supported, with groups of heads and what sweeps them."""

  def forward(self, plan: Plan, arrays: Arrays) -> tuple[Float[Array, "B T H Dv"], Any]:
    """The result, and a residual."""

  def natural_lse(self, plan: Plan, residual: Any) -> Float[Array, "B T H"]:
    """The natural log-sum-exp, from what `forward` returned."""

  def lse_of_natural(self, plan: Plan, lse: Float[Array, "B T H"]) -> Any:
    """What `forward` returned, from the natural log-sum-exp."""

  def backward(
    self,
    plan: Plan,
    arrays: Arrays,
    out: Float[Array, "B T H Dv"],
    residual: Any,
    dout: Float[Array, "B T H Dv"],
    dlse: Float[Array, "B T H"] | None,
    dmass: Float[Array, "B T H top"] | None = None,
  ) -> Arrays:
    """Gradients of q, of k and v per key head, and of what `plan.scores.learned` says of `held`.

    Args:
      plan: as `forward` had it.
      arrays: likewise.
      out, residual: what `forward` returned.
      dout: the cotangent of `out`.
      dlse: of the natural log-sum-exp; None where nothing depends on it.
      dmass: of the mass, given with `plan.return_mass` alone: backends that refuse it do without.
    """
