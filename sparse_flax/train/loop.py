"""The training loop around the pure step of `step.py`."""

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import multihost_utils
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Key

from pallas_kernels import api
from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import model as model_lib
from sparse_flax import run
from sparse_flax.model import levels
from sparse_flax.parallel import sharding
from sparse_flax.train import boards
from sparse_flax.train import flops
from sparse_flax.train import initial
from sparse_flax.train import metrics
from sparse_flax.train import optim
from sparse_flax.train import profile as profile_lib
from sparse_flax.train import step as step_lib
from sparse_flax.train import watchdog

# So many times longer than a step compiling, evaluating and saving may take for the watchdog.
_PATIENCE = 4.0
_OTHER_MASKS = "other masks from here on than those of the version that saved step"


class Evaluation(NamedTuple):
  """What `train` tells `on_evaluation`.

  Attributes:
    config: of the run.
    step: how many are done.
    params: the averaged weights, or with train.ema_decay=0 the weights, as they lie on the devices;
      those of training, not to be donated.
    validation: the split.
    say: takes the lines that a person shall read.
    on_progress: to be called now and then by what takes minutes; its arguments say nothing.
  """

  config: ml_collections.ConfigDict
  step: int
  params: dict
  validation: data.Dataset
  say: Callable[[str], None]
  on_progress: Callable[..., None]


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  datasets: Mapping[str, data.Dataset | Iterable] | None = None,
  init_from: str | os.PathLike | None = None,
  say: Callable[[str], None] = print,
  stop: Callable[[], bool] = lambda: False,
  around_loop: contextlib.AbstractContextManager | None = None,
  on_evaluation: Callable[[Evaluation], boards.Shown] | None = None,
  wandb: str | None = None,
  watched: watchdog.Watchdog | None = None,
  profile: range = range(0),
) -> dict:
  """Trains as `config` says; picks up again if `workdir` holds a checkpoint.

  Of many processes each makes the same call; the first one writes and says what is to be read.

  Args:
    config: of a file in configs.
    workdir: the run's folder, made when it is not there; for many hosts one that all can reach.
    datasets: "train" and "validation" instead of what `config.data` names: arrays of bytes or what
      gives one after the other, as `data.of_arrays` takes them, or what that returns. To go on,
      the same are needed again.
    init_from: the folder of an export, or of a run, whose averaged weights are the first ones here;
      the rest of the state is that of any new run. To go on it may be left out, and is not read.
    say: takes the lines that a person shall read.
    stop: whether to save and end after this step; with many processes their preemption service
      is asked instead.
    around_loop: entered when the data are prepared, left when everything is saved.
    on_evaluation: makes what TensorBoard shows beside the numbers, after each evaluation and when
      the step is saved; `sample.pictures.Drawer()`, for example. Every process calls it.
    wandb: a project of Weights & Biases that gets what TensorBoard gets; None sends nothing.
    watched: gets a beat for every step.
    profile: steps, counted from 1, that are traced into the folder's `profile/`; those that were
      done before are left out.

  Returns:
    The last evaluation on the validation split, as `evaluate.evaluate` gives it.

  Raises:
    ValueError: a mistake in the config, other data, or the folder of another run; nothing has
      been written then.
    extras.MissingExtraError: of `wandb`; likewise.
    run.Preempted: the run was stopped and saved.
    run.NonFiniteError: the loss or a weight is not finite; such weights are never saved.
    run.StorageError: a disk or a file failed; what had been saved is intact.
    run.DamagedError: there are checkpoints, but none is sound.
  """
  if datasets is not None:
    config = _without_path(config)
  config = run.checked(config)
  profile_lib.check(profile, config.train.steps)
  boards.check_wandb(wandb)
  chex.clear_trace_counter()  # of an earlier run in this process
  leads, several = jax.process_index() == 0, jax.process_count() > 1
  say = say if leads else lambda line: None
  watched = watched or watchdog.Watchdog()

  # --------------------------------------------------------------------- Data
  done = run.latest_step(workdir)
  check = functools.partial(run.check, workdir, config, done=done, init_from=init_from)
  check()  # before data are prepared for it
  splits = _splits(config, datasets)
  identity = {split: dataset.identity for split, dataset in splits.items()}
  check(data=identity)
  seq_len, batch_size = config.model.seq_len, config.data.batch_size
  batch_at = data.make_batches(
    splits["train"],
    seq_len=seq_len,
    batch_size=batch_size,
    seed=config.seed,
    mirror=config.data.mirror,
  )

  # ------------------------------------------------------ Model and optimizer
  steps = config.train.steps
  mesh = sharding.make_mesh(**config.mesh)
  program = _trace(config, workdir, mesh)  # before anything is written
  planned = run.planned_steps(workdir)
  weights = record = None  # of a run that does not begin with random ones
  if done is None:
    where = dict(shapes=program.shapes["params"], mesh=mesh)
    weights, record = _initial(init_from, workdir, config, **where, say=say)
  if leads:
    run.start(workdir, config, data=identity, init=record)
  if several:  # no process may look for what the first one has not written
    multihost_utils.sync_global_devices("the folder is there")
    check(data=identity)  # what the first one has written
  with contextlib.ExitStack() as stack:
    stack.enter_context(around_loop or contextlib.nullcontext())
    stack.enter_context(_no_mistake_of_the_caller(workdir))
    stack.enter_context(jax.set_mesh(mesh))
    stack.enter_context(watched)
    watched.beat(patience=_PATIENCE)
    checkpoints = stack.enter_context(
      run.Checkpoints(workdir, keep_every=config.train.keep_every, say=say)
    )
    newest = checkpoints.restore_newest(program.shapes)
    first = newest[1] if newest else 0
    say(f"RESUMING {workdir} at step {first:,}" if newest else f"FRESH RUN in {workdir}")
    for line in _differences(config, workdir, checkpoints, newest, planned=planned):
      say(line)
    say(_banner(config, workdir, params=program.shapes["params"], splits=splits, mesh=mesh))
    state = newest[0] if newest else program.first_state(weights)
    if weights is not None:  # from here on nobody needs the other run or export
      stop_if_not_finite(state, saved=first)
      checkpoints.save(state)

    # ------------------------------------------------------------------- Loop
    writer = None
    if leads:
      board = boards.WandB(wandb, workdir, config=config, say=say) if wandb else None
      writer = stack.enter_context(metrics.Writer(workdir, step=first, wandb=board))
    beat = lambda *_: watched.beat(patience=_PATIENCE)
    evaluator = _Evaluator(config, splits["validation"], mesh=mesh, say=say, beat=beat)
    progress = _progress(config, writer, mesh=mesh, say=say)
    profiler = stack.enter_context(
      profile_lib.Profiler(workdir, profile, first=first, pause=progress.pause, say=say)
    )
    records, saved = _Records(progress, config.train.max_skipped), first

    def batch(step: int):
      read = lambda rows: batch_at(step, rows)
      return sharding.place(read, sharding.by_batch(mesh), (batch_size, seq_len))

    stages = config.model.learned_stages
    stage_of = lambda step: model_lib.stage_at(stages, step - 1)
    result = None
    reader = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    upcoming = reader.submit(batch, first)
    if first == steps:
      say("nothing left to train")
    for step in range(first + 1, steps + 1):  # step: how many are done when this one is
      tokens = upcoming.result()
      if step < steps:
        upcoming = reader.submit(batch, step)
      if step == first + 1:
        say(_what_computes(program))
      switches = step > first + 1 and stage_of(step) != stage_of(step - 1)
      if stages and (switches or step == first + 1):
        say(f"  {'stage':<11}{_told_stage(stage_of(step))} from step {step:,} on")
      if switches or step == first + 1:
        say("compiling ...")
      if switches:  # what is compiled now takes no time of steps
        records.settle(leave=0, saved=saved)
      with (
        progress.pause() if switches else contextlib.nullcontext(),
        profiler.step(step, settle=lambda: records.settle(leave=0, saved=saved)),
      ):
        how = dict(stage=stage_of(step)) if stages else {}
        state, record = program.step(state, tokens, program.dropout_key, **how)
        records.add(step, record)
      records.settle(leave=1, saved=saved)  # the device is already at work on this step
      compiles = step == first + 1 or stage_of(step + 1) != stage_of(step)
      watched.beat(patience=_PATIENCE if compiles else 1.0)
      # All processes have to come to the same answer.
      stop_now = checkpoints.reached_preemption(step) if several else stop()
      evaluate_now, save_now = (
        step == steps or step % config.train[f"{what}_every"] == 0 for what in ("eval", "save")
      )
      if evaluate_now or save_now or stop_now:
        records.settle(leave=0, saved=saved)
        watched.beat(patience=_PATIENCE)
        with progress.pause():
          result = None
          if evaluate_now:
            result = evaluator.score(step_lib.scored(state), step)
            progress.evaluated(result)
          # While updates are skipped, the step to come back to is one before that began.
          if (save_now or stop_now) and (step == steps or not progress.skipped_in_a_row):
            stop_if_not_finite(state, saved=saved)
            checkpoints.save(state, bits_per_byte=result["bits_per_byte"] if result else None)
            saved = step
        if stop_now and step < steps:
          checkpoints.wait()
          on_disk = f"saved is step {saved:,}" if saved else "nothing is saved yet"
          raise run.Preempted(f"STOPPED at step {step:,}, {on_disk}")
        if evaluate_now and on_evaluation:
          beat()
          with progress.pause():
            shown = on_evaluation(evaluator.told(step_lib.scored(state), step))
          if writer:
            writer.show(step, shown)
        watched.beat()
    if result is None:  # nothing was left to train
      result = evaluator.score(step_lib.scored(state), steps)
    watched.beat(patience=_PATIENCE)  # the last save
    return result


