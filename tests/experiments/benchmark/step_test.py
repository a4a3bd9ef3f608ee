"""The benchmarks of training steps, with a tiny recipe: they time the product's own step."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmark.gpu import mesh
from experiments.benchmark.gpu import step
from experiments.benchmark.gpu import timing
from experiments.benchmark.gpu import training
from sparse_flax import train
from sparse_flax.train import flops
from tests.helpers import tiny

KERNELS = [("window_forward_mosaic_gpu_kernel", 1.0), ("gemm", 5.0)]
KERNELS += [("window_backward_mosaic_gpu_kernel", 1.5), ("window_forward_mosaic_gpu_kernel", 0.5)]


@pytest.fixture
def tiny_recipe(monkeypatch, tmp_path):
  """A tiny model in the place of the paper's, and four kernels as CUPTI would give them."""
  recipe = tiny.config(tmp_path / "text", model=dict(implementation="xla", remat="full"))
  copy = lambda name: recipe.copy_and_resolve_references()
  monkeypatch.setattr(step.cli, "recipe", copy)
  monkeypatch.setattr(step, "BODIES", {"tiny": step.Body("tiny", 2, ("sparse", "dense"))})
  monkeypatch.setattr(step, "SECONDS", 0.0)

  def kernels_of(call):
    assert np.isfinite(float(call()["loss"]))
    return KERNELS

  monkeypatch.setattr(timing, "kernels_of", kernels_of)
  return recipe


@pytest.mark.promotes
@pytest.mark.one_day_in_three(0)
def test_the_step_that_is_timed_is_the_products(tiny_recipe):
  config = step.config_of("tiny", "sparse")
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
@pytest.mark.one_day_in_three(2)
def test_every_mode_has_its_row(tiny_recipe, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(flops, "peak_flops", lambda kind: 1e12)
  assert step.run(tmp_path)
  result = json.loads((tmp_path / "step_cpu.json").read_text())
  assert {"device", "versions", "date", "commit", "bodies"} <= result.keys()
  sparse, dense = result["rows"]
  assert [sparse["attention"], dense["attention"]] == ["sparse", "dense"]
  assert sparse["patterns"] == ["Fixed(stride=8, summary=2, num_subblocks=2)"]
  assert dense["patterns"] == ["Dense(causal=True)"]
  for row in (sparse, dense):
    assert row["implementation"] == "xla" and row["remat"] == "full" and row["dropout"] == 0.1
    assert row["tokens_per_second"] == pytest.approx(1e3 * 2 * 32 / row["ms"], rel=1e-2)
    assert row["peak_gb"] > 0 and row["temp_bytes"] > 0 and 5 < row["loss"] < 6
    assert row["ours_share"] == 3 / 8
  config = step.config_of("tiny", "sparse")
  needed = flops.train_flops(config.model, batch_size=2)
  assert sparse["mfu"] == pytest.approx(needed / (1e9 * sparse["ms"]), abs=1e-4)
  assert sparse["dense_ratio"] == round(dense["ms"] / sparse["ms"], 3)
  assert "37.5%" in capsys.readouterr().out


@pytest.mark.promotes
def test_a_step_that_fails_is_reported_and_the_others_go_on(tiny_recipe, tmp_path, capsys):
  step.BODIES["tiny"] = step.Body("tiny", 2, ("dense", "sparse"))
  own = step.compiled

  def compiled(config):
    if config.model.attention_layers == ("dense",):
      raise ValueError("does not\nfit")
    return own(config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, "compiled", compiled)
    assert not step.run(tmp_path)
  dense, sparse = json.loads((tmp_path / "step_cpu.json").read_text())["rows"]
  assert dense["ms"] is None and dense["error"] == "ValueError: does not fit"
  assert sparse["ms"] > 0 and "dense_ratio" not in sparse
  assert "FAILED tiny dense full" in capsys.readouterr().out


def test_kernels_are_added_up_by_name():
  assert step.kernel_shares(KERNELS) == dict(
    kernel_ms=8.0,
    ours_ms=3.0,
    ours_share=0.375,
    ours={"window_forward_mosaic_gpu_kernel": 1.5, "window_backward_mosaic_gpu_kernel": 1.5},
  )
  assert step.kernel_shares([])["ours_share"] is None


def test_steps_are_compared_with_dense():
  row = lambda attention, ms, body="b": dict(body=body, attention=attention, ms=ms)
  rows = [row("sparse", 100.0), row("merged", None), row("dense", 460.0), row("sparse", 1.0, "c")]
  step.compare(rows)
  assert [row.get("dense_ratio") for row in rows] == [4.6, None, 1.0, None]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", step.BODIES)
def test_modes_are_the_recipes_on_one_device(name):
  for mode in step.BODIES[name].modes:
    config = step.config_of(name, mode)
    recipe = step.cli.recipe(step.BODIES[name].recipe)
    differ = {field for field in recipe.model if recipe.model[field] != config.model[field]}
    assert differ == set(step.MODES[mode])
    assert config.model.dropout > 0 and config.optim == recipe.optim
    assert set(dict(config.mesh).values()) == {1}
    assert flops.train_flops(config.model, batch_size=step.BODIES[name].batch) > 1e13


@pytest.mark.promotes
@pytest.mark.slow
def test_two_devices_lose_what_one_does(tiny_recipe, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(mesh, "BODIES", {"tiny": 2})
  assert mesh.run(tmp_path)
  (path,) = tmp_path.iterdir()
  rows = json.loads(path.read_text())["rows"]
  assert [row["axis"] for row in rows] == [None, "fsdp", "tensor", "sequence"]
  for row in rows:
    np.testing.assert_allclose(row["losses"], rows[0]["losses"], rtol=1e-5)
  assert "speed, one = 1" in capsys.readouterr().out
