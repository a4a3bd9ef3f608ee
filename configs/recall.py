"""Recall across a long text: records, and later questions that only they answer (synthetic).

  python -m experiments.train --config=configs/recall.py

256 bytes with 8 records; a step takes some 0.2 s on two CPU cores. No data are needed: they are
made while they are read. Half a sequence holds records, a key and a value between filler, and its
last quarter a question for each of them. Only the answers are trained on and scored, and evaluation
says which share is right: with 62 values, chance is 0.016. Two layers are what it takes: the first
tells a value what its key is, the second looks for the record. A layer that sees none of the 8
places behind a record cannot answer, whatever it learns.

Matching begins with a plateau, and no run was long enough yet to leave it: on two CPU cores the
recipe had 0.014 right after 300 steps, and `:dense` with a learning rate of 3e-3 0.023 after 1,000.

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
      seq_len=256,
      width=64,
      num_layers=2,
      num_heads=2,
      attention_layers=("local", "nsa"),
      stride=8,
      position_shape=(32, 8),
      rope="tokens",
      learned=dict(block_size=8, top=6, query_block=1, local=1, window=8, index_size=32),
      remat="none",
      compute_dtype="float32",
    ),
    data=dict(name="far_recall", batch_size=8, recall=dict(records=8)),
    train=dict(steps=2_000, eval_every=250, save_every=1_000, ema_decay=0.98),
    mesh=dict(data=1),
    optim=dict(learning_rate=1e-3, warmup_steps=200, b2=0.98, weight_decay=0.0),
    eval=dict(monitor_batches=10, pictures=0),
    variants=dict(
      moba=second("moba", learned_stages=((0, "dense"), (1_000, 6))),
      indexer=second("indexer", learned_stages=((0, "dense"), (1_000, 6))),
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
        data=dict(recall=dict(records=64)),
      ),
    ),
  )
