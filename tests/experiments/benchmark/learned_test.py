"""The benchmark of chosen blocks without a GPU: lists, arithmetic, rows, failures.

Kernels are timed by a stand-in for CUPTI; `xla` stands in for the kernels and for cuDNN.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from experiments.benchmark import __main__ as command
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import block_sparse
from experiments.benchmark.gpu import learned
from experiments.benchmark.gpu import learned_models
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu.steps import drawn
from pallas_kernels import pool_blocks
from pallas_kernels import select_blocks
from pallas_kernels import sparse_attention
from sparse_flax.model import learned as recipes

T, H, D, TILE = 128, 2, 8, 8  # 136 causal tiles
FORMS = {"b128": (8, 8), "b64": (4, 8), "b128_q16": (8, 2)}
SHAPE = "d8_t128"
LONG, WIDTH = 256, 16


def calls_of(call, times):
  """In the place of CUPTI: 1.5 ms of 2 ms are in kernels of ours."""
  jax.block_until_ready(call())
  return [[("mosaic", 1.5), ("other", 0.5)]] * times


def xla_attention(q, k, v):
  """In the place of cuDNN, which runs on GPUs only."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


@pytest.fixture
def tiny(monkeypatch):
  """One short shape, in this process, by xla, and 2 ms for every call."""
  for name, value in dict(
    OURS="xla", H=H, SHAPES={SHAPE: block_sparse.Shape(T, D, Hkv=H)}, SHARES=(4, 8), FORMS=FORMS
  ).items():
    monkeypatch.setattr(learned, name, value)
  monkeypatch.setattr(learned, "PARTS", (*learned.PARTS, SHAPE))
  monkeypatch.setattr(block_sparse, "H", H)
  monkeypatch.setattr(drawn, "TILE", TILE)
  monkeypatch.setattr(attention, "cudnn", xla_attention)
  monkeypatch.setattr(timing, "WORKERS", 0)
  monkeypatch.setattr(timing, "calls_of", calls_of)
  learned.work_of.cache_clear()
  yield
  learned.work_of.cache_clear()


@pytest.fixture
def tiny_models(tiny, monkeypatch):
  """Short sequences through small layers, and an allocator that tells of ever more."""
  for name, value in dict(
    LONG=LONG,
    WIDTH=WIDTH,
    HEADS=H,
    RECIPES={
      "moba": recipes.Moba(block_size=8, top=4, query_block=8),
      "nsa": recipes.Nsa(block_size=16, top=4, query_block=8, window=16),
      "indexer": recipes.Indexer(block_size=8, top=4, query_block=8, index_size=8),
    },
    STEP_LAYERS=2,
    DECODED=256,
    BATCH=2,
    DECODE_LAYERS=1,
    DECODE_STEPS=2,
    DENSE_STEPS=("cluster", "xla"),
    peak_bytes=iter(range(10**6, 10**9, 10**6)).__next__,
  ).items():
    monkeypatch.setattr(learned_models, name, value)


def rows_in(folder):
  (path,) = folder.iterdir()
  assert path.name.startswith("learned_") and path.suffix == ".json"
  return json.loads(path.read_text())["rows"]


