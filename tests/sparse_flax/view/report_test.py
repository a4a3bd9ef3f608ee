"""The report: it shows what the model does, nothing of a run can run in it, browsers draw it."""

import base64
import dataclasses
import io
import json
import re
import shutil
import wave
import zlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from etils import epath
from flax import nnx

from configs import audio
from configs import cifar10
from experiments import sample
from experiments import visualize
from sparse_flax import SparseTransformer
from sparse_flax.view import averages as averages_lib
from sparse_flax.view import draw
from sparse_flax.view import maps as maps_lib
from sparse_flax.view import report
from sparse_flax.view import run as run_lib
from sparse_flax.view.report import charts
from sparse_flax.view.report import page as page_lib
from sparse_flax.view.report import samples as samples_lib
from tests.helpers import tiny
from tests.helpers.models import small_model
from tests.sparse_flax.sample.generate_test import make_run

NASTY = b"</script><script>alert(1)</script> & \x00"
PATTERNS = ("dense", "column", "local")
MODELS = {
  "image": dict(modality="image", seq_len=48, position_shape=(4, 4, 3), stride=12),
  "text": dict(modality="text", seq_len=24, position_shape=(4, 6), stride=6),
  "audio": dict(modality="audio", seq_len=24, position_shape=(4, 6), stride=6),
}


def make_model(modality):
  """(graphdef, params), layout, inputs and attention_weights of all rows."""
  options = dict(attention_layers=PATTERNS, num_layers=3, **MODELS[modality])
  model = small_model(**options)
  graphdef, params = nnx.split(model, nnx.Param)
  shape = MODELS[modality]["position_shape"]
  if modality != "image":
    shape = (*shape, 1)
  layout = maps_lib.Layout(modality, MODELS[modality]["seq_len"], *shape)
  inputs = np.random.default_rng(0).integers(0, 256, (4, layout.seq_len)).astype(np.uint8)
  weights = np.asarray(model.attention_weights(jnp.asarray(inputs), np.arange(layout.seq_len)))
  return (graphdef, nnx.to_pure_dict(params)), layout, inputs, weights


def by_pixel(weights, layout):
  """[..., T, T] -> [..., pixels, rows, columns]; slot j holds token j - 1."""
  tokens = np.concatenate([weights[..., 1:], np.zeros_like(weights[..., :1])], axis=-1)
  shape = (-1, layout.channels, layout.rows, layout.columns, layout.channels)
  return tokens.reshape(*weights.shape[:-2], *shape).sum(axis=-1).mean(axis=-3)


def test_scores_are_of_the_same_weights_on_the_whole_split(tmp_path):
  older = dict(split="test", step=3, bits_per_byte=5.0)  # which has less to say
  whole = older | dict(bytes_scored=100, bytes_in_split=100, ema=True)
  others = [whole | x for x in (dict(ema=False), dict(bytes_scored=32), dict(step=4))]
  others = [line | dict(bits_per_byte=4.0) for line in others]
  config, validation = tiny.config(tmp_path), dict(step=3, validation_bits_per_byte=6.0)
  how = dict(step=3, records=[validation], unit="bits/byte")
  for line in (older, whole):
    facts = dict(run_lib.facts(config, {}, evaluations=[line, *others], averaged=True, **how))
    assert facts["test score"] == "5.000 bits/byte"
    assert facts["validation score"] == "6.000 bits/byte"
  # Training has scored the averaged ones.
  facts = dict(run_lib.facts(config, {}, evaluations=[whole, *others], averaged=False, **how))
  assert facts["test score"] == "4.000 bits/byte" and "validation score" not in facts
  config.train.ema_decay = 0.0
  facts = dict(run_lib.facts(config, {}, evaluations=[], averaged=False, **how))
  assert facts["validation score"] == "6.000 bits/byte"


# ------------------------------------------------------------------------------------------- maps


def test_maps_of_pictures_are_the_weights():
  model, layout, inputs, weights = make_model("image")
  places = np.array([0, 5, 10])
  maps = maps_lib.make_maps(*model, inputs[1], places, layout)
  expected = by_pixel(weights[:, 1], layout)[:, :, places].reshape(3, 2, 3, 16)
  check(maps, expected)


