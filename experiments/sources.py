"""The weights that `evaluate`, `sample` and `visualize` work with: of a run, or of an export."""

import argparse
import os
from typing import NamedTuple

import ml_collections
from etils import epath
from flax import nnx

from experiments import cli
from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import export
from sparse_flax.run import checkpoint


class Source(NamedTuple):
  """Weights of a run or of an export, and where goes what is made of them.

  Attributes:
    config: of the run that trained them.
    graphdef: of the model, for nnx.merge(graphdef, params).
    params: the weights.
    step: of the checkpoint they are from.
    averaged: whether they are the averaged weights.
    matrices: what those with two axes and more were rounded to: "bfloat16", or None.
    held_out: images that lie beside the weights, if the data are elsewhere and nobody said where.
    folder: of the results; None where they are only printed.
    drawn: the folder of pictures and samples, apart for the other weights of a run; None likewise.
    flags: of a command that shall find the weights, and the results, again.
  """

  config: ml_collections.ConfigDict
  graphdef: nnx.GraphDef
  params: dict
  step: int
  averaged: bool
  matrices: str | None
  held_out: data.Dataset | None
  folder: epath.Path | None
  drawn: epath.Path | None
  flags: str

  def open_dataset(self, split: str) -> data.Dataset:
    """The split of the data; for an export without any, the images beside it, which it says.

    Raises:
      ValueError: as `evaluate.open_dataset`; or the images beside it are of another split.
    """
    if self.held_out is None:
      return evaluate.open_dataset(self.config, split)
    if split != self.held_out.split:
      raise ValueError(
        f"--split={split}: must be {self.held_out.split}, all that is there without "
        "--data_path=FOLDER"
      )
    cli.tell(f"data: the {self.held_out.remark}; --data_path=FOLDER takes others")
    return evaluate.checked(self.held_out, self.config)


def add_flags(parser: argparse.ArgumentParser, *, out: str) -> None:
  """Adds --workdir, --weights, --out, --step, --average and --data_path, for `check`.

  Args:
    parser: of a launcher.
    out: what --out is, for --help.
  """
  parser.add_argument("--workdir", metavar="DIR", help="the folder of a training run")
  parser.add_argument(
    "--weights",
    metavar="DIR",
    help="the folder of an export, instead of a run; experiments/pretrained/cifar10 needs no data",
  )
  parser.add_argument("--out", metavar="DIR", help=out)
  parser.add_argument("--step", type=int, help="of the run's checkpoint; default: the newest")
  add_average(parser)
  parser.add_argument("--data_path", help="where the data are now, if they have moved")


def add_average(parser: argparse.ArgumentParser) -> None:
  """Adds --average, None unless it is given."""
  parser.add_argument(
    "--average",
    type=cli.as_boolean,
    metavar="true|false",
    help="the run's averaged weights, or those after the last update; default: true",
  )


def check(
  workdir: str | None,
  weights: str | None,
  *,
  out: str | None,
  step: int | None,
  average: bool | None,
) -> None:
  """Leaves with a message unless the flags name one run that has a checkpoint, or one export."""
  if workdir and weights:
    cli.fail("--workdir and --weights: give one of them")
  if not weights:
    if out:
      cli.fail("--out: is for --weights; what is made of a run goes into its --workdir")
    cli.open_workdir(workdir, others=", or --weights=DIR, that of an export")
    return
  if step is not None:
    cli.fail("--step: is for --workdir; an export has one step")
  if average is not None:
    cli.fail("--average: is for --workdir; an export has one set of weights, and says which")
  folder = epath.Path(weights)
  if not folder.is_dir():
    cli.fail(f"--weights={weights}: no such folder")
  if missing := [x for x in (export.MODEL, export.CONFIG) if not (folder / x).is_file()]:
    cli.fail(f"--weights={weights}: has no {missing[0]}, so it is not the folder of an export")
  if out and epath.Path(out).exists() and not epath.Path(out).is_dir():
    cli.fail(f"--out={out}: is no folder")


def flags_of(
  workdir: str | os.PathLike | None,
  weights: str | os.PathLike | None,
  *,
  out: str | os.PathLike | None,
  step: int | str | None,
  average: bool | None,
) -> str:
  """What a command needs to find the same weights, and what was made of them, again."""
  if not weights:
    return f"--workdir={workdir} --step={step}" + (" --average=false" if average is False else "")
  return f"--weights={weights}" + (f" --out={out}" if out else "")


def _default_out(weights: str | os.PathLike) -> epath.Path:
  """Where goes what is made of an export without --out: runs/NAME, of the name of its folder.

  Raises:
    ValueError: that is the folder of a run, whose files would be mixed with these.
  """
  folder = epath.Path("runs") / cli.run_name(epath.Path(os.path.abspath(weights)).name)
  if (folder / "config.json").exists():
    raise ValueError(f"--out=DIR is missing: its default, {folder}, is the folder of a run")
  return folder


def read(
  workdir: str | os.PathLike | None,
  weights: str | os.PathLike | None = None,
  *,
  out: str | os.PathLike | None = None,
  needs_folder: bool = True,
  step: int | None = None,
  average: bool | None = None,
  data_path: str | None = None,
) -> Source:
  """The weights that `check` has found.

  Args:
    workdir: the folder of a run; None where there are `weights`.
    weights: the folder of an export.
    out: the folder of its results.
    needs_folder: whether results go to runs/NAME without `out`; else they go nowhere.
    step: of the run's checkpoint; None is the newest.
    average: False takes the weights after the run's last update; else they are the averaged ones,
      where it keeps them.
    data_path: where the data are now, if they have moved.

  Raises:
    ValueError: runs/NAME is the folder of a run; or as `restore_params` and `export.read`.
    errors.DamagedError: likewise.
  """
  if not weights:
    assert workdir, "`check` has seen to it"
    average = average is not False
    found = checkpoint.restore_params(workdir, step, average=average, data_path=data_path)
    config, *_, step = found
    flags_again = flags_of(workdir, None, out=None, step=step, average=average)
    folder, keeps = epath.Path(workdir), config.train.ema_decay > 0
    drawn = folder / "samples" / ("" if average or not keeps else "last-update") / str(step)
    nothing_else = dict(matrices=None, held_out=None)
    where = dict(folder=folder, drawn=drawn, flags=flags_again)
    return Source(*found, averaged=average and keeps, **nothing_else, **where)
  folder = epath.Path(out) if out else _default_out(weights) if needs_folder else None
  found = export.read(weights, data_path=data_path)
  held_out = None if found.config.data.path else export.held_out(weights, found.config)
  flags_again = flags_of(None, weights, out=out, step=None, average=None)
  drawn = folder and folder / "samples" / str(found.step)
  return Source(*found, held_out=held_out, folder=folder, drawn=drawn, flags=flags_again)
