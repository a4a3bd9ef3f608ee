"""FlexAttention over listed blocks, compiled: bfloat16, forward and forward + backward.

Its mask is made of the lists themselves, without a look at pairs.
"""

import sys
from typing import Any

import torch
from torch.nn.attention import flex_attention

from experiments.benchmark.gpu.steps import child
from experiments.benchmark.gpu.steps import drawn
from experiments.benchmark.gpu.steps.flex_attention import median_ms


def mask_of(lists: torch.Tensor, block_size: int) -> flex_attention.BlockMask:
  """Of int32 [H, nq, top] as `drawn.lists`, where a list is that of a block of queries.

  A list ends with the block of its own queries, the only one that is masked.
  """
  H, nq, top = lists.shape
  own = torch.arange(nq, device=lists.device, dtype=torch.int32)[None].expand(H, nq).contiguous()
  earlier = (lists >= 0) & (lists < own[..., None])
  # PyTorch wants room for all blocks, of which it reads as many as it is told there are.
  partial, full = (lists.new_zeros((1, H, nq, nq)) for _ in range(2))
  partial[0, :, :, 0] = own
  full[0, :, :, :top] = torch.where(earlier, lists, 0)
  count = earlier.sum(dim=-1, dtype=torch.int32)[None]
  return flex_attention.BlockMask.from_kv_blocks(
    torch.ones_like(count), partial, count, full, BLOCK_SIZE=block_size, mask_mod=causal
  )


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
  return j <= i


def measure(job: dict[str, Any]) -> None:
  """Tells {"shape top": {"building" or direction: ms}}.

  Args:
    job: `H` and `block_size`, and of each of `shapes` by name `T`, `D` and the `tops`.
  """
  child.tell(library=f"PyTorch {torch.__version__}")
  torch.manual_seed(0)
  H, b = job["H"], job["block_size"]
  for name, shape in job["shapes"].items():
    torch.compiler.reset()  # each shape is a program of its own
    T, size = shape["T"], (1, H, shape["T"], shape["D"])
    q, k, v, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    attend = torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True)
    for top in shape["tops"]:
      lists = torch.from_numpy(drawn.lists(T, b, b, top, H)).cuda()
      building = median_ms(lambda lists=lists: mask_of(lists, b))
      blocks = mask_of(lists, b)
      forward = lambda attend=attend, inputs=inputs, blocks=blocks: attend(
        *inputs, block_mask=blocks
      )
      with torch.no_grad():
        alone = median_ms(forward)
      of = inputs, dout
      both = median_ms(lambda forward=forward, of=of: torch.autograd.grad(forward(), *of))
      child.tell(**{f"{name} {top}": dict(building=building, fwd=alone, fwdbwd=both)})


if __name__ == "__main__":
  sys.exit(child.main(measure))
