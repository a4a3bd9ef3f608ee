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

from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import model as model_lib
from sparse_flax import run
from sparse_flax.parallel import sharding
from sparse_flax.train import banner
from sparse_flax.train import boards
from sparse_flax.train import flops
from sparse_flax.train import initial
from sparse_flax.train import metrics
from sparse_flax.train import profile as profile_lib
from sparse_flax.train import step as step_lib
from sparse_flax.train import watchdog

# So many times longer than a step compiling, evaluating and saving may take for the watchdog.
_PATIENCE = 4.0


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
  leads = jax.process_index() == 0
  say = say if leads else lambda line: None
  watched = watched or watchdog.Watchdog()

  ready, weights = _prepare(config, workdir, datasets=datasets, init_from=init_from, say=say)
  program, mesh = ready.program, ready.mesh
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
    what = dict(params=program.shapes["params"], splits=ready.splits, mesh=mesh)
    for line in banner.opening(config, workdir, checkpoints, newest, planned=ready.planned, **what):
      say(line)
    state = newest[0] if newest else program.first_state(weights)
    if weights is not None:  # from here on nobody needs the other run or export
      stop_if_not_finite(state, saved=first)
      checkpoints.save(state)
      weights = None  # the state has its own: these would lie on the devices to the end
    writer = None
    if leads:
      board = boards.WandB(wandb, workdir, config=config, say=say) if wandb else None
      writer = stack.enter_context(metrics.Writer(workdir, step=first, wandb=board))
    progress = _progress(config, writer, mesh=mesh, say=say)
    evaluator = _Evaluator(
      config,
      ready.splits["validation"],
      mesh=mesh,
      progress=progress,
      writer=writer,
      on_evaluation=on_evaluation,
      say=say,
      beat=lambda *_: watched.beat(patience=_PATIENCE),
    )
    profiler = stack.enter_context(
      profile_lib.Profiler(workdir, profile, first=first, pause=progress.pause, say=say)
    )
    reader = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    return _loop(
      config,
      program,
      state,
      first=first,
      batches=_batches(config, ready.batch_at, first=first, mesh=mesh, reader=reader),
      records=_Records(progress, config.train.max_skipped, saved=first),
      evaluator=evaluator,
      checkpoints=checkpoints,
      profiler=profiler,
      # All processes have to come to the same answer.
      stops=checkpoints.reached_preemption if jax.process_count() > 1 else lambda step: stop(),
      watched=watched,
      say=say,
    )


class _Prepared(NamedTuple):
  """What a run needs, before its first state.

  Attributes:
    splits: the data by their names.
    batch_at: (step, rows) -> these rows of the batch after so many steps.
    mesh: of devices.
    program: what it computes.
    planned: `train.steps` of the command before; None: there was none.
  """

  splits: dict[str, data.Dataset]
  batch_at: Callable
  mesh: jax.sharding.Mesh
  program: "_Program"
  planned: int | None


def _prepare(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  datasets: Mapping | None,
  init_from: str | os.PathLike | None,
  say: Callable[[str], None],
) -> tuple[_Prepared, dict | None]:
  """Opens the data, traces the program, and makes the folder when nothing is wrong with them.

  Returns:
    These, and the weights that the run begins with; None: random ones, or those of a checkpoint.
  """
  done = run.latest_step(workdir)
  check = functools.partial(run.check, workdir, config, done=done, init_from=init_from)
  check()  # before data are prepared for it
  splits = _splits(config, datasets)
  identity = {split: dataset.identity for split, dataset in splits.items()}
  check(data=identity)
  batch_at = data.make_batches(
    splits["train"],
    seq_len=config.model.seq_len,
    batch_size=config.data.batch_size,
    seed=config.seed,
    mirror=config.data.mirror,
  )
  mesh = sharding.make_mesh(**config.mesh)
  program = _trace(config, workdir, mesh)  # before anything is written
  planned = run.planned_steps(workdir)
  weights = record = None
  if done is None:
    where = dict(shapes=program.shapes["params"], mesh=mesh)
    weights, record = _initial(init_from, workdir, config, **where, say=say)
  if jax.process_index() == 0:
    run.start(workdir, config, data=identity, init=record)
  if jax.process_count() > 1:  # no process may look for what the first one has not written
    multihost_utils.sync_global_devices("the folder is there")
    check(data=identity)  # what the first one has written
  return _Prepared(splits, batch_at, mesh, program, planned), weights


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


