"""The benchmark of models of several scales, with tiny ones: its rows, its checks, its table."""

import json
import os
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import __main__ as command
from experiments.benchmark import record
from experiments.benchmark.gpu import multiscale
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import sample
from experiments.benchmark.gpu import step
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import ours
from experiments.benchmark.gpu.steps import sampled
from pallas_kernels import api
from sparse_flax import train
from sparse_flax.model import levels
from sparse_flax.parallel import sharding
from sparse_flax.run import validate
from sparse_flax.train import flops
from tests.helpers.paths import ROOT

TINY = dict(
  seq_len=32, width=16, num_heads=2, position_shape=(4, 8), dropout=0.0, compute_dtype="float32",
  remat="full", attention_layers=("local",), summary_width=0, sub_blocks=1, stride=8,
)  # fmt: skip
INNER = dict(shorten=4, num_layers=1, stride=4, summary_width=0, sub_blocks=1)
SHORT = dict(TINY, num_layers=1, num_layers_after=1)
BODIES = {
  "flat": step.Body("enwik8:quick", 2, dict(model=dict(TINY, num_layers=3))),
  "shorten": step.Body(
    "enwik8:shorten", 2, dict(model=SHORT | dict(inner=INNER | dict(attention_layers=("local",))))
  ),
}
# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def tiny(monkeypatch):
  """Tiny models in the place of those of the table."""
  how = multiscale.Sampling(("xla",), (1, 2), 8)
  models = {name: multiscale.Model(body, how) for name, body in BODIES.items()}
  monkeypatch.setattr(multiscale, "GROUPS", {"tiny": models})
  monkeypatch.setattr(multiscale, "STEPS", 8)


@pytest.mark.one_day_in_six(2)
def test_every_model_has_its_rows(tiny, monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["TEST_CACHE"])
  monkeypatch.setattr(processes, "SIDE_BY_SIDE", 2)
  assert multiscale.run(tmp_path)
  (path,) = tmp_path.iterdir()
  assert path.name == "multiscale_cpu.json"
  rows = json.loads(path.read_text())["rows"]
  told = [(row["kind"], row["name"], row["batch"]) for row in rows]
  assert told == [
    ("steps", "flat", 2),
    ("steps", "shorten", 2),
    *(("sampling", name, B) for name in BODIES for B in (1, 2)),
  ]
  flat, short = rows[:2]
  assert [x["rows"] for x in short["levels"]] == [32, 8] and len(flat["levels"]) == 1
  for row, body in zip(rows[:2], BODIES.values(), strict=True):
    assert row["tokens_per_second"] == pytest.approx(1e3 * 64 / row["ms"], rel=1e-2)
    assert row["peak_gb"] > 0 and 5 < row["loss"] < 6 and row["attention_by"] == "xla"
    assert row["tflop"] == round(flops.forward_flops(body.config().model) / 1e12, 4)
  speed = [row.get("tokens_per_second") or row["bytes_per_second"] for row in rows]
  for n, base in ((1, 0), (4, 2), (5, 3)):
    assert rows[n]["over_flat"] == pytest.approx(speed[n] / speed[base], abs=1e-3)
    assert rows[base]["over_flat"] == 1.0
  for row in rows[2:]:
    assert row["bytes_per_second"] == pytest.approx(
      1e3 * row["batch"] / row["ms_per_step"], rel=0.1
    )
  for row in (rows[2], rows[4]):  # in float32 by one implementation
    assert row["alike"] == 1.0 and row["largest_gap"] < 1e-3 and row["checked"] == 8
  assert "x flat" in capsys.readouterr().out


