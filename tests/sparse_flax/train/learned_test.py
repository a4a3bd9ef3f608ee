"""Models whose layers choose the blocks that they read: training, stages, exports."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_flax import evaluate
from sparse_flax import export
from sparse_flax import run
from sparse_flax import sample
from sparse_flax import train
from sparse_flax.model import graph_and_shapes
from sparse_flax.model import stage_at
from sparse_flax.parallel import sharding
from sparse_flax.run import validate
from sparse_flax.train import optim
from sparse_flax.view import chosen
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
STAGES = ((0, "dense"), (2, 4))
RARELY = dict(steps=4, eval_every=9, save_every=9)
SIZES = dict(block_size=4, top=3, query_block=2, index_size=4, window=6)


def config_of(path, *names, stages=(), **groups):
  model = dict(attention_layers=names, num_layers=len(names), learned_stages=stages, dropout=0.0)
  model |= dict(compute_dtype="float32", implementation=None) | groups.pop("model", {})
  config = tiny.config(path, **groups).copy_and_resolve_references()
  config.unlock()
  config.model.update(model)
  config.model.learned.update(SIZES)
  return config.lock()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  return tiny.text_file(tmp_path_factory.mktemp("learned") / "text")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
  """A run through all stages without a stop: its folder, and what it said."""
  folder, lines = tmp_path_factory.mktemp("learned") / "whole", []
  with jax.numpy_dtype_promotion("standard"):
    train.train(
      config_of(text, "indexer", stages=STAGES, train=RARELY), str(folder), say=lines.append
    )
  return folder, "\n".join(lines)


@pytest.mark.one_day_in_six(2)
def test_a_run_that_is_stopped_in_a_stage_goes_on_exactly(text, whole, tmp_path):
  """It is stopped where the second stage begins, and inside that."""
  config, (undisturbed, _) = config_of(text, "indexer", stages=STAGES, train=RARELY), whole
  for steps, asked in ((2, [False, True]), (3, [True])):
    done = iter(asked).__next__
    with pytest.raises(run.Preempted, match=f"STOPPED at step {steps}, saved is step {steps}"):
      train.train(config, str(tmp_path / "stopped"), say=lambda line: None, stop=done)
  train.train(config, str(tmp_path / "stopped"), say=lambda line: None)
  states = (tiny.restore(config, x) for x in (undisturbed, tmp_path / "stopped"))
  first, second = (tiny.leaf_bytes(state) for state in states)
  assert first == second


@pytest.mark.one_day_in_six(2)
def test_stages_and_the_loss_of_indexers_are_told(whole):
  folder, said = whole
  assert "all blocks from step 1 on" in said
  assert "4 blocks of keys for each list from step 3 on" in said
  records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  steps = [record for record in records if "loss" in record]
  assert steps[0]["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
  assert all(record["index_loss"] > 0 and record["index_grad_norm"] > 0 for record in steps)
  assert "index loss 0." in said


@pytest.mark.one_day_in_six(2)
def test_an_export_gives_the_same_score_and_the_same_samples(text, whole, tmp_path):
  config, (folder, _) = config_of(text, "indexer", stages=STAGES, train=RARELY), whole
  params = run.restore_params(str(folder))[2]
  export.save(tmp_path / "out", config, params, step=4)
  exported = export.read(tmp_path / "out")
  scores = [
    evaluate.evaluate(c, p, split="test", step=4, num=2)["bits_per_byte"]
    for c, p in ((config, params), (exported.config, exported.params))
  ]
  assert scores[0] == scores[1]
  draw = functools.partial(sample.generate, key=jax.random.key(0), num=2)
  drawn = [draw(exported.graphdef, x) for x in (params, exported.params)]
  np.testing.assert_array_equal(*drawn)
  shares = chosen.shares(exported.graphdef, params, drawn[0])
  assert [*shares] == [0] and shares[0].shape == (8,)
  assert shares[0][0] == 1 and (shares[0] <= 1).all()  # the own block is always read


@pytest.mark.one_day_in_six(4)
def test_the_backbone_moves_as_without_an_indexers_loss(text):
  """Bit for bit, though gradients are clipped: indexers have a norm and a clip of their own."""
  tokens = np.random.default_rng(0).integers(0, 256, (4, 32), np.uint8)
  found = {}
  for factor in (0.0, 1e3):
    config = config_of(text, "indexer", optim=dict(index_loss=factor, clip_norm=1e-2))
    init, step = train.make_step(config)
    init, step = jax.jit(init), jax.jit(functools.partial(step, stage="dense"))
    state = init(jax.random.key(0))
    for _ in range(2):  # of the first one all gradients but that of the logits are zero
      state, record = step(state, tokens, jax.random.key(1))
    found[factor] = state, record
  (first, before), (second, after) = found.values()
  split = optim.split_apart
  (index, others), (other_index, same) = (split(x["params"]) for x in (first, second))
  assert tiny.leaf_bytes(others) == tiny.leaf_bytes(same)
  assert tiny.leaf_bytes(index) != tiny.leaf_bytes(other_index)
  assert before["grad_norm"] == after["grad_norm"] > 0
  assert after["index_grad_norm"] > 100 * before["index_grad_norm"] == 0


@pytest.mark.smoke(daily=1)
@pytest.mark.one_day_in_six(1)
@pytest.mark.parametrize("name", ["moba", "nsa", "indexer"])
def test_rows_and_weights_may_be_sharded(text, name):
  """Over data and fsdp, the loss of a step and its gradient are those of one device."""
  config = config_of(text, name)
  init, step = train.make_step(config)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 32), np.uint8)
  records = []
  for data, fsdp in ((1, 1), (2, 2)):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=1, sequence=1)
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(init, jax.random.key(0))
      state = jax.jit(init, out_shardings=sharding.by_rules(shapes, mesh))(jax.random.key(0))
      placed = jax.device_put(tokens, sharding.by_batch(mesh))
      records.append(jax.jit(step)(state, placed, jax.random.key(1))[1])
  for name in records[0]:
    np.testing.assert_allclose(records[0][name], records[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.one_day_in_three(0)
def test_steps_of_a_model_give_the_logits_of_the_whole(text):
  model = dict(config_of(text, "moba", "local", "nsa").model)
  graph, _ = graph_and_shapes(**model)
  params = tiny.random_weights(config_of(text, "moba", "local", "nsa"))
  whole = nnx.merge(graph, params)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 22), np.uint8))
  expected = jax.jit(whole)(tokens)
  logits, caches = whole.prefill(tokens[:, :13])
  np.testing.assert_allclose(logits, expected[:, :13], rtol=1e-4, atol=1e-5)
  step = jax.jit(whole.decode_step)
  for t in range(13, 22):
    logits, caches = step(tokens[:, t - 1], t, caches)
    np.testing.assert_allclose(logits, expected[:, t], rtol=1e-4, atol=1e-5)


def test_stages_begin_where_they_say():
  assert [stage_at(STAGES, step) for step in (0, 1, 2, 99)] == ["dense", "dense", 4, 4]
  assert stage_at((), 5) is None


@pytest.mark.parametrize(
  ("field", "right", "change"),
  [
    ("model.attention_layers", "each a whole layer", dict(attention_layers=(("local", "nsa"),))),
    ("model.learned.top", "a whole number >= 3", dict(attention_layers=("nsa",), top=2, local=2)),
    ("model.learned.query_block", "must divide", dict(attention_layers=("nsa",), query_block=3)),
    ("model.learned_stages", "from step 0 on", dict(learned_stages=((2, "dense"),))),
    ("model.learned_stages", "or a number of blocks", dict(learned_stages=(2,))),
    ("model.learned_stages", "a whole number >= 2", dict(learned_stages=((0, 1),))),
    (
      "model.learned_stages",
      "must be ()",
      dict(attention_layers=("local",), learned_stages=((0, 5),)),
    ),
  ],
)
def test_mistakes_of_a_config_are_named(text, field, right, change):
  config = config_of(text, "moba").copy_and_resolve_references()
  config.unlock()
  change = dict(change)
  sizes = {name: change.pop(name) for name in ("top", "local", "query_block") if name in change}
  config.model.update(change)
  config.model.learned.update(sizes)
  (problem,) = validate.validate_fields(config)
  assert problem.startswith(f"config.{field}=") and right in problem


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_a_mesh_that_shards_heads_or_tokens_is_refused(text, axis):
  problems = validate.validate(config_of(text, "moba", mesh={axis: 2}))
  assert any(x.startswith(f"config.mesh.{axis}=2: must be 1, for ") for x in problems)
