"""One step of decoding: `triton`, five kernels per layer; `cluster`, one kernel for all layers."""
