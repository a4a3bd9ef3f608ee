"""Flags and folders for every launcher: bad input is one readable message and exit status 2."""

import argparse
import contextlib
import difflib
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence
from typing import NoReturn
from typing import TextIO

import jax
import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from experiments import config_help
from sparse_flax import data
from sparse_flax import extras
from sparse_flax.run import checkpoint
from sparse_flax.run import errors
from sparse_flax.run import files
from sparse_flax.run import validate
from sparse_flax.train import metrics

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# Exit statuses beside 0. PREEMPTED is sysexits' EX_TEMPFAIL: start it again.
FAILED, BAD_INPUT, NOT_FINITE, DAMAGED, PREEMPTED, INTERRUPTED = 1, 2, 3, 4, 75, 130


def fail(*lines: str, status: int = BAD_INPUT) -> NoReturn:
  """Prints the lines to stderr and leaves."""
  tell(*lines)
  raise SystemExit(status)


def tell(*lines: str) -> None:
  """Prints the lines to stderr, which may have lost its reader: Ctrl-C ends `2>&1 | tee` too."""
  try:
    print("\n".join(lines), file=sys.stderr, flush=True)
  except OSError:
    discard(sys.stderr)


def discard(stream: TextIO) -> None:
  """Nothing more is written where `stream` went, which fails; else Python itself ends with 120."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
  """Turns a user's mistake (ValueError), a file that cannot be used (OSError) and a package that is
  not installed into a message."""
  try:
    yield
  except errors.StorageError as error:
    fail(str(error), status=FAILED)
  except errors.DamagedError as error:
    fail(str(error), status=DAMAGED)
  except OSError as error:
    fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
  except (ValueError, extras.MissingExtraError) as error:
    fail(str(error))
  except KeyboardInterrupt:
    fail("stopped from the keyboard", status=INTERRUPTED)


class Progress:
  """A line on a terminal: how far something is, how fast, and the time left.

  There is none in the first `QUIET` seconds. Rates count from the first call on, which leaves
  compilation out.
  """

  QUIET = 2.0

  def __init__(self, doing: str, total: int, unit: str):
    self._doing, self._total, self._unit = doing, total, unit
    self._start, self._first = time.monotonic(), None

  def __call__(self, done: int) -> None:
    """Says that so many units of the total are done."""
    now = time.monotonic()
    self._first = self._first or (done, now)
    if now - self._start < self.QUIET or not sys.stderr.isatty():
      return
    line = f"{self._doing} {done:,} of {self._total:,} {self._unit}"
    before, since = self._first
    if done > before and now > since:
      rate = (done - before) / (now - since)
      left = metrics.duration((self._total - done) / rate)
      line += f"  {metrics.short(rate)} {self._unit}/s  {left} left"
    print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

  def end(self) -> None:
    """Takes the line away."""
    if sys.stderr.isatty():
      print("\r\033[K", end="", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
  """argparse with `--name=value` flags only, never abbreviated, and errors of one line."""

  def __init__(self, doc: str, *, takes_config: bool = False):
    super().__init__(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    self._takes_config = takes_config

  def format_help(self) -> str:
    """With the configs and their fields, where the command takes a config."""
    if self._takes_config:
      self.epilog = config_help.text(config_names())
    return super().format_help()

  def error(self, message: str) -> NoReturn:
    fail(f"{message}; --help lists the flags")


def parse_config(
  parser: Parser, argv: Sequence[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict, str]:
  """Reads `parser`'s flags, --config=NAME_OR_FILE[:VARIANT] and --config.group.field=value.

  Args:
    parser: the launcher's own flags.
    argv: the arguments, without the program's name.

  Returns:
    The launcher's flags, the locked config, and the run's name: CONFIG or CONFIG-VARIANT.
  """
  own, arguments = parser.parse_known_args(argv)
  unknown = [
    x for x in arguments if x.startswith("-") and not re.match(r"--?config(\.[^=]*)?(=|$)", x)
  ]
  if unknown:
    flag = unknown[0].partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings] + ["--config"]
    fail(f"{flag}: no such flag{_nearest(flag, known)}")
  given = [i for i, x in enumerate(arguments) if re.match(r"--?config(=|$)", x)]
  if len(given) != 1:
    fail(
      "one --config=NAME[:VARIANT] or --config=FILE.py is needed, for example "
      f"--config=cifar10:quick; there are {', '.join(config_names())}"
    )
  # Loaded twice: only the bare config can tell which names the overrides may use.
  end = given[0] + (1 if "=" in arguments[given[0]] else 2)
  first, overrides = arguments[given[0] : end], arguments[: given[0]] + arguments[end:]
  first[-1] = _with_path(first[-1])
  bare, _ = _load(first)
  named = [x.partition("=")[0].lstrip("-") for x in overrides]
  _check_names(bare, named)
  config, filename = _load(first + overrides)
  _restore_defaults(config, bare)
  if "config.data.path" in named and "config.data.name" not in named:
    # What lies there, for a variant with a sample of the package and for a recipe.
    config.data.name = data.name_for(config.data.name, config.data.path)
  return own, config, run_name(filename)


def _restore_defaults(config: ml_collections.ConfigDict, bare: ml_collections.ConfigDict) -> None:
  """A field whose default is None has it again after --config.group.field=None."""
  values = validate.flatten(config.to_dict())
  for name, default in validate.flatten(bare.to_dict()).items():
    if default is None and values[name] == "None":
      config.update_from_flattened_dict({name: None})


def recipe(name: str) -> ml_collections.ConfigDict:
  """The config NAME or NAME:VARIANT of this repository: recipe("cifar10:quick")."""
  return parse_config(Parser(""), [f"--config={name}"])[1]


def config_names() -> list[str]:
  """The configs of this repository, as --config=NAME takes them."""
  return sorted(x.stem for x in CONFIGS.glob("*.py") if x.stem not in ("__init__", "common"))


def _with_path(flag: str) -> str:
  """--config=NAME[:VARIANT] with the file of that name; other values as they are."""
  begin, _, value = flag.rpartition("=")
  name, colon, variant = value.partition(":")
  if name not in config_names():
    return flag
  return "=".join(filter(None, (begin, f"{CONFIGS / name}.py"))) + colon + variant


def run_name(filename: str) -> str:
  """CONFIG or CONFIG-VARIANT of a --config, as the name of one folder.

  >>> run_name("configs/cifar10.py:quick"), run_name("../mine.py:a/../../b")
  ('cifar10-quick', 'mine-a_.._.._b')
  """
  path, _, variant = filename.partition(":")
  name = "-".join(filter(None, (pathlib.Path(path).stem, variant)))
  return re.sub(r"[^\w.,=-]+", "_", name).lstrip(".") or "run"


def _load(argv: list[str]) -> tuple[ml_collections.ConfigDict, str]:
  """The config that `argv` describes, and the text of its --config."""
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    remaining = values(["experiments", *argv])[1:]
    # A missing file is reported only when the value is touched.
    config, filename = holder.value, values["config"].config_filename
    config.to_dict()
    if not isinstance(config, ml_collections.ConfigDict):
      raise TypeError(f"{filename}: get_config() must return an ml_collections.ConfigDict")
  except Exception as error:  # a config file is code: anything may come out of it
    fail(_explain(error))
  if remaining:
    fail(f"{remaining[0]!r} is no flag: write --name=value")
  return config, filename


def _explain(error: Exception) -> str:
  """One line of what config_flags raised; some of its errors quote a whole traceback."""
  text = "; ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
  if isinstance(error, OSError):
    return "--config: " + re.sub(r".*\[Errno \d+\] ", "", text)
  if "Traceback" in text:
    last = text.rpartition("; ")[2]
    return "--config: " + (last.partition(": ")[2] or last)
  text = re.sub(r"^flag (--config\.)", r"\1", text)
  text = re.sub(r"invalid literal for int\(\) .*", "must be a whole number", text)
  text = re.sub(r"could not convert string to float.*", "must be a number", text)
  return text if text.startswith("--config") else f"--config: {text}"


def _check_names(config: ml_collections.ConfigDict, names: Sequence[str]) -> None:
  """Every --config.group.field must be a field, not a group and not a misspelling."""
  fields = [f"config.{name}" for name in validate.flatten(config.to_dict())]
  for name in names:
    if not name.startswith("config.") or name in fields:
      continue
    inside = [x for x in fields if x.startswith(name + ".")]
    if inside:
      fail(f"--{name}: is a group; set one of its fields, for example --{inside[0]}=...")
    fail(f"--{name}: no such field{_nearest('--' + name, ['--' + x for x in fields])}")


def _nearest(name: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {close[0]}?" if close else ""


def add_compilation_cache(parser: argparse.ArgumentParser) -> None:
  """Adds --compilation_cache, for `keep_compiled`."""
  parser.add_argument(
    "--compilation_cache",
    metavar="DIR",
    help="keep compiled programs here, for later commands to start faster, gs://... too; they are "
    "code: nobody else should be able to write there",
  )


def keep_compiled(folder: str | None) -> None:
  """Has JAX read and write all that it compiles in a folder, which it makes; None changes nothing.

  Raises:
    ValueError: the folder cannot be written.
  """
  if folder is None:
    return
  if not files.is_remote(folder):
    path = pathlib.Path(folder).absolute()
    there = next(x for x in (path, *path.parents) if x.exists())
    if not folder or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
      reason = "cannot be written" if folder and there.is_dir() else "is no folder"
      raise ValueError(
        f"--compilation_cache={folder}: must be a folder that can be written: "
        f"{there if folder else 'the empty text'} {reason}"
      )
    folder = os.fspath(path)
  jax.config.update("jax_compilation_cache_dir", folder)
  # Programs of any size, however quickly they were compiled.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_workdir(workdir: str | None, *, others: str = "") -> epath.Path:
  """The folder of an existing run; leaves with a message if it is none.

  Args:
    workdir: as it was given.
    others: flags that would do as well, for that message.
  """
  if not workdir:
    fail(f"--workdir=DIR is missing: the folder of a training run{others}")
  folder = epath.Path(workdir)
  if not folder.is_dir():
    fail(f"--workdir={workdir}: no such folder")
  if not (folder / "config.json").is_file():
    fail(f"--workdir={workdir}: has no config.json, so it is not the folder of a training run")
  if checkpoint.latest_step(folder) is None:
    fail(f"--workdir={workdir}: holds no checkpoint yet; train first")
  return folder


def as_boolean(text: str) -> bool:
  """The value of a flag that is --name=true or --name=false."""
  if text not in ("true", "false"):
    raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
  return text == "true"