def _loop(
  config: ml_collections.ConfigDict,
  program: "_Program",
  state: dict,
  *,
  first: int,
  batches: Iterable[tuple[int, Array]],
  records: "_Records",
  evaluator: "_Evaluator",
  checkpoints: run.Checkpoints,
  profiler: profile_lib.Profiler,
  stops: Callable[[int], bool],
  watched: watchdog.Watchdog,
  say: Callable[[str], None],
) -> dict:
  """Trains from `state`, that of step `first`, to the end; the last evaluation.

  `stops` says whether to save and end after a step. Raises as `train` does.
  """
  stages, steps, progress = config.model.learned_stages, config.train.steps, records.progress
  stage_of = lambda step: model_lib.stage_at(stages, step - 1)
  result = None
  if first == steps:
    say("nothing left to train")
  for step, tokens in batches:  # step: how many are done when this one is
    begins = step == first + 1
    switches = not begins and stage_of(step) != stage_of(step - 1)
    if begins:
      say(banner.computed(program.jaxpr))
    if stages and (begins or switches):
      say(banner.stage_begins(stage_of(step), step))
    if begins or switches:
      say("compiling ...")
    if switches:  # what is compiled now takes no time of steps
      records.settle()
    with (
      progress.pause() if switches else contextlib.nullcontext(),
      profiler.step(step, settle=records.settle),
    ):
      how = dict(stage=stage_of(step)) if stages else {}
      state, record = program.step(state, tokens, program.dropout_key, **how)
      records.add(step, record)
    records.settle(leave=1)  # the device is already at work on this step
    compiles = begins or stage_of(step + 1) != stage_of(step)
    watched.beat(patience=_PATIENCE if compiles else 1.0)
    stop_now = stops(step)
    evaluate_now, save_now = (
      step == steps or step % config.train[f"{what}_every"] == 0 for what in ("eval", "save")
    )
    if evaluate_now or save_now or stop_now:
      records.settle()
      watched.beat(patience=_PATIENCE)
      with progress.pause():
        result = None
        if evaluate_now:
          result = evaluator.score(state, step)
          progress.evaluated(result)
        # While updates are skipped, the step to come back to is one before that began.
        if (save_now or stop_now) and (step == steps or not progress.skipped_in_a_row):
          stop_if_not_finite(state, saved=records.saved)
          checkpoints.save(state, bits_per_byte=result["bits_per_byte"] if result else None)
          records.saved = step
      if stop_now and step < steps:
        checkpoints.wait()
        raise _stopped(step, saved=records.saved)
      if evaluate_now:
        evaluator.show(state, step)
      watched.beat()
  if result is None:  # nothing was left to train
    result = evaluator.score(state, steps)
  watched.beat(patience=_PATIENCE)  # the last save
  return result


def _batches(
  config: ml_collections.ConfigDict,
  batch_at: Callable,
  *,
  first: int,
  mesh: jax.sharding.Mesh,
  reader: concurrent.futures.Executor,
) -> Iterator[tuple[int, Array]]:
  """Of each step that is left its number, from 1, and its tokens; the next are read meanwhile."""
  shape = (config.data.batch_size, config.model.seq_len)

  def batch(step: int) -> Array:
    read = lambda rows: batch_at(step, rows)
    return sharding.place(read, sharding.by_batch(mesh), shape)

  upcoming = reader.submit(batch, first)
  for step in range(first + 1, config.train.steps + 1):
    tokens = upcoming.result()
    if step < config.train.steps:
      upcoming = reader.submit(batch, step)
    yield step, tokens


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
  """Scores the validation split while a run trains, and has it shown."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    dataset: data.Dataset,
    *,
    mesh: jax.sharding.Mesh,
    progress: metrics.Progress,
    writer: metrics.Writer | None,
    on_evaluation: Callable[[Evaluation], boards.Shown] | None,
    say: Callable[[str], None],
    beat: Callable[..., None],
  ):
    self._evaluator = evaluate.Evaluator(config, dataset, min_context=0, mesh=mesh)
    self._config, self._dataset, self._say, self._beat = config, dataset, say, beat
    self._progress, self._writer, self._on_evaluation = progress, writer, on_evaluation

  def score(self, state: dict, step: int) -> dict:
    """As `evaluate.evaluate` gives it, of as much of the split as training looks at."""
    most = self._config.eval.monitor_batches or None
    params = step_lib.scored(state)
    return self._evaluator(params, step=step, max_batches=most, on_progress=self._beat)

  def show(self, state: dict, step: int) -> None:
    """What `on_evaluation`, if any, makes of the weights."""
    if self._on_evaluation is None:
      return
    self._beat()
    with self._progress.pause():
      params = step_lib.scored(state)
      shown = self._on_evaluation(
        Evaluation(self._config, step, params, self._dataset, self._say, self._beat)
      )
    if self._writer:
      self._writer.show(step, shown)


class _Records:
  """Metrics of steps that were started; they are fetched when it does not hold up the device."""

  def __init__(self, progress: metrics.Progress, max_skipped: int, *, saved: int):
    """`saved`, to be kept up to date: the newest checkpoint."""
    self.progress, self.max_skipped, self.saved = progress, max_skipped, saved
    self.waiting = collections.deque()

  def add(self, step: int, record: dict[str, Array]) -> None:
    self.waiting.append((step, record))

  def settle(self, *, leave: int = 0) -> None:
    """Fetches metrics until those of `leave` steps are waiting.

    Raises:
      run.NonFiniteError: too many updates in a row were skipped.
    """
    while len(self.waiting) > leave:
      step, record = self.waiting.popleft()
      record = {name: float(value) for name, value in jax.device_get(record).items()}
      self.progress.add(step, record)
      if (skipped := self.progress.skipped_in_a_row) >= self.max_skipped:
        raise _hopeless(step, record, skipped=skipped, saved=self.saved)


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
  step = step_lib.jit_step(step, layout, mesh)
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


def _stopped(step: int, *, saved: int) -> run.Preempted:
  on_disk = f"saved is step {saved:,}" if saved else "nothing is saved yet"
  return run.Preempted(f"STOPPED at step {step:,}, {on_disk}")


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
