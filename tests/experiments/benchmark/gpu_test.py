"""The GPU benchmarks without a GPU: their arithmetic, their files, and what they do with failures.

Kernels are timed by a stand-in for CUPTI; `xla` stands in for the kernels and for cuDNN.
"""

import itertools
import json
import multiprocessing
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import profiler

from experiments.benchmark import __main__ as command
from experiments.benchmark import report
from experiments.benchmark.gpu import attention
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu import tune
from experiments.benchmark.gpu.steps import masks
from pallas_kernels import mosaic_gpu
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels import tuning
from pallas_kernels.lowering import plan as plans
from pallas_kernels.scores import Scores
from tests.helpers import benchmark_jobs
from tests.helpers.arrays import assert_close

TINY = timing.Shape(B=2, T=24, H=2, D=8, stride=4, width=2)
SIZES = tuning.BlockSizes(block_q=128, block_k=64, stages=2, warpgroups=2)


def xla_attention(q, k, v, window=None):
  """In the place of cuDNN, which runs on GPUs only."""
  left = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=left)


def told_by_flex_attention(program, *, seconds):
  """In the place of PyTorch: 3 ms for every call but for columns, before which it ended."""
  job = program.job
  assert program.name == "flex_attention" and [job[name] for name in "BTHD"] == [2, 24, 2, 8]
  assert all(map(masks.mask_of, job["patterns"].values()))
  done = {name: dict(fwd=3.0, fwdbwd=3.0) for name in job["patterns"] if name != "column"}
  return dict(library="PyTorch", **done) | (dict(error="no memory") if len(done) < 4 else {})


@pytest.fixture
def no_gpu(monkeypatch):
  """xla for the kernels and for cuDNN, tiny shapes, this process, and 2 ms for every call."""
  monkeypatch.setattr(attention, "OURS", "xla")
  monkeypatch.setattr(attention, "cudnn", xla_attention)
  monkeypatch.setattr(attention, "COPY_BYTES", 2**20)
  monkeypatch.setattr(timing, "WORKERS", 0)
  monkeypatch.setattr(timing, "SHAPES", {"tiny": TINY})
  monkeypatch.setattr(timing, "kernel_ms", lambda program, *args: (2.0, ["kernel"]))
  monkeypatch.setattr(attention.processes, "told_by", told_by_flex_attention)


# --------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
  ("name", "memory", "summary_tflops", "summary"),
  [
    # Figures of an H100: 2.96 TB/s, and cuDNN's dense causal rate on the shape.
    ("enwik8", 0.0680, 458, 0.338),
    ("imagenet64", 0.0680, 241, 0.160),
    ("cifar10", 0.0340, 489, 0.034),
    ("audio64k", 0.0907, 472, 1.164),
    ("modern32k", 0.1814, 659, 1.669),
  ],
)
def test_roofline_matches_hand_calculation(name, memory, summary_tflops, summary):
  shape = timing.SHAPES[name]
  fwd = attention.roofline_ms(shape, "local", "fwd", 2960.0, 1e9)
  assert fwd == pytest.approx(memory, rel=2e-3)
  both = attention.roofline_ms(shape, "column", "fwdbwd", 2960.0, 1e9)
  assert both == pytest.approx(3 * memory, rel=2e-3)
  # By hand without the edge of a summary's own block, 1 to 2 % of the pairs.
  ms = attention.roofline_ms(shape, "summary", "fwd", 2960.0, summary_tflops)
  assert ms == pytest.approx(summary, rel=2e-2)


@pytest.mark.parametrize("name", attention.PATTERNS)
@pytest.mark.parametrize("direction", attention.DIRECTIONS)
def test_flops_count_the_pairs_of_the_mask(name, direction):
  mask = attention.PATTERNS[name](TINY).mask(TINY.T)
  matmuls = {"fwd": 2, "fwdbwd": 7}[direction]
  expected = matmuls * 2 * TINY.D * mask.sum() * TINY.B * TINY.H
  assert attention.num_flops(TINY, name, direction) == expected


def test_dense_at_cudnns_own_rate_takes_cudnns_time():
  shape = timing.SHAPES["enwik8"]
  rate = attention.num_flops(shape, "dense", "fwd") / 1.3505 / 1e9
  assert rate == pytest.approx(458, rel=2e-3)
  assert attention.roofline_ms(shape, "dense", "fwd", 2960.0, rate) == pytest.approx(1.3505)