def _without_path(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Its data are what a program gives."""
  config = ml_collections.ConfigDict(config.to_dict())
  config.data.update(name=data.ARRAYS, path="")
  return config


def _splits(config: ml_collections.ConfigDict, datasets: Mapping | None) -> dict[str, data.Dataset]:
  """What training needs: those that were given, or else those that the config names."""
  names = "train", "validation"
  if datasets is None:
    return {split: evaluate.open_dataset(config, split) for split in names}
  opened = {}
  for split in names:
    if split not in datasets:
      raise ValueError(f"datasets has {', '.join(map(repr, datasets))}: {split!r} is missing")
    given = datasets[split]
    if not isinstance(given, data.Dataset):
      given = data.of_arrays(given, split=split, modality=config.model.modality)
    opened[split] = evaluate.checked(given, config)
  return opened


def _initial(
  init_from: str | os.PathLike | None,
  workdir: str,
  config: ml_collections.ConfigDict,
  *,
  shapes: dict,
  mesh: jax.sharding.Mesh,
  say: Callable[[str], None],
) -> tuple[dict | None, dict | None]:
  """The weights that a run without a checkpoint begins with, and their record; None: random."""
  recorded = run.begun_from(workdir)
  init_from = init_from if init_from is not None or not recorded else recorded["from"]
  if init_from is None:
    return None, None
  return initial.load(init_from, config, shapes=shapes, mesh=mesh, recorded=recorded, say=say)


def _differences(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoints: run.Checkpoints,
  newest: tuple[dict, int] | None,
  *,
  planned: int | None,
) -> Iterator[str]:
  """Lines of what is not as in a run that begins with random weights and ends as planned."""
  if begun := run.begun_from(workdir):
    yield f"  {'begun':<11}{run.told(begun)}"
  if newest is None:
    return
  state, first = newest
  if not checkpoints.same_dropout(first, config.model.dropout, config.model.embed_dropout):
    yield f"  {'dropout':<11}{_OTHER_MASKS} {first:,}"
  if planned is not None and planned != config.train.steps:
    yield f"  {'extended':<11}{_extended(config, planned, state)}"


def _told_stage(stage: int | str | None) -> str:
  """For the log: what layers that choose read in a stage."""
  return "all blocks" if stage == "dense" else f"{stage} blocks of keys for each list"


def _extended(config: ml_collections.ConfigDict, planned: int, state: dict) -> str:
  """What more steps than were planned make of the learning rate of the next one."""
  before = ml_collections.ConfigDict(config.to_dict())
  before.train.steps = planned
  update = int(optim.updates_done(state["opt"]))  # what follows each process computes by itself
  rates = [float(step_lib.optimizer_of(x)[1](update)) for x in (before, config)]
  steps = f"from {planned:,} to {config.train.steps:,} steps"
  return f"{steps}; the learning rate goes from {rates[0]:.3g} to {rates[1]:.3g}"


def _what_computes(program: "_Program") -> str:
  """The line of the log for it."""
  parts = ((of, api.implementations_in(program.jaxpr, of)) for of in ("attention", "blocks"))
  by_part = [f"{of} by {', '.join(names)}" for of, names in parts if names]
  kept = f"remat {model_lib.level_in(program.jaxpr)}"
  return f"  {'computed':<11}{', '.join((*by_part, kept))}"


def _progress(
  config: ml_collections.ConfigDict,
  writer: metrics.Writer | None,
  *,
  mesh: jax.sharding.Mesh,
  say: Callable[[str], None],
) -> metrics.Progress:
  batch_size = config.data.batch_size
  peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
  step_flops = flops.train_flops(config.model, batch_size=batch_size)
  return metrics.Progress(
    writer,
    steps=config.train.steps,
    log_every=config.train.log_every,
    unit=metrics.UNIT[config.model.modality],
    tokens_per_step=batch_size * config.model.seq_len,
    peak_seconds=peak and step_flops / (peak * mesh.size),
    say=say,
  )


class _Evaluator:
  """Scores the validation split while a run trains, and tells others of it."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    *,
    mesh: jax.sharding.Mesh,
    say: Callable[[str], None],
    beat: Callable[..., None],
  ):
    self._evaluator = evaluate.Evaluator(config, dataset, min_context=0, mesh=mesh)
    self._config, self._dataset, self._say, self._beat = config, dataset, say, beat

  def score(self, params: dict, step: int) -> dict:
    """As `evaluate.evaluate` gives it, of as much of the split as training looks at."""
    most = self._config.eval.monitor_batches or None
    return self._evaluator(params, step=step, max_batches=most, on_progress=self._beat)

  def told(self, params: dict, step: int) -> Evaluation:
    """For `on_evaluation`."""
    return Evaluation(self._config, step, params, self._dataset, self._say, self._beat)


