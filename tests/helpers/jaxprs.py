"""What a traced program consists of."""

from collections.abc import Iterator

from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator:
  """All equations, those within others too, in order."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from equations(inner)


def scans_of(jaxpr: core.Jaxpr, length: int) -> list[list]:
  """The equations of each scan of this length: over layers, forward, then backward."""
  scans = [x for x in equations(jaxpr) if x.primitive.name == "scan"]
  return [
    [*equations(scan.params["jaxpr"].jaxpr)] for scan in scans if scan.params["length"] == length
  ]


def count_of(equations: list, primitive: str) -> int:
  return sum(equation.primitive.name == primitive for equation in equations)
