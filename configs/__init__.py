"""One file per data set: plain values, and above them what they cost and what came of them."""
