"""The entry point: `sparse_attention` checks its arguments, plans the call and runs a backend."""

import dataclasses
import functools
import logging
import math
import numbers
import re
from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import NamedTuple
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr
from jax.extend.core import Jaxpr
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Integer

from pallas_kernels import hardware
from pallas_kernels import offset
from pallas_kernels import partitioning
from pallas_kernels import protocol
from pallas_kernels import reference
from pallas_kernels import segments
from pallas_kernels import xla
from pallas_kernels.lowering import indices
from pallas_kernels.lowering import plan as plans
from pallas_kernels.patterns import check as check_pattern
from pallas_kernels.patterns import Dense
from pallas_kernels.patterns import Pattern
from pallas_kernels.scores import Scores

Implementation = Literal["reference", "xla", "mosaic_gpu", "mosaic_tpu"]

IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")

logger = logging.getLogger(__name__)


class Attended(NamedTuple):
  """What `sparse_attention` gives with `return_mass`.

  Attributes:
    out: the result, in the dtype of q.
    lse: the natural log-sum-exp of the logits, float32.
    mass: the share of the softmax on each listed block, float32; 0 where none is listed.
  """

  out: Float[Array, "B T H Dv"]
  lse: Float[Array, "B T H"]
  mass: Float[Array, "B T H top"]