def test_transposing_computes_columns(no_gpu):
  q, k, v, _ = (x.astype(jnp.float32) for x in TINY.arrays())
  expected = sparse_attention(q, k, v, pattern=patterns.Column(4), implementation="reference")
  got = attention.transposed_cudnn(q, k, v, 4)
  assert_close(got, expected, tolerance=1e-5, what="columns")


def test_geometric_mean_and_least():
  row = lambda shape, share: dict(
    shape=shape, pattern="local", implementation="x", direction="fwd", fraction=share
  )
  (entry,) = attention.summarize([row("a", 0.5), row("b", 0.98), row("c", None)])
  assert entry["geometric_mean"] == 0.7 and entry["failed"] == 1
  assert (entry["minimum"], entry["minimum_at"]) == (0.5, "a")


# -------------------------------------------------------------------------------------------- CUPTI


class Cupti:
  """What the profiler asks of CUPTI: two kernels a call, the second 1, 2, 3 ... ms long."""

  def __init__(self, calls: int, stray: int = 0):
    self.calls, self.stray = calls, stray

  def _cupti_init(self):
    pass

  def _cupti_get_timings(self, finalize):
    timings = [
      kernel for n in range(self.calls) for kernel in (("first", 0.5), ("second", 1.0 + n))
    ]
    if self.stray:
      self.stray -= 1
      timings.append(("stray", 1.0))
    return timings


def measured(monkeypatch, cupti):
  monkeypatch.setattr(profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=cupti))
  x = jnp.ones(4)
  return timing.kernel_ms(jax.jit(jnp.negative).lower(x).compile(), x)


def test_kernel_times_are_summed_per_call(monkeypatch):
  ms, names = measured(monkeypatch, Cupti(timing.ITERATIONS))
  assert ms == np.median(1.5 + np.arange(timing.ITERATIONS)) and names == ["first", "second"]


def test_a_stray_kernel_is_measured_again(monkeypatch):
  assert measured(monkeypatch, Cupti(timing.ITERATIONS, stray=2))[0] > 0
  with pytest.raises(RuntimeError, match="41 kernels are not 20 equal calls"):
    measured(monkeypatch, Cupti(timing.ITERATIONS, stray=3))


def test_no_kernel_is_an_error(monkeypatch):
  with pytest.raises(RuntimeError, match="no kernel"):
    measured(monkeypatch, Cupti(0))


# ---------------------------------------------------------------------------------------- attention


@pytest.mark.slow
@pytest.mark.promotes
def test_attention_writes_every_row(no_gpu, tmp_path, capsys):
  assert not attention.run(tmp_path)
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  assert {"device", "versions", "date", "commit", "copy_gb_per_s", "rows"} <= set(result)
  assert result["copy_gb_per_s"] == pytest.approx(2**20 / 1e6, abs=0.1)
  rows = {(r["pattern"], r["implementation"], r["direction"]): r for r in result["rows"]}
  assert len(rows) == len(result["rows"]) == 2 * (7 + 3 + 4)
  assert {pattern for pattern, implementation, _ in rows if implementation == "xla"} == set(
    attention.PATTERNS
  )
  assert rows["column", "flex_attention", "fwd"]["error"] == "no memory"
  for (pattern, implementation, _), row in rows.items():
    flex = implementation == "flex_attention"
    assert row["shape"] == "tiny" and row["roofline_ms"] > 0
    if (pattern, flex) != ("column", True):
      assert row["ms"] == (3.0 if flex else 2.0)
      assert {"gb_per_s", "fraction", "tflops"} <= set(row) and flex == ("kernels" not in row)
  assert rows["dense", "xla", "fwd"]["peer_ratios"] == {"cudnn": 1.0}
  assert rows["local", "xla", "fwdbwd"]["peer_ratios"] == (
    {"cudnn": 1.0, "cudnn_window": 1.0, "flex_attention": 1.5}
  )
  assert rows["column", "xla", "fwd"]["peer_ratios"] == {"cudnn": 1.0, "transpose_cudnn": 1.0}
  assert "geometric mean" in capsys.readouterr().out


def test_a_row_that_fails_is_reported_and_the_others_go_on(no_gpu, monkeypatch, tmp_path, capsys):
  def broken(q, k, v, window=None):
    raise ValueError("no plan\nwas found")

  monkeypatch.setattr(attention, "cudnn", broken)
  assert not attention.run(tmp_path, ("local", "tiny"))
  (path,) = tmp_path.iterdir()
  rows = {
    (r["pattern"], r["implementation"], r["direction"]): r
    for r in json.loads(path.read_text())["rows"]
  }
  assert {key[:2] for key in rows} == {
    ("local", "xla"), ("local", "cudnn_window"), ("dense", "cudnn"), ("local", "flex_attention")
  }  # fmt: skip
  failed = rows["dense", "cudnn", "fwd"]
  assert failed["ms"] is None and failed["error"] == "ValueError: no plan was found"
  # Without the dense rate there is no roofline to compare with.
  ours = rows["local", "xla", "fwd"]
  assert ours["ms"] == 2.0 and ours["roofline_ms"] is None and ours["fraction"] is None
  assert "FAILED tiny dense cudnn fwd" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- tuning


