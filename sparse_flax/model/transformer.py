"""The Sparse Transformer: embeddings, groups of residual blocks one after the other, logits."""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Integer
from jaxtyping import Key
from jaxtyping import UInt8

from pallas_kernels import api
from pallas_kernels import residual
from sparse_flax.model import block
from sparse_flax.model import cache_blocks
from sparse_flax.model import embedding
from sparse_flax.model import initialization
from sparse_flax.model import learned as learned_lib
from sparse_flax.model import remat as remat_lib
from sparse_flax.model import rope as rope_lib
from sparse_flax.model.layer_patterns import Entry
from sparse_flax.model.layer_patterns import PATTERN_NAMES
from sparse_flax.model.layer_patterns import patterns_of
from sparse_flax.parallel import sharding

MODALITIES = ("image", "text", "audio")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PARAM_DTYPES = ("float32", "bfloat16")
ROPES = ("none", "tokens", "axes")
AXES_THETA = 100.0  # places along an axis are fewer than tokens
# Implementations of blocks whose layers are in a loop of Python: of what a kernel makes and a scan
# keeps, it makes copies, into its stacks and out of them. XLA's own results are made in the stacks.
LOOPED = ("mosaic_gpu",)

Tokens = UInt8[Array, "B T"] | Integer[Array, "B T"]


