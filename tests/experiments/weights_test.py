"""Commands that take an export instead of a run, and the choice of a run's weights."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate
from experiments import export
from experiments import sample
from experiments import visualize
from sparse_flax import export as export_lib
from sparse_flax.run import checkpoint
from sparse_flax.run import workdir
from tests.helpers import tiny
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.promotes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """`run`, with averaged weights that predict nothing, unlike the others; `out`, its export."""
  root = tmp_path_factory.mktemp("root")
  config = tiny.config(tiny.text_file(root / "text"))
  params = tiny.random_weights(config)
  averaged = params | {"logits": {"kernel": jnp.zeros((16, 256))}}
  workdir.start(root / "run", config, data={})
  state = {"step": jnp.int32(3), "params": params, "ema": averaged, "opt": jnp.zeros(2)}
  with checkpoint.Checkpoints(root / "run") as checkpoints:
    checkpoints.save(state)
  assert export.main([f"--workdir={root / 'run'}", f"--out={root / 'out'}"]) == 0
  return root


@pytest.mark.one_day_in_six(2)
def test_an_export_is_scored_as_the_run_that_it_is_of(root, tmp_path, capsys):
  expected = evaluate.run(root / "run")
  result = evaluate.run(weights=root / "out")
  assert result == expected | dict(weights=str(root / "out"))
  assert f"averaged (EMA), step 3, of {root / 'out'}" in capsys.readouterr().out
  assert sorted(path.name for path in (root / "out").iterdir()) == ["config.json", export_lib.MODEL]
  assert evaluate.main([f"--weights={root / 'out'}", f"--out={tmp_path / 'in'}", "--num=2"]) == 0
  assert "64 of 100 bytes, the first 2 of 4 sequences" in capsys.readouterr().out
  (line,) = (tmp_path / "in" / "evaluations.jsonl").read_text().splitlines()
  assert json.loads(line)["sequences"] == 2
  assert json.loads(line)["bits_per_byte"] == pytest.approx(8, abs=1e-5)


@pytest.mark.one_day_in_six(2)
def test_a_context_curve_is_printed_and_written(root, tmp_path, capsys):
  flags = [f"--weights={root / 'out'}", f"--out={tmp_path}", "--context_curve=8", "--num=2"]
  assert evaluate.main(flags) == 0
  head, first, *_, last = capsys.readouterr().out.split("  data ")[0].splitlines()
  assert head.split() == ["context", "bits/byte", "more", "than", "the", "longest"]
  assert first.split() == ["0", *["8.0000", "+-", "0.0000"], *["0.0000", "+-", "0.0000"]]
  assert last.split()[0] == "24"
  (path,) = tmp_path.iterdir()  # no line of evaluations.jsonl, which has whole scores
  written = json.loads(path.read_text())
  assert path.name == "context_curve.json" and written["weights"] == str(root / "out")
  assert [x["context"] for x in written["contexts"]] == [0, 8, 16, 24]
  assert (written["sequences"], written["sequences_in_split"], written["last"]) == (2, 3, 8)


@pytest.mark.one_day_in_six(2)
def test_a_score_of_rounded_weights_says_so(root, tmp_path, capsys):
  out = tmp_path / "rounded"
  assert export.main([f"--workdir={root / 'run'}", f"--out={out}", "--dtype=bfloat16"]) == 0
  result = evaluate.run(weights=out)
  assert result["matrices"] == "bfloat16"
  assert "averaged (EMA), matrices rounded to bfloat16, step 3, of" in capsys.readouterr().out
  # Averages that predict nothing are zeros, which rounding leaves.
  assert result["bits_per_byte"] == pytest.approx(8, abs=1e-5)


@pytest.mark.one_day_in_six(0)
def test_averaged_weights_or_those_of_the_last_update(root, tmp_path, capsys):
  out = tmp_path / "out"
  averaged = evaluate.run(root / "run")
  assert evaluate.main([f"--workdir={root / 'run'}", "--average=false"]) == 0
  shown = capsys.readouterr().out
  assert "of the last update (not averaged), step 3" in shown
  line = json.loads((root / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
  assert (averaged["ema"], line["ema"]) == (True, False)
  assert averaged["bits_per_byte"] == pytest.approx(8, abs=1e-5)
  assert abs(line["bits_per_byte"] - 8) > 1e-3
  assert f", standard error {line['standard_error']:.4f}\n" in shown
  # An export of them says which it has.
  assert export.main([f"--workdir={root / 'run'}", f"--out={out}", "--average=false"]) == 0
  found = export_lib.read(out)
  assert (found.step, found.averaged) == (3, False)
  assert evaluate.run(weights=out)["bits_per_byte"] == line["bits_per_byte"]


def test_an_export_of_an_earlier_version_has_averaged_weights():
  found = export_lib.read(tiny.GOLDEN / "export")
  assert (found.step, found.averaged) == (400, True)


@pytest.mark.one_day_in_six(4)
def test_samples_of_an_export(root, tmp_path, monkeypatch, capsys):
  draw = lambda *weights, num, **options: np.full((num, 32), 97, np.uint8)
  monkeypatch.setattr(sample.sample, "generate", draw)
  monkeypatch.chdir(tmp_path)
  (path,) = sample.run(weights=root / "out", num=1)
  assert str(path.parent) == "runs/out/samples/3"
  page = path.with_name("report.html")
  page.write_text("<main></main>")
  flags = f"--weights={root / 'out'}"
  assert sample.main([flags, "--num=1"]) == 0
  again = f"python -m experiments.visualize {flags}"
  assert capsys.readouterr().err.endswith(f" {again}\n") and again in page.read_text()
  (path,) = sample.run(weights=root / "out", out="elsewhere", num=1)
  assert str(path.parent) == "elsewhere/samples/3"
  (tmp_path / "runs" / "out" / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="--out=DIR is missing: its default, runs/out, is the fold"):
    sample.run(weights=root / "out", num=1)


@pytest.mark.one_day_in_six(1)
def test_samples_of_the_weights_after_the_last_update(root, monkeypatch, capsys):
  drawn_by = []

  def draw(graphdef, params, *, num, **options):
    drawn_by.append(params["logits"]["kernel"])
    return np.full((num, 32), 97, np.uint8)

  monkeypatch.setattr(sample.sample, "generate", draw)
  flags = f"--workdir={root / 'run'}"
  for average in (None, True, False):
    (path,) = sample.run(root / "run", num=1, average=average)
    apart = "last-update/" if average is False else ""
    assert str(path.parent) == f"{root / 'run'}/samples/{apart}3"
  assert [bool(kernel.any()) for kernel in drawn_by] == [False, False, True]
  page = path.with_name("report.html")
  page.write_text("<main></main>")
  assert sample.main([flags, "--num=1", "--average=false"]) == 0
  again = f"python -m experiments.visualize {flags} --step=3 --average=false"
  assert capsys.readouterr().err.endswith(f" {again}\n") and again in page.read_text()
  page.unlink()


@pytest.mark.one_day_in_six(3)
def test_pictures_of_the_weights_after_the_last_update(root, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(root / "run", run, ignore=shutil.ignore_patterns("samples", "evaluations.jsonl"))
  evaluate.run(run)
  scored = evaluate.run(run, average=False)
  argv = [f"--workdir={run}", "--average=false", "--num=1", "--examples=2", "--layers=0"]
  assert visualize.main(argv) == 0
  page = (run / "samples" / "last-update" / "3" / "report.html").read_text()
  assert "of the last update (not averaged)" in page
  assert f"{scored['bits_per_byte']:.3f} bits/byte" in page and "8.000 bits/byte" not in page
  assert f"experiments.sample --workdir={run} --step=3 --average=false --keep" in page


@pytest.mark.one_day_in_six(4)
def test_pictures_of_an_export(root, tmp_path):
  evaluate.run(weights=root / "out", out=tmp_path / "to")
  evaluate.run(weights=root / "out", out=tmp_path / "to", num=1)
  argv = [f"--weights={root / 'out'}", f"--out={tmp_path / 'to'}", "--num=1", "--examples=2"]
  assert visualize.main(argv) == 0
  page = (tmp_path / "to" / "samples" / "3" / "report.html").read_text()
  assert "<title>out, step 3" in page and "8.000 bits/byte" in page
  command = f"experiments.sample --weights={root / 'out'} --out={tmp_path / 'to'} --keep=0.5"
  assert command in page


@pytest.mark.parametrize("command", [evaluate, sample, visualize], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      "--workdir={golden}/float32 --weights={golden}/export",
      "--workdir and --weights: give one of them",
    ),
    ("", "--workdir=DIR is missing: the folder of a training run, or --weights=DIR, that of an"),
    ("--weights=/no/where", "--weights=/no/where: no such folder"),
    (
      "--weights={golden}/float32",
      "has no model.safetensors, so it is not the folder of an export",
    ),
    ("--weights={golden}/export --step=3", "--step: is for --workdir; an export has one step"),
    (
      "--weights={golden}/export --average=true",
      "--average: is for --workdir; an export has one set of weights, and says which",
    ),
    (
      "--workdir={golden}/float32 --average=no",
      "argument --average: must be true or false, not 'no'",
    ),
    ("--workdir={golden}/float32 --out=x", "--out: is for --weights"),
    ("--weights={golden}/export --out={golden}/text", "/text: is no folder"),
  ],
)
def test_flags_that_do_not_go_together(command, flags, message, capsys):
  _fails(command, flags.format(golden=tiny.GOLDEN).split(), message, capsys)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      "--workdir={golden}/float32 --context_curve=8 --min_context=8",
      "--min_context=8: is not for --context_curve, which chooses contexts",
    ),
    (
      f"--weights={ROOT}/experiments/pretrained/cifar10 --context_curve=8",
      "--context_curve=8: config.model.modality='image': must be 'text' or 'audio' for a context",
    ),
    (
      "--workdir={golden}/float32 --context_curve=33",
      "--context_curve=33: last=33: must be a whole number from 1 to 32, the model's seq_len",
    ),
  ],
)
def test_flags_of_evaluate(flags, message, capsys):
  _fails(evaluate, flags.format(golden=tiny.GOLDEN).split(), message, capsys)


def _fails(command, argv, message, capsys):
  with pytest.raises(SystemExit) as end:
    command.main(argv)
  said = capsys.readouterr().err.strip()
  assert end.value.code == 2 and message in said and len(said.splitlines()) == 1, said
