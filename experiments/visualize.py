"""Draws where the heads of a trained model attend, its masks and its training curve.

  python -m experiments.visualize --workdir=DIR [--layers=0,1] [--num=4] [--seed=0] [--step=N]
  python -m experiments.visualize --weights=DIR [--out=DIR] ...
  python -m experiments.visualize --masks=docs/pictures/masks.png

The first form predicts places of a held-out example and shows, per layer and head, what they
attend to, and where they attend on the average of --examples=16; the files are written into
DIR/samples/STEP/. One of them, report.html, has everything in it, also the samples that
experiments.sample has put there: open it in a browser to choose layer, head and place. --kinds
names what each head is for (rows, columns, positional memory, data-dependent), by its average over
64 examples: in a table, in kinds-seedN.json, which has the rule, and above the averages.
--average=false takes a run's weights after the last update instead of their averages, and writes
into DIR/samples/last-update/STEP/. The second form takes an export instead of a run, and writes
into --out, or runs/NAME. The third draws the patterns of the paper and needs no run.
"""

import json
import os
import sys
from collections.abc import Sequence

import matplotlib.figure
import ml_collections
import numpy as np
from etils import epath

from experiments import cli
from experiments import sources
from sparse_flax import data
from sparse_flax.model import LEARNED_NAMES
from sparse_flax.model import levels
from sparse_flax.run import files
from sparse_flax.train import metrics
from sparse_flax.view import averages as averages_lib
from sparse_flax.view import chosen as chosen_lib
from sparse_flax.view import kinds as kinds_lib
from sparse_flax.view import layers as layers_lib
from sparse_flax.view import maps as maps_lib
from sparse_flax.view import masks as masks_lib
from sparse_flax.view import report
from sparse_flax.view import run as run_lib
from sparse_flax.view.report import charts
from sparse_flax.view.report import samples as samples_lib

_MOST_LAYERS = 8  # drawn without --layers
_PNG_BITS = 5.73  # per dim of the 50,000 training images of CIFAR-10
_EXAMPLES, _EXAMPLES_FOR_KINDS, _MOST_EXAMPLES = 16, 64, 1_024
_MOST_PLACES = 64  # to choose from in the report
_MAP_BYTES = 2**25  # of all maps of the report, before they are compressed


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  sources.add_flags(
    parser, out="with --weights: gets samples/STEP/; default: runs/NAME of the export"
  )
  parser.add_argument("--layers", help="numbers with commas; default: all, at most 8 of them")
  parser.add_argument("--num", type=int, default=4, help="predicted places")
  parser.add_argument(
    "--examples",
    type=int,
    help=f"inputs to average over; default: {_EXAMPLES}, with --kinds {_EXAMPLES_FOR_KINDS}",
  )
  parser.add_argument("--seed", type=int, default=0, help="picks the examples and the places")
  parser.add_argument("--kinds", action="store_true", help="names what each head is for")
  parser.add_argument("--masks", metavar="FILE.png", help="draw the paper's patterns instead")
  cli.add_compilation_cache(parser)
  options = vars(parser.parse_args(argv))
  masks = options.pop("masks")
  named = {name: options[name] for name in ("workdir", "weights", "out", "step", "average")}
  given = [name for name in ("workdir", "weights") if named[name] is not None]
  if masks is not None and given:
    cli.fail(f"--masks and --{given[0]}: give one of them")
  with cli.readable_errors():
    cli.keep_compiled(options.pop("compilation_cache"))
    if masks is not None:
      print(draw_masks(masks))
      return 0
    sources.check(**named)
    options["layers"] = _parse_layers(options["layers"])
    for path in run(**options):
      print(path)
  return 0


def draw_masks(path: str | os.PathLike) -> epath.Path:
  """Writes the README's picture."""
  path = epath.Path(path)
  if path.suffix != ".png":
    raise ValueError(f"--masks={path}: must end in .png")
  return _save(masks_lib.draw_overview(), path)


