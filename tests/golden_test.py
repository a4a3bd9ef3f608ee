"""Runs and an export of commit f5fca96 go on; see tests/golden/README.md."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import enwik8
from experiments import evaluate as evaluate_command
from experiments import export as export_command
from sparse_flax import checkpoint
from sparse_flax import errors
from sparse_flax import export
from sparse_flax import sample
from sparse_flax import train
from sparse_flax import validate
from sparse_flax import workdir as workdir_lib
from tests import tiny

pytestmark = pytest.mark.promotes
GOLDEN = pathlib.Path(__file__).parent / "golden"
# What f5fca96 had, with XLA's optimizations: in steps 1 to 3 of the run in float32; in steps 401 to
# 403; and for 400 on the 100 bytes of the test split.
FIRST_LOSSES = [5.545177459716797, 5.51364803314209, 5.412549018859863]
LAST_LOSSES = [0.3723110258579254, 0.3259880840778351, 0.3001725375652313]
TEST_BITS = {"float32": 0.33555974597498195, "bfloat16": 0.4190498589218281}
PROMPT, LIKELIEST = b"the spar", b"the sparse transformer reads the"


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(tmp_path_factory):
  with tiny.fast_compilation(tmp_path_factory.mktemp("cache")):
    yield


@pytest.fixture
def old(tmp_path):
  """Copies one of the runs: the folder of the copy."""
  return lambda name: shutil.copytree(GOLDEN / name, tmp_path / name)


def command(**model):
  """The config that was given to both runs, with the data where they are now."""
  config = enwik8.get_config("quick").copy_and_resolve_references()
  config.unlock()
  config.model.update(seq_len=32, width=8, num_heads=2, stride=8, summary_width=2, sub_blocks=2)
  config.model.update(num_layers=2, ff_mult=2.0, attention_layers=("fixed", "strided"))
  config.model.update(position_shape=(4, 8), dropout=0.0, **model)
  config.data.update(name="bytes", path=str(GOLDEN / "text"), batch_size=4)
  config.train.update(steps=403, log_every=1, eval_every=200, save_every=1_000, ema_decay=0.9)
  config.optim.update(learning_rate=2e-2, warmup_steps=5)
  config.mesh.data = 1
  config.eval.min_context = 0
  return config.lock()


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def dtypes(tree):
  return {str(x.dtype) for x in jax.tree.leaves(tree)}


def test_the_first_losses_are_what_they_were(tmp_path):
  stops = iter([False, False, True])
  with pytest.raises(errors.Preempted):
    train.train(command(), str(tmp_path / "run"), say=str, stop=lambda: next(stops))
  assert [*losses(tmp_path / "run").values()] == pytest.approx(FIRST_LOSSES, rel=1e-5)


def test_an_old_run_goes_on_with_the_losses_that_it_had(old):
  workdir = old("float32")
  stored = (workdir / "config.json").read_bytes()
  lines = []
  train.train(command(), str(workdir), say=lines.append)
  assert lines[0] == f"RESUMING {workdir} at step 400"
  assert [losses(workdir)[step] for step in (401, 402, 403)] == pytest.approx(LAST_LOSSES, rel=1e-5)
  # The next commands find the data without being told.
  result = evaluate_command.run(str(workdir), step=400)
  assert result["bits_per_byte"] == pytest.approx(TEST_BITS["float32"], rel=1e-5)
  assert (workdir / "config.json").read_bytes() == stored


def test_an_old_run_in_bfloat16_goes_on_with_averages_in_float32(old):
  workdir = old("bfloat16")
  result = evaluate_command.run(str(workdir), data_path=str(GOLDEN / "text"))
  assert result["bits_per_byte"] == pytest.approx(TEST_BITS["bfloat16"], rel=1e-2)
  config = command(param_dtype="bfloat16")
  result = train.train(config, str(workdir), say=str)
  assert result["bits_per_byte"] < 0.45
  assert all(losses(workdir)[step] < 0.4 for step in (401, 402, 403))
  state = tiny.restore(config, workdir)
  assert dtypes(state["ema"]) == {"float32"} and dtypes(state["opt"]) == {"float32", "int32"}
  assert dtypes(state["params"]) == {"bfloat16", "float32"}  # norms are always in float32
  assert dtypes(checkpoint.restore_params(workdir, 400)[2]) == {"float32"}


def test_the_likeliest_bytes_are_what_they_were():
  _, graph, params = export.load(GOLDEN / "export")
  how = dict(key=jax.random.key(0), num=1, temperature=0, prompts=[np.frombuffer(PROMPT, np.uint8)])
  assert bytes(sample.generate(graph, params, **how)[0]) == LIKELIEST


def test_the_old_export_has_the_weights_of_the_old_run(old):
  _, _, params, _ = checkpoint.restore_params(old("float32"))
  assert tiny.leaf_bytes(export.load(GOLDEN / "export")[2]) == tiny.leaf_bytes(params)


# ------------------------------------------------------------------------ fields that are added


@pytest.fixture
def added(monkeypatch):
  """A version of this program whose configs have one field more."""
  monkeypatch.setitem(validate._RULES, "train.made_up", validate._whole(0))
  monkeypatch.setitem(validate.ADDED, "train.made_up", 7)
  config = command().copy_and_resolve_references().unlock()
  config.train.made_up = 7
  return config


def test_a_run_that_lacks_a_new_field_goes_on(old, added, tmp_path):
  workdir = old("float32")
  train.train(added.lock(), str(workdir), say=str)
  assert losses(workdir)[403] == pytest.approx(LAST_LOSSES[2], rel=1e-5)
  config, _, params, step = checkpoint.restore_params(workdir)
  assert step == 403 and config.train.made_up == 7
  assert export_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 0
  config, _, again = export.load(tmp_path / "out")
  assert config.train.made_up == 7 and tiny.leaf_bytes(again) == tiny.leaf_bytes(params)


def test_an_export_that_lacks_a_new_field_loads(added):
  assert export.load(GOLDEN / "export")[0].train.made_up == 7


def test_a_config_that_lacks_a_new_field_is_the_old_run_s(old, added):
  workdir_lib.check(old("float32"), command())
  assert validate.validate_fields(command()) == [
    "config.train.made_up: is missing; must be a whole number >= 0"
  ]
  assert validate.completed(command().to_dict()) == added.to_dict()


def test_another_value_than_the_old_run_had_is_refused(old, added):
  added.train.made_up = 8
  with pytest.raises(ValueError, match=r"another config.*\n  config\.train\.made_up: 7 -> 8$"):
    workdir_lib.check(old("float32"), added)


def test_a_run_of_a_later_version_is_refused_by_its_fields(old):
  workdir = old("float32")
  config = json.loads((workdir / "config.json").read_text())
  config["train"]["later"] = 1
  (workdir / "config.json").write_text(json.dumps(config))
  expected = (
    r"config\.json: is not a config of this version.*\n *config\.train\.later=1: there is no"
  )
  for read in (
    lambda: workdir_lib.load_config(workdir),
    lambda: train.train(command(), str(workdir)),
  ):
    with pytest.raises(ValueError, match=expected):
      read()
