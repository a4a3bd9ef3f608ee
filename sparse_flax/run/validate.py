"""Every mistake in a config at once, each as `config.group.field=value: what would be right`."""

import copy
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from pallas_kernels import api
from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax.model import learned
from sparse_flax.model import levels
from sparse_flax.model import order
from sparse_flax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Rule:
  """What one field may hold."""

  kinds: tuple[type, ...]
  holds: Callable[[Any], bool]
  right: str  # completes "must be ..."


def _whole(least: int) -> Rule:
  return Rule((int,), lambda x: x >= least, f"a whole number >= {least}")


def _number(test: Callable[[float], bool], right: str) -> Rule:
  return Rule((int, float), lambda x: math.isfinite(x) and test(x), right)


def _one_of(*choices: str | None) -> Rule:
  return Rule((str, type(None)), lambda x: x in choices, "one of " + ", ".join(map(repr, choices)))


_POSITIVE = _number(lambda x: x > 0, "a finite number > 0")
_RATE = _number(lambda x: 0 <= x < 1, "a number in [0, 1)")
_NOT_NEGATIVE = _number(lambda x: x >= 0, "a finite number >= 0")
_TEXT = Rule((str,), lambda x: True, "text")


def _is_cycle(layers: Any) -> bool:
  entries = [(x,) if isinstance(x, str) else x for x in layers if x not in model_lib.LEARNED_NAMES]
  if not entries:
    return bool(layers)
  return bool(entries) and all(
    isinstance(x, tuple | list) and x and all(name in model_lib.PATTERN_NAMES for name in x)
    for x in entries
  )


def _are_rows(shape: Any) -> bool:
  return bool(shape) and all(isinstance(x, int) and x >= 1 for x in shape)


_RULES = {
  "seed": Rule((int,), lambda x: 0 <= x < 2**32, "a whole number in [0, 2**32)"),
  "model.modality": _one_of(*model_lib.MODALITIES),
  "model.seq_len": _whole(1),
  "model.width": _whole(1),
  "model.num_layers": Rule((int,), lambda x: x >= 0, "a whole number >= 1, or 0 around an inner"),
  "model.num_layers_after": _whole(0),
  "model.num_heads": _whole(1),
  "model.ff_mult": _POSITIVE,
  "model.activation": _one_of(*model_lib.ACTIVATIONS),
  "model.qk_ratio": _POSITIVE,
  "model.attention_layers": Rule(
    (tuple, list),
    _is_cycle,
    "a tuple of names, or of tuples of names, from "
    + ", ".join(model_lib.PATTERN_NAMES)
    + "; or of "
    + ", ".join(model_lib.LEARNED_NAMES)
    + ", each a whole layer",
  ),
  "model.stride": _whole(1),
  "model.summary_width": _whole(0),
  "model.sub_blocks": _whole(1),
  "model.position_shape": Rule((tuple, list), _are_rows, "a tuple of whole numbers >= 1"),
  "model.dropout": _RATE,
  "model.embed_dropout": _RATE,
  "model.init_scheme": _one_of(*model_lib.INIT_SCHEMES),
  "model.rope": _one_of(*model_lib.ROPES),
  "model.qk_norm": Rule((bool,), lambda x: True, "True or False"),
  "model.learned.block_size": _whole(1),
  "model.learned.top": _whole(1),
  "model.learned.query_block": _whole(1),
  "model.learned.first": _whole(0),
  "model.learned.local": _whole(1),
  "model.learned.lists": _one_of(*learned.LISTS),
  "model.learned.window": _whole(1),
  "model.learned.index_size": _whole(1),
  "model.learned.index_heads": _whole(0),
  "model.learned.key_conv": Rule((int,), lambda x: x in learned.KEY_CONVS, "0, 3 or 5"),
  "model.learned_stages": Rule(
    (tuple, list),
    lambda x: all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in x),
    "a tuple of pairs (step, 'dense' or a number of blocks), () for none",
  ),
  "model.order": _one_of(*order.ORDERS),
  "model.patch": _whole(1),
  "model.inner": Rule((dict,), lambda x: True, "{}, or the fields of a level"),
  "model.remat": _one_of(*model_lib.REMATS),
  "model.compute_dtype": _one_of(*model_lib.COMPUTE_DTYPES),
  "model.param_dtype": _one_of(*model_lib.PARAM_DTYPES),
  "model.implementation": _one_of(None, *api.IMPLEMENTATIONS),
  "data.name": _TEXT,
  "data.path": _TEXT,
  "data.batch_size": _whole(1),
  "data.split_seed": _whole(0),
  "data.field": _TEXT,
  "data.skip_damaged": Rule((bool,), lambda x: True, "True or False"),
  "data.mirror": Rule((bool,), lambda x: True, "True or False"),
  "data.recall.records": _whole(0),
  "data.recall.key": Rule((int,), lambda x: 1 <= x <= 8, "a whole number from 1 to 8"),
  "data.recall.delay": _whole(0),
  "train.steps": _whole(1),
  "train.log_every": _whole(1),
  "train.eval_every": _whole(1),
  "train.save_every": _whole(1),
  "train.keep_every": _whole(0),
  "train.max_skipped": _whole(1),
  "train.accumulation": _whole(1),
  "train.ema_decay": _RATE,
  "optim.name": _one_of("adam", "muon"),
  "optim.learning_rate": _POSITIVE,
  "optim.schedule": _one_of("cosine", "linear"),
  "optim.warmup_steps": _whole(0),
  "optim.b1": _RATE,
  "optim.b2": _RATE,
  "optim.eps": _POSITIVE,
  "optim.weight_decay": _NOT_NEGATIVE,
  "optim.clip_norm": _POSITIVE,
  "optim.final_lr_ratio": _number(lambda x: 0 <= x <= 1, "a number in [0, 1]"),
  "optim.momentum": _RATE,
  "optim.muon_ratio": _POSITIVE,
  "optim.momentum_dtype": _one_of("float32", "bfloat16"),
  "optim.index_loss": _NOT_NEGATIVE,
  "optim.loss_scale": _one_of("none", "dynamic"),
  "mesh.data": Rule((int,), lambda x: x == -1 or x >= 1, "-1 (all devices) or a number >= 1"),
  "mesh.fsdp": _whole(1),
  "mesh.tensor": _whole(1),
  "mesh.sequence": _whole(1),
  "eval.min_context": _whole(0),
  "eval.monitor_batches": _whole(0),
  "eval.pictures": _whole(0),
}

