"""A model of pictures on your own folder, in one file: train, score, draw new ones as a PNG.

  pip install 'sparse-flax[all]'
  python images.py                                          # 1,000 packaged photographs
  python images.py --folder=FOLDER --size=32

The folder may hold PNG, JPEG and WebP of any size, in folders of its own: the middle of each is
scaled to size x size pixels. A few minutes on a laptop's CPU; the same file runs on a GPU
(pip install 'sparse-flax[cuda13]'). Copy it and change it.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparse_flax import data
from sparse_flax import sample
from sparse_flax import SparseTransformer
from sparse_flax.view import grids

# ------------------------------------------------------------------------------- Flags and settings

parser = argparse.ArgumentParser(
  description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--folder", help="of pictures; default: a packaged sample of CIFAR-10")
parser.add_argument("--size", type=int, default=32, help="rows and columns of the model's pictures")
parser.add_argument("--steps", type=int, default=700, help="of training")
parser.add_argument("--num", type=int, default=8, help="new pictures to draw")
parser.add_argument("--out", default="samples.png", help="the PNG file that gets them")
args = parser.parse_args()
for flag, least in (("size", 2), ("steps", 1), ("num", 1)):
  if getattr(args, flag) < least:
    parser.error(f"--{flag}={getattr(args, flag)}: must be a whole number >= {least}")

BATCH_SIZE = 4  # pictures per step
LEARNING_RATE = 1.5e-3
LOG_EVERY = 25
MAX_SCORED = 100  # held-out pictures

# A picture is a sequence of bytes: rows from top to bottom, pixels from left to right, red, green
# and blue of each. The model predicts every byte from those before it.
SHAPE = (args.size, args.size, 3)
LENGTH = math.prod(SHAPE)

# -------------------------------------------------------------------------------------------- Data

# What the folder holds is cut to size once, and kept beside it. One picture in 20 is held out for
# validation, and another for a test.
if args.folder is None and args.size != 32:
  parser.error(f"--size={args.size}: must be 32 for the packaged pictures; or give a --folder")


def open_split(split):
  name = "cifar10_sample" if args.folder is None else "images"
  try:
    return data.open_dataset(
      name, path=args.folder or "", split=split, seq_len=LENGTH, split_seed=0
    )
  except ValueError as error:
    raise SystemExit(f"--folder: {error}") from error


train, validation = open_split("train"), open_split("validation")
counts = [len(split.streams.lengths) for split in (train, validation)]
print(f"{counts[0]:,} pictures to train on, {counts[1]:,} held out")

# The batch of a step is a function of the seed and the step: a program that is stopped can go on
# with the same batches. uint8 [BATCH_SIZE, LENGTH].
try:
  batch_at = data.make_batches(train, seq_len=LENGTH, batch_size=BATCH_SIZE, seed=0)
except ValueError as error:
  raise SystemExit(f"--folder: {error}") from error

# ------------------------------------------------------------------------------------------- Model

# Which earlier bytes does a byte attend to? Pictures have a period, one row, which is the stride
# here: "local" sees the bytes of the last row, "column" those straight above. Over two layers that
# reaches everything before. For text see language_model.py.
model = SparseTransformer(
  modality="image",
  seq_len=LENGTH,
  width=64,
  num_layers=1,  # of the minutes on a CPU one layer makes the most; a GPU wants more
  num_heads=4,
  # Half of the heads each. ("local", "column") instead of (("local", "column"),): a layer each.
  attention_layers=(("local", "column"),),
  stride=3 * args.size,
  position_shape=SHAPE,  # learned vectors of the row, the column and the colour, added up
  dropout=0.0,  # a small set seen many times wants 0.1 to 0.3
  remat="none",  # keep all that the backward pass needs; "full" trades time for memory
  # Matrix products in bfloat16 where that is fast; weights and sums stay float32.
  compute_dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
  rngs=nnx.Rngs(0),
)

# Flax's idiom: split the module into what is static and a tree of weights, train the tree with
# plain JAX, merge them again where the module is needed.
graphdef, params = nnx.split(model, nnx.Param)
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters on {jax.devices()[0]}")

# ---------------------------------------------------------------------------------------- Training

schedule = optax.warmup_cosine_decay_schedule(
  0.0, LEARNING_RATE, warmup_steps=max(1, args.steps // 20), decay_steps=max(2, args.steps)
)
optimizer = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01)
)
opt_state = optimizer.init(params)


def nats_per_byte(params, tokens):
  """-log p of every byte: float32 [B, T]. The model shifts its input itself: logits[:, t] are of
  tokens[:, t] and know the bytes before it only, so inputs and targets are the same array."""
  logits = nnx.merge(graphdef, params)(tokens)  # [B, T, 256]
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens.astype(jnp.int32))


# Donated: the new weights take the memory of the old ones. What is donated cannot be used again.
@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, tokens):
  loss, grads = jax.value_and_grad(lambda p: nats_per_byte(p, tokens).mean())(params)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


print("compiling ...")
for step in range(1, args.steps + 1):
  params, opt_state, loss = train_step(params, opt_state, batch_at(step - 1))
  # JAX works ahead of Python. To look at a number is to wait for it, so we do that now and then.
  if step == 1:
    print(f"step 1/{args.steps}  {float(loss) / math.log(2):.2f} bits/dim", flush=True)
    start = time.perf_counter()  # from here on nothing is compiled
  elif step % LOG_EVERY == 0 or step == args.steps:
    bits = float(loss) / math.log(2)
    rate = (step - 1) / (time.perf_counter() - start)
    left = (args.steps - step) / rate
    print(
      f"step {step}/{args.steps}  {bits:.2f} bits/dim  {rate:.1f} steps/s  {left:.0f} s left",
      flush=True,
    )

# -------------------------------------------------------------------------------- Held-out pictures

# Bits per dimension, that is per byte. The first is 8.00 exactly, PNG needs 5.73 for CIFAR-10, and
# the paper reached 2.80 with 59 million parameters and all of its training pictures.
score = jax.jit(
  lambda params, tokens, scored: jnp.where(scored, nats_per_byte(params, tokens), 0.0).sum()
)
total, count, given = 0.0, 0, None
for tokens, scored in data.eval_batches(
  validation, seq_len=LENGTH, min_context=0, batch_size=BATCH_SIZE
):
  total += float(score(params, tokens, scored))
  count += int(scored.sum())
  given = tokens[0] if given is None else given  # the first one, to be completed below
  if count >= MAX_SCORED * LENGTH:
    break
print(
  f"held-out pictures: {total / count / math.log(2):.3f} bits/dim ({count // LENGTH:,} of them)"
)

# ---------------------------------------------------------------------------------------- Sampling

# One byte after the other, keeping the keys and values that later bytes may attend to. On an NVIDIA
# GPU a step is one kernel, where the model fits it. Below the new pictures come completions of a
# held-out one, whose upper half is given: prompts may have any length.
half = LENGTH // 2
prompts = [np.zeros(0, np.uint8)] * args.num + [given[:half]] * args.num
drawn = sample.generate(
  nnx.merge(graphdef, params),
  key=jax.random.key(0),
  num=2 * args.num,
  prompts=prompts,
)
pictures = [row.reshape(SHAPE) for row in np.asarray(drawn)]
grids.save_grid(args.out, [pictures[: args.num], pictures[args.num :]])
print(f"{args.num} new pictures, and as many lower halves of one, in {args.out}")
