"""Pictures of attention: the right pixel, the right colours, and files that show something."""

import json

import numpy as np
import PIL.Image
import pytest

from configs import audio
from configs import cifar10
from experiments import visualize
from pallas_kernels import patterns
from sparse_flax.view import draw
from sparse_flax.view import masks
from tests.helpers import tiny
from tests.sparse_flax.sample.generate_test import make_run
from tests.sparse_flax.sample.generate_test import small


def is_picture(path) -> bool:
  pixels = np.asarray(PIL.Image.open(path).convert("RGB"))
  return min(pixels.shape[:2]) > 100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


# ---------------------------------------------------------------------------------------- weights


def test_weight_on_a_slot_belongs_to_the_token_before():
  slots = np.zeros((2, 6), np.float32)
  slots[0, 3], slots[1, 0] = 1.0, 1.0  # the start vector is no token
  np.testing.assert_array_equal(draw.on_tokens(slots), [[0, 0, 1, 0, 0, 0], [0] * 6])


def test_weight_on_the_slots_of_a_pixel_lights_that_pixel():
  shape = (2, 4, 3)
  tokens = np.arange(3) + 3 * 5  # row 1, column 1
  slots = np.zeros(24, np.float32)
  slots[tokens + 1] = 0.25
  expected = np.zeros((2, 4))
  expected[1, 1] = 0.75
  np.testing.assert_array_equal(draw.on_pixels(slots, shape), expected)


def test_the_drawn_panel_is_white_at_the_attended_pixel():
  image = np.zeros((4, 4, 3), np.uint8)
  weights = np.zeros((1, 2, 3, 48), np.float32)
  weights[0, 0, :, 3 * 6 + 1] = 1.0  # head 0: red of pixel 6
  weights[0, 1, :, 3 * 2] = 1.0  # head 1: blue of pixel 1
  figure = draw.draw_image(image, [9], weights, title="", heads=["a", "b"])
  panels = [axes.get_images()[0].get_array() for axes in figure.axes]
  for panel, pixel in zip(panels[1:], (6, 1), strict=True):
    np.testing.assert_array_equal(panel.reshape(-1), np.arange(16) == pixel)
  frame = figure.axes[1].patches[0]
  assert frame.get_xy() == (0.5, 1.5)  # around row 2, column 1


def test_text_lines_up_with_its_bytes_and_nothing_is_lost():
  tokens = np.frombuffer(b"abcdefgh" * 16, np.uint8)
  weights = np.zeros((1, 1, 128), np.float32)
  weights[0, 0, [0, 10, 100]] = (0.25, 0.25, 0.5)
  figure = draw.draw_text(tokens, [101], weights, title="", heads=["a"])
  (row,) = figure.axes[0].get_images()[0].get_array()
  labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
  assert list(np.flatnonzero(row)) == [0, 63]  # further back, and token 99
  assert row[0] == row[63] == 1
  assert labels[63] == chr(tokens[99]) and labels[64] == chr(tokens[100]) and len(labels) == 65


# ------------------------------------------------------------------------------------------ masks


def test_colours_are_those_of_the_masks():
  parts = [pattern.mask(36) for pattern in (patterns.Local(6), patterns.Column(6))]
  picture = masks.colours(parts, patterns.Dense().mask(36))
  colour_of = {
    (21, 20): masks.FIRST,
    (21, 16): masks.FIRST,
    (21, 15): masks.SECOND,
    (21, 21): masks.BOTH,
    (21, 14): masks.SKIPPED,
    (21, 22): masks.FUTURE,
  }
  for (query, key), colour in colour_of.items():
    assert tuple(picture[query, key]) == colour, (query, key)


def test_the_overview_shows_the_masks_of_the_patterns():
  figure = masks.draw_overview()
  shown = [axes.get_images()[0].get_array() for axes in figure.axes]
  coloured = lambda x: (x != masks.SKIPPED).any(-1) & (x != masks.FUTURE).any(-1)
  large = [coloured(picture) for picture in shown if len(picture) == 36]
  for picture, pattern in zip(
    large, (patterns.Dense(), patterns.Strided(6), patterns.Fixed(6, 1)), strict=True
  ):
    np.testing.assert_array_equal(picture, pattern.mask(36))
  # Per column: dense, local, column, block, summary.
  blocks = [int(coloured(picture).sum()) for picture in shown if len(picture) == 12]
  assert blocks == [78, 33, 18, 18, 16]


def test_a_block_is_visited_if_it_holds_a_pair():
  mask = np.zeros((6, 6), bool)
  mask[2, 5] = mask[3, 0] = True
  np.testing.assert_array_equal(masks.visited_blocks(mask, 3), [[0, 1], [1, 0]])


def test_tiles_are_full_or_partial_or_skipped():
  mask = np.zeros((6, 6), bool)
  mask[3:6, 0:3] = mask[0, 0] = True
  picture = masks.tile_colours(mask, 3)
  colour_of = {
    (0, 0): masks.SECOND,
    (0, 1): masks.MASKED,
    (4, 2): masks.FIRST,
    (4, 4): masks.SKIPPED,
    (1, 4): masks.FUTURE,
  }
  for place, colour in colour_of.items():
    assert tuple(picture[place]) == colour, place
  mask[0, 5] = True  # no longer causal
  assert tuple(masks.tile_colours(mask, 2)[1, 2]) == masks.SKIPPED
  figure = masks.draw_tiles([("a", mask), ("b", np.eye(6, dtype=bool))], tile=3)
  assert [axes.get_xlabel() for axes in figure.axes] == ["75% of all tiles", "67% of causal tiles"]


