"""`make quickstart` from end to end, with a model that learns nothing in two steps."""

import pathlib
import re

import pytest

from experiments import quickstart
from tests.helpers.paths import ROOT


@pytest.mark.one_day_in_six(4)
@pytest.mark.promotes
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_it_ends_with_the_score_and_pictures_that_exist(tmp_path, capsys):
  tiny = ["--config.model.width=8", "--config.train.steps=2", "--config.train.log_every=1"]
  assert quickstart.main([f"--workdir={tmp_path / 'run'}", *tiny]) == 0
  said = capsys.readouterr().out
  _, _, end = said.partition("Done in ")
  score, _, paths = end.partition("Look at:\n")
  paths, _, last = paths.partition("A model that an H200 trained")
  (weights,) = re.findall(r"--weights=(\S+) ", last)
  assert (ROOT / weights / "model.safetensors").exists()
  assert "bits/dim on held-out images, 8.00 before training" in score
  names = [pathlib.Path(line.strip()) for line in paths.splitlines()]
  kinds = [name.name.partition("-")[0] for name in names]
  pictures = ["samples", "completions", "attention", "averages", "patterns.png", "curve.png"]
  assert kinds == [*pictures, "report.html"]
  assert all(name.stat().st_size > 1_000 for name in names)
