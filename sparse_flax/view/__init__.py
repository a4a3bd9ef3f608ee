"""Pictures of patterns, of learned attention and of samples, and the report of a run."""
