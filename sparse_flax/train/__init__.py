"""Training: the step, the loop around it, and what both need."""

from sparse_flax import extras

extras.need("train", of=__name__)

from sparse_flax.train.loop import Evaluation
from sparse_flax.train.loop import stop_if_not_finite
from sparse_flax.train.loop import train
from sparse_flax.train.step import compiler_options
from sparse_flax.train.step import init_state
from sparse_flax.train.step import jit_step
from sparse_flax.train.step import make_step
from sparse_flax.train.step import optimizer_of
from sparse_flax.train.step import train_step

__all__ = [
  "Evaluation", "compiler_options", "init_state", "jit_step", "make_step", "optimizer_of",
  "stop_if_not_finite", "train", "train_step",
]  # fmt: skip
