"""The Triton engine: the kernels' sweeps, and the matrix products around them."""