def sparse_attention(
  q: Float[Array, "B T H Dk"],
  k: Float[Array, "B S Hkv Dk"],
  v: Float[Array, "B S Hkv Dv"],
  *,
  pattern: Pattern = Dense(),
  block_mask: Bool[Array, "Bm Hm nq nk"] | None = None,
  block_indices: Int[Array | np.ndarray, "Bi Hi nq top"] | None = None,
  block_size: int = 128,
  query_block: int | None = None,
  score_fn: Callable | None = None,
  scale: float | Float[Array, ""] | None = None,
  segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
  kv_segment_ids: Integer[Array | np.ndarray, "B S"] | None = None,
  query_offset: offset.Offset = 0,
  logits_soft_cap: float | None = None,
  implementation: Implementation | None = None,
  deterministic: bool = True,
  return_lse: bool = False,
  return_mass: bool = False,
) -> Float[Array, "B T H Dv"] | tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]] | Attended:
  """softmax(scale q k^T over the keys that `pattern` allows) v  (arXiv:1904.10509, Eq. 2-3).

  No implementation but `reference` builds a T x T array. Gradients are exact, also from the
  cotangent of the log-sum-exp; only `reference` has second derivatives, others refuse.

  What `score_fn` and the predicates of `patterns.Where` hold (closures, bound methods, callable
  objects) is read at every call. A traced array that `score_fn` holds has a gradient.

  `mosaic_gpu` runs on NVIDIA Hopper GPUs, and by name on a CPU in a simulator, which is for tests:
  bfloat16 and float16, head sizes 32, 64, 96, 128, 192 and 256, every pattern (if its blocks of 128
  have at most 32,768 different masks), block masks of whole multiples of 128, score functions of
  operators and element by element.

  `mosaic_tpu` runs on TPUs, and by name on a CPU in Pallas's interpreter: bfloat16 and float32,
  heads of up to 256, all patterns that are formulas of positions, layouts and block masks of blocks
  that fit into blocks of up to 512. It is compiled for TPUs, and was not run on one yet.

  Args:
    q: queries, float32, bfloat16 or float16.
    k: keys, of the dtype of q. Query head h reads key head h // (H // Hkv), as in jax.nn.
    v: values, of the dtype of q; Dv may differ from Dk.
    pattern: which pairs attend (`pallas_kernels.patterns`); per-head patterns count query heads.
      With T != S both queries and keys count from 0, but for `query_offset`.
    block_mask: which blocks of queries and keys attend, of the pairs of the pattern: Bm is B or 1,
      Hm is H or 1, nq and nk are T and S in blocks, rounded up. It may be traced.
    block_indices: which blocks of keys each group of `query_block` queries reads, of the pairs of
      the pattern, as `select_blocks` lists them: int32, Bi is B or 1, Hi is H, Hkv (a list for the
      query heads of a key head) or 1, nq is T in groups, rounded up. -1, or any number that is no
      block, is none; a block that is twice in a list is a mistake, which `reference` looks for
      where the numbers are known. It may be traced. `reference` and `xla` take lists as they are,
      and `mosaic_gpu` does where `query_block` and `block_size` are multiples of 128, or parts of
      it, at most 16 of 128 queries and 128 keys (16 queries and 64 keys; 8 parts at 1,048,576
      tokens with 16 query heads for a key head), if a formula gives the pattern's pairs; for
      `mosaic_tpu` they become a block mask.
    block_size: tokens per block of `block_mask`, or of a block of keys that is listed.
    query_block: queries that share a row of `block_indices`; None: `block_size`.
    score_fn: (logit, i, j, h) -> logit, for one query i, key j and query head h: operators and
      jax.numpy, with one floating point number as result. It may look up arrays (`slopes[h]`,
      `bias[i - j]`). It is traced at every call; functions that compute the same share a program.
    scale: factor of the logits, Dk ** -0.5 by default; a traced one has a gradient. Then comes the
      cap, then `score_fn`.
    segment_ids: attention stays inside equal ids (packed sequences, lengths, padding); integers.
    kv_segment_ids: those of keys: query t sees key s only where segment_ids[b, t] equals
      kv_segment_ids[b, s]. None: keys have `segment_ids`, for T = S.
    query_offset: the position of the first query, as in a prompt that is read chunk by chunk:
      query i has position query_offset + i in the pattern and in `score_fn`, and row i of the T
      rows in `block_mask`. A traced one, which all values share a program for, is `reference`'s
      and `xla`'s, as are traced masks; on any implementation a known one sweeps blocks, not views.
    logits_soft_cap: c > 0 of c tanh(logit / c), which keeps logits inside -c ... c.
    implementation: None for the best that works here, or the name of the one to use. On a GPU
      None is `mosaic_gpu`, on a TPU `mosaic_tpu`, and `xla`, with one line in the log, for what
      those do not support.
    deterministic: whether equal inputs must give equal bits, as all our own kernels do. False lets
      `mosaic_gpu` call cuDNN for `Dense` without `return_lse`, at about the same rate.
    return_lse: whether to return the log-sum-exp too.
    return_mass: whether to return, besides the log-sum-exp, the share of each query's softmax that
      is on each block of `block_indices`, with its gradient: `reference`, `xla`, and `mosaic_gpu`
      by one more sweep of the keys, of lists that it reads as they are, on one device and for
      blocks of at least 64; the gradient is `xla`'s there, and costs nothing where it is stopped.

  Returns:
    The result in the dtype of q, and with `return_lse` the natural log-sum-exp of the logits,
    float32; with `return_mass` both and the shares, `Attended`. A query without keys gets zeros
    and -inf, and sends no gradient.

  Raises:
    ValueError: for shapes, dtypes or names that do not fit; the message says which.
    NotImplementedError: for what no implementation, or not the one named, can do.
  """
  _check_arrays(q, k, v)
  ids, kv_ids = segments.checked(segment_ids, kv_segment_ids, q.shape[:2], k.shape[:2])
  _check_name(implementation)
  check_pattern(pattern, "pattern")
  pattern, score_fn = offset.shifted(pattern, score_fn, query_offset, q.shape[1])
  _check_blocks(q, k, block_mask, block_size)
  block_indices = _checked_indices(q, k, block_indices, block_size, query_block, implementation)
  if block_mask is not None and block_indices is not None:
    raise ValueError("block_mask and block_indices: only one of them may be given")
  if block_indices is None and (return_mass or query_block is not None):
    name = "return_mass" if return_mass else "query_block"
    raise ValueError(f"{name} without block_indices: is of the blocks that those list")
  if score_fn is not None and not callable(score_fn):
    raise ValueError(f"{score_fn=}: must be a function of (logit, i, j, h), or None")
  plan, arrays = plans.of_call(
    q,
    k,
    v,
    pattern=pattern,
    scores=Scores(_scale(scale, q.shape[-1]), _soft_cap(logits_soft_cap), score_fn),
    segment_ids=ids,
    kv_segment_ids=kv_ids,
    block_mask=block_mask,
    block_indices=block_indices,
    block_size=block_size,
    query_block=query_block,
    return_lse=return_lse,
    return_mass=return_mass,
  )
  plan = partitioning.placed(plan, arrays)
  if implementation == "reference":
    with computed_by("reference"):
      out, *residual = _named(*partitioning.reference(plan, arrays))
    return Attended(out, *residual) if return_mass else (out, *residual) if return_lse else out
  name = choose(implementation)
  takes_lists = block_indices is None or _module(name).takes_lists(plan)
  if reason := _why_not(name, plan, takes_lists):
    name = _instead(implementation, offset.explained(reason, query_offset))
  elif not takes_lists:
    plan, arrays = indices.as_mask(plan), indices.mask_of(plan, arrays)
  may_call_cudnn = name == "mosaic_gpu" and not (plan.sharded or deterministic or return_lse)
  if may_call_cudnn and _module(name).cudnn_serves(plan):
    with computed_by("cudnn"):
      out = _module(name).cudnn_attention(q, k, v, scale=plan.scores.scale)
    return checkpoint_name(out, "attention_out")
  plan = dataclasses.replace(plan, implementation=name)
  with computed_by(name):
    if return_mass and (mass_of := getattr(_module(name), "mass_of", None)):
      # A call of its own: where its gradient is stopped, none is computed.
      plan = _module(name).planned(dataclasses.replace(plan, return_mass=False, return_lse=True))
      out, lse = _attend(plan, arrays)
      return Attended(out, lse, mass_of(plan, arrays, lse))
    return _attend(_backend(plan).planned(plan), arrays)


