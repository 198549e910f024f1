"""What a tracer does at the moment."""

import torch


def exporting() -> bool:
    """Whether torch.export traces.

    The flag itself is read: Dynamo of PyTorch 2.11 takes ``torch.compiler.is_exporting()`` to be
    true under torch.compile, too.
    """
    return torch.compiler._is_exporting_flag
