"""Runs and an export of commit f5fca96 go on; see tests/golden/README.md."""

import json
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate as evaluate_command
from experiments import export as export_command
from sparse_flax import export
from sparse_flax import sample
from sparse_flax import train
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.run import validate
from sparse_flax.run import workdir as workdir_lib
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
GOLDEN = tiny.GOLDEN
# What f5fca96 had, with XLA's optimizations: in steps 1 to 3 of the run in float32; in steps 401 to
# 403; and for 400 on the 100 bytes of the test split.
FIRST_LOSSES = [5.545177459716797, 5.51364803314209, 5.412549018859863]
LAST_LOSSES = [0.3723110258579254, 0.3259880840778351, 0.3001725375652313]
TEST_BITS = 0.33555974597498195
PROMPT, LIKELIEST = b"the spar", b"the sparse transformer reads the"


@pytest.fixture
def old(tmp_path):
  """The folder of a copy of the run in float32."""
  return shutil.copytree(GOLDEN / "float32", tmp_path / "float32")


def command():
  return tiny.golden_config("float32")


def losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_the_first_losses_are_what_they_were(tmp_path):
  stops = iter([False, False, True])
  with pytest.raises(errors.Preempted):
    train.train(command(), str(tmp_path / "run"), say=str, stop=lambda: next(stops))
  assert [*losses(tmp_path / "run").values()] == pytest.approx(FIRST_LOSSES, rel=1e-5)


@pytest.mark.one_day_in_three(2)
def test_the_likeliest_bytes_are_what_they_were():
  _, graph, params = export.load(GOLDEN / "export")
  how = dict(key=jax.random.key(0), num=1, temperature=0, prompts=[np.frombuffer(PROMPT, np.uint8)])
  assert bytes(sample.generate(graph, params, **how)[0]) == LIKELIEST


def test_the_old_export_has_the_weights_of_the_old_run(old):
  _, _, params, _ = checkpoint.restore_params(old)
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


def test_a_run_goes_on_with_the_losses_that_it_had(old, added, tmp_path):
  workdir, lines = old, []
  stored = (workdir / "config.json").read_bytes()
  train.train(added.lock(), str(workdir), say=lines.append)
  assert lines[0] == f"RESUMING {workdir} at step 400"
  assert [losses(workdir)[step] for step in (401, 402, 403)] == pytest.approx(LAST_LOSSES, rel=1e-5)
  # The next commands find the data without being told.
  result = evaluate_command.run(str(workdir), step=400)
  assert result["bits_per_byte"] == pytest.approx(TEST_BITS, rel=1e-5)
  assert (workdir / "config.json").read_bytes() == stored
  config, _, params, step = checkpoint.restore_params(workdir)
  assert step == 403 and config.train.made_up == 7
  assert export_command.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 0
  config, _, again = export.load(tmp_path / "out")
  assert config.train.made_up == 7 and tiny.leaf_bytes(again) == tiny.leaf_bytes(params)


def test_an_export_that_lacks_a_new_field_loads(added):
  assert export.load(GOLDEN / "export")[0].train.made_up == 7


def test_a_config_that_lacks_a_new_field_is_the_old_run_s(old, added):
  workdir_lib.check(old, command())
  assert validate.validate_fields(command()) == [
    "config.train.made_up: is missing; must be a whole number >= 0"
  ]
  assert validate.completed(command().to_dict()) == added.to_dict()


def test_another_value_than_the_old_run_had_is_refused(old, added):
  added.train.made_up = 8
  with pytest.raises(ValueError, match=r"another config.*\n  config\.train\.made_up: 7 -> 8$"):
    workdir_lib.check(old, added)


def test_a_run_of_a_later_version_is_refused_by_its_fields(old):
  workdir = old
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
