"""Programs that measure one training step each, in processes of their own: ours and its peers'."""
