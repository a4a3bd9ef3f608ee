"""The benchmark of training steps, with tiny bodies: it times the product's step, and peers'."""

import ast
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.benchmark import __main__ as command
from experiments.benchmark.gpu import processes
from experiments.benchmark.gpu import step
from experiments.benchmark.gpu import training
from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import masks
from experiments.benchmark.gpu.steps import ours
from experiments.benchmark.gpu.steps import plain_jax
from pallas_kernels import patterns
from sparse_flax import evaluate
from sparse_flax import train
from sparse_flax.model import transformer
from sparse_flax.train import flops
from tests.helpers import tiny
from tests.helpers.paths import ROOT

KERNELS = [("window_forward_mosaic_gpu_kernel", 1.0), ("gemm", 5.0)]
KERNELS += [("window_backward_mosaic_gpu_kernel", 1.5), ("window_forward_mosaic_gpu_kernel", 0.5)]
TINY = dict(
  seq_len=32, width=16, num_layers=2, num_heads=2, qk_ratio=0.5, ff_mult=2.0, stride=8,
  summary_width=2, sub_blocks=2, position_shape=(4, 8), dropout=0.1, compute_dtype="float32",
  remat="full",
)  # fmt: skip
# ml_collections loads config files the old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def tiny_body(monkeypatch):
  """A tiny model in the place of the paper's."""
  body = step.Body("enwik8:quick", 2, dict(model=TINY, train=dict(ema_decay=0.9)))
  monkeypatch.setattr(step, "BODIES", {"tiny": body})


@pytest.mark.promotes
@pytest.mark.one_day_in_six(5)
def test_the_step_that_is_timed_is_the_products(tiny_body):
  job = json.loads(json.dumps(step.Case("tiny", "ours", None).job()))
  config = ours.config_of(job["recipe"], job["changes"])
  assert config == step.Case("tiny", "ours", None).config()
  assert config.model.dropout == 0.1 and config.model.remat == "full"
  made = training.prepare(config)
  _, own = train.make_step(config)
  with jax.set_mesh(made.mesh):
    state, tokens = made.first_state(), made.tokens()
    expected = jax.jit(own)(made.first_state(), tokens, jax.random.key(1))
    given = jax.tree.leaves(state)
    after = made.step(state, tokens, jax.random.key(1))
  assert all(x.is_deleted() for x in given)
  assert after[1].keys() == expected[1].keys() >= {"loss", "grad_norm"}
  assert tiny.leaf_bytes(after) == tiny.leaf_bytes(expected)


@pytest.mark.promotes
def test_packages_that_do_not_jit_their_step_for_others_have_the_same(tiny_body, monkeypatch):
  config = step.Case("tiny", "ours", None).config()

  def program():
    made = training.prepare(config)
    with jax.set_mesh(made.mesh):
      return made.step.trace(*made.shapes).lower().as_text()

  own = program()
  monkeypatch.delattr(train, "jit_step")
  assert program() == own and "tf.aliasing_output" in own  # it gives up its state


@pytest.mark.one_day_in_six(1)
def test_every_way_has_its_row(tiny_body, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["TEST_CACHE"])
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
  ways = ("ours", "baseline", "jax_cudnn")
  step.run(tmp_path, ("tiny", *ways), remats=("full",), baseline=ROOT)
  result = json.loads((tmp_path / "step_cpu.json").read_text())
  assert {"device", "versions", "date", "commit", "bodies", "baseline"} <= result.keys()
  own, baseline, peer = result["rows"]
  names = [row["implementation"] for row in result["rows"]]
  assert names == list(ways)
  assert own["patterns"] == ["Fixed(stride=8, summary=2, num_subblocks=2)"]
  assert peer["patterns"] == ["Dense(causal=True)"]
  for row in result["rows"]:
    assert "error" not in row and row["remat"] == "full" and row["dropout"] == 0.1
    assert row["tokens_per_second"] == pytest.approx(1e3 * 2 * 32 / row["ms"], rel=1e-2)
    assert row["peak_gb"] > 0 and row["compile_s"] > 0 and 5 < row["loss"] < 6
    assert row["over_ours"] == round(row["ms"] / own["ms"], 3)
  assert baseline["loss"] == own["loss"] and own["attention_by"] == "xla"
  needed = flops.train_flops(step.Case("tiny", "ours", None).config().model, batch_size=2)
  assert own["mfu"] == pytest.approx(needed / (1e9 * own["ms"]), abs=1e-4)
  assert peer["mfu"] > needed / (1e9 * peer["ms"])  # dense attention has more operations
  assert "it / ours" in capsys.readouterr().out


