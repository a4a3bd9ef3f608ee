"""Photographs of 256 x 256, context 196,608, three levels, 84M parameters.

  python -m experiments.train --config=configs/photographs.py --config.data.path=FOLDER

FOLDER holds pictures of any size (PNG, JPEG, WebP), of each of which the middle is scaled to
256 x 256; 5 % each are validation and test. The paper has no such data: every number is our choice.

Bytes are read in patches of 2 x 2 pixels. Four layers run on bytes, four on pixels, and 24 wider
ones on the 128 x 128 patches, with strided attention of their rows (docs/multiscale.md). A flat
model of 24 layers of width 512 takes 8 times the operations.

`:quick` learns 32 x 32 pixels of the same pictures on a laptop's CPU, in minutes:

  python -m experiments.train --config=configs/photographs.py:quick --config.data.path=FOLDER

Ours: none yet.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The recipe, or its variant quick."""
  return common.recipe(
    variant,
    model=dict(
      modality="image",
      seq_len=196_608,
      width=256,
      num_layers=2,
      num_layers_after=2,
      num_heads=4,
      attention_layers=("local",),
      stride=96,  # 8 patches
      position_shape=(256, 256, 3),
      order="patches",
      patch=2,
      inner=dict(
        shorten=3,  # a group is a pixel
        num_layers=2,
        num_layers_after=2,
        stride=32,  # 8 patches
        inner=dict(
          shorten=4,  # a group is a patch of 2 x 2 pixels
          num_layers=24,
          width=512,
          num_heads=8,
          attention_layers=("column", "local", "local", "local"),
          stride=128,  # a row of patches
        ),
      ),
    ),
    data=dict(name="images", batch_size=8, mirror=True),
    train=dict(steps=100_000, eval_every=5_000, save_every=5_000),
    optim=dict(learning_rate=3e-4),
    eval=dict(monitor_batches=50, pictures=0),  # a sample takes 196,608 steps
    variants={
      "quick": dict(
        model=dict(
          seq_len=3_072,
          width=32,
          num_layers=1,
          num_layers_after=0,
          num_heads=2,
          position_shape=(32, 32, 3),
          remat="none",
          compute_dtype="float32",
          inner=dict(
            num_layers=1,
            num_layers_after=0,
            inner=dict(
              num_layers=2, width=64, num_heads=4, stride=16, attention_layers=("column", "local")
            ),
          ),
        ),
        data=dict(batch_size=2, mirror=False),
        train=dict(steps=300, log_every=20, eval_every=100, save_every=100, ema_decay=0.98),
        mesh=dict(data=1),  # the batch is small
        optim=dict(learning_rate=2e-3, warmup_steps=50, b2=0.98),
        eval=dict(pictures=4),
      ),
    },
  )
