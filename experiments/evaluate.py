"""Scores a run's averaged weights on a whole split, in bits per dim or byte.

  python -m experiments.evaluate --workdir=DIR [--split=test] [--min_context=N] [--step=N]
    [--data_path=PATH]

The result is printed and appended to DIR/evaluations.jsonl.
"""

import sys
from collections.abc import Sequence

from experiments import cli
from sparse_flax import evaluate
from sparse_flax.run import checkpoint
from sparse_flax.train import metrics


def run(
  workdir: str,
  *,
  split: str = "test",
  min_context: int | None = None,
  step: int | None = None,
  data_path: str | None = None,
) -> dict:
  """Scores the newest checkpoint (or that of `step`), prints the score and records it."""
  folder = cli.open_workdir(workdir)
  config, _, params, step = checkpoint.restore_params(folder, step, data_path=data_path)
  dataset = evaluate.open_dataset(config, split)
  progress = cli.Progress("scoring", dataset.num_bytes, "bytes")
  result = evaluate.evaluate(
    config, params, dataset=dataset, min_context=min_context, step=step, on_progress=progress
  )
  progress.end()
  metrics.append_line(folder / "evaluations.jsonl", result)
  print(describe(result, unit=metrics.UNIT[config.model.modality]), flush=True)
  return result


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("--workdir", help="the folder of a training run")
  parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
  parser.add_argument("--min_context", type=int, help="default: the config's eval.min_context")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--data_path", help="where the run's data are now, if they have moved")
  cli.add_compilation_cache(parser)
  args = parser.parse_args(argv)
  with cli.readable_errors():
    cli.keep_compiled(args.compilation_cache)
    run(
      args.workdir,
      split=args.split,
      min_context=args.min_context,
      step=args.step,
      data_path=args.data_path,
    )
  return 0


def describe(result: dict, *, unit: str) -> str:
  """The score, and below it what it is a score of."""
  data = result["data"]
  weights = "averaged (EMA)" if result["ema"] else "as trained, not averaged"
  return "\n".join(
    (
      f"{result['bits_per_byte']:.4f} {unit}",
      f"  data      {data['name']} {data['version']}, {result['split']} split, {data['digest']}",
      f"            {data['remark']}",
      f"  scored    {result['bytes_scored']:,} of {result['bytes_in_split']:,} bytes",
      f"  context   {result['context']:,}, at least {result['min_context']:,} known",
      f"  weights   {weights}, step {result['step']:,}",
      f"  computed  {result['dtype']}, attention {result['attention']} on {result['device']}",
    )
  )


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
