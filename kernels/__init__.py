"""Triton kernels of fused_rnn. Import them as ``fused_rnn.kernels``."""

if __name__ != "fused_rnn.kernels":
    raise ImportError(
        f"imported as {__name__!r}: the kernels are a part of fused_rnn, import fused_rnn.kernels"
    )
