"""Reads from a run's folder what its report shows beside attention; see experiments.visualize."""

import json
from collections.abc import Sequence

import jax
import ml_collections
from etils import epath

from sparse_flax.model import levels
from sparse_flax.train import metrics
from sparse_flax.view.report import charts
from sparse_flax.view.report import SAMPLE_BYTES
from sparse_flax.view.report.samples import Sample
from sparse_flax.view.report.samples import SUFFIXES


def read_lines(path: epath.Path) -> list[dict]:
  """The records of a file of JSON lines that have a step; none without the file.

  A line that is being written now, or that a disk has damaged, is left out.
  """
  if not path.exists():
    return []
  records = []
  for line in path.read_bytes().decode(errors="replace").splitlines(keepends=True):
    try:
      record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
      continue
    if isinstance(record, dict) and charts.is_number(record.get("step")):
      records.append(record)
  return records


def read_samples(folder: epath.Path) -> list[Sample]:
  """The files that experiments.sample may have written, in order, as long as there is room.

  Completions come first: of these the smallest number says the most.
  """
  samples, left = [], SAMPLE_BYTES
  paths = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
  for path in sorted(paths, key=lambda path: path.name):
    if not path.name.startswith(("completions-", "samples-")):
      continue
    size = path.stat().length
    fits = size <= left
    samples.append(Sample(path.name, path.read_bytes() if fits else None))
    left -= size if fits else 0
  return samples


def facts(
  config: ml_collections.ConfigDict,
  params: dict,
  *,
  step: int,
  averaged: bool,
  records: Sequence[dict],
  evaluations: Sequence[dict],
  unit: str,
) -> list[tuple[str, str]]:
  """What a run is, as names and values.

  Args:
    config: of the run.
    params: its weights.
    step: of the checkpoint.
    averaged: whether the weights are the averaged ones.
    records: of metrics.jsonl.
    evaluations: of evaluations.jsonl.
    unit: of the scores.
  """
  model = config.model
  found = levels.specs_of(**model)
  join = lambda values: " / ".join(dict.fromkeys(map(str, values)))
  named = [
    entry if isinstance(entry, str) else " / ".join(entry)
    for level in found
    for entry in (level.attention_layers if level.depth else ())
  ]
  layers, groups = sum(level.depth for level in found), [level.factor for level in found[1:]]
  entries = [
    ("data", f"{config.data.name} ({model.modality})"),
    ("step", f"{step:,}"),
    ("weights", metrics.AVERAGED[averaged]),
    ("parameters", f"{sum(x.size for x in jax.tree.leaves(params)):,}"),
    ("layers x heads", f"{layers} x {join(level.num_heads for level in found)}"),
    (
      "width, context",
      f"{join(f'{level.width:,}' for level in found)}, {model.seq_len:,} bytes",
    ),
    ("attention", ", ".join(named)),
  ]
  if groups:
    entries.append(("inner layers", f"on groups of {' and '.join(map(str, groups))} bytes"))
  # Of these weights, and on the whole split. Training scores the averaged ones where it keeps them.
  scored = lambda line: line.get("bytes_scored") == line.get("bytes_in_split")
  validations = records if averaged == (config.train.ema_decay > 0) else []
  tests = [
    line
    for line in evaluations
    if line.get("split") == "test" and line.get("ema", True) == averaged and scored(line)
  ]
  for split, field, lines in (
    ("validation", "validation_bits_per_byte", validations),
    ("test", "bits_per_byte", tests),
  ):
    scores = [
      line[field] for line in lines if line["step"] == step and charts.is_number(line.get(field))
    ]
    if scores:
      entries.append((f"{split} score", f"{scores[-1]:.3f} {unit}"))
  return entries
