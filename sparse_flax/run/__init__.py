"""A run on disk: its folder, checkpoints, digests, and the checks of its config."""
