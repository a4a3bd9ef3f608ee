"""What the tables of documents show of benchmarks/*.json: a function for each, header first."""

from collections.abc import Iterable
from typing import Any

GB, GIB = 1e9, 2**30

Result = dict[str, Any]  # of a file
Cells = Iterable[Iterable[str]]  # the first row is the header

MODELS = {
  "cifar10": "CIFAR-10",
  "imagenet64": "ImageNet 64 x 64",
  "enwik8": "enwik8",
  "audio": "audio",
  "audio64k": "audio",
  "audio:1m": "audio, 1,048,576 samples",
  "cifar10_32": "CIFAR-10, 32 layers",
  "cifar10_64": "CIFAR-10, 64 layers",
}
WEIGHTS = {"cifar10": "59M", "imagenet64": "152M"}


def digits(number: float, count: int = 3) -> str:
  """So many digits, but never fewer than the whole part has: 0.57, 10.9, 2,176."""
  return f"{number:,.{max(count - len(str(int(number))), 0)}f}"


def by(rows: Iterable[Result], *fields: str) -> dict[tuple, Result]:
  """Rows by the values of some of their fields."""
  return {tuple(row[field] for field in fields): row for row in rows}


def sample(result: Result) -> Cells:
  rows = by(result["rows"], "name", "implementation", "step")
  yield "model, sequences", "sparse caches", "read per step", "dense caches", "read per step"
  for name in ("cifar10", "imagenet64"):
    sparse, dense = rows[name, "sparse", "cluster"], rows[name, "dense", "triton"]
    rate = float(f"{sparse['bytes_per_second']:.3g}")
    read = lambda row: f"{digits((row['weight_bytes'] + row['cache_bytes_read']) / GB)} GB"
    yield (
      f"{MODELS[name]}, {WEIGHTS[name]}, {sparse['batch']}",
      f"{digits(sparse['ms_per_step'])} ms, {rate:,.0f} bytes/s",
      read(sparse),
      f"{digits(dense['ms_per_step'])} ms",
      read(dense),
    )


def sample_steps(result: Result) -> Cells:
  rows = by(result["rows"], "name", "implementation", "step")
  yield "", "floor: weights and rows read once", "one kernel", "five per layer", "XLA"
  for name in ("cifar10", "imagenet64"):
    ways = [rows[name, "sparse", step] for step in ("cluster", "triton", "xla")]
    times = (f"{digits(way['ms_per_step'], 4)} ({way['launches']:,.0f})" for way in ways)
    label = f"{MODELS[name]}, {ways[0]['batch']} sequences"
    yield label, digits(ways[0]["floor_ms"], 4), *times


def xla(result: Result) -> Cells:
  rows = by(result["rows"], "pattern", "direction", "seq_len")
  ms = lambda name, T: rows[name, "fwdbwd", T]["ms"]
  lengths, longest = (1_024, 4_096, 16_384), 65_536
  first, *others = (f"{T:,}" for T in lengths)
  yield (
    "pattern",
    f"dense / this, time, at T = {first}",
    *others,
    f"T = {longest:,}",
    "peak memory there",
  )
  for name in ("local", "column", "block", "summary", "fixed", "strided"):
    yield (
      f"{name}, merged" if name in ("fixed", "strided") else name,
      *(f"{ms('dense', T) / ms(name, T):.1f}" for T in lengths),
      f"{digits(ms(name, longest) / 1e3)} s",
      f"{rows[name, 'fwdbwd', longest]['bytes'] / 1e6:,.0f} MB",
    )


def memory(result: Result) -> Cells:
  rows = by(result["rows"], "pattern", "implementation", "seq_len", "remat", "depth")
  depths = sorted({row["depth"] for row in result["rows"]})
  yield "attention", "n", "`remat`", *(f"{depth} layers" for depth in depths)
  for case in dict.fromkeys(key[:-1] for key in rows):
    pattern, implementation, T, remat = case
    sizes = (f"{rows[(*case, depth)]['bytes'] / 1e6:,.1f} MB" for depth in depths)
    yield f"{pattern}, `{implementation}`", f"{T:,}", remat, *sizes


DIRECTIONS = ("fwd", "fwdbwd")
CUDNN_WINDOW = "cuDNN with a left window, the same pattern"
TRANSPOSED = "transpose, cuDNN, transpose, the same pattern"


