"""Strict switches for every test: simulated devices, no silent promotion of dtypes or ranks."""

import faulthandler

import jax
import jaxtyping
import pytest

# Sharding is tested on any laptop; and each simulated warpgroup needs a thread, of which XLA has
# one per device.
jax.config.update("jax_num_cpu_devices", 8)
TIMEOUT = 600  # seconds of one test: a kernel whose barriers do not match waits forever


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Of the cases of a test marked in_turn(n) all but every n-th are slow.

  Not on a GPU, which needs no simulator: there the whole is quick.
  """
  if jax.default_backend() == "gpu":
    return
  seen = {}
  for item in items:
    if turn := item.get_closest_marker("in_turn"):
      name = item.nodeid.partition("[")[0]
      seen[name] = seen.get(name, -1) + 1
      if seen[name] % turn.args[0]:
        item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_is_promoted_in_silence(request):
  dtypes = "standard" if request.node.get_closest_marker("promotes") else "strict"
  with jax.numpy_dtype_promotion(dtypes), jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(autouse=True)
def nothing_hangs(request):
  slow = request.node.get_closest_marker("slow")
  faulthandler.dump_traceback_later(20 * TIMEOUT if slow else TIMEOUT, exit=True)
  yield
  faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def as_a_user(monkeypatch):
  """Users run without the type checks of the tests: errors of our own must do."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
