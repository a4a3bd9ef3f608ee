"""The benchmark of block-sparse attention without a GPU: layouts, arithmetic, rows, failures.

Kernels are timed by a stand-in for CUPTI; `xla` stands in for the kernels and for cuDNN.
"""

import contextlib
import itertools
import json
import os
from multiprocessing import reduction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import block_sparse
from experiments.benchmark.gpu import timing
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels.lowering import blocks
from tests.helpers.arrays import assert_close

T, H, BLOCK = 256, 2, 8  # 528 causal blocks: of 1/16 of them all but one lie on the diagonal
CAUSAL = 528


def xla_attention(q, k, v, window=None):
  """In the place of cuDNN, which runs on GPUs only."""
  left = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=left)


@pytest.fixture
def tiny(monkeypatch):
  """All cases on short sequences, in this process, by xla, and 2 ms for every call."""
  shape = block_sparse.Shape(T, 8, Hkv=H)
  shapes = dict.fromkeys(block_sparse.SHAPES, shape)
  shapes["d128_t32768_gqa"] = block_sparse.Shape(T, 8, Hkv=1)
  for name, value in dict(
    OURS="xla",
    H=H,
    BLOCK=BLOCK,
    WINDOWS=(24, 40),
    SINKS=8,
    MEAN_DOCUMENT=32,
    DENSITIES=(1, 1 / 4),
    SHAPES=shapes,
    RANDOM_SHAPES={"d128_t32768": shape},
    FORMULAS={
      "where_window_1024": patterns.Where(block_sparse.near),
      "where_window_4096": patterns.Where(block_sparse.less_near),
      "window_1024": patterns.Local(24),
      "window_4096": patterns.Local(40),
      "window_sinks": patterns.Local(24) | patterns.Where(block_sparse.first),
    },
  ).items():
    monkeypatch.setattr(block_sparse, name, value)
  monkeypatch.setattr(attention, "cudnn", xla_attention)
  monkeypatch.setattr(timing, "WORKERS", 0)
  monkeypatch.setattr(timing, "kernel_ms", lambda program, *args: (2.0, ["kernel"]))
  block_sparse.work_of.cache_clear()
  yield shape
  block_sparse.work_of.cache_clear()


# ----------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize("density", block_sparse.DENSITIES)
def test_random_layouts_have_the_asked_number_of_blocks_and_the_diagonal(density):
  pattern = block_sparse.random_layout(32_768, density, 3)
  assert pattern.layout.shape == (3, 256, 256) and pattern.block_size == 128
  wanted = {1: 32_896, 0.9: 29_606, 0.5: 16_448, 0.25: 8_224, 0.125: 4_112, 0.0625: 2_056}
  for layout in pattern.layout:
    assert layout.sum() == wanted[density] and layout.diagonal().all()
    assert not np.triu(layout, 1).any()
  assert pattern.period == (1 if density == 1 else 3)  # heads have layouts of their own
  assert pattern == block_sparse.random_layout(32_768, density, 3)
  assert density == 1 or pattern != block_sparse.random_layout(32_768, density, 3, seed=1)


def test_documents_are_cut_at_random_and_have_the_mean_length():
  ids = block_sparse.documents(32_768)
  lengths = np.bincount(ids)
  assert ids.dtype == np.int32 and ids[0] == 0 and set(np.diff(ids)) == {0, 1}
  assert lengths.mean() == 4_096 and len(set(lengths)) == 8
  np.testing.assert_array_equal(ids, block_sparse.documents(32_768))


def layout_of(shape, pattern, density):
  return block_sparse.random_layout(T, density, H if pattern == "random" else 1)


@pytest.mark.parametrize(("name", "density"), [("random", 1), ("random", 0.3), ("random_gqa", 0.1)])
def test_work_of_layouts_is_that_of_the_pattern(name, density, tiny):
  work = block_sparse.work_of(tiny, name, density)
  pattern = layout_of(tiny, name, density)
  tables = [blocks.blocks_of(pattern.of_head(h), T, T, BLOCK, BLOCK).some for h in range(H)]
  assert work == (sum(table.sum() for table in tables), H * pattern.num_pairs(T))


