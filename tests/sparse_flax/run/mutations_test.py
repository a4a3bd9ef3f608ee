"""Random mutations of valid configs: each trains a step or is refused with a message."""

import random

import ml_collections
import pytest

from experiments import cli
from experiments import train
from sparse_flax.run import validate
from tests.helpers import tiny

pytestmark = pytest.mark.promotes
ODD = (-1, 0, 1, 2, 3, 5, 7, 16, 64, 10**9, -0.5, 0.0, 0.3, 1.0, 1e9, float("nan"), float("inf"))
ODD += (
  "",
  "x",
  "dense",
  "float32",
  "full",
  None,
  True,
  (),
  (1,),
  (0, -3),
  ("local", "x"),
  ("fixed",),
)


def base(path, chance):
  """A valid config that trains one step."""
  layers = chance.choice([("fixed",), ("local",), ("strided",), (("local", "column"),)])
  return tiny.config(
    path,
    model=dict(attention_layers=layers, remat=chance.choice(["full", "none"])),
    train=dict(steps=1, eval_every=1, save_every=1, ema_decay=0.5),
  ).copy_and_resolve_references()


def mutate(config: ml_collections.ConfigDict, chance) -> str:
  """Changes one or two fields in place, often into nonsense; returns what was done."""
  done = []
  for _ in range(chance.choice([1, 1, 2])):
    name = chance.choice(sorted(validate.flatten(config.to_dict())))
    group, _, field = name.rpartition(".")
    target = config[group] if group else config
    old = target[field]
    value = chance.choice(ODD)
    if isinstance(old, int | float) and chance.random() < 0.5:
      value = chance.choice([old + 1, old - 1, 2 * old, old / 2, -old])
    with config.ignore_type(), config.unlocked():
      target[field] = value
    done.append(f"{name}={value!r}")
  return " ".join(done)


@pytest.mark.one_day_in_three(2)
@pytest.mark.parametrize(
  "count", [12, pytest.param(500, marks=pytest.mark.slow)], ids=lambda n: f"{n}-mutations"
)
def test_each_trains_a_step_or_ends_with_a_message(count, tmp_path, capsys, as_a_user):
  text = tiny.text_file(tmp_path / "text")
  chance = random.Random(count)
  trained = refused = 0
  for n in range(count):
    config, workdir = base(text, chance), tmp_path / f"run{n}"
    what = mutate(config, chance)
    if config.train.steps in (7, 16, 64, 10**9, 1e9):
      continue  # valid, and too long for a test
    try:
      with cli.readable_errors():
        train.run(config, str(workdir))
      trained += 1
      status = 0
    except SystemExit as end:
      status = end.code
      refused += 1
    said = capsys.readouterr().err
    assert status in (0, 2, 3), f"{what}: status {status}: {said}"
    assert "Traceback" not in said, what
    if status == 2:
      assert said.startswith("config."), f"{what}: {said}"
      assert not workdir.exists(), f"{what}: something was written"
  assert trained and refused
