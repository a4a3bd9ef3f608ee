"""Where a run can be watched: TensorBoard, and Weights & Biases where that is asked for.

Both take `scalars`, numbers of a step by their names; `show`, what is to be seen, read and heard of
it; and `close`, with whether the run has failed.
"""

import html
import importlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import ml_collections
import numpy as np
from etils import epath
from jaxtyping import Float
from jaxtyping import UInt8

from sparse_flax import data
from sparse_flax import extras
from sparse_flax import run


class Image(NamedTuple):
  pixels: UInt8[np.ndarray, "rows columns 3"]


class Text(NamedTuple):
  text: str


class Sound(NamedTuple):
  samples: Float[np.ndarray, "T"]  # in [-1, 1], mono
  rate: int  # Hz


Shown = Mapping[str, Image | Text | Sound]  # by the names that a board gives them


class TensorBoard:
  """Event files in a folder of this machine."""

  def __init__(self, folder: str, *, step: int):
    """Opens it for appending; what an earlier process wrote beyond `step` is not shown."""
    import tensorboardX  # only training needs it: other commands start faster without

    self._writer: Any = tensorboardX.SummaryWriter(folder, purge_step=step + 1 if step else None)

  def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def show(self, step: int, shown: Shown) -> None:
    for name, item in shown.items():
      match item:
        case Image(pixels):
          self._writer.add_image(name, pixels, step, dataformats="HWC")
        case Text(text):  # TensorBoard reads Markdown: an indented block stays as it is
          block = "\n".join(f"    {line}" for line in text.split("\n"))
          self._writer.add_text(name, block, step)
        case Sound():
          self._add_sound(name, item, step)

  def _add_sound(self, name: str, sound: Sound, step: int) -> None:
    """tensorboardX's own `add_audio` needs libsndfile, which a GPU machine may lack."""
    summary: Any = importlib.import_module("tensorboardX.proto.summary_pb2").Summary
    audio = summary.Audio(
      sample_rate=sound.rate,
      num_channels=1,
      length_frames=len(sound.samples),
      encoded_audio_string=data.wav_of(sound.samples, rate=sound.rate),
      content_type="audio/wav",
    )
    value = summary.Value(tag=name, audio=audio)
    self._writer.file_writer.add_summary(summary(value=[value]), step)

  def flush(self) -> None:
    self._writer.flush()

  def close(self, *, failed: bool) -> None:
    self._writer.close()


class WandB:
  """A run of Weights & Biases, which goes on where the run of a folder does.

  Its id is kept in the folder, in `wandb.json`. Steps that were sent before and are done again,
  after a restart from an earlier checkpoint, are sent again with the same values.
  """

  def __init__(
    self,
    project: str,
    workdir: epath.PathLike,
    *,
    config: ml_collections.ConfigDict,
    say: Callable[[str], None],
  ):
    """Begins it, or goes on.

    Args:
      project: of Weights & Biases, made there when it is new.
      workdir: the run's folder, which is there.
      config: of the run.
      say: takes a line where sending ends early; the run goes on.

    Raises:
      run.StorageError: Weights & Biases does not take the run: without a login, for example.
    """
    check_wandb(project)
    wandb: Any = importlib.import_module("wandb")
    self._wandb, self._say, self._failed = wandb, say, False
    path = epath.Path(workdir) / "wandb.json"
    known = path.exists()
    try:
      identity = json.loads(path.read_text())["id"] if known else secrets.token_hex(4)
      self._run = wandb.init(
        project=project,
        id=identity,
        resume="allow",
        name=epath.Path(workdir).absolute().name,
        config=config.to_dict(),
        # Object stores are not for files that grow.
        dir=tempfile.gettempdir() if run.files.is_remote(workdir) else os.fspath(workdir),
      )
      self._run.define_metric("*", step_metric="step")
    except Exception as error:  # of the network, of the login, of a damaged file
      raise run.StorageError(f"wandb={project!r}: {_in_a_line(error)}") from error
    if not known:
      run.files.write(path, json.dumps({"id": identity}).encode())

  def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
    self._send(lambda: {"step": step, **values})

  def show(self, step: int, shown: Shown) -> None:
    def converted(item):
      match item:
        case Image(pixels):
          return self._wandb.Image(pixels)
        case Text(text):
          return self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        case Sound(samples, rate):
          return self._wandb.Audio(samples, sample_rate=rate)

    self._send(lambda: {"step": step, **{name: converted(item) for name, item in shown.items()}})

  def close(self, *, failed: bool) -> None:
    self._attempt(lambda: self._run.finish(exit_code=int(failed)))

  def _send(self, make: Callable[[], dict[str, Any]]) -> None:
    if not self._failed:
      self._attempt(lambda: self._run.log(make()))

  def _attempt(self, call: Callable[[], Any]) -> None:
    """The run goes on without: its own files have the same."""
    try:
      call()
    except Exception as error:  # whatever a client of a service says
      self._failed = True
      self._say(f"no more is sent to Weights & Biases: {_in_a_line(error)}")


def check_wandb(project: str | None) -> None:
  """Raises where a project is given that there can be no run of.

  Raises:
    ValueError: it has no name.
    extras.MissingExtraError: the package is not installed.
  """
  if project is None:
    return
  if not project:
    raise ValueError("wandb='': must be the name of a project")
  extras.need("wandb", of=f"wandb={project!r}")


def _in_a_line(error: Exception) -> str:
  return " ".join(f"{type(error).__name__}: {error}".split())