def test_maps_of_texts_go_back_from_the_predicted_byte(monkeypatch):
  monkeypatch.setattr(maps_lib, "TEXT_CELLS", 8)
  model, layout, inputs, weights = make_model("text")
  places = np.array([0, 3, 20])
  maps = maps_lib.make_maps(*model, inputs[1], places, layout)
  rows = weights[:, 1][:, :, places]
  expected = np.zeros((3, 2, 3, 8))
  for n, place in enumerate(places):
    for cell in range(min(7, place)):
      expected[:, :, n, cell] = rows[:, :, n, place - cell]  # the slot of byte place - 1 - cell
    expected[:, :, n, 7] = rows[:, :, n, : max(0, place - 7) + 1].sum(-1)
  check(maps, expected)
  np.testing.assert_allclose(maps.weights()[:, :, 0, 7], 1)  # at first there is the start alone


def test_maps_of_sounds_are_sums_over_time(monkeypatch):
  monkeypatch.setattr(maps_lib, "AUDIO_CELLS", 5)
  model, layout, inputs, weights = make_model("audio")
  places = np.array([7, 23])
  maps = maps_lib.make_maps(*model, inputs[1], places, layout)
  tokens = draw.on_tokens(weights[:, 1][:, :, places])
  check(maps, np.add.reduceat(tokens, [0, 5, 10, 15, 20], axis=-1))


def check(maps, expected):
  tops = expected.max(axis=-1, keepdims=True)
  roots = np.sqrt(expected / np.where(tops > 0, tops, 1))
  np.testing.assert_allclose(maps.roots / 255, roots, atol=0.5 / 255 + 2e-3)
  np.testing.assert_allclose(maps.weights(), expected, atol=0.01)


def test_weights_that_are_not_finite_are_drawn_as_none():
  (graphdef, params), layout, inputs, _ = make_model("text")
  params["groups"][0]["attention"]["query"]["bias"] *= np.float32("nan")
  maps = maps_lib.make_maps(graphdef, params, inputs[0], np.array([20]), layout)
  assert (maps.roots == 0).all() and (maps.tops == 0).all()


def test_places_are_a_grid_or_evenly_spread():
  layout = maps_lib.Layout("image", 3_072, 32, 32, 3)
  y, x = np.divmod(maps_lib.spread_places(layout, 64), 32)
  assert sorted(set(y)) == sorted(set(x)) == list(range(2, 32, 4)) and len(y) == 64
  layout = maps_lib.Layout("text", 64, 8, 8)
  places = maps_lib.spread_places(layout, 5)
  assert places.tolist() == [8, 22, 36, 49, 63]
  assert len(maps_lib.spread_places(layout, 1_000)) == 56


