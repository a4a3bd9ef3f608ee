"""Pictures of patterns, of learned attention and of samples, and the report of a run."""

from sparse_flax import extras

extras.need("view", of=__name__)
