"""Each wrong value gets a sentence that names it, and all of them come at once."""

import pytest

from sparse_flax.run import validate
from tests.helpers import tiny


@pytest.fixture
def path(tmp_path):
  return tiny.text_file(tmp_path / "text")


def test_a_good_config_has_no_problems(path):
  assert validate.validate(tiny.config(path)) == []


@pytest.mark.parametrize(
  ("field", "value", "right"),
  [
    ("model.modality", "video", "'image', 'text', 'audio'"),
    ("model.width", 0, "a whole number >= 1"),
    ("model.num_layers", True, "a whole number >= 1"),
    ("model.ff_mult", float("nan"), "a finite number > 0"),
    ("model.attention_layers", ("local", "colunm"), "dense, local, column"),
    ("model.activation", "relu", "'quick_gelu', 'relu2'"),
    ("model.attention_layers", (), "a tuple of names"),
    ("model.attention_layers", (("local", ("column",)),), "a tuple of names"),
    ("model.stride", 0, "a whole number >= 1"),
    ("model.position_shape", (0, 8), "a tuple of whole numbers >= 1"),
    ("model.dropout", 1.0, "a number in [0, 1)"),
    ("model.init_scheme", "xavier", "'default', 'paper', 'code'"),
    ("model.compute_dtype", "float8", "'float32', 'bfloat16', 'float16'"),
    ("model.implementation", "cuda", "None, 'reference', 'xla'"),
    ("data.batch_size", 0, "a whole number >= 1"),
    ("train.steps", -5, "a whole number >= 1"),
    ("train.ema_decay", 1.0, "a number in [0, 1)"),
    ("optim.learning_rate", float("inf"), "a finite number > 0"),
    ("optim.weight_decay", -0.1, "a finite number >= 0"),
    ("optim.final_lr_ratio", 1.5, "a number in [0, 1]"),
    ("optim.name", "sgd", "'adam', 'muon'"),
    ("optim.schedule", "constant", "'cosine', 'linear'"),
    ("optim.momentum", 1.0, "a number in [0, 1)"),
    ("optim.muon_ratio", 0.0, "a finite number > 0"),
    ("optim.momentum_dtype", "float16", "'float32', 'bfloat16'"),
    ("optim.loss_scale", "static", "'none', 'dynamic'"),
    ("mesh.tensor", 0, "a whole number >= 1"),
    ("mesh.data", 0, "-1 (all devices)"),
    ("eval.min_context", -1, "a whole number >= 0"),
    ("seed", -1, "a whole number in [0, 2**32)"),
  ],
  ids=lambda x: str(x) if isinstance(x, str) else None,
)
def test_field_by_itself(path, field, value, right):
  config = tiny.config(path).copy_and_resolve_references()
  group, _, name = field.rpartition(".")
  with config.unlocked(), config.ignore_type():
    (config[group] if group else config)[name] = value
  problems = validate.validate(config)
  assert len(problems) == 1, problems
  assert problems[0].startswith(f"config.{field}={value!r}: must be ")
  assert right in problems[0]


@pytest.mark.parametrize(
  ("groups", "message"),
  [
    (
      dict(model=dict(num_layers=3, attention_layers=("local", "column"))),
      "config.model.num_layers=3: must be a multiple of 2, the length of attention_layers",
    ),
    (dict(model=dict(num_heads=3)), "config.model.num_heads=3: must divide width = 16"),
    (
      dict(model=dict(qk_ratio=0.3)),
      "config.model.num_heads=2: must divide qk_ratio * width = 4.8",
    ),
    (
      dict(model=dict(position_shape=(3, 8))),
      "config.model.position_shape=(3, 8): must have a product of at least seq_len=32",
    ),
    (dict(model=dict(summary_width=5)), "config.model.summary_width=5, sub_blocks=2"),
    (
      dict(model=dict(compute_dtype="float16")),
      "config.optim.loss_scale='none': must be 'dynamic' with float16",
    ),
    (dict(eval=dict(min_context=32)), "config.eval.min_context=32: must be less than"),
    (
      dict(train=dict(accumulation=3)),
      "config.data.batch_size=4: must be a multiple of 3 = train.accumulation 3 x 1 devices on",
    ),
    (dict(mesh=dict(data=-1)), "config.data.batch_size=4: must be a multiple of 8"),
    (
      dict(mesh=dict(tensor=2)),
      "config.mesh.tensor=2: must divide num_heads=2 / 2 patterns",
    ),
    (
      dict(mesh=dict(sequence=8)),
      "config.mesh.sequence=8: must divide the 4 rows of 8 tokens",
    ),
    (
      dict(mesh=dict(sequence=2), model=dict(attention_layers=("dense",))),
      "config.mesh.sequence=2: must be 1 for Dense(causal=True), which would gather",
    ),
    (dict(mesh=dict(data=16)), "config.mesh={'data': 16, 'fsdp': 1, "),
    (
      dict(model=dict(qk_ratio=1e9)),
      "config.model.width=16: 544,000,",
    ),
    (dict(data=dict(path="/no/where")), "config.data.path='/no/where': "),
    (dict(data=dict(name="enwik9")), "config.data.name='enwik9' must be one of "),
  ],
  ids=lambda x: x.partition(":")[0] if isinstance(x, str) else "",
)
def test_fields_that_do_not_go_together(path, groups, message):
  problems = validate.validate(tiny.config(path, **groups))
  assert len(problems) >= 1 and problems[0].startswith(message), problems


def test_all_problems_at_once(path):
  config = tiny.config(
    path,
    model=dict(stride=0),
    train=dict(steps=-5),
    data=dict(path="/no/where"),
    optim=dict(clip_norm=-1.0),
  )
  fields = [problem.partition("=")[0] for problem in validate.validate(config)]
  assert fields == [
    "config.model.stride",
    "config.train.steps",
    "config.optim.clip_norm",
    "config.data.path",
  ]


def test_missing_and_unknown_fields(path):
  config = tiny.config(path).copy_and_resolve_references()
  with config.unlocked():
    del config.model.width
    config.optim.lerning_rate = 1.0
  problems = validate.validate(config)
  assert "config.model.width: is missing; must be a whole number >= 1" in problems
  hint = "there is no such field; did you mean config.optim.learning_rate?"
  assert f"config.optim.lerning_rate=1.0: {hint}" in problems
