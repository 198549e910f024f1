"""FusedRNN, FusedGRU and FusedLSTM: torch.nn's recurrent layers, parameter for parameter."""

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.base import FusedRNNBase


class FusedRNN(FusedRNNBase):
    """``torch.nn.RNN``: an Elman RNN with tanh or ReLU.

    ``h_t = f(x_t W_ih^T + b_ih + h_{t-1} W_hh^T + b_hh)``. Constructor, parameters, inputs and
    outputs are those of https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Args:
        *args: as ``nn.RNN``.
        nonlinearity: "tanh" or "relu".
        backend: "auto", "triton", "cpu", "native" (torch.nn's own kernels) or "eager".
        recompute: save only h (and c) for backward and compute the gates a second time.
        zoneout: probability that a unit keeps its state for a step (h, and the LSTM's c on its
            own, Krueger et al. 2017, arXiv:1606.01305); without training, the expectation is
            taken.
        recurrent_dropout: probability that a unit of h is left out of the recurrent product, the
            same ones at all steps (Gal and Ghahramani 2016, arXiv:1512.05287); only in training.
        learn_h0: own the initial states as parameters ``h_0`` [L*D, H] (and ``c_0``), at first
            zero; they stand in for ``hx`` where it is not given.
        clip_recurrent_grad: cut the gradient that a step passes to the state before it to
            [-value, value], element by element.
        **kwargs: as ``nn.RNN``.

    Inputs are ``input`` [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched, or a
    PackedSequence) and ``hx`` [L*D, B, H] (default zeros); outputs ``output`` [T, B, D*H], of
    the input's kind, and ``h_n`` [L*D, B, H]. What follows are keywords:

    ``lengths`` int64 [B], on the input's device: steps of each sequence of a padded batch. The
    final states are those at its end, the output is 0 beyond it; nothing is sorted or packed, and
    nobody waits for the GPU. Out-of-range values are an error on the CPU, cut off on a GPU.

    ``mask`` bool, [T, B] or as the input is laid out, says the same as ``lengths`` and stands in
    their place: true for the steps of a sequence, false for the padding behind them. A true step
    behind a false one is an error on the CPU; on a GPU the sequence ends at the false one.

    ``reset`` bool, [T, B] or as the input is laid out: steps at which a new stretch of a sequence
    begins, as an episode in reinforcement learning. The state before it is zero (or the learned
    one) whatever came before, ``hx`` included; in the reverse direction, the step before it is the
    first one of the other stretch.

    Example:
        >>> rnn = FusedRNN(10, 20, 2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        if len(args) > 3:  # torch.nn takes nonlinearity in fourth place, before bias
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if self.nonlinearity not in modes:
            raise ValueError(
                f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(modes[self.nonlinearity], *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """``output`` [T, B, D*H] and ``h_n`` [L*D, B, H]."""
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset, mask=mask)
        return output, h_n


class FusedGRU(FusedRNNBase):
    """``torch.nn.GRU``: gated recurrent units, the reset gate after the recurrent product.

    Constructor, parameters, inputs, outputs and formulas are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Args:
        *args: as ``nn.GRU``.
        backend: "auto", "triton", "cpu", "native" (torch.nn's own kernels) or "eager".
        recompute: save only h (and c) for backward and compute the gates a second time.
        zoneout: as :class:`FusedRNN`; so the next three.
        recurrent_dropout: see there.
        learn_h0: see there.
        clip_recurrent_grad: see there.
        **kwargs: as ``nn.GRU``.

    Inputs and outputs are those of :class:`FusedRNN`.

    Example:
        >>> gru = FusedGRU(10, 20, bidirectional=True, batch_first=True)
        >>> output, h_n = gru(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 40]), torch.Size([2, 3, 20]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse_projection(kwargs)
        super().__init__("GRU", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """``output`` [T, B, D*H] and ``h_n`` [L*D, B, H]."""
        output, (h_n,) = self._run(input, None if hx is None else (hx,), lengths, reset, mask=mask)
        return output, h_n


class FusedLSTM(FusedRNNBase):
    """``torch.nn.LSTM``: long short-term memory, with an optional projection of h.

    Constructor, parameters, inputs, outputs and formulas are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Args:
        *args: as ``nn.LSTM``.
        proj_size: size R of the projected h, 0 for none (then R = H below).
        backend: "auto", "triton", "cpu", "native" (torch.nn's own kernels) or "eager".
        recompute: save only h (and c) for backward and compute the gates a second time.
        zoneout: as :class:`FusedRNN`; so the next three.
        recurrent_dropout: see there.
        learn_h0: see there.
        clip_recurrent_grad: see there.
        **kwargs: as ``nn.LSTM``.

    Inputs are ``input`` as for :class:`FusedRNN` and ``hx = (h_0 [L*D, B, R], c_0 [L*D, B, H])``;
    outputs ``output`` [T, B, D*R] and ``(h_n, c_n)`` of the sizes of ``hx``. ``lengths``,
    ``mask`` and ``reset`` are as for :class:`FusedRNN`; ``return_cell_sequence=True`` adds a third
    output, c of all steps of the last layer [T, B, D*H], through which gradients flow as through
    the others.

    Example:
        >>> lstm = FusedLSTM(10, 20, 2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        return_cell_sequence: bool = False,
        mask: Tensor | None = None,
    ) -> Any:
        """``output`` [T, B, D*R] and ``(h_n [L*D, B, R], c_n [L*D, B, H])``.

        With ``return_cell_sequence``, third, the last layer's c of all steps [T, B, D*H].
        """
        return self._run(input, hx, lengths, reset, return_cell_sequence, mask)

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The size of c for an input as in :meth:`check_forward_args`."""
        rows, B, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, B, self.hidden_size

    def check_forward_args(
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """See :meth:`fused_rnn.base.FusedRNNBase.check_forward_args`."""
        self.check_input(input, batch_sizes)
        sizes = self.get_expected_hidden_size, self.get_expected_cell_size
        for i, size in enumerate(sizes):
            message = f"Expected hidden[{i}] size {{}}, got {{}}"
            self.check_hidden_size(hidden[i], size(input, batch_sizes), message)

    def permute_hidden(
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``hx`` with its sequences in the order of ``permutation``, int64 [B]."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)


def _refuse_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