class _Records:
  """Metrics of steps that were started; they are fetched when it does not hold up the device."""

  def __init__(self, progress: metrics.Progress, max_skipped: int):
    self.progress, self.max_skipped = progress, max_skipped
    self.waiting = collections.deque()

  def add(self, step: int, record: dict[str, Array]) -> None:
    self.waiting.append((step, record))

  def settle(self, *, leave: int, saved: int) -> None:
    """Fetches metrics until those of `leave` steps are waiting.

    Raises:
      run.NonFiniteError: too many updates in a row were skipped; `saved` is the newest
        checkpoint.
    """
    while len(self.waiting) > leave:
      step, record = self.waiting.popleft()
      record = {name: float(value) for name, value in jax.device_get(record).items()}
      self.progress.add(step, record)
      if (skipped := self.progress.skipped_in_a_row) >= self.max_skipped:
        raise _hopeless(step, record, skipped=skipped, saved=saved)


class _Program(NamedTuple):
  """What a run computes, traced but not compiled.

  Attributes:
    step: (state, tokens, dropout_key) -> (state, record), jitted; gives up its state. Of a run with
      stages it also takes `stage`, and is a program for each.
    first_state: (weights or None) -> the state before the first step, with these or random ones.
    shapes: of the state, with its shardings.
    dropout_key: for every step, which folds its number in.
    jaxpr: of the step, in the first stage.
  """

  step: Callable
  first_state: Callable[[dict | None], dict]
  shapes: dict
  dropout_key: Key[Array, ""]
  jaxpr: Any


