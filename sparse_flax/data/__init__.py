"""Data sets as byte streams, and batches of them that are a pure function of seed and step."""

from sparse_flax import extras

extras.need("data", of=__name__)

from sparse_flax.data.audio import mu_law_decode
from sparse_flax.data.audio import mu_law_encode
from sparse_flax.data.audio import read_wav
from sparse_flax.data.audio import SAMPLE_RATE
from sparse_flax.data.audio import wav_of
from sparse_flax.data.audio import write_wav
from sparse_flax.data.batches import eval_batches
from sparse_flax.data.batches import make_batches
from sparse_flax.data.dataset import Dataset
from sparse_flax.data.far_recall import answers
from sparse_flax.data.far_recall import NAME as RECALL
from sparse_flax.data.far_recall import Sizes as RecallSizes
from sparse_flax.data.recordings import load_codes
from sparse_flax.data.sources import ARRAYS
from sparse_flax.data.sources import check
from sparse_flax.data.sources import name_for
from sparse_flax.data.sources import NAMES
from sparse_flax.data.sources import of_arrays
from sparse_flax.data.sources import open_dataset
from sparse_flax.data.sources import SAMPLES
from sparse_flax.data.sources import SPLITS

__all__ = [
  "ARRAYS",
  "NAMES",
  "RECALL",
  "SAMPLES",
  "SAMPLE_RATE",
  "SPLITS",
  "Dataset",
  "RecallSizes",
  "answers",
  "check",
  "eval_batches",
  "load_codes",
  "make_batches",
  "mu_law_decode",
  "mu_law_encode",
  "name_for",
  "of_arrays",
  "open_dataset",
  "read_wav",
  "wav_of",
  "write_wav",
]
