"""Several devices: how arrays are sharded, and sequences that devices share."""
