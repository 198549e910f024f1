"""What PyTorch does around a call at the moment: trace, export, transform or differentiate."""

from typing import Any

import torch
from torch.autograd import forward_ad

_PROXIES: Any = torch._C._TorchDispatchModeKey.PROXY  # make_fx records
_MANY: Any = torch._C._parse_dispatch_key("VmapMode")  # by name it takes longer


def transformed() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def tracing() -> bool:
    """Whether a layer is traced, so that it must go through the operators.

    Not under a transform of torch.func: an operator's gradient is closed to those, and a tangent
    would be lost silently. There the eager loop is traced, for the T and B at hand.
    """
    recorded = torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXIES) is not None
    return recorded and not transformed()


def exporting() -> bool:
    """Whether torch.export traces.

    The flag itself is read: Dynamo of PyTorch 2.11 takes ``torch.compiler.is_exporting()`` to be
    true under torch.compile, too.
    """
    return torch.compiler._is_exporting_flag


def forward_mode() -> bool:
    """Whether a forward-mode derivative may be asked for: no engine has one."""
    return forward_ad._current_level >= 0


def vectorised() -> bool:
    """Whether many gradients are asked for at once, by ``is_grads_batched=True`` and its users.

    What stands for them has no memory to look at. (vmap of torch.func is another one.)
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_MANY)


def readable(device: torch.device) -> bool:
    """Whether values on ``device`` may be looked at: at once, and by nobody who traces."""
    return device.type == "cpu" and not tracing() and not transformed()
