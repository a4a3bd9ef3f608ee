"""Self-attention to blocks of keys that the layer itself chooses, while it runs.

Over the calls `pool_blocks`, `select_blocks` and `sparse_attention(block_indices=...)`.
"""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Int
from jaxtyping import Integer

from pallas_kernels import patterns
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import selection
from pallas_kernels import sparse_attention
from sparse_flax.model import cache_blocks
from sparse_flax.model import heads
from sparse_flax.model.learned import Indexer
from sparse_flax.model.learned import Moba
from sparse_flax.model.learned import Nsa
from sparse_flax.model.learned import Recipe
from sparse_flax.model.learned import RECIPES
from sparse_flax.model.learned import Stage
from sparse_flax.model.learned import WHY_NOT_SHARDED
from sparse_flax.model.rope import Positions
from sparse_flax.parallel import sharding

# A list is chosen at every step where that reads so many times fewer rows than attending to it.
_ROWS_AS_CHEAP = 8


class Index(nnx.Module):
  """Of an indexer: queries [B, T, HI, DI], keys [B, T, 1, DI], weights [B, T, HI, Hl]."""

  def __init__(self, width: int, num_heads: int, size: int, num_lists: int, **linear):
    self.num_heads, self.num_lists = num_heads, num_lists
    project = functools.partial(nnx.Linear, width, use_bias=False, **linear)
    self.query = project(num_heads * size)
    self.key = project(size)
    self.mix = project(num_heads * num_lists)

  def __call__(self, x: Float[Array, "B T E"]) -> tuple[Array, Array, Array]:
    x = jax.lax.stop_gradient(x)
    split = lambda y, *shape: y.reshape(*x.shape[:2], *shape)
    query = split(self.query(x), self.num_heads, -1)
    return query, self.key(x)[:, :, None], split(self.mix(x), self.num_heads, self.num_lists)


class _Given(NamedTuple):
  """What a call computes from x.

  Attributes:
    q, k, v: of attention.
    query, key: what is scored, and what is pooled for it.
    mix: weights of the heads of `query`, or None.
    gates: of the branches of `Nsa`, in (0, 1), or None.
  """

  q: Float[Array, "B T H Dk"]
  k: Float[Array, "B T Hkv Dk"]
  v: Float[Array, "B T Hkv Dv"]
  query: Float[Array, "B T Hq D"]
  key: Float[Array, "B T Hp D"]
  mix: Float[Array, "B T Hq Hl"] | None
  gates: Float[Array, "B T H 3"] | None