def test_the_table_is_read_and_written(tmp_path):
  key = tuning.Key("some GPU", "column", "fwd", 96, 64, "bfloat16")
  other = key._replace(direction="bwd")
  tuning.write({key: SIZES, other: SIZES}, tmp_path / "table.json")
  assert tuning.read(tmp_path / "table.json") == {key: SIZES, other: SIZES}
  tuning.write({}, tmp_path / "table.json")
  assert tuning.read(tmp_path / "table.json") == {}


def test_sizes_are_those_of_the_device_that_is_traced_for(monkeypatch):
  kind = "NVIDIA H100 80GB HBM3"
  key = tuning.Key(kind, "column", "fwd", 96, 64, "bfloat16")
  monkeypatch.setattr(tuning, "TABLE", {key: SIZES})
  assert tuning.block_sizes("column", "fwd", 96, 64, jnp.bfloat16) is None  # on this CPU
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert tuning.block_sizes("column", "fwd", 96, 64, jnp.bfloat16) == SIZES
    assert tuning.block_sizes("column", "fwd", 97, 64, jnp.bfloat16) is None
    with tuning.override("column", "fwd", None):  # the kernel's default, whatever the table says
      assert tuning.block_sizes("column", "fwd", 96, 64, jnp.bfloat16) is None


def test_an_override_is_for_one_kernel_and_traces_anew():
  seen = []

  @jax.jit
  def program(x):
    seen.append(tuning.block_sizes("local", "bwd", 8, 64, x.dtype))
    return x

  x = jnp.ones(3)
  program(x)
  with tuning.override("local", "bwd", SIZES):
    program(x)
    assert tuning.block_sizes("local", "fwd", 8, 64, x.dtype) is None
  program(x)
  assert seen == [None, SIZES]


def cases():
  every = itertools.product(tune.ROWS, timing.SHAPES, tune.DIRECTIONS)
  return [case for case in every if case[0] != "dense" or case[1] in tune.DENSE_SHAPES]


@pytest.mark.parametrize(("kind", "name", "direction"), cases())
def test_candidates_are_all_different(kind, name, direction):
  shape = timing.SHAPES[name]
  tried = [None, *tune.candidates(kind, shape, direction)]
  found = [tune.effective(kind, shape, direction, candidate) for candidate in tried]
  assert all(found) and all(one not in found[:n] for n, one in enumerate(found))


def test_there_are_few_candidates():
  nums = [len(tune.candidates(kind, timing.SHAPES[name], way)) for kind, name, way in cases()]
  assert len(nums) == 5 * 4 * 2 + 2 and sum(nums) + len(nums) <= 230


@pytest.mark.parametrize("name", timing.SHAPES)
@pytest.mark.parametrize("kind", tune.ROWS)
def test_effective_sizes_are_what_the_backend_uses(kind, name):
  shape = timing.SHAPES[name]
  x = jax.ShapeDtypeStruct((shape.B, shape.T, shape.H, shape.D), jnp.bfloat16)
  plan, _ = plans.of_call(x, x, x, pattern=attention.PATTERNS[kind](shape), scores=Scores(1.0))
  (group,) = mosaic_gpu.planned(plan).groups
  if kind == "dense" and shape.D > 64:
    assert not group.passes and name not in tune.DENSE_SHAPES
    return
  (sweep,) = group.kernels
  used = sweep.forward_blocks if sweep.forward is None else dict(sweep.forward[1])
  assert tune.effective(kind, shape, "fwd", None) == used
  streamed = dict(forward_blocks=None, dq_blocks=sweep.dq_blocks, dkv_blocks=sweep.dkv_blocks)
  used = streamed if sweep.backward is None else dict(sweep.backward[1])
  assert tune.effective(kind, shape, "bwd", None) == used
  assert tune.ROWS[kind](shape) == tune.problem(kind, shape).view.M


def seen(*tensors):
  return tuple(np.asarray(tune.sketch(x)) for x in tensors)


