"""The GPU benchmarks without a GPU: their arithmetic, their files, and what they do with failures.

Kernels are timed by a stand-in for CUPTI; `xla` stands in for the kernels and for cuDNN.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.experimental.mosaic.gpu import profiler

from experiments.benchmark import __main__ as command
from experiments.benchmark import attention
from experiments.benchmark import gpu
from experiments.benchmark import report
from experiments.benchmark import step
from experiments.benchmark import tune
from pallas_kernels import patterns
from pallas_kernels import sparse_attention
from pallas_kernels import tuning

TINY = gpu.Shape(B=2, T=24, H=2, D=8, stride=4, width=2)
SIZES = tuning.BlockSizes(block_q=128, block_k=64, stages=2, warpgroups=2)


def xla_attention(q, k, v, window=None):
  """In the place of cuDNN, which runs on GPUs only."""
  left = None if window is None else (window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=left)


@pytest.fixture
def no_gpu(monkeypatch):
  """xla for the kernels and for cuDNN, tiny shapes, and 2 ms for every call."""
  for module in (attention, step):
    monkeypatch.setattr(module, "OURS", "xla")
  monkeypatch.setattr(attention, "cudnn", xla_attention)
  monkeypatch.setattr(attention, "COPY_BYTES", 2**20)
  monkeypatch.setattr(gpu, "SHAPES", {"tiny": TINY})
  monkeypatch.setattr(gpu, "kernel_ms", lambda program, *args: (2.0, ["kernel"]))


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
  shape = gpu.SHAPES[name]
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
  shape = gpu.SHAPES["enwik8"]
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
  return gpu.kernel_ms(gpu.compiler(jnp.negative, x)(), x)


def test_kernel_times_are_summed_per_call(monkeypatch):
  ms, names = measured(monkeypatch, Cupti(gpu.ITERATIONS))
  assert ms == np.median(1.5 + np.arange(gpu.ITERATIONS)) and names == ["first", "second"]


def test_a_stray_kernel_is_measured_again(monkeypatch):
  assert measured(monkeypatch, Cupti(gpu.ITERATIONS, stray=2))[0] > 0
  with pytest.raises(RuntimeError, match="not divisible"):
    measured(monkeypatch, Cupti(gpu.ITERATIONS, stray=3))


def test_no_kernel_is_an_error(monkeypatch):
  with pytest.raises(RuntimeError, match="no kernel"):
    measured(monkeypatch, Cupti(0))


# ---------------------------------------------------------------------------------------- attention


def test_attention_writes_every_row(no_gpu, tmp_path, capsys):
  assert attention.run(tmp_path)
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  assert {"device", "versions", "date", "commit", "copy_gb_per_s", "gpu", "rows"} <= set(result)
  assert result["copy_gb_per_s"] == pytest.approx(2**20 / 1e6, abs=0.1)
  rows = {(r["pattern"], r["implementation"], r["direction"]): r for r in result["rows"]}
  assert len(rows) == len(result["rows"]) == 2 * (7 + 3)
  assert {pattern for pattern, implementation, _ in rows if implementation == "xla"} == set(
    attention.PATTERNS
  )
  for row in rows.values():
    assert row["shape"] == "tiny" and row["ms"] == 2.0 and row["roofline_ms"] > 0
    assert {"gb_per_s", "fraction", "tflops", "kernels"} <= set(row)
  assert rows["dense", "xla", "fwd"]["peer_ratios"] == {"cudnn": 1.0}
  assert rows["local", "xla", "fwdbwd"]["peer_ratios"] == {"cudnn": 1.0, "cudnn_window": 1.0}
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
    ("local", "xla"), ("local", "cudnn_window"), ("dense", "cudnn")
  }  # fmt: skip
  failed = rows["dense", "cudnn", "fwd"]
  assert failed["ms"] is None and failed["error"] == "ValueError: no plan was found"
  # Without the dense rate there is no roofline to compare with.
  ours = rows["local", "xla", "fwd"]
  assert ours["ms"] == 2.0 and ours["roofline_ms"] is None and ours["fraction"] is None
  assert "FAILED tiny dense cudnn fwd" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- step


@pytest.fixture
def tiny_body(no_gpu, monkeypatch):
  cycles = dict(merged=(patterns.Fixed(4, 2),), interleaved=(patterns.Local(4), patterns.Column(4)))
  body = step.Body(2, 16, 2, 2, 2, 24, cycles, remat=("full", "dots"))
  monkeypatch.setattr(step, "BODIES", {"tiny": body})
  monkeypatch.setattr(step, "SECONDS", 0.0)
  return body


def test_step_measures_every_mode_and_reports_the_one_that_fails(tiny_body, tmp_path, capsys):
  assert not step.run(tmp_path)  # there is no cuDNN on a CPU
  (path,) = tmp_path.iterdir()
  result = json.loads(path.read_text())
  modes = [(row["attention"], row["remat"]) for row in result["rows"]]
  assert modes == [
    *((name, remat) for remat in ("full", "dots") for name in ("none", "merged", "interleaved")),
    ("dense", "full"),
  ]
  *rows, dense = result["rows"]
  for row in rows:
    assert {"ms", "temp_bytes", "added_percent", "patterns"} <= set(row)
    assert row["added_percent"] == 0 or row["attention"] != "none"
  assert dense["ms"] is None and "cudnn" in dense["error"].lower()
  assert "FAILED tiny dense full" in capsys.readouterr().out
  assert result["bodies"]["tiny"]["cycles"]["merged"] == [repr(patterns.Fixed(4, 2))]


def test_steps_are_compared_with_none_and_dense():
  row = lambda attention, remat, ms: dict(body="b", attention=attention, remat=remat, ms=ms)
  rows = [row("none", "full", 100.0), row("merged", "full", 115.0), row("none", "dots", 80.0)]
  rows += [row("merged", "dots", 100.0), row("dense", "full", 460.0), row("dense", "dots", None)]
  step.compare(rows)
  assert [row.get("added_percent") for row in rows] == [0.0, 15.0, 0.0, 25.0, 360.0, None]
  assert [row.get("dense_ratio") for row in rows] == [4.6, 4.0, 5.75, 4.6, 1.0, None]


def test_a_step_learns_the_same_under_every_policy(tiny_body):
  params, _, tokens = step.start(tiny_body, jax.random.key(0))
  params["head"] = 0.1 * jnp.ones_like(params["head"])
  grads = [
    jax.grad(step.loss)(params, tokens, body=tiny_body, attention="interleaved", remat=remat)
    for remat in step.POLICIES
  ]
  for a, b in zip(*(jax.tree.leaves(g) for g in grads), strict=True):
    assert_close(a, b, tolerance=2e-2, what="gradient")


def test_dots_keeps_the_result_of_attention(tiny_body):
  params, _, tokens = step.start(tiny_body, jax.random.key(0))

  def exponentials(remat):
    how = dict(body=tiny_body, attention="interleaved", remat=remat)
    return str(jax.make_jaxpr(lambda p: jax.grad(step.loss)(p, tokens, **how))(params)).count(
      "= exp "
    )

  assert exponentials("dots") < exponentials("full")


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


def test_candidates_fit():
  found = tune.candidates("column", "fwd", 96, 128)
  assert found and all(c.block_q <= 128 and c.block_k <= 128 for c in found)
  shared = lambda c: 2 * 128 * (c.block_q + 2 * c.stages * c.block_k)
  assert all(shared(c) <= 227 * 1024 for c in tune.candidates("local", "fwd", 12_288, 128))


def test_tuning_keeps_the_best_and_refuses_what_is_wrong(no_gpu, monkeypatch, tmp_path):
  other = tuning.BlockSizes(64, 64, 2, 1)
  broken, wrong = tuning.BlockSizes(64, 64, 3, 1), tuning.BlockSizes(64, 64, 4, 1)
  monkeypatch.setattr(tune, "candidates", lambda *_: [SIZES, other, broken, wrong])
  used = []

  def attend(q, k, v, **how):
    sizes = tuning.block_sizes("local", "fwd", TINY.T, TINY.D, q.dtype)
    used.append(sizes)
    if sizes == broken:
      raise ValueError("does not compile")
    return sparse_attention(q, k, v, **how) + (sizes == wrong)

  times = {None: 3.0, SIZES: 1.0, other: 2.0, wrong: 0.1}
  compiled = gpu.compile_all
  monkeypatch.setattr(tune, "sparse_attention", attend)

  def compile_all(jobs):
    # Tells the stand-in timer which candidate a program is.
    programs = compiled(jobs)
    sizes_of = {id(program): sizes for sizes, program in programs.items()}
    monkeypatch.setattr(gpu, "kernel_ms", lambda p, *args: (times[sizes_of[id(p)]], []))
    return programs

  monkeypatch.setattr(gpu, "compile_all", compile_all)
  rows = tune.tune("local", "tiny", TINY, "fwd")
  assert set(used) == {None, SIZES, other, broken, wrong}
  assert [row["ms"] for row in rows] == [3.0, 1.0, 2.0, None, None]
  assert rows[3]["error"] == "ValueError: does not compile" and "error 1" in rows[4]["error"]
  table = tune.update({}, rows)
  key = tuning.Key(jax.devices()[0].device_kind, "local", "fwd", TINY.T, TINY.D, "bfloat16")
  assert table == {key: SIZES}
  # Once the default is the best, the entry goes.
  times[None] = 0.5
  assert tune.update(table, tune.tune("local", "tiny", TINY, "fwd")) == {}


def test_tune_covers_every_kernel(no_gpu, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(tune, "candidates", lambda *_: [])
  monkeypatch.setattr(tuning, "write", lambda table: None)
  assert tune.run(tmp_path)
  (path,) = tmp_path.iterdir()
  rows = json.loads(path.read_text())["rows"]
  assert len(rows) == len(tune.ROWS) * 2 and all(row["best"] for row in rows)


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
  assert [line.partition(":")[0] for line in lines] == ["attention", "step"]
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