def choose(implementation: Implementation | None) -> Implementation:
  """The implementation that a call will use: the one named, or the best that works here.

  Of kernels it says what device and version allow; `xla` serves what those do not support. What
  a program contains in the end, `implementations_in` says.
  """
  _check_name(implementation)
  best: dict[str, Implementation] = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
  name = implementation or best.get(hardware.platform(), "xla")
  if name == "mosaic_gpu" and (reason := hardware.why_not_hopper()):
    return _instead(implementation, f"mosaic_gpu: {reason}")
  return name


def load_backend(implementation: Implementation | None) -> None:
  """Imports the backend that calls with this `implementation` will use.

  The import adds an option to JAX's configuration, so functions that were traced before it are
  traced again after it. Call this before any of them is traced; a second call does nothing.

  Raises:
    ValueError: there is no implementation of this name.
    NotImplementedError: the implementation is named and does not run here; the message says why.
  """
  _module(choose(implementation))


def computed_by(name: str) -> Any:
  """Within it, what is traced is attention by this implementation, to `implementations_in`."""
  return jax.named_scope(f"attention_by_{name}")


def implementations_in(program: Jaxpr, of: str = "attention") -> tuple[str, ...]:
  """Those that compute attention, or blocks, in a traced program, `jax.jit(f).trace(...).jaxpr`.

  Read from the program itself: also where `xla` serves what a kernel does not support, and where
  cuDNN serves dense attention ("cudnn"). `of="blocks"`: those of the residual blocks, if their
  modules do not serve.
  """
  if of not in ("attention", "blocks"):
    raise ValueError(f"{of=}: must be 'attention' or 'blocks'")
  return scopes_in(program, f"{of}_by_")


def scopes_in(program: Jaxpr, prefix: str) -> tuple[str, ...]:
  """What follows `prefix` in the names of a traced program's scopes, sorted, each once."""
  names_in_program = set()
  for equation in program.eqns:
    names = re.findall(rf"{prefix}(\w+)", str(equation.source_info.name_stack))
    names_in_program.update(names)
    if not names:
      inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
      names_in_program.update(*(scopes_in(x, prefix) for x in inner if _is_program(x)))
  return tuple(sorted(names_in_program))


def _is_program(x: Any) -> bool:
  return isinstance(x, Jaxpr | ClosedJaxpr)


def _why_not(name: str, plan: plans.Plan, takes_lists: bool) -> str | None:
  """Why an implementation cannot compute a call; None where it can."""
  if takes_lists:
    return _module(name).unsupported(plan)
  if plan.return_mass:
    of = f"query_block={plan.query_block} and block_size={plan.block_size}"
    of += " over a mesh" if plan.sharded else f" of {plan.pattern}"
    return f"{name}: return_mass with {of} is not supported, reference and xla have it"
  mask = indices.as_mask(plan)
  if reason := _module(name).unsupported(mask):
    sizes = f"query_block={plan.query_block} and block_size={plan.block_size}"
    reason += f" (block_indices of {sizes} become a block mask of {mask.block_size})"
  return reason


