"""Single flipped bits anywhere in a checkpoint: what comes back was saved, or another step is."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from tests.helpers import tiny

# Orbax drops coroutines when a read fails; when they are collected, pytest would count it as ours.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FLIPS = 300


def state_at(step):
  random = np.random.RandomState(step)
  weights = {
    "kernel": jnp.asarray(random.standard_normal((48, 64)), jnp.float32),
    "half": jnp.asarray(random.standard_normal((16, 32)), jnp.bfloat16),
    "table": jnp.zeros((64, 64)),  # compresses well, so that its file is small
  }
  opt = ({"mu": jax.tree.map(lambda x: 0.1 * x, weights)}, jnp.int32(step))
  ema = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
  return {"step": jnp.int32(step), "params": weights, "ema": ema, "opt": opt}


def shapes():
  where = sharding.replicated(sharding.make_mesh(data=1, fsdp=1, tensor=1, sequence=1))
  return checkpoint.laid_out(jax.eval_shape(lambda: state_at(0)), where)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(state_at(step), bits_per_byte=4.0 - step)
  return folder


def restore(workdir):
  """The step that comes back, its bits, and what was said."""
  said = []
  with checkpoint.Checkpoints(workdir, say=said.append) as checkpoints:
    state, step = checkpoints.restore_newest(shapes())
  return step, tiny.leaf_bytes(state), said


@pytest.mark.one_day_in_six(3)
@pytest.mark.parametrize(
  "flips", [4, pytest.param(FLIPS, marks=pytest.mark.slow)], ids=lambda n: f"{n}-flips"
)
def test_no_flip_restores_a_wrong_value(run, flips, tmp_path, capsys):
  """The files of a step are flipped in proportion to their sizes."""
  expected = {step: tiny.leaf_bytes(state_at(step)) for step in (1, 2)}
  files = sorted(path for path in (run / "checkpoints" / "2").rglob("*") if path.is_file())
  sizes = np.array([path.stat().st_size for path in files])
  random = np.random.RandomState(0)
  named = equal = wrong = 0
  for n in range(flips):
    workdir = tmp_path / str(n)
    shutil.copytree(run, workdir)
    file = files[random.choice(len(files), p=sizes / sizes.sum())]
    content = bytearray(file.read_bytes())
    bit = random.randint(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    (workdir / file.relative_to(run)).write_bytes(content)
    step, bits, said = restore(workdir)
    if step == 1:
      good = bits == expected[1] and len(said) == 1 and said[0].startswith("DAMAGED")
      good = good and "/checkpoints/2 is refused: " in said[0]
      named += good
      # What was refused is kept for whoever wants to look, and out of the way of a new step 2.
      good = good and (workdir / "checkpoints-damaged" / "2-0").is_dir()
    else:
      good = bits == expected[2] and not said
      equal += good
    wrong += not good
    shutil.rmtree(workdir)
  with capsys.disabled():
    print(f"\n{flips} flips: {named} named and a step gone back, {equal} harmless, {wrong} wrong")
  assert wrong == 0 and named + equal == flips
  assert named > 0.5 * flips, "flips that are not noticed prove nothing"


@pytest.mark.one_day_in_six(5)
@pytest.mark.parametrize("damage", ["truncated", "missing", "renamed"])
def test_other_damage(run, damage, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  step = tmp_path / "run" / "checkpoints" / "2"
  file = max((path for path in step.rglob("*") if path.is_file()), key=lambda x: x.stat().st_size)
  if damage == "truncated":
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif damage == "missing":
    file.unlink()
  else:
    step.rename(step.with_name("3"))
  found, bits, said = restore(tmp_path / "run")
  assert found == 1 and bits == tiny.leaf_bytes(state_at(1)) and len(said) == 1


def test_a_run_without_a_sound_step_says_so_and_loses_nothing(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  for step in (1, 2):
    about = tmp_path / "run" / "checkpoints" / str(step) / "about"
    shutil.rmtree(about)
  with pytest.raises(
    errors.DamagedError, match=r"no step is sound\nDAMAGED .*2 is .*\nDAMAGED .*1"
  ):
    restore(tmp_path / "run")
  assert len(list((tmp_path / "run" / "checkpoints").iterdir())) >= 2


def test_storage_that_is_away_is_no_damage(run, tmp_path, monkeypatch):
  shutil.copytree(run, tmp_path / "run")

  def away(self, *args, **how):
    raise PermissionError("no token")

  with checkpoint.Checkpoints(tmp_path / "run", say=str) as checkpoints:
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "restore", away)
    with pytest.raises(errors.StorageError, match="no token"):
      checkpoints.restore_newest(shapes())
  assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.one_day_in_three(2)
def test_reading_moves_nothing(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "ema")
  with checkpoint.Checkpoints(tmp_path / "run", read_only=True, say=str) as checkpoints:
    state, step = checkpoints.restore_newest({"ema": shapes()["ema"]})
    assert step == 1 and state.keys() == {"ema"}
    with pytest.raises(errors.DamagedError, match="checkpoints/2 is refused: ema: "):
      checkpoints.restore(2, {"ema": shapes()["ema"]})
  assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