class SparseTransformer(nnx.Module):
  """Predicts every byte of a sequence from the bytes before it (arXiv:1904.10509).

      h = embedding(tokens)
      for each layer:  h = h + dropout(attention(norm(h)));  h = h + dropout(feed_forward(norm(h)))
      logits = norm(h) W_out,  W_out zero at first: the first loss is exactly 8 bits

  The weights of the blocks are stacked in groups, one group per cycle of `attention_layers`:
  `groups[n]` holds those of layers n, n + cycle, n + 2 cycle, ... along a leading axis.
  """

  def __init__(
    self,
    *,
    modality: str,
    seq_len: int,
    width: int,
    num_layers: int,
    num_heads: int,
    ff_mult: int | float = 4,
    activation: str = "quick_gelu",
    qk_ratio: int | float = 1.0,
    attention_layers: Sequence[Entry],
    stride: int,
    summary_width: int = 0,
    sub_blocks: int = 1,
    position_shape: Sequence[int],
    dropout: int | float = 0.0,
    embed_dropout: int | float = 0.0,
    init_scheme: str = "default",
    rope: str = "none",
    qk_norm: bool = False,
    learned: Any = None,  # a mapping, which a ConfigDict is to no type checker
    learned_stages: Sequence[Any] = (),
    remat: str = "full",
    compute_dtype: str = "bfloat16",
    param_dtype: str = "float32",
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    """Args:
    modality: "image", "text" or "audio": what the bytes are.
    seq_len: the longest sequence, tokens.
    width: E, the width of the residual stream.
    num_layers: residual blocks; a multiple of the cycle length.
    num_heads: H; divides width and qk_ratio * width.
    ff_mult: hidden width of the feed-forward part over E.
    activation: f between the two products of that part: "quick_gelu", the paper's
      u sigmoid(1.702 u), or "relu2", max(u, 0)^2, which no kernel of a step has.
    qk_ratio: width of queries and keys over E; 0.5 is the paper's half size.
    attention_layers: the cycle of patterns over depth. An entry is a name of PATTERN_NAMES, or a
      tuple of names, one per group of neighbouring heads; or one of LEARNED_NAMES, "moba", "nsa"
      and "indexer", which choose the blocks of keys that they read.
    stride: l, tokens: window of local, period of column, block of block and summary.
    summary_width: c, tokens per block for "summary" and "fixed".
    sub_blocks: V, different places of the summary, head h using h % V.
    position_shape: rows of the position tables; (rows, columns, channels) of an image,
      (seq_len / stride, stride) of text and audio.
    dropout: rate in [0, 1) on the ends of the residual branches.
    embed_dropout: rate in [0, 1) on the embeddings.
    init_scheme: "paper" reads 0.125 / sqrt(fan_in) as the standard deviation, "code" has those
      of the authors' later release, "default" takes embeddings from the first and matrices from
      the second.
    rope: what turns queries and keys, beside the learned positions: "none", "tokens", the token's
      number, or "axes", its place along each axis of `position_shape`.
    qk_norm: whether queries and keys are normalised, by head.
    learned: fields of the recipes of layers that choose, `sparse_flax.learned`; a recipe takes
      those that it has. None: the defaults.
    learned_stages: how many blocks such layers read, (step, "dense" or a number) from that step of
      training on, the first of step 0; evaluation, samples and exports have the last one. (): what
      `learned` says, from the beginning to the end.
    remat: what the forward pass keeps for the backward pass. "full" keeps the input of each block
      and computes all else again, "attention" keeps attention's result too, "block" also q, k, v
      and the residual stream between the two branches, "hidden" also the argument of f and f of
      it, "dots" products with weights and attention's result (of blocks by kernels the latter
      alone, as "attention" does), "none" everything. "auto" is the first of "hidden", "block" and
      "attention" that takes at most 0.6 of the device's memory, where blocks are computed by
      kernels; else, and where the memory is unknown, "full". Under `jax.vmap` it sees one example.
    compute_dtype: of activations; norms, softmax and logits are in float32.
    param_dtype: of the weights. Training keeps averages, moments and sums of gradients in
      float32.
    implementation: of `sparse_attention`; None is the best one that works here. Blocks are
      computed by kernels, where these run, with None and "mosaic_gpu"; `residual.override` chooses
      for them alone.
    rngs: source of the initial values.

    Raises:
      ValueError: naming the argument, its value and what would be right.
    """
    _check_choice("modality", modality, MODALITIES)
    _check_choice("init_scheme", init_scheme, initialization.INIT_SCHEMES)
    _check_choice("activation", activation, tuple(block.ACTIVATIONS))
    _check_choice("rope", rope, ROPES)
    _check_choice("remat", remat, remat_lib.REMATS)
    _check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
    _check_choice("param_dtype", param_dtype, PARAM_DTYPES)
    _check_choice("implementation", implementation, (None, *api.IMPLEMENTATIONS))
    sizes = dict(seq_len=seq_len, width=width, num_layers=num_layers, num_heads=num_heads)
    for name, value in sizes.items():
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number >= 1")
    for name, rate in dict(dropout=dropout, embed_dropout=embed_dropout).items():
      if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}={rate}: must be in [0, 1)")
    if ff_mult <= 0 or ff_mult * width != round(ff_mult * width):
      raise ValueError(f"{ff_mult=}: ff_mult * {width=} must be a whole number >= 1")
    if isinstance(attention_layers, str) or not attention_layers:
      raise ValueError(f"{attention_layers=}: must be a tuple of names from {PATTERN_NAMES}")
    if num_layers % len(attention_layers):
      raise ValueError(
        f"{num_layers=}: must be a multiple of {len(attention_layers)}, "
        f"the length of {attention_layers=}"
      )
    _check_positions(modality, tuple(position_shape), seq_len)
    recipes = learned_lib.recipes_of(attention_layers=attention_layers, learned=learned)
    learned_lib.check_stages(learned_stages, recipes, seq_len)
    turn = _rope_of(rope, tuple(position_shape))
    _check_head_size(turn, rope, round(qk_ratio * width) // num_heads)
    api.load_backend(implementation)  # not within the trace of vmap

    self.modality = modality
    self.seq_len = seq_len
    self.num_layers = num_layers
    self.embed_dropout = embed_dropout
    self.remat = remat
    self.recipes = recipes
    self.patterns = patterns_of(
      attention_layers=attention_layers,
      num_heads=num_heads,
      stride=stride,
      summary_width=summary_width,
      sub_blocks=sub_blocks,
    )
    inits = initialization.make_initializers(
      init_scheme, width=width, num_tables=len(position_shape), num_layers=num_layers
    )
    dtypes = dict(dtype=jnp.dtype(compute_dtype), param_dtype=jnp.dtype(param_dtype))
    self.embedding = embedding.Embedding(
      width=width,
      position_shape=tuple(position_shape),
      token_init=inits["token_init"],
      position_init=inits["position_init"],
      rngs=rngs,
      **dtypes,
    )
    make_group = lambda rngs: nnx.List(
      block.Block(
        width=width,
        num_heads=num_heads,
        pattern=pattern,
        qk_ratio=qk_ratio,
        ff_mult=ff_mult,
        activation=activation,
        dropout=dropout,
        implementation=implementation,
        kernel_init=inits["kernel_init"],
        out_init=inits["out_init"],
        qk_norm=qk_norm,
        rope=turn,
        recipe=recipe,
        stage=learned_stages[-1][1] if learned_stages else None,
        rngs=rngs,
        **dtypes,
      )
      for pattern, recipe in zip(self.patterns, recipes, strict=True)
    )
    self.groups = nnx.vmap(make_group)(rngs.split(self.num_groups))
    self.final_norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
    self.logits = nnx.Linear(
      width,
      embedding.VOCABULARY,
      use_bias=False,
      dtype=jnp.float32,
      param_dtype=dtypes["param_dtype"],
      kernel_init=nnx.initializers.zeros_init(),
      rngs=rngs,
    )

  @property
  def num_groups(self) -> int:
    return self.num_layers // len(self.patterns)

  @property
  def chooses(self) -> bool:
    """Whether some layers choose the blocks that they read."""
    return any(recipe is not None for recipe in self.recipes)

  def __call__(
    self,
    tokens: Tokens,
    *,
    dropout_key: Key[Array, ""] | None = None,
    stage: learned_lib.Stage = None,
    losses: bool = False,
  ) -> Any:
    """Logits [B, T, 256]; those at t predict tokens[:, t] and depend on the tokens before it only.

    Args:
      tokens: bytes, any integer dtype; T <= seq_len.
      dropout_key: None turns dropout off.
      stage: of layers that choose: "dense", a number of blocks, or None for the last stage. Known
        when the call is traced.
      losses: whether to return what these layers learn from, too: {"index": scalar}, the sum over
        the layers that are indexers, or {} without one.
    """
    embed_key, layers_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x = block.drop(self._embed(tokens), self.embed_dropout, key=embed_key)
    cycle = len(self.patterns)
    seeds = None
    if layers_key is not None:
      seeds = block.seeds_of(jax.random.split(layers_key, (self.num_groups, cycle)))
    # Folded and cast here, once, not for every layer, nor again where layers are computed again.
    arrays = [layer.weights() for layer in self.groups]
    options = self.groups[0].options
    modules = any(weights is None for weights in arrays)
    if modules:
      arrays, stream = self.groups, x
      blocks = [lambda x, layer, bits: layer(x, bits=bits)] * cycle
      if self.chooses:
        stream, run_block = learned_lib.with_losses(self.recipes, x, stage=stage, losses=losses)
        blocks = [run_block] * cycle
    else:
      stream = residual.start(x, options, drops=seeds is not None and self.groups[0].dropout > 0)
      blocks = [layer.run for layer in self.groups]  # with the weights that they are given
    in_loop = not modules and options.implementation in LOOPED
    level = self._level(x, in_loop=in_loop)
    # Kernels read nothing that "hidden" does not keep, but for q and k that were moved: without
    # barriers they read their weights where these lie, in the stacks, and not copies.
    all_kept = in_loop and level == "hidden" and self.groups[0].attention.placing is None
    one_by_one = not all_kept and (in_loop or cycle > 1)
    blocks = [remat_lib.rematerialised(run, level, one_by_one=one_by_one) for run in blocks]

    # Outside of what is computed again: bits take little room, and hashes time.
    def bits_of(seeds):
      return [layer.keep_bits(x, seed) for layer, seed in zip(self.groups, seeds, strict=True)]

    def run_group(stream, arrays_and_bits):
      for run_block, arrays, bits in zip(blocks, *arrays_and_bits, strict=True):
        stream = run_block(stream, arrays, bits)
      return stream, None

    seeds = [None] * cycle if seeds is None else list(jnp.moveaxis(seeds, 1, 0))
    if in_loop:
      # Of all layers at once: hashes are most of a program's operations, and slow to compile. Words
      # come before rows, as kernels read them: what a layer has of a stack is then one piece of it.
      drawn = seeds if seeds[0] is None else jax.vmap(bits_of)(seeds)
      bits = jax.lax.optimization_barrier(jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1), drawn))
      rows_first = lambda bits: jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), bits)
      run = lambda stream, xs: run_group(stream, (xs[0], rows_first(xs[1])))
      stream, _ = _loop(run, stream, (arrays, bits))
    else:
      with_bits = lambda stream, xs: run_group(stream, (xs[0], bits_of(xs[1])))
      stream, _ = jax.lax.scan(with_bits, stream, (arrays, seeds))
    x, found = stream if self.chooses else (stream, {})
    x = x if modules else residual.end(x, options)
    logits = self.logits(self.final_norm(x))
    return (logits, found) if losses else logits

  def _level(self, x: Float[Array, "B T E"], *, in_loop: bool) -> str:
    """What is kept of blocks: `remat`, or what "auto" means for these rows."""
    if self.remat != "auto":
      return self.remat
    if not in_loop:
      return "full"  # keeping more has not paid in a scan, which copies what it keeps
    attention, hidden = self.groups[0].attention, self.groups[0].feed_forward.up.kernel.shape[-1]
    E, Q = attention.query.kernel.shape[-2:]
    widths = remat_lib.Widths(E=E, Q=Q, V=attention.value.kernel.shape[-1], F=hidden)
    rows = sharding.rows_on_a_device(*x.shape[:2])
    return remat_lib.most_that_fits(widths, rows * self.num_layers * x.dtype.itemsize)

  def attention_weights(
    self,
    tokens: Tokens,
    rows: Integer[np.ndarray, "Q"],
    *,
    reduce: Callable[[Float32[Array, "B H Q T"]], Any] = lambda weights: weights,
  ) -> Any:
    """Where the query rows `rows` of every layer and head attend: float32 probabilities.

    Args:
      tokens: bytes, any integer dtype; T <= seq_len.
      rows: the queries.
      reduce: what to make of the weights of a layer, a tree of arrays; as they are by default. Only
        one layer's weights are in memory, unless all are asked for.

    Returns:
      What `reduce` returns with an axis of layers in front: float32 [L, B, H, Q, T] by default.
    """

    def run_group(x, group):
      results = []
      for layer in group:
        x, weights = layer.with_weights(x, rows)
        results.append(reduce(weights))
      return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    _, results = jax.lax.scan(run_group, self._embed(tokens), self.groups)
    return jax.tree.map(lambda y: y.reshape(self.num_layers, *y.shape[2:]), results)

  def chosen_blocks(
    self,
    tokens: Tokens,
    *,
    reduce: Callable[[Any], Any] = lambda chosen: chosen,
  ) -> dict[int, Any]:
    """Which blocks of keys the lists of layers that choose have, by the number of the layer.

    Args:
      tokens: bytes, any integer dtype; T <= seq_len.
      reduce: what to make of the bool [B, Hl, nq, nk] of a layer, a tree of arrays.
    """

    def run_group(x, group):
      results = {}
      for n, layer in enumerate(group):
        if self.recipes[n] is not None:
          results[n] = reduce(layer.chosen(x))
        x = layer(x)
      return x, results

    cycle = len(self.patterns)
    _, results = jax.lax.scan(run_group, self._embed(tokens), self.groups)
    layers = range(self.num_layers)
    of = lambda layer: jax.tree.map(lambda y: y[layer // cycle], results[layer % cycle])
    return {layer: of(layer) for layer in layers if layer % cycle in results}

  def init_cache(
    self, batch_size: int, *, sparse: bool = True
  ) -> tuple[cache_blocks.AnyCache, ...]:
    """Empty caches for decoding `batch_size` sequences of `seq_len` tokens, one per cycle entry.

    With sparse=False they keep every key and value, and every step reads them all: for comparisons.
    """
    room = dict(num_layers=self.num_groups, sparse=sparse)
    return tuple(
      layer.attention.init_cache(batch_size, self.seq_len, **room) for layer in self.groups
    )

  def prefill(
    self, tokens: Integer[Array, "B P"], *, sparse: bool = True
  ) -> tuple[Float32[Array, "B P 256"], tuple[cache_blocks.AnyCache, ...]]:
    """Logits of positions 0 to P - 1 in one pass, and the caches as P decoding steps leave them.

    Position P is next: `decode_step(tokens[:, -1], P, caches)`.
    """

    def run_group(x, group):
      caches = []
      for layer in group:
        x, filled = layer.prefill(x, self.seq_len, sparse=sparse)
        caches.append(filled)
      return x, tuple(caches)

    x, caches = jax.lax.scan(run_group, self._embed(tokens), self.groups)
    return self.logits(self.final_norm(x)), caches

  def decode_step(
    self,
    token: Integer[Array, "B"],
    step: Integer[Array, ""] | int,
    caches: tuple[cache_blocks.AnyCache, ...],
    *,
    run_blocks: Callable | None = None,
  ) -> tuple[Float32[Array, "B 256"], tuple[cache_blocks.AnyCache, ...]]:
    """Logits of position `step`, given the byte before it and the caches of the steps before.

    Args:
      token: tokens[:, step - 1]; ignored at step 0, where the start vector takes its place.
      step: 0, 1, 2, ...; each once and in this order.
      caches: from `init_cache` or `prefill`, then from the step before; donate them to update them
        in place.
      run_blocks: (x, step, caches) -> (x, caches), all blocks by someone's kernels, as
        `run_blocks_of` in decode_fused and decode_cluster makes them; None is `Block.decode_step`.
    """
    step = jnp.asarray(step, jnp.int32)
    x, caches = (run_blocks or self._decode_blocks)(
      self.embedding.decode_step(token, step), step, caches
    )
    return self.logits(self.final_norm(x)), caches

  def _decode_blocks(self, x, step, caches):
    def run_group(carry, n_and_group):
      (x, caches), (n, group), after = carry, n_and_group, []
      for layer, cache in zip(group, caches, strict=True):
        x, cache = layer.decode_step(x, step, cache, layer=n)
        after.append(cache)
      return (x, tuple(after)), None

    with api.computed_by("xla"):
      return jax.lax.scan(run_group, (x, caches), (jnp.arange(self.num_groups), self.groups))[0]

  def _embed(self, tokens: Tokens) -> Float[Array, "B T E"]:
    if tokens.shape[1] > self.seq_len:
      raise ValueError(f"T={tokens.shape[1]} tokens are more than seq_len={self.seq_len}")
    return self.embedding(tokens)


def graph_and_shapes(**model) -> tuple[nnx.GraphDef, dict]:
  """Of SparseTransformer(**model): what nnx.merge(graph, weights) needs; no memory is used.

  Returns:
    The graph, and the weights as a dict of jax.ShapeDtypeStruct.
  """
  api.load_backend(model.get("implementation"))  # not within a trace
  build = lambda: SparseTransformer(**model, rngs=nnx.Rngs(0))
  graph, shapes = nnx.split(nnx.eval_shape(build), nnx.Param)
  return graph, nnx.to_pure_dict(shapes)


def _loop(run_group: Callable, carry: Any, stacks: Any) -> tuple[Any, None]:
  """As `lax.scan` of a function without results, and without stacks of what it keeps."""
  # Traced, differentiated and lowered once for all groups.
  run_group = jax.jit(run_group)
  leaves, structure = jax.tree.flatten(stacks)
  # By split, whose gradient is one concatenation; those of x[n] are as many whole stacks.
  parts = [jax.lax.split(x, [1] * len(x)) for x in leaves]
  for group in zip(*parts, strict=True):
    carry, _ = run_group(carry, jax.tree.unflatten(structure, [x[0] for x in group]))
  return carry, None


def _rope_of(name: str, position_shape: tuple[int, ...]) -> rope_lib.Rope | None:
  if name == "none":
    return None
  return rope_lib.Rope() if name == "tokens" else rope_lib.Rope(AXES_THETA, position_shape)


def _check_head_size(turn: rope_lib.Rope | None, name: str, size: int) -> None:
  axes = 0 if turn is None else max(1, len(turn.shape))
  if axes and (size % 2 or size < 2 * axes):
    raise ValueError(
      f"rope={name!r}: queries and keys have qk_ratio * width / num_heads = {size} features per "
      f"head, must be an even number >= {2 * axes}"
    )


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name}={value!r}: must be one of {choices}")


def _check_positions(modality: str, shape: tuple[int, ...], seq_len: int) -> None:
  places = math.prod(shape)
  if not shape or min(shape) < 1:
    raise ValueError(f"position_shape={shape}: must be whole numbers >= 1")
  if modality == "image" and (len(shape) != 3 or places != seq_len):
    raise ValueError(
      f"position_shape={shape}: an image needs (rows, columns, channels) with product {seq_len=}"
    )
  if modality != "image" and (len(shape) != 2 or places < seq_len):
    raise ValueError(
      f"position_shape={shape}: {modality} needs (seq_len / stride, stride), "
      f"whose product is {places} and must reach {seq_len=}"
    )
