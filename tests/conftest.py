"""Strict switches for every test: simulated devices, no silent promotion of dtypes or ranks.

TEST_DATE=YYYY-MM-DD chooses the cases of another day, CI=1 makes every skipped test a failure.
"""

import datetime
import faulthandler
import gc
import os
import platform
import shutil
import tempfile

import jax
import jaxtyping
import pytest

from tests.helpers import simulator

# Compiled programs, for all processes of one run: workers, and their children.
if MADE_HERE := "TEST_CACHE" not in os.environ:
  os.environ["TEST_CACHE"] = tempfile.mkdtemp(prefix="compiled-")
# Sharding is tested on any laptop; and each simulated warpgroup needs a thread, of which XLA has
# one per device.
jax.config.update("jax_num_cpu_devices", 8)
# Compiling a small program takes a quarter of the time where XLA for CPUs leaves the loops that it
# fuses to LLVM, without MLIR's passes for each of them, and compiles them together. For child
# processes too. USERS_XLA=1 leaves XLA as users have it: other emitters, and flags that a later
# release may not know, which would end the process.
CHEAP = (
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1"
)
flags = os.environ.get("XLA_FLAGS", "")
if CHEAP not in flags and not os.environ.get("USERS_XLA"):
  os.environ["XLA_FLAGS"] = f"{CHEAP} {flags}"
ON_GPU = jax.default_backend() == "gpu"
if not ON_GPU and not os.environ.get("USERS_XLA"):
  simulator.hand_arrays_over()
# Workers inherit it: two threads for a product of 64 x 64 mostly wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nearly all the time of the tests is compilation, often of what another process compiled before.
jax.config.update("jax_compilation_cache_dir", os.environ["TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
if not ON_GPU:
  jax.config.update("jax_disable_most_optimizations", True)
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
  collect_ignore = ["pallas_kernels/mosaic_tpu/aot_test.py"]  # there is no libtpu
DAYS = {"one_day_in_three": 3, "one_day_in_six": 6}
TIMEOUT = 600  # seconds of one test: a kernel whose barriers do not match waits forever


def pytest_configure():
  """Workers take the date from here: all must collect the same, also at midnight."""
  os.environ.setdefault("TEST_DATE", datetime.date.today().isoformat())


def pytest_collection_finish():
  """What is imported stays: each full collection of garbage would go through all of it."""
  gc.collect()
  gc.freeze()


def pytest_unconfigure():
  if MADE_HERE:
    shutil.rmtree(os.environ["TEST_CACHE"], ignore_errors=True)


def pytest_report_header():
  return f"the cases of TEST_DATE={os.environ['TEST_DATE']}"


# ------------------------------------------------------------------------------ choice of cases


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector, name, obj):
  """Chooses the cases of each test function for `make test`; the others are slow."""
  found = yield
  cases = [x for x in found if isinstance(x, pytest.Function)] if isinstance(found, list) else []
  if cases and not ON_GPU:  # which needs no simulator: there the whole is quick
    _choose(cases)
  return found


def _choose(cases: list[pytest.Function]) -> None:
  function = cases[0].nodeid.partition("[")[0]
  today = datetime.date.fromisoformat(os.environ["TEST_DATE"]).toordinal()
  if mark := cases[0].get_closest_marker("smoke"):
    by_name = {case.callspec.id: case for case in cases}
    if unknown := [name for name in mark.args if name not in by_name]:
      raise pytest.Collector.CollectError(f"{function}: no case {unknown[0]!r} among {[*by_name]}")
    others = [case for name, case in by_name.items() if name not in mark.args]
    daily = mark.kwargs.get("daily", 1)
    # Of a function that has its days, the next cases come with the next of these.
    days = next((n for name, n in DAYS.items() if cases[0].get_closest_marker(name)), 1)
    first = daily * (today // days)
    for n, case in enumerate(others):
      if (n - first) % len(others) >= daily:
        case.add_marker(pytest.mark.slow)
  for name, days in DAYS.items():
    if mark := cases[0].get_closest_marker(name):
      for case in cases if (today - mark.args[0]) % days else ():
        case.add_marker(pytest.mark.slow)
  # Whole functions, and files, may be slow or a GPU's: their own marks say so.
  own = {mark.name for mark in (*cases[0].parent.iter_markers(), *_marks_of(cases[0].obj))}
  if not own & {"slow", "gpu", *DAYS} and all(case.get_closest_marker("slow") for case in cases):
    raise pytest.Collector.CollectError(
      f"{function}: no case is left for make test; mark the function slow"
    )


def _marks_of(function) -> list[pytest.Mark]:
  return getattr(function, "pytestmark", [])


# ------------------------------------------------------------------------------------- skipping


def _fail_if_skipped(report) -> None:
  """In CI nothing is skipped: what a machine lacks is told."""
  if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
    _, _, reason = report.longrepr
    report.outcome, report.longrepr = "failed", f"{report.nodeid}: CI must not skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  report = yield
  _fail_if_skipped(report)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
  report = yield
  _fail_if_skipped(report)
  return report


# ------------------------------------------------------------------------------------- fixtures


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
