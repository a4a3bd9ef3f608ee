"""What sampling reads and writes: prompts, pictures, texts and sounds."""

import contextlib
import io
import os
from collections.abc import Sequence

from sparse_flax import extras

extras.need("train", of=__name__)

import ml_collections
import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import UInt8

from sparse_flax import data
from sparse_flax import run
from sparse_flax.model import order as order_lib
from sparse_flax.view import grids
from sparse_flax.view.report import samples as samples_lib

PER_ROW = 4  # completions of one example, beside each other
_COLUMNS = 8
_SILENCE = 0.5  # seconds between two sounds of one file
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")  # of prompts; other decoders may start programs


def read_prompt(path: str | os.PathLike, model: ml_collections.ConfigDict) -> np.ndarray:
  """The first seq_len bytes of a file as the model would see them.

  Raises:
    ValueError: no file of the kind that `model.modality` asks for, or a picture of another size.
  """
  if model.modality == "text":
    example = np.frombuffer(epath.Path(path).read_bytes(), np.uint8)
  elif model.modality == "audio":
    example = data.load_codes(path)
  else:
    rows, columns, channels = model.position_shape
    content = io.BytesIO(epath.Path(path).read_bytes())
    try:
      with PIL.Image.open(content, formats=_FORMATS) as image:
        mode, pixels = image.mode, np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError) as error:  # how Pillow reports what it cannot read
      raise ValueError(f"--prompt={path}: is not a picture that can be read ({error})") from error
    if mode.startswith(("I", "F")):
      raise ValueError(f"--prompt={path}: has pixels of mode {mode}, not of 8 bits a channel")
    if pixels.shape[:2] != (rows, columns):
      raise ValueError(
        f"--prompt={path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels; "
        f"the model draws {columns} x {rows}"
      )
    example = order_lib.Order.of(model).read(pixels.reshape(-1))
  if not example.size:
    raise ValueError(f"--prompt={path}: is empty")
  return example[: model.seq_len]


def claim_stem(folder: epath.Path, modality: str, *, kind: str, **named) -> epath.Path:
  """A free stem; its first file is made here, so that a run that ends meanwhile takes another."""
  number = "-00" if kind == "samples" else "-00-drawn1"
  first = {"image": ".png", "text": f"{number}.txt", "audio": f"{number}.wav"}[modality]
  while True:
    taken = [path.name for path in folder.iterdir()]
    stem = folder / samples_lib.free_stem(taken, kind=kind, **named)
    if run.files.is_remote(folder):  # which cannot refuse to make a file
      return stem
    with contextlib.suppress(FileExistsError), open(f"{stem}{first}", "x"):
      return stem


def write_grid(
  path: epath.Path,
  shape: Sequence[int],
  samples: UInt8[np.ndarray, "N T"],
  examples: Sequence[np.ndarray],
  known: Sequence[int],
  order: order_lib.Order | None = None,
) -> None:
  """One picture of all samples; completions stand between what was given and the original.

  Args:
    path: of the PNG file.
    shape: rows, columns and channels of a sample.
    samples: PER_ROW of each example, or of nothing where there are no examples.
    examples: what was completed.
    known: how many bytes of each were given.
    order: in which samples and examples have their bytes; None: row by row.
  """
  image = lambda tokens: (tokens if order is None else order.drawn(tokens)).reshape(shape)
  if not known:
    columns = min(_COLUMNS, -(-len(samples) // max(1, round(len(samples) ** 0.5))))
    starts = range(0, len(samples), columns)
    grids.save_grid(path, [[image(x) for x in samples[i : i + columns]] for i in starts])
    return
  columns = min(PER_ROW, len(samples))
  rows = []
  for n, (example, count) in enumerate(zip(examples, known, strict=True)):
    drawn = [image(x) for x in samples[n * columns : (n + 1) * columns]]
    drawn += [None] * (columns - len(drawn))
    prompt = image(grids.with_unknown(example, known=count))
    rows.append([prompt, *drawn, image(example)])
  captions = ["given", *(f"drawn {n + 1}" for n in range(columns)), "original"]
  grids.save_grid(path, rows, captions=captions)


def write_sequences(
  stem: epath.Path,
  modality: str,
  samples: UInt8[np.ndarray, "N T"],
  examples: Sequence[np.ndarray],
  known: Sequence[int],
) -> list[epath.Path]:
  """One file per sample; for completions also what was given and the original; sounds joined."""
  tokens_of = {f"{n:02}": tokens for n, tokens in enumerate(samples)}
  if known:
    tokens_of = {f"{n // PER_ROW:02}-drawn{n % PER_ROW + 1}": x for n, x in enumerate(samples)}
    for n, (example, count) in enumerate(zip(examples, known, strict=True)):
      tokens_of[f"{n:02}-given"] = example[:count]
      tokens_of[f"{n:02}-original"] = example
  paths = []
  for name, tokens in sorted(tokens_of.items()):
    if modality == "audio":
      paths.append(stem.with_name(f"{stem.name}-{name}.wav"))
      data.write_wav(paths[-1], data.mu_law_decode(tokens))
    else:
      paths.append(stem.with_name(f"{stem.name}-{name}.txt"))
      paths[-1].write_bytes(tokens.tobytes())
  if modality == "audio" and len(samples) > 1:
    silence = np.zeros(round(_SILENCE * data.SAMPLE_RATE), np.float32)
    sounds = [x for tokens in samples for x in (silence, data.mu_law_decode(tokens))]
    paths.append(stem.with_name(f"{stem.name}-all.wav"))
    data.write_wav(paths[-1], np.concatenate(sounds[1:]))
  return paths