def attention_shares(result: Result) -> Cells:
  rows = by(result["summary"], "pattern", "implementation", "direction")
  yield (
    "share of the roofline: geometric mean over the shapes (least)",
    "forward",
    "forward + backward",
  )
  for pattern, implementation, label in (
    ("local", "mosaic_gpu", "local"),
    ("local", "cudnn_window", CUDNN_WINDOW),
    ("column", "mosaic_gpu", "column"),
    ("column", "transpose_cudnn", TRANSPOSED),
    ("block", "mosaic_gpu", "block"),
    ("summary", "mosaic_gpu", "summary"),
  ):
    ways = [rows[pattern, implementation, direction] for direction in DIRECTIONS]
    yield label, *(f"{way['geometric_mean']:.2f} ({way['minimum']:.2f})" for way in ways)


def attention_first(result: Result) -> Cells:
  rows = by(result["rows"], "shape", "pattern", "implementation", "direction")
  yield "the first shape, ms", "forward", "forward + backward"
  for pattern, implementation, label in (
    ("strided", "mosaic_gpu", "strided, merged"),
    ("fixed", "mosaic_gpu", "fixed, merged, summaries of 32"),
    ("dense", "mosaic_gpu", "dense"),
    ("dense", "cudnn", "dense, cuDNN called directly"),
  ):
    ways = [rows["enwik8", pattern, implementation, direction] for direction in DIRECTIONS]
    if label == "dense" and "cudnn" in ways[0]["kernels"][0]:
      label = "dense, by cuDNN through this package"
    yield label, *(f"{way['ms']:.3f}" for way in ways)


def attention_shapes(result: Result) -> Cells:
  rows = by(result["rows"], "shape", "pattern", "implementation", "direction")
  shapes = tuple(result["shapes"])
  yield "", *shapes
  for pattern in ("local", "column", "block", "summary"):
    share = lambda *case: f"{rows[case]['fraction']:.2f}"
    yield (
      pattern,
      *(
        "; ".join(share(shape, pattern, "mosaic_gpu", direction) for direction in DIRECTIONS)
        for shape in shapes
      ),
    )


def block_sparse_rates(result: Result) -> Cells:
  rows = by(result["rows"], "shape", "pattern", "implementation", "direction", "density")
  densities = {1: "1", 1 / 2: "1/2", 1 / 4: "1/4", 1 / 8: "1/8", 1 / 16: "1/16"}
  yield "visited blocks, share of the causal ones", *densities.values()
  for D in (128, 64):
    for T in (32_768, 65_536):
      for direction in DIRECTIONS:
        case = (f"d{D}_t{T}", "random", "mosaic_gpu", direction)
        forward = direction == "fwd"
        label = f"D = {D}, T = {T:,}, forward" if forward else "the same, forward + backward"
        yield label, *(f"{rows[(*case, x)]['rate_vs_cudnn_dense']:.2f}" for x in densities)


def block_sparse_ms(result: Result) -> Cells:
  rows = by(result["rows"], "shape", "pattern", "implementation", "direction")

  def times(shape, pattern, implementation, prefix=""):
    cases = [(shape, pattern, implementation, direction) for direction in DIRECTIONS]
    if cases[0] not in rows:
      return ["", ""]
    forward, both = (digits(rows[case]["ms"], 4) for case in cases)
    return [prefix + forward, both]

  shape, grouped = "d128_t32768", "d128_t32768_gqa"
  yield "T = 32,768, D = 128, ms", "ours, forward", "+ backward", "cuDNN", "+ backward"
  for pattern, label in (
    ("window_1024", "window of 1,024"),
    ("window_4096", "window of 4,096"),
    ("window_sinks", "window of 1,024 and 64 sinks"),
    ("documents", "8 documents in one sequence (`segment_ids`)"),
  ):
    yield label, *times(shape, pattern, "mosaic_gpu"), *times(shape, pattern, "cudnn_window")
  ours, dense = times(grouped, "random_gqa", "mosaic_gpu"), times(grouped, "dense", "cudnn")
  yield "1/8 of the blocks, 4 key heads", *ours, f"dense {dense[0]}", dense[1]


STEPS = {
  "ours": "ours",
  "ours_modules": "ours, blocks by their modules",
  "baseline": "commit {baseline}",
  "pytorch": "PyTorch",
  "jax_cudnn": "plain JAX, cuDNN",
  "ours_merged": "ours",
  "ours_dense": "ours",
  "pytorch_dense": "PyTorch",
}


