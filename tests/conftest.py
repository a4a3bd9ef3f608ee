"""Strict switches for every test: simulated devices, no silent promotion of dtypes or ranks."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # sharding is tested on any laptop


@pytest.fixture(autouse=True)
def nothing_is_promoted_in_silence(request):
  dtypes = "standard" if request.node.get_closest_marker("promotes") else "strict"
  with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def as_a_user(monkeypatch):
  """Users run without the type checks of the tests: errors of our own must do."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