def test_rows_that_fail_say_why_and_the_others_go_on(tiny_body, monkeypatch, tmp_path, capsys):
  ways = {"ours": step.Way("no_such_program"), "pytorch": step.Way("child")}
  monkeypatch.setattr(step, "WAYS", ways)
  assert not step.run(tmp_path, remats=("full",))
  first, second = json.loads((tmp_path / "step_cpu.json").read_text())["rows"]
  assert first["ms"] is None and "no_such_program" in first["error"]
  assert "error" not in second and second["ms"] is None  # a program that tells nothing
  assert "FAILED tiny ours full" in capsys.readouterr().out
  figures = processes.told_by(processes.Program("child", {}), seconds=0.01)
  row = step.row_of(step.Case("tiny", "ours", None), figures)
  assert row["error"] == "not done within 0.01 s" and row["ms"] is None


def test_what_is_measured_is_written_before_the_next(tiny_body, monkeypatch, tmp_path):
  def told_by(program, **how):
    if program.name != "ours":
      raise KeyboardInterrupt
    return dict(ms=1.0)

  monkeypatch.setattr(processes, "told_by", told_by)
  with pytest.raises(KeyboardInterrupt):
    step.run(tmp_path)
  (row,) = json.loads((tmp_path / "step_cpu.json").read_text())["rows"]
  assert row["ms"] == 1.0 and [path.name for path in tmp_path.iterdir()] == ["step_cpu.json"]


def test_what_was_told_before_a_process_died_counts():
  output = f'noise\n{child.MARK}{{"ms": 1.5}}\n{child.MARK}{{"loss": 5.5, "pea'
  assert child.told(output) == {"ms": 1.5}


def test_the_clock_counts_from_end_to_end(monkeypatch):
  """A step takes 10 ms of the device and 4 of the host, which is one step ahead."""
  now, free = [0.0], [0.0]
  monkeypatch.setattr(child.time, "perf_counter", lambda: now[0])

  def start():
    now[0] += 0.004
    free[0] = max(free[0], now[0]) + 0.010
    return free[0]

  def wait(end):
    now[0] = max(now[0], end)

  assert child.median_ms(start, wait) == 10.0


def test_kernels_are_added_up_by_name():
  assert ours.kernel_shares(KERNELS) == dict(
    num_kernels=4,
    kernel_ms=8.0,
    ours_ms=3.0,
    ours_share=0.375,
    ours={"window_forward_mosaic_gpu_kernel": 1.5, "window_backward_mosaic_gpu_kernel": 1.5},
    others={"gemm": 5.0},
  )
  assert ours.kernel_shares([])["ours_share"] is None


def test_steps_are_compared_with_the_fastest_of_ours():
  row = lambda way, ms, body="b": dict(body=body, implementation=way, ms=ms)
  rows = [row("ours", 100.0), row("ours", 50.0), row("pytorch", None), row("jax_cudnn", 160.0)]
  rows.append(row("pytorch", 1.0, "c"))
  step.compare(rows)
  assert [row.get("over_ours") for row in rows] == [2.0, 1.0, None, 3.2, None]


