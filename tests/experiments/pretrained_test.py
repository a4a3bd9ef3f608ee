"""The weights that ship in experiments/pretrained, and the images beside them."""

import hashlib
import re

import pytest

from experiments import sources
from sparse_flax import evaluate
from sparse_flax import export
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.promotes
FOLDER = ROOT / "experiments" / "pretrained" / "cifar10"
CARD = (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def found():
  return sources.read(None, FOLDER, needs_folder=False)


@pytest.mark.parametrize("name", [export.MODEL, export.CONFIG, export.HELD_OUT])
def test_the_card_has_the_digest_of_each_file(name):
  digest = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
  assert re.search(rf"`{name}`.*`{digest}`", CARD)


@pytest.mark.one_day_in_three(2)
def test_the_weights_are_small_and_what_the_card_says(found):
  assert (FOLDER / export.MODEL).stat().st_size <= 15 * 2**20
  assert (found.step, found.averaged, found.matrices) == (4_800, False, "bfloat16")
  count = sum(x.size for x in export.flatten(found.params, cycle=1).values())
  assert f"{count:,} parameters" in CARD


@pytest.mark.one_day_in_three(2)
def test_without_data_the_images_beside_them_are_taken_and_it_says_so(found, capsys, tmp_path):
  dataset = found.open_dataset("test")
  assert dataset.identity["count"] == 100
  assert (
    "data: the 100 images of held_out.webp, beside the weights; --data_path"
    in capsys.readouterr().err
  )
  with pytest.raises(ValueError, match="--split=train: must be test, all that is there without"):
    found.open_dataset("train")
  elsewhere = dict(needs_folder=False, data_path=str(tmp_path / "none"))
  with pytest.raises(ValueError, match=r"data\.path='.*none': no such file or folder"):
    sources.read(None, FOLDER, **elsewhere).open_dataset("test")


@pytest.mark.one_day_in_six(3)
def test_an_image_needs_as_many_bits_as_when_they_were_exported(found):
  dataset = found.open_dataset("test")
  result = evaluate.evaluate(found.config, found.params, dataset=dataset, num=1, step=0)
  # 3.2365 on the CPU; the error of bfloat16 products is 0.002.
  assert result["bits_per_byte"] == pytest.approx(3.2365, abs=0.02)
