"""What `train --help` says of configs: their variants, and the meaning of each field."""

import importlib
import inspect
import re
import textwrap

from sparse_flax import model as model_lib
from sparse_flax.run import validate

WIDTH = 100
# Of the fields that are no arguments of the model, whose docstring tells of the others.
MEANINGS = {
  "model.learned.block_size": "keys of a block, for layers that choose blocks",
  "model.learned.top": "blocks of a list, those that are always read included",
  "model.learned.query_block": "queries that share a list; divides block_size, or is a multiple",
  "model.learned.first": "blocks from the beginning that are always read",
  "model.learned.local": "blocks that are always read: a query's own one and those before it",
  "model.learned.lists": "who has a list: the heads of a key head, all heads, or each; keys have "
  'as many heads as queries here, so that "group" is "head"',
  "model.learned.window": "of nsa: keys of its window",
  "model.learned.index_size": "of indexer: features of its queries and keys",
  "model.learned.index_heads": "of indexer: heads of its queries; 0: as many as lists",
  "model.learned.key_conv": "of moba: taps of a convolution over keys; 0: none",
  "seed": "of initial values, batches and dropout",
  "model.inner.shorten": "rows of the level around it that a row of the inner level stands for",
  "model.inner.pool": "how rows become a group: a product with a matrix, or their mean",
  "model.inner.up": "how a group becomes rows: a product with a matrix, or copies",
  "model.inner.positions": "whether groups have a table of positions of their own",
  "data.name": "of the data set; where only data.path is given, what lies there decides",
  "data.path": "file or folder of the data, gs://... too",
  "data.batch_size": "sequences of a step, over all devices and hosts",
  "data.split_seed": "which training images become the validation split",
  "data.field": "of the objects in .jsonl files that holds the text",
  "data.skip_damaged": "leaves out pictures of a folder that cannot be read, and names them",
  "data.recall.records": "of a sequence of far_recall; 0: one per 512 tokens",
  "data.recall.key": "bytes of a key of far_recall; 1: the easy form, with an alphabet of its own",
  "data.recall.delay": "bytes between a question of far_recall and its answer; at least "
  "model.learned.query_block, where queries share lists",
  "data.mirror": "swaps left and right of each training image with probability 1/2",
  "train.steps": "of the run; the learning rate ends with them; once done they may be raised",
  "train.log_every": "steps between lines of the log",
  "train.eval_every": "steps between evaluations on the validation split",
  "train.save_every": "steps between checkpoints; the two newest and the best are kept",
  "train.keep_every": "steps between checkpoints that are kept for good; 0: none",
  "train.max_skipped": "updates in a row without a finite loss and gradient that end the run",
  "train.accumulation": "parts of a batch that are computed one after the other",
  "train.ema_decay": "of the averaged weights, in a step; 0 keeps no average: evaluation, samples "
  "and exports have the weights themselves",
  "optim.name": 'what moves the weights; "muon" moves the matrices of layers, Adam the rest',
  "optim.learning_rate": "the highest, after the warm-up; then down by optim.schedule",
  "optim.schedule": "how the learning rate comes down after the warm-up: half a cosine, or a line",
  "optim.warmup_steps": "from 0 to the learning rate",
  "optim.b1": "of Adam's mean of gradients",
  "optim.b2": "of Adam's mean of their squares",
  "optim.eps": "of Adam",
  "optim.weight_decay": "of matrices, times the learning rate",
  "optim.clip_norm": "the largest norm of the gradient",
  "optim.final_lr_ratio": "the last learning rate over the highest",
  "optim.momentum": "of Muon's mean of gradients",
  "optim.muon_ratio": "how far Muon moves matrices; 1: 0.2 times the learning rate in the root "
  "mean square, as Adam usually does",
  "optim.momentum_dtype": "of the means of gradients that Adam and Muon keep",
  "optim.index_loss": "factor of the loss from which indexers learn",
  "optim.loss_scale": 'for compute_dtype="float16"',
  "mesh.data": "devices that share the batch",
  "mesh.fsdp": "devices that share the batch and hold a part of each weight",
  "mesh.tensor": "devices that share heads and hidden features",
  "mesh.sequence": "devices that share each sequence",
  "eval.min_context": "tokens known before the first one that is scored",
  "eval.monitor_batches": "batches of the validation split that training looks at; 0: all",
  "eval.pictures": "samples, and completions, that TensorBoard gets at each evaluation; 0: none",
}


def text(names: list[str]) -> str:
  """For the end of --help.

  Args:
    names: of the modules of `configs`.
  """
  lines = ["configs, --config=NAME or NAME:VARIANT; a file of your own is --config=FILE.py:"]
  for name in names:
    module = importlib.import_module(f"configs.{name}")
    first = (inspect.getdoc(module) or "").partition("\n")[0]
    variants = ", ".join(f":{variant}" for variant in variants_of(module))
    lines += [f"  {name:<11} {first}", f"{'':<13} {variants}"]
  lines += ["", "fields, --config.GROUP.FIELD=VALUE; arXiv:1904.10509 has the paper's values:"]
  for field, meaning in meanings().items():
    words = f"{meaning}; {validate.right(field)}"
    lines.append(f"  --config.{field}")
    lines += textwrap.wrap(words, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
  return "\n".join(lines)


def variants_of(module) -> list[str]:
  """Of a config, which names them to whoever asks for one that there is not."""
  try:
    module.get_config("no such variant")
  except ValueError as error:
    return re.findall(r":(\w[\w-]*)", str(error).partition("this config has")[2])
  return []


def meanings() -> dict[str, str]:
  """Of every field; those of the model are the arguments of its constructor."""
  doc = inspect.getdoc(model_lib.SparseTransformer.__init__) or ""
  arguments = doc.partition("Args:\n")[2].partition("\n\nRaises:")[0]
  of_model = {}
  for name, words in re.findall(r"^(\w+): (.*(?:\n  .*)*)", arguments, re.M):
    of_model[f"model.{name}"] = " ".join(words.split()).rstrip(".")
  return {field: MEANINGS.get(field) or of_model[field] for field in validate.fields()}
