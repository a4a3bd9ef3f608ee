"""The plots of the documents show the committed results."""

import json

import numpy as np
import PIL.Image

from experiments.benchmark import plots
from experiments.benchmark import tables

RESULTS = tables.RESULTS


def test_the_plot_shows_what_was_measured():
  left, right = plots.block_sparse(RESULTS).axes
  ours, dense = (np.asarray(line.get_ydata()) for line in left.lines)
  rows = json.loads((RESULTS / "block_sparse_h100.json").read_text())["rows"]
  times = {
    (row["pattern"], row["density"]): row["ms"]
    for row in rows
    if row["shape"] == "d128_t32768" and row["direction"] == "fwdbwd"
  }
  assert (ours[0], ours[-1]) == (times["random", 0.0625], times["random", 1])
  assert set(dense) == {times["dense", 1.0]}
  assert [f"{bar.get_height():.2f}" for bar in right.patches] == ["0.58", "1.42", "4.90"]


def test_the_plot_of_steps_has_the_fastest_of_each_way():
  result = json.loads((RESULTS / "step_h200.json").read_text())
  for axes, body in zip(plots.steps(RESULTS).axes, result["bodies"], strict=True):
    times = {way: [] for way in ("ours", "pytorch", "jax_cudnn")}
    for row in result["rows"]:
      if row["body"] == body and row["implementation"] in times and row["ms"]:
        times[row["implementation"]].append(row["ms"])
    assert [bar.get_height() for bar in axes.patches] == [min(x) for x in times.values()]


def test_a_curve_ends_with_the_seconds_of_its_run():
  (axes,) = plots.records(RESULTS).axes
  for line in axes.lines:
    folder = RESULTS / "runs" / line.get_label()
    result = json.loads((folder / "evaluation.json").read_text())
    seconds, bits = line.get_data()
    np.testing.assert_allclose(seconds[-1], result["seconds"], atol=1e-3)
    assert (np.diff(seconds) > 0).all() and seconds[0] > 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == result["step"] and bits[-1] == last["validation_bits_per_byte"]


def test_a_context_curve_is_drawn_with_the_errors_of_its_differences(tmp_path):
  bits = {0: 4.0, 8: 3.0, 28: 2.5}
  points = [
    dict(context=x, bits_per_byte=y, standard_error=0.5, more=y - 2.5, more_error=0.1)
    for x, y in bits.items()
  ]
  folder = tmp_path / "runs" / "a run"
  folder.mkdir(parents=True)
  (folder / "context_curve.json").write_text(json.dumps(dict(last=4, sequences=3, contexts=points)))
  (axes,) = plots.contexts(tmp_path).axes
  (container,) = axes.containers
  line, _, (bars,) = container
  np.testing.assert_allclose(line.get_xydata(), [[4, 4.0], [12, 3.0], [32, 2.5]])
  np.testing.assert_allclose([np.ptp(x[:, 1]) for x in bars.get_segments()], 0.2)
  assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "8", "28"]
  assert container.get_label() == "a run, the last 4 of 3 windows"


def test_the_pictures_are_of_these_results(tmp_path, monkeypatch, as_a_user):
  names = ("block-sparse.png", "records.png", "steps.png")
  pixels = lambda path: np.asarray(PIL.Image.open(path).convert("RGB"), float)
  old = [pixels(plots.PICTURES / name) for name in names]
  monkeypatch.setattr(plots, "PICTURES", tmp_path)
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  plots.run(RESULTS)
  # Other versions of matplotlib may draw letters otherwise.
  remedy = "run python -m experiments.benchmark plots"
  for name, before in zip(names, old, strict=True):
    new = pixels(tmp_path / name)
    assert new.shape == before.shape and abs(new - before).mean() < 0.5, f"{name}: {remedy}"
