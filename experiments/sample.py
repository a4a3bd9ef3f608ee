"""Draws samples from the weights of a run, or from an export: pictures, texts or sounds.

  python -m experiments.sample --workdir=DIR --num=16 [--temperature=1.0] [--top_k=K] [--top_p=P]
  python -m experiments.sample --workdir=DIR --num=16 --keep=0.5
  python -m experiments.sample --workdir=DIR --num=16 --prompt=FILE [--prompt=FILE ...] [--keep=0.5]
  python -m experiments.sample --weights=DIR [--out=DIR] --num=16 ...

The first form samples from nothing. --keep completes held-out examples of the test split, of which
it keeps that share; --prompt completes files: pictures of the model's size, texts, WAV files, each
of its own length. Samples are sharded over the devices there are. The files are written into
DIR/samples/STEP/; sounds also all in one, with silence between them. A name has the seed and, if
they are given, temperature, top_k and top_p, and a number where an earlier run has taken that name.
--average=false takes a run's weights after the last update instead of their averages, and writes
into DIR/samples/last-update/STEP/.
--weights takes the folder of an export; DIR of the files is then that of --out, or runs/NAME. With
--weights=experiments/pretrained/cifar10 no data are needed: held-out images lie beside the weights,
which are taken unless --data_path=PATH says where the data are.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from experiments import cli
from experiments import sources
from sparse_flax import data
from sparse_flax import sample
from sparse_flax.model import order as order_lib
from sparse_flax.run import files
from sparse_flax.sample import files as sample_files
from sparse_flax.sample import pictures
from sparse_flax.sample.files import PER_ROW
from sparse_flax.view.report import samples as samples_lib

SHOWN, SHOWN_BYTES = 3, 600  # texts that are printed, and of each


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  sources.add_flags(
    parser, out="with --weights: gets samples/STEP/; default: runs/NAME of the export"
  )
  parser.add_argument("--num", type=int, default=16, help="samples in all")
  parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest byte")
  parser.add_argument("--top_k", type=int, help="draw from the K likeliest bytes only")
  parser.add_argument("--top_p", type=float, default=1.0, help="from the likeliest with this share")
  parser.add_argument("--prompt", action="append", help="a file to complete; may be given again")
  parser.add_argument("--keep", type=float, help="share of each example to keep, in (0, 1)")
  parser.add_argument("--seed", type=int, default=0)
  cli.add_compilation_cache(parser)
  options = vars(parser.parse_args(argv))
  with cli.readable_errors():
    cli.keep_compiled(options.pop("compilation_cache"))
    named = {name: options[name] for name in ("workdir", "weights", "out", "step", "average")}
    sources.check(**named)
    paths = run(**options, on_programs=_say_what_computes)
  texts = [path for path in paths if path.suffix == ".txt" and "-original" not in path.stem]
  for path in texts[:SHOWN]:
    print(f"--- {path.name}\n{beginning(path.read_bytes())}")
  for path in paths:
    print(path)
  page = paths[0].with_name(samples_lib.PAGE)
  if page.exists():
    flags = sources.flags_of(**(named | dict(step=page.parent.name)))
    command = _again(flags)
    print(f"{page} is older than these; to make it again: {command}", file=sys.stderr)
  return 0


def beginning(text: bytes) -> str:
  """Of a text, as it may be printed."""
  return pictures.printable(text[:SHOWN_BYTES]).rstrip()


def run(
  workdir: str | os.PathLike | None = None,
  *,
  weights: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
  num: int = 16,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float = 1.0,
  prompt: Sequence[str | os.PathLike] | None = None,
  keep: float | None = None,
  seed: int = 0,
  step: int | None = None,
  average: bool | None = None,
  data_path: str | None = None,
  on_programs: Callable[[str, str], None] = lambda prompts, steps: None,
) -> list[epath.Path]:
  """Draws `num` samples from the run in `workdir`, or an export; returns the files written.

  `on_programs` is told what computes the attention, as by `sample.generate`.

  Raises:
    ValueError: an option makes no sense, or the prompt does not fit the model.
  """
  options = dict(num=num, temperature=temperature, top_k=top_k, top_p=top_p)
  sample.check_options(**options, prefix="--")
  if not 0 <= seed < 2**32:
    raise ValueError(f"--seed={seed}: must be a whole number in [0, 2**32)")
  if keep is not None and not 0.0 < keep < 1.0:
    raise ValueError(f"--keep={keep}: must be between 0 and 1")
  source = sources.read(workdir, weights, out=out, step=step, average=average, data_path=data_path)
  config = source.config
  examples, prompt_sizes = _examples(source, num=num, prompt=prompt, keep=keep)
  seq_len = config.model.seq_len
  progress, start = cli.Progress("sampling", num * seq_len, "bytes"), time.monotonic()
  samples = sample.generate(
    source.graphdef,
    source.params,
    key=jax.random.key(seed),
    **options,
    # Sample r completes example r // PER_ROW.
    prompts=[examples[r // PER_ROW][: prompt_sizes[r // PER_ROW]] for r in range(num)]
    if prompt_sizes
    else None,
    mesh=sample.row_mesh(num),
    on_progress=lambda done, steps: progress(num * done),
    on_programs=on_programs,
  )
  progress.end()
  seconds = time.monotonic() - start
  rate = num * seq_len / seconds
  print(f"sampled {num} x {seq_len:,} bytes in {seconds:.1f} s, {rate:,.0f} bytes/s")
  folder = source.drawn
  folder.mkdir(parents=True, exist_ok=True)
  named = ("temperature", "top_k", "top_p")  # what was kept is seen in the files
  stem = sample_files.claim_stem(
    folder,
    config.model.modality,
    kind="completions" if prompt_sizes else "samples",
    seed=seed,
    options={name: options[name] for name in named if options[name] != run.__kwdefaults__[name]},
  )
  if config.model.modality == "image":
    paths = [stem.with_name(f"{stem.name}.png")]
    shape, order = config.model.position_shape, order_lib.Order.of(config.model)
    sample_files.write_grid(paths[0], shape, samples, examples, prompt_sizes, order)
  else:
    modality = config.model.modality
    paths = sample_files.write_sequences(stem, modality, samples, examples, prompt_sizes)
  page = folder / samples_lib.PAGE
  if page.exists():
    older = samples_lib.as_older(page.read_text(), command=_again(source.flags))
    files.write(page, older.encode())
  return paths


def _again(flags: str) -> str:
  """What makes the report that has all samples."""
  return f"python -m experiments.visualize {flags}"


def _say_what_computes(prompts: str, steps: str) -> None:
  of_prompts = f", of the prompts by {prompts}" if prompts else ""
  print(f"attention of the steps by {steps}{of_prompts}", file=sys.stderr)


def _examples(
  source: sources.Source,
  *,
  num: int,
  prompt: Sequence[str | os.PathLike] | None,
  keep: float | None,
) -> tuple[list[np.ndarray], list[int]]:
  """What to complete, one for PER_ROW samples, and how many bytes of each are given."""
  count, config = -(-num // PER_ROW), source.config
  if prompt is None and keep is None:
    return [], []
  if prompt is None:
    tokens = _held_out(source, count)
    return list(tokens), [max(1, round(keep * config.model.seq_len))] * count
  if len(prompt) > count:
    raise ValueError(
      f"--num={num}: must be at least {PER_ROW * (len(prompt) - 1) + 1}, so that each of "
      f"{len(prompt)} prompts gets some of its {PER_ROW} completions"
    )
  if keep is None and config.model.modality == "image":
    keep = 0.5
  examples = [sample_files.read_prompt(path, config.model) for path in prompt]
  prompt_sizes = [x.size if keep is None else round(keep * x.size) for x in examples]
  for path, known in zip(prompt, prompt_sizes, strict=True):
    if not 0 < known < config.model.seq_len:
      raise ValueError(
        f"--prompt={path}: {known:,} bytes are to be kept; a sample has "
        f"{config.model.seq_len:,}: choose a --keep between 0 and 1 that leaves some to draw"
      )
  # Prompts take turns where there are more samples than four of each.
  turns = [n % len(examples) for n in range(count)]
  return [examples[n] for n in turns], [prompt_sizes[n] for n in turns]


def _held_out(source: sources.Source, count: int) -> np.ndarray:
  """The first `count` whole sequences of the test split."""
  dataset = source.open_dataset("test")
  seq_len = source.config.model.seq_len
  windows = data.eval_batches(dataset, seq_len=seq_len, min_context=0, batch_size=1)
  # The last window of a text or a recording is padded, or repeats bytes and scores only its end.
  whole = (tokens[0] for tokens, scored in windows if scored.all())
  chosen = list(itertools.islice(whole, count))
  if len(chosen) < count:
    raise ValueError(
      f"--num={PER_ROW * count}: at most {PER_ROW * len(chosen)}; the test split of "
      f"{dataset.name} has {len(chosen)} examples of {seq_len:,} bytes for {PER_ROW} completions "
      f"each"
    )
  return np.stack(chosen)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
