"""What a row of benchmarks/tpu_aot.json has to show."""

from experiments.benchmark.tpu import compiler

# 8 heads of 128, as the arguments of a program lie: nothing may be moved.
AS_THEY_LIE = ("dense", "local", "column", "strided", "fixed", "layout")


def check_rows(found: list[dict]) -> None:
  """What every call's row has to show."""
  for row in found:
    assert row["kernels"], "no kernel of ours was compiled"
    assert row["hbm_need"] <= compiler.CHIPS[row["chip"]].hbm
    if row["case"] in AS_THEY_LIE:
      assert row["moves"] == []
    if row["case"] == "column" and row["direction"] == "forward":
      assert row["hbm_bytes"] <= 1.1 * row["hbm_bytes_of_arrays"]
