"""Scores the weights of a run, or of an export, on a split, in bits per dim or byte.

  python -m experiments.evaluate --workdir=DIR [--split=test] [--min_context=N] [--num=N]
    [--average=false] [--step=N] [--data_path=PATH]
  python -m experiments.evaluate --weights=DIR [--out=DIR]
  python -m experiments.evaluate --workdir=DIR --context_curve=128

The second form scores an export. experiments/pretrained/cifar10 is one that has held-out images
beside the weights: they are scored unless --data_path says where the data are. --num=N scores the
first N sequences of the split alone; --average=false scores a run's weights after the last update
instead of their averages. The result is printed, with its standard error over the sequences, and
appended to evaluations.jsonl in the run's folder, or that of --out.

The third form scores the last 128 bytes of each window of a text or a recording, with no byte
before them, with a stride of bytes, twice that, and so on up to the whole window: the same bytes
each time. It prints a table and writes context_curve.json instead.
"""

import json
import os
import sys
from collections.abc import Sequence

import ml_collections

from experiments import cli
from experiments import sources
from sparse_flax import evaluate
from sparse_flax import run as run_lib
from sparse_flax.run import files
from sparse_flax.train import metrics


def run(
  workdir: str | os.PathLike | None = None,
  *,
  weights: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
  split: str = "test",
  min_context: int | None = None,
  num: int | None = None,
  average: bool | None = None,
  context_curve: int | None = None,
  step: int | None = None,
  data_path: str | None = None,
) -> dict:
  """Scores the newest checkpoint (or that of `step`) or an export, prints and records the score.

  With `context_curve`, the last bytes of each window against the context before them.
  """
  if context_curve is not None and min_context is not None:
    raise ValueError(f"--{min_context=}: is not for --context_curve, which chooses contexts")
  where = dict(out=out, needs_folder=False, data_path=data_path)
  source = sources.read(workdir, weights, step=step, average=average, **where)
  config = source.config
  contexts = [] if context_curve is None else _contexts_of(config, context_curve)
  dataset = source.open_dataset(split)
  how = dict(dataset=dataset, num=num, averaged=source.averaged, step=source.step)
  if contexts:
    progress = cli.Progress("scoring", len(contexts), "contexts")
    how |= dict(last=context_curve, on_progress=progress)
    result = evaluate.context_curve(config, source.params, **how)
    progress.end()
  else:
    num_bytes = min(dataset.num_bytes, (num or dataset.num_bytes) * config.model.seq_len)
    progress = cli.Progress("scoring", num_bytes, "bytes")
    how |= dict(min_context=min_context, on_progress=progress)
    result = evaluate.evaluate(config, source.params, **how)
    progress.end()
  if weights is not None:
    result["weights"] = os.fspath(weights)
    if source.matrices:
      result["matrices"] = source.matrices
  elif begun := run_lib.begun_from(workdir):
    result["init_from"] = begun
  if source.folder is not None:
    source.folder.mkdir(parents=True, exist_ok=True)
    if context_curve is None:
      metrics.append_line(source.folder / "evaluations.jsonl", result)
    else:
      told = json.dumps(result, indent=1) + "\n"
      files.write(source.folder / "context_curve.json", told.encode())
  say = describe if context_curve is None else describe_curve
  print(say(result, unit=metrics.UNIT[config.model.modality]), flush=True)
  return result


def _contexts_of(config: ml_collections.ConfigDict, last: int) -> list[int]:
  try:
    return evaluate.contexts_of(config, last=last)
  except ValueError as error:
    raise ValueError(f"--context_curve={last}: {error}") from error


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  sources.add_flags(parser, out="with --weights: a folder for evaluations.jsonl; default: none")
  parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
  parser.add_argument("--min_context", type=int, help="default: the config's eval.min_context")
  parser.add_argument(
    "--context_curve", type=int, metavar="BYTES", help="scores so many bytes of each window"
  )
  parser.add_argument("--num", type=int, help="sequences, the first of the split; default: all")
  cli.add_compilation_cache(parser)
  options = vars(parser.parse_args(argv))
  with cli.readable_errors():
    named = {name: options[name] for name in ("workdir", "weights", "out", "step", "average")}
    cli.keep_compiled(options.pop("compilation_cache"))
    sources.check(**named)
    run(**options)
  return 0


def describe(result: dict, *, unit: str) -> str:
  """The score, and below it what it is a score of."""
  scored = f"{result['bytes_scored']:,} of {result['bytes_in_split']:,} bytes"
  right, error = "accuracy" in result, result["standard_error"]
  given = "" if error is None else f", standard error {error:.4f}"
  lines = [
    f"{result['bits_per_byte']:.4f} {unit}{given}",
    *([f"  right     {100 * result['accuracy']:.1f} % of the answers"] if right else []),
    *_of_what(result, scored, f"{result['context']:,}, at least {result['min_context']:,} known"),
  ]
  return "\n".join(lines)


def describe_curve(result: dict, *, unit: str) -> str:
  """Bits against context, each with its difference from the longest, and what they are of."""
  lines = [f"context  {unit:>17}  more than the longest"]
  tell = lambda value, error: f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")
  for point in result["contexts"]:
    bits = tell(point["bits_per_byte"], point["standard_error"])
    more = tell(point["more"], point["more_error"])
    lines.append(f"{point['context']:>7,}  {bits:>17}  {more:>21}")
  scored = f"the last {result['last']:,} of each window, {result['bytes_scored']:,} bytes"
  lines += _of_what(result, scored, "as above; +- one standard error over windows")
  return "\n".join(lines)


def _of_what(result: dict, scored: str, context: str) -> list[str]:
  data, count, there = result["data"], result["sequences"], result["sequences_in_split"]
  part = f"all {there:,}" if count == there else f"the first {count:,} of {there:,}"
  of = metrics.AVERAGED[result["ema"]]
  of += f", matrices rounded to {result['matrices']}" if "matrices" in result else ""
  where = f", of {result['weights']}" if "weights" in result else ""
  begun = result.get("init_from")
  return [
    f"  data      {data['name']} {data['version']}, {result['split']} split, {data['digest']}",
    f"            {data['remark']}",
    f"  scored    {scored}, {part} sequences",
    f"  context   {context}",
    f"  weights   {of}, step {result['step']:,}{where}",
    *([f"  begun     {run_lib.told(begun)}"] if begun else []),
    f"  computed  {result['dtype']}, attention {result['attention']} on {result['device']}",
  ]


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
