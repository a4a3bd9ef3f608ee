"""Draws samples from a run's averaged weights: pictures, texts or sounds.

  python -m experiments.sample --workdir=DIR --num=16 [--temperature=1.0] [--top_k=K] [--top_p=P]
  python -m experiments.sample --workdir=DIR --num=16 --keep=0.5
  python -m experiments.sample --workdir=DIR --num=16 --prompt=FILE [--prompt=FILE ...] [--keep=0.5]

The first form samples from nothing. --keep completes held-out examples of the test split, of which
it keeps that share; --prompt completes files: pictures of the model's size, texts, WAV files, each
of its own length. Samples are dealt out over the devices there are. The files are written into
DIR/samples/STEP/; sounds also all in one, with silence between them. A name has the seed and, if
they are given, temperature, top_k and top_p, and a number where an earlier run has taken that name.
"""

import contextlib
import io
import itertools
import os
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
import PIL.Image
from etils import epath

from experiments import cli
from sparse_flax import data
from sparse_flax import evaluate
from sparse_flax import sample
from sparse_flax.data import audio
from sparse_flax.data import recordings
from sparse_flax.parallel import sharding
from sparse_flax.run import checkpoint
from sparse_flax.run import files
from sparse_flax.train import metrics
from sparse_flax.view import grids
from sparse_flax.view.report import samples as samples_lib

_PER_ROW = 4  # completions of one example, beside each other
_GRID_COLUMNS = 8
_SILENCE = 0.5  # seconds between two sounds of one file
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")  # of prompts; other decoders may start programs


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", help="the folder of a training run")
  parser.add_argument("--num", type=int, default=16, help="samples in all")
  parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest byte")
  parser.add_argument("--top_k", type=int, help="draw from the K likeliest bytes only")
  parser.add_argument("--top_p", type=float, default=1.0, help="from the likeliest with this share")
  parser.add_argument("--prompt", action="append", help="a file to complete; may be given again")
  parser.add_argument("--keep", type=float, help="share of each example to keep, in (0, 1)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--data_path", help="where the run's data are now, if they have moved")
  options = vars(parser.parse_args(argv))
  workdir = cli.open_workdir(options.pop("workdir"))
  with cli.readable_errors():
    paths = run(workdir, **options, on_programs=_say_what_computes)
  for path in paths:
    print(path)
  page = paths[0].with_name(samples_lib.PAGE)
  if page.exists():
    command = _again(workdir, page.parent.name)
    print(f"{page} is older than these; to make it again: {command}", file=sys.stderr)
  return 0


