"""What .ci/run does before the tests."""

import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT

RUN = ROOT / ".ci" / "run"


@pytest.mark.parametrize("missing", ["chromium", "chromedriver", None])
def test_a_browser_and_its_driver_are_installed_if_one_is_missing(missing, tmp_path):
  for name in {"make", "apt-get", "chromium", "chromedriver"} - {missing}:
    (tmp_path / name).write_text(f'#!{shutil.which("bash")}\necho {name} "$@" >> {tmp_path}/said\n')
    (tmp_path / name).chmod(0o755)
  (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
  command = [shutil.which("bash"), str(RUN)]
  subprocess.run(command, env={"PATH": str(tmp_path)}, check=True)
  said = (tmp_path / "said").read_text().splitlines()
  installs = ["apt-get update", "apt-get install -y chromium chromium-driver"] if missing else []
  assert said == [*installs, "make test", "make docs", "make test-newest"]
