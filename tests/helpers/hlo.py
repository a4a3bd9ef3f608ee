"""What crosses between devices in a compiled program."""

import math
import re

_SIZES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}
_LEAST = 64  # bytes
_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def bytes_moved(text: str) -> dict[str, int]:
  """{kind: bytes that a device receives in one run of an optimised program}.

  An all-reduce counts the array once, an all-gather what the others had, an all-to-all what came
  from others. Bodies of loops count as often as they run; operations of less than 64 bytes,
  and those of a device with itself, do not, nor do scalars.
  """
  bodies, entry, name = {}, None, None
  for line in text.splitlines():
    if found := re.match(r"(ENTRY )?%([\w.-]+) .*\{$", line):
      name = found.group(2)
      entry = name if found.group(1) else entry
      bodies[name] = []
    elif name is not None:
      bodies[name].append(line)

  def total(name: str) -> dict[str, int]:
    sums = {}
    for line in bodies[name]:
      if found := re.search(rf"= (.*?) ({_KINDS})(-start)?\(", line):
        moved = _moved(found.group(2), found.group(1), line)
        if moved >= _LEAST:
          sums[found.group(2)] = sums.get(found.group(2), 0) + moved
      elif found := re.search(r" while\(.*body=%([\w.-]+)", line):
        times = int(re.search(r'known_trip_count":\{"n":"(\d+)"', line).group(1))
        for kind, moved in total(found.group(1)).items():
          sums[kind] = sums.get(kind, 0) + times * moved
      elif found := re.search(r" call\(.*to_apply=%([\w.-]+)", line):
        for kind, moved in total(found.group(1)).items():
          sums[kind] = sums.get(kind, 0) + moved
    return sums

  return total(entry)


def _moved(kind: str, result: str, line: str) -> int:
  arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
  # Scalars, of which norms and means have many, are no traffic.
  elements = lambda dims: math.prod(int(x) for x in dims.split(",")) if dims else 0
  size = sum(_SIZES[dtype] * elements(dims) for dtype, dims in arrays)
  if kind == "collective-permute":
    return size
  n = _group_size(line)
  if n == 1:
    return 0
  factors = {"all-reduce": 1, "all-gather": (n - 1) / n, "all-to-all": (n - 1) / n}
  return round(size * factors.get(kind, n - 1))


def _group_size(line: str) -> int:
  """Of replica_groups=mesh['data'=2,'fsdp'=1] {'data'}, of [4,2]<=[8], or of {{0,1},{2,3}}."""
  if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
    sizes = {name: int(size) for name, size in re.findall(r"'([\w]+)'=(\d+)", found.group(1))}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", found.group(2)))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
    return int(found.group(1))
  return len(re.search(r"replica_groups=\{\{([\d,]+)\}", line).group(1).split(","))
