"""What crosses between devices in a compiled program, and what should."""

import math
import re

import ml_collections

from sparse_flax.parallel import sharding

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


def formula(config: ml_collections.ConfigDict) -> dict[str, int]:
  """The same for a step, by docs/sharding.md: float32, remat="full" and one micro-batch."""
  model, (d, f, t, s) = config.model, (config.mesh[name] for name in sharding.AXES)
  B, T, E = config.data.batch_size // (d * f), model.seq_len // s, model.width
  F, L, rows = round(model.ff_mult * E), model.num_layers, sum(model.position_shape)
  H, D, stride = model.num_heads // t, E // model.num_heads, model.stride
  matrices, vectors = (4 * E * E + 2 * E * F) // t, (3 * E + F) // t + 6 * E
  rest = (2 * 256 + 3) * E
  kinds = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
  words = dict.fromkeys(kinds, 0)
  words["all-reduce"] += (s > 1) * (L * vectors + rest + rows * E + B)
  words["all-reduce"] += (d * f > 1) * (L * vectors + rest + rows * E)
  words["all-reduce"] += L * matrices * ((d > 1) + (s > 1) + (f > 1) * f) // f
  words["all-gather"] += 2 * L * matrices * (f - 1) // f
  if t > 1:
    words["all-reduce"] += 7 * L * B * T * E
  for n in range(L if s > 1 else 0):
    name = model.attention_layers[n % len(model.attention_layers)]
    if name in ("local", "strided"):
      words["collective-permute"] += 3 * B * stride * H * 2 * D
    if name in ("column", "strided"):
      lse = name == "strided"
      words["all-to-all"] += 3 * B * T * H * (4 * D + lse) * (s - 1) // s
    if name == "fixed":
      gathered = (s - 1) * B * (T // stride) * model.summary_width * H * 2 * D
      words["all-gather"] += 2 * gathered
      words["reduce-scatter"] += gathered
  return {name: 4 * number for name, number in words.items() if number}