def test_sketches_tell_wrong_results_from_rounded_ones():
  rng = np.random.default_rng(0)
  exact = rng.standard_normal((2, 2048, 3, 16), np.float32)
  rounded, wrong = jnp.asarray(exact, jnp.bfloat16), exact.copy()
  wrong[1, 64:128, 2] *= -1  # one tile of one head
  truth = seen(exact, exact)
  assert tune.relative_error(truth, truth) == 0
  assert 1e-3 < tune.relative_error(seen(exact, rounded), truth) < 4e-3
  assert 0.2 < tune.relative_error(seen(exact, jnp.asarray(wrong)), truth) < 0.7  # in truth 0.35
  wrong[0, 5, 0, 0] = np.nan
  for one, other in ((seen(wrong, exact), truth), (truth, seen(exact, wrong))):
    assert not tune.relative_error(one, other) <= tune.ERROR


@pytest.fixture
def tuning_of(no_gpu, monkeypatch):
  """The rows of local attention, forward, whose candidates take these ms, one call after another.

  Of the candidates, "broken" does not compile, and the results of "wrong" and "nan" are that.
  """
  names = {"default": None}
  names |= {name: tuning.BlockSizes(64, 64, n, 1) for n, name in enumerate(("fast", "slow"))}
  names |= {
    name: tuning.BlockSizes(64, 64, n, 2) for n, name in enumerate(("broken", "wrong", "nan"))
  }
  used = set()

  def attend(q, k, v, **how):
    candidate = tuning.block_sizes("local", "fwd", TINY.T, TINY.D, q.dtype)
    used.add(candidate)
    if candidate == names["broken"]:
      raise ValueError("does not compile")
    out = sparse_attention(q, k, v, **how)
    return {names["wrong"]: 1 - out, names["nan"]: out / 0}.get(candidate, out)

  monkeypatch.setattr(tune, "sparse_attention", attend)

  def rows_of(**times):
    tried = [names[name] for name in times]
    times = {names[name]: iter(ms) for name, ms in times.items()}
    measure = timing.Programs.measure

    def timed(programs, key):
      ms = next(times[key[-1]])
      return measure(programs, key)._replace(ms=ms, error=None if ms else "timed out")

    case = ("local", "tiny", "fwd")
    jobs = {(*case, candidate): tune.job(*case, candidate) for candidate in tried}
    with monkeypatch.context() as patch, timing.measuring(jobs) as measured:
      patch.setattr(timing.Programs, "measure", timed)
      rows = tune.tune(case, TINY, tried, measured, timing.Progress(len(jobs)))
    assert used == set(tried)
    used.clear()
    return rows

  rows_of.sizes = names
  return rows_of


@pytest.mark.slow
def test_tuning_keeps_the_best_and_refuses_what_is_wrong(tuning_of):
  times = dict(fast=[1.0, 1.1], slow=[2.0], broken=[], wrong=[0.1], nan=[0.1])
  rows = tuning_of(default=[3.0, 2.9], **times)
  assert [row["ms"] for row in rows] == [2.9, 1.0, 2.0, None, None, None]
  assert rows[3]["error"] == "ValueError: does not compile"
  assert all(row["error"].startswith("relative error") for row in rows[4:])
  table = tune.update({}, rows)
  key = tuning.Key(jax.devices()[0].device_kind, "local", "fwd", TINY.T, TINY.D, "bfloat16")
  assert table == {key: tuning_of.sizes["fast"]}
  # Once the default is the best, the entry goes.
  assert tune.update(table, tuning_of(default=[0.5], fast=[1.0])) == {}


@pytest.mark.parametrize(
  ("default", "fast", "best"),
  [
    ([3.0, 3.0], [2.0, 2.0], "fast"),
    ([3.0, 2.0], [2.0, 2.0], "default"),  # it was slow once
    ([3.0], [2.98], "default"),  # less than the noise
    ([3.0, 3.0], [2.98, 2.9], "default"),
    ([3.0, 3.0], [2.0, 2.98], "fast"),  # of both the minimum counts
    ([3.0, 3.0], [2.0, None], "default"),
  ],
)
def test_an_entry_has_to_be_faster_twice(default, fast, best, tuning_of):
  rows = tuning_of(default=default, fast=fast)
  assert [row["best"] for row in rows] == [best == "default", best == "fast"]


def test_what_works_is_the_best_where_the_default_fails(tuning_of):
  rows = tuning_of(broken=[], fast=[2.0], wrong=[1.0])
  assert rows[1]["best"] and "relative error" in rows[2]["error"]


