"""What a training run shows of itself: samples, completions, and where its heads attend.

To have it drawn at each evaluation:

  train.train(config, workdir, on_evaluation=pictures.Drawer())
"""

import io
import itertools
import time
from collections.abc import Sequence

from sparse_flax import extras

extras.need("train", of=__name__)

import jax
import ml_collections
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from sparse_flax import data
from sparse_flax import model as model_lib
from sparse_flax import train
from sparse_flax.model import order as order_lib
from sparse_flax.sample.generate import generate
from sparse_flax.sample.generate import row_mesh
from sparse_flax.train import boards

# One byte after the other takes minutes where sequences are long: texts and sounds end here. Half
# of a completion is given.
TEXT_BYTES = 512
SOUND_SAMPLES = data.SAMPLE_RATE  # a second
_LAYERS, _PLACES = 3, 2  # whose attention is drawn, for as many predicted places
_COLUMNS = 4  # of samples
_DPI = 80
_SEARCHED = 16  # windows looked at for each that is completed

Drawn = dict[str, boards.Image | boards.Text | boards.Sound]


class Drawer:
  """For `on_evaluation` of `train.train`: `eval.pictures` samples, as many completions, attention.

  Keys, beginnings and places are the same each time, so that steps can be compared. Completions are
  of the validation split. Runs of several processes are not drawn, and without the extra `view` no
  pictures. What goes wrong is told and ends the drawing, not the run.
  """

  def __init__(self):
    self._begun = self._ended = False
    self._lacks = ""  # what pictures need
    try:
      extras.need("view", of="a picture")
    except extras.MissingExtraError as error:
      self._lacks = str(error)

  def __call__(self, evaluation: train.Evaluation) -> Drawn:
    config = evaluation.config
    if self._ended or not config.eval.pictures:
      return {}
    if jax.process_count() > 1:
      return self._end(evaluation, "runs of several processes draw nothing")
    if self._lacks and config.model.modality == "image":
      return self._end(evaluation, self._lacks)
    if self._lacks and not self._begun:
      evaluation.say(f"no pictures of attention at evaluations: {self._lacks}")
    if not self._begun:
      evaluation.say("compiling what draws samples ...")
    self._begun, start = True, time.perf_counter()
    try:
      drawn, words = _draw(evaluation, attention=not self._lacks)
    except Exception as error:  # memory, most likely: a picture is less than a run
      return self._end(evaluation, " ".join(f"{type(error).__name__}: {error}".split())[:300])
    step = f"step {evaluation.step:,}/{config.train.steps:,}"
    evaluation.say(f"{step}  drawn in {time.perf_counter() - start:.1f} s: {words}")
    return drawn

  def _end(self, evaluation: train.Evaluation, reason: str) -> Drawn:
    self._ended = True
    evaluation.say(f"nothing is drawn at evaluations: {reason}")
    return {}


def _draw(evaluation: train.Evaluation, *, attention: bool) -> tuple[Drawn, str]:
  """What is shown, and in words what that is."""
  model, num = evaluation.config.model, evaluation.config.eval.pictures
  graphdef, _ = model_lib.graph_and_shapes(**model)
  most = {"image": model.seq_len, "text": TEXT_BYTES, "audio": SOUND_SAMPLES}[model.modality]
  length = min(most, model.seq_len)
  windows = _held_out(evaluation.validation, model.seq_len, count=num, length=length)
  known = length // 2
  mesh = row_mesh(num + len(windows))
  with jax.set_mesh(mesh):  # not in that of training
    key = jax.random.key(evaluation.config.seed)
  rows = generate(  # all in one loop, which takes hardly longer for more rows
    graphdef,
    evaluation.params,
    key=key,
    num=num + len(windows),
    length=length,
    prompts=[b""] * num + [window[:known] for window in windows],
    mesh=mesh,
    on_progress=evaluation.on_progress,
  )
  show = {"image": _images, "text": _texts, "audio": _sounds}[model.modality]
  drawn = show(model, rows[:num], rows[num:], windows, known)
  words = f"{num} samples, {len(windows)} completions"
  if length < model.seq_len:
    words += f", of each the first {length:,} of {model.seq_len:,} bytes"
  if attention and windows:
    drawn |= _attention(graphdef, evaluation.params, windows[0], model)
    words += ", attention"
  return drawn, words


