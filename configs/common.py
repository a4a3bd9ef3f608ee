"""What all recipes share, and the way a variant changes a recipe."""

import ml_collections
from ml_collections import config_dict


def recipe(
  variant: str,
  *,
  model: dict,
  data: dict,
  train: dict,
  optim: dict,
  variants: dict[str, dict],
  mesh: dict | None = None,
  eval: dict | None = None,
) -> ml_collections.ConfigDict:
  """The locked config of one data set: the shared values, then the data set's, then `variant`'s.

  Args:
    variant: "" for the paper's recipe, or a key of `variants`.
    model, data, train, optim, mesh, eval: what differs from the shared values below.
    variants: for each name, {group: {field: value}} that it changes.

  Raises:
    ValueError: `variant` is not one of `variants`.
  """
  config = ml_collections.ConfigDict(_shared())
  of_groups = dict(model=model, data=data, train=train, optim=optim, mesh=mesh or {})
  for group, values in of_groups.items():
    config[group].update(values)
  config.eval.update(eval or {})
  if variant not in ("", *variants):
    known = ", ".join(f":{name}" for name in variants)
    raise ValueError(f"unknown variant {variant!r}: this config has {known}, or none for the paper")
  if variant:
    for group, values in variants[variant].items():
      config[group].update(values)
  return config.lock()


def _shared() -> dict:
  """Every field there is. Marks: p the paper, d code its authors published later, u our choice."""
  return dict(
    seed=0,  # u
    model=dict(  # the arguments of sparse_flax.SparseTransformer
      modality="image",
      seq_len=0,
      width=0,
      num_layers=0,
      num_layers_after=0,  # of inner
      num_heads=0,
      ff_mult=4.0,  # p: feed-forward width / width
      activation="quick_gelu",  # p: u sigmoid(1.702 u), the feed-forward part's
      qk_ratio=1.0,  # p: width of q and k / width
      attention_layers=("dense",),  # a cycle over the layers; a tuple inside it: one per head group
      stride=128,
      summary_width=0,
      sub_blocks=1,
      position_shape=(0,),
      dropout=0.0,
      embed_dropout=0.0,  # d
      init_scheme="default",  # u: the paper's embeddings, the published code's matrices
      rope="none",  # p: learned positions alone
      qk_norm=False,  # p
      learned=dict(  # of layers that are "moba", "nsa" or "indexer"; u
        block_size=128,  # keys
        top=16,  # blocks that a query reads
        query_block=16,  # queries that share a list
        first=1,  # blocks from the beginning that are always read
        local=1,  # a query's own block, and those before it, that are always read
        lists="group",  # "head", "all": who has a list
        window=512,  # of nsa
        index_size=64,  # of indexer: features of its queries and keys
        index_heads=0,  # of indexer; 0: as many as lists
        key_conv=0,  # of moba: taps over keys
      ),
      learned_stages=(),  # (step, "dense" or so many blocks), ...; (): `top` from the beginning
      inner=dict(),  # p; layers on groups of tokens: dict(shorten=3, num_layers=8, ...)
      order="raster",  # p; "patches": images square by square
      patch=2,  # pixels of a side of a square
      remat="auto",  # u: the most that fits where blocks are kernels'; else the paper's "full"
      compute_dtype="bfloat16",  # u: the paper has float16
      param_dtype="float32",  # p
      implementation=config_dict.placeholder(str),  # None: the fastest that works here
    ),
    data=dict(
      name="",
      path="",
      batch_size=0,  # sequences per step, over all devices and hosts
      split_seed=11172018,  # d: which training images become the validation split
      field="text",  # of .jsonl files
      skip_damaged=False,  # pictures of a folder that cannot be read are left out, not refused
      recall=dict(  # of "far_recall"
        records=0,  # of a sequence; 0: one per 512 tokens
        key=1,  # bytes of a key; 1: the easy form
        delay=0,  # bytes between a question and its answer
      ),
      mirror=False,  # p; images are trained on with left and right swapped half of the time
    ),
    train=dict(
      steps=0,
      log_every=100,  # steps
      eval_every=0,  # steps; on the validation split, with averaged weights if any
      save_every=0,  # steps; the two newest and the best are kept
      keep_every=0,  # steps; such checkpoints are kept for good; 0: none
      max_skipped=10,  # updates in a row without a finite loss and gradient that end the run
      accumulation=1,  # micro-batches per step
      ema_decay=0.999,  # d; 0: no average is kept, the weights themselves are evaluated
    ),
    optim=dict(
      name="adam",  # p; "muon" moves the layers' matrices by Muon
      learning_rate=0.0,
      schedule="cosine",  # p; or "linear"
      warmup_steps=5_000,  # p
      b1=0.9,  # d
      b2=0.999,  # d
      eps=1e-8,  # d
      weight_decay=0.01,  # p
      clip_norm=1.0,  # p
      final_lr_ratio=0.0,  # d: down to exactly 0
      momentum=0.95,  # of Muon
      muon_ratio=1.0,  # of Muon: how far matrices move, over what Adam's would
      momentum_dtype="float32",  # u
      index_loss=1.0,  # of layers that are "indexer": factor of their own loss
      loss_scale="none",  # "dynamic" goes with compute_dtype="float16"
    ),
    mesh=dict(data=-1, fsdp=1, tensor=1, sequence=1),  # -1: all devices
    eval=dict(
      min_context=0,  # tokens known before the first scored one; training always monitors with 0
      monitor_batches=0,  # how much of the validation split training looks at; 0: all
      pictures=4,  # samples, and completions, drawn at each evaluation of a training run; 0: none
    ),
  )