def test_rows_that_fail_say_why_and_the_others_go_on(tiny, monkeypatch, tmp_path, capsys):
  def told_by(program, **how):
    job = program.job
    if program.name == "ours":
      return dict(error="exit status 1: out of memory", compile_s=1.0)
    first = dict(batch_1=dict(ms_per_step=2.0, bytes_per_second=500))
    return first | (dict(error="exit status -14: ") if "shorten" in job["recipe"] else {})

  monkeypatch.setattr(processes, "told_by", told_by)
  assert not multiscale.run(tmp_path, ("tiny",))
  rows = json.loads((tmp_path / "multiscale_cpu.json").read_text())["rows"]
  assert [row.get("error") for row in rows] == [
    *["exit status 1: out of memory"] * 2,
    *[None] * 2,
    *["exit status -14: "] * 2,
  ]
  assert all(row["ms"] is None and row["compile_s"] == 1.0 for row in rows[:2])
  assert rows[4]["seconds_per_sequence"] == 0.06  # 32 steps
  assert rows[4]["ms_per_step"] == 2.0 and rows[5]["ms_per_step"] is None
  out = capsys.readouterr().out
  assert "FAILED steps tiny flat  x 2" in out and "FAILED sampling tiny shorten xla x 2" in out


@pytest.mark.parametrize(
  ("only", "titles"),
  [
    (("sampling", "cifar10"), ["flat", "flat", "shorten", "shorten", "patches"]),
    (("steps", "enwik8_flat", "enwik8_megabyte"), ["flat", "megabyte"]),
    (("audio",), ["flat", "shorten"]),
  ],
  ids=["kind", "models", "group"],
)
def test_kinds_groups_and_models_are_chosen(only, titles):
  cases = multiscale.cases_of(only)
  assert [case.name for case in cases] == titles
  assert {case.kind for case in cases} == {only[0]} & {*multiscale.KINDS} or {"steps"}


def test_an_unknown_part_is_an_error_that_names_the_others(monkeypatch, capsys):
  monkeypatch.setattr(command.jax, "default_backend", lambda: "gpu")
  with pytest.raises(SystemExit) as stop:
    command.main(["multiscale", "--only=sampling,cifar"])
  assert stop.value.code == 2
  assert "--only=cifar: multiscale has steps, sampling, cifar10, " in capsys.readouterr().err


def test_the_models_are_those_of_the_documents():
  """TFLOP of a forward pass over one sequence, and their share of the flat model's."""
  expected = {
    "cifar10": {"flat": 0.122, "shorten": 0.0545, "patches": 0.0433},
    "enwik8": {"flat": 0.8365, "shorten": 0.2992, "megabyte": 0.3148},
    "audio": {"flat": 10.7873, "shorten": 1.9838},
    "photographs": {"flat": 35.6042, "patches": 4.4107},
  }
  for group, models in multiscale.GROUPS.items():
    assert next(iter(models)) == multiscale.FLAT
    configs = {name: model.body.config() for name, model in models.items()}
    found = {name: flops.forward_flops(x.model) / 1e12 for name, x in configs.items()}
    assert found == pytest.approx(expected[group], abs=1e-4)
    assert len({(x.model.seq_len, x.data.batch_size) for x in configs.values()}) == 1
    for name, config in configs.items():
      assert len(levels.specs_of(**config.model)) > 1 or name == multiscale.FLAT
      assert config.model.dropout == (0.4 if group == "enwik8" else 0.0)
      job = json.loads(json.dumps(multiscale.Case("steps", group, name, None).job()))
      assert ours.config_of(job["recipe"], job["changes"]) == config


