"""Piano at 12 kHz as mu-law bytes, context 65,536, 48 layers of width 512, 152M parameters.

  python -m experiments.train --config=configs/audio.py --config.data.path=FOLDER

FOLDER holds WAV recordings, of integers or floats, or FLAC; they become mono, 12 kHz, 8-bit mu-law,
split by recording. The paper's recordings cannot be collected any more (arXiv:1904.10509): bits per
byte on any other folder, MAESTRO included, are not comparable with its Table 4.

| variant | context   | parameters | bits/byte, paper's recordings | ours     |
|---------|-----------|------------|-------------------------------|----------|
| (none)  | 65,536    | 152M       | 1.97                          | none yet |
| `:262k` | 262,144   | 25M        | 2.17                          | none yet |
| `:1m`   | 1,048,576 | 3M         | 2.99                          | none yet |

`:1m-shorten` runs 12 layers on groups of 8 samples and 2 on samples (docs/multiscale.md): 3.4M
parameters, .18 of the operations of `:1m`. Every number of it is our choice.

The paper's: contexts, parameter counts, strided attention, warm-up, decay, clipping. Our choice,
for it says no more: the bodies that have these counts, stride = the root of the context, dropout,
learning rates (those of equally wide models), batches, steps, bfloat16.

`:quick` learns 30 s of solo violin, which ship in the package, on a laptop's CPU, in minutes:

  python -m experiments.train --config=configs/audio.py:quick

With `--config.data.path=FOLDER` it learns the recordings of the folder instead.
Measured on 2 CPU cores: 3 min 17 s in all, 6.57 bits/byte on the clip's validation split. Every
number of it is our choice.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The recipe, or one of its variants: quick, 262k, 1m, 1m-shorten."""
  strided = ("local", "column", "local", "local")
  million = dict(
    seq_len=1_048_576, width=128, num_heads=2, position_shape=(1_024, 1_024), dropout=0.0
  )
  return common.recipe(
    variant,
    model=dict(
      modality="audio",
      seq_len=65_536,
      width=512,
      num_layers=48,
      num_heads=8,
      attention_layers=strided,
      stride=256,
      position_shape=(256, 256),
      dropout=0.01,
    ),
    data=dict(name="audio", batch_size=8),
    train=dict(steps=100_000, eval_every=5_000, save_every=5_000),
    optim=dict(learning_rate=1.5e-4),
    variants={
      "quick": dict(
        model=dict(
          seq_len=2_048,
          width=64,
          num_layers=4,
          num_heads=2,
          attention_layers=("local", "column"),
          stride=64,
          position_shape=(32, 64),
          dropout=0.0,
          remat="none",
          compute_dtype="float32",
        ),
        data=dict(name="audio_sample", batch_size=2),
        train=dict(steps=1_200, log_every=50, eval_every=300, save_every=300, ema_decay=0.98),
        mesh=dict(data=1),  # the batch is small
        optim=dict(learning_rate=2e-3, warmup_steps=100, b2=0.98),
      ),
      "262k": dict(
        model=dict(
          seq_len=262_144,
          width=256,
          num_layers=32,
          num_heads=4,
          stride=512,
          position_shape=(512, 512),
        ),
        train=dict(steps=50_000),
        optim=dict(learning_rate=3.5e-4),
      ),
      "1m": dict(
        model=dict(**million, num_layers=12, stride=1_024),
        train=dict(steps=25_000),
        optim=dict(learning_rate=7e-4),
      ),
      "1m-shorten": dict(
        model=dict(
          **million,
          num_layers=1,
          num_layers_after=1,
          attention_layers=("local",),
          stride=64,
          inner=dict(shorten=8, num_layers=12, attention_layers=strided, stride=512),
        ),
        train=dict(steps=25_000),
        optim=dict(learning_rate=7e-4),
      ),
    },
  )
