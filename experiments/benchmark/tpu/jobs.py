"""The programs that are compiled for TPUs, by name, one JSON line each; `tpu_aot` runs this.

  python -m experiments.benchmark.tpu_jobs NAME ...

Names: kernels/CHIP/CASE, splash/CHIP/MASK/BLOCK, step/CHIP/CONFIG/DEVICES. With `small:` before it
a kernel has blocks of 128, which compile in seconds, instead of those it runs with.
"""

import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from experiments import cli
from experiments.benchmark.tpu import compiler
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import blocks
from pallas_kernels.mosaic_tpu import steps
from pallas_kernels.mosaic_tpu import views
from pallas_kernels.mosaic_tpu.kernels import INTERLEAVED
from sparse_flax import train
from sparse_flax.parallel import sharding

# The paper's bodies, and how many sequences a chip has at a time.
BODIES = {"cifar10": 16, "enwik8": 4, "imagenet64": 4, "audio": 1, "audio:1m": 1}


@dataclasses.dataclass(frozen=True)
class Case:
  """A call of sparse attention."""

  pattern: patterns.Pattern
  T: int = 8_192
  H: int = 8
  Hkv: int = 8
  D: int = 128
  Dv: int = 0  # 0: as D
  dtype: str = "bfloat16"
  soft_cap: float | None = None
  segments: bool = False
  masks: bool = False


_layout = np.random.default_rng(0).random((64, 64)) < 0.3
_narrow = functools.partial(Case, T=12_288, D=64)
CASES = {
  # 8 heads of 128: read as a program's arguments lie.
  "dense": Case(patterns.Dense()),
  "local": Case(patterns.Local(1_024)),
  "column": Case(patterns.Column(128), T=12_288),
  "strided": Case(patterns.Strided(128), T=4_096),
  "fixed": Case(patterns.Fixed(128, 32, 4), T=4_096),
  "layout": Case(patterns.BlockLayout(_layout, 128)),
  # 4 heads: side by side, as projections leave them.
  "dense_lanes": Case(patterns.Dense(), H=4, Hkv=4),
  "local_lanes": Case(patterns.Local(1_024), H=4, Hkv=4),
  "long": Case(patterns.Local(1_024), T=131_072, H=1, Hkv=1),  # two kernels for the gradients
  "where": Case(patterns.Where(lambda i, j: (i - j) % 3 == 0), T=4_096, H=4, Hkv=4),
  "grouped": Case(patterns.Dense(), T=4_096, H=8, Hkv=2),
  "per_head": Case(patterns.PerHead((patterns.Local(128), patterns.Column(128))), T=4_096),
  "cap": Case(patterns.Dense(), T=4_096, H=4, Hkv=4, soft_cap=30.0),
  "segments": Case(patterns.Dense(), T=4_096, H=4, Hkv=4, segments=True),
  "masks": Case(patterns.Dense(), T=4_096, H=4, Hkv=4, masks=True),
  "float32": Case(patterns.Dense(), T=4_096, H=2, Hkv=2, dtype="float32"),
  "wide": Case(patterns.Dense(), T=4_096, H=2, Hkv=2, D=256),
  # The paper's heads.
  "enwik8": _narrow(patterns.Fixed(128, 32, 4)),
  "enwik8_local": _narrow(patterns.Local(128)),
  "enwik8_column": _narrow(patterns.Column(128)),
  "imagenet64": _narrow(patterns.Strided(128), H=16, Hkv=16, D=32),
  "cifar10_column": Case(patterns.Column(96), T=3_072, H=2, Hkv=2, D=64, Dv=128),
}


def mesh_of(devices: list) -> jax.sharding.Mesh:
  shape = (len(devices), 1, 1, 1)
  auto = (jax.sharding.AxisType.Auto,) * 4
  return jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.AXES, axis_types=auto)