def _held_out(
  dataset: data.Dataset, seq_len: int, *, count: int, length: int
) -> list[UInt8[np.ndarray, "T"]]:
  """The first windows of a split that have `length` bytes of their own; `count` at most."""
  windows = data.eval_batches(dataset, seq_len=seq_len, min_context=0, batch_size=1)
  searched = itertools.islice(windows, _SEARCHED * count)
  whole = (tokens[0] for tokens, scored in searched if scored[0, :length].all())
  return list(itertools.islice(whole, count))


def _images(
  model: ml_collections.ConfigDict,
  samples: UInt8[np.ndarray, "N T"],
  completions: UInt8[np.ndarray, "M T"],
  originals: Sequence[UInt8[np.ndarray, "T"]],
  known: int,
) -> Drawn:
  from sparse_flax.view import grids  # an extra

  order = order_lib.Order.of(model)
  image = lambda tokens: order.drawn(tokens).reshape(model.position_shape)
  starts = range(0, len(samples), _COLUMNS)
  grid = [[image(x) for x in samples[i : i + _COLUMNS]] for i in starts]
  drawn: Drawn = {"samples": boards.Image(np.asarray(grids.draw_grid(grid)))}
  if originals:
    rows = [
      [image(grids.with_unknown(original, known=known)), image(completion), image(original)]
      for completion, original in zip(completions, originals, strict=True)
    ]
    grid = grids.draw_grid(rows, captions=["given", "drawn", "original"])
    drawn["completions"] = boards.Image(np.asarray(grid))
  return drawn


def _texts(model, samples, completions, originals, known: int) -> Drawn:
  parts = [f"--- {n + 1}\n{printable(x.tobytes())}" for n, x in enumerate(samples)]
  drawn: Drawn = {"samples": boards.Text("\n\n".join(parts))}
  if originals:
    parts = [
      f"--- {n + 1}, given\n{printable(x[:known].tobytes())}\n"
      f"--- {n + 1}, drawn\n{printable(x[known:].tobytes())}"
      for n, x in enumerate(completions)
    ]
    drawn["completions"] = boards.Text("\n\n".join(parts))
  return drawn


def _sounds(model, samples, completions, originals, known: int) -> Drawn:
  return {
    f"{name}/{n + 1}": boards.Sound(data.mu_law_decode(codes), data.SAMPLE_RATE)
    for name, rows in (("samples", samples), ("completions", completions))
    for n, codes in enumerate(rows)
  }


def _attention(
  graphdef, params: dict, tokens: UInt8[np.ndarray, "T"], model: ml_collections.ConfigDict
) -> Drawn:
  """Of the first layer, the middle one and the last."""
  from sparse_flax.view import layers as layers_lib  # an extra
  from sparse_flax.view import maps

  layout = maps.Layout.of(model)
  places = maps.random_places(layout, _PLACES, seed=0)
  weights = layers_lib.weights(graphdef, params, tokens, places, layout)
  drawn: Drawn = {}
  chosen = np.linspace(0, layers_lib.num_layers(model) - 1, _LAYERS).round().astype(int)
  for layer in dict.fromkeys(chosen.tolist()):
    figure, content = layers_lib.draw(model, layer, tokens, places, weights[layer]), io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    pixels = np.asarray(PIL.Image.open(content).convert("RGB"))
    drawn[f"attention/layer{layer}"] = boards.Image(pixels)
  return drawn


def printable(text: bytes) -> str:
  """A text without what a terminal takes for a command."""
  shown = text.decode(errors="replace")
  return "".join(x if x.isprintable() or x == "\n" else "�" for x in shown)