@pytest.mark.parametrize("name", step.BODIES)
def test_rows_are_of_the_recipes_on_one_device(name):
  body = step.BODIES[name]
  recipe = step.cli.recipe(body.recipe)
  for way in step.WAYS:
    config = step.Case(name, way, None).config()
    differ = {field for field in recipe.model if recipe.model[field] != config.model[field]}
    changed = (body.changes or {}).get("model", {})
    assert differ == {*step.ATTENTION[step.WAYS[way].attention], *changed}
    assert config.model.dropout > 0 and config.optim == recipe.optim
    assert set(dict(config.mesh).values()) == {1} and config.train.accumulation == 1
    assert flops.train_flops(config.model, batch_size=body.batch) > 4e12
  tokens = {"cifar10": 16 * 3_072, "enwik8": 8 * 12_288, "imagenet64": 4 * 12_288, "audio": 65_536}
  assert body.batch * recipe.model.seq_len == tokens[body.recipe]


def test_ours_come_first_and_peers_once_for_what_they_recompute():
  cases = step.cases_of(("cifar10", "audio"), (), baseline=False)
  assert cases[:2] == [step.Case("cifar10", "ours", None), step.Case("audio", "ours", None)]
  assert cases[2:4] == [step.Case("cifar10", "pytorch", remat) for remat in ("none", "full")]
  assert len(cases) == 10
  cases = step.cases_of(("audio",), ("full", "dots", "none"), baseline=True)
  told = [(case.way, case.remat) for case in cases]
  assert told == [
    *(("ours", remat) for remat in ("full", "dots", "none")),
    ("baseline", None),
    *((way, remat) for way in ("pytorch", "jax_cudnn") for remat in ("full", "none")),
  ]
  assert [case.way for case in step.cases_of(("ours_dense",), (), baseline=False)] == (
    ["ours_dense"] * 4
  )
  cases = step.cases_of(("cifar10_32", "ours"), ("full", "none"), baseline=False)
  assert cases == [step.Case("cifar10_32", "ours", remat) for remat in ("full", "none")]


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["step", "--remat=some"], "argument --remat: 'some': must be names of auto, full, "),
    (["step", "--baseline=/no"], "argument --baseline: '/no': must be the folder of a checkout"),
    (["xla", "--remat=full"], "--remat and --baseline: only step reads them"),
    (["step"], "step: needs an NVIDIA GPU"),
  ],
  ids=lambda x: x[-1] if isinstance(x, list) else "",
)
def test_bad_input_to_the_command(argv, message, tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    command.main([*argv, f"--out={tmp_path / 'out'}"])
  assert stop.value.code == 2 and message in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ peers


PATTERNS = [
  patterns.Dense(), patterns.Local(5), patterns.Column(6), patterns.Strided(7),
  patterns.Fixed(8, 3), patterns.Fixed(12, 2, 4), patterns.Fixed(7, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("T", [24, 61])
def test_masks_of_peers_are_the_patterns(pattern, T):
  described = json.loads(json.dumps(masks.described(pattern)))
  mask, expected = masks.mask_of(described), pattern.mask(T)
  i, j = np.arange(T)[:, None], np.arange(T)[None]
  assert masks.heads_of(described) == pattern.period
  for h in range(2 * pattern.period):
    of_head = expected if expected.ndim == 2 else expected[h % pattern.period]
    np.testing.assert_array_equal(mask(0, h, i, j), of_head)


def test_a_mask_that_no_peer_has_is_named():
  with pytest.raises(ValueError, match=r"Block.*no peer has a mask of this kind"):
    masks.mask_of(masks.described(patterns.Block(4)))
  with pytest.raises(ValueError, match="no peer has"):
    masks.mask_of(masks.described(patterns.Local(4, causal=False)))


@pytest.mark.parametrize("name", step.BODIES)
def test_peers_have_masks_for_all_bodies(name):
  job = step.Case(name, "pytorch", None).job()
  config = step.cli.recipe(step.BODIES[name].recipe)
  assert len(job["patterns"]) == len(config.model.attention_layers)
  assert all(map(masks.mask_of, job["patterns"]))


def test_peers_read_only_what_they_are_given(tiny_body):
  """PyTorch is not installed where the tests run: its program must at least find what it reads."""
  job = json.loads(json.dumps(step.Case("tiny", "pytorch", None).job()))
  given = {"job": job, "model": job["model"], "optim": job["optim"], "pattern": job["patterns"][0]}
  given["pattern"] = given["pattern"] | {"stride": 8}
  folder = pathlib.Path(step.__file__).parent / "steps"
  for program, names in (("pytorch", {"job", "model", "optim"}), ("plain_jax", {"job", "model"})):
    read = set()
    for node in ast.walk(ast.parse((folder / f"{program}.py").read_text())):
      if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        name = getattr(node.value, "id", getattr(node.value, "attr", ""))
        if name in given:
          read.add(name)
          assert node.slice.value in given[name], f"{program}: {name}[{node.slice.value!r}]"
    assert read >= names


def peers_weights(params: dict) -> dict:
  """Those of a model of ours with dense attention, as `plain_jax` has them."""
  (group,) = params["groups"].values()
  layers = {name: group[name] for name in ("attention_norm", "feed_forward_norm")}
  return dict(
    tokens=params["embedding"]["tokens"]["embedding"],
    positions=[params["embedding"]["positions"][n]["embedding"] for n in range(2)],
    start=params["embedding"]["start"][0, 0],
    layers=layers | group["attention"] | group["feed_forward"],
    final_norm=params["final_norm"],
    logits=params["logits"]["kernel"],
  )


@pytest.mark.one_day_in_six(4)
@pytest.mark.smoke("full", daily=0)
@pytest.mark.promotes
@pytest.mark.parametrize("remat", ["full", "none"])
def test_plain_jax_has_the_loss_and_gradients_of_our_body(tiny_body, remat):
  config = step.Case("tiny", "jax_cudnn", remat).config()
  job = step.Case("tiny", "jax_cudnn", remat).job()
  model = transformer.SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model, nnx.Param)
  random = np.random.RandomState(0)
  noisy = lambda x: x + jnp.asarray(0.1 * random.randn(*x.shape), x.dtype)
  params = jax.tree.map(noisy, nnx.to_pure_dict(state))  # no bias is 0, no gain 1
  tokens = jnp.asarray(random.randint(0, 256, (2, 32)), jnp.uint8)

  def loss(params):
    return evaluate.token_nats(nnx.merge(graph, params)(tokens), tokens).mean()

  def of_peer(params):
    with jax.numpy_rank_promotion("allow"):  # as its users have it
      return plain_jax.loss(params, tokens, None, job["model"])

  ours_loss, ours_grads = jax.jit(jax.value_and_grad(loss))(params)
  peer_loss, peer_grads = jax.jit(jax.value_and_grad(of_peer))(peers_weights(params))
  np.testing.assert_allclose(peer_loss, ours_loss, rtol=1e-6)
  expected = peers_weights(ours_grads)
  assert jax.tree.structure(peer_grads) == jax.tree.structure(expected)
  for actual, other in zip(jax.tree.leaves(peer_grads), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(actual, other, rtol=1e-3, atol=2e-6)
  shapes = jax.eval_shape(lambda: plain_jax.init(jax.random.key(0), job["model"]))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, peers_weights(params))


@pytest.mark.promotes
def test_plain_jax_makes_our_update(tiny_body):
  """Clipping, moments, decay and rate: the second update, from the same gradients."""
  case = step.Case("tiny", "jax_cudnn", None)
  weights = plain_jax.init(jax.random.key(0), case.job()["model"])
  grads = jax.tree.map(jnp.cos, weights)
  own, _ = train.optimizer_of(case.config())
  peer = plain_jax.optimizer(case.job()["optim"])

  def twice(tx):
    updates, state = tx.update(grads, tx.init(weights), weights)
    return tx.update(updates, state, weights)[0]

  expected, actual = jax.jit(lambda: (twice(own), twice(peer)))()
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)
