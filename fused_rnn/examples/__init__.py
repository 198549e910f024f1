"""Examples to run: `python -m fused_rnn.examples.textgen` and `... .forecast`, each with --help."""
