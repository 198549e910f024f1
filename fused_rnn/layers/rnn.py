"""FusedRNN and FusedGRU: torch.nn's layers with one state, parameter for parameter."""

from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines.dispatch import Backend
from fused_rnn.layers.base import FusedRNNBase


class FusedRNN(FusedRNNBase):
    """An Elman RNN with tanh or ReLU, in the place of ``torch.nn.RNN``.

    Each layer computes, for every step t and with f as ``nonlinearity``::

        h_t = f(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

    The formula, parameters and state dict are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Args:
        input_size: features I of the input.
        hidden_size: features H of the hidden state.
        num_layers: layers L, each of which takes the output of the one before it.
        nonlinearity: f, "tanh" or "relu".
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether batched tensors are [B, T, .], not [T, B, .]; states are not concerned.
        dropout: probability, in [0, 1], with which the output of each layer but the last is dropped
            in training.
        bidirectional: whether a second direction sweeps from the last step to the first; D is 2
            then, else 1.
        proj_size: 0; only an LSTM has projections.
        device: of the parameters; by default PyTorch's own.
        dtype: of the parameters; by default PyTorch's own.
        backend: "auto" (what is fastest, see :func:`fused_rnn.explain`), "triton", "cpu", "native"
            (torch.nn's own kernels) or "eager"; one that cannot run is an error at the call.
        recompute: save only h for backward and compute the gates a second time.
        zoneout: probability, in [0, 1), that a unit keeps its state for a step
            (Krueger et al. 2017, arXiv:1606.01305); without training, the expectation is taken.
        recurrent_dropout: probability, in [0, 1), that a unit of h is left out of the recurrent
            product, the same ones at all steps (Gal and Ghahramani 2016, arXiv:1512.05287); only in
            training.
        learn_h0: own the initial states as parameters ``h_0`` [L*D, H], at first zero; they
            stand in for ``hx`` where it is not given.
        clip_recurrent_grad: cut the gradient that a step passes to the state before it to
            [-value, value], element by element; None to leave it.
        heads: blocks k on the diagonal of the recurrent weights: each k-th part of the hidden state
            enters its own part of the gates alone. k divides H, and ``weight_hh`` are [k, G*H/k,
            H/k] for k > 1, each block by gate and unit, G being the number of gates.

    Inputs:
        **input**: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or a PackedSequence,
        in the parameters' dtype (under autocast in any) and on their device.

        **hx**: h_0 [L*D, B, H] ([L*D, H] unbatched), by default zeros.

        **lengths** (keyword): int64 or int32 [B], on the input's device: steps of each sequence of
        a padded batch. The final states are those at its end, the output is 0 beyond it; nothing is
        sorted or packed, and nobody waits for the GPU. Out-of-range values are an error on the CPU,
        cut off on a GPU.

        **mask** (keyword): bool, [T, B] or as the input is laid out, says the same as ``lengths``
        and stands in their place: true for the steps of a sequence, false for the padding behind
        them. A true step behind a false one is an error on the CPU; on a GPU the sequence ends at
        the false one.

        **reset** (keyword): bool, [T, B] or as the input is laid out (packed as it is): steps at
        which a new segment of a sequence begins, as an episode in reinforcement learning. The state
        before it is zero (or the learned one) whatever came before, ``hx`` included; in the reverse
        direction, the step before it is the first one of the other segment.

    Outputs:
        **output**: h of all steps of the last layer [T, B, D*H], laid out as the input is; **h_n**:
        h after the last step of each layer and direction [L*D, B, H].

    Raises:
        TypeError: an argument, of the constructor or of a call, is of a wrong type.
        ValueError: a value, a dtype or a combination of arguments is wrong.
        RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.

    Example:
        >>> rnn = FusedRNN(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        clip_recurrent_grad: float | None = None,
        heads: int = 1,
    ) -> None:
        _refuse_projection(proj_size)
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            modes[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            learn_h0=learn_h0,
            clip_recurrent_grad=clip_recurrent_grad,
            heads=heads,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Return ``output`` [T, B, D*H], laid out as the input is, and ``h_n`` [L*D, B, H].

        Args:
            input: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or packed.
            hx: initial state [L*D, B, H], by default zeros, or the learned one.
            lengths: steps of each sequence of a padded batch, int64 or int32 [B].
            reset: bool, as the input is laid out: steps at which a new segment begins.
            mask: bool, as the input is laid out: the steps of each sequence, in place of lengths.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: a value, a dtype or a combination of arguments is wrong.
            RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.
        """
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset, mask)
        return output, h_n

    if TYPE_CHECKING:  # so that a call of the module has the types of forward
        __call__ = forward