def _trace(config: ml_collections.ConfigDict, workdir: str, mesh: jax.sharding.Mesh) -> _Program:
  """The program of a run; ValueError where the implementation cannot compute its model."""
  init, one_step = step_lib.make_step(config)
  init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
  shapes = jax.eval_shape(init, init_key)
  layout = sharding.by_rules(shapes, mesh)
  shapes = run.laid_out(shapes, layout)
  stages = list(dict.fromkeys(stage for _, stage in config.model.learned_stages))
  step = chex.assert_max_traces(one_step, n=max(1, len(stages)))
  step = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(layout, sharding.replicated(mesh)),
    compiler_options=step_lib.compiler_options(mesh),
    static_argnames="stage",
  )
  size = (config.data.batch_size, config.model.seq_len)
  tokens = jax.ShapeDtypeStruct(size, jnp.uint8, sharding=sharding.by_batch(mesh))
  try:
    with _no_mistake_of_the_caller(workdir), jax.set_mesh(mesh):
      given = shapes, tokens, dropout_key
      traced = [step.trace(*given, **how) for how in ([dict(stage=x) for x in stages] or [{}])]
  except NotImplementedError as error:
    raise ValueError(
      f"config.model.implementation={config.model.implementation!r}: {error}"
    ) from error

  def begin(weights: dict) -> dict:
    params = jax.tree.map(lambda x, own: x.astype(own.dtype), weights, shapes["params"])
    tx, _ = step_lib.optimizer_of(config)
    how = dict(loss_scale=config.optim.loss_scale, ema_decay=config.train.ema_decay)
    return step_lib.state_of(params, tx=tx, **how)

  def first_state(weights: dict | None) -> dict:
    if weights is None:
      return jax.jit(init, out_shardings=layout)(init_key)
    return jax.jit(begin, out_shardings=layout)(weights)

  return _Program(step, first_state, shapes, dropout_key, traced[0].jaxpr)