@pytest.mark.parametrize("name", ["dense", "documents", *block_sparse.FORMULAS])
def test_work_is_that_of_the_mask(name, tiny):
  if name in ("dense", "documents"):
    mask = patterns.Dense().mask(T)
  else:
    mask = block_sparse.FORMULAS[name].mask(T)
  if name == "documents":
    ids = block_sparse.documents(T)
    mask &= ids[:, None] == ids
  visited = mask.reshape(T // BLOCK, BLOCK, T // BLOCK, BLOCK).any((1, 3)).sum()
  assert block_sparse.work_of(tiny, name, None) == (H * visited, H * mask.sum())


@pytest.mark.promotes
def test_documents_are_kept_apart(tiny):
  program, make = block_sparse.build(tiny, "documents", None, "xla", "fwd")
  q, k, v, dout, ids = make()
  how = dict(pattern=patterns.Dense(), implementation="reference", segment_ids=ids)
  expected = sparse_attention(q, k, v, **how)
  assert_close(program(q, k, v, dout, ids), expected, tolerance=2e-2, what="documents")


# ------------------------------------------------------------------------------------------- ratios


def row(pattern, implementation, ms, visited=0, pairs=0, **more):
  row = dict(shape="s", direction="fwd", density=None, visited_blocks=visited, pairs=pairs)
  return row | dict(pattern=pattern, implementation=implementation, ms=ms) | more


def test_rates_are_work_per_time_over_cudnns():
  dense, half = row("dense", "cudnn", 6.0, 36, 8_000), row("random", "x", 2.0, 18, 3_600)
  failed = row("random", "x", None, 18, 3_600, error="no")
  block_sparse.compare([dense, half, failed])
  assert half["speedup_vs_cudnn_dense"] == 3.0
  assert half["rate_vs_cudnn_dense"] == 1.5 and half["rate_vs_cudnn_dense_by_pairs"] == 1.35
  assert dense["rate_vs_cudnn_dense"] == dense["rate_vs_cudnn_dense_by_pairs"] == 1.0
  assert "rate_vs_cudnn_dense" not in failed


def test_the_crossover_is_the_highest_density_that_is_faster():
  rows = [
    row("random", "x", 1.0, direction=direction, density=density, speedup_vs_cudnn_dense=speedup)
    for direction, speedups in dict(fwd=(0.8, 1.4, 2.0), bwd=(0.1, 0.2, 0.9)).items()
    for density, speedup in zip((1, 0.5, 0.25), speedups, strict=True)
  ]
  rows.append(row("dense", "cudnn", 1.0, density=1.0, speedup_vs_cudnn_dense=1.0))
  assert block_sparse.crossovers(rows) == [
    dict(shape="s", direction="fwd", density=0.5),
    dict(shape="s", direction="bwd", density=None),
  ]


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.slow
@pytest.mark.promotes
def test_every_row_has_its_figures(tiny, tmp_path, capsys):
  assert block_sparse.run(tmp_path, ("window", "documents", "gqa"))
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  assert path.name.startswith("block_sparse_") and result["host"] == result["crossover"] == []
  rows = {
    (r["shape"], r["pattern"], r["implementation"], r["direction"]): r for r in result["rows"]
  }
  windows = "window_1024", "window_4096"
  ours = ("where_window_1024", "where_window_4096", *windows, "window_sinks", "documents")
  expected = {("d128_t32768", name, "xla") for name in ours}
  expected |= {("d128_t32768", name, "cudnn_window") for name in windows}
  expected |= {("d128_t32768", "dense", "cudnn")}
  expected |= {("d128_t32768_gqa", "random_gqa", "xla"), ("d128_t32768_gqa", "dense", "cudnn")}
  assert {key[:3] for key in rows} == expected and len(result["rows"]) == 2 * len(expected)
  for one in rows.values():
    assert one["ms"] == 2.0 and one["speedup_vs_cudnn_dense"] == 1.0 and one["num_heads"] == H
    assert one["tokens_per_s"] == T / 2e-3
    assert (one["seq_len"], one["head_dim"]) == (T, 8)
    share = one["visited_blocks"] / (H * CAUSAL)
    assert one["rate_vs_cudnn_dense"] == pytest.approx(share, abs=1e-4)
    share = one["pairs"] / (H * T * (T + 1) / 2)
    assert one["rate_vs_cudnn_dense_by_pairs"] == pytest.approx(share, abs=1e-4)
    if one["pattern"] != "random_gqa":
      assert one["density"] == pytest.approx(share, abs=1e-6)
    matmuls = {"fwd": 2, "fwdbwd": 7}[one["direction"]]
    assert one["tflops"] == pytest.approx(2 * matmuls * 8 * one["pairs"] / 2e9, abs=0.06)
    assert one["temp_bytes"] >= 0 and one["argument_bytes"] > 0 and one["output_bytes"] > 0
  shared = rows["d128_t32768_gqa", "random_gqa", "xla", "fwd"]
  assert shared["num_kv_heads"] == 1 and shared["density"] == 1 / 8
  assert shared["visited_blocks"] == H * CAUSAL / 8
  assert "rate, blocks" in capsys.readouterr().out


@pytest.mark.one_day_in_three(0)
@pytest.mark.promotes
def test_a_row_that_fails_is_reported_and_the_others_go_on(tiny, monkeypatch, tmp_path, capsys):
  def broken(q, k, v, window=None):
    raise ValueError("no plan\nwas found")

  monkeypatch.setattr(attention, "cudnn", broken)
  assert not block_sparse.run(tmp_path, ("d128_t32768", "random"))
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  found = [(r["pattern"], r["density"], r["direction"], r.get("error")) for r in result["rows"]]
  error = "ValueError: no plan was found"
  dense = [("dense", 1.0, direction, error) for direction in ("fwd", "fwdbwd")]
  ways = itertools.product((1, 1 / 4), ("fwd", "fwdbwd"))
  assert found == [*dense, *(("random", *way, None) for way in ways)]
  # Without cuDNN's time there is nothing to compare with.
  for one in result["rows"][2:]:
    assert one["ms"] == 2.0 and one["rate_vs_cudnn_dense"] is None
  assert result["crossover"] == []
  assert "FAILED d128_t32768 dense 1.0 cudnn fwd" in capsys.readouterr().out


def test_the_host_builds_its_tables_and_says_which_it_cannot(tiny, monkeypatch, tmp_path, capsys):
  def overflows(i, j):
    raise ValueError("too far")

  patched = block_sparse.HOST_FORMULAS | {"where_window_1024": patterns.Where(overflows)}
  monkeypatch.setattr(block_sparse, "HOST_FORMULAS", patched)
  assert not block_sparse.run(tmp_path, ("host",))
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  random, formula, where = result["host"]
  # A list is of whole blocks of 128, three of which are causal.
  assert result["rows"] == [] and random["visited_blocks"] == H * 3
  for one in (random, formula):
    assert one["lists_seconds"] > 0 and one["lists_peak_mb"] > 0 and one["num_heads"] == H
  assert where["lists_seconds"] is None and where["error"] == "ValueError: too far"
  assert "FAILED where_window_1024" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- parts


def test_the_cases_are_those_that_were_asked_for():
  cases = block_sparse.cases(list(block_sparse.SHAPES), list(block_sparse.KINDS))
  assert len(set(cases)) == len(cases) == 4 * 6 * 2 + (4 + 1) * 2 + 1 + 7 * 2 + 2 + 2 + 1
  found = {}
  for case in cases:
    found.setdefault((case.shape, case.pattern, case.implementation), []).append(case)
  for shape in block_sparse.RANDOM_SHAPES:
    densities = [case.density for case in found[shape, "random", "mosaic_gpu"]]
    assert densities == [density for density in (1, 0.9, 0.5, 0.25, 0.125, 0.0625) for _ in "12"]
  of = lambda *key: [(case.density, case.direction) for case in found[key]]
  assert of("d128_t131072", "random", "mosaic_gpu") == [(1 / 16, "fwdbwd")]
  assert of("d128_t131072", "dense", "cudnn") == [(None, "fwdbwd")]
  assert of("d128_t32768_gqa", "random_gqa", "mosaic_gpu") == [(1 / 8, "fwd"), (1 / 8, "fwdbwd")]
  names = {pattern for shape, pattern, implementation in found if shape == "d128_t32768"}
  assert names == {"dense", "random", "documents", *block_sparse.FORMULAS}


@pytest.mark.parametrize("part", block_sparse.PARTS)
def test_every_part_is_known_and_has_something(part, monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # put back afterwards
  done = []
  monkeypatch.setattr(block_sparse, "measure", lambda wanted: done.append(wanted) or [])
  monkeypatch.setattr(block_sparse, "host_rows", lambda: done.append("host") or [])
  assert command.main(["block_sparse", f"--only={part}", f"--out={tmp_path}"]) == 0
  assert all(done) and done
  for case in done[0] if part != "host" else []:
    assert part in block_sparse.KINDS or case.shape == part


def test_workers_get_small_jobs_and_an_allocator_that_frees(monkeypatch):
  """Layouts of a long sequence are megabytes: workers draw them themselves."""
  monkeypatch.delenv(block_sparse.ALLOCATOR, raising=False)
  seen = {}

  @contextlib.contextmanager
  def measuring(jobs):
    seen.update(jobs=jobs, allocator=os.environ[block_sparse.ALLOCATOR])
    yield lambda case: timing.Measurement(error="not here")

  monkeypatch.setattr(timing, "measuring", measuring)
  cases = block_sparse.cases(list(block_sparse.SHAPES), ["random", "memory", "gqa"])
  rows = block_sparse.measure(cases)
  assert [row["error"] for row in rows] == ["not here"] * len(cases)
  assert len(reduction.ForkingPickler.dumps(seen["jobs"])) < 10_000  # as they are sent
  assert set(seen["jobs"]) == set(cases)
  assert seen["allocator"] == "platform" and block_sparse.ALLOCATOR not in os.environ


def test_arrays_have_the_shapes_heads_and_type_of_a_case():
  shape = block_sparse.SHAPES["d128_t32768_gqa"]
  q, k, v, dout, ids = jax.eval_shape(shape.arrays_of_documents)
  assert q.shape == dout.shape == (1, 32_768, 16, 128) and k.shape == v.shape == (1, 32_768, 4, 128)
  assert q.dtype == jnp.bfloat16 and ids.shape == (1, 32_768) and ids.dtype == jnp.int32
