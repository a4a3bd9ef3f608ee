"""Recall across a long text: records, and later questions that only they answer (synthetic).

  python -m experiments.train --config=configs/recall.py

64 bytes with 2 records; 2,000 steps take 6 minutes on two CPU cores. No data are needed: they are
made while they are read. Half a sequence holds records, a key and a value between filler, and its
last quarter a question for each of them. Only the answers are trained on and scored, and
evaluation says which share is right: with 62 values, chance is 0.016. Two layers are what it
takes: the first tells a value what its key is, the second looks for the record. A layer that sees
none of the 8 places behind a record cannot answer, whatever it learns.

After its 2,000 steps the recipe answers 0.53 right on the test split, and still learns. With 256
bytes, 8 or 16 records and batches of 8 or 32 no run had left the plateau with which matching
begins after 750 to 1,400 steps.

| variant      | the second layer                                                  |
|--------------|-------------------------------------------------------------------|
| (none)       | `nsa`: pooled keys, chosen blocks, a window                       |
| `:moba`      | blocks by pooled keys, all of them for the first 1,000 steps      |
| `:indexer`   | blocks by an indexer, all of them for the first 1,000 steps       |
| `:dense`     | every earlier byte                                                |
| `:strided`, `:fixed` | patterns that see few of the places that answer           |
| `:long`      | `nsa`, 32,768 bytes with 64 records: for a GPU                    |

`--config.data.recall.key=3` has keys of three bytes, from the alphabet of the filler, which take
longer to match. Where queries share a list, `--config.data.recall.delay=16` puts as many bytes
between a question and its answer, so that the list is chosen after the question.
"""

import ml_collections

from configs import common


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The recipe, or one of its variants: moba, indexer, dense, strided, fixed, long."""
  second = lambda name, **model: dict(model=dict(attention_layers=("local", name), **model))
  return common.recipe(
    variant,
    model=dict(
      modality="text",
      seq_len=64,
      width=64,
      num_layers=2,
      num_heads=2,
      attention_layers=("local", "nsa"),
      stride=8,
      position_shape=(8, 8),
      rope="tokens",
      learned=dict(block_size=8, top=4, query_block=1, local=1, window=8, index_size=32),
      remat="none",
      compute_dtype="float32",
    ),
    data=dict(name="far_recall", batch_size=64, recall=dict(records=2)),
    train=dict(steps=2_000, eval_every=250, save_every=1_000, ema_decay=0.98),
    mesh=dict(data=1),
    optim=dict(learning_rate=3e-3, warmup_steps=100, b2=0.98, weight_decay=0.0),
    eval=dict(monitor_batches=10, pictures=0),
    variants=dict(
      moba=second("moba", learned_stages=((0, "dense"), (1_000, 4))),
      indexer=second("indexer", learned_stages=((0, "dense"), (1_000, 4))),
      dense=second("dense"),
      strided=second("strided"),
      fixed=second("fixed", summary_width=1),
      long=dict(
        model=dict(
          seq_len=32_768,
          width=128,
          position_shape=(4_096, 8),
          learned=dict(block_size=64, top=16, window=64, index_size=64),
          compute_dtype="bfloat16",
        ),
        data=dict(batch_size=8, recall=dict(records=64)),
        optim=dict(learning_rate=1e-3, warmup_steps=200),
      ),
    ),
  )
