"""FusedLSTM: torch.nn's layer with two states, parameter for parameter."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_rnn.engines.dispatch import Backend
from fused_rnn.layers.base import FusedRNNBase


class FusedLSTM(FusedRNNBase):
    """Long short-term memory, in the place of ``torch.nn.LSTM``.

    Each layer computes, for every step t, with s the logistic sigmoid and * element by element::

        i_t = s(W_ii x_t + b_ii + W_hi h_(t-1) + b_hi)
        f_t = s(W_if x_t + b_if + W_hf h_(t-1) + b_hf)
        g_t = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)
        o_t = s(W_io x_t + b_io + W_ho h_(t-1) + b_ho)
        c_t = f_t * c_(t-1) + i_t * g_t
        h_t = o_t * tanh(c_t)

    and with ``proj_size`` R > 0 puts W_hr h_t [R] in the place of h_t; R = H without. The formulas,
    parameters and state dict are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

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
        proj_size: features R of the projected h, less than H; 0 for none.
        device: of the parameters; by default PyTorch's own.
        dtype: of the parameters; by default PyTorch's own.
        backend: "auto" (what is fastest, see :func:`fused_rnn.explain`), "triton", "cpu", "native"
            (torch.nn's own kernels) or "eager"; one that cannot run is an error at the call.
        recompute: save only h and c for backward and compute the gates a second time.
        zoneout: probability, in [0, 1), that a unit keeps its state for a step (h and c
            each on their own; Krueger et al. 2017, arXiv:1606.01305); without training, the
            expectation is taken.
        recurrent_dropout: probability, in [0, 1), that a unit of h is left out of the recurrent
            product, the same ones at all steps (Gal and Ghahramani 2016, arXiv:1512.05287); only in
            training.
        learn_h0: own the initial states as parameters ``h_0`` [L*D, R] and
            ``c_0`` [L*D, H], at first zero; they stand in for ``hx`` where it is not given.
        clip_recurrent_grad: cut the gradient that a step passes to the state before it to
            [-value, value], element by element; None to leave it.
        heads: blocks k on the diagonal of the recurrent weights: each k-th part of the hidden state
            enters its own part of the gates alone. k divides H, and ``weight_hh`` are [k, G*H/k,
            H/k] for k > 1, each block by gate and unit, G being the number of gates.

    Inputs:
        **input**: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or a PackedSequence,
        in the parameters' dtype (under autocast in any) and on their device.

        **hx**: a pair of h_0 [L*D, B, R] and c_0 [L*D, B, H] ([L*D, .] unbatched), by default
        zeros.

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

        **return_cell_sequence** (keyword): whether c of all steps is a third output; False.

    Outputs:
        **output**: h of all steps of the last layer [T, B, D*R], laid out as the input is; a
        pair of **h_n** [L*D, B, R] and **c_n** [L*D, B, H], after the last step of each layer and
        direction; with ``return_cell_sequence`` also c of all steps of the last layer
        [T, B, D*H], laid out as the input is, through which gradients flow as through the others.

    Raises:
        TypeError: an argument, of the constructor or of a call, is of a wrong type.
        ValueError: a value, a dtype or a combination of arguments is wrong.
        RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.

    Example:
        >>> lstm = FusedLSTM(10, 20, 2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
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
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
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
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: Literal[False] = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: Literal[True],
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: PackedSequence | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: Literal[False] = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: PackedSequence | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: Literal[True],
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor], PackedSequence]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | PackedSequence | None = None,
        mask: Tensor | None = None,
        return_cell_sequence: bool = False,
    ) -> Any:
        """Return ``output`` [T, B, D*R], laid out as the input is, and the pair of final states.

        Args:
            input: [T, B, I] ([B, T, I] with ``batch_first``, [T, I] unbatched) or packed.
            hx: initial states, h [L*D, B, R] and c [L*D, B, H]; by default zeros, or the learned.
            lengths: steps of each sequence of a padded batch, int64 or int32 [B].
            reset: bool, as the input is laid out: steps at which a new segment begins.
            mask: bool, as the input is laid out: the steps of each sequence, in place of lengths.
            return_cell_sequence: return, third, c of all steps of the last layer [T, B, D*H].

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: a value, a dtype or a combination of arguments is wrong.
            RuntimeError: a size or a device does not fit, or ``backend`` cannot run the layer.
        """
        return self._run(input, hx, lengths, reset, mask, return_cell_sequence)

    if TYPE_CHECKING:  # so that a call of the module has the types of forward
        __call__ = forward

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The size [L*D, B, H] of c.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
            batch_sizes: of a packed input, int64 [T]; else None.
        """
        rows, B, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, B, self.hidden_size

    def check_forward_args(
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise torch.nn's error unless the input and the initial states fit.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
            hidden: a pair of h [L*D, B, R] and c [L*D, B, H].
            batch_sizes: of a packed input, int64 [T]; else None.

        Raises:
            RuntimeError: a size, the number of axes or a device does not fit.
            ValueError: the dtype does not.
        """
        self.check_input(input, batch_sizes)
        sizes = self.get_expected_hidden_size, self.get_expected_cell_size
        for i, size in enumerate(sizes):
            message = f"Expected hidden[{i}] size {{}}, got {{}}"
            self.check_hidden_size(hidden[i], size(input, batch_sizes), message)

    def permute_hidden(
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``hx`` with its sequences in the order of ``permutation``, int64 [B], or as they are."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)