# Fields that configs did not always have, each with the value that says what every run did before:
# {"train.example": 0}. A config without such a field is read as if it had that value, so that older
# runs, exports and config files go on. A new field gets a line here in the commit that adds it to
# _RULES, and that value never changes.
ADDED: dict[str, Any] = {
  "data.field": "text",
  "data.skip_damaged": False,
  "data.mirror": False,
  "model.rope": "none",
  "model.qk_norm": False,
  "eval.pictures": 0,
  "model.activation": "quick_gelu",
  "optim.name": "adam",
  "optim.schedule": "cosine",
  "optim.momentum": 0.95,
  "optim.muon_ratio": 1.0,
  "optim.momentum_dtype": "float32",
  "model.learned.block_size": 128,
  "model.learned.top": 16,
  "model.learned.query_block": 16,
  "model.learned.first": 1,
  "model.learned.local": 1,
  "model.learned.lists": "group",
  "model.learned.window": 512,
  "model.learned.index_size": 64,
  "model.learned.index_heads": 0,
  "model.learned.key_conv": 0,
  "model.learned_stages": (),
  "optim.index_loss": 1.0,
  "data.recall.records": 0,
  "data.recall.key": 1,
  "data.recall.delay": 0,
  "model.num_layers_after": 0,
  "model.inner": {},
  "model.order": "raster",
  "model.patch": 2,
}

# The fields of an inner level beside those that it shares with the outermost one.
_LEVEL_RULES = {
  "shorten": Rule(
    (int,),
    lambda x: x in levels.FACTORS,
    f"a whole number from {levels.FACTORS[0]} to {levels.FACTORS[-1]}",
  ),
  "pool": _one_of(*levels.POOLS),
  "up": _one_of(*levels.UPS),
  "positions": Rule((bool,), lambda x: True, "True or False"),
}
# A dict that is one value of a config, and not a group.
_WHOLE = ("model.inner",)


def fields() -> list[str]:
  """The names of all fields, "group.field"."""
  return [*_RULES, *(f"model.inner.{name}" for name in _LEVEL_RULES)]


def right(field: str) -> str:
  """What a field may hold, in words."""
  inside = field.removeprefix("model.inner.")
  return (_LEVEL_RULES[inside] if inside != field else _RULES[field]).right


def completed(values: dict) -> dict:
  """The values of a config, with those of ADDED for fields that it does not have."""
  there = by_field(values)
  values = copy.deepcopy(values)
  for field, value in ADDED.items():
    *groups, name = field.split(".")
    inside: Any = values
    for group in groups:
      inside = inside.setdefault(group, {}) if isinstance(inside, dict) else None
    if field not in there and isinstance(inside, dict):
      inside[name] = dict(value) if isinstance(value, dict) else value
  return values