def _instead(implementation: Implementation | None, reason: str) -> Implementation:
  """`xla` where the choice was ours, said once; else an error."""
  if implementation is not None:
    raise NotImplementedError(reason)
  _say_once(reason)
  return "xla"


@functools.cache
def _say_once(reason: str) -> None:
  logger.warning("%s; xla computes it", reason)


def _backend(plan: plans.Plan) -> protocol.Backend:
  """The one that computes a plan; where arrays are sharded, on every device."""
  module = _module(plan.implementation)
  return partitioning.PerDevice(module) if plan.sharded else module


def _check_name(implementation: Any) -> None:
  if implementation is not None and implementation not in IMPLEMENTATIONS:
    raise ValueError(f"{implementation=}: must be None or one of {', '.join(IMPLEMENTATIONS)}")


def _module(name: str) -> Any:
  """A module that is a `protocol.Backend`; kernels are imported only where they are used."""
  match name:
    case "mosaic_gpu":
      from pallas_kernels import mosaic_gpu

      return mosaic_gpu
    case "mosaic_tpu":
      from pallas_kernels import mosaic_tpu

      return mosaic_tpu
    case "xla":
      return xla
    case "reference":  # no backend: JAX differentiates it
      return reference
  raise AssertionError(f"{name}: an implementation without a module")


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: plans.Plan, arrays: plans.Arrays) -> Any:
  return _attend_forward(plan, arrays)[0]


def _attend_forward(plan: plans.Plan, arrays: plans.Arrays) -> tuple:
  backend = _backend(plan)
  # The residuals carry the names, so that a policy which keeps them saves the forward pass. The
  # lse among them is as the backend wants it: the public one is made for who asks.
  forward = functools.partial(backend.forward, plan)
  out, residual = _named(*_differentiated_once(forward, arrays))
  if plan.return_mass:
    return Attended(out, *residual), (arrays, out, residual)
  result = (out, backend.natural_lse(plan, residual)) if plan.return_lse else out
  return result, (arrays, out, residual)


def _attend_backward(plan: plans.Plan, residuals: tuple, cotangents: Any) -> tuple:
  if not plan.return_mass:
    cotangents = cotangents if plan.return_lse else (cotangents, None)
  backward = functools.partial(_backend(plan).backward, plan)
  return (_differentiated_once(backward, *residuals, *cotangents),)


_attend.__wrapped__.defvjp(_attend_forward, _attend_backward)  # pyrefly: ignore[missing-attribute]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiated_once(function: Callable, *arrays: Any) -> Any:
  """function(*arrays) of a rule of derivatives, which has none itself."""
  return function(*arrays)


@_differentiated_once.defjvp
def _differentiated_twice(function: Callable, primals: Any, tangents: Any) -> NoReturn:
  del function, primals, tangents
  raise NotImplementedError(
    "sparse_attention: second derivatives are those of implementation='reference' alone"
  )


def _named(out: Array, *lse: Any) -> tuple:
  """Names for remat policies: jax.checkpoint_policies.save_only_these_names and the like."""
  return checkpoint_name(out, "attention_out"), *checkpoint_name(lse, "attention_lse")


def _scale(scale: Any, head_size: int) -> Any:
  """A finite number, or a traced one."""
  if scale is None:
    return head_size**-0.5
  real = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
  if not real and (np.shape(scale) != () or not _is_real(scale)):
    raise ValueError(f"scale={scale!r}: must be one number, which may be traced")
  if isinstance(scale, jax.core.Tracer):
    return scale
  if not _is_finite(scale):
    raise ValueError(f"scale={scale}: must be finite")
  return float(scale)


def _is_finite(x: Any) -> bool:
  """As a float."""
  try:
    return math.isfinite(x)
  except OverflowError:
    return False


def _is_real(x: Any) -> bool:
  kinds = jnp.floating, jnp.integer
  return hasattr(x, "dtype") and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _soft_cap(cap: Any) -> float | None:
  if cap is None:
    return None
  if isinstance(cap, jax.core.Tracer):
    raise ValueError("logits_soft_cap is traced: must be known, or part of score_fn")
  real = isinstance(cap, numbers.Real) and not isinstance(cap, bool)
  number = real or (np.shape(cap) == () and _is_real(cap))
  if not number or not _is_finite(cap) or cap <= 0:
    raise ValueError(
      f"logits_soft_cap={cap!r}: must be a positive number, finite, or None for no cap"
    )
  return float(cap)


