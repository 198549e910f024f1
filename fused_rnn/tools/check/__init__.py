"""Is everything right on this machine? ``python -m fused_rnn.check`` measures and says so."""
