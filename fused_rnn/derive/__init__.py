"""From a cell's step in PyTorch to what its sweeps compute: factors, adjoint, and their source."""