def _check_arrays(q: Any, k: Any, v: Any) -> None:
  for name, x in dict(q=q, k=k, v=v).items():
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
      raise ValueError(f"{name}: must be an array, not {type(x).__name__}")
  shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f"{shapes}: must each have 4 axes [B, T, H, D]")
  if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
    raise ValueError(f"{shapes}: must agree in B, and k and v in S and Hkv")
  if q.shape[3] != k.shape[3]:
    raise ValueError(f"{shapes}: q and k must have one head size, not {q.shape[3]}, {k.shape[3]}")
  if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
    raise ValueError(f"{shapes}: Hkv={k.shape[2]} must divide H={q.shape[2]}")
  if not all(isinstance(n, int) for n in (*q.shape[1:], *k.shape[1:], *v.shape[1:])):
    raise ValueError(f"{shapes}: no axis but the batch may be symbolic")
  if 0 in q.shape or 0 in v.shape:
    raise ValueError(f"{shapes}: no axis may be empty")
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"q {q.dtype}, k {k.dtype}, v {v.dtype}: must share one of float32, bfloat16, float16"
    )


def _check_blocks(q: Any, k: Any, block_mask: Any, block_size: Any) -> None:
  whole = isinstance(block_size, int) and not isinstance(block_size, bool)
  if not whole or block_size < 1:
    raise ValueError(f"{block_size=}: must be a whole number >= 1")
  if block_mask is None:
    return
  (B, T, H, _), S = q.shape, k.shape[1]
  nq, nk = -(-T // block_size), -(-S // block_size)
  if not (hasattr(block_mask, "shape") and hasattr(block_mask, "dtype")):
    raise ValueError(f"block_mask: must be an array, not {type(block_mask).__name__}")
  shape = block_mask.shape
  fits = block_mask.ndim == 4 and shape[0] in (1, B) and shape[1] in (1, H)
  if not fits or shape[2:] != (nq, nk) or block_mask.dtype != bool:
    raise ValueError(
      f"block_mask {block_mask.dtype}{list(shape)}: must be bool of shape [{B} or 1, {H} or 1, "
      f"{nq}, {nk}], T={T} and S={S} in blocks of block_size={block_size}"
    )


def _checked_indices(
  q: Any, k: Any, given: Any, block_size: int, query_block: Any, implementation: str | None
) -> Any:
  """`block_indices` as int32."""
  whole = isinstance(query_block, int) and not isinstance(query_block, bool)
  if query_block is not None and not (whole and query_block >= 1):
    raise ValueError(f"{query_block=}: must be a whole number >= 1, or None for block_size")
  if given is None:
    return None
  (B, T, H, _), S, Hkv = q.shape, k.shape[1], k.shape[2]
  if not (hasattr(given, "shape") and hasattr(given, "dtype")):
    raise ValueError(f"block_indices: must be an array, not {type(given).__name__}")
  if not isinstance(B, int) and implementation != "reference":
    raise NotImplementedError(f"block_indices with a symbolic batch {B}: reference alone takes it")
  width, shape = query_block or block_size, given.shape
  nq, nk = -(-T // width), -(-S // block_size)
  fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, H, Hkv) and shape[3] > 0
  if not fits or shape[2] != nq or given.dtype != np.int32:
    raise ValueError(
      f"block_indices {given.dtype}{list(shape)}: must be int32 of shape [{B} or 1, {H}, {Hkv} or "
      f"1, {nq}, top], T={T} in groups of query_block={width}"
    )
  if implementation == "reference" and not isinstance(given, jax.core.Tracer):
    ordered = np.sort(np.asarray(given), axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if (twice & (ordered[..., 1:] < nk)).any():
      b, h, n, place = (int(x[0]) for x in np.nonzero(twice))
      raise ValueError(
        f"block_indices[{b}, {h}, {n}] has block {ordered[b, h, n, place]} twice: must have each "
        "block once"
      )
  return jnp.asarray(given)
