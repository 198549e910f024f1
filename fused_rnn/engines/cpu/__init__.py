"""The CPU engine: both sweeps as PyTorch calls, as few as possible for a time step."""