# ------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("T", [128, 100])
def test_drawn_lists_are_lists_of_a_selection(form, T, monkeypatch):
  monkeypatch.setattr(drawn, "TILE", TILE)
  b, Q = form
  lists = drawn.lists(T, b, Q, 4, H)
  keys = jax.random.split(jax.random.key(0))
  q, k = (jax.random.normal(key, (1, T, H, D)) for key in keys)
  chosen = np.asarray(
    select_blocks(q, pool_blocks(k, b), block_size=b, query_block=Q, top=4, lists=H)
  )
  assert lists.dtype == np.int32 and lists.shape == chosen.shape[1:]
  # As many entries; the own blocks and the first one in all; ascending, each once.
  np.testing.assert_array_equal((lists >= 0).sum(-1), (chosen[0] >= 0).sum(-1))
  for of_head in lists:
    for n, one in enumerate(of_head):
      there = one[one >= 0]
      own = range(n * Q // b, (min(T, n * Q + Q) - 1) // b + 1)
      assert {0, *own} <= set(there) and there.max() == own[-1]
      assert (np.diff(there) > 0).all() and (one[len(there) :] == -1).all()
  assert drawn.count(T, b, Q, 4) == (lists[0] >= 0).sum()
  assert not np.array_equal(lists[0], lists[1])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tiles_are_the_union_over_the_queries_of_a_tile(form, monkeypatch):
  monkeypatch.setattr(drawn, "TILE", TILE)
  b, Q = form
  mask = np.zeros((H, T, T), bool)
  for h, of_head in enumerate(drawn.lists(T, b, Q, 4, H)):
    for n, one in enumerate(of_head):
      for j in one[one >= 0]:
        mask[h, n * Q : n * Q + Q, j * b : j * b + b] = True
  union = mask.reshape(H, T // TILE, TILE, T // b, b).any((2, 4)).sum()
  assert drawn.num_tiles(T, b, Q, 4, H) == union * b / TILE
  entries = mask.sum() / TILE**2
  assert entries == union * b / TILE if Q == TILE else entries < union * b / TILE < 8 * entries


def test_densities_are_about_an_eighth_and_a_sixteenth():
  for shape in learned.SHAPES.values():
    found = [learned.work_of(shape.T, 128, 128, shape.T // 128 // x) for x in learned.SHARES]
    assert [round(1 / work["density"], 1) for work in found] == pytest.approx([8.2, 16.2], abs=0.15)
    assert all(work["occupancy"] == 1 for work in found)


# ------------------------------------------------------------------------------------------- rates


def test_rates_are_tiles_per_time_over_cudnns(tiny):
  of = dict(shape="s", direction="fwdbwd", form="f", top=2, seq_len=T, tiles=34)
  row = lambda kind, ms, **more: of | dict(kind=kind, ms=ms) | more
  dense, chosen = row("dense", 8.0), row("with_selection", 2.0, attention_ms=1.6)
  select = row("select", 0.1, direction="fwd")
  failed, refused = row("given", None, error="no"), row("given", None, unsupported="no")
  rows = [dense, chosen, select, failed, refused]
  learned.compare(rows)
  # 34 of the 272 causal tiles of both heads.
  assert chosen["rate"] == 0.5 and chosen["rate_of_attention"] == 0.625
  assert select["share"] == 0.05 and "rate" not in select
  assert all("rate" not in one for one in (dense, failed, refused))
  learned.compare(without := [row("dense", None, error="no"), row("given", 2.0)])
  assert without[1]["rate"] is None


@pytest.mark.one_day_in_six(4)
@pytest.mark.promotes
def test_every_row_of_rates_has_its_figures(tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(learned.FORMS, "b64", (4, 16))
  assert learned.run(tmp_path, ("rates",))
  rows = {(r["kind"], r["form"], r["top"], r["direction"]): r for r in rows_in(tmp_path)}
  both = ("fwd", "fwdbwd")
  expected = {("dense", None, None, way) for way in both}
  for top in (4, 2):
    expected |= {(kind, "b128", top, way) for kind in ("given", "with_selection") for way in both}
    expected |= {("select", "b128", top, "fwd")}
  expected |= {(kind, "b64", 8, way) for kind in ("given", "with_selection") for way in both}
  expected |= {("given", "b128_q16", 4, way) for way in both}
  assert set(rows) == expected
  for (kind, form, top, _), row in rows.items():
    assert row["ms"] == 2 and row["attention_ms"] == 1.5
    assert row["all_ms"] == [2.0] * learned.ROUNDS and row["kernels"] == ["mosaic", "other"]
    if kind in ("given", "with_selection"):
      b, Q = learned.FORMS[form]
      share = drawn.num_tiles(T, b, Q, top, H) / (H * 136)
      assert row["rate"] == pytest.approx(share, abs=1e-4)
      assert row["rate_of_attention"] == pytest.approx(share / 0.75, abs=1e-4)
  assert rows["given", "b128_q16", 4, "fwd"]["occupancy"] < 1
  assert rows["select", "b128", 4, "fwd"]["share"] == 1
  assert "of attention" in capsys.readouterr().out


@pytest.mark.one_day_in_three(0)
@pytest.mark.promotes
def test_what_is_not_supported_is_told_and_no_failure(tiny, tmp_path, monkeypatch, capsys):
  """The kernels themselves refuse, while a call is traced."""
  monkeypatch.setattr(learned, "OURS", "mosaic_gpu")
  monkeypatch.setitem(learned.SHAPES, SHAPE, block_sparse.Shape(T, 64, Hkv=H))
  wanted = [learned.Case(SHAPE, kind, "b64", 8) for kind in ("given", "with_selection")]
  monkeypatch.setattr(learned, "cases", lambda shapes: wanted)
  assert learned.run(tmp_path, ("rates",))
  for row in rows_in(tmp_path):
    assert row["ms"] is None and "error" not in row and row["block_size"] == 4
    assert row["unsupported"].startswith("mosaic_gpu: a block mask of block_size=4 is not support")
  assert "NOT SUPPORTED rates d8_t128 given b64 8 fwd and 1 like it" in capsys.readouterr().out


@pytest.mark.promotes
def test_a_row_that_fails_is_reported_and_the_others_go_on(tiny, tmp_path, monkeypatch, capsys):
  def broken(q, k, v):
    raise ValueError("no plan\nwas found")

  monkeypatch.setattr(attention, "cudnn", broken)
  wanted = [learned.Case(SHAPE, "dense"), learned.Case(SHAPE, "given", "b128", 4)]
  monkeypatch.setattr(learned, "cases", lambda shapes: wanted)
  assert not learned.run(tmp_path, ("rates",))
  dense, given = rows_in(tmp_path)
  assert dense["error"] == "ValueError: no plan was found" and dense["ms"] is None
  assert given["ms"] == 2 and given["rate"] is None
  assert "FAILED rates d8_t128 dense fwd" in capsys.readouterr().out


def test_what_is_left_out_beside_the_kernels_are_lists_and_numbers_of_rows():
  """So that `rate_of_attention` leaves out no work on queries, keys and values."""
  shape = jax.ShapeDtypeStruct((1, 512, H, 64), jnp.bfloat16)
  indices = jax.ShapeDtypeStruct((1, H, 4, 2), jnp.int32)

  def both(q, k, v, dout, indices):
    attend = lambda q, k, v: sparse_attention(
      q, k, v, block_indices=indices, implementation="mosaic_gpu"
    )
    return timing.with_gradients(attend)(q, k, v, dout)

  hopper = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  with jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("x",), abstract_device=hopper)
  ):
    program = jax.make_jaxpr(both)(shape, shape, shape, shape, indices)
  kernels, largest = 0, 0

  def visit(jaxpr):
    nonlocal kernels, largest
    for equation in jaxpr.eqns:
      if "custom_vmap_call" in equation.primitive.name:
        kernels += 1
      elif inner := list(core.jaxprs_in_params(equation.params)):
        for one in inner:
          visit(one)
      elif equation.primitive.name != "name":
        floats = [
          x.aval.size for x in equation.outvars if jnp.issubdtype(x.aval.dtype, jnp.floating)
        ]
        largest = max(largest, *floats, 0)

  visit(program.jaxpr)
  assert kernels == 3 and largest == H * 512


# ------------------------------------------------------------------------------------------ models


def test_counted_bytes_are_those_of_the_specification(tiny_models):
  of = learned_models.counted
  array, lse = LONG * WIDTH * 2, H * LONG * 4
  indices = H * (LONG // 8) * 4 * 4
  assert of("moba") == dict(
    counted_bytes=8 * array + lse + indices + 2 * indices, projected_bytes=0
  )
  # Blocks of two tiles; an out for each branch, and three gates per token and head.
  assert of("nsa")["counted_bytes"] == 12 * array + lse + indices + 4 * indices
  assert of("nsa")["projected_bytes"] == 2 * LONG * H * 3 * 2
  assert of("indexer")["counted_bytes"] == of("moba")["counted_bytes"]
  assert of("indexer")["projected_bytes"] == 2 * 2 * LONG * (H * 8 + 8 + H * H)


@pytest.mark.one_day_in_three(1)
@pytest.mark.promotes
@pytest.mark.parametrize(
  ("name", "with_loss"), [("moba", False), ("nsa", False), ("indexer", True)]
)
def test_a_layer_on_projections_has_all_gradients(name, with_loss, tiny_models):
  run, make = learned_models.build_layer(name, with_loss)
  params, given, dout = make()
  assert all(abs(float(x.astype(jnp.float32).mean())) < 0.1 for x in (given.q, given.v, dout))
  out, losses, (of_params, of_given) = jax.jit(run)(params, given, dout)
  assert out.shape == dout.shape == (1, LONG, H, WIDTH // H)
  assert (losses.keys() == {"index"}) == with_loss
  moved = {name: bool(jnp.any(x != 0)) for name, x in of_given._asdict().items() if x is not None}
  assert moved and all(moved.values())
  if name == "nsa":
    assert jnp.any(of_params["key_places"] != 0) and jnp.any(of_params["value_places"] != 0)


@pytest.mark.one_day_in_six(2)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.promotes
def test_every_row_of_models_has_its_figures(tiny_models, tmp_path, capsys):
  assert learned.run(tmp_path, ("memory", "step", "decode", "moba"))
  rows = {(r["part"], r["model"], r["implementation"]): r for r in rows_in(tmp_path)}
  assert set(rows) == {
    ("memory", "moba", None), ("step", "moba", None),
    ("decode", "moba", "xla"), ("decode", "dense", "xla"), ("decode", "dense", "cluster"),
  }  # fmt: skip
  memory, step = rows["memory", "moba", None], rows["step", "moba", None]
  assert memory["peak_ratio"] == pytest.approx(
    memory["peak_bytes"] / learned_models.counted("moba")["counted_bytes"], abs=1e-4
  )
  assert step["losses_are_finite"] and step["seq_len"] == LONG and step["num_layers"] == 2
  assert step["peak_bytes"] > 0 and step["tokens_per_second"] > 0
  decoded, dense = rows["decode", "moba", "xla"], rows["decode", "dense", "xla"]
  share = decoded["bytes_per_second"] / dense["bytes_per_second"]
  assert decoded["over_dense"] == decoded["over_dense_by_xla"] == pytest.approx(share, abs=1e-3)
  assert decoded["bytes_per_second"] == pytest.approx(2e3 / decoded["ms_per_step"], abs=1)
  assert "runs on NVIDIA GPUs only" in rows["decode", "dense", "cluster"]["unsupported"]
  out = capsys.readouterr().out
  assert "peak / counted" in out and "NOT SUPPORTED decode dense cluster" in out


def test_a_peak_that_is_not_the_programs_is_no_figure(tiny, monkeypatch):
  monkeypatch.setattr(learned_models, "peak_bytes", lambda: 5_000)
  program = jax.jit(jnp.negative).lower(jnp.ones(4)).compile()
  with pytest.raises(RuntimeError, match=r"arrays alone had a peak of 5,000 bytes"):
    learned_models.clock_and_peak(program, jnp.ones(4))


def test_each_program_that_tells_a_peak_has_a_process_of_its_own(tiny_models):
  jobs = learned_models.jobs_of(list(learned.MODELS), list(learned_models.RECIPES))
  assert len(jobs) == 4 + 3 + 3 + 2 and all(job.alone for job in jobs.values())
  peaks = {key[0] for key, job in jobs.items() if job.clock is learned_models.clock_and_peak}
  assert peaks == {"memory", "step"}


# ----------------------------------------------------------------------------------- FlexAttention


def test_flex_attention_gets_the_same_lists_and_its_mask_counts(tiny, tmp_path, monkeypatch):
  def told_by(program, *, seconds):
    assert program.name == "flex_blocks" and seconds == learned.FLEX_SECONDS
    assert program.job == dict(H=H, block_size=8, shapes={SHAPE: dict(T=T, D=D, tops=[4, 2])})
    assert [row["part"] for row in rows_in(tmp_path)] == ["rates"] * 18  # written before
    return {f"{SHAPE} 4": dict(building=1.0, fwd=3.0, fwdbwd=7.0), "error": "no memory"}

  monkeypatch.setattr(learned.importlib.util, "find_spec", lambda name: name)
  monkeypatch.setattr(learned.processes, "told_by", told_by)
  monkeypatch.setattr(learned, "measure", lambda wanted: [
    learned.describe(case) | dict(ms=8.0, tiles=34) for case in wanted
  ])  # fmt: skip
  assert not learned.run(tmp_path, ("rates", "flex"))
  first, both, *others = (row for row in rows_in(tmp_path) if row["part"] == "flex")
  assert (first["ms"], first["attention_ms"], first["building_ms"]) == (4.0, 3.0, 1.0)
  tiles = drawn.num_tiles(T, 8, 8, 4, H)
  assert both["rate"] == pytest.approx(tiles / 272, abs=1e-4) and both["ms"] == 8.0
  assert both["rate_of_attention"] == pytest.approx(tiles / 272 * 8 / 7, abs=1e-4)
  assert [row["error"] for row in others] == ["no memory"] * 2


def test_without_pytorch_flex_attention_is_skipped(tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(learned.importlib.util, "find_spec", lambda name: None)
  assert learned.run(tmp_path, ("flex",)) and rows_in(tmp_path) == []
  assert "flex: skipped, PyTorch is not installed" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("part", learned.PARTS)
def test_every_part_is_known_and_chooses(part, monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # put back afterwards
  done = {}
  record = lambda name: lambda *args: done.update({name: args}) or []
  monkeypatch.setattr(learned, "measure", record("rates"))
  monkeypatch.setattr(learned, "measure_flex", record("flex"))
  monkeypatch.setattr(learned_models, "measure", record("models"))
  assert command.main(["learned", f"--only={part}", f"--out={tmp_path}"]) == 0
  if part in learned.KINDS:
    assert set(done) == {part if part in ("rates", "flex") else "models"}
    assert done.get("models", ([part],))[0] == [part]
  else:
    assert set(done) == {"rates", "models", "flex"}
  if part in learned.SHAPES:
    assert {case.shape for case in done["rates"][0]} == set(done["flex"][0]) == {part}
  if part in learned_models.RECIPES:
    assert done["models"][1] == [part]


def test_an_unknown_part_is_an_error_that_lists_them(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  with pytest.raises(SystemExit) as stop:
    command.main(["learned", "--only=rate", f"--out={tmp_path / 'out'}"])
  assert stop.value.code == 2 and not (tmp_path / "out").exists()
  assert "--only=rate: learned has rates, memory, step, decode, flex" in capsys.readouterr().err


def test_a_job_alone_is_its_process_last_one_and_a_clock_takes_the_place_of_cupti(monkeypatch):
  for module, name in ((timing.os, "_exit"), (timing.signal, "signal")):
    monkeypatch.setattr(module, name, lambda *args: None)
  monkeypatch.setattr(timing.faulthandler, "enable", lambda: None)
  monkeypatch.setattr(timing, "kernel_ms", lambda program, *args: (2.0, ["kernel"]))
  build = lambda: (jnp.sum, lambda: (jnp.ones(4),))
  clock = lambda program, x: dict(ms=float(program(x)), kernels=["own"], more=1)
  jobs = dict(usual=timing.Job(build, ()), last=timing.Job(build, (), clock=clock, alone=True))
  sent, asked = [], iter(("usual", "last"))
  timing._work(types.SimpleNamespace(send=sent.append, recv=lambda: next(asked)), jobs)
  assert sent[1:3] == [("usual", None), ("last", None)]
  (usual, goes_on), (last, ends) = sent[3:]
  assert (usual.ms, usual.more, goes_on) == (2.0, None, True)
  assert (last.ms, last.kernels, last.more, ends) == (4.0, ("own",), dict(more=1), False)