def run(
  workdir: str | os.PathLike | None = None,
  *,
  weights: str | os.PathLike | None = None,
  out: str | os.PathLike | None = None,
  layers: Sequence[int] | None = None,
  num: int = 4,
  examples: int | None = None,
  seed: int = 0,
  kinds: bool = False,
  step: int | None = None,
  average: bool | None = None,
  data_path: str | None = None,
) -> list[epath.Path]:
  """Draws what the run in `workdir`, or an export, has learned; returns the files written.

  Args:
    workdir: the run's folder; None where there are `weights`.
    weights: the folder of an export.
    out: with `weights`: gets samples/STEP/; None is runs/NAME of the export.
    layers: which to draw; None is all, or 8 of them spread over the depth.
    num: predicted places of the example.
    examples: how many to average over, at most; the first is the one that is drawn. None is 16, or
      64 for kinds.
    seed: picks the examples of the test split, and the places.
    kinds: prints and writes what each head is for, by the rule of `sparse_flax.view.kinds`.
    step: of the run's checkpoint; None is the newest.
    average: False draws the weights after the last update of a run that averages them.
    data_path: where the data are now, if they have moved.

  Raises:
    ValueError: an option makes no sense, or the model has no such layer.
  """
  if not 0 <= seed < 2**32:
    raise ValueError(f"--seed={seed}: must be a whole number in [0, 2**32)")
  if examples is None:
    examples = _EXAMPLES_FOR_KINDS if kinds else _EXAMPLES
  fewest, why = (2, " with --kinds") if kinds else (1, "")
  if not fewest <= examples <= _MOST_EXAMPLES:
    numbers = f"from {fewest} to {_MOST_EXAMPLES}{why}"
    raise ValueError(f"--examples={examples}: must be a whole number {numbers}")
  source = sources.read(workdir, weights, out=out, step=step, average=average, data_path=data_path)
  config, graphdef, params, step = source[:4]
  model, unit = config.model, metrics.UNIT[config.model.modality]
  layers = _check_layers(layers, layers_lib.num_layers(model))
  layout = maps_lib.Layout.of(model)
  places = _pick_places(layout, num=num, seed=seed)
  dataset = source.open_dataset("test")
  inputs = _pick_inputs(dataset, examples, seq_len=model.seq_len, seed=seed)
  if kinds and len(inputs) < 2:
    raise ValueError("--kinds: the test split has one example only, and two must differ")
  tokens = inputs[0]
  maps = layers_lib.weights(graphdef, params, tokens, places, layout)
  attention = _attention(model, graphdef, params, inputs, layout, seed=seed)

  folder = source.drawn
  folder.mkdir(parents=True, exist_ok=True)
  records = run_lib.read_lines(source.folder / "metrics.jsonl")
  figures = {
    f"attention-layer{layer:03}-seed{seed}.png": lambda layer=layer: layers_lib.draw(
      model, layer, tokens, places, maps[layer]
    )
    for layer in layers
  }
  names, told = attention.names, []
  if kinds:
    heads = [layers_lib.head_names(model, layer) for layer in range(len(names))]
    told = kinds_lib.kinds_of(attention.averages, heads)
    names = _with_kinds(names, told)
  figures[f"averages-seed{seed}.png"] = lambda: averages_lib.draw(attention.averages, layers, names)
  if any(name not in LEARNED_NAMES for name in model.attention_layers):
    figures["patterns.png"] = lambda: _draw_patterns(model)
  if any(name in LEARNED_NAMES for name in model.attention_layers):
    found = chosen_lib.shares(graphdef, params, inputs)
    size = model.learned.block_size
    figures[f"chosen-seed{seed}.png"] = lambda: chosen_lib.draw(found, size)
  if any("bits_per_byte" in record for record in records):
    figures["curve.png"] = lambda: _draw_curve(config, records)
  paths, progress = [], cli.Progress("drawing", len(figures), "pictures")
  for name, draw in figures.items():
    paths.append(_save(draw(), folder / name))
    progress(len(paths))
  progress.end()
  if kinds:
    paths.append(folder / f"kinds-seed{seed}.json")
    about = dict(
      step=step,
      ema=source.averaged,
      data=dataset.identity,
      split=dataset.split,
      inputs=attention.averages.num_inputs,
      places=attention.averages.num_places,
      rule=kinds_lib.RULE,
    )
    files.write(paths[-1], (json.dumps(about | dict(layers=told), indent=1) + "\n").encode())
    print(kinds_lib.table(told), flush=True)
  evaluations = run_lib.read_lines(source.folder / "evaluations.jsonl")
  page = report.build(
    title=f"{epath.Path(workdir or weights).absolute().name}, step {step:,}",
    facts=run_lib.facts(
      config,
      params,
      step=step,
      averaged=source.averaged,
      records=records,
      evaluations=evaluations,
      unit=unit,
    ),
    records=records,
    unit=unit,
    reference=_reference(config),
    samples=run_lib.read_samples(folder),
    sample_command=f"python -m experiments.sample {source.flags} --keep=0.5",
    attention=attention,
  )
  paths.append(folder / samples_lib.PAGE)
  files.write(paths[-1], page.encode())
  return paths


def _pick_inputs(dataset: data.Dataset, count: int, *, seq_len: int, seed: int) -> np.ndarray:
  """At most `count` different examples: uint8 [N, T]."""
  batch_at = data.make_batches(dataset, seq_len=seq_len, batch_size=1, seed=seed)
  inputs = {batch_at(n).tobytes(): batch_at(n)[0] for n in range(count)}
  return np.stack(list(inputs.values()))