def kernels(chip: str, name: str) -> list[dict]:
  """Forward, and forward with backward, of a call on one device; a row for every kernel."""
  case = CASES[name]
  mesh = mesh_of(compiler.devices(compiler.CHIPS[chip].topology)[:1])
  array = lambda *shape, dtype=case.dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.replicated(mesh)
  )
  Dv = case.Dv or case.D
  q, k = (array(1, case.T, heads, case.D) for heads in (case.H, case.Hkv))
  v, dout = (array(1, case.T, heads, Dv) for heads in (case.Hkv, case.H))
  masks = {}
  if case.segments:
    masks["segment_ids"] = array(1, case.T, dtype=jnp.int32)
  if case.masks:
    masks["block_mask"] = array(1, case.H, case.T // 128, case.T // 128, dtype=bool)

  def attend(q, k, v, masks):
    options = dict(pattern=case.pattern, logits_soft_cap=case.soft_cap)
    return sparse_attention(q, k, v, **options, **masks)

  def both(q, k, v, dout, masks):
    out, vjp = jax.vjp(lambda *x: attend(*x, masks), q, k, v)
    return out, *vjp(dout)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # patterns' tables are computed here
    jax.eval_shape(both, q, k, v, dout, masks)
  rows = []
  for direction, arguments in ((attend, (q, k, v)), (both, (q, k, v, dout))):
    start = time.monotonic()
    program = compiler.Program(direction, (*arguments, masks), mesh)
    seconds = time.monotonic() - start
    about = dict(
      chip=chip,
      case=name,
      direction="forward" if direction is attend else "forward and backward",
      pattern=repr(case.pattern) if name != "layout" else "BlockLayout(64 x 64, 128)",
      **{field: getattr(case, field) for field in ("T", "H", "Hkv", "D", "Dv", "dtype")},
      moves=program.moves(case.T * case.D),
      hbm_need=program.hbm_need(),
      compile_seconds=round(seconds, 1),
    )
    launches = [] if masks else compiler.launches(program.jaxpr)
    arrays = (2 if direction is attend else 6) * case.T * case.H * (case.D + Dv)
    if launches:
      about["hbm_bytes"] = sum(x.bytes for x in launches) + program.other_bytes()
      about["hbm_bytes_of_arrays"] = arrays * jnp.dtype(case.dtype).itemsize
    names = program.kernels("attention_")
    rows.append(about | dict(kernels=[_kernel(program, x, launches) for x in names]))
  return rows


def _kernel(program: compiler.Program, name: str, launches: list[compiler.Launch]) -> dict:
  """Bundles and memory of a kernel, and its steps where they are constants and its own."""
  whole, _ = program.bundles(name, 0)
  row = dict(kernel=name.partition(".")[0], bundles=whole, vmem_bytes=program.vmem(name))
  matching = [x for x in launches if x.name == row["kernel"]]
  if len(matching) != 1:
    return row
  flags = matching[0].scalars[1]
  count = lambda flag: int((flags & flag != 0).sum()) * matching[0].grid[0] * matching[0].grid[1]
  row |= dict(
    grid=matching[0].grid, visited=count(steps.FULL | steps.PARTIAL), windows=matching[0].bytes
  )
  heads, kinds = _heads(matching[0]), [kind for kind in (steps.FULL, steps.PARTIAL) if count(kind)]
  bodies = 1  # neighbours of one condition are one part
  if len(kinds) == 2:
    bodies = 2 * -(-heads // max(INTERLEAVED, heads // 4))  # two of 8 sublanes, at least
  # The kernel's conditions, in its order: the very first step, a line's first, bodies, its last.
  has_dq = row["kernel"] == "attention_backward"
  _, parts = program.bundles(name, bodies + (4 if has_dq else 2))
  once, store = (parts.pop(0), parts.pop()) if has_dq else (0, 0)
  first, *bodies, last = parts
  of_kind = {kind: sum(bodies[n :: len(kinds)]) for n, kind in enumerate(kinds)}
  full, masked = (of_kind.get(kind, 0) for kind in (steps.FULL, steps.PARTIAL))
  issued = (
    (whole - once - store - first - last - full - masked) * int(np.prod(matching[0].grid))
    + once * matching[0].grid[0] * matching[0].grid[1]
    + first * count(steps.FIRST)
    + last * count(steps.LAST)
    + store * count(steps.STORE)
    + full * count(steps.FULL)
    + masked * count(steps.PARTIAL)
  )
  return row | dict(
    heads_of_step=heads,
    bundles_full=full / heads,
    bundles_masked=masked / heads,
    bundles_issued=issued,
    bundles_per_block=issued / row["visited"] / heads,
  )


def _heads(launch: compiler.Launch) -> int:
  """Heads of a step: rows of the log-sum-exps' block."""
  tiles = [shape for shape in launch.blocks if len(shape) == 4 and shape[:2] == (1, 1)]
  return tiles[0][2]


def splash_attention(chip: str, mask: str, block: str) -> list[dict]:
  """JAX's own, of T = 8,192 and 8 heads of 128, forward and its one backward kernel."""
  T, H, D, size = 8_192, 8, 128, int(block)
  mesh = mesh_of(compiler.devices(compiler.CHIPS[chip].topology)[:1])
  q = jax.ShapeDtypeStruct((H, T, D), jnp.bfloat16, sharding=sharding.replicated(mesh))
  pattern = {"dense": patterns.Dense(), "local": patterns.Local(1_024)}[mask]
  masks = dict(
    dense=splash_mask.CausalMask((T, T)), local=splash_mask.LocalMask((T, T), (1_023, 0), 0)
  )
  sizes = {f"block_{x}": size for x in ("q", "kv", "q_dkv", "kv_dkv")}
  sizes |= dict(block_kv_compute=min(size, 1_024), block_kv_dkv_compute=min(size, 512))
  attend = splash.make_splash_mha(
    splash_mask.MultiHeadMask([masks[mask]] * H),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=True),
  )

  def both(q, k, v, dout):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)

  program = compiler.Program(both, (q,) * 4, mesh)
  some = blocks.blocks_of(pattern, T, T, size, size).some
  needed = int(blocks.blocks_of(pattern, T, T, 512, 512).some.sum())
  kernels = []
  for name in program.kernels("splash_mha"):
    whole, (first, body, last) = program.bundles(name, 3)
    launch = next(x for x in compiler.launches(program.jaxpr) if x.name == name.partition(".")[0])
    grid_steps, lines = int(np.prod(launch.grid)) // H, T // size
    between = whole - first - body - last
    issued = between * grid_steps + (first + last) * lines + body * int(some.sum())
    kernels.append(
      dict(
        kernel=name.partition(".")[0],
        bundles=whole,
        vmem_bytes=program.vmem(name),
        bundles_issued=issued * H,
        bundles_per_block=issued / needed,
      )
    )
  return [dict(chip=chip, mask=mask, block=size, kernels=kernels)]


