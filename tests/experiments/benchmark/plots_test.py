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


def test_the_picture_is_of_these_results(tmp_path, monkeypatch, as_a_user):
  old = np.asarray(PIL.Image.open(plots.PICTURES / "block-sparse.png").convert("RGB"), float)
  monkeypatch.setattr(plots, "PICTURES", tmp_path)
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  plots.run(RESULTS)
  new = np.asarray(PIL.Image.open(tmp_path / "block-sparse.png").convert("RGB"), float)
  # Other versions of matplotlib may draw letters otherwise.
  remedy = "run python -m experiments.benchmark plots"
  assert new.shape == old.shape and abs(new - old).mean() < 0.5, remedy