def _attention(
  model: ml_collections.ConfigDict, graphdef, params: dict, inputs, layout, *, seed: int
) -> report.Attention:
  """The maps of the first input, for as many places as there is room for, and the averages."""
  num_layers, num_heads = layers_lib.num_layers(model), layers_lib.most_heads(model)
  bytes_of_place = num_layers * num_heads * layout.num_cells
  places = maps_lib.spread_places(layout, max(4, min(_MOST_PLACES, _MAP_BYTES // bytes_of_place)))
  averaged = averages_lib.pick_places(layout, num_heads, seed=seed)
  maps = maps_lib.make_maps(graphdef, params, inputs[0], places, layout)
  progress = cli.Progress("averaging attention over", len(inputs), "inputs")
  averages = averages_lib.average(graphdef, params, inputs, averaged, layout, on_progress=progress)
  progress.end()
  named = [layers_lib.head_names(model, layer) for layer in range(num_layers)]
  return report.Attention(
    layout=layout,
    tokens=inputs[0] if layout.order is None else layout.order.drawn(inputs[0]),
    maps=maps,
    averages=averages,
    names=[names + ["no such head"] * (num_heads - len(names)) for names in named],
  )


def _with_kinds(names: Sequence[Sequence[str]], layers: Sequence[dict]) -> list[list[str]]:
  """The names of heads with their kinds; those that a layer lacks have none."""
  found = [list(of_layer) for of_layer in names]
  for layer in layers:
    for h, head in enumerate(layer["heads"]):
      found[layer["layer"]][h] += f"\nkind: {head['kind']}"
  return found


def _parse_layers(text: str | None) -> list[int] | None:
  try:
    return None if text is None else [int(word) for word in text.split(",")]
  except ValueError as error:
    raise ValueError(f"--layers={text}: must be whole numbers with commas, as in 0,1") from error


def _check_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
  if layers is None:
    spread = np.linspace(0, num_layers - 1, min(num_layers, _MOST_LAYERS))
    return [int(layer) for layer in spread.round()]
  unknown = [layer for layer in layers if not 0 <= layer < num_layers]
  if unknown or not layers:
    given = ",".join(map(str, layers))
    raise ValueError(f"--layers={given}: must be numbers from 0 to {num_layers - 1}")
  return sorted(set(layers))


def _pick_places(layout: maps_lib.Layout, *, num: int, seed: int) -> np.ndarray:
  most = layout.num_places - layout.num_places // 8
  if not 1 <= num <= most:
    raise ValueError(f"--num={num}: must be a whole number from 1 to {most}")
  return maps_lib.random_places(layout, num, seed=seed)


def _reference(config: ml_collections.ConfigDict) -> tuple[str, float] | None:
  return ("PNG on CIFAR-10", _PNG_BITS) if config.data.name.startswith("cifar10") else None


def _draw_patterns(model: ml_collections.ConfigDict) -> matplotlib.figure.Figure:
  """Of each level; rows of an inner one are groups."""
  named, counts, found = {}, {}, levels.specs_of(**dict(model.items()))
  for level in found:
    for entry, pattern in zip(level.attention_layers, level.patterns, strict=True):
      if entry in LEARNED_NAMES:
        continue
      name = entry if isinstance(entry, str) else " / ".join(entry)
      at = f"{name}, groups of {level.factor}" if level.name else name
      if level.depth:
        named[at], counts[at] = pattern, level.num_heads
  T = min(model.seq_len, 4 * max(level.stride for level in found))
  return masks_lib.draw_layers(list(named.items()), T=T, num_heads=list(counts.values()))


def _draw_curve(
  config: ml_collections.ConfigDict, records: Sequence[dict]
) -> matplotlib.figure.Figure:
  """Bits per byte against steps, training and validation."""
  figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
  axes = figure.subplots()
  for field, label, style in (
    ("bits_per_byte", "training", dict(color="#0072b2", lw=1)),
    ("validation_bits_per_byte", "validation", dict(color="#d55e00", marker="o")),
  ):
    points = [
      (record["step"], record[field]) for record in records if charts.is_number(record.get(field))
    ]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, **style)
  if reference := _reference(config):
    name, bits = reference
    axes.axhline(bits, color="0.3", linestyle=":", label=f"{name}, {bits}")
  axes.set(xlabel="step", ylabel=metrics.UNIT[config.model.modality])
  axes.grid(alpha=0.3)
  axes.legend()
  return figure


def _save(figure: matplotlib.figure.Figure, path: epath.Path) -> epath.Path:
  # Neither date nor version inside: the same picture is the same file.
  with path.open("wb") as file:
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
  return path


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