def step(chip: str, name: str, devices: str) -> list[dict]:
  """A training step of one of the paper's models, as its config has it."""
  config = cli.recipe(name)
  many = int(devices) > 1
  topology = compiler.PODS[chip] if many else compiler.CHIPS[chip].topology
  mesh = mesh_of(compiler.devices(topology)[: int(devices)])
  init, one_step = train.make_step(config)
  key = jax.eval_shape(lambda: jax.random.key(0))
  everywhere = sharding.replicated(mesh)
  put = lambda x, where=everywhere: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  state = jax.tree.map(put, jax.eval_shape(init, key))
  shape = (BODIES[name] * mesh.size, config.model.seq_len)
  tokens = put(jax.ShapeDtypeStruct(shape, jnp.uint8), sharding.by_batch(mesh))
  start = time.monotonic()
  options = dict(donate_argnums=0, out_shardings=everywhere)
  program = compiler.Program(one_step, (state, tokens, put(key)), mesh, **options)
  row = dict(
    chip=chip,
    config=name,
    devices=mesh.size,
    sequences_per_device=BODIES[name],
    hbm_need=program.hbm_need(),
    hbm=compiler.CHIPS[chip].hbm,
    collectives=program.collectives(),
    num_kernels=program.hlo.count('custom_call_target="tpu_custom_call"'),
    moves=len(program.moves(config.model.seq_len * config.model.width // 2)),
    compile_seconds=round(time.monotonic() - start, 1),
  )
  return [row]


def main(names: list[str]) -> None:
  """Prints {"job": name, "rows": [...]} for each."""
  block = views.BLOCK
  for name in names:
    views.BLOCK = 128 if name.startswith("small:") else block
    what, *arguments = name.removeprefix("small:").split("/")
    run = {"kernels": kernels, "splash": splash_attention, "step": step}[what]
    print(json.dumps(dict(job=name, rows=run(*arguments))), flush=True)
    jax.clear_caches()


if __name__ == "__main__":
  main(sys.argv[1:])