@pytest.mark.slow
def test_tune_covers_every_kernel(no_gpu, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(tune, "candidates", lambda *_: [])
  monkeypatch.setattr(tune, "DENSE_SHAPES", ("tiny",))
  monkeypatch.setattr(tuning, "write", lambda table: None)
  assert tune.run(tmp_path)
  (path,) = tmp_path.iterdir()
  rows = json.loads(path.read_text())["rows"]
  assert len(rows) == len(tune.ROWS) * 2 and all(row["best"] for row in rows)
  assert "programs: 2 local, 2 column" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ workers


@pytest.mark.one_day_in_six(0)
def test_workers_measure_and_survive_what_their_jobs_do(monkeypatch, capsys):
  monkeypatch.setattr(os, "cpu_count", lambda: 3)
  monkeypatch.setattr(timing, "MEASURE_SECONDS", 2)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # put back afterwards
  job = lambda build, num, **more: timing.Job(build, (num,), **more)
  jobs = dict(
    compiling=job(benchmark_jobs.dies_compiling, 3),
    first=job(benchmark_jobs.total, 4),
    refused=job(benchmark_jobs.refused, 5),
    measured=job(benchmark_jobs.dies_measured, 6),
    second=job(benchmark_jobs.total, 7, look=benchmark_jobs.twice),
    hanging=job(benchmark_jobs.hangs_measured, 8),
    poisoned=job(benchmark_jobs.poisons, 9),
    third=job(benchmark_jobs.total, 10),
    fourth=job(benchmark_jobs.total, 11),
  )
  with timing.measuring(jobs) as measured:
    found = {key: measured(key) for key in jobs}
    assert measured("first").ms == 4 and measured("measured").error == found["measured"].error
  times = {key: one.ms for key, one in found.items() if one.ms}
  assert times == dict(first=4, second=7, third=10, fourth=11)
  # Every other job is in the same share, and each share has lost a process since.
  assert found["first"].kernels != found["third"].kernels
  assert found["second"].kernels != found["fourth"].kernels
  assert found["second"].seen[0] == 14
  assert found["refused"].error == "ValueError: 5 is not supported"
  assert found["poisoned"].error.startswith("JaxRuntimeError")
  assert found["compiling"].error == "Died: its process ended with exit code 3"
  assert found["measured"].error == "Died: its process ended with exit code 6"
  assert found["hanging"].error == "Died: no answer within 2 s"
  assert not multiprocessing.active_children()
  assert "compiled 9 programs in 2 processes" in capsys.readouterr().err


def test_costly_jobs_are_spread():
  jobs = {n: timing.Job(len, (), cost) for n, cost in enumerate((1, 3, 1, 3, 1, 3, 0.5, 0.5))}
  share_of = timing._shares(jobs, 3)
  assert sorted(share_of[n] for n in (1, 3, 5)) == [0, 1, 2]
  loads = [sum(jobs[n].cost for n in jobs if share_of[n] == share) for share in range(3)]
  assert max(loads) == 4.5 and min(loads) == 4


# ------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize("name", command.ON_GPU)
def test_without_a_gpu_one_message_and_status_2(name, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main([name, f"--out={tmp_path / 'out'}"])
  assert stop.value.code == 2 and not (tmp_path / "out").exists()
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err.count("\n") == 1
  assert captured.err.startswith(f"{name}: needs an NVIDIA GPU")


def test_all_benchmarks_skip_those_for_a_gpu(monkeypatch, capsys):
  monkeypatch.setattr(command, "BENCHMARKS", {name: "" for name in command.ON_GPU})
  assert command.main([]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition(":")[0] for line in lines] == [
    "attention",
    "block_sparse",
    "learned",
    "residual",
    "step",
  ]
  assert all("skipped" in line for line in lines)


def test_a_failed_row_gives_status_1(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(attention, "run", lambda out, only: "enwik8" in only)
  assert command.main(["attention", f"--out={tmp_path}"]) == 1
  assert command.main(["attention", "--only=enwik8,local"]) == 0


def test_unknown_parts_are_refused(monkeypatch, capsys):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  with pytest.raises(SystemExit) as stop:
    command.main(["attention", "--only=enwik9"])
  assert stop.value.code == 2 and "--only=enwik9: attention has enwik8" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("kind", "short"),
  [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA GeForce RTX 4090", "geforce_rtx_4090"),
  ],
)
def test_files_are_named_after_the_device(kind, short, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
  assert report.short_device() == short


def test_the_commit_can_be_told(monkeypatch, tmp_path):
  monkeypatch.setenv("SPARSE_FLAX_COMMIT", "abc123")
  report.write(tmp_path / "x.json", [])
  assert json.loads((tmp_path / "x.json").read_text())["commit"] == "abc123"