def step(result: Result) -> Cells:
  """Columns that tell nothing are left out: what is measured has changed with time."""
  share = lambda field: lambda row: row.get(field) is not None and f"{100 * row[field]:.0f} %"
  attentions = {row["attention"] for row in result["rows"]}
  columns = {
    "model, sequences": lambda row: (
      f"{MODELS[row['body']]}, {row.get('batch') or result['bodies'][row['body']]['batch']}"
    ),
    "step": lambda row: STEPS.get(row.get("implementation"), "").format(**result),
    "attention": lambda row: len(attentions) > 1 and row["attention"],
    "`remat`": lambda row: row["remat"],
    "ms": lambda row: row["ms"] and f"{row['ms']:,.1f}",
    "tokens/s": lambda row: row.get("tokens_per_second") and f"{row['tokens_per_second']:,}",
    "MFU": share("mfu"),
    "peak memory": lambda row: row.get("peak_gb") and f"{row['peak_gb']:.1f} GB",
    "in our kernels": share("ours_share"),
    "over none": lambda row: row.get("added_percent") and f"{row['added_percent']:+.0f} %",
    "dense / this": lambda row: row.get("dense_ratio") and f"{row['dense_ratio']:.2f}",
    "this / ours": lambda row: row.get("over_ours") and f"{row['over_ours']:.2f}",
  }
  rows = [[column(row) or "" for column in columns.values()] for row in result["rows"]]
  there = [n for n in range(len(columns)) if any(row[n] for row in rows)]
  yield from ([row[n] for n in there] for row in [list(columns), *rows])


def fastest_steps(result: Result) -> dict[tuple[str, str], float]:
  """Milliseconds of a step by body and implementation, with or without recomputation."""
  fastest = {}
  for row in result["rows"]:
    key = row["body"], row["implementation"]
    if row["ms"]:
      fastest[key] = min(row["ms"], fastest.get(key, row["ms"]))
  return fastest


def step_models(result: Result) -> Cells:
  """The fastest step of each model by each way to compute it, milliseconds."""
  ways = [way for way in STEPS if any(row["implementation"] == way for row in result["rows"])]
  fastest = fastest_steps(result)
  yield "model, sequences x tokens", *(STEPS[way].format(**result) for way in ways)
  for row in by(result["rows"], "body").values():
    times = [fastest.get((row["body"], way)) for way in ways]
    yield (
      f"{MODELS[row['body']]}, {row['batch']} x {row['seq_len']:,}",
      *(f"{ms:,.1f}" if ms else "not measured yet" for ms in times),
    )


def mesh(result: Result) -> Cells:
  rows = by(result["rows"], "body", "axis")
  axes = ("fsdp", "tensor", "sequence")
  labels = {
    "audio": "audio, 48 layers of local and column, {batch} x 65,536",
    "enwik8": "enwik8, 30 layers of fixed, {batch} x 12,288",
  }
  yield "body, sequences per step", "one", *(f"{axis} = 2" for axis in axes)
  for body in dict.fromkeys(row["body"] for row in result["rows"]):
    alone = rows[body, None]
    times = [rows.get((body, axis)) for axis in axes]
    yield (
      labels[body].format(batch=alone["batch"]),
      f"{alone['ms']:.1f} ms",
      *(f"{row['ms']:.1f} ms ({alone['ms'] / row['ms']:.2f} x)" if row else "" for row in times),
    )


def tpu_bundles(result: Result) -> Cells:
  """Of the dense case and the window: instructions per block, ours and splash's better block."""
  splash = {row["job"]: row["kernels"] for row in result["rows"] if "mask" in row}
  ours = by((row for row in result["rows"] if "case" in row), "job", "direction")
  yield "", "forward: ours, splash", "backward: ours, splash", "the products alone"
  for case, label, alone in (
    ("dense", "dense", "1,024; 2,560"),
    ("local", "window of 1,024", ""),
  ):
    both = ours[f"kernels/v5e/{case}", "forward and backward"]["kernels"]
    sizes = [splash[f"splash/v5e/{case}/{block}"] for block in (512, 1_024)]
    pairs = (
      (both[n]["bundles_per_block"], min(kernels[n]["bundles_per_block"] for kernels in sizes))
      for n in range(2)
    )
    yield label, *(f"{a:,.0f}; {b:,.0f}" for a, b in pairs), alone


CHIPS = {"v5e": "one chip", "v5p": "one chip", "v6e": "one chip", "tpu7x": "half a chip"}


def tpu_memory(result: Result) -> Cells:
  rows = by((row for row in result["rows"] if "hbm" in row), "chip", "devices", "config")
  configs = ("cifar10", "enwik8", "imagenet64", "audio", "audio:1m")
  sequences = [rows["v5e", 1, config]["sequences_per_device"] for config in configs]
  yield "", *(f"{MODELS[x]} ({n})" for x, n in zip(configs, sequences, strict=True))
  for chip, devices in dict.fromkeys(key[:2] for key in rows):
    name = chip.replace("tpu", "TPU")
    label = f"{name}, {CHIPS[chip] if devices == 1 else f'{devices} chips'}"
    yield label, *(f"{rows[chip, devices, x]['hbm_need'] / GIB:.1f}" for x in configs)
