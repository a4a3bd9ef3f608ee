"""CIFAR-10 bytes, context 3,072, 128 layers of width 256, 59M parameters (arXiv:1904.10509).

  python -m experiments.train --config=configs/cifar10.py --config.data.path=FOLDER

The folder holds the official binary files (data_batch_1.bin ... test_batch.bin) or a TFDS folder
with cifar10 prepared. Validation: 2,000 of the training images. Report the test split.

| variant    | attention                   | bits/dim, paper | s/step, its 8 V100 | ours     |
|------------|-----------------------------|-----------------|--------------------|----------|
| (none)     | column, local, local, local | 2.80            | 0.38 (38 h in all) | none yet |
| `:strided` | the same, by its name       | 2.80            | 0.38               | none yet |
| `:fixed`   | block or summary, merged    | 2.85            | 0.47               | none yet |
| `:dense`   | every earlier byte          | 2.82            | 0.54               | none yet |

`:moba`, `:nsa` and `:indexer` (docs/learned.md) choose, in every second layer, which 8 blocks of 64
bytes a query reads. They are our choice altogether, and were not trained yet.

The paper's: sizes, strided attention in a 1:3 cycle with stride 96 (from its authors' later code,
as is the batch of 16), dropout, learning rate, warm-up, decay, clipping, 120 epochs. Our choice:
bfloat16, the initial values of the matrices, and for `:fixed` stride, summaries and sub-blocks.

`:quick` learns the 1,000 images that ship in the package, in about 3 minutes on 2 CPU cores:

  python -m experiments.train --config=configs/cifar10.py:quick

With `--config.data.path=FOLDER` it learns the images of the folder instead.
One layer with two local and two column heads: 5.45 bits/dim on the 100 images held out, after
210 s of training (PNG needs 5.73). Every number of it is our choice (docs/notes/quickstart.md)
and says nothing about the paper's results.

`:record` is for the fewest bits/dim in 20 minutes on one H200: 1.6 million tokens per second there.
A run of 8,000 steps, 9 minutes, gave 2.96 on data_batch_5 (docs/recipes.md, and
`benchmarks/records.md`, which gets a line from the command); one of 20 minutes was not made yet.

  python -m experiments.benchmark record --config.data.path=FOLDER

`:shorten` and `:patches` run most layers on groups of bytes (docs/multiscale.md): 112 of the 128 on
pixels, .41 of the operations of the recipe; or 16 on pixels and 72, wider, on patches of 2 x 2
pixels, .24 of them, in the order of these patches. Every number of them is our choice.

| variant    | layers, on groups of                    | parameters | ours     |
|------------|-----------------------------------------|------------|----------|
| `:shorten` | 16 on bytes, 112 on 3                   | 59.6M      | none yet |
| `:patches` | 12 on bytes, 16 on 3, 72 x 384 on 12    | 88.8M      | none yet |
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The recipe, or one of its variants: quick, dense, fixed, strided, moba, nsa, indexer, shorten,
  patches, record."""
  strided = ("column", "local", "local", "local")
  return common.recipe(
    variant,
    model=dict(
      modality="image",
      seq_len=3_072,
      width=256,
      num_layers=128,
      num_heads=2,
      ff_mult=2.0,
      qk_ratio=0.5,
      attention_layers=strided,
      stride=96,  # one row of 32 pixels
      position_shape=(32, 32, 3),
      dropout=0.25,
    ),
    data=dict(name="cifar10", batch_size=16),
    train=dict(steps=360_000, eval_every=3_000, save_every=3_000),  # 120 epochs of 3,000 steps
    optim=dict(learning_rate=3.5e-4),
    variants=dict(
      quick=dict(
        # At equal time one layer learns more than two, and narrow more than wide.
        model=dict(
          width=64,
          num_layers=1,
          num_heads=4,
          ff_mult=4.0,
          qk_ratio=1.0,
          attention_layers=(("local", "column"),),
          dropout=0.0,
          remat="none",
          compute_dtype="float32",
        ),
        data=dict(name="cifar10_sample", batch_size=4),
        train=dict(steps=1_000, log_every=25, eval_every=500, save_every=500, ema_decay=0.98),
        mesh=dict(data=1),  # the batch is small
        optim=dict(learning_rate=1.5e-3, warmup_steps=50, b2=0.99),
      ),
      dense=dict(model=dict(attention_layers=("dense",))),
      fixed=dict(model=dict(attention_layers=("fixed",), summary_width=32, sub_blocks=2)),
      strided=dict(model=dict(attention_layers=strided)),
      moba=_chosen("moba", learned_stages=((0, "dense"), (2_000, 8))),
      nsa=_chosen("nsa"),
      indexer=_chosen("indexer", learned_stages=((0, "dense"), (2_000, 16), (4_000, 8))),
      shorten=dict(
        model=dict(
          num_layers=8,
          num_layers_after=8,
          attention_layers=("local",),
          inner=dict(
            shorten=3,  # a group is a pixel
            num_layers=112,
            attention_layers=strided,
            stride=32,  # a row
          ),
        ),
      ),
      patches=dict(
        model=dict(
          num_layers=6,
          num_layers_after=6,
          attention_layers=("local",),
          order="patches",
          patch=2,
          inner=dict(
            shorten=3,  # a group is a pixel
            num_layers=8,
            num_layers_after=8,
            stride=32,  # 8 patches
            inner=dict(
              shorten=4,  # a group is a patch of 2 x 2 pixels
              num_layers=72,
              width=384,
              num_heads=3,
              attention_layers=strided,
              stride=16,  # a row of patches
            ),
          ),
        ),
      ),
      record=dict(
        # Fewer layers and wider: products of this width keep a GPU busier.
        model=dict(
          width=512,
          num_layers=12,
          num_heads=4,
          ff_mult=4.0,
          attention_layers=(("local", "column"),),
          rope="axes",
          qk_norm=True,
          dropout=0.0,  # 0.25 for 16 minutes gave 4.2 bits/dim with it on, and 5.9 with it off
        ),
        data=dict(batch_size=32),
        train=dict(steps=18_500, eval_every=2_000, save_every=6_000, ema_decay=0.0),
        optim=dict(
          name="muon",
          learning_rate=2e-3,
          schedule="linear",
          warmup_steps=200,
          b2=0.98,
          weight_decay=0.1,
        ),
        eval=dict(pictures=0),  # no kernel of a step has rope or QK norm: drawing takes long
      ),
    ),
  )


def _chosen(name: str, **model) -> dict:
  """Rows, and between them layers that choose blocks."""
  learned = dict(block_size=64, top=8, query_block=16, local=2, window=96)
  return dict(model=dict(attention_layers=("local", name), learned=learned, **model))
