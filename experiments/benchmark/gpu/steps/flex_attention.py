"""FlexAttention alone, compiled, on one shape: bfloat16, forward and forward + backward."""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention

from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import masks

ROUNDS, CALLS = 5, 10  # of calls in a row, so that the device waits for no launch


def median_ms(call: Callable[[], Any]) -> float:
  """Of a call, by the events of the device."""
  times = []
  for _ in range(1 + ROUNDS):  # the first compiles
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
      call()
    end.record()
    end.synchronize()
    times.append(begin.elapsed_time(end) / CALLS)
  return round(statistics.median(times[1:]), 5)


def measure(job: dict[str, Any]) -> None:
  """Tells {pattern: {direction: ms}}.

  Args:
    job: `B`, `T`, `H` and `D` of all arrays, and `patterns` by name as `masks.described`.
  """
  child.tell(library=f"PyTorch {torch.__version__}")
  torch.manual_seed(0)
  size = [job[name] for name in "BHTD"]
  q, k, v, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
  inputs = [x.requires_grad_() for x in (q, k, v)]
  make_blocks = torch.compile(flex_attention.create_block_mask)  # else it holds T x T integers
  for name, pattern in job["patterns"].items():
    torch.compiler.reset()  # each pattern is a program of its own, as in a model
    T = job["T"]
    blocks = make_blocks(masks.mask_of(pattern), None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)
    forward = lambda attend=attend, blocks=blocks: attend(*inputs, block_mask=blocks)
    with torch.no_grad():
      alone = median_ms(forward)
    both = median_ms(lambda forward=forward: torch.autograd.grad(forward(), inputs, dout))
    child.tell(**{name: {"fwd": alone, "fwdbwd": both}})


if __name__ == "__main__":
  sys.exit(child.main(measure))
