"""A language model of bytes on your own text, in one file: train, score, continue a prompt.

  pip install 'sparse-flax[all]'
  python language_model.py                                  # the packaged piece of Wikipedia
  python language_model.py --text=FILE_OR_FOLDER --prompt="Once upon a time"

A few minutes on a laptop's CPU; the same file runs on a GPU (pip install 'sparse-flax[cuda13]').
Any file will do, whatever its language or encoding: the model sees bytes. Copy it and change it.
"""

import argparse
import functools
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparse_flax import data
from sparse_flax import sample
from sparse_flax import SparseTransformer

# ------------------------------------------------------------------------------- Flags and settings

parser = argparse.ArgumentParser(
  description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--text", help="a file, or a folder of .txt, .md and .jsonl; default: packaged")
parser.add_argument("--steps", type=int, default=1_000, help="of training")
parser.add_argument("--prompt", default="The history of ", help="what to continue")
parser.add_argument("--temperature", type=float, default=0.8, help="of sampling; 0: the likeliest")
parser.add_argument(
  "--out", default="sample.txt", help="the file that gets prompt and continuation"
)
args = parser.parse_args()
prompt = args.prompt.encode()
if args.steps < 1:
  parser.error(f"--steps={args.steps}: must be a whole number >= 1")

CONTEXT = 256  # bytes that the model sees; the paper has 12,288
BATCH_SIZE = 8  # sequences per step
LEARNING_RATE = 2e-3  # larger models want less: 3e-4 for a width of 512
LOG_EVERY = 50
MAX_SCORED = 64  # batches of held-out text

if len(prompt) >= CONTEXT:
  parser.error(f"--prompt has {len(prompt)} bytes: must be fewer than the model's {CONTEXT}")

# -------------------------------------------------------------------------------------------- Data

# A data set is a string of bytes, of which 90, 5 and 5 % are for training, validation and test. It
# may be larger than memory: a file is mapped, not read.
if args.text is None:
  name, path = "enwik8_sample", ""
else:
  name, path = ("texts" if pathlib.Path(args.text).is_dir() else "bytes"), args.text


def open_split(split):
  try:
    return data.open_dataset(name, path=path, split=split, seq_len=CONTEXT, split_seed=0)
  except ValueError as error:
    raise SystemExit(f"--text: {error}") from error


train, validation = open_split("train"), open_split("validation")
print(f"{name}: {train.num_bytes:,} bytes to train on, {validation.num_bytes:,} held out")

# The batch of a step is a function of the seed and the step: a program that is stopped can go on
# with the same batches. uint8 [BATCH_SIZE, CONTEXT].
try:
  batch_at = data.make_batches(train, seq_len=CONTEXT, batch_size=BATCH_SIZE, seed=0)
except ValueError as error:
  raise SystemExit(f"--text: {error}") from error

# ------------------------------------------------------------------------------------------- Model

# Which earlier bytes does a byte attend to? Text has no rows, so "fixed" suits it: the bytes of its
# own block of `stride`, and the last `summary_width` bytes of every earlier block, which learn to
# sum that block up. With `sub_blocks` heads have their summaries at different places. For pictures
# and sound see images.py and long_audio.py; "dense" is the attention to everything.
model = SparseTransformer(
  modality="text",
  seq_len=CONTEXT,
  width=128,
  num_layers=2,
  num_heads=4,
  attention_layers=("fixed",),  # a cycle over the layers: ("local", "fixed") would take turns
  stride=16,  # near the root of CONTEXT
  summary_width=4,
  sub_blocks=4,
  # Positions are learned, block and place in the block each: 16 + 16 vectors, not 256.
  # rope="tokens" turns queries and keys by their positions as well.
  position_shape=(CONTEXT // 16, 16),
  dropout=0.0,  # a small text seen many times wants 0.1 to 0.4
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
  optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
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
    print(f"step 1/{args.steps}  {float(loss) / math.log(2):.2f} bits/byte", flush=True)
    start = time.perf_counter()  # from here on nothing is compiled
  elif step % LOG_EVERY == 0 or step == args.steps:
    bits = float(loss) / math.log(2)
    rate = (step - 1) / (time.perf_counter() - start)
    left = (args.steps - step) / rate
    print(
      f"step {step}/{args.steps}  {bits:.2f} bits/byte  {rate:.1f} steps/s  {left:.0f} s left",
      flush=True,
    )

# ----------------------------------------------------------------------------------- Held-out text

# Each byte is scored once. Windows overlap by half, so that it has at least that much before it:
# a model scored without context looks worse than it is.
score = jax.jit(
  lambda params, tokens, scored: jnp.where(scored, nats_per_byte(params, tokens), 0.0).sum()
)
total, count = 0.0, 0
batches = data.eval_batches(
  validation, seq_len=CONTEXT, min_context=CONTEXT // 2, batch_size=BATCH_SIZE
)
for _, (tokens, scored) in zip(range(MAX_SCORED), batches, strict=False):
  total += float(score(params, tokens, scored))
  count += int(scored.sum())
print(f"held-out text: {total / count / math.log(2):.3f} bits/byte ({count:,} bytes; 8 is chance)")

# ---------------------------------------------------------------------------------------- Sampling

# One byte after the other, keeping the keys and values that later bytes may attend to. On an NVIDIA
# GPU a step is one kernel, where the model fits it.
trained = nnx.merge(graphdef, params)
(text,) = sample.generate(
  trained,
  key=jax.random.key(0),
  num=1,
  prompts=[prompt],
  temperature=args.temperature,
)
text = np.asarray(text).tobytes()
pathlib.Path(args.out).write_bytes(text)
print(f"\n{text.decode(errors='replace')}\n\nwritten to {args.out}")
