"""Whole short sequences (a column, a block), all of whose keys fit in shared memory."""