@contextlib.contextmanager
def _no_mistake_of_the_caller(workdir: str) -> Iterator[None]:
  """From here on what fails is a disk, or a bug."""
  try:
    yield
  except run.StorageError:
    raise
  except OSError as error:
    raise run.StorageError(
      f"{error.filename or workdir}: {error.strerror or error}; the same command goes on from the "
      "last checkpoint when that is mended"
    ) from error
  except ValueError as error:
    raise RuntimeError(f"{workdir}: the run ended by an error") from error


def _hopeless(
  step: int, record: dict[str, float], *, skipped: int, saved: int
) -> run.NonFiniteError:
  return run.NonFiniteError(
    f"step {step:,}: loss {record['loss']}, norm of the gradient {record['grad_norm']}, learning "
    f"rate {record['learning_rate']:.3g}; {skipped} updates in a row were skipped. Nothing of this "
    f"has been saved. {_way_on(saved).capitalize()}. If it ends here again, another --workdir with "
    "a lower config.optim.learning_rate, a longer warmup_steps or compute_dtype='float32' may help."
  )


def _way_on(saved: int) -> str:
  step = f"step {saved:,}, the last good checkpoint" if saved else "the beginning: none was saved"
  return f"the same command goes on from {step}"


@jax.jit
def _all_finite(state: dict) -> Bool[Array, ""]:
  leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def stop_if_not_finite(state: dict, *, saved: int) -> None:
  """Raises NonFiniteError if a weight or moment is no number; `saved` is the newest checkpoint."""
  if not _all_finite(state):
    raise run.NonFiniteError(
      f"step {int(state['step']):,}: a weight or a moment is not finite; not saved. "
      f"{_way_on(saved).capitalize()}."
    )


def _banner(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  params: dict,
  splits: dict[str, data.Dataset],
  mesh: jax.sharding.Mesh,
) -> str:
  """What is about to run, on what, and where its files go."""
  model, size = config.model, config.data.batch_size
  step_flops = flops.train_flops(model, batch_size=size)
  axes = " x ".join(f"{name} {length}" for name, length in mesh.shape.items() if length > 1)
  layers = ", ".join(map(str, model.attention_layers))
  found = levels.specs_of(**model)
  shape = f"{model.num_layers} layers of width {model.width}, attention {layers}"
  shape = shape if len(found) == 1 else f"{len(found)} levels"
  lines = {
    "model": f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters, "
    f"{shape}, {model.compute_dtype}",
    **_by_level(model, found),
    "step": f"{size * model.seq_len:,} tokens ({size} sequences of {model.seq_len:,}), "
    f"{metrics.short(step_flops)} FLOP",
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh {axes or 'of one'}",
    **{
      split: f"{dataset.name} {dataset.identity['version']}, {dataset.num_bytes:,} bytes, "
      f"{dataset.identity['digest'][:19]}"
      for split, dataset in splits.items()
    },
    "data": "; ".join(dict.fromkeys(dataset.remark for dataset in splits.values())),
    "files": f"{workdir}: metrics.jsonl, tensorboard/, checkpoints/",
  }
  return "\n".join(f"  {name:<11}{text}" for name, text in lines.items())


def _by_level(model: ml_collections.ConfigDict, found: Sequence[levels.Spec]) -> dict[str, str]:
  """A line for each level of a model that has several."""
  lines, total = {}, flops.forward_flops(model)
  for n, (level, cost) in enumerate(zip(found, flops.level_flops(model), strict=True)):
    layers = f"{level.num_layers} + {level.num_layers_after}" if n + 1 < len(found) else level.depth
    lines[f"level {n}"] = (
      f"{layers} layers of width {level.width}, {level.factor} "
      f"{'token' if level.factor == 1 else 'tokens'} a row, attention "
      f"{', '.join(map(str, level.attention_layers))}, {cost / total:.0%} of the FLOP"
    )
  return lines if len(found) > 1 else {}
