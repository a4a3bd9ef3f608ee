"""A model of long sounds on your own recordings, in one file: train, score, continue one as a WAV.

  pip install 'sparse-flax[all]'
  python long_audio.py                                      # 30 s of violin, packaged
  python long_audio.py --folder=FOLDER --length=65536

The folder may hold WAV, FLAC, MP3 and Ogg of any rate. A sequence is raw samples, 16,384 of them by
default: in each head attention to everything looks at 134 million pairs of them, this at 2 million
or less. A few minutes on a laptop's CPU; the same file runs on a GPU (pip install
'sparse-flax[cuda13]'), where a --length of 65,536 and more is at home. Copy it and change it.
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
parser.add_argument("--folder", help="of recordings; default: a packaged one")
parser.add_argument("--length", type=int, default=16_384, help="samples that the model sees")
parser.add_argument("--steps", type=int, default=200, help="of training")
parser.add_argument("--seconds", type=float, default=0.5, help="of sound to draw")
parser.add_argument("--out", default="sample.wav", help="the WAV file that gets it")
args = parser.parse_args()
for flag, least in (("length", 256), ("steps", 1), ("seconds", 0.001)):
  if getattr(args, flag) < least:
    parser.error(f"--{flag}={getattr(args, flag)}: must be a number >= {least}")

BATCH_SIZE = 1  # sequences per step; a GPU takes more
LEARNING_RATE = 2e-3
LOG_EVERY = 10
MAX_SCORED = 4  # held-out sequences

# -------------------------------------------------------------------------------------------- Data

# Sound becomes bytes by mu-law, as in telephones: 256 steps that are finer where it is quiet. The
# library reads any rate and any number of channels as mono at 12,000 samples a second.
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
if args.folder is None:
  open_split = lambda split: data.open_dataset(
    "audio_sample", path="", split=split, seq_len=args.length, split_seed=0
  )
  train, validation = open_split("train"), open_split("validation")
else:
  paths = sorted(
    path for path in pathlib.Path(args.folder).rglob("*") if path.suffix.lower() in SUFFIXES
  )
  if not paths:
    parser.error(
      f"--folder={args.folder}: must be a folder with recordings ({', '.join(SUFFIXES)})"
    )
  try:
    recordings = [data.load_codes(path) for path in paths]  # uint8, one after the other in memory
  except ValueError as error:
    raise SystemExit(f"--folder: {error}") from error
  # The end of each recording is held out. No sequence reaches from one recording into the next.
  cuts = [len(codes) * 9 // 10 for codes in recordings]
  parts = lambda pieces, split: data.of_arrays(pieces, split=split, modality="audio")
  train = parts([codes[:cut] for codes, cut in zip(recordings, cuts, strict=True)], "train")
  validation = parts(
    [codes[cut:] for codes, cut in zip(recordings, cuts, strict=True)], "validation"
  )
seconds = [split.num_bytes / data.SAMPLE_RATE for split in (train, validation)]
print(f"{seconds[0]:,.1f} s to train on, {seconds[1]:,.1f} s held out, {data.SAMPLE_RATE:,} Hz")

# The batch of a step is a function of the seed and the step: a program that is stopped can go on
# with the same batches. uint8 [BATCH_SIZE, length].
try:
  batch_at = data.make_batches(train, seq_len=args.length, batch_size=BATCH_SIZE, seed=0)
except ValueError as error:
  raise SystemExit(f"--length={args.length}: {error}") from error

# ------------------------------------------------------------------------------------------- Model

# Which earlier samples does a sample attend to? Layers take turns: "local" sees the last `stride`
# samples, "column" every `stride`-th one before. Two layers reach everything, and with a stride
# near the root of the length each looks at about that many: work grows as length ** 1.5, not as
# its square, which is what makes long sequences possible. For text see language_model.py.
stride = 2 ** round(math.log2(args.length) / 2)
model = SparseTransformer(
  modality="audio",
  seq_len=args.length,
  width=64,
  num_layers=2,
  num_heads=2,
  attention_layers=("local", "column"),  # a cycle over the layers; the paper has 1 column, 3 local
  stride=stride,
  # Positions are learned, block and place in the block each: not a vector for every sample.
  position_shape=(-(-args.length // stride), stride),
  dropout=0.0,
  # On a GPU memory is what long sequences lack: "auto" keeps for the backward pass what fits, and
  # computes the rest again.
  remat="none" if jax.default_backend() == "cpu" else "auto",
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
      f"step {step}/{args.steps}  {bits:.2f} bits/byte  {rate:.2f} steps/s  {left:.0f} s left",
      flush=True,
    )

# ---------------------------------------------------------------------------------- Held-out sound

score = jax.jit(
  lambda params, tokens, scored: jnp.where(scored, nats_per_byte(params, tokens), 0.0).sum()
)
total, count, given = 0.0, 0, None
batches = data.eval_batches(validation, seq_len=args.length, min_context=0, batch_size=BATCH_SIZE)
for _, (tokens, scored) in zip(range(MAX_SCORED), batches, strict=False):
  total += float(score(params, tokens, scored))
  count += int(scored.sum())
  given = (
    tokens[0, : scored[0].sum()] if given is None else given
  )  # real sound, to be continued below
print(
  f"held-out sound: {total / count / math.log(2):.3f} bits/byte ({count:,} samples; 8 is chance)"
)

# ---------------------------------------------------------------------------------------- Sampling

# One sample after the other, keeping the keys and values that later ones may attend to: what is
# given is read in one pass. On an NVIDIA GPU a step is one kernel, where the model fits it.
new = min(round(args.seconds * data.SAMPLE_RATE), args.length - 1)
prompt = given[: min(len(given) - 1, args.length - new)]
(codes,) = sample.generate(
  nnx.merge(graphdef, params),
  key=jax.random.key(0),
  num=1,
  prompts=[prompt],
  length=len(prompt) + new,
)
data.write_wav(args.out, data.mu_law_decode(np.asarray(codes)))
at = len(prompt) / data.SAMPLE_RATE
print(
  f"{args.out}: {at:.2f} s of held-out sound, then {new / data.SAMPLE_RATE:.2f} s of the model's"
)