class FusedGRU(FusedRNNBase):
    """Gated recurrent units, in the place of ``torch.nn.GRU``.

    Each layer computes, for every step t, with s the logistic sigmoid and * element by element::

        r_t = s(W_ir x_t + b_ir + W_hr h_(t-1) + b_hr)
        z_t = s(W_iz x_t + b_iz + W_hz h_(t-1) + b_hz)
        n_t = tanh(W_in x_t + b_in + r_t * (W_hn h_(t-1) + b_hn))
        h_t = (1 - z_t) * n_t + z_t * h_(t-1)

    The reset gate acts after the recurrent product. The formulas, parameters and state dict are
    those of https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Args:
        input_size: features I of the input.
        hidden_size: features H of the hidden state.
        num_layers: layers L, each of which takes the output of the one before it.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether batched tensors are [B, T, .], not [T, B, .]; states are not concerned.
        dropout: probability, in [0, 1], with which the output of each layer but the last is dropped
            in training.
        bidirectional: whether a second direction sweeps from the last step to the first; D is 2
            then, else 1.
        proj_size: 0; only an LSTM has projections.
        device: of the parameters; by default PyTorch's own.
        dtype: of the parameters; by default PyTorch's own.
        backend: "auto" (what is fastest, see :func:`fused_rnn.explain`), "triton", "cpu", "native"
            (torch.nn's own kernels) or "eager"; one that cannot run is an error at the call.
        recompute: save only h for backward and compute the gates a second time.
        zoneout: probability, in [0, 1), that a unit keeps its state for a step
            (Krueger et al. 2017, arXiv:1606.01305); without training, the expectation is taken.
        recurrent_dropout: probability, in [0, 1), that a unit of h is left out of the recurrent
            product, the same ones at all steps (Gal and Ghahramani 2016, arXiv:1512.05287); only in
            training.
        learn_h0: own the initial states as parameters ``h_0`` [L*D, H], at first zero; they
            stand in for ``hx`` where it is not given.
        clip_recurrent_grad: cut the gradient that a step passes to the state before it to
            [-value, value], element by element; None to leave it.
        heads: blocks k on the diagonal of the recurrent weights: each k-th part of the hidden state
            enters its own part of the gates alone. k divides H, and ``weight_hh`` are [k, G*H/k,
            H/k] for k > 1, each block by gate and unit, G being the number of gates.

    Inputs:
        **input**: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or a PackedSequence,
        in the parameters' dtype (under autocast in any) and on their device.

        **hx**: h_0 [L*D, B, H] ([L*D, H] unbatched), by default zeros.

        **lengths** (keyword): int64 or int32 [B], on the input's device: steps of each sequence of
        a padded batch. The final states are those at its end, the output is 0 beyond it; nothing is
        sorted or packed, and nobody waits for the GPU. Out-of-range values are an error on the CPU,
        cut off on a GPU.

        **mask** (keyword): bool, [T, B] or as the input is laid out, says the same as ``lengths``
        and stands in their place: true for the steps of a sequence, false for the padding behind
        them. A true step behind a false one is an error on the CPU; on a GPU the sequence ends at
        the false one.

        **reset** (keyword): bool, [T, B] or as the input is laid out (packed as it is): steps at
        which a new segment of a sequence begins, as an episode in reinforcement learning. The state
        before it is zero (or the learned one) whatever came before, ``hx`` included; in the reverse
        direction, the step before it is the first one of the other segment.

    Outputs:
        **output**: h of all steps of the last layer [T, B, D*H], laid out as the input is; **h_n**:
        h after the last step of each layer and direction [L*D, B, H].

    Raises:
        TypeError: an argument, of the constructor or of a call, is of a wrong type.
        ValueError: a value, a dtype or a combination of arguments is wrong.
        RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.

    Example:
        >>> gru = FusedGRU(10, 20, bidirectional=True, batch_first=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
        recompute: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_h0: bool = False,
        clip_recurrent_grad: float | None = None,
        heads: int = 1,
    ) -> None:
        _refuse_projection(proj_size)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            0,
            device,
            dtype,
            backend=backend,
            recompute=recompute,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            learn_h0=learn_h0,
            clip_recurrent_grad=clip_recurrent_grad,
            heads=heads,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Return ``output`` [T, B, D*H], laid out as the input is, and ``h_n`` [L*D, B, H].

        Args:
            input: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or packed.
            hx: initial state [L*D, B, H], by default zeros, or the learned one.
            lengths: steps of each sequence of a padded batch, int64 or int32 [B].
            reset: bool, as the input is laid out: steps at which a new segment begins.
            mask: bool, as the input is laid out: the steps of each sequence, in place of lengths.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: a value, a dtype or a combination of arguments is wrong.
            RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.
        """
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset, mask)
        return output, h_n

    if TYPE_CHECKING:  # so that a call of the module has the types of forward
        __call__ = forward


def _refuse_projection(proj_size: int) -> None:
    if proj_size != 0:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