# --------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("num", [4, 5])
def test_averages_of_pictures_are_means_over_inputs_and_places(num):
  model, layout, inputs, weights = make_model("image")
  inputs = np.concatenate([inputs, inputs])[:num]  # the fifth is odd and left out
  places = np.array([3, 6, 15])
  got = averages_lib.average(*model, inputs, places, layout)
  maps = by_pixel(weights, layout)[:, :, :, places]  # [L, N, H, P, rows, columns]
  mean = maps.mean(axis=1)
  assert (got.num_inputs, got.num_places) == (4, 3)
  near = dict(rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(got.absolute, mean.mean(axis=2), **near)
  y, x = np.divmod(places, 4)
  for dy in range(-3, 1):
    for dx in range(-3, 4):
      inside = [n for n in range(3) if y[n] + dy >= 0 and 0 <= x[n] + dx < 4]
      there = [mean[:, :, n, y[n] + dy, x[n] + dx] for n in inside]
      expected = np.mean(there, axis=0) if there else np.zeros((3, 2))
      np.testing.assert_allclose(got.relative[:, :, 3 + dy, 3 + dx], expected, **near)
  each = range(3)
  row = np.mean([mean[:, :, n, y[n]].sum(-1) for n in each], axis=0)
  column = np.mean([mean[:, :, n, :, x[n]].sum(-1) for n in each], axis=0)
  np.testing.assert_allclose(got.numbers["row"], row, **near)
  np.testing.assert_allclose(got.numbers["column"], column, **near)
  far = [np.hypot(*(np.indices((4, 4)) - [[[y[n]]], [[x[n]]]])) for n in each]
  distance = (mean * np.stack(far)).sum((2, 3, 4)) / mean.sum((2, 3, 4))
  np.testing.assert_allclose(got.numbers["distance"], distance, **near)
  moved = 0.5 * np.abs(maps[:, 0::2] - maps[:, 1::2]).sum((4, 5)).mean((1, 3))
  np.testing.assert_allclose(got.numbers["change"], moved, **near)


def test_averages_of_texts_are_by_distance_and_vanish_beyond_a_window():
  model, layout, inputs, weights = make_model("text")
  places = np.array([9, 14, 20])
  got = averages_lib.average(*model, inputs, places, layout)
  assert got.distances.tolist() == list(range(1, 21)) and got.absolute is None
  mean = weights.mean(axis=1)
  near = dict(rtol=1e-4, atol=1e-6)
  for n, distance in enumerate(got.distances):
    there = [mean[:, :, p, p + 1 - distance] for p in places if distance <= p]
    np.testing.assert_allclose(got.relative[:, :, n], np.mean(there, axis=0), **near)
  local = got.relative[PATTERNS.index("local")]
  assert (local[:, :6] > 0).all() and (local[:, 7:] == 0).all()  # the window is 6
  column = got.relative[PATTERNS.index("column")]
  assert (column[:, [0, 6, 12]] > 0).all() and (np.delete(column, [0, 6, 12, 18], 1) == 0).all()
  np.testing.assert_allclose(got.numbers["column"][PATTERNS.index("column")], 1, rtol=1e-5)
  blocks = [mean[:, :, p, p // 6 * 6 : p // 6 * 6 + 6].sum(-1) for p in places]
  np.testing.assert_allclose(got.numbers["row"], np.mean(blocks, axis=0), **near)


def test_far_distances_share_bins(monkeypatch):
  monkeypatch.setattr(averages_lib, "_EXACT", 4)
  layout = maps_lib.Layout("text", 64, 8, 8)
  places = np.array([63])
  sums = np.arange(1.0, 65.0)[None, None]
  values, firsts = averages_lib._per_offset(sums, places, layout)
  assert firsts[:4].tolist() == [1, 2, 3, 4] and len(firsts) < 60
  ends = np.append(firsts[1:], 64)
  np.testing.assert_allclose(values[0, 0], (firsts + ends - 1) / 2)


def test_one_input_says_nothing_about_change():
  model, layout, inputs, _ = make_model("image")
  places = averages_lib.pick_places(layout, 2, seed=0)
  got = averages_lib.average(*model, inputs[:1], places, layout)
  assert got.num_inputs == 1 and np.isnan(got.numbers["change"]).all()
  change = charts.numbers(got, layout, [["a", "b"]] * 3)["change"].figure
  assert json.loads(change.to_json())["data"][0]["z"] == [[None, None]] * 3


def test_places_to_average_fit_into_memory():
  layout = maps_lib.Layout("audio", 2**20, 1_024, 1_024)
  places = averages_lib.pick_places(layout, 2, seed=0)
  assert 2 * 2 * len(places) * layout.seq_len * 4 <= 2**27 and (places >= 2**17).all()


# ------------------------------------------------------------------------------------------- page


def make_attention(modality="image"):
  model, layout, inputs, _ = make_model(modality)
  places = maps_lib.spread_places(layout, 16)
  averaged = averages_lib.pick_places(layout, 2, seed=0)
  return report.Attention(
    layout=layout,
    tokens=inputs[0],
    maps=maps_lib.make_maps(*model, inputs[0], places, layout),
    averages=averages_lib.average(*model, inputs, averaged, layout),
    names=[[f"head {h}" for h in range(2)]] * 3,
  )


def make_page(attention, *, samples=(), records=(), **options):
  return report.build(
    **{"title": "a run", "facts": [("step", "3")], **options},
    records=records,
    unit="bits/dim",
    reference=("PNG", 5.73),
    samples=samples,
    sample_command="python -m experiments.sample --workdir=<here>",
    attention=attention,
  )


def part_of(page, name):
  found = re.search(rf'<script id="{name}" type="application/json">(.*?)</script>', page, re.S)
  return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def unpacked(part, layer, dtype=np.uint8):
  return np.frombuffer(zlib.decompress(base64.b64decode(part["packed"][layer])), dtype)


@pytest.mark.smoke()
@pytest.mark.parametrize("modality", MODELS)
def test_the_page_holds_the_maps_and_averages(modality):
  attention = make_attention(modality)
  data = part_of(make_page(attention), "data")
  maps, averages = data["maps"], data["averages"]
  assert data["places"] == attention.maps.places.tolist() and data["layers"] == [0, 1, 2]
  np.testing.assert_allclose(maps["tops"], attention.maps.tops, rtol=1e-4)
  for layer in range(3):
    np.testing.assert_array_equal(unpacked(maps, layer), attention.maps.roots[layer].reshape(-1))
    relative = attention.averages.relative[layer]
    if modality == "image":
      roots = unpacked(averages["relative"], layer).reshape(relative.shape) / 255
      tops = np.reshape(averages["relative"]["tops"][layer], (2, 1, 1))
      np.testing.assert_allclose(np.sqrt(relative / tops), roots, atol=3e-3)
    else:
      values = unpacked(averages["relative"], layer, np.float32)
      np.testing.assert_array_equal(values, relative.reshape(-1))


def test_nothing_of_a_run_can_become_part_of_the_page():
  text = NASTY.decode()
  samples = [samples_lib.Sample(f"samples-seed0-{n:02}.txt", NASTY * (1 + 999 * n)) for n in (0, 1)]
  attention = dataclasses.replace(make_attention("text"), names=[[text, text]] * 3)
  records = [dict(step=1, bits_per_byte=1.0, other=text)]
  page = make_page(attention, samples=samples, records=records, title=text, facts=[(text, text)])
  assert text not in page and "<script>alert" not in page
  assert page.count("</script>") == 4 and page.count("&lt;script&gt;alert(1)") > 4
  assert part_of(page, "data")["heads"][0][0] == text
  assert "more bytes" in page and "\0" not in page


def test_numbers_that_are_not_finite_leave_json_in_order():
  records = [dict(step=n, bits_per_byte=x) for n, x in enumerate((float("nan"), 8.0, None, "8"))]
  attention = make_attention()
  averages = attention.averages
  averages.numbers["distance"][:] = np.nan
  averages.relative[0, 0, 0, 0] = averages.absolute[1, 0] = np.inf
  broken = dataclasses.replace(attention, averages=averages)
  figures = part_of(make_page(broken, records=records), "figures")
  assert figures["curves"]["data"][0]["y"] == [8.0]
  assert figures["distance"]["data"][0]["z"] == [[None, None]] * 3


def test_without_samples_the_page_says_how_to_draw_some():
  page = make_page(make_attention())
  assert "No samples" in page and "experiments.sample --workdir=&lt;here&gt;" in page
  assert "no records of training" in page and "<img" not in page


def test_samples_lie_in_order_and_junk_is_named():
  name = "completions-seed0-00-{}.txt"
  parts = ("original", "drawn1", "given", "drawn2")
  samples = [samples_lib.Sample(name.format(part), part.encode()) for part in parts]
  samples.append(samples_lib.Sample("samples-seed0.png", b"no picture"))
  samples.append(samples_lib.Sample("samples-seed1-00.wav", None))
  samples.append(samples_lib.Sample("samples-seed2-all.wav", b"RIFF"))
  shown, left_out = samples_lib.to_html(samples)
  assert re.findall("<pre>(.*?)</pre>", shown) == ["given", "drawn1", "drawn2", "original"]
  assert "all in one" in shown and shown.count("<audio") == 1
  assert left_out == ["samples-seed0.png", "samples-seed1-00.wav"]


def test_samples_are_read_as_long_as_there_is_room(tmp_path, monkeypatch):
  monkeypatch.setattr(run_lib, "SAMPLE_BYTES", 100)
  for name, size in (("samples-seed0-00", 90), ("samples-seed0-01", 20), ("samples-seed0-02", 5)):
    (tmp_path / f"{name}.txt").write_bytes(bytes(size))
  (tmp_path / "curve.png").write_bytes(b"")
  read = run_lib.read_samples(epath.Path(tmp_path))
  assert [x.content and len(x.content) for x in read] == [90, None, 5]


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n[2]\n{"step": "x"}\n{"step": 2')
  assert run_lib.read_lines(epath.Path(tmp_path) / "metrics.jsonl") == [{"step": 1}]


def test_the_page_is_bounded_and_says_what_is_missing(monkeypatch):
  attention = make_attention()
  noise = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16)).astype(np.uint8)
  maps = dataclasses.replace(attention.maps, roots=noise)
  attention = dataclasses.replace(attention, maps=maps)
  whole = len(make_page(attention))
  size = sum(map(len, report.pack(noise)))
  monkeypatch.setattr(page_lib, "MAP_BYTES", size // 3)
  page = make_page(attention)
  data = part_of(page, "data")
  assert len(page) < whole - size // 2
  assert data["places"] == maps.places[::4].tolist() and "4 of 16 places" in page
  np.testing.assert_array_equal(unpacked(data["maps"], 2), noise[2][:, ::4].reshape(-1))
  monkeypatch.setattr(page_lib, "AVERAGE_BYTES", 100)
  page = make_page(attention)
  assert part_of(page, "data")["layers"] == [0] and "1 of 3 layers" in page
  bounds = report.MAP_BYTES + report.AVERAGE_BYTES + report.SAMPLE_BYTES * 4 / 3
  assert whole + bounds < 25e6


# ---------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """A function from a page's path to a driver that has drawn it."""
  found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
  chrome, driver = next(filter(None, found), None), shutil.which("chromedriver")
  if not (chrome and driver):  # in CI that fails: tests/conftest.py
    pytest.skip("no browser on PATH: apt-get install chromium chromium-driver")
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = chrome
  flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
  flags += " disable-component-update disable-sync disable-dev-shm-usage window-size=1280,900"
  for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
    yield started


def opened(browser, path):
  browser.get(f"file://{path}")
  wait_for(browser, "document.body.dataset.drawn")


def wait_for(browser, condition):
  from selenium.webdriver.support.wait import WebDriverWait

  WebDriverWait(browser, 60).until(lambda x: x.execute_script(f"return {condition}"))


def choose(browser, **choice):
  """Selects as a user does and waits until it is drawn: "layer head place"."""
  from selenium.webdriver.support.select import Select

  for name, n in choice.items():
    Select(browser.find_element("id", name)).select_by_value(str(n))
  chosen = {name: browser.find_element("id", name).get_property("value") for name in
            ("layer", "head", "place")}  # fmt: skip
  places = browser.execute_script("return data.places")
  drawn = f"{chosen['layer']} {chosen['head']} {places[int(chosen['place'])]}"
  wait_for(browser, f"document.body.dataset.drawn === '{drawn}'")


def errors(browser):
  return [line["message"] for line in browser.get_log("browser")]


@pytest.mark.one_day_in_six(2)
@pytest.mark.one_day_in_six(2)
def test_a_browser_shows_pictures_and_what_is_chosen(browser, tmp_path):
  config = cifar10.get_config("quick").copy_and_resolve_references().unlock()
  config.model.update(width=8, num_layers=2, num_heads=2)
  run = make_run(tmp_path / "run", config.lock())
  sample.run(run, num=2, keep=0.5)
  *_, path = visualize.run(run, num=1, examples=2)
  assert path.stat().length < 10e6
  opened(browser, path)
  assert errors(browser) == []
  images = browser.execute_script("return [...document.images].map(x => x.naturalWidth)")
  assert images and min(images) > 100
  assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280

  # Against the model's own weights.
  model = SparseTransformer(**config.model, rngs=nnx.Rngs(0))
  layout = maps_lib.Layout.of(config.model)
  image = np.array(browser.execute_script("return figures.original.data[0].z"), np.uint8)
  places = browser.execute_script("return data.places")
  for layer, head, place in ((0, 0, 10), (1, 1, 63)):
    choose(browser, layer=layer, head=head, place=place)
    rows = layout.slots(np.array([places[place]]))
    weights = model.attention_weights(jnp.asarray(image.reshape(1, -1)), rows)[layer, 0, head]
    expected = by_pixel(np.asarray(weights), layout)[0]
    shown = browser.execute_script("return document.getElementById('attention').data[0].z")
    np.testing.assert_allclose(
      np.square(np.divide(shown, 255)), expected / expected.max(), atol=0.02
    )
    y, x = divmod(places[place], 32)
    for chart in ("original", "attention"):
      (frame,) = browser.execute_script(f"return document.getElementById('{chart}').layout.shapes")
      assert (frame["x0"], frame["y0"]) == (x - 0.5, y - 0.5)

  # A click on the original chooses the nearest place: here the first, which lies at (2, 2).
  from selenium.webdriver.common.action_chains import ActionChains

  area = browser.find_element("css selector", "#original .nsewdrag")
  browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
  side = area.size["width"] / 32
  offset = [round(3.4 * side - area.size[name] / 2) for name in ("width", "height")]
  ActionChains(browser).move_to_element_with_offset(area, *offset).click().perform()
  wait_for(browser, f"document.body.dataset.drawn === '1 1 {places[0]}'")
  assert errors(browser) == []


@pytest.mark.slow
@pytest.mark.one_day_in_three(1)
def test_a_browser_shows_texts(browser, tmp_path):
  path = tmp_path / "data.txt"
  path.write_bytes(NASTY * 60)
  run = make_run(tmp_path / "run", tiny.config(path, model=dict(num_layers=2)))
  sample.run(run, num=2, keep=0.5)
  *_, page = visualize.run(run, num=1, examples=4)
  opened(browser, page)
  choose(browser, layer=1, head=1, place=20)
  predicted = browser.find_element("css selector", "#text .predicted")
  place = int(predicted.get_attribute("data-byte"))
  read = lambda name: browser.execute_script(
    f"return [...document.querySelectorAll('#text [data-root]')].map(x => x.dataset.{name})"
  )
  data = browser.execute_script("return data")
  roots = unpacked(data["maps"], 1).reshape(2, len(data["places"]), -1)[1, 20]
  assert data["places"][20] == place
  assert list(map(int, read("byte"))) == list(range(place))
  assert list(map(int, read("root"))) == roots[:place][::-1].tolist()
  browser.find_elements("css selector", "#text .place")[0].click()
  wait_for(browser, f"document.body.dataset.drawn === '1 1 {data['places'][0]}'")
  assert errors(browser) == []  # and nothing of the text was run


@pytest.mark.slow
@pytest.mark.one_day_in_three(1)
def test_a_browser_shows_sounds(browser, tmp_path):
  config = audio.get_config("quick").copy_and_resolve_references().unlock()
  config.model.update(seq_len=64, position_shape=(8, 8), stride=8, width=8, num_layers=2)
  run = make_run(tmp_path / "run", config.lock())
  sample.run(run, num=1)
  *_, page = visualize.run(run, num=1, examples=2)
  opened(browser, page)
  choose(browser, layer=1, head=0, place=30)
  shown = browser.execute_script("return document.getElementById('attention').data[0].y")
  data = browser.execute_script("return data")
  roots = unpacked(data["maps"], 1).reshape(2, len(data["places"]), -1)[0, 30]
  np.testing.assert_allclose(
    shown, data["maps"]["tops"][1][0][30] * np.square(roots / 255), rtol=1e-6
  )
  said = browser.find_element("id", "said").text
  assert said == f"The sample with the most attention gets {max(shown):.1%} of it."
  wait_for(browser, "document.querySelector('audio').duration > 0")
  assert errors(browser) == []


# ------------------------------------------------------------------- phones, tablets and laptops

SCREENS = {390: 844, 800: 1_100, 1_280: 900}  # a phone, a tablet and a laptop
# Of all texts and controls: which lie on each other, which leave the screen or their chart, and
# which are too small for a finger. Texts of one paragraph count line by line.
MEASURE = """
const [screen] = arguments, boxes = [], outside = [], small = [];
const add = (owner, what, rect, svg) => {
  let {left, top, right, bottom} = rect;
  if (!svg) for (let e = owner; e !== document.body; e = e.parentElement) {
    if (getComputedStyle(e).overflowY === "visible") continue;
    const clip = e.getBoundingClientRect();
    [top, bottom] = [Math.max(top, clip.top), Math.min(bottom, clip.bottom)];
  }
  const within = svg ? svg.getBoundingClientRect() : {left: 0, right: screen};
  if (right - left < 1 || bottom - top < 1) return;
  if (left < within.left - 1 || right > within.right + 1 || right > screen + 1) outside.push(what);
  boxes.push({owner, what, left, top, right, bottom});
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = new Set();
for (let node; (node = texts.nextNode());) {
  const parent = node.parentElement, text = parent.closest("text");
  if (!node.data.trim() || !parent.checkVisibility()) continue;
  if (parent.closest("script, style, select, button, #js-plotly-tester")) continue;
  const what = node.data.trim().slice(0, 40);
  if (!text) {
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) add(parent, what, rect);
  } else if (!seen.has(text)) {
    seen.add(text);
    add(text, text.textContent, text.getBoundingClientRect(), text.closest("svg"));
  }
}
for (const control of document.querySelectorAll("select, button, a, input, audio, img")) {
  const rect = control.getBoundingClientRect(), what = control.id || control.tagName;
  add(control, what, rect);
  if (control.tagName !== "IMG" && Math.min(rect.width, rect.height) < 40) small.push(what);
}
for (const e of document.querySelectorAll("html, body *")) {
  const scrolls = ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  if ((scrolls || e === document.documentElement) && e.scrollWidth > e.clientWidth + 1) {
    outside.push(`${e.tagName} scrolls sideways`);
  }
}
const overlaps = [];
boxes.forEach((a, n) => boxes.slice(n + 1).forEach(b => {
  const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (a.owner !== b.owner && width > 1 && height > 1) overlaps.push(`${a.what} | ${b.what}`);
}));
return {overlaps, outside, small, count: boxes.length};
"""


def large_attention(modality):
  """Of the size of a real run, of random numbers."""
  layout = {
    "image": maps_lib.Layout("image", 3_072, 32, 32, 3),
    "text": maps_lib.Layout("text", 1_024, 8, 128),
    "audio": maps_lib.Layout("audio", 12_288, 96, 128),
  }[modality]
  places = maps_lib.spread_places(layout, 64)
  heads = (4, 8)
  random = np.random.default_rng(0)
  relative = random.random((*heads, 300)).astype(np.float32)
  distances, absolute = np.arange(1, 301), None
  if modality == "image":
    relative, distances = random.random((*heads, 32, 63)).astype(np.float32), None
    absolute = relative[..., :32]
  roots = random.integers(0, 256, (*heads, len(places), layout.num_cells)).astype(np.uint8)
  numbers = {
    name: random.random(heads).astype(np.float32) for name in averages_lib.meanings(layout)
  }
  numbers["distance"] = 1_000 * numbers["distance"]
  return report.Attention(
    layout=layout,
    tokens=random.integers(0, 256, layout.seq_len).astype(np.uint8),
    maps=maps_lib.Maps(places, roots, np.full(roots.shape[:-1], 0.3, np.float32)),
    averages=averages_lib.Averages(16, 128, relative, absolute, distances, numbers),
    names=[[f"head {h}, strided" for h in range(heads[1])]] * heads[0],
  )


def large_samples(modality):
  names = [f"completions-seed0-00-{part}" for part in ("given", "drawn1", "drawn2", "original")]
  if modality == "image":
    file = io.BytesIO()
    PIL.Image.new("RGB", (640, 240)).save(file, "PNG")
    return [samples_lib.Sample("samples-seed0.png", file.getvalue())]
  if modality == "text":
    return [samples_lib.Sample(f"{name}.txt", b"words and " * 150) for name in names]
  file = io.BytesIO()
  with wave.open(file, "wb") as sound:
    sound.setparams((1, 2, 12_000, 12_000, "NONE", ""))
    sound.writeframes(bytes(24_000))
  return [samples_lib.Sample(f"{name}.wav", file.getvalue()) for name in names]


@pytest.fixture
def screen(browser):
  """A function that gives the browser a screen so wide, with touch unless it is a laptop."""

  def of(width):
    small = width < 1_000
    size = dict(width=width, height=SCREENS[width], deviceScaleFactor=1, mobile=small)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", dict(enabled=small))

  yield of
  browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
  browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", dict(enabled=False))


@pytest.mark.parametrize("modality", MODELS)
def test_nothing_overlaps_or_leaves_the_screen(modality, browser, screen, tmp_path):
  path = tmp_path / "report.html"
  facts = [("data", f"a set of {modality}"), ("attention", "column, local, local / column, dense")]
  records = [dict(step=n, bits_per_byte=8 - n / 999) for n in range(0, 2_000, 100)]
  records.append(dict(step=2_000, validation_bits_per_byte=6.5))
  page = make_page(
    large_attention(modality), samples=large_samples(modality), records=records, facts=facts,
    title="a-run-with-a-rather-long-name-that-has-no-spaces, step 120,000",
  )  # fmt: skip
  path.write_text(page)
  for width in SCREENS:
    screen(width)
    opened(browser, path)
    got = browser.execute_script(MEASURE, width)
    assert got.pop("count") > 100
    assert got == dict(overlaps=[], outside=[], small=[]), width
    if modality == "image":
      columns = 1 if width == 390 else 2
      size = browser.execute_script(
        "return ['original', 'attention'].map(name => document.querySelector("
        "`#${name} .nsewdrag`).getBoundingClientRect().width)"
      )
      assert min(size) > 0.85 * min(width, 1_180) / columns, width
  assert errors(browser) == []


def touch(browser, *points):
  """A finger that goes along some points (x, y), pixels of the screen."""
  for n, (x, y) in enumerate(points):
    kind = "touchMove" if n else "touchStart"
    event = dict(type=kind, touchPoints=[dict(x=x, y=y)])
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", event)
  browser.execute_cdp_cmd("Input.dispatchTouchEvent", dict(type="touchEnd", touchPoints=[]))


def centre(browser, selector, n=0):
  """Of an element, once it is in the middle of the screen."""
  return browser.execute_script(
    "const e = document.querySelectorAll(arguments[0])[arguments[1]];"
    "e.scrollIntoView({block: 'center'});"
    "const {x, y, width, height} = e.getBoundingClientRect();"
    "return [x + width / 2, y + height / 2]",
    selector,
    n,
  )


@pytest.mark.one_day_in_six(4)
@pytest.mark.smoke("image")
@pytest.mark.parametrize(
  ("modality", "dots", "beside"),
  [
    ("image", "#original .scatterlayer .point", (19, -19)),
    ("text", "#text .place", (15, 13)),
    ("audio", "#original .scatterlayer .point", (1, 60)),
  ],
  ids=MODELS,
)
def test_a_finger_chooses_places_and_heads(modality, dots, beside, browser, screen, tmp_path):
  path = tmp_path / "report.html"
  path.write_text(make_page(large_attention(modality)))
  screen(390)
  opened(browser, path)
  places = browser.execute_script("return data.places")
  x, y = centre(browser, dots, 20)
  touch(browser, (x + beside[0], y + beside[1]))
  wait_for(browser, f"document.body.dataset.drawn === '0 0 {places[20]}'")
  touch(browser, centre(browser, "#next"))
  wait_for(browser, f"document.body.dataset.drawn === '0 0 {places[21]}'")
  x, y = centre(browser, "#change .nsewdrag")  # of 4 layers and 8 heads
  touch(browser, (x + 15, y + 15))
  wait_for(browser, f"document.body.dataset.drawn === '2 4 {places[21]}'")
  # A finger that moves scrolls the page and chooses nothing.
  x, y = centre(browser, "#change .nsewdrag")
  start = browser.execute_script("return scrollY")
  touch(browser, *((x, y + 20 * n) for n in range(15)))
  wait_for(browser, f"scrollY < {start} - 100")
  assert browser.execute_script("return document.body.dataset.drawn") == f"2 4 {places[21]}"
  assert errors(browser) == []
