"""The same body in PyTorch: compiled blocks, FlexAttention or SDPA, bfloat16, checkpoints.

Each kind of block is compiled once and shared by its layers, as PyTorch advises: 128 layers as one
graph would compile for many minutes. Columns are dense attention of a view, by SDPA, which is
faster than FlexAttention with their mask.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import flex_attention
from torch.utils import checkpoint

from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_of(pattern: dict[str, Any], T: int, H: int) -> Callable:
  """(q, k, v), each [B, H, T, D] -> [B, H, T, D], over the pairs of a pattern."""
  if pattern["kind"] == "Dense":
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
  if pattern["kind"] == "Column" and T % pattern["stride"] == 0:
    stride = pattern["stride"]

    def column(q, k, v):
      B = q.shape[0]
      views = (x.unflatten(2, (-1, stride)).permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (q, k, v))
      out = F.scaled_dot_product_attention(*views, is_causal=True)
      return out.unflatten(0, (B, stride)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    return column
  heads = H if masks.heads_of(pattern) > 1 else None
  make = flex_attention.create_block_mask
  if DEVICE == "cuda":  # compiled, it does not hold T x T integers: 34 GB for 65,536 tokens
    make = torch.compile(make)
  blocks = make(masks.mask_of(pattern), None, heads, T, T, device=DEVICE)
  return lambda q, k, v: flex_attention.flex_attention(q, k, v, block_mask=blocks)


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
  """In the dtype of x; the weights are float32."""
  return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
  return layer(x.float()).to(x.dtype)


class Block(nn.Module):
  """x [B, T, E]; see `sparse_flax.model.block`."""

  def __init__(self, model: dict[str, Any], attend: Callable):
    super().__init__()
    E = model["width"]
    Q, hidden = round(model["qk_ratio"] * E), round(model["ff_mult"] * E)
    self.attend, self.num_heads, self.dropout = attend, model["num_heads"], model["dropout"]
    self.attention_norm = nn.LayerNorm(E, eps=1e-5)
    self.query, self.key, self.value = nn.Linear(E, Q), nn.Linear(E, Q), nn.Linear(E, E)
    self.out = nn.Linear(E, E)
    self.feed_forward_norm = nn.LayerNorm(E, eps=1e-5)
    self.up, self.down = nn.Linear(E, hidden), nn.Linear(hidden, E)
    end = 1 / (2 * model["num_layers"])  # of a residual branch
    for layer in (self.query, self.key, self.value, self.out, self.up, self.down):
      share = end if layer in (self.out, self.down) else 1.0
      nn.init.normal_(layer.weight, std=math.sqrt(share * 0.125 / layer.in_features))
      nn.init.zeros_(layer.bias)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = norm(self.attention_norm, x)
    heads = lambda layer: linear(layer, h).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
    out = self.attend(heads(self.query), heads(self.key), heads(self.value))
    x = x + F.dropout(linear(self.out, out.transpose(1, 2).flatten(2)), self.dropout)
    u = linear(self.up, norm(self.feed_forward_norm, x))
    return x + F.dropout(linear(self.down, u * torch.sigmoid(1.702 * u)), self.dropout)


class Model(nn.Module):
  """tokens [B, T] -> mean nats per byte; see `sparse_flax.model.transformer`."""

  def __init__(self, model: dict[str, Any], patterns: list[dict[str, Any]]):
    super().__init__()
    E, T = model["width"], model["seq_len"]
    self.model, self.dtype = model, getattr(torch, model["compute_dtype"])
    std = 0.125 / math.sqrt(E)
    table = lambda rows: nn.Parameter(std * torch.randn(rows, E))
    self.tokens, self.start = table(256), table(1)
    self.positions = nn.ParameterList(table(rows) for rows in model["position_shape"])
    # One function for equal patterns: each has its blocks compiled once more.
    functions = {str(pattern): attention_of(pattern, T, model["num_heads"]) for pattern in patterns}
    cycle = [functions[str(pattern)] for pattern in patterns]
    self.blocks = nn.ModuleList(
      Block(model, cycle[n % len(cycle)]) for n in range(model["num_layers"])
    )
    self.final_norm = nn.LayerNorm(E, eps=1e-6)
    self.logits = nn.Parameter(torch.zeros(256, E))
    digits = torch.unravel_index((torch.arange(T) - 1).clamp(min=0), tuple(model["position_shape"]))
    self.register_buffer("digits", torch.stack(digits))

  def embed(self, tokens: torch.Tensor) -> torch.Tensor:
    """Slot t has the byte and the position of t - 1, slot 0 the start vector."""
    before = F.pad(tokens, (1, 0))[:, :-1]
    tables = zip(self.positions, self.digits, strict=True)
    x = F.embedding(before, self.tokens) + sum(F.embedding(n, table) for table, n in tables)
    x = torch.cat([self.start.expand(len(x), 1, -1), x[:, 1:]], dim=1)
    x, rate = x.to(self.dtype), self.model["embed_dropout"]
    return F.dropout(x, rate) if rate else x

  def nats(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = F.linear(self.final_norm(x.float()), self.logits)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

  def compile_parts(self) -> None:
    """All blocks share one code object: as many programs as there are patterns."""
    options = dict(dynamic=False, fullgraph=True)
    for block in self.blocks:
      block.compile(**options)
    self.embed, self.nats = (torch.compile(part, **options) for part in (self.embed, self.nats))

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    x = self.embed(tokens)
    for block in self.blocks:
      if self.model["remat"] == "none":
        x = block(x)
      else:
        x = checkpoint.checkpoint(block, x, use_reentrant=False)
    return self.nats(x, tokens)


def make_step(model: Model, job: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
  """tokens -> loss: one update by AdamW behind clipping, and of the averaged weights."""
  optim, parameters = job["optim"], list(model.parameters())
  matrices = [x for name, x in model.named_parameters() if _decays(name)]
  vectors = [x for name, x in model.named_parameters() if not _decays(name)]
  adam = torch.optim.AdamW(
    [dict(params=matrices, weight_decay=optim["weight_decay"]), dict(params=vectors)],
    lr=optim["learning_rate"],
    betas=(optim["b1"], optim["b2"]),
    eps=optim["eps"],
    weight_decay=0.0,
    fused=True,
  )
  rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min((n + 1) / optim["warmup_steps"], 1))
  averages = [x.detach().clone() for x in parameters]

  def step(tokens):
    adam.zero_grad(set_to_none=True)
    nats = model(tokens)
    nats.backward()
    nn.utils.clip_grad_norm_(parameters, optim["clip_norm"], foreach=True)
    adam.step()
    rate.step()
    with torch.no_grad():
      torch._foreach_lerp_(averages, parameters, 1 - job["ema_decay"])
    return nats.detach()

  return step


def _decays(name: str) -> bool:
  return "norm" not in name and not name.endswith("bias")


def measure(job: dict[str, Any]) -> None:
  """Tells the figures of a step.

  Args:
    job: `model` and `optim` of a config, `patterns` as `masks.described`, `ema_decay`, and `batch`
      sequences.
  """
  child.tell(library=f"PyTorch {torch.__version__}", remat=job["model"]["remat"])
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")  # JAX's default for the float32 logits
  begin = time.perf_counter()
  model = Model(job["model"], job["patterns"]).to(DEVICE)
  model.compile_parts()
  step = make_step(model, job)
  tokens = torch.randint(0, 256, (job["batch"], job["model"]["seq_len"]), device=DEVICE)
  step(tokens)
  step(tokens)
  child.tell(compile_s=round(time.perf_counter() - begin, 1))
  if DEVICE == "cuda":
    torch.cuda.reset_peak_memory_stats()
  last = None

  def start():
    nonlocal last
    last = step(tokens)
    if DEVICE == "cuda":
      done = torch.cuda.Event()
      done.record()
      return done

  child.tell(ms=child.median_ms(start, lambda done: done and done.synchronize()))
  peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
  child.tell(loss=float(last), peak_gb=round(peak / 1e9, 6) or None)


if __name__ == "__main__":
  sys.exit(child.main(measure))