def test_kernel_order_keeps_every_position():
  for pattern in (patterns.Dense(), patterns.Column(4), patterns.Summary(4, 2, 1)):
    for order in masks.kernel_order(pattern, 12):
      np.testing.assert_array_equal(np.sort(order), np.arange(12))
  assert list(masks.kernel_order(patterns.Summary(4, 2, 1), 8)[1][:4]) == [1, 2, 5, 6]


def test_like_heads_share_a_panel():
  pattern = patterns.PerHead((patterns.Local(4), patterns.Column(4)))
  layers = [("mixed", pattern), ("dense", patterns.Dense())]
  figure = masks.draw_layers(layers, T=16, num_heads=4)
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == ["mixed, heads 0, 2", "mixed, heads 1, 3", "dense"]
  for axes, one in zip(figure.axes, (patterns.Local(4), patterns.Column(4)), strict=False):
    blue = (axes.get_images()[0].get_array() == masks.FIRST).all(-1)
    np.testing.assert_array_equal(blue, one.mask(16))


@pytest.mark.one_day_in_three(0)
def test_the_readme_picture_needs_no_run(tmp_path, capsys):
  path = tmp_path / "masks.png"
  assert visualize.main([f"--masks={path}"]) == 0
  assert capsys.readouterr().out.strip() == str(path)
  assert is_picture(path) and path.stat().st_size < 200_000


# --------------------------------------------------------------------------------------- launcher


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  config = tiny.config(tiny.text_file(folder / "data.txt"), model=dict(num_layers=2))
  return make_run(folder / "run", config)


@pytest.mark.one_day_in_six(3)
def test_text_runs_give_layers_patterns_and_the_curve(text_run, capsys):
  records = [dict(step=1, bits_per_byte=8.0), dict(step=2, validation_bits_per_byte=7.5)]
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (text_run / "metrics.jsonl").write_text(lines + '{"step": 3')  # being written
  assert visualize.main([f"--workdir={text_run}", "--layers=1,0", "--num=2"]) == 0
  folder = text_run / "samples" / "3"
  names = ["attention-layer000-seed0", "attention-layer001-seed0"]
  names += ["averages-seed0", "patterns", "curve"]
  *pictures, report = capsys.readouterr().out.split()
  assert pictures == [str(folder / f"{name}.png") for name in names]
  assert all(is_picture(folder / f"{name}.png") for name in names)
  assert report == str(folder / "report.html")
  (text_run / "metrics.jsonl").unlink()


@pytest.mark.one_day_in_three(0)
@pytest.mark.smoke(daily=3)
@pytest.mark.parametrize(
  "flags, message",
  [
    (["--layers=2"], "--layers=2: must be numbers from 0 to 1"),
    (["--layers=0,x"], "--layers=0,x: must be whole numbers"),
    (["--num=0"], "--num=0"),
    (["--num=29"], "from 1 to 28"),
    (["--examples=0"], "--examples=0: must be a whole number from 1"),
    (["--examples=1", "--kinds"], "--examples=1: must be a whole number from 2 to 1024 with"),
    (["--seed=-1"], "--seed=-1"),
    (["--step=7"], "step=7: no checkpoint"),
    (["--masks=m.png"], "give one of them"),
    (["--layer=1"], "--layer"),
  ],
  ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line_and_write_nothing(text_run, flags, message, capsys):
  before = sorted(text_run.rglob("*"))
  with pytest.raises(SystemExit) as error:
    visualize.main([f"--workdir={text_run}", *flags])
  assert error.value.code == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]
  assert sorted(text_run.rglob("*")) == before


@pytest.mark.one_day_in_three(1)
def test_kinds_are_printed_written_and_drawn(text_run, capsys, monkeypatch):
  names = []
  draw_averages = visualize.averages_lib.draw
  keep = lambda *args: names.append(args[2]) or draw_averages(*args)
  monkeypatch.setattr(visualize.averages_lib, "draw", keep)
  assert visualize.main([f"--workdir={text_run}", "--kinds", "--layers=0", "--num=1"]) == 0
  said = capsys.readouterr().out.splitlines()
  path = text_run / "samples" / "3" / "kinds-seed0.json"
  assert said[0].split()[:2] == ["layer", "head"] and str(path) in said
  written = json.loads(path.read_text())
  assert written["rule"]["rows"] == "recent >= 0.5" and written["split"] == "test"
  assert 1 < written["inputs"] <= 64
  heads = [head for layer in written["layers"] for head in layer["heads"]]
  labels = [f"{layer['layer']} {layer['kind']}  " for layer in written["layers"]]
  assert said[1].startswith(labels[0]) and said[3].startswith(labels[1])
  assert all(head["kind"] in line for head, line in zip(heads, said[1:5], strict=True))
  drawn = [name for layer in names[0] for name in layer]
  assert drawn == [f"{head['name']}\nkind: {head['kind']}" for head in heads]
  path.unlink()


def test_masks_must_be_a_png(capsys):
  with pytest.raises(SystemExit) as error:
    visualize.main(["--masks=picture.jpg"])
  assert error.value.code == 2 and "must end in .png" in capsys.readouterr().err


@pytest.mark.one_day_in_six(0)
def test_image_runs_are_drawn(tmp_path):
  run = make_run(tmp_path / "run", small(cifar10.get_config("quick")))
  *paths, _ = visualize.run(run, num=3, seed=1)
  names = ["attention-layer000-seed1", "averages-seed1", "patterns"]
  assert [path.stem for path in paths] == names
  assert all(is_picture(path) for path in paths)


@pytest.mark.one_day_in_three(0)
def test_sounds_are_drawn(tmp_path):
  config = small(audio.get_config("quick"), seq_len=64, position_shape=(8, 8), stride=8)
  *paths, _ = visualize.run(make_run(tmp_path / "run", config), num=2)
  assert len(paths) == 3 and all(is_picture(path) for path in paths)
