"""What tests/conftest.py promises: cases by name and by date, none lost, none skipped in CI."""

import datetime
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import TESTS

CONFTEST = TESTS / "conftest.py"
FILES = {
  "good": """
@pytest.mark.smoke("7", "2")
@pytest.mark.parametrize("n", range(10))
def test_named_and_daily(n): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(2))
def test_slow_as_a_whole(n): pass

@pytest.mark.one_day_in_three(0)
def test_of_the_day(): pass

@pytest.mark.one_day_in_six(5)
def test_of_the_week(): pass

@pytest.mark.smoke()
@pytest.mark.one_day_in_three(0)
@pytest.mark.parametrize("n", range(3))
def test_in_turn(n): pass
""",
  "unknown": """
@pytest.mark.smoke("10")
@pytest.mark.parametrize("n", range(10))
def test_unknown(n): pass
""",
  "lost": """
@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.slow) for n in range(2)])
def test_lost(n): pass
""",
  "skipped": """
def test_skipped(): pytest.skip("no browser")
""",
  "skipped_file": """
pytest.importorskip("no_such_package")
def test_of_a_skipped_file(): pass
""",
  "pallas_kernels/mosaic_tpu/aot": """
def test_of_the_tpu_compiler(): pass
""",
}
# A plugin, so that conftest.py finds another machine.
MACHINE = """
import os, platform
platform.system = lambda: os.environ["TEST_MACHINE"].split()[0]
platform.machine = lambda: os.environ["TEST_MACHINE"].split()[1]
"""


def run(folder: pathlib.Path, machine: str, **environment) -> str:
  """What pytest says of FILES, run as `make test` runs on a machine of that kind."""
  command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not slow"]
  markers = "markers=smoke\none_day_in_three\none_day_in_six\nslow\ngpu\npromotes"
  command += ["-o", markers, "--continue-on-collection-errors", "-p", "machine", folder]
  variables = {key: value for key, value in os.environ.items() if key != "CI"} | environment
  paths = os.pathsep.join((str(folder), str(TESTS.parent)))  # conftest.py imports tests.helpers
  variables |= {"PYTHONPATH": paths, "TEST_MACHINE": machine}
  return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True).stdout


@pytest.mark.one_day_in_six(1)
def test_cases_are_chosen_and_neither_lost_nor_skipped(tmp_path):
  shutil.copy(CONFTEST, tmp_path / "conftest.py")
  (tmp_path / "machine.py").write_text(MACHINE)
  for name, text in FILES.items():
    path = tmp_path / f"{name}_test.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("import pytest\n" + text)
  said = run(tmp_path, "Linux x86_64", CI="1", TEST_DATE="2026-11-29")
  chosen = re.findall(r"::test_named_and_daily\[(\d)\] PASSED", said)
  assert len(chosen) == 3 and {"2", "7"} < set(chosen)
  assert "test_slow_as_a_whole" not in said
  assert "test_unknown: no case '10' among" in said
  assert "test_lost: no case is left for make test" in said
  assert "CI must not skip: Skipped: no browser" in said
  assert "CI must not skip: Skipped: could not import 'no_such_package'" in said
  assert "test_of_the_tpu_compiler PASSED" in said
  assert "1 failed, 5 passed" in said and "3 errors" in said

  other_day = run(tmp_path, "Linux aarch64", TEST_DATE="2026-11-30")
  others = re.findall(r"::test_named_and_daily\[(\d)\] PASSED", other_day)
  assert len(others) == 3 and set(others) & set(chosen) == {"2", "7"}
  assert "2 skipped" in other_day and "test_of_the_tpu_compiler" not in other_day

  days = [said, other_day, run(tmp_path, "Linux x86_64", TEST_DATE="2026-12-01")]
  assert ["test_of_the_day PASSED" in day for day in days].count(True) == 1
  assert ["test_of_the_week PASSED" in day for day in days] == [True, False, False]

  # The days of a function that has its days are all of the same remainder: its cases still turn.
  day = ["test_of_the_day PASSED" in day for day in days].index(True)
  later = datetime.date(2026, 11, 29) + datetime.timedelta(days=day + 3)
  two = days[day], run(tmp_path, "Linux x86_64", TEST_DATE=later.isoformat())
  cases = [re.findall(r"::test_in_turn\[(\d)\] PASSED", said) for said in two]
  assert [len(x) for x in cases] == [1, 1] and cases[0] != cases[1]
