"""The command ``python -m fused_rnn.check``; see :mod:`fused_rnn.tools.check`."""

if __name__ == "__main__":
    from fused_rnn.tools.check.command import run

    run()
