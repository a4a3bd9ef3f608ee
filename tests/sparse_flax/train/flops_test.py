"""Operation counts against those derived from the paper's Table 2."""

import pytest

from configs import cifar10
from configs import enwik8
from configs import imagenet64
from sparse_flax.train import flops

TERA = {
  "cifar10-strided": (cifar10, 0.384),
  "cifar10-fixed": (cifar10, 0.526),
  "cifar10-dense": (cifar10, 0.825),
  "enwik8-fixed": (enwik8, 3.52),
  "enwik8-strided": (enwik8, 2.39),
  "enwik8-dense": (enwik8, 6.96),
  "imagenet64-": (imagenet64, 3.84),
}


@pytest.mark.parametrize("name", TERA)
def test_forward_pass_of_the_papers_models(name):
  module, tera = TERA[name]
  config = module.get_config(name.partition("-")[2])
  assert flops.forward_flops(config.model) / 1e12 == pytest.approx(tera, rel=2e-3)


def test_training_is_three_forward_passes_per_sequence():
  model = enwik8.get_config("quick").model
  assert flops.train_flops(model, batch_size=8) == 24 * flops.forward_flops(model)


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("cpu", None),
    ("NVIDIA GeForce RTX 4090", None),
  ],
)
def test_peak_of_known_devices_only(kind, peak):
  assert flops.peak_flops(kind) == peak