def test_the_documents_train_the_models_of_the_table():
  """The commands of docs/multiscale.md, with what a shell makes of their variables."""
  text = (ROOT / "docs" / "multiscale.md").read_text()
  lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line[:4] == " " * 4]
  same = dict(line.split("=", 1) for line in lines if line.startswith(("IMAGES=", "TEXT=")))
  trained = {}
  for line in (x for x in lines if x.startswith("python -m experiments.benchmark record")):
    for name, flags in same.items():
      line = line.replace(f"${name}", flags.strip('"'))
    words = shlex.split(line)[4:]
    flags = dict(x.lstrip("-").split("=", 1) for x in words if not x.startswith("--config"))
    parser = record.cli.Parser("")
    config = record.cli.parse_config(parser, [x for x in words if x.startswith("--config")])[1]
    assert not validate.validate_fields(config) and config.optim.name == "muon"
    trained[flags["name"]] = config
  for name, config in trained.items():
    _, group, model, _ = name.split("-")
    assert config.model == multiscale.GROUPS[group][model].body.config().model
  assert {tuple(name.split("-")[1:3]) for name in trained} == {
    (group, name) for group in ("cifar10", "enwik8") for name in multiscale.GROUPS[group]
  }
  for group in ("cifar10", "enwik8"):
    configs = [x for name, x in trained.items() if name.startswith(f"multiscale-{group}-")]
    assert all(x.optim == configs[0].optim and x.data == configs[0].data for x in configs)
    assert len({x.train.steps for x in configs}) == 1  # equal steps


@pytest.mark.promotes  # optax's Adam mixes dtypes
@pytest.mark.one_day_in_six(3)
@pytest.mark.parametrize(
  ("recipe", "blocks", "lowers"),
  [("cifar10:patches", ("mosaic_gpu",), False), ("audio:1m-shorten", (), True)],
)
def test_a_step_for_an_h200_has_our_kernels_at_all_levels(recipe, blocks, lowers):
  """Fewer layers, as many patterns. Blocks of a width that their kernels lack are by modules.

  Lowering a step with blocks by kernels takes a minute.
  """
  body = step.Body(recipe, 1)
  config = body.config()
  count = lambda cycle: len(cycle.attention_layers)
  level, outer = config.model, config.model
  with config.unlocked():
    while level:
      outer = level if "attention_layers" in level else outer
      level.update({x: count(outer) for x in ("num_layers", "num_layers_after") if level.get(x)})
      level = level.get("inner")
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
  mesh = jax.sharding.AbstractMesh(
    (1,) * 4, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4, abstract_device=device
  )
  key = jax.random.key(0)
  with jax.sharding.use_abstract_mesh(mesh):
    init, one_step = train.make_step(config)
    tokens = jax.ShapeDtypeStruct((1, config.model.seq_len), jnp.uint8)
    traced = jax.jit(one_step).trace(jax.eval_shape(init, key), tokens, key)
    if lowers:
      assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
  assert api.implementations_in(traced.jaxpr) == ("mosaic_gpu",)
  assert api.implementations_in(traced.jaxpr, "blocks") == blocks


def test_the_check_finds_bytes_that_are_not_the_likeliest():
  logits = np.random.RandomState(0).normal(size=(2, 5, 256)).astype(np.float32)
  best = logits.argmax(axis=-1)
  alike, gap = sampled.compare(jnp.asarray(logits), jnp.asarray(best, jnp.uint8))
  assert float(alike) == 1.0 and float(gap) == 0.0
  best[1, 2] = logits[1, 2].argmin()
  alike, gap = sampled.compare(jnp.asarray(logits), jnp.asarray(best, jnp.uint8))
  assert float(alike) == pytest.approx(0.9) and float(gap) > 4 > sampled.LARGEST_GAP


@pytest.mark.one_day_in_six(1)
def test_cached_steps_that_serve_another_slot_are_found(monkeypatch, capsys):
  """Of random weights every level shows in the likeliest bytes."""
  right = levels.decode_step

  def late(level, x, at, caches, **how):
    return right(level, x, at + int(level.inner is not None), caches, **how)

  monkeypatch.setattr(levels, "decode_step", late)
  monkeypatch.setattr(sample, "CALLS", 1)
  body = BODIES["shorten"]
  job = dict(recipe=body.recipe, changes=body.on_one_device(), implementation="xla")
  with pytest.raises(ValueError, match=r"^a cached step chose a byte whose uncached logit lacks"):
    sampled.measure(job | dict(batches=[2], steps=8, checked=16))
  figures = child.told(capsys.readouterr().out)
  assert figures["batch_2"]["ms_per_step"] > 0 and figures["alike"] < 1.0