class LearnedSelfAttention(heads.Heads):
  """Self-attention to blocks of keys that are chosen for each `query_block` queries.

  A list of blocks is made from its first query and from blocks complete before it: no output
  depends on what comes after it.

    layer = LearnedSelfAttention(
        width=512, num_heads=8, recipe=learned.Nsa(block_size=64), rngs=nnx.Rngs(0))
    y = layer(x)  # [B, T, 512] -> [B, T, 512], any T
  """

  def __init__(
    self,
    *,
    width: int,
    num_heads: int,
    recipe: Recipe,
    stage: Stage = None,
    qk_ratio: int | float = 1.0,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    kernel_init: nnx.Initializer | None = None,
    out_init: nnx.Initializer | None = None,
    num_kv_heads: int | None = None,
    use_bias: bool = True,
    qk_norm: bool = False,
    rope: heads.RotaryFn | None = None,
    rngs: nnx.Rngs,
  ):
    """Args:
    width: E, the model width; a multiple of num_heads.
    num_heads: H. Values have E / H features per head.
    recipe: `Moba`, `Nsa` or `Indexer`.
    stage: of calls that name none: None is the recipe's `top`, a number another one, and "dense"
      reads every earlier key.
    qk_ratio, dtype, param_dtype, implementation, kernel_init: as in `SparseSelfAttention`.
    out_init, num_kv_heads, use_bias, qk_norm, rope: likewise.
    rngs: source of the initial values.

    Raises:
      ValueError: sizes that do not divide each other, or a stage that is none.
    """
    if not isinstance(recipe, tuple(RECIPES.values())):
      names = ", ".join(f"learned.{x.__name__}(...)" for x in RECIPES.values())
      raise ValueError(f"{recipe=}: must be one of {names}")
    super().__init__(
      width=width,
      kv_width=width,
      num_heads=num_heads,
      pattern=patterns.Dense(),
      qk_ratio=qk_ratio,
      dtype=dtype,
      param_dtype=param_dtype,
      implementation=implementation,
      kernel_init=kernel_init,
      out_init=out_init,
      num_kv_heads=num_kv_heads,
      use_bias=use_bias,
      qk_norm=qk_norm,
      rope=rope,
      rngs=rngs,
    )
    self.recipe, self.stage = recipe, stage
    self.num_lists = recipe.num_lists(num_heads, self.num_kv_heads)
    self._top(stage)
    k_size = self.key.out_features // self.num_kv_heads
    zeros = lambda *shape: nnx.Param(jnp.zeros(shape, param_dtype))
    kernel_init = kernel_init or nnx.initializers.variance_scaling(0.125, "fan_in", "normal")
    linear = dict(dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
    taps = recipe.key_conv if isinstance(recipe, Moba) else 0
    self.taps = zeros(taps, self.num_kv_heads, k_size) if taps else None
    match recipe:
      case Nsa(block_size=b):
        self.gate = nnx.Linear(width, 3 * num_heads, **linear)
        # Logits of the shares that the places of a block have in what is pooled.
        self.key_places, self.value_places = (zeros(self.num_kv_heads, b) for _ in range(2))
      case Indexer(index_size=size, index_heads=number):
        self.index = Index(width, number or self.num_lists, size, self.num_lists, **linear)

  def __call__(
    self,
    x: Float[Array, "B T E"],
    segment_ids: Integer[Array | np.ndarray, "B T"] | None = None,
    stage: Stage = None,
    *,
    positions: Positions | None = None,
    losses: bool = False,
  ) -> Any:
    """Args:
    x: the layer's input.
    segment_ids: packed sequences, equal ids side by side: attention stays inside them.
    stage: "dense" reads every earlier key, a number so many blocks, None what the layer was built
      with. Known when the call is traced.
    positions: what `rope` turns queries and keys by; default 0, 1, ...
    losses: whether to return what the choice itself learns from, too.

    Returns:
      [B, T, E]; with `losses` also {"index": scalar} of an `Indexer`, to be added to the model's
      loss, {} of others. It moves the weights of the indexer alone, and nothing else moves them.

    Raises:
      ValueError: what does not fit.
      NotImplementedError: the mesh shards heads or tokens.
    """
    _check_mesh()
    given = self._given(x, positions, segment_ids)
    out, lost = self._attended(given, segment_ids, self._top(stage), losses)
    out = self.back(out)
    return (out, lost) if losses else out

  def _attended(self, given: _Given, ids, top: int | None, losses: bool) -> tuple[Array, dict]:
    attend = functools.partial(
      sparse_attention, given.q, implementation=self.implementation, segment_ids=ids
    )
    teaches = losses and isinstance(self.recipe, Indexer)
    coarse, lse = self._coarse(given, ids)
    if top is None:
      fine, lost = attend(given.k, given.v, pattern=patterns.Dense()), {}
      if teaches:
        lost = {"index": self._loss_of_all(given, ids)}
    else:
      pooled = self._pooled(given.key, ids)
      lists = self._lists(given, pooled, lse, ids, top)
      read = functools.partial(attend, given.k, given.v, block_indices=lists, **self._sizes)
      if teaches:
        fine, _, mass = read(return_mass=True)
        lost = {"index": self._loss(given, pooled, lists, mass)}
      else:
        fine, lost = read(), {}
    if given.gates is None:
      return fine, lost
    near = attend(given.k, given.v, pattern=patterns.Local(self.recipe.window))
    return gated(given.gates, coarse, fine, near), lost

  def _lists(self, given: _Given, pooled, lse, ids, top: int) -> Int[Array, "B Hl nq top"]:
    return select_blocks(
      given.query,
      pooled,
      top=top,
      first=self.recipe.first,
      local=self.recipe.local,
      lists=None if given.mix is not None else self.num_lists,
      weights=given.mix,
      lse=lse,
      activation=self._activation,
      segment_ids=ids,
      **self._sizes,
    )

  @property
  def _sizes(self) -> dict[str, int]:
    return dict(block_size=self.recipe.block_size, query_block=self.recipe.query_block)

  @property
  def _tail(self) -> int:
    """Keys that the convolution reads beside the newest."""
    return self.recipe.key_conv - 1 if self.taps is not None else 0

  @property
  def _activation(self) -> selection.Activation:
    return "exp" if isinstance(self.recipe, Nsa) else "relu" if self._is_indexer else "none"

  @property
  def _is_indexer(self) -> bool:
    return isinstance(self.recipe, Indexer)

  def _top(self, stage: Stage) -> int | None:
    """Blocks of a list in a stage; None: all of them."""
    stage = self.stage if stage is None else stage
    if stage is None:
      return self.recipe.top
    if stage == "dense":
      return None
    self.recipe.check_top(stage, "stage")
    return stage

  def _given(self, x: Float[Array, "B T E"], positions=None, ids=None) -> _Given:
    """Of whole sequences."""
    given = self._projected(x, positions)
    if self.taps is not None:
      k = self._convolved(given.k, ids)
      given = given._replace(k=k, key=k)
    return _Given(*(y if y is None else sharding.rows_apart(y) for y in given))

  def _projected(self, x: Float[Array, "B T E"], positions=None) -> _Given:
    positions = self.checked_positions(positions, x)
    to_query, to_keys, to_values = heads.apart(x, 3)
    q, k = self.queries(to_query, positions), self.keys(to_keys, positions)
    query, key, mix, gates = q, k, None, None
    if isinstance(self.recipe, Nsa):
      gates = jax.nn.sigmoid(self.gate(x)).reshape(*x.shape[:2], self.num_heads, 3)
    elif self._is_indexer:
      query, key, mix = self.index(x)
    return _Given(q, k, self.values(to_values), query, key, mix, gates)

  # ------------------------------------------------------------------------- parts of recipes

  def _convolved(self, k: Float[Array, "B T Hkv D"], ids=None) -> Float[Array, "B T Hkv D"]:
    """k + sum over n of taps[n] * k[n tokens before], inside a document."""
    T, out = k.shape[1], k
    for n, tap in enumerate(self.taps[...].astype(k.dtype)):
      earlier = jnp.pad(k, [(0, 0), (n, 0), (0, 0), (0, 0)])[:, :T]
      if ids is not None:
        same = jnp.asarray(ids) == jnp.pad(jnp.asarray(ids), [(0, 0), (n, 0)])[:, :T]
        earlier = jnp.where(same[..., None, None], earlier, jnp.zeros((), k.dtype))
      out = out + tap[None, None] * earlier
    return out

  def _pooled(self, key: Float[Array, "B T Hp D"], ids=None) -> Float[Array, "B nb Hp D"]:
    places = self.key_places[...] if isinstance(self.recipe, Nsa) else None
    return self._pool(key, places, ids)

  def _pool(self, x: Array, places, ids=None) -> Float[Array, "B nb Hp D"]:
    # In the dtype of products, which is that of the weights where a program samples.
    places = None if places is None else places.astype(x.dtype)
    return pool_blocks(x, self.recipe.block_size, weights=places, segment_ids=ids)

  def _coarse(self, given: _Given, ids=None) -> tuple[Any, Any]:
    """Of `Nsa`: attention to the pooled keys of complete blocks, and its log-sum-exp."""
    if not isinstance(self.recipe, Nsa):
      return None, None
    b, shape = self.recipe.block_size, given.q.shape[:3]
    if shape[1] < b:  # there is no complete block
      out = jnp.zeros((*shape, given.v.shape[-1]), given.q.dtype)
      return out, jnp.full(shape, -jnp.inf, jnp.float32)
    ids = None if ids is None else jnp.asarray(ids)
    return sparse_attention(
      given.q,
      self._pooled(given.key, ids),
      self._pool(given.v, self.value_places[...], ids),
      pattern=_complete(b),
      implementation=self.implementation,
      segment_ids=ids,
      kv_segment_ids=None if ids is None else ids[:, b - 1 :: b],
      return_lse=True,
    )

  def _loss(self, given: _Given, pooled, lists, mass) -> Float32[Array, ""]:
    """What the indexer learns from: the blocks of a list that were scored."""
    Q, recipe = self.recipe.query_block, self.recipe
    stop = jnp.arange(lists.shape[2]) * Q // recipe.block_size - (recipe.local - 1)
    scored = (lists >= recipe.first) & (lists < stop[None, None, :, None])
    keys = jnp.pad(pooled[:, :, 0], [(0, 0), (0, 1), (0, 0)])  # of the last block none is read
    keys = jax.vmap(lambda keys, blocks: keys[blocks])(keys, jnp.maximum(lists, 0))
    equation = "bnhd,blnjd->blnjh"
    scores = _importance(equation, given.query[:, ::Q], keys, given.mix[:, ::Q])
    return divergence(scores, scored, mass, query_block=Q)

  def _loss_of_all(self, given: _Given, ids) -> Float32[Array, ""]:
    """The same, of all candidates there are."""
    (B, T), recipe = given.q.shape[:2], self.recipe
    Q, b, pooled = recipe.query_block, recipe.block_size, self._pooled(given.key, ids)
    rows, blocks = jnp.arange(-(-T // Q)), jnp.arange(-(-T // b), dtype=jnp.int32)
    last = jnp.minimum((rows + 1) * Q, T) - 1
    lists = jnp.where(blocks[None] <= last[:, None] // b, blocks[None], -1)[None, None]
    teacher = jax.lax.stop_gradient(given)
    how = dict(segment_ids=ids, block_indices=lists, return_mass=True, **self._sizes)
    if self.implementation != "mosaic_tpu":  # which has no mass
      how |= dict(implementation=self.implementation)
    mass = sparse_attention(teacher.q, teacher.k, teacher.v, **how).mass
    stop = rows * Q // b - (recipe.local - 1)
    scored = ((blocks >= recipe.first)[None] & (blocks[None] < stop[:, None]))[None, None]
    if ids is not None:
      of_blocks = jnp.pad(jnp.asarray(ids)[:, b - 1 :: b], [(0, 0), (0, -(-T // b) - T // b)])
      scored &= (jnp.asarray(ids)[:, ::Q, None] == of_blocks[:, None])[:, None]
    keys = jnp.pad(pooled[:, :, 0], [(0, 0), (0, len(blocks) - pooled.shape[1]), (0, 0)])
    scores = _importance("bnhd,bjd->bnjh", given.query[:, ::Q], keys, given.mix[:, ::Q])
    scored = jnp.broadcast_to(scored, (B, self.num_lists, *scored.shape[2:]))
    return divergence(scores, scored, mass, query_block=Q)

  # ------------------------------------------------------------------------------- inspection

  def chosen(self, x: Float[Array, "B T E"], stage: Stage = None) -> Bool[Array, "B Hl nq nk"]:
    """Which blocks of keys the queries of each list read; in a dense stage all that they see."""
    given, recipe, T = self._given(x), self.recipe, x.shape[1]
    nk, top = -(-T // recipe.block_size), self._top(stage)
    if top is None:
      last = (np.arange(-(-T // recipe.query_block)) + 1) * recipe.query_block - 1
      seen = np.arange(nk) <= np.minimum(last, T - 1)[:, None] // recipe.block_size
      return jnp.broadcast_to(seen, (x.shape[0], self.num_lists, *seen.shape))
    _, lse = self._coarse(given)
    lists = self._lists(given, self._pooled(given.key), lse, None, top)
    return (lists[..., None] == np.arange(nk, dtype=np.int32)[None, None, None, None]).any(axis=3)

  def weights(
    self,
    x: Float[Array, "B T E"],
    rows: Integer[np.ndarray, "Q"] | None = None,
    *,
    stage: Stage = None,
  ) -> Float[Array, "B H Q T"]:
    """The float32 probabilities of the query rows `rows` (None: of all rows).

    Of `Nsa` those by which the three branches together weigh each value, over their sum.
    """
    given, recipe, T = self._given(x), self.recipe, x.shape[1]
    rows = np.arange(T) if rows is None else np.asarray(rows)
    i, j = rows[:, None], np.arange(T)[None]
    listed = self.chosen(x, stage)[:, :, rows // recipe.query_block]
    listed = jnp.repeat(listed, recipe.block_size, axis=3)[..., :T]
    listed = jnp.repeat(listed, self.num_heads // self.num_lists, axis=1)
    softmax = functools.partial(_softmax, given.q[:, rows])
    fine = softmax(given.k, listed & (j <= i)[None, None])
    if given.gates is None:
      return fine
    near = softmax(given.k, ((j <= i) & (j > i - recipe.window))[None, None])
    nb, b = T // recipe.block_size, recipe.block_size
    coarse = softmax(self._pooled(given.key), (np.arange(nb) < i // b)[None, None])
    places = jax.nn.softmax(self.value_places[...].astype(jnp.float32), axis=-1)
    places = jnp.repeat(places, self.num_heads // self.num_kv_heads, axis=0)
    coarse = (coarse[..., None] * places[None, :, None, None]).reshape(*coarse.shape[:3], nb * b)
    coarse = jnp.pad(coarse, [(0, 0)] * 3 + [(0, T - nb * b)])
    gates = given.gates[:, rows].astype(jnp.float32).transpose(3, 0, 2, 1)[..., None]
    total = gates[0] * coarse + gates[1] * fine + gates[2] * near
    return total / total.sum(axis=-1, keepdims=True)

  # --------------------------------------------------------------------------------- decoding

  def init_cache(
    self, batch_size: int, length: int, *, num_layers: int = 1, sparse: bool = True
  ) -> cache_blocks.Blocks:
    """Room for `length` steps, for `num_layers` layers like this one; see `cache_blocks.Blocks`.

    A layer that chooses keeps everything: `sparse` changes nothing.
    """
    del sparse
    recipe = self.recipe
    dtype = self.key.dtype or self.key.param_dtype
    k_size, v_size = (x.out_features // self.num_kv_heads for x in (self.key, self.value))
    return cache_blocks.empty(
      (num_layers, batch_size),
      num_heads=self.num_kv_heads,
      sizes=(k_size, v_size),
      length=length,
      block_size=recipe.block_size,
      index_size=recipe.index_size if isinstance(recipe, Indexer) else None,
      pools_values=isinstance(recipe, Nsa),
      tail=self._tail,
      lists=(self.num_lists, self._top(None) or 0),
      dtype=dtype,
    )

  def prefill(
    self,
    x: Float[Array, "B P E"],
    length: int,
    *,
    sparse: bool = True,
    positions: Positions | None = None,
  ) -> tuple[Float[Array, "B P E"], cache_blocks.Blocks]:
    """`__call__`, and the cache, without an axis for layers, as P steps of `length` leave it.

    Raises:
      ValueError: P > length.
    """
    del sparse
    _check_mesh()
    P, recipe, top = x.shape[1], self.recipe, self._top(None)
    if length < P:
      raise ValueError(f"{length=}: must be at least {P}, the steps that are read")
    # A list of several own blocks chooses as many others as the whole sequence leaves it.
    more = min(-P % recipe.query_block, length - P)
    more = more if recipe.query_block > recipe.block_size else 0
    if more and positions is not None:
      raise ValueError(f"positions: cannot be given where P={P} ends inside a list's queries")
    given = self._projected(jnp.pad(x, [(0, 0), (0, more), (0, 0)]), positions)
    raw = given.k[:, :P]
    if self.taps is not None:
      k = self._convolved(given.k)
      given = given._replace(k=k, key=k)
    given = _Given(*(y if y is None else sharding.rows_apart(y) for y in given))
    out, _ = self._attended(given, None, top, False)
    given = _Given(*(y if y is None else y[:, :P] for y in given))
    pooled_value = None
    if isinstance(recipe, Nsa):
      pooled_value = self._pool(given.v, self.value_places[...])
    cache = cache_blocks.filled(
      given.k,
      given.v,
      self._pooled(given.key),
      pooled_value,
      given.key if self._is_indexer else None,
      raw if self._tail else None,
      tail=self._tail,
      length=length,
      block_size=recipe.block_size,
      lists=(self.num_lists, top or 0),
    )
    if top is not None:
      anchor = (P - 1) // recipe.query_block * recipe.query_block
      row = _Given(*(y if y is None else y[:, anchor] for y in given))
      lists = self._list_at(row, anchor, cache.pooled, cache.pooled_value, length)
      cache = dataclasses.replace(cache, lists=lists)
    return self.back(out[:, :P]), cache

  def decode_step(
    self,
    x: Float[Array, "B E"],
    step: Integer[Array, ""],
    cache: cache_blocks.Blocks,
    *,
    layer: int | Integer[Array, ""] = 0,
    positions: Integer[Array | np.ndarray, ""] | Integer[Array | np.ndarray, "B"] | None = None,
  ) -> tuple[Float[Array, "B E"], cache_blocks.Blocks]:
    """Row `step` of `__call__`, given the keys and values of the rows before it.

    Args:
      x: the layer's input of this step alone.
      step: 0, 1, 2, ...; each step once and in this order.
      cache: from `init_cache`, then from the step before.
      layer: which layer of the cache is this one's.
      positions: of this step, in the whole batch or in each sequence; default `step`.

    Returns:
      The layer's output of this step, and the cache with this step in it.
    """
    recipe, top = self.recipe, self._top(None)
    step, layer = jnp.asarray(step, jnp.int32), jnp.asarray(layer, jnp.int32)
    if self.rope is not None:
      positions = jnp.asarray(step if positions is None else positions)
      positions = positions.reshape(-1) if positions.ndim == 0 else positions[:, None]
    given = self._projected(x[:, None], positions)
    given = _Given(*(y if y is None else y[:, 0] for y in given))
    if self.taps is not None:
      earlier, cache = cache.with_tail(given.k, layer)
      k, taps = given.k, self.taps[...].astype(given.k.dtype)
      for n, tap in enumerate(taps):
        k = k + tap[None] * (given.k if n == 0 else earlier[:, -n])
      given = given._replace(k=k, key=k)
    cache = cache.stored(given.k, given.v, given.key if self._is_indexer else None, step, layer)
    # What is not complete yet is never read: it is written again with each step.
    places = (None, None)
    if isinstance(recipe, Nsa):
      places = self.key_places[...], self.value_places[...]
    cache = cache.with_pooled(self._pool, places, step, layer)
    pooled, pooled_value = cache.pooled_of(layer)
    if top is None:
      fine = cache.attend_all(given.q, step, layer)
    else:
      Q = recipe.query_block
      choose = lambda: self._list_at(given, step, pooled, pooled_value, cache.length)
      if pooled.shape[2] * _ROWS_AS_CHEAP <= top * recipe.block_size:
        # A branch would make a GPU wait for the host, at every step and layer.
        lists = jnp.where(step % Q == 0, choose(), cache.lists_of(layer))
      else:
        lists = jax.lax.cond(step % Q == 0, choose, lambda: cache.lists_of(layer))
      cache = cache.with_lists(lists, layer)
      fine = cache.attend_listed(given.q, lists, step, layer)
    if given.gates is None:
      return self.back(fine.astype(given.q.dtype)), cache
    coarse, _ = self._coarse_at(given, step, pooled, pooled_value)
    near = cache.attend_window(given.q, recipe.window, step, layer)
    branches = (y.astype(given.q.dtype) for y in (coarse, fine, near))
    return self.back(gated(given.gates, *branches)), cache

  def _coarse_at(self, row: _Given, step, pooled, pooled_value) -> tuple[Array, Array]:
    """`_coarse` of one query."""
    blocks = jnp.arange(pooled.shape[2], dtype=jnp.int32)
    shown = (blocks < step // self.recipe.block_size)[None, None]
    return cache_blocks.attend(row.q, pooled, pooled_value, shown)

  def _list_at(self, row: _Given, step, pooled, pooled_value, length: int) -> Int[Array, "B Hl k"]:
    """`_lists` of one anchor; `pooled` as caches have it, [B, Hp, nk, D]."""
    lse = None
    if pooled_value is not None:
      _, lse = self._coarse_at(row, step, pooled, pooled_value)
    return selection.select_at(
      row.query,
      pooled.swapaxes(1, 2),
      step,
      length=length,
      top=self._top(None) or 0,
      first=self.recipe.first,
      local=self.recipe.local,
      lists=self.num_lists,
      weights=row.mix,
      lse=lse,
      activation=self._activation,
      **self._sizes,
    )


def gated(
  gates: Float[Array, "*B H 3"],
  coarse: Float[Array, "*B H D"],
  fine: Float[Array, "*B H D"],
  near: Float[Array, "*B H D"],
) -> Float[Array, "*B H D"]:
  """The three branches of `Nsa`, each times its gate."""
  gates = gates.astype(fine.dtype)
  return gates[..., :1] * coarse + gates[..., 1:2] * fine + gates[..., 2:] * near


def divergence(
  scores: Float32[Array, "B Hl nq top"],
  scored: Bool[Array, "B Hl nq top"],
  mass: Float32[Array, "B T H top"],
  *,
  query_block: int,
) -> Float32[Array, ""]:
  """The mean, over lists with a scored block, of the divergence of scores from the mass.

      sum_j m[j] (log m[j] - log_softmax_j(scores)[j])

  over the scored blocks j of a list, with m the mass of all queries and heads of the list on j,
  over its sum: their gradients are softmax(scores) - m. 0 where no list has a scored block.
  """
  (B, T, H, top), (Hl, nq) = mass.shape, scores.shape[1:3]
  mass = jax.lax.stop_gradient(mass)
  mass = jnp.pad(mass, [(0, 0), (0, nq * query_block - T), (0, 0), (0, 0)])
  mass = mass.reshape(B, nq, query_block, Hl, H // Hl, top).sum(axis=(2, 4)).swapaxes(1, 2)
  mass = jnp.where(scored, mass, 0.0)
  target = mass / jnp.maximum(mass.sum(axis=-1, keepdims=True), 1e-30)
  student = jax.nn.log_softmax(jnp.where(scored, scores, -1e30), axis=-1)
  far = jax.scipy.special.xlogy(target, target) - target * student
  return far.sum() / jnp.maximum(scored.any(axis=-1).sum(), 1).astype(far.dtype)


def _importance(equation: str, query, keys, mix) -> Float32[Array, "B Hl nq top"]:
  """As `select_blocks` has it, with gradients; `equation` is of queries and keys."""
  how = dict(precision="highest", preferred_element_type=jnp.float32)
  scores = jax.nn.relu(query.shape[-1] ** -0.5 * jnp.einsum(equation, query, keys, **how))
  result = equation.partition("->")[2]
  return jnp.einsum(f"{result},bnhl->blnj", scores, mix.astype(jnp.float32), precision="highest")


def _softmax(q: Float[Array, "B Q H D"], k: Float[Array, "B S Hkv D"], mask) -> Array:
  """Float32 probabilities [B, H, Q, S]; zeros of a query that sees nothing."""
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  how = dict(precision="highest", preferred_element_type=jnp.float32)
  logits = q.shape[-1] ** -0.5 * jnp.einsum("bqhd,bshd->bhqs", q, k, **how)
  return jnp.nan_to_num(jax.nn.softmax(logits, axis=-1, where=mask))


@functools.cache
def _complete(block_size: int) -> patterns.Where:
  """Blocks that are complete before the query's own one."""
  return patterns.Where(lambda i, j: j < i // block_size, causal=False)


def _check_mesh() -> None:
  mesh = jax.sharding.get_abstract_mesh()
  for axis, reason in WHY_NOT_SHARDED.items():
    if mesh.shape.get(axis, 1) > 1 and axis not in mesh.manual_axes:
      raise NotImplementedError(f"mesh axis {axis}={mesh.shape[axis]}: must be 1, for {reason}")
