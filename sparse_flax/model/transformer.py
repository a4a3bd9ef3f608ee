"""The Sparse Transformer: embeddings, groups of residual blocks one after the other, logits."""

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
from sparse_flax.model import arguments
from sparse_flax.model import block
from sparse_flax.model import cache_blocks
from sparse_flax.model import embedding
from sparse_flax.model import initialization
from sparse_flax.model import learned as learned_lib
from sparse_flax.model import levels
from sparse_flax.model import order as order_lib
from sparse_flax.model import remat as remat_lib
from sparse_flax.model import rope as rope_lib
from sparse_flax.model.layer_patterns import Entry
from sparse_flax.parallel import sharding

# Implementations of blocks whose layers are in a loop of Python: of what a kernel makes and a scan
# keeps, it makes copies, into its stacks and out of them. XLA's own results are made in the stacks.
LOOPED = ("mosaic_gpu",)

Tokens = UInt8[Array, "B T"] | Integer[Array, "B T"]
Caches = tuple[cache_blocks.AnyCache, ...] | levels.Caches


class SparseTransformer(nnx.Module):
  """Predicts every byte of a sequence from the bytes before it (arXiv:1904.10509).

      h = embedding(tokens)
      for each layer:  h = h + dropout(attention(norm(h)));  h = h + dropout(feed_forward(norm(h)))
      logits = norm(h) W_out,  W_out zero at first: the first loss is exactly 8 bits

  The weights of the blocks are stacked in groups, one group per cycle of `attention_layers`:
  `groups[n]` holds those of layers n, n + cycle, n + 2 cycle, ... along a leading axis.

  With `inner` the layers in the middle run on groups of tokens: `before`, `inner` and `after` take
  the place of `groups`, and `inner` has groups of its own, or these three again.
  """

  # Of the model, as of its levels: `groups`, or the other three.
  groups: Any = None
  before: Any = None
  inner: levels.Level | None = None
  after: Any = None

  def __init__(
    self,
    *,
    modality: str,
    seq_len: int,
    width: int,
    num_layers: int,
    num_layers_after: int = 0,
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
    inner: Any = None,
    order: str = "raster",
    patch: int = 2,
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
    num_layers: residual blocks; a multiple of the cycle length. With `inner` those before it, 0
      too.
    num_layers_after: with `inner`, the residual blocks behind it; a multiple of the cycle length.
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
    inner: layers on groups of tokens; {} has none. It needs shorten, the tokens of a group, and
      num_layers; it may have num_layers_after, width, num_heads, ff_mult, qk_ratio,
      attention_layers, stride, summary_width, sub_blocks and dropout, which are else those of the
      level around it and count groups; pool ("linear" or "mean"), up ("linear" or "repeat"),
      positions (False), and an inner of its own.
    order: of the bytes of an image: "raster", row by row, or "patches", square by square, and row
      by row in each. Tokens keep the learned positions of their bytes.
    patch: pixels of a side of these squares; divides rows and columns.
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
    arguments.check_choices(
      modality=modality,
      init_scheme=init_scheme,
      activation=activation,
      rope=rope,
      remat=remat,
      compute_dtype=compute_dtype,
      param_dtype=param_dtype,
      implementation=implementation,
    )
    arguments.check_sizes(seq_len=seq_len, embed_dropout=embed_dropout)
    specs = levels.specs_of(
      seq_len=seq_len,
      width=width,
      num_layers=num_layers,
      num_layers_after=num_layers_after,
      num_heads=num_heads,
      ff_mult=ff_mult,
      qk_ratio=qk_ratio,
      attention_layers=attention_layers,
      stride=stride,
      summary_width=summary_width,
      sub_blocks=sub_blocks,
      dropout=dropout,
      inner=inner,
    )
    position_shape = tuple(position_shape)
    arguments.check_positions(position_shape, modality=modality, seq_len=seq_len)
    recipes_of = lambda spec: learned_lib.recipes_of(
      attention_layers=spec.attention_layers, learned=learned
    )
    recipes = learned_lib.in_levels([(spec.title, recipes_of(spec)) for spec in specs])
    learned_lib.check_stages(learned_stages, recipes, seq_len)
    reads = order_lib.Order(order, position_shape, patch)
    arguments.check_rope(rope, reads, specs)
    api.load_backend(implementation)  # not within the trace of vmap

    self.modality = modality
    self.num_layers = sum(spec.depth for spec in specs)
    self.embed_dropout = embed_dropout
    self.remat = remat
    self.recipes = recipes
    self.patterns = specs[0].patterns
    # What "auto" keeps of all levels: columns of their rows, for one token.
    self.columns = sum(spec.depth * spec.width * spec.length for spec in specs) / seq_len
    self.most_heads = max(spec.num_heads for spec in specs)

    inits = initialization.make_initializers(
      init_scheme, width=width, num_tables=len(position_shape), num_layers=self.num_layers
    )
    dtypes = dict(dtype=jnp.dtype(compute_dtype), param_dtype=jnp.dtype(param_dtype))
    self.embedding = embedding.Embedding(
      width=width,
      position_shape=position_shape,
      token_init=inits["token_init"],
      position_init=inits["position_init"],
      order=None if reads.is_raster else reads,
      rngs=rngs,
      **dtypes,
    )

    blocks = dict(
      activation=activation,
      implementation=implementation,
      kernel_init=inits["kernel_init"],
      out_init=inits["out_init"],
      qk_norm=qk_norm,
      stage=learned_stages[-1][1] if learned_stages else None,
      **dtypes,
    )

    def make_stack(spec, num_layers, rngs):
      turn = rope_lib.of_level(rope, position_shape, factor=spec.factor)
      return _stack(spec, num_layers, recipes_of(spec), rope=turn, rngs=rngs, **blocks)

    levels.add_layers(
      self,
      specs,
      make_stack=make_stack,
      kernel_init=inits["kernel_init"],
      out_init=inits["out_init"],
      position_init=inits["position_init"],
      epsilon=block.NORM_EPSILON,
      rngs=rngs,
      **dtypes,
    )
    self.final_norm = nnx.LayerNorm(width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
    self.logits = _logits(width, param_dtype=dtypes["param_dtype"], rngs=rngs)

  @property
  def num_groups(self) -> int:
    """Repetitions of the cycle, of a model without inner levels."""
    return levels.num_groups(self.groups)

  @property
  def factors(self) -> tuple[int, ...]:
    """`shorten` of each inner level, the outermost first; () of a model that has none."""
    return levels.factors(self)

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
    x, found = self.hidden(tokens, dropout_key=dropout_key, stage=stage, losses=losses)
    return (self.head(x), found) if losses else self.head(x)

  def hidden(
    self,
    tokens: Tokens,
    *,
    dropout_key: Key[Array, ""] | None = None,
    stage: learned_lib.Stage = None,
    losses: bool = False,
  ) -> tuple[Float[Array, "B T E"], dict[str, Float32[Array, ""]]]:
    """The residual stream behind all blocks, and losses of layers that choose, by name.

    `head` makes logits of the stream, or of some of its rows. Arguments are those of a call.

    Raises:
      NotImplementedError: a model with inner levels, where a mesh has an axis for sequences.
    """
    parts = jax.sharding.get_abstract_mesh().shape.get("sequence", 1)
    if self.factors and parts > 1:
      raise NotImplementedError(
        f"mesh axis sequence={parts}: the groups of a device would have to begin with a row of the "
        "device before; give the mesh sequence=1 for a model with inner levels"
      )
    embed_key, layers_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    x = block.drop(self._embed(tokens), self.embed_dropout, key=embed_key)
    if self.chooses:  # a model of one level
      return self._run_stack(self, self.groups, x, layers_key, stage=stage, losses=losses)
    run_stack = lambda *stack: self._run_stack(*stack)[0]
    return levels.run(self, x, layers_key, run_stack=run_stack, keep=self.remat == "none"), {}

  def head(self, x: Float[Array, "B T E"]) -> Float32[Array, "B T 256"]:
    """Logits of rows of the residual stream."""
    return self.logits(self.final_norm(x))

  def _run_stack(self, level, groups, x, key, *, stage=None, losses=False):
    """All blocks of a stack: the stream, and the losses of layers that choose."""
    cycle = len(groups)
    seeds = None
    if key is not None:
      seeds = block.seeds_of(jax.random.split(key, (levels.num_groups(groups), cycle)))
    # Folded and cast here, once, not for every layer, nor again where layers are computed again.
    arrays = [layer.weights() for layer in groups]
    options = groups[0].options
    modules = any(weights is None for weights in arrays)
    if modules:
      arrays, stream = groups, x
      blocks = [lambda x, layer, bits: layer(x, bits=bits)] * cycle
      if self.chooses:
        stream, run_block = learned_lib.with_losses(self.recipes, x, stage=stage, losses=losses)
        blocks = [run_block] * cycle
    else:
      stream = residual.start(x, options, drops=seeds is not None and groups[0].dropout > 0)
      blocks = [layer.run for layer in groups]  # with the weights that they are given
    in_loop = not modules and options.implementation in LOOPED
    remat = self._remat_of(level, groups, x, in_loop=in_loop)
    # Kernels read nothing that "hidden" does not keep, but for q and k that were moved: without
    # barriers they read their weights where these lie, in the stacks, and not copies.
    all_kept = in_loop and remat == "hidden" and groups[0].attention.placing is None
    one_by_one = not all_kept and (in_loop or cycle > 1)
    blocks = [remat_lib.rematerialised(run, remat, one_by_one=one_by_one) for run in blocks]

    # Outside of what is computed again: bits take little room, and hashes time.
    def bits_of(seeds):
      return [layer.keep_bits(x, seed) for layer, seed in zip(groups, seeds, strict=True)]

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
    return (x if modules else residual.end(x, options)), found

  def _remat_of(self, level, groups, x: Float[Array, "B T E"], *, in_loop: bool) -> str:
    """What is kept of blocks: `remat`, or what "auto" means for these rows."""
    if self.remat != "auto":
      return self.remat
    if not in_loop:
      return "full"  # keeping more has not paid in a scan, which copies what it keeps
    attention, hidden = groups[0].attention, groups[0].feed_forward.up.kernel.shape[-1]
    E, Q = attention.query.kernel.shape[-2:]
    widths = remat_lib.Widths(E=E, Q=Q, V=attention.value.kernel.shape[-1], F=hidden)
    rows = sharding.rows_on_a_device(*x.shape[:2])
    # As if all levels were layers of this one.
    layers = round(self.columns * self.seq_len / (E * level.seq_len))
    return remat_lib.most_that_fits(widths, rows * layers * x.dtype.itemsize)

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
      Layers count in the order in which they run. The weight that one of an inner level gives a
      group is shared by the slots that the group pools; levels with fewer heads than others have
      zeros for the rest.
    """

    def run_stack(groups, x, rows, factor):
      def run_group(x, group):
        results = []
        for layer in group:
          x, weights = layer.with_weights(x, rows)
          results.append(reduce(levels.on_slots(weights, factor, T, self.most_heads)))
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

      x, results = jax.lax.scan(run_group, x, groups)
      return x, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), results)

    T = tokens.shape[1]
    _, results = levels.run_looking(self, self._embed(tokens), rows, run_stack=run_stack)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

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

  def init_cache(self, batch_size: int, *, sparse: bool = True) -> Caches:
    """Empty caches for decoding `batch_size` sequences of `seq_len` tokens, one per cycle entry.

    With sparse=False they keep every key and value, and every step reads them all: for comparisons.
    Of a model with inner levels they are `levels.Caches`. B is the second axis of all arrays.
    """

    def of_stack(groups, length):
      room = dict(num_layers=levels.num_groups(groups), sparse=sparse)
      return tuple(layer.attention.init_cache(batch_size, length, **room) for layer in groups)

    sizes = dict(width=self.embedding.start.shape[-1], dtype=self.embedding.dtype)
    return levels.init_caches(self, batch_size, **sizes, of_stack=of_stack)

  def prefill(
    self, tokens: Integer[Array, "B P"], *, sparse: bool = True
  ) -> tuple[Float32[Array, "B P 256"], Caches]:
    """Logits of positions 0 to P - 1 in one pass, and the caches as P decoding steps leave them.

    Position P is next: `decode_step(tokens[:, -1], P, caches)`.
    """

    def of_stack(groups, x, length):
      def run_group(x, group):
        caches = []
        for layer in group:
          x, filled = layer.prefill(x, length, sparse=sparse)
          caches.append(filled)
        return x, tuple(caches)

      return jax.lax.scan(run_group, x, groups)

    x, caches = levels.prefill(self, self._embed(tokens), of_stack=of_stack)
    return self.logits(self.final_norm(x)), caches

  def decode_step(
    self,
    token: Integer[Array, "B"],
    step: Integer[Array, ""] | int,
    caches: Caches,
    *,
    run_blocks: Callable | dict[str, Callable] | None = None,
    beginning: int | None = None,
  ) -> tuple[Float32[Array, "B 256"], Caches]:
    """Logits of position `step`, given the byte before it and the caches of the steps before.

    Args:
      token: tokens[:, step - 1]; ignored at step 0, where the start vector takes its place.
      step: 0, 1, 2, ...; each once and in this order.
      caches: from `init_cache` or `prefill`, then from the step before; donate them to update them
        in place.
      run_blocks: (x, step, caches) -> (x, caches), all blocks by someone's kernels, as
        `run_blocks_of` in decode_fused and decode_cluster makes them; None is `Block.decode_step`.
        Of a model with inner levels one for each of `levels.stacks`, by its name.
      beginning: how many inner levels begin a group with this step; None: as `step` says, which is
        then a number and not traced.

    Raises:
      ValueError: a traced step of a model with inner levels.
    """
    if beginning is None:
      beginning = self._beginning_at(step)
    step = jnp.asarray(step, jnp.int32)

    def of_stack(name, groups, x, step, caches):
      run = run_blocks[name] if isinstance(run_blocks, dict) else run_blocks
      return run(x, step, caches) if run else _decode_blocks(groups, x, step, caches)

    x = self.embedding.decode_step(token, step)
    options = dict(beginning=beginning, of_stack=of_stack)
    x, caches = levels.decode_step(self, x, step, caches, **options)
    return self.logits(self.final_norm(x)), caches

  def _beginning_at(self, step: Integer[Array, ""] | int) -> int:
    if not self.factors:
      return 0
    if isinstance(step, jax.core.Tracer):
      raise ValueError(
        "step is traced: a model with inner levels needs `beginning` beside it, as "
        "`levels.beginning_at` gives it"
      )
    return levels.beginning_at(int(step), self.factors)

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


def _stack(
  spec: levels.Spec,
  num_layers: int,
  recipes: Sequence[learned_lib.Recipe | None],
  *,
  rngs: nnx.Rngs,
  **options: Any,
) -> Any:
  """A list of blocks, one for each entry of a cycle; their weights have an axis for groups."""

  def make_group(rngs):
    return nnx.List(
      block.Block(
        width=spec.width,
        num_heads=spec.num_heads,
        pattern=pattern,
        qk_ratio=spec.qk_ratio,
        ff_mult=spec.ff_mult,
        dropout=spec.dropout,
        recipe=recipe,
        rngs=rngs,
        **options,
      )
      for pattern, recipe in zip(spec.patterns, recipes, strict=True)
    )

  return nnx.vmap(make_group)(rngs.split(num_layers // len(spec.patterns)))


def _logits(width: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
  """W_out, zero at first: the first loss is exactly 8 bits."""
  return nnx.Linear(
    width,
    embedding.VOCABULARY,
    use_bias=False,
    dtype=jnp.float32,
    param_dtype=param_dtype,
    kernel_init=nnx.initializers.zeros_init(),
    dot_general=_multiply,
    rngs=rngs,
  )


def _multiply(x: Array, kernel: Array, *dims: Any, **options: Any) -> Array:
  """`residual.multiply` for `nnx.Linear`, whose dimensions and options are the usual ones."""
  del dims, options
  return residual.multiply(x, kernel)


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


def _decode_blocks(groups, x, step, caches):
  """A step of all blocks of a stack."""

  def run_group(carry, n_and_group):
    (x, caches), (n, group), after = carry, n_and_group, []
    for layer, cache in zip(group, caches, strict=True):
      x, cache = layer.decode_step(x, step, cache, layer=n)
      after.append(cache)
    return (x, tuple(after)), None

  with api.computed_by("xla"):
    numbers = jnp.arange(levels.num_groups(groups))
    return jax.lax.scan(run_group, (x, caches), (numbers, groups))[0]