def checked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config to train with: completed, and locked.

  Raises:
    ValueError: a line for each problem that `validate` finds.
  """
  config = ml_collections.ConfigDict(completed(config.to_dict())).lock()
  if problems := validate(config):
    raise ValueError("\n".join(problems))
  return config


def validate(config: ml_collections.ConfigDict) -> list[str]:
  """All problems that would stop a training run on this machine; an empty list means none.

  Reads what it must of the data's folder, builds the model without memory, and writes nothing.
  """
  problems = validate_fields(config)
  groups = "config.mesh", "config.data", "config.train", "config.model"
  if not any(
    x.startswith((*groups, "config.optim.name", "config.optim.momentum_dtype")) for x in problems
  ):
    problems += _check_mesh(config) or _check_memory(config)
  given = config.data.name == data.ARRAYS  # by a program: there is no path
  if not given and not any(x.startswith(("config.data", "config.model.seq_len")) for x in problems):
    problems += [
      "config." + problem.removeprefix("config.")
      for problem in data.check(
        config.data.name,
        path=config.data.path,
        seq_len=config.model.seq_len,
        recall=config.data.recall.to_dict(),
      )
    ]
  return problems


def validate_fields(config: ml_collections.ConfigDict) -> list[str]:
  """All problems that no machine and no data can mend: what a run's own config is checked for."""
  values = by_field(config.to_dict())
  problems = []
  for name in values.keys() - _RULES.keys():
    close = difflib.get_close_matches(name, _RULES, n=1)
    hint = f"; did you mean config.{close[0]}?" if close else ""
    problems.append(f"config.{name}={values[name]!r}: there is no such field{hint}")
  for name, rule in _RULES.items():
    if name not in values:
      problems.append(f"config.{name}: is missing; must be {rule.right}")
    elif not _obeys(values[name], rule):
      problems.append(f"config.{name}={values[name]!r}: must be {rule.right}")
    elif name == "model.inner":
      problems += _check_level(values[name], name)
  sound = lambda *names: not any(x.startswith(names) for x in problems)
  if sound("config.model", "config.optim.loss_scale", "config.eval.min_context"):
    problems += _check_numerics(config)
  mirrored = sound("config.model", "config.data.mirror") and config.data.mirror
  if mirrored and config.model.modality != "image":
    problems.append("config.data.mirror=True: must be False where the data are no images")
  if sound("config.model"):
    problems += _check_model(config)
  return problems


def _check_level(level: dict, name: str) -> list[str]:
  """Each field of an inner level by itself; {} is none."""
  problems = []
  for field in level:
    if field not in levels.FIELDS:
      close = difflib.get_close_matches(field, levels.FIELDS, n=1)
      hint = f"; did you mean config.{name}.{close[0]}?" if close else ""
      problems.append(f"config.{name}.{field}={level[field]!r}: there is no such field{hint}")
      continue
    rule = _LEVEL_RULES.get(field) or _RULES[f"model.{field}"]
    if not _obeys(level[field], rule):
      problems.append(f"config.{name}.{field}={level[field]!r}: must be {rule.right}")
    elif field == "inner":
      problems += _check_level(level[field], f"{name}.inner")
  for field in levels.REQUIRED if level else ():
    if field not in level:
      right = (_LEVEL_RULES.get(field) or _RULES[f"model.{field}"]).right
      problems.append(f"config.{name}.{field}: is missing; must be {right}")
  return problems


def _obeys(value: Any, rule: Rule) -> bool:
  # True is an int to Python.
  is_kind = isinstance(value, rule.kinds) and isinstance(value, bool) == (rule.kinds == (bool,))
  return is_kind and rule.holds(value)


def _check_numerics(config: ml_collections.ConfigDict) -> list[str]:
  problems = []
  if config.model.compute_dtype == "float16" and config.optim.loss_scale == "none":
    problems.append("config.optim.loss_scale='none': must be 'dynamic' with float16")
  if config.eval.min_context >= config.model.seq_len:
    problems.append(
      f"config.eval.min_context={config.eval.min_context}: must be less than "
      f"config.model.seq_len={config.model.seq_len}"
    )
  return problems


