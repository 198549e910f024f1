"""Cells whose gates decide what a unit keeps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, logsigmoid

from fused_rnn.cells.definition import cell

BETA = 1.0  # of JANET: how much more is kept than let in


@cell(gates="ifzo", states="hcnm", initial={"m": -30.0})
def slstm(gates: Any, state: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sLSTM: an LSTM with an exponential input gate, whose c is divided by the sum n of its gates.

    c and n are kept as multiples of exp(m), so that nothing overflows; m begins so low that the
    first step sets it to its own i:

        m' = max(i, log sigmoid(f) + m)
        c' = exp(log sigmoid(f) + m - m') c + exp(i - m') tanh(z)
        n' = exp(log sigmoid(f) + m - m') n + exp(i - m')
        h' = sigmoid(o) c' / n'

    M. Beck, K. Poeppel, M. Spanring, A. Auer, O. Prudnikova, M. Kopp, G. Klambauer,
    J. Brandstetter, S. Hochreiter, "xLSTM: Extended long short-term memory", NeurIPS 2024,
    arXiv:2405.04517.
    """
    kept = logsigmoid(gates.f) + state.m
    m = torch.maximum(gates.i, kept)
    i, f = torch.exp(gates.i - m), torch.exp(kept - m)
    c = f * state.c + i * torch.tanh(gates.z)
    n = f * state.n + i
    return torch.sigmoid(gates.o) * c / n, c, n, m


@cell(gates="ifgo", states="hc", parameters=("p_i", "p_f", "p_o"))
def peephole_lstm(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """An LSTM whose gates see c, each by a weight of the unit's own.

        c' = sigmoid(f + p_f c) c + sigmoid(i + p_i c) tanh(g)
        h' = sigmoid(o + p_o c') tanh(c')

    F. A. Gers, N. N. Schraudolph, J. Schmidhuber, "Learning precise timing with LSTM recurrent
    networks", Journal of Machine Learning Research 3, 2002.
    """
    i = torch.sigmoid(gates.i + p.p_i * state.c)
    f = torch.sigmoid(gates.f + p.p_f * state.c)
    c = f * state.c + i * torch.tanh(gates.g)
    return torch.sigmoid(gates.o + p.p_o * c) * torch.tanh(c), c


GAINS = {f"gain_{gate}": 1.0 for gate in "ifgo"}
SHIFTS = {f"shift_{gate}": 0.0 for gate in "ifgo"}


@cell(gates="ifgo", states="hc", parameters=GAINS | SHIFTS)
def layer_norm_lstm(gates: Any, state: Any, p: Any) -> tuple[Tensor, Tensor]:
    """An LSTM whose pre-activations have mean 0 and variance 1 over the units of a head.

    With norm(x) = gain (x - mean(x)) / sqrt(variance(x) + 1e-5) + shift, for each gate its own:

        c' = sigmoid(norm(f)) c + sigmoid(norm(i)) tanh(norm(g))
        h' = sigmoid(norm(o)) tanh(c')

    The paper normalises both products by themselves, all gates together, and c' once more: another
    function.

    J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", 2016, arXiv:1607.06450.
    """
    units = gates.i.shape[-1:]
    i = torch.sigmoid(layer_norm(gates.i, units, p.gain_i, p.shift_i))
    f = torch.sigmoid(layer_norm(gates.f, units, p.gain_f, p.shift_f))
    g = torch.tanh(layer_norm(gates.g, units, p.gain_g, p.shift_g))
    o = torch.sigmoid(layer_norm(gates.o, units, p.gain_o, p.shift_o))
    c = f * state.c + i * g
    return o * torch.tanh(c), c


@cell(gates="fgo", states="hc")
def coupled_lstm(gates: Any, state: Any) -> tuple[Tensor, Tensor]:
    """An LSTM that lets in as much as it forgets (CIFG): its input gate is 1 - f.

        c' = sigmoid(f) c + (1 - sigmoid(f)) tanh(g)
        h' = sigmoid(o) tanh(c')

    K. Greff, R. K. Srivastava, J. Koutnik, B. R. Steunebrink, J. Schmidhuber, "LSTM: A search space
    odyssey", IEEE Transactions on Neural Networks and Learning Systems 28, 2017.
    """
    c = torch.lerp(torch.tanh(gates.g), state.c, torch.sigmoid(gates.f))
    return torch.sigmoid(gates.o) * torch.tanh(c), c


@cell(gates="fg", states="h")
def janet(gates: Any, state: Any) -> Tensor:
    """JANET: "just another network", an LSTM with the forget gate alone.

        h' = sigmoid(f) h + (1 - sigmoid(f - beta)) tanh(g), beta = 1

    J. van der Westhuizen, J. Lasenby, "The unreasonable effectiveness of the forget gate", 2018,
    arXiv:1804.04849.
    """
    entering = 1 - torch.sigmoid(gates.f - BETA)
    return torch.addcmul(torch.sigmoid(gates.f) * state.h, entering, torch.tanh(gates.g))


@cell(gates="fn", states="h", apart="n")
def minimal_gated_unit(gates: Any, state: Any) -> Tensor:
    """A GRU whose one gate both resets and updates.

        h' = (1 - sigmoid(f)) h + sigmoid(f) tanh(n_x + sigmoid(f) n_h)

    In the paper f multiplies h before the recurrent product, which would take a second product in
    each step. Here it acts after it, as the reset gate of torch.nn's GRU does: another function of
    the same parameters.

    G.-B. Zhou, J. Wu, C.-L. Zhang, Z.-H. Zhou, "Minimal gated unit for recurrent neural networks",
    International Journal of Automation and Computing 13, 2016.
    """
    f = torch.sigmoid(gates.f)
    return torch.lerp(state.h, torch.tanh(gates.n_x + f * gates.n_h), f)
