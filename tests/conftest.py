"""Strict switches for every test: simulated devices, no silent promotion of dtypes or ranks."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # sharding is tested on any laptop


@pytest.fixture(autouse=True)
def nothing_is_promoted_in_silence(request):
  dtypes = "standard" if request.node.get_closest_marker("promotes") else "strict"
  with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion("raise"):
    yield