def _check_model(config: ml_collections.ConfigDict) -> list[str]:
  """What the model itself refuses, and before that what can be told without building it."""
  model = config.model
  problems = []
  if model.num_layers < 1 and not model.inner:
    problems.append(f"config.model.num_layers={model.num_layers}: must be a whole number >= 1")
  if model.num_layers % len(model.attention_layers):
    problems.append(
      f"config.model.num_layers={model.num_layers}: must be a multiple of "
      f"{len(model.attention_layers)}, the length of attention_layers"
    )
  for name, width in (("width", model.width), ("qk_ratio * width", model.qk_ratio * model.width)):
    if width % model.num_heads:
      problems.append(f"config.model.num_heads={model.num_heads}: must divide {name} = {width:g}")
  if math.prod(model.position_shape) < model.seq_len:
    problems.append(
      f"config.model.position_shape={model.position_shape}: must have a product of at least "
      f"seq_len={model.seq_len}"
    )
  if problems:
    return problems
  try:
    model_lib.graph_and_shapes(**model)
  except ValueError as error:
    text = str(error)
    problems.append(
      "config.model." + text if re.match(r"[\w.]+=", text) else f"config.model: {text}"
    )
  return problems


def _check_mesh(config: ml_collections.ConfigDict) -> list[str]:
  """The mesh has to fit the devices, and its axes divide what they shard."""
  mesh, model, there = config.mesh, config.model, jax.device_count()
  try:
    data, *_ = shape = sharding.mesh_shape(**mesh)
  except ValueError as error:
    return [str(error)]
  if jax.process_count() > 1 and math.prod(shape) != there:
    return [f"config.mesh.data={mesh.data}: must give every process a share, as -1 does"]
  problems = []
  parts, rows = config.train.accumulation, data * mesh.fsdp
  if config.data.batch_size % (parts * rows):
    problems.append(
      f"config.data.batch_size={config.data.batch_size}: must be a multiple of {parts * rows} = "
      f"train.accumulation {parts} x {rows} devices on the axes data and fsdp"
    )
  if any(model_lib.recipes_of(**model)):
    problems += [
      f"config.mesh.{axis}={mesh[axis]}: must be 1, for {reason}"
      for axis, reason in learned.WHY_NOT_SHARDED.items()
      if mesh[axis] > 1
    ]
  found = levels.specs_of(**model)
  if mesh.sequence > 1 and len(found) > 1:
    problems.append(
      f"config.mesh.sequence={mesh.sequence}: must be 1 with config.model.inner: the groups of a "
      "device would have to begin with a row of the device before"
    )
    return problems
  for level in found:
    uneven = sharding.uneven_layers(
      level.patterns,
      num_heads=level.num_heads,
      hidden=round(level.ff_mult * level.width),
      seq_len=level.length,
      tensor=mesh.tensor,
      devices=mesh.sequence,
    )
    problems += [f"{x} of {level.name}" if level.name else x for x in uneven]
  return problems


def _check_memory(config: ml_collections.ConfigDict) -> list[str]:
  """The state has to fit; what a step needs beside it is known only when it is compiled."""
  shapes = jax.tree.leaves(model_lib.graph_and_shapes(**config.model)[1])
  # In float32 gradients, averages, and squares where Adam moves matrices too.
  float32s = 1 + (config.train.ema_decay > 0) + (config.optim.name == "adam")
  kept = 4 * float32s + jax.numpy.dtype(config.optim.momentum_dtype).itemsize
  state = sum(math.prod(x.shape) * (x.dtype.itemsize + kept) for x in shapes)
  need = state // (config.mesh.fsdp * config.mesh.tensor)
  there = _device_memory()
  if there is None or need <= there:
    return []
  count = sum(math.prod(x.shape) for x in shapes)
  return [
    f"config.model.width={config.model.width}: {count:,} parameters with all that is kept for "
    f"each must fit a device's {there / 2**30:,.1f} GiB, not take {need / 2**30:,.1f} GiB"
  ]


def _device_memory() -> int | None:
  """Bytes that a device has; None where nothing tells."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return (device.memory_stats() or {}).get("bytes_limit")


def by_field(values: dict) -> dict:
  """As `flatten`, with what is one value of a config in one piece."""
  return flatten(values, whole=True)


def flatten(values: dict, prefix: str = "", *, whole: bool = False) -> dict:
  """{"model.stride": 96, ...} of {"model": {"stride": 96}, ...}."""
  flat = {}
  for name, value in values.items():
    path = prefix + name
    inner = isinstance(value, dict) and not (path in _WHOLE and (whole or not value))
    flat.update(flatten(value, f"{path}.", whole=whole) if inner else {path: value})
  return flat
