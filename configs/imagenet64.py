"""ImageNet 64x64 bytes, context 12,288, 48 layers of width 512, 152M parameters (arXiv:1904.10509).

  python -m experiments.train --config=configs/imagenet64.py --config.data.path=FOLDER

FOLDER holds train_64x64.tar and valid_64x64.tar of the PixelRNN release (1,281,149 and 49,999
images), or a TFDS folder with downsampled_imagenet/64x64 prepared. The later set of the same
nickname (1,281,167 and 50,000 images) has other pixels: never compare the two. The published
validation images serve as validation and test here; the paper reports them.

| variant | layers | bits/dim, paper                  | time, paper     | ours     |
|---------|--------|----------------------------------|-----------------|----------|
| (none)  | 48     | 3.44                             | 7 days, 64 V100 | none yet |
| `:300m` | 96     | none: drew the published samples | none            | none yet |

The paper's: sizes, strided attention with stride 128, dropout, warm-up, decay, clipping, 70 epochs.
From its authors' later code: the 1:3 cycle, learning rate, batch. Our choice: bfloat16 and the
initial values of the matrices. A row of the picture is 192 bytes, so that columns of stride 128 do
not line up with pixels; `--config.model.stride=192` makes them.

`:quick` checks a folder of images on a laptop's CPU, in minutes. It needs the folder too:

  python -m experiments.train --config=configs/imagenet64.py:quick --config.data.path=FOLDER

Measured on 2 CPU cores with 1,771 photographs: 3 min 8 s in all, reading the tar file included, and
7.45 bits/dim on 50 held-out pictures: enough to see that it learns. Every number is our choice.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The recipe, or one of its variants: quick, 300m."""
  return common.recipe(
    variant,
    model=dict(
      modality="image",
      seq_len=12_288,
      width=512,
      num_layers=48,
      num_heads=16,
      attention_layers=("local", "column", "local", "local"),
      stride=128,
      position_shape=(64, 64, 3),
      dropout=0.01,
    ),
    data=dict(name="downsampled_imagenet/64x64", batch_size=128),
    train=dict(steps=700_560, eval_every=10_008, save_every=5_004),  # 70 epochs of 10,008 steps
    optim=dict(learning_rate=1.5e-4),
    variants={
      "quick": dict(
        model=dict(
          width=64,
          num_layers=2,
          num_heads=2,
          attention_layers=("column", "local"),
          stride=192,
          dropout=0.0,
          remat="none",
          compute_dtype="float32",
        ),
        data=dict(batch_size=1),
        train=dict(steps=300, log_every=20, eval_every=100, save_every=100, ema_decay=0.98),
        mesh=dict(data=1),  # the batch is small
        optim=dict(learning_rate=2e-3, warmup_steps=50, b2=0.98),
        eval=dict(monitor_batches=50),  # the split has 49,999 images: hours on a CPU
      ),
      "300m": dict(model=dict(num_layers=96)),
    },
  )