def run(
  workdir: str | os.PathLike,
  *,
  num: int = 16,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
  prompt: Sequence[str | os.PathLike] | None = None,
  keep: float | None = None,
  seed: int = 0,
  step: int | None = None,
  data_path: str | None = None,
  on_programs: Callable[[str, str], None] = lambda prompts, steps: None,
) -> list[epath.Path]:
  """Draws `num` samples from the run in `workdir`; returns the files written.

  `on_programs` is told what computes the attention, as by `sample.generate`.

  Raises:
    ValueError: an option makes no sense, or the prompt does not fit the model.
  """
  how = dict(num=num, temperature=temperature, top_k=top_k, top_p=top_p)
  sample.check_options(**how, prefix="--")
  if not 0 <= seed < 2**32:
    raise ValueError(f"--seed={seed}: must be a whole number in [0, 2**32)")
  if keep is not None and not 0.0 < keep < 1.0:
    raise ValueError(f"--keep={keep}: must be between 0 and 1")
  config, graphdef, params, step = checkpoint.restore_params(workdir, step, data_path=data_path)
  examples, kept = _examples(config, num=num, prompt=prompt, keep=keep)
  progress = Progress(num)
  # Those of a CPU share its cores.
  devices = 1 if jax.default_backend() == "cpu" else min(num, jax.device_count())
  samples = sample.generate(
    graphdef,
    params,
    key=jax.random.key(seed),
    **how,
    # Sample r completes example r // _PER_ROW.
    prompts=[examples[r // _PER_ROW][: kept[r // _PER_ROW]] for r in range(num)] if kept else None,
    mesh=sharding.make_mesh(data=devices, fsdp=1, tensor=1, sequence=1),
    on_progress=progress,
    on_programs=on_programs,
  )
  progress.end()
  folder = epath.Path(workdir) / "samples" / str(step)
  folder.mkdir(parents=True, exist_ok=True)
  named = ("temperature", "top_k", "top_p")  # what was kept is seen in the files
  stem = _claim_stem(
    folder,
    config.model.modality,
    kind="completions" if kept else "samples",
    seed=seed,
    options={name: how[name] for name in named if how[name] != run.__kwdefaults__[name]},
  )
  if config.model.modality == "image":
    paths = [_write_grid(stem.with_name(f"{stem.name}.png"), config, samples, examples, kept)]
  else:
    paths = _write_files(stem, config.model.modality, samples, examples, kept)
  page = folder / samples_lib.PAGE
  if page.exists():
    older = samples_lib.as_older(page.read_text(), command=_again(workdir, step))
    files.write(page, older.encode())
  return paths


def _claim_stem(folder: epath.Path, modality: str, *, kind: str, **named) -> epath.Path:
  """A free stem; its first file is made here, so that a run that ends meanwhile takes another."""
  number = "-00" if kind == "samples" else "-00-drawn1"
  first = {"image": ".png", "text": f"{number}.txt", "audio": f"{number}.wav"}[modality]
  while True:
    taken = [path.name for path in folder.iterdir()]
    stem = folder / samples_lib.free_stem(taken, kind=kind, **named)
    if metrics.is_remote(folder):  # which cannot refuse to make a file
      return stem
    with contextlib.suppress(FileExistsError), open(f"{stem}{first}", "x"):
      return stem


def _again(workdir: str | os.PathLike, step: int | str) -> str:
  """What makes the report that has all samples."""
  return f"python -m experiments.visualize --workdir={workdir} --step={step}"


def _say_what_computes(prompts: str, steps: str) -> None:
  of_prompts = f", of the prompts by {prompts}" if prompts else ""
  print(f"attention of the steps by {steps}{of_prompts}", file=sys.stderr)


def _examples(
  config: ml_collections.ConfigDict,
  *,
  num: int,
  prompt: Sequence[str | os.PathLike] | None,
  keep: float | None,
) -> tuple[list[np.ndarray], list[int]]:
  """What to complete, one for _PER_ROW samples, and how many bytes of each are given."""
  count = -(-num // _PER_ROW)
  if prompt is None and keep is None:
    return [], []
  if prompt is None:
    tokens = _held_out(config, count)
    return list(tokens), [max(1, round(keep * config.model.seq_len))] * count
  if len(prompt) > count:
    raise ValueError(
      f"--num={num}: must be at least {_PER_ROW * (len(prompt) - 1) + 1}, so that each of "
      f"{len(prompt)} prompts gets some of its {_PER_ROW} completions"
    )
  if keep is None and config.model.modality == "image":
    keep = 0.5
  examples = [read_prompt(path, config.model) for path in prompt]
  kept = [x.size if keep is None else round(keep * x.size) for x in examples]
  for path, known in zip(prompt, kept, strict=True):
    if not 0 < known < config.model.seq_len:
      raise ValueError(
        f"--prompt={path}: {known:,} bytes are to be kept; a sample has "
        f"{config.model.seq_len:,}: choose a --keep between 0 and 1 that leaves some to draw"
      )
  # Prompts take turns where there are more samples than four of each.
  turns = [n % len(examples) for n in range(count)]
  return [examples[n] for n in turns], [kept[n] for n in turns]


def _held_out(config: ml_collections.ConfigDict, count: int) -> np.ndarray:
  """The first `count` whole sequences of the test split."""
  dataset = evaluate.open_dataset(config, "test")
  seq_len = config.model.seq_len
  windows = data.eval_batches(dataset, seq_len=seq_len, min_context=0, batch_size=1)
  # The last window of a text or a recording is padded, or repeats bytes and scores only its end.
  whole = (tokens[0] for tokens, scored in windows if scored.all())
  found = list(itertools.islice(whole, count))
  if len(found) < count:
    raise ValueError(
      f"--num={_PER_ROW * count}: at most {_PER_ROW * len(found)}; the test split of "
      f"{dataset.name} has {len(found)} examples of {seq_len:,} bytes for {_PER_ROW} completions "
      f"each"
    )
  return np.stack(found)


def read_prompt(path: str | os.PathLike, model: ml_collections.ConfigDict) -> np.ndarray:
  """The first seq_len bytes of a file as the model would see them.

  Raises:
    ValueError: no file of the kind that `model.modality` asks for, or a picture of another size.
  """
  if model.modality == "text":
    example = np.frombuffer(epath.Path(path).read_bytes(), np.uint8)
  elif model.modality == "audio":
    example = recordings.load_codes(path)
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
    example = pixels.reshape(-1)
  if not example.size:
    raise ValueError(f"--prompt={path}: is empty")
  return example[: model.seq_len]


class Progress:
  """One line on a terminal with rate and time left, and a last one for everybody."""

  def __init__(self, num: int):
    self.num, self.start, self.done = num, time.monotonic(), 0

  def __call__(self, done: int, steps: int) -> None:
    self.done = done
    seconds = time.monotonic() - self.start
    if sys.stderr.isatty():
      rate, left = self.num * done / seconds, seconds * (steps - done) / done
      line = f"sampling {done:,} of {steps:,} bytes x {self.num}"
      print(f"\r{line}  {rate:,.0f} bytes/s  {left:.0f} s left   ", end="", file=sys.stderr)

  def end(self) -> None:
    if sys.stderr.isatty():
      print(file=sys.stderr)
    seconds = time.monotonic() - self.start
    rate = self.num * self.done / seconds
    print(f"sampled {self.num} x {self.done:,} bytes in {seconds:.1f} s, {rate:,.0f} bytes/s")


def _write_grid(path, config, samples, examples, kept) -> epath.Path:
  image = lambda tokens: tokens.reshape(config.model.position_shape)
  if not kept:
    columns = min(_GRID_COLUMNS, -(-len(samples) // max(1, round(len(samples) ** 0.5))))
    starts = range(0, len(samples), columns)
    grids.save_grid(path, [[image(x) for x in samples[i : i + columns]] for i in starts])
    return path
  columns = min(_PER_ROW, len(samples))
  rows = []
  for n, (example, known) in enumerate(zip(examples, kept, strict=True)):
    drawn = [image(x) for x in samples[n * columns : (n + 1) * columns]]
    drawn += [None] * (columns - len(drawn))
    prompt = grids.with_unknown(image(example), known=known)
    rows.append([prompt, *drawn, image(example)])
  captions = ["given", *(f"drawn {n + 1}" for n in range(columns)), "original"]
  grids.save_grid(path, rows, captions=captions)
  return path


def _write_files(stem, modality, samples, examples, kept) -> list[epath.Path]:
  """One file per sample; for completions also what was given and the original; sounds joined."""
  files = {f"{n:02}": tokens for n, tokens in enumerate(samples)}
  if kept:
    files = {f"{n // _PER_ROW:02}-drawn{n % _PER_ROW + 1}": x for n, x in enumerate(samples)}
    for n, (example, known) in enumerate(zip(examples, kept, strict=True)):
      files[f"{n:02}-given"] = example[:known]
      files[f"{n:02}-original"] = example
  paths = []
  for name, tokens in sorted(files.items()):
    if modality == "audio":
      paths.append(stem.with_name(f"{stem.name}-{name}.wav"))
      data.write_wav(paths[-1], data.mu_law_decode(tokens))
    else:
      paths.append(stem.with_name(f"{stem.name}-{name}.txt"))
      paths[-1].write_bytes(tokens.tobytes())
  if modality == "audio" and len(samples) > 1:
    silence = np.zeros(round(_SILENCE * audio.SAMPLE_RATE), np.float32)
    sounds = [x for tokens in samples for x in (silence, data.mu_law_decode(tokens))]
    paths.append(stem.with_name(f"{stem.name}-all.wav"))
    data.write_wav(paths[-1], np.concatenate(sounds[1:]))
  return paths


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
